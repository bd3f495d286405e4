"""Search over schedule, layer decay and learning rate: runs a script again and again, and keeps each trial."""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._plateau import greater_is_better
from .errors import UnfreezeError
from .schedule import RECOMMENDED, parse_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["SCHEDULES", "Search", "trials_figure", "trials_table"]

SCHEDULES = ("head@0", "top(0.25)", RECOMMENDED, "linear_probe(until=20%)", "gradual(every=10%)", "all_at_once")

Row = dict[str, Any]
_METRICS = re.compile(r"\{'[^{}]*\}")  # as the Trainer prints them
_BARE = re.compile(r": (nan|-?inf)\b")
_POLL = 0.1  # seconds between two looks at the log of a trial
# The most that a range may reach, and what is told of one that cannot be.
_RANGES = {
    "layer_decay": (1.0, "both above 0 and at most 1, such as 0.7 1.0"),
    "learning_rate": (sys.float_info.max, "both above 0, such as 1e-5 1e-3"),
}
_ENOUGH = 3  # finished trials of a schedule, for a median


@dataclass
class Search:
    """Trials of one script; another search in the same folder goes on with them.

    Args:
        script: A script with the arguments of ``UnfreezeArguments`` and ``TrainingArguments``, which leaves
            ``all_results.json`` in its ``--output_dir``, as the recipes do.
        arguments: Arguments of the script that all trials share.
        output: Folder of the trials and of ``study.db``.
        metric: Key in ``all_results.json``; less is better for a loss, an error rate or a perplexity.
        schedules: What is tried as ``--schedule``.
        layer_decay: Lowest and highest.
        learning_rate: Lowest and highest, drawn on a logarithmic scale.
        seed: Of the draws.
        prune: Whether a trial ends at an evaluation that is worse than the median of what three or more finished trials
            of its schedule had there. Other schedules do not count: one that opens late starts slowly.
    """

    script: Path
    arguments: Sequence[str] = ()
    output: Path = Path("runs/search")
    metric: str = "eval_loss"
    schedules: Sequence[str] = SCHEDULES
    layer_decay: tuple[float, float] = (0.7, 1.0)
    learning_rate: tuple[float, float] = (1e-5, 1e-3)
    seed: int = 0
    prune: bool = False

    def __post_init__(self) -> None:
        if not self.script.is_file():
            raise UnfreezeError(f"there is no script {self.script}. Name one, such as recipes/text_classification.py.")
        self.schedules = [str(parse_schedule(schedule)) for schedule in self.schedules]
        for name, (highest, allowed) in _RANGES.items():
            low, high = getattr(self, name)
            if not 0 < low <= high <= highest:
                raise UnfreezeError(f"{name} from {low} to {high}: write the lower one first, {allowed}.")

    @property
    def greater_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return greater_is_better(self.metric, "auto")

    def run(self, trials: int) -> list[Row]:
        """Run until there are so many trials, earlier ones included; return those not cut short, the best first.

        Raises:
            UnfreezeError: optuna is not installed, the folder holds another search, the script failed, or it did not
                report the metric; finished trials are kept.
        """
        try:
            import optuna
        except ImportError:
            raise UnfreezeError("a search needs optuna. Run: pip install 'hf-unfreeze[search]'.") from None
        with _quiet(optuna):
            return self._run(optuna, trials)

    def _run(self, optuna: Any, trials: int) -> list[Row]:
        self.output.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=f"sqlite:///{self.output / 'study.db'}",
            study_name="search",
            load_if_exists=True,
            direction="maximize" if self.greater_is_better else "minimize",
        )
        asked = {"script": str(self.script), "arguments": [*self.arguments], "metric": self.metric,
                 "schedules": [*self.schedules]}  # fmt: skip
        before = study.user_attrs.get("asked", asked)
        if before != asked:
            told = (f"{key} {_told(before.get(key))} there, {_told(asked[key])} here"
                    for key in asked if before.get(key) != asked[key])  # fmt: skip
            raise UnfreezeError(f"{self.output} holds another search: {'; '.join(told)}. Name another --output.")
        study.set_user_attr("asked", asked)
        # another seed than before: the draws of a search that goes on would be the same ones again
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        finished, cut = [optuna.trial.TrialState.COMPLETE], [optuna.trial.TrialState.PRUNED]
        done = len(study.get_trials(states=finished + cut))
        if trials > done:
            study.optimize(self._trial, n_trials=trials - done)
        rows = [
            {
                "trial": t.number,
                self.metric: t.value,
                **t.params,
                "seconds": t.duration.total_seconds() if t.duration else 0.0,
            }
            for t in study.get_trials(states=finished)
        ]
        if not rows:
            raise UnfreezeError(
                f"no trial ended with a number for {self.metric!r}. Write --trials 1 or more, and see {self.output}."
            )
        return sorted(rows, key=lambda row: row[self.metric], reverse=self.greater_is_better)

    def _trial(self, trial: Any) -> float:
        given = {
            "schedule": trial.suggest_categorical("schedule", self.schedules),
            "layer_decay": trial.suggest_float("layer_decay", *self.layer_decay),
            "learning_rate": trial.suggest_float("learning_rate", *self.learning_rate, log=True),
        }
        folder = self.output / f"trial-{trial.number}"
        folder.mkdir(parents=True, exist_ok=True)
        own = [f"--{name}={value}" for name, value in (given | {"output_dir": folder}).items()]  # -head@0 is no option
        command = [sys.executable, str(self.script), *self.arguments, *own]
        code = self._watch(command, folder / "log.txt", trial)
        if code:
            said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise UnfreezeError(
                f"{shlex.join(command)} ended with exit code {code}: {said[-1] if said else 'it said nothing'}. "
                f"All it said is in {folder / 'log.txt'}."
            )
        return self._result(folder / "all_results.json")

    def _watch(self, command: list[str], path: Path, trial: Any) -> int:
        """Run a trial and report its evaluations; return its exit code, or end it where it does worse than others."""
        told: list[float] = []
        with path.open("w") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as child:
            try:
                while (code := child.poll()) is None:
                    time.sleep(_POLL)
                    self._report(path, trial, told)
                    if self.prune and told and self._falls_behind(trial, told):
                        from optuna import TrialPruned

                        raise TrialPruned
            finally:
                child.kill()  # where it still runs: cut short, or the search was interrupted
        self._report(path, trial, told)
        if self.prune and not code and not told:
            print(f"{path}: no evaluation told {self.metric}, so nothing is cut short.", file=sys.stderr)  # noqa: T201
        return code

    def _report(self, path: Path, trial: Any, told: list[float]) -> None:
        for value in _evaluations(path.read_text(encoding="utf-8", errors="replace"), self.metric)[len(told) :]:
            trial.report(value, len(told))
            told.append(value)

    def _falls_behind(self, trial: Any, told: list[float]) -> bool:
        others = [
            t.intermediate_values.get(len(told) - 1, math.nan)
            for t in trial.study.get_trials(deepcopy=False)
            if t.state.name == "COMPLETE" and t.params["schedule"] == trial.params["schedule"]
        ]
        others = [value for value in others if not math.isnan(value)]
        if len(others) < _ENOUGH:
            return False
        ahead = told[-1] - statistics.median(others)
        return bool(ahead < 0 if self.greater_is_better else ahead > 0)

    def _result(self, path: Path) -> float:
        results = json.loads(path.read_text()) if path.is_file() else {}
        if not isinstance(results.get(self.metric), (int, float)):
            raise UnfreezeError(
                f"{self.metric!r} is not in {path}. It has {', '.join(results) or 'nothing, or is not there'}. "
                "Name another --metric."
            )
        if math.isnan(results[self.metric]):
            print(f"{path}: {self.metric} is nan, so this trial does not count.", file=sys.stderr)  # noqa: T201
        return float(results[self.metric])


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Lower optuna's log level for a while: what fails is told once, by the error."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _told(value: Any) -> str:
    return (shlex.join(value) or "none") if isinstance(value, list) else str(value)


def _evaluations(log: str, metric: str) -> list[float]:
    """Return what the Trainer printed of a metric, evaluation by evaluation."""
    found = []
    for text in _METRICS.findall(log):
        try:
            found.append(float(ast.literal_eval(_BARE.sub(r": '\1'", text))[metric]))
        except (ValueError, SyntaxError, KeyError, TypeError):  # a line of something else, or half of one
            continue
    return found


def trials_table(rows: Sequence[Row], title: str) -> Table:
    """Draw the trials as a rich table, the best first."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for row in rows:
        table.add_row(*(v.replace("[", r"\[") if isinstance(v, str) else f"{v:.4g}" for v in row.values()))
    return table


def trials_figure(rows: Sequence[Row], metric: str) -> Figure:
    """Draw what each trial reached over its learning rate, one colour for a schedule, larger with more layer decay."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for schedule in sorted({row["schedule"] for row in rows}):
        those = [row for row in rows if row["schedule"] == schedule]
        rates, values = [row["learning_rate"] for row in those], [row[metric] for row in those]
        axes.scatter(rates, values, [20 + 300 * (1 - row["layer_decay"]) for row in those], label=schedule, alpha=0.8)
    axes.set(xscale="log", xlabel="learning rate", ylabel=metric)
    axes.set_title("larger dot: lower blocks learn more slowly", loc="left", fontsize="medium")
    figure.legend(frameon=False, loc="outside lower left", ncols=2)  # schedules may be long
    axes.spines[["top", "right"]].set_visible(False)
    return figure
