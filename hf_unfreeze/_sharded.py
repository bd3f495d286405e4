"""FSDP2: parameters as the optimizer knows them, and optimizer state that a checkpoint can be loaded from."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["Sharded", "is_sharded", "reshard"]


def is_sharded(model: nn.Module) -> bool:
    """Tell whether ``fully_shard`` was applied to the model or a part of it."""
    return any(True for _ in _sharded_modules(model))


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back: after an evaluation the root keeps whole ones, which do not follow flags."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


class Sharded:
    """Follows the phases of a model under ``fully_shard``.

    A distributed checkpoint is loaded into a state that holds every parameter, so one written while some have never
    been stepped cannot be loaded ("Missing optimizer state"). While a state dict is taken these get the state they
    would begin with, zeros; it is dropped again at once, for it would cost the memory that freezing saves.

    Args:
        model: The model, ``fully_shard`` applied.
        optimizer: The torch optimizer over its sharded parameters.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._ran = False
        self._hooks = [
            optimizer.register_state_dict_pre_hook(self._complete),
            optimizer.register_state_dict_post_hook(self._drop),
            optimizer.register_load_state_dict_post_hook(self._drop),
        ]
        self._drop(optimizer)

    def update(self) -> None:
        """Let the next forward gather parameters with the flags as they are now, and reduce what has been opened.

        FSDP2 notes the dtypes of mixed precision from the trainable parameters of a module when it is first run, and
        again in ``unshard``; of a module that was frozen then it knows none.
        """
        for module in _sharded_modules(self._model):
            module.reshard()
            if self._ran and any(parameter.requires_grad for parameter in module.parameters()):
                module.unshard()
                module.reshard()
        self._ran = True

    def close(self) -> None:
        """Leave a state that the optimizer alone can save and load, and take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        if self._optimizer.state:
            self._complete(self._optimizer)
        reshard(self._model)

    def _complete(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups if optimizer.state else ():
            for parameter in group["params"]:
                if not optimizer.state.get(parameter):
                    optimizer.state[parameter] = _first_state(optimizer, group, parameter)

    def _drop(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in [
            p for p, state in optimizer.state.items() if not any(map(_differs_from_zero, state.values()))
        ]:
            del optimizer.state[parameter]


def _first_state(optimizer: Any, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """Let a twin of the optimizer step a stand-in of the parameter, and set to zero what it kept."""
    stand_in = nn.Parameter(torch.zeros_like(parameter))
    stand_in.grad = torch.zeros_like(parameter)
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))  # copy.copy would lose what an optimizer's own class added
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    twin.state, twin.param_groups = defaultdict(dict), [{**group, "params": [stand_in]}]
    type(twin).step(twin)  # not twin.step: LR schedulers put a step on the instance that is bound to the original
    return {name: _zero(value) for name, value in twin.state[stand_in].items()}


def _zero(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return type(value)(0) if isinstance(value, (int, float)) else value


def _differs_from_zero(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        return bool(local.count_nonzero())
    return bool(value)
