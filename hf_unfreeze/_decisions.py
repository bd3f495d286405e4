"""What decides on the phases of a run: the schedule beforehand, evaluations, or a criterion on blocks."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from ._learnt import Learnt
from ._measured import Measured, Ticks
from ._openings import Length, blocks_of, freezings
from ._plateau import Plateau
from ._probe import Prober
from ._spec import BLOCK, Group
from .errors import ScheduleError
from .schedule import Phase, Schedule

__all__ = ["Auto", "Converged", "Decisions", "Timed", "decisions_of"]


class Decisions(Protocol):
    """What is known so far of the phases of a run."""

    phases: tuple[Phase, ...]
    may_open: frozenset[str]
    keeps_best: bool
    only_freezes: bool  # what trains later trains from the start
    by_evaluations: bool

    @property
    def measure(self) -> Prober | None:
        """What it measures blocks with, where it does."""

    def advance(self, step: int) -> None:
        """Decide all that is due up to a step."""

    def observe(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Take note of an evaluation after ``step`` updates; return whether none was better."""

    def replay(self, records: Iterable[Any], step: int) -> None:
        """Decide again what a run decided whose ``log_history`` this is, up to a step."""


class Timed:
    """Phases that are all known beforehand."""

    keeps_best = only_freezes = by_evaluations = False
    measure: Prober | None = None

    def __init__(self, phases: tuple[Phase, ...]) -> None:
        self.phases = phases
        self.may_open = frozenset(name for phase in phases for name in phase.trainable)

    def advance(self, step: int) -> None:
        """Nothing is left to decide."""

    def observe(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Evaluations change nothing."""
        return False

    def replay(self, records: Iterable[Any], step: int) -> None:
        """Nothing was decided."""


class Auto(Measured):
    """Opens at known times what a criterion finds best.

    Args:
        schedule: An ``auto`` schedule.
        groups: Layer groups, bottom → top.
        planned: The phases as they would be from the top down: their times and sizes hold.
        measure: Gives each closed block its worth.
    """

    def __init__(
        self, schedule: Schedule, groups: Sequence[Group], planned: tuple[Phase, ...], measure: Prober
    ) -> None:
        super().__init__(schedule, groups, measure)
        self._planned = planned
        self.phases = planned[:1]
        self.may_open = frozenset(name for phase in planned for name in phase.trainable)

    def advance(self, step: int) -> None:
        """Choose what opens, where that is due; all at once what was due before it took over from another schedule."""
        open_now = len(self.phases[-1].trainable)  # as many as planned, whichever they are
        reached = bisect_right(self._planned, open_now, key=lambda phase: len(phase.trainable)) - 1
        due = bisect_right(self._planned, step, key=lambda phase: phase.start) - 1
        if reached < len(self._planned) - 1:
            self.measure.begin(self._closed())
        if due > reached:
            self._choose(self._planned[max(reached, 0)], self._planned[due])

    def _choose(self, before: Phase, planned: Phase) -> None:
        present, closed = set(self.phases[-1].trainable), self._closed()
        opening = set(planned.trainable) - set(before.trainable)
        count = sum(bool(BLOCK.fullmatch(name)) for name in opening)
        reason = ""
        chosen = closed
        if count < len(closed):
            worth = self.measure(closed)
            lost = {name: math.isnan(worth[name]) for name in closed}
            order = {n: (lost[n], 0.0 if lost[n] else -worth[n], -closed.index(n)) for n in closed}
            ranked = sorted(closed, key=order.__getitem__)
            chosen, rest = ranked[:count], ranked[count:]
            told = ", ".join(f"{name} {worth[name]:.4g}" for name in chosen)
            reason = f"{self._schedule.arguments[0][1]}: {told}; next {rest[0]} {worth[rest[0]]:.4g}"
        opened = present | set(chosen) | {name for name in opening if not BLOCK.fullmatch(name)}
        names = (group.name for group in self._groups if group.parameter_names)
        self.phases = (*self.phases, Phase(planned.start, tuple(n for n in names if n in opened), reason))

    def _closed(self) -> list[str]:
        present = set(self.phases[-1].trainable)
        names = (group.name for group in self._groups if group.parameter_names)
        return [name for name in names if BLOCK.fullmatch(name) and name not in present]


class Converged(Measured):
    """Freezes from the bottom, at known times, what a criterion finds lowest.

    AutoFreeze's rule (arXiv 2102.01386): of the blocks that train, the worth at a percentile is the threshold; from the
    bottom up everything below it freezes, up to the first block that is not below.

    Args:
        schedule: A ``freeze_converged`` schedule.
        groups: Layer groups, bottom → top.
        phases: The first phase.
        measure: Gives each block that trains its worth.
        length: Optimizer updates of the whole run and of one epoch, where known.
    """

    only_freezes = True

    def __init__(
        self,
        schedule: Schedule,
        groups: Sequence[Group],
        phases: tuple[Phase, ...],
        measure: Prober,
        length: Length,
    ) -> None:
        super().__init__(schedule, groups, measure)
        given: dict[str, Any] = dict(schedule.arguments)
        self._criterion, self._percentile = given["criterion"], given["percentile"]
        self._ticks = Ticks(given["every"], length)
        self._units = freezings(groups)
        self.phases = phases
        self.may_open = frozenset(phases[0].trainable)

    def replay(self, records: Iterable[Any], step: int) -> None:
        """Take the choices of a run from its ``log_history``, up to a step."""
        super().replay(records, step)
        self._ticks.due(step - 1)  # those are over

    def advance(self, step: int) -> None:
        """Freeze what has converged, where a choice is due."""
        if len(self._blocks()) > 1:
            self.measure.begin(self._blocks())
        due = self._ticks.due(step)
        if due and len(self._blocks()) > 1:
            self._choose(due)

    def _open(self) -> list[frozenset[str]]:
        present = set(self.phases[-1].trainable)
        return [unit for unit in self._units if unit & present]

    def _blocks(self) -> list[str]:
        voting = frozenset().union(*self._open())
        return [group.name for group in self._groups if group.name in voting and BLOCK.fullmatch(group.name)]

    def _choose(self, step: int) -> None:
        worth = {name: value for name, value in self.measure(self._blocks()).items() if not math.isnan(value)}
        if not worth:
            return
        threshold = _percentile(list(worth.values()), self._percentile)
        frozen: list[str] = []
        for unit in self._open():
            if not all(worth.get(name, math.inf) < threshold for name in unit if BLOCK.fullmatch(name)):
                break
            frozen += sorted(unit)
        if not frozen:
            return
        told = ", ".join(f"{name} {worth[name]:.4g}" for name in self._blocks() if name in frozen)
        reason = f"{self._criterion}: {told} below {threshold:.4g}, percentile {self._percentile} of what trains"
        left = tuple(name for name in self.phases[-1].trainable if name not in frozen)
        self.phases = (*self.phases, Phase(step, left, reason))


def _percentile(values: Sequence[float], percentile: int) -> float:
    """Return what so many percent lie below, between two values in proportion."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percentile / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def decisions_of(
    schedule: Schedule,
    groups: Sequence[Group],
    total_steps: int | None,
    steps_per_epoch: int | None,
    prober: Callable[[int], Prober],
) -> Decisions:
    """Return what decides on the phases of a schedule; ``prober`` makes a measure from the steps between choices."""
    if schedule.name == "plateau":
        return Plateau(schedule, groups, total_steps, steps_per_epoch)
    phases = schedule.phases(groups, total_steps, steps_per_epoch)
    given: dict[str, Any] = dict(schedule.arguments)
    if "batches" not in given:
        return Timed(phases)
    measure = prober(given["every"].to_step(total_steps, steps_per_epoch))
    length = total_steps, steps_per_epoch
    if schedule.name in ("auto_rates", "learn_rates"):
        return Learnt(schedule, groups, measure, length)
    if not blocks_of(groups):
        raise ScheduleError(
            f"{schedule} has no block to measure: all weights of the blocks are quantised. "
            "Write head@0, or add adapters with PEFT."
        )
    if schedule.name == "auto":
        return Auto(schedule, groups, phases, measure)
    return Converged(schedule, groups, phases, measure, length)
