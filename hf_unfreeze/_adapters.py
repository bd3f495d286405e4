"""Which groups may open: in a PEFT model its adapters, and its base where the user has set it trainable too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ._fixed import without_fixed
from ._quantised import without_quantised
from .errors import ScheduleError
from .groups import LayerGroup

__all__ = ["adapter_groups", "eligible_groups"]

_MARKS = ("modules_to_save.", "prompt_encoder.", "trainable_tokens_")  # besides the prefix of the method: lora_, ia3_


def eligible_groups(model: nn.Module, groups: Sequence[LayerGroup]) -> tuple[LayerGroup, ...]:
    """Keep what is neither quantised nor fixed by the model itself.

    Of a PEFT model only what is trainable when the run begins is kept: its base stays frozen.

    Where base weights are trainable too, every group is there twice: ``base.block[3]`` and, above all of the base,
    ``adapter.block[3]``. So ``gradual`` opens the adapters block by block, and then the base.

    Raises:
        EnvironmentRefused: No gradient would flow, for quantised layers.
        ScheduleError: Nothing in the PEFT model is trainable, or every parameter is quantised.
    """
    if not getattr(model, "peft_config", None):
        return without_quantised(model, without_fixed(model, groups))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ScheduleError("this PEFT model has no trainable parameter. Load the adapter with is_trainable=True.")
    adapters = {name for name in trainable if _is_adapter(model, name)}
    if not trainable - adapters:
        return tuple(_part(group, adapters) for group in groups)
    height = 1 + max(group.level or 0 for group in groups)
    return (
        *(_part(group, trainable - adapters, "base") for group in groups),
        *(_part(group, adapters, "adapter", height) for group in groups),
    )


def adapter_groups(model: nn.Module, groups: Sequence[LayerGroup]) -> tuple[LayerGroup, ...]:
    """Keep the active adapters of a PEFT model, whatever is trainable now; of another what ``eligible_groups`` keeps.

    Raises:
        EnvironmentRefused: No gradient would flow, for quantised layers.
        ScheduleError: Every parameter is quantised.
    """
    if not getattr(model, "peft_config", None):
        return eligible_groups(model, groups)
    peft: Any = model
    inactive = set(peft.peft_config) - set(peft.active_adapters)
    wanted = {name for group in groups for name in group.parameter_names if _is_adapter(model, name)}
    return tuple(_part(group, {n for n in wanted if not inactive & set(n.split("."))}) for group in groups)


def _is_adapter(model: nn.Module, name: str) -> bool:
    prefix = getattr(model.base_model, "prefix", "")
    if any(mark in name for mark in (prefix, *_MARKS) if mark):
        return True
    configs = model.peft_config
    biased = isinstance(configs, dict) and any(getattr(c, "bias", "none") != "none" for c in configs.values())
    return biased and name.endswith("bias")  # those of the base that PEFT itself set trainable


def _part(group: LayerGroup, wanted: set[str], stack: str = "", above: int = 0) -> LayerGroup:
    names = tuple(name for name in group.parameter_names if name in wanted)
    if not stack:
        return replace(group, parameter_names=names)
    own = f"{stack}.{group.stack}" if group.stack else stack
    return LayerGroup(f"{stack}.{group.name}", own, names, (group.level or 0) + above)
