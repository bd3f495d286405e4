"""One change of phase: as the engine tells it, and as a record of a log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Transition", "as_record"]


@dataclass(frozen=True)
class Transition:
    """What changed at a step: the phase that began, its trainable set as a spec, that set's parameters, why, rates."""

    step: int
    phase: int
    trainable: str
    trainable_params: int
    reason: str = ""
    rates: tuple[tuple[str, float], ...] = ()


def as_record(transition: Transition) -> dict[str, Any]:
    """Return a transition as a record of ``log_history``, without step and epoch; with a reason where it has one."""
    reason = {"unfreeze/reason": transition.reason} if transition.reason else {}
    rates = {"unfreeze/rates": dict(transition.rates)} if transition.rates else {}
    return {
        "unfreeze/phase": transition.phase,
        "unfreeze/trainable": transition.trainable,
        "unfreeze/trainable_params": transition.trainable_params,
        **reason,
        **rates,
    }
