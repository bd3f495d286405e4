"""A param group in parts for the length of one optimizer step, and what the step has written into them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from .errors import OptimizerError

__all__ = ["GroupParts"]

_ABSENT = object()


class GroupParts:
    """Parts of one param group. Each gets copies of what an optimizer may write to, so that none is advanced twice.

    Some optimizers count their steps in the group (optimi's StableAdamW, timm's Adan and Lamb, bitsandbytes' AdEMAMix),
    which would otherwise begin anew in each step.

    Args:
        group: The param group of the optimizer.
        settings: ``params``, ``lr`` and maybe ``weight_decay`` of each part; all else is the group's.
    """

    def __init__(self, group: dict[str, Any], settings: Sequence[dict[str, Any]]) -> None:
        self._group = group
        self._settings = settings
        self._given = [{key: _copied(value) for key, value in group.items() if key not in own} for own in settings]
        self.parts = [{**given, **own} for given, own in zip(self._given, settings, strict=True)]

    def write_back(self, optimizer: str) -> None:
        """Take over into the group what the step has written into its parts.

        Parts without a gradient are passed over: some optimizers advance them and some do not, and in one group with
        the others all would have been advanced.

        Raises:
            OptimizerError: Two parts were written differently, so that the value belongs to the group as a whole.
        """
        trained = [any(p.grad is not None for p in own["params"]) for own in self._settings]
        written: dict[str, Any] = {}
        for part, given, own, has in zip(self.parts, self._given, self._settings, trained, strict=True):
            if not has and any(trained):
                continue
            for key, value in part.items():
                if key in own or not _is_written(value, given.get(key, _ABSENT)):
                    continue
                if key in written and _differ(written[key], value):
                    raise OptimizerError(
                        f"{optimizer} writes {key!r} into its param group, and with a rate or weight decay per layer "
                        f"group it would be {written[key]} here and {value} there. Leave layer_decay, block_warmup, "
                        "group_weight_decay and rates in the schedule out, or train with AdamW."
                    )
                written.setdefault(key, value)
        self._group.update(written)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value


def _is_written(value: Any, given: Any) -> bool:
    if isinstance(value, torch.Tensor) and value is given:
        return value._version > 0
    return value is not given or isinstance(value, (list, dict))


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return not torch.equal(one, other)
    return not isinstance(one, (list, dict)) and bool(one != other)
