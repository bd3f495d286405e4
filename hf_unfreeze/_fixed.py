"""Parameters that a model itself keeps fixed, such as Whisper's table of sinusoids or the stem of a DETR."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from .groups import LayerGroup, leave_out

__all__ = ["UNBUILT", "without_fixed"]

UNBUILT = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, ImportError, NotImplementedError)


def without_fixed(model: nn.Module, groups: Sequence[LayerGroup]) -> tuple[LayerGroup, ...]:
    """Leave out what the class of a model freezes when it is built; what somebody froze afterwards stays in.

    Example:
        >>> groups = without_fixed(whisper, layer_groups(whisper))  # whose embeddings lack the sinusoids
    """
    return leave_out(groups, _fixed(model))


def _fixed(model: nn.Module) -> set[str]:
    """Return the names of what is frozen, and is in a new model of the same config too, built without weights."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    config = getattr(model, "config", None)
    if not frozen or config is None:
        return set()
    # FSDP2 puts a class of its own in front
    kind = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed"))
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            built = kind(copy.deepcopy(config))
    except UNBUILT:  # a class that takes more than a config: nothing is known of it
        return set()
    return frozen & {name for name, parameter in built.named_parameters() if not parameter.requires_grad}
