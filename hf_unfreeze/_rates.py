"""The multiplier of each group's learning rate at a step: a function of the step alone, so that a resume needs none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .errors import ScheduleError, UnfreezeError
from .groups import LayerGroup
from .optim import decay_multipliers
from .schedule import Schedule, Time

__all__ = ["Multipliers", "parse_decay", "parse_warmup"]


def parse_decay(layer_decay: float | str) -> tuple[float, float]:
    """Return the layer decay of the first and of the last step: ``0.9``, or ``"0.35->1.0"`` where it changes.

    Raises:
        UnfreezeError: Neither of the two, or outside (0, 1].
    """
    ends = [layer_decay]
    if isinstance(layer_decay, str):
        try:
            ends = [float(end) for end in layer_decay.split("->")]
        except ValueError:
            ends = []
    if not 1 <= len(ends) <= 2:
        raise UnfreezeError(
            f"layer_decay={layer_decay!r} is no number. Write 0.9, or '0.35->1.0' for one that changes over the run."
        )
    for end in ends:
        decay_multipliers((), end)  # type: ignore[arg-type]  # which refuses what is no number
    return float(ends[0]), float(ends[-1])


def parse_warmup(block_warmup: str | None) -> Time | None:
    """Read ``block_warmup``; raise ScheduleError that names the argument."""
    if block_warmup is None:
        return None
    try:
        return Time.parse(str(block_warmup))
    except ScheduleError as error:
        raise ScheduleError(f"block_warmup={block_warmup!r}: {error}") from None


class Multipliers:
    """Layer decay, warm-up of what has opened, and the factors and cosines of a schedule.

    Args:
        groups: Layer groups, bottom → top.
        schedule: The schedule, which may anneal.
        layer_decay: Factor from each level to the one below it, or ``"first->last"``.
        block_warmup: Time over which a group that opens after the first step rises to its rate.
        total_steps: Optimizer updates of the whole run.
        steps_per_epoch: Optimizer updates in one epoch.

    Raises:
        UnfreezeError: A decay that changes over a run of unknown length.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        schedule: Schedule,
        layer_decay: float | str,
        block_warmup: str | None,
        total_steps: int | None,
        steps_per_epoch: int | None,
    ) -> None:
        self._groups = groups
        self._first, self._last = parse_decay(layer_decay)
        if self._first != self._last and total_steps is None:
            raise UnfreezeError(
                f"layer_decay={layer_decay!r} changes up to the last step, which is not known here. Pass total_steps."
            )
        self._total = total_steps or 0
        warmup = parse_warmup(block_warmup)
        self._warmup = warmup.to_step(total_steps, steps_per_epoch) if warmup else 0
        self._annealed = schedule.annealed(groups)

    def __call__(self, step: int, opened: Mapping[str, int], rates: Mapping[str, float]) -> dict[str, float]:
        """Return the multiplier of each group.

        Args:
            step: Optimizer updates done so far.
            opened: Since which step each group that trains has done so.
            rates: The factors of the present phase.
        """
        over = min(1.0, step / max(self._total - 1, 1))
        decay = decay_multipliers(self._groups, self._first + (self._last - self._first) * over)
        return {
            name: own * self._ramp(step, opened.get(name, 0)) * self._cosine(name, step) * rates.get(name, 1.0)
            for name, own in decay.items()
        }

    def _ramp(self, step: int, opened: int) -> float:
        return min(1.0, (step - opened + 1) / self._warmup) if self._warmup and opened > 0 else 1.0

    def _cosine(self, name: str, step: int) -> float:
        if name not in self._annealed:
            return 1.0
        start, share = self._annealed[name]
        return start * 0.5 * (1 + math.cos(math.pi * min(1.0, float(step / (share * self._total)))))
