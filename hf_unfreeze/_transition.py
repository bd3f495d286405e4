"""One change of phase: as the engine tells it, as a record of a log, and as ranks tell it to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .groups import LayerGroup
from .schedule import Phase, Schedule, spec_of

__all__ = ["Transition", "announcement", "as_record", "on_record"]

_ANNOUNCED = 32  # phases that ranks compare ahead: a schedule that rotates has thousands


@dataclass(frozen=True)
class Transition:
    """What changed at a step.

    Example:
        >>> Transition(step=40, phase=1, trainable="block[5], head", trainable_params=2_000_000).reason
        ''

    Args:
        step: Optimizer updates done so far.
        phase: Number of the phase that began, from 0.
        trainable: Its trainable set, as selectors.
        trainable_params: Number of parameters in it.
        reason: Why it began, where the data decided.
        rates: ``(name, factor)`` of each group whose learning rate is multiplied.
    """

    step: int
    phase: int
    trainable: str
    trainable_params: int
    reason: str = ""
    rates: tuple[tuple[str, float], ...] = ()


def announcement(step: int, present: Phase | None, phases: Sequence[Phase], groups: Sequence[LayerGroup]) -> list[str]:
    """Return what every rank must say alike at a transition: the step, what trains now, and what will."""

    def told(phase: Phase) -> str:
        return " ".join([spec_of(phase.trainable, groups), *(f"{name}*{rate}" for name, rate in phase.rates)])

    now = [f"at step {step} trains {told(present)}"] if present else []
    coming = [phase for phase in phases if phase.start >= step][:_ANNOUNCED]
    return now + [f"from step {phase.start} {told(phase)}" for phase in coming]


def as_record(transition: Transition, schedule: Schedule) -> dict[str, Any]:
    """Return a transition as a record of ``log_history``, without step and epoch; with a reason where it has one."""
    reason = {"unfreeze/reason": transition.reason} if transition.reason else {}
    rates = {"unfreeze/rates": dict(transition.rates)} if transition.rates else {}
    return {
        "unfreeze/phase": transition.phase,
        "unfreeze/trainable": transition.trainable,
        "unfreeze/trainable_params": transition.trainable_params,
        **reason,
        **rates,
        "unfreeze/schedule": str(schedule),
    }


def on_record(record: Mapping[str, Any], past: Mapping[str, Any]) -> bool:
    """Tell whether a record says nothing new after the last one before it, whichever schedule wrote that."""
    return all(past.get(key) == value for key, value in record.items() if key != "unfreeze/schedule")
