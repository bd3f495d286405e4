"""The only writer of ``requires_grad``, and the eval mode of frozen modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import dropwhile, filterfalse
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn

from ._adapters import adapter_groups
from ._shadow import Shadow
from .errors import UnfreezeError
from .groups import LayerGroup, layer_groups
from .schedule import parse_selectors

__all__ = [
    "Follower",
    "FrozenEval",
    "HeldFlags",
    "TrainableSummary",
    "apply_trainable",
    "flags_lent",
    "largest_modules",
    "set_trainable",
    "trainable_summary",
]

_LENT = ContextVar("hf_unfreeze_flags_lent", default=False)


def apply_trainable(groups: Iterable[tuple[LayerGroup, Sequence[nn.Parameter]]], trainable: Iterable[str]) -> None:
    """Make exactly the named groups trainable; the gradients of the others become None.

    A gradient of zero would not do: AdamW goes on moving a weight by its momentum when the gradient is zero.
    """
    names = set(trainable)
    for group, parameters in groups:
        opened = group.name in names
        for parameter in parameters:
            parameter.requires_grad_(opened)
            if not opened:
                parameter.grad = None


@contextmanager
def flags_lent(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters require grad for a while, to measure theirs; the flags are as before afterwards."""
    flags = [parameter.requires_grad for parameter in parameters]
    before = _LENT.set(True)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        _LENT.reset(before)
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def set_trainable(model: nn.Module, selectors: str) -> None:
    """Make exactly what the selectors name trainable, once and without a schedule.

    Example:
        >>> set_trainable(model, "head, block[-2:]")
        >>> print(trainable_summary(model))
        trainable params: 3,697,923 || all params: 22,714,371 || trainable%: 16.2801

    Args:
        model: Any model whose layer groups can be told.
        selectors: As in a schedule, without times; ``-name`` takes away again. Of a PEFT model they mean its adapters.

    Raises:
        EnvironmentRefused: No gradient would flow, for quantised layers.
        ScheduleError: A selector cannot be read, or matches nothing; every parameter is quantised.
    """
    groups = adapter_groups(model, layer_groups(model))
    phase = parse_selectors(selectors).phases(groups)[0]
    parameters = dict(model.named_parameters())
    apply_trainable(((g, [parameters[name] for name in g.parameter_names]) for g in groups), phase.trainable)


@dataclass(frozen=True)
class TrainableSummary:
    """Numbers of parameters, each distinct one counted once; prints as PEFT does.

    Example:
        >>> print(TrainableSummary(trainable=1200, total=4800))
        trainable params: 1,200 || all params: 4,800 || trainable%: 25.0000

    Args:
        trainable: Those that require grad.
        total: All of them.
    """

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count trainable and all parameters of a model.

    Example:
        >>> trainable_summary(torch.nn.Linear(2, 1))
        TrainableSummary(trainable=3, total=3)

    Args:
        model: Any module.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return TrainableSummary(sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes))


def largest_modules(module: nn.Module, fits: Callable[[Sequence[nn.Parameter]], bool]) -> Iterator[nn.Module]:
    """Yield the largest modules with parameters that fit, from the root down; none lies inside another."""
    parameters = list(module.parameters())
    if parameters and fits(parameters):
        yield module
    elif parameters:
        for child in module.children():
            yield from largest_modules(child, fits)


class Follower(Protocol):
    """What has to follow when flags change: eval modes, checkpointing, the reducer of DDP."""

    def update(self) -> None:
        """Take note of the flags as they are now."""

    def close(self) -> None:
        """Leave everything as it was found."""


class HeldFlags:
    """Sees to it that nothing but the schedule opens a parameter.

    PEFT opens every adapter when ``disable_adapter()`` ends, and in ``set_adapter()``: before each forward the flags
    are put back. Anything else that opens what is frozen is an error at the optimizer step in which it would move.

    Args:
        model: The model without wrappers.
        optimizer: The torch optimizer without wrappers.
        members: Name → parameter, of all groups.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, members: Mapping[str, nn.Parameter]) -> None:
        self._members = members
        self._open: list[nn.Parameter] = []
        self._frozen: dict[str, nn.Parameter] = {}
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._shadow = Shadow(model, self._forward) if getattr(model, "peft_config", None) else None

    def update(self) -> None:
        """Take the flags for those of the schedule."""
        self._open = [parameter for parameter in self._members.values() if parameter.requires_grad]
        self._frozen = {name: parameter for name, parameter in self._members.items() if not parameter.requires_grad}

    def close(self) -> None:
        """Look no more."""
        self._hook.remove()
        if self._shadow is not None:
            self._shadow.close()

    def _forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _LENT.get():
            for parameters, flag in ((self._open, True), (self._frozen.values(), False)):
                for parameter in parameters:
                    if parameter.requires_grad is not flag:
                        parameter.requires_grad_(flag)
        return original(*args, **kwargs)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        moving = [name for name, parameter in self._frozen.items() if parameter.grad is not None]
        if moving:
            raise UnfreezeError(
                f"{moving[0]} is frozen in this phase and has a gradient: something else than the schedule opened it. "
                "Leave requires_grad alone, and open it in the schedule."
            )


class FrozenEval:
    """Keeps frozen modules in eval mode although ``training_step`` calls ``model.train()`` at every step.

    It shadows ``train`` on the one instance: ``eval()`` set by a callback would be undone, and a forward hook would be
    traced by torch.compile. ``close`` takes the shadow away again and restores the modes.

    Args:
        model: The model without wrappers.
        parameters: Those that open and close; a module without any, as in the base of a PEFT model, goes with those
            beside it.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self._model = model
        self._governed = {id(parameter) for parameter in parameters}
        self._eval: list[tuple[nn.Module, bool]] = []  # as their eval() left them: cheaper than eval() at each step
        self._after: list[tuple[nn.Module, bool]] = []  # every mode as the last train() left it
        self._shadowed: Callable[..., nn.Module] | None = model.__dict__.get("train")
        own = type(model).train.__module__.partition(".")[0]
        self._plain = self._shadowed is None and own in ("torch", "transformers")  # sets modes and does no more
        self._modes = [(module, module.training) for module in model.modules()]
        self._train = model.train
        object.__setattr__(model, "train", self)

    def __call__(self, mode: bool = True) -> nn.Module:
        if mode and self._after and all(module.training is training for module, training in self._after):
            return self._model  # nothing to do, and doing it would take a twelfth of a cached step
        self._train(mode)
        if mode:
            for module, training in self._eval:
                module.training = training
            self._after = [(module, module.training) for module in self._model.modules()] if self._plain else []
        return self._model

    def update(self) -> None:
        """Find the largest modules that have such parameters, all of them frozen, and what stands between them."""
        frozen = [*largest_modules(self._model, self._is_frozen), *self._between(self._model)]
        self._after = []
        self._eval = [(module, module.training) for top in frozen for module in top.eval().modules()]
        if self._model.training:
            self(True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_train, (self._model,)  # a copy of the model, or a pickled one, has nothing frozen

    def close(self) -> None:
        """Give the model its own ``train`` back, and every module the mode it had."""
        if self._shadowed is None:
            object.__delattr__(self._model, "train")
        else:
            object.__setattr__(self._model, "train", self._shadowed)
        for module, mode in self._modes:
            module.training = mode

    def _between(self, module: nn.Module) -> Iterator[nn.Module]:
        """Modules with nothing to open, beside frozen ones: the dropout below GPT-2's blocks, the embeddings in LoRA.

        One without parameters has to lie between two with frozen ones: random augmentation at the bottom stays on.
        """
        waiting: list[nn.Module] = []
        below: bool | None = None  # whether all before is frozen; None: there is nothing before
        for child in module.children():
            flags = self._flags(child.parameters())
            if not flags:
                waiting.append(child)
                continue
            if below is not False and not flags[0]:
                yield from waiting if below else dropwhile(_is_bare, waiting)
            elif below:
                yield from filterfalse(_is_bare, waiting)
            if any(flags) and not all(flags):
                yield from self._between(child)
            below = below is not False and not any(flags)
            waiting = []

    def _flags(self, parameters: Iterable[nn.Parameter]) -> list[bool]:
        return [parameter.requires_grad for parameter in parameters if id(parameter) in self._governed]

    def _is_frozen(self, parameters: Sequence[nn.Parameter]) -> bool:
        flags = self._flags(parameters)
        return bool(flags) and not any(flags)


def _plain_train(model: nn.Module) -> Any:
    return MethodType(type(model).train, model)


def _is_bare(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None
