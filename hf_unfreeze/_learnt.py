"""The rate of each group, set anew at regular times by what was measured: ``auto_rates`` and ``learn_rates``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ._measured import Measured, Ticks
from ._openings import Length, openings
from ._probe import Prober
from ._spec import Group
from .schedule import Phase, Schedule

__all__ = ["Learnt"]


class Learnt(Measured):
    """Multiplies the rate of each group by a factor in [0, 1]; 0 keeps it frozen.

    Args:
        schedule: An ``auto_rates`` or ``learn_rates`` schedule.
        groups: Layer groups, bottom → top.
        measure: Gives each group its worth, or how far its next step agrees with validation data.
        length: Optimizer updates of the whole run and of one epoch, where known.
    """

    def __init__(self, schedule: Schedule, groups: Sequence[Group], measure: Prober, length: Length) -> None:
        super().__init__(schedule, groups, measure)
        given: dict[str, Any] = dict(schedule.arguments)
        self._speed: float | None = given.get("speed")  # None: in proportion to the worth
        self._ticks = Ticks(given["every"], length, first=0 if self._speed is None else 1)
        top = openings(groups, {"blocks": 1, "embeddings": True})[0]
        self._names = [group.name for group in groups if group.parameter_names]
        self._set = self._names if self._speed is None else [name for name in self._names if name not in top]
        self.may_open = frozenset(self._names)
        self.phases = (self._phase(0, dict.fromkeys(self._set, given.get("start", 1.0)), ""),)
        self._chosen = False  # whether the first of them is on record, or has made way for what was measured

    def replay(self, records: Iterable[Any], step: int) -> None:
        """Take the rates of a run from its ``log_history``, up to a step."""
        found = tuple(self._replayed(records, step, after=-1))
        if found:
            self.phases = (replace(found[0], start=0), *found[1:])  # also where it took over from another schedule
            self._chosen = True
        if found or self._speed is not None:
            self._ticks.due(step - 1)  # those are over

    def advance(self, step: int) -> None:
        """Set the rates anew, where that is due."""
        due = self._ticks.due(step)
        if due is not None:
            self._choose(due)

    def _choose(self, step: int) -> None:
        first, self._chosen = self._speed is None and not self._chosen, True
        worth = self.measure(self._set)
        last = self.phases[-1]
        before = dict.fromkeys(self._set, 0.0) | dict.fromkeys(last.trainable, 1.0) | dict(last.rates)
        most = max((value for value in worth.values() if value > 0), default=math.nan)
        factors = {}
        for name in self._set:
            wanted = worth[name] / most if self._speed is None else before[name] + self._speed * worth[name]
            factors[name] = before[name] if math.isnan(wanted) else min(1.0, max(0.0, wanted))
        low, high = min(self._set, key=factors.__getitem__), max(self._set, key=factors.__getitem__)
        reason = f"{self.measure.name}: from {low} at {factors[low]:.4g} to {high} at {factors[high]:.4g} of the rate"
        phase = self._phase(step, factors, reason)
        if (phase.trainable, phase.rates) != (last.trainable, last.rates):
            self.phases = (replace(phase, start=0),) if first else (*self.phases, phase)

    def _phase(self, start: int, factors: dict[str, float], reason: str) -> Phase:
        factors = dict.fromkeys(self._names, 1.0) | factors
        trainable = tuple(name for name in self._names if factors[name])
        return Phase(start, trainable, reason, rates=tuple((n, factors[n]) for n in trainable if factors[n] != 1))
