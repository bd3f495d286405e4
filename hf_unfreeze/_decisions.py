"""What decides on the phases of a run: the schedule beforehand, evaluations, or a criterion on the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from ._phases import is_transition
from ._plateau import Plateau
from ._spec import BLOCK, Group
from .schedule import Phase, Schedule, parse_selectors

__all__ = ["Auto", "Decisions", "Measure", "Timed", "decisions_of"]

Measure = Callable[[Sequence[str]], dict[str, float]]  # names of closed blocks → what each is worth


class Decisions(Protocol):
    """What is known so far of the phases of a run."""

    phases: tuple[Phase, ...]
    may_open: frozenset[str]
    keeps_best: bool

    def advance(self, step: int) -> None:
        """Decide all that is due up to a step."""

    def observe(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Take note of an evaluation after ``step`` updates; return whether none was better."""

    def replay(self, records: Iterable[Any], step: int) -> None:
        """Decide again what a run decided whose ``log_history`` this is, up to a step."""


class Timed:
    """Phases that are all known beforehand."""

    keeps_best = False

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


class Auto:
    """Opens at known times what a criterion finds best; what was chosen is on record, and is read back from there.

    Args:
        schedule: An ``auto`` schedule.
        groups: Layer groups, bottom → top.
        planned: The phases as they would be from the top down: their times and sizes hold.
        measure: Gives each closed block its worth.
    """

    keeps_best = False

    def __init__(
        self, schedule: Schedule, groups: Sequence[Group], planned: tuple[Phase, ...], measure: Measure
    ) -> None:
        self._schedule = schedule
        self._groups = groups
        self._planned = planned
        self._measure = measure
        self.phases = planned[:1]
        self.may_open = frozenset(name for phase in planned for name in phase.trainable)

    def observe(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Evaluations change nothing."""
        return False

    def replay(self, records: Iterable[Any], step: int) -> None:
        """Take the choices of a run from its ``log_history``, up to a step."""
        for record in records:
            if not is_transition(record) or not self.phases[-1].start < record["step"] < step:
                continue
            (phase,) = parse_selectors(record["unfreeze/trainable"]).phases(self._groups)
            self.phases = (*self.phases, Phase(record["step"], phase.trainable, record.get("unfreeze/reason", "")))

    def advance(self, step: int) -> None:
        """Choose what opens, where that is due."""
        while len(self.phases) < len(self._planned) and self._planned[len(self.phases)].start <= step:
            self._choose(*self._planned[len(self.phases) - 1 : len(self.phases) + 1])

    def _choose(self, before: Phase, planned: Phase) -> None:
        present = set(self.phases[-1].trainable)
        names = [group.name for group in self._groups if group.parameter_names]
        closed = [name for name in names if BLOCK.fullmatch(name) and name not in present]
        opening = set(planned.trainable) - set(before.trainable)
        count = sum(bool(BLOCK.fullmatch(name)) for name in opening)
        reason = ""
        chosen = closed
        if count < len(closed):
            worth = self._measure(closed)
            lost = {name: math.isnan(worth[name]) for name in closed}
            order = {n: (lost[n], 0.0 if lost[n] else -worth[n], -closed.index(n)) for n in closed}
            ranked = sorted(closed, key=order.__getitem__)
            chosen, rest = ranked[:count], ranked[count:]
            told = ", ".join(f"{name} {worth[name]:.4g}" for name in chosen)
            reason = f"{self._schedule.arguments[0][1]}: {told}; next {rest[0]} {worth[rest[0]]:.4g}"
        opened = present | set(chosen) | {name for name in opening if not BLOCK.fullmatch(name)}
        self.phases = (*self.phases, Phase(planned.start, tuple(n for n in names if n in opened), reason))


def decisions_of(
    schedule: Schedule,
    groups: Sequence[Group],
    total_steps: int | None,
    steps_per_epoch: int | None,
    prober: Callable[[int], Measure],
) -> Decisions:
    """Return what decides on the phases of a schedule; ``prober`` makes a measure from the steps between openings."""
    if schedule.name == "plateau":
        return Plateau(schedule, groups, total_steps, steps_per_epoch)
    phases = schedule.phases(groups, total_steps, steps_per_epoch)
    if schedule.name != "auto":
        return Timed(phases)
    every: Any = dict(schedule.arguments)["every"]
    return Auto(schedule, groups, phases, prober(every.to_step(total_steps, steps_per_epoch)))
