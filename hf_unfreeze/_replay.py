"""The phases of a run, read back from its ``log_history``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ._phases import is_transition
from ._probe import Prober
from ._spec import Group
from .schedule import Phase, parse_selectors

__all__ = ["replayed"]


def replayed(
    records: Iterable[Any], step: int, groups: Sequence[Group], measure: Prober, after: int = 0
) -> Iterator[Phase]:
    """Yield the phases that began after a step and before ``step``, and give the measure what it found."""
    last = after
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or record["step"] >= step:
            continue
        measure.replay(record)
        if is_transition(record) and record["step"] > last:
            last = record["step"]
            (phase,) = parse_selectors(record["unfreeze/trainable"]).phases(groups)
            rates = tuple(record.get("unfreeze/rates", {}).items())
            yield Phase(last, phase.trainable, record.get("unfreeze/reason", ""), rates=rates)
