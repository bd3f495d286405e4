"""What schedules that measure have in common: regular times, and choices that are read back from ``log_history``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ._named import multiple
from ._openings import Length
from ._phases import is_transition
from ._probe import Prober
from ._spec import Group
from ._time import Time
from .schedule import Phase, Schedule, parse_selectors

__all__ = ["Measured", "Ticks"]


class Measured:
    """Decides by what it measures; what it chose is on record, and is read back from there.

    Args:
        schedule: The schedule: of a log that others wrote in too, only its own records count.
        groups: Layer groups, bottom → top.
        measure: What it goes by.
    """

    keeps_best = only_freezes = by_evaluations = False
    phases: tuple[Phase, ...]

    def __init__(self, schedule: Schedule, groups: Sequence[Group], measure: Prober) -> None:
        self._schedule, self._groups, self.measure = schedule, groups, measure

    def observe(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Evaluations change nothing."""
        return False

    def replay(self, records: Iterable[Any], step: int) -> None:
        """Take the choices of a run from its ``log_history``, up to a step."""
        self.phases += tuple(self._replayed(records, step, after=0))

    def _replayed(self, records: Iterable[Any], step: int, after: int) -> Iterator[Phase]:
        """Yield the phases that it began after a step and before ``step``, and give the measure what it found."""
        last = self.phases[-1]
        own = str(self._schedule)
        for record in records:
            if not isinstance(record, dict) or not isinstance(record.get("step"), int) or record["step"] >= step:
                continue
            if record.get("unfreeze/schedule", own) != own:  # a log of before that key was written says nothing of it
                continue
            self.measure.replay(record)
            if is_transition(record) and record["step"] > after:
                after = record["step"]
                (phase,) = parse_selectors(record["unfreeze/trainable"]).phases(self._groups)
                rates = tuple(record.get("unfreeze/rates", {}).items())
                found = Phase(after, phase.trainable, record.get("unfreeze/reason", ""), rates=rates)
                if after == 0 or (found.trainable, found.rates) != (last.trainable, last.rates):
                    yield found  # one in which it took over from another schedule is no second phase
                last = found


class Ticks:
    """Regular times, of which each is due once.

    Args:
        every: Their distance.
        length: Optimizer updates of the whole run and of one epoch, where known.
        first: The first time, as a number of distances from the start.
    """

    def __init__(self, every: Time, length: Length, first: int = 1) -> None:
        self._every, self._length, self._number = every, length, first

    def due(self, step: int) -> int | None:
        """Return the newest time up to a step, once; in a short run two of them may fall on one step."""
        newest = None
        while (time := multiple(self._every, self._number, self._length)) <= step:
            newest = time
            self._number += 1
        return newest
