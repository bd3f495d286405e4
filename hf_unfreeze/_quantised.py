"""Quantised weights, which never train, and quantised layers, through which no gradient flows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from .errors import EnvironmentRefused, ScheduleError
from .groups import LayerGroup, leave_out

__all__ = ["is_quantised", "without_quantised"]

_OPAQUE = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")  # their weights are no parameters at all


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a tensor is made of integers or single bytes: itself (bitsandbytes), or what it wraps (torchao).

    Example:
        >>> is_quantised(torch.zeros(2, dtype=torch.uint8)), is_quantised(torch.zeros(2))
        (True, False)
    """
    if hasattr(tensor, "__tensor_flatten__"):  # a torchao weight gives itself out for float32
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return any(is_quantised(part) for part in inner if isinstance(part, torch.Tensor))  # FSDP2's hold a mesh too
    return not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2


def without_quantised(model: nn.Module, groups: Sequence[LayerGroup]) -> tuple[LayerGroup, ...]:
    """Leave out the quantised weights that are frozen already: no schedule may open them. Say so once.

    Raises:
        EnvironmentRefused: Nothing lies above the quantised layers, and no gradient flows through them.
        ScheduleError: Every parameter is quantised.
    """
    kind = type(model).__name__
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad and is_quantised(p)]
    kept = leave_out(groups, set(fixed))
    if not any(group.parameter_names for group in kept):
        raise ScheduleError(
            f"every parameter of {kind} is quantised, so nothing can train. "
            "Add adapters with PEFT, or load the model unquantised."
        )
    opaque = [path for path, module in model.named_modules() if type(module).__module__.startswith(_OPAQUE)]
    opaque = [path for path in opaque if not path.endswith("._packed_params")]  # a module too, inside the layer
    if opaque and kept[-1].name == "head" and not kept[-1].parameter_names:
        raise EnvironmentRefused(
            f"no gradient flows through the layers of {kind} that torch.ao.quantization has quantised, up to "
            f"{opaque[-1]}. Quantise after training, or quantise with torchao or bitsandbytes and train adapters."
        )
    if opaque:
        _warn(
            f"no gradient flows through {len(opaque)} layers of {kind} that torch.ao.quantization has quantised, such "
            f"as {opaque[-1]}: only what lies above them learns. Open no more than that, as in 'head@0'."
        )
    if fixed:
        _warn(
            f"{len(fixed)} weights of {kind} are quantised, such as {fixed[0]}, and stay frozen whatever is opened. "
            "To train them, add adapters with PEFT or load the model unquantised."
        )
    return kept


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
