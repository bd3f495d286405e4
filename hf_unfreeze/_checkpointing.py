"""Gradient checkpointing that neither runs again through the frozen prefix nor loses a gradient above it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .errors import EnvironmentRefused

__all__ = ["Checkpointing"]

_FUNCTION = "_gradient_checkpointing_func"
# Forward hooks by which transformers and PEFT make the embeddings' output require a gradient. They go by name: where
# both put one there, the handle of the first is lost.
_INPUT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


class Checkpointing:
    """Makes every checkpointed module non-re-entrant, and takes away the hooks that the re-entrant kind needs.

    A re-entrant checkpoint gives its parameters no gradient unless one of its inputs asks for one. Therefore a hook
    makes the output of the embeddings ask, and the backward runs, and computes again, every frozen block. A
    non-re-entrant checkpoint goes by what autograd recorded: nothing in a frozen prefix, so nothing is computed again
    there, and everything from the lowest trainable parameter (an adapter's too) upwards. As blocks open, nothing is
    left to switch. A frozen block above a trainable one is not checkpointed while it is in eval mode.

    Args:
        model: The model without wrappers.

    Raises:
        EnvironmentRefused: A module checkpoints by a function of its own, under which gradients could be lost.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._undo: list[Callable[[], Any]] = []
        foreign = [module for module in _checkpointed(model) if _non_reentrant(module) is None]
        if foreign and not list(_input_hooks(model)):
            raise EnvironmentRefused(
                f"{type(foreign[0]).__name__} checkpoints by a function of its own, so that blocks above a frozen one "
                "could get no gradient. Call model.enable_input_require_grads() before training, or write "
                "gradient_checkpointing=False."
            )

    def update(self) -> None:
        """Convert what is checkpointed; at each phase, as a loop of one's own may switch checkpointing on late."""
        functions = [(vars(module), _non_reentrant(module)) for module in _checkpointed(self._model)]
        if not functions or any(function is None for _, function in functions):
            return
        for attributes, function in functions:
            given = attributes[_FUNCTION]
            if function is not given:
                attributes[_FUNCTION] = function
                self._undo.append(functools.partial(attributes.__setitem__, _FUNCTION, given))
        for hooks, key in list(_input_hooks(self._model)):
            self._undo.append(functools.partial(hooks.__setitem__, key, hooks.pop(key)))

    def close(self) -> None:
        """Put functions and hooks back."""
        while self._undo:
            self._undo.pop()()


def _checkpointed(model: nn.Module) -> Iterable[nn.Module]:
    return (module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True)


def _non_reentrant(module: nn.Module) -> Callable[..., Any] | None:
    """Return the module's checkpoint function, made non-re-entrant where it is not; None if it cannot be."""
    function = vars(module).get(_FUNCTION)
    if function is checkpoint:
        function = functools.partial(checkpoint)
    if not isinstance(function, functools.partial):
        return None
    if function.keywords.get("use_reentrant") is False:
        return function
    return functools.partial(function.func, *function.args, **{**function.keywords, "use_reentrant": False})


def _input_hooks(model: nn.Module) -> Iterable[tuple[dict[int, Any], int]]:
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            if getattr(hook, "__name__", "") in _INPUT_HOOKS:
                yield module._forward_hooks, key
