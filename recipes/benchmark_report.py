"""The benchmark's runs as a Markdown table and two figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MARGIN = 0.005  # of the metric: what counts as equal
FULL = "full fine-tuning"
COLUMNS = ["method", "epochs", "rate", "mean", "each seed", "seconds", "of full", "each epoch", "k/n of full's",
           "optimizer MB", "peak MB"]  # fmt: skip

Run = dict[str, Any]


def best_rate(runs: Sequence[Run], of: dict[str, Any], better: int) -> float:
    """Return the learning rate that was best for a task, method and length with the first seed."""
    wanted = {**of, "seed": 0}
    tried = [run for run in runs if wanted.items() <= run.items()]
    return max(tried, key=lambda run: better * run["quality"])["rate"]


class Row(NamedTuple):
    """A method at one length of run, over its seeds."""

    method: str
    epochs: int
    rate: float
    qualities: list[float]
    seconds: list[float]  # of a whole run, without evaluation
    each_epoch: list[float]
    open: list[float]  # share of the blocks that train at the end of each epoch
    optimizer_bytes: int
    peak_bytes: int  # of the process, or of the GPU

    @property
    def quality(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.qualities)


def rows_of(runs: Sequence[Run], task: str, better: int, clock: str) -> list[Row]:
    """Sum up the runs of a task at the rates that were chosen."""
    rows = []
    for method, epochs in dict.fromkeys((run["method"], run["epochs"]) for run in runs if run["task"] == task):
        of = {"task": task, "method": method, "epochs": epochs}
        rate = best_rate(runs, of, better)
        members = [run for run in runs if {**of, "rate": rate}.items() <= run.items()]
        rows.append(
            Row(
                method,
                epochs,
                rate,
                [run["quality"] for run in members],
                [sum(run[clock]) for run in members],
                [statistics.median(epoch) for epoch in zip(*(run[clock] for run in members), strict=True)],
                members[0]["open"],
                members[0]["optimizer_bytes"],
                int(statistics.median(max(run["memory"]) for run in members)),
            )
        )
    return rows


def fastest_equal(rows: Sequence[Row], method: str, target: float, better: int) -> float | None:
    """Return the median seconds of a method's shortest run that is as good as the target."""
    equal = [row for row in rows if row.method == method and better * (row.quality - target) >= -MARGIN]
    return min((statistics.median(row.seconds) for row in equal), default=None)


def table(rows: Sequence[Row], better: int) -> str:
    """Write the rows as Markdown; seconds are also given as a share of full fine-tuning's at its best.

    Beside those of each epoch stands what k of n blocks would take of one of full fine-tuning's if the rest were free.
    """
    best = max((row for row in rows if row.method == FULL), key=lambda row: better * row.quality, default=rows[0])
    measure, epoch = statistics.median(best.seconds), statistics.median(best.each_epoch)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        seconds = statistics.median(row.seconds)
        cells = [
            row.method,
            str(row.epochs),
            f"{row.rate:g}",
            f"{row.quality:.3f}",
            " ".join(f"{quality:.3f}" for quality in row.qualities),
            f"{seconds:.0f}",
            f"{seconds / measure:.2f}",
            " ".join(f"{seconds:.3g}" for seconds in row.each_epoch),
            " ".join(f"{share * epoch:.3g}" for share in row.open),
            f"{row.optimizer_bytes / 1e6:.1f}",
            f"{row.peak_bytes / 1e6:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Time at equal quality: {best.quality:.3f} of {best.method} in {best.epochs} epochs, give {MARGIN}.",
        "",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        seconds_equal = fastest_equal(rows, method, best.quality, better)
        share = "not reached" if seconds_equal is None else f"{seconds_equal / measure:.2f}"
        lines.append(f"* {method}: {share}")
    return "\n".join(lines)


def report(runs: Sequence[Run], tasks: dict[str, int], clock: str, folder: Path) -> None:
    """Write benchmark.md, frontier.png and epochs.png; ``tasks`` says whether more (1) or less (-1) is better."""
    parts = []
    every = {task: rows_of(runs, task, better, clock) for task, better in tasks.items()}
    for task, rows in every.items():
        about = next(run for run in runs if run["task"] == task)
        parts.append(
            f"## {task}: {about['examples']} examples, {about['threads']} threads, {clock} seconds\n\n"
            + table(rows, tasks[task])
        )
    text = "\n\n".join(parts) + "\n"
    (folder / "benchmark.md").write_text(text, encoding="utf-8")
    print(text)
    draw(every, folder)


def draw(every: dict[str, list[Row]], folder: Path) -> None:
    """Draw quality against seconds, and the seconds of each epoch stacked."""
    from matplotlib.figure import Figure

    frontier = Figure(figsize=(5 * len(every), 4), layout="constrained")
    stacked = Figure(figsize=(5 * len(every), 4), layout="constrained")
    for place, (task, rows) in enumerate(every.items(), 1):
        axes = frontier.add_subplot(1, len(every), place)
        for method in dict.fromkeys(row.method for row in rows):
            members = sorted((row for row in rows if row.method == method), key=lambda row: row.epochs)
            axes.errorbar(
                [statistics.median(row.seconds) for row in members],
                [row.quality for row in members],
                [
                    [row.quality - min(row.qualities) for row in members],
                    [max(row.qualities) - row.quality for row in members],
                ],
                marker="o",
                capsize=2,
                label=method,
            )
        axes.set(title=task, xlabel="seconds of training", ylabel="at the end of the run: mean, and range of the seeds")
        axes.legend(fontsize=6)
        bars = stacked.add_subplot(1, len(every), place)
        names = [f"{row.method}, {row.epochs}" for row in rows]
        for epoch in range(max(row.epochs for row in rows)):
            before = [sum(row.each_epoch[:epoch]) for row in rows]
            widths = [row.each_epoch[epoch] if epoch < row.epochs else 0 for row in rows]
            bars.barh(names, widths, left=before, edgecolor="white")
        bars.set(title=task, xlabel="seconds, epoch by epoch")
        bars.invert_yaxis()
        bars.tick_params(axis="y", labelsize=6)
    frontier.savefig(folder / "frontier.png", dpi=150)
    stacked.savefig(folder / "epochs.png", dpi=150)
