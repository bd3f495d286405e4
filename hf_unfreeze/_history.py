"""Transitions in ``state.log_history``, which every checkpoint carries: read back, compared with a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ._phases import is_transition
from .schedule import spec_of
from .unfreezer import Unfreezer

__all__ = ["divergence", "past_transitions"]


def past_transitions(log_history: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the records of transitions; what anybody else wrote into the history is passed over."""
    return [record for record in log_history if is_transition(record)]


def divergence(unfreezer: Unfreezer, log_history: Iterable[Any], step: int) -> str:
    """Say how the transitions of a checkpoint taken at ``step`` differ from the plan; empty where they agree."""
    was = [(r["step"], r["unfreeze/trainable"]) for r in past_transitions(log_history) if r["step"] < step]
    planned = [
        (phase.start, spec_of(phase.trainable, unfreezer.groups)) for phase in unfreezer.phases if phase.start < step
    ]
    was = was or [(0, "all")]  # which nobody needs to record
    if was == planned:
        return ""
    return (
        f"the checkpoint at step {step} was trained by another schedule: its log_history opens {_told(was)}; "
        f"'{unfreezer.schedule}' in this run opens {_told(planned)}. From here on this run's schedule holds. "
        "A share such as 30% moves with the length of the run; write step or ep where it must not."
    )


def _told(sequence: Sequence[tuple[int, str]]) -> str:
    return "; ".join(f"{trainable} at step {step}" for step, trainable in sequence)
