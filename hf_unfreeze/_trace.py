"""The order in which one forward first uses each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["first_use"]


class _FirstUse(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)
        self.order: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in ("__get__", "size", "dim", "__len__"):
            queue = [*args, *(kwargs or {}).values()]
            while queue:
                item = queue.pop()
                if isinstance(item, torch.Tensor):
                    for name in self.names.get(id(item), ()):
                        self.order.setdefault(name, len(self.order))
                elif isinstance(item, (list, tuple)):
                    queue.extend(item)
        return func(*args, **(kwargs or {}))


def first_use(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Run one forward and return, for each parameter used, when it was first used.

    Example:
        >>> first_use(bert, {"input_ids": ids})["embeddings.word_embeddings.weight"]
        0

    Modes and the state of the random number generators are as before afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    recorder = _FirstUse(model)
    try:
        with torch.random.fork_rng(), torch.no_grad(), recorder:
            model(**inputs)
    finally:
        for module, training in modes:
            module.training = training
    return recorder.order
