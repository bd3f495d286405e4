"""Standing in for ``forward`` on one instance of a module, and the state of every random generator."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack  # of torch.func: tensors without values

__all__ = ["Call", "Shadow", "drew", "only_drew", "random_state", "seed_random_state", "set_random_state"]

Call = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Shadow:
    """Stands in for ``forward`` on one instance. A copy of the module, or a pickled one, gets its own ``forward``."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        self.module = module
        self.call = call
        self.previous = vars(module).get("forward")
        self.__wrapped__ = module.forward  # inspect.signature looks here
        object.__setattr__(module, "forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or peek_interpreter_stack() is not None
        ):
            return self.__wrapped__(*args, **kwargs)
        return self.call(self.__wrapped__, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_forward, (self.module,)

    def close(self) -> None:
        """Give the module its own ``forward`` back."""
        if self.previous is None:
            object.__delattr__(self.module, "forward")
        else:
            object.__setattr__(self.module, "forward", self.previous)


def _plain_forward(module: nn.Module) -> Any:
    return MethodType(type(module).forward, module)


def random_state(device: torch.device) -> list[Any]:
    """Every generator a forward may draw from: torch, the device, numpy where it is loaded, Python."""
    numpy = sys.modules.get("numpy")
    return [
        torch.get_rng_state(),
        torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        numpy.random.get_state() if numpy else None,
        random.getstate(),
    ]


def set_random_state(state: list[Any], device: torch.device) -> None:
    """Put the generators back."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
    if state[2] is not None:
        sys.modules["numpy"].random.set_state(state[2])
    random.setstate(state[3])


def seed_random_state(device: torch.device) -> None:
    """Let the same generators begin anew; others, such as those of devices that nobody uses here, stay as they are."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    random.seed(0)


def only_drew(before: list[Any], after: list[Any], count: int) -> bool:
    """Whether so many single numbers were drawn and nothing else: LayerDrop of transformers 4, also at a rate of 0."""
    torch.set_rng_state(before[0])
    for _ in range(count):
        torch.rand([])
    drawn = torch.get_rng_state()
    torch.set_rng_state(after[0])
    return not drew([drawn, *before[1:]], after)


def drew(before: Any, after: Any) -> bool:
    """Whether two states of the generators differ."""
    if isinstance(before, torch.Tensor):
        return not torch.equal(before, after)
    if isinstance(before, (list, tuple)):
        return any(drew(one, other) for one, other in zip(before, after, strict=True))
    return bool((before != after).any() if hasattr(before, "any") else before != after)
