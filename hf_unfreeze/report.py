"""What happened in a run, as a figure; the plan table and the model-card section come along."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._history import past_transitions
from ._plan import PlanRow, model_card_section, plan_rows, plan_table
from .errors import UnfreezeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PlanRow", "model_card_section", "plan_rows", "plan_table", "timeline"]


def timeline(run: Any, metric: str | None = None) -> Figure:
    """Draw a run: one row per group, bottom → top, coloured by its learning rate, grey where frozen.

    Example:
        >>> timeline(trainer).savefig("timeline.png")

    Args:
        run: A Trainer that has trained, or its ``state.log_history``.
        metric: Key of the evaluation metric drawn below; by default accuracy, else F1, else the loss.

    Raises:
        UnfreezeError: The history holds no learning rate of a group.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    history: Sequence[dict[str, Any]] = run if isinstance(run, (list, tuple)) else run.state.log_history
    logs = [record for record in history if any(key.startswith("lr/") for key in record)]
    if not logs:
        raise UnfreezeError(
            "this log_history has no lr/<group> records. Train with UnfreezeCallback, and with logging_steps no "
            "larger than the number of steps."
        )
    names = sorted({key[3:] for record in logs for key in record if key.startswith("lr/")}, key=_bottom_to_top)
    opened = [record["step"] for record in past_transitions(history)]
    edges = sorted({0, *opened, *(record["step"] for record in logs)} - {s for s in opened if s > logs[-1]["step"]})
    rates = [[_rate(f"lr/{name}", end, logs, opened) for end in edges[1:]] for name in names]
    positive = [rate for row in rates for rate in row if rate > 0] or [1.0]  # 1.0: a run of warm-up steps at rate 0
    low, high = min(positive), max(positive)

    figure = Figure(figsize=(9, 1.6 + 0.28 * len(names) + 1.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[0.28 * len(names) + 0.6, 1.6])
    top.set_facecolor("#d9d9d9")
    masked = [[rate if rate > 0 else float("nan") for rate in row] for row in rates]
    norm = LogNorm(low if low < high else high / 10, high)
    mesh = top.pcolormesh(edges, range(len(names) + 1), masked, norm=norm, cmap="viridis", rasterized=True)
    top.set_yticks([row + 0.5 for row in range(len(names))], names)
    for row in range(1, len(names)):
        top.axhline(row, color="white", linewidth=1.5)
    top.set_title("Learning rate of each layer group (grey: frozen)", loc="left")
    figure.colorbar(mesh, ax=top, label="learning rate", pad=0.01)
    _draw_metric(bottom, history, metric)
    for step in filter(None, opened):
        bottom.axvline(step, color="#bbbbbb", linewidth=0.8, zorder=0)
    bottom.set_xlabel("optimizer step")
    bottom.spines[["top", "right"]].set_visible(False)
    return figure


def _rate(key: str, end: int, logs: Sequence[dict[str, Any]], opened: Sequence[int]) -> float:
    """Return the rate up to the step ``end``: that of the next log, or frozen as before where it opened in between."""
    index = next(i for i, record in enumerate(logs) if record["step"] >= end)
    before = logs[index - 1].get(key, 0.0) if index else 0.0
    opens_later = any(end <= step < logs[index]["step"] for step in opened)
    return 0.0 if opens_later and before == 0.0 and index else float(logs[index].get(key, 0.0))


def _draw_metric(axes: Any, history: Sequence[dict[str, Any]], metric: str | None) -> None:
    seen = {key for record in history for key in record if key.startswith("eval_")}
    wanted = [metric] if metric else ["eval_accuracy", "eval_f1", "eval_wer", "eval_loss", "loss"]
    if metric and metric not in seen:
        raise UnfreezeError(f"metric {metric!r} is not in this run. It has {', '.join(sorted(seen)) or 'none'}.")
    key = next((name for name in wanted if name in seen), "loss")
    points = [(record["step"], record[key]) for record in history if key in record]
    axes.plot(*zip(*points, strict=True), color="#d1495b", marker="o", markersize=4)
    axes.set_ylabel(key.removeprefix("eval_") + (" (evaluation)" if key != "loss" else " (training)"))


def _bottom_to_top(name: str) -> tuple[int, str, int]:
    """Order group names of a saved history, whose keys are sorted as text: embeddings, blocks by number, head."""
    match = re.fullmatch(r"(?:(.+)\.)?block\[(\d+)\]", name)
    if match:
        stack = match[1] or ""
        return (2 if stack == "decoder" else 1, stack, int(match[2]))
    return (3 if name == "head" else 0, name, 0)
