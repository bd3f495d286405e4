"""The frozen blocks at the bottom in half precision: no gradient flows there, so rounding costs least."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._prefixes import find_prefixes
from ._shadow import Shadow
from .errors import UnfreezeError

__all__ = ["PrefixPrecision"]


class PrefixPrecision:
    """Runs the frozen blocks of each prefix under autocast; what they hand on has the dtype that they were given.

    Args:
        model: The model without wrappers.
        dtype: What matrix products are computed in.

    Raises:
        UnfreezeError: The model has no stack of blocks that stands on the data.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._prefixes = find_prefixes(model)
        if not self._prefixes:
            raise UnfreezeError(
                "prefix_dtype is for frozen blocks at the bottom, and this model has no stack of blocks, each one "
                "module, with embeddings below. Write prefix_dtype=None."
            )
        self._boundaries = [0] * len(self._prefixes)
        self._shadows = [
            Shadow(block, functools.partial(self._through, number, index))
            for number, prefix in enumerate(self._prefixes)
            for index, block in enumerate(prefix.blocks)
        ]

    def update(self) -> None:
        """Take note of how far each stack is frozen."""
        self._boundaries = [prefix.frozen_blocks() for prefix in self._prefixes]

    def close(self) -> None:
        """Give every block its own forward back."""
        while self._shadows:
            self._shadows.pop().close()

    def _through(
        self, number: int, index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        given = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
        if index >= self._boundaries[number] or given is None or given.element_size() <= 2:
            return original(*args, **kwargs)
        if torch.is_autocast_enabled(given.device.type):  # the Trainer's bf16=True does this to the whole model
            return original(*args, **kwargs)
        with torch.autocast(given.device.type, self._dtype):
            output = original(*args, **kwargs)
        if isinstance(output, tuple):
            return tuple(_as(given.dtype, item) for item in output)
        return _as(given.dtype, output)


def _as(dtype: torch.dtype, value: Any) -> Any:
    return value.type(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
