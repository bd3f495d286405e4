"""When the next phase begins, where validation says so: ``plateau``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ._spec import Group
from .errors import ScheduleError, near_match
from .schedule import Phase, Schedule

__all__ = ["Plateau", "greater_is_better", "with_metric"]

# Last word of a metric of which less is better; of any other, more is.
_LESS_IS_BETTER = ("loss", "perplexity", "error", "wer", "cer", "ter", "eer", "mse", "rmse", "mae", "fid")


class Plateau:
    """Begins the next phase when a metric has stopped improving: a function of the evaluations and of nothing else.

    The first evaluation of a phase is compared with the best one before, the later ones with the best of the phase:
    a phase that starts with a loss of quality and recovers is improving.

    Args:
        schedule: A ``plateau`` schedule with a metric.
        groups: Layer groups, bottom → top.
        total_steps: Optimizer updates of the whole run.
        steps_per_epoch: Optimizer updates in one epoch.
    """

    measure: None = None
    by_evaluations = True
    only_freezes = False

    def __init__(
        self, schedule: Schedule, groups: Sequence[Group], total_steps: int | None, steps_per_epoch: int | None
    ) -> None:
        given: dict[str, Any] = dict(schedule.arguments)
        if not given["metric"]:
            raise ScheduleError("plateau needs a metric. Write plateau(eval_loss), or set metric_for_best_model.")
        self.metric: str = given["metric"]
        self._patience: int = given["patience"]
        self._min_delta: float = given["min_delta"]
        self._greater = greater_is_better(self.metric, given["mode"])
        self._at_least = given["at_least"].to_step(total_steps, steps_per_epoch)
        at_most = given["at_most"]
        self._at_most: float = at_most.to_step(total_steps, steps_per_epoch) if at_most else math.inf
        self._limit = f"at_most={at_most} is over"
        if self._at_most < self._at_least:
            raise ScheduleError(f"{schedule}: at_least is longer than at_most. Exchange them.")
        self._stops, self._back = given["stop"] == "no_gain", given["back"]
        self._restores = given["restore_best"]
        self.keeps_best = self._restores or (self._stops and self._back)
        self.phases = schedule.phases(groups, total_steps, steps_per_epoch)
        self._to_come = list(schedule.decided(groups))
        self.may_open = frozenset((*self.phases[0].trainable, *(name for names in self._to_come for name in names)))
        self._ended = False
        self._best: tuple[float, int, int] | None = None  # value, step, phase
        self._reference: float | None = None  # what has to be improved on now
        self._evaluations = self._waited = 0  # in this phase
        self._value, self._evaluated = math.nan, -1  # the newest, and its step
        self._others: set[str] = set()  # what was reported instead of the metric
        self._warned = False

    def observe(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Take note of an evaluation after ``step`` updates; return whether none was better."""
        self._decide_until(step - 1)
        if self.metric not in metrics:
            start = "eval_" if self.metric.startswith("eval_") else ""  # a Trainer may evaluate on more: train_
            self._others |= {name for name in metrics if name.startswith(start)}
            return False
        value = metrics[self.metric]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ScheduleError(f"{self.metric} is {value!r}, and plateau needs a number. Name another metric.")
        if step == self._evaluated:
            return False  # the same weights once more
        self._value, self._evaluated = float(value), step
        if math.isnan(value) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.metric} is nan after step {step}, which counts as no improvement. Lower the learning rate if "
                "the model has diverged, or name another metric.",
                UserWarning,
                stacklevel=2,
            )
        improved = self._better(self._value, self._reference)
        self._waited = 0 if improved else self._waited + 1
        if improved or not (self._evaluations or math.isnan(value)):
            self._reference = self._value
        self._evaluations += not math.isnan(value)
        if not self._better(self._value, self._best and self._best[0]):
            return False
        self._best = self._value, step, len(self.phases) - 1
        return True

    def replay(self, records: Iterable[Any], step: int) -> None:
        """Decide again what a run decided whose ``log_history`` this is, up to a step."""
        for record in records:
            if isinstance(record, dict) and self.metric in record and isinstance(record.get("step"), int):
                self.observe(record, record["step"])
        self.advance(step - 1)

    def advance(self, step: int) -> None:
        """Decide all that is due up to a step.

        Raises:
            ScheduleError: There was an evaluation, and the metric was not in it.
        """
        if self._others and self._evaluated < 0:
            seen = sorted(name for name in self._others if name != "epoch")
            raise ScheduleError(
                f"{self.metric!r} was not in the evaluation. It has {', '.join(seen)}.{near_match(self.metric, seen)}"
            )
        self._decide_until(step)

    def _decide_until(self, step: int) -> None:
        while not self._ended:
            start = self.phases[-1].start
            stale = max(self._evaluated, start + self._at_least, start + 1)
            due = stale if self._waited >= self._patience else math.inf
            limit = start + self._at_most if self._to_come else math.inf
            if min(due, limit) > step:
                return
            self._decide(int(min(due, limit)), self._stale() if due <= limit else self._limit)

    def _decide(self, step: int, why: str) -> None:
        present = len(self.phases) - 1
        if self._stops and present and self._evaluations and self._best and self._best[2] < present:
            value, at, phase = self._best
            self._ended = True
            trainable = self.phases[phase if self._back else present].trainable
            what = "going back to it" if self._back else "staying"
            why += f"; no gain: the best {self.metric} is still {value:.6g}, at step {at} in phase {phase}; {what}"
            self._begin(Phase(step, trainable, why, self._back))
        elif self._to_come:
            restores = self._restores and self._best is not None
            why += f"; from the best weights, of step {self._best[1]}" if restores and self._best else ""
            self._begin(Phase(step, self._to_come.pop(0), why, restores))
        else:
            self._ended = True

    def _begin(self, phase: Phase) -> None:
        self.phases = (*self.phases, phase)
        self._evaluations = self._waited = 0
        self._reference = self._best[0] if self._best else None

    def _stale(self) -> str:
        by = f" by more than {self._min_delta:g}" if self._min_delta else ""
        best = "any before" if self._reference is None else f"{self._reference:.6g}"
        many = f"{self._waited} evaluation{'s' * (self._waited > 1)}"
        return f"{self.metric} {self._value:.6g} has not improved on {best}{by} for {many}"

    def _better(self, value: float, than: float | None) -> bool:
        if than is None or math.isnan(value):
            return not math.isnan(value)
        return (value - than if self._greater else than - value) > self._min_delta


def with_metric(schedule: Schedule, metric: str | None, greater: bool | None, evaluates: bool) -> Schedule:
    """Complete a ``plateau`` schedule by what the Trainer is told of the best model.

    Args:
        schedule: Any schedule; others come back as they are.
        metric: ``metric_for_best_model``.
        greater: ``greater_is_better``.
        evaluates: Whether there will be evaluations.

    Raises:
        ScheduleError: No evaluation, no metric, or one that is told to be better where it is worse.
    """
    if schedule.name != "plateau":
        return schedule
    if not evaluates:
        raise ScheduleError(f"{schedule} needs evaluations. Set eval_strategy='epoch', or 'steps' with eval_steps.")
    given = dict(schedule.arguments)
    best = _prefixed(metric or "")
    given["metric"] = _prefixed(str(given["metric"] or "")) or best
    if given["metric"] == best and given["mode"] == "auto" and greater is not None:
        if greater and best and not greater_is_better(best, "auto"):  # filled in for every name that ends not with loss
            raise ScheduleError(
                f"greater_is_better=True takes more {best} as better, and by its name less is. TrainingArguments fills "
                "this in where it is left out, and load_best_model_at_end goes by it too. Write "
                f"greater_is_better=False; or plateau({best}, mode=max) where more is better."
            )
        given["mode"] = "max" if greater else "min"
    return replace(schedule, arguments=tuple(given.items()))


def _prefixed(metric: str) -> str:
    return metric if not metric or metric.startswith("eval_") else f"eval_{metric}"


def greater_is_better(metric: str, mode: str) -> bool:
    """Tell whether more of a metric is better, in mode ``auto`` by its name."""
    if mode != "auto":
        return mode == "max"
    return metric.replace("-", "_").rpartition("_")[2].lower() not in _LESS_IS_BETTER
