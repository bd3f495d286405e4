"""Weights as a fresh model has them, for some of the parameters of a model that has been trained."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ._fixed import UNBUILT
from ._quantised import is_quantised
from .errors import StructureError

__all__ = ["draw"]

_Rule = Callable[[nn.Module], Any]


@torch.no_grad()
def draw(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """Draw parameters as a fresh model has them: ``reset_parameters``, ``_init_weights``, what a constructor sets.

    Args:
        model: A transformers model, or any module.
        names: Parameters to draw; everything else stays.

    Returns:
        Those that nothing can draw; where there are any, the model is as it was.

    Raises:
        StructureError: A constant has to come from a second model, and that cannot be built.
    """
    wanted = {name: parameter for name, parameter in model.named_parameters() if name in names}
    if left := tuple(name for name, parameter in wanted.items() if is_quantised(parameter)):
        return left
    left = tuple(wanted)
    before = [(tensor, tensor.clone()) for tensor in (*wanted.values(), *model.buffers())]
    try:
        _by_rules(model, wanted)
        if constants := _undrawn(wanted):
            _from_a_second_model(model, {name: wanted[name] for name in constants})
        left = _undrawn(wanted)
    finally:
        for tensor, value in before if left else ():
            tensor.copy_(value)
    return left


def _undrawn(wanted: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    found = {name: torch.isnan(parameter).any() for name, parameter in wanted.items()}
    return tuple(name for name, flag in found.items() if getattr(flag, "full_tensor", lambda flag=flag: flag)())


def _by_rules(model: nn.Module, wanted: Mapping[str, nn.Parameter]) -> None:
    """Go the way a model is built: first every module's own reset, then the rule of its model, children first.

    A rule is asked about each module that holds something wanted, not only about those with parameters of their own:
    T5's draws a whole attention at once, and Mamba's takes back in the mixer what it did to a projection.
    """
    chosen = {id(parameter) for parameter in wanted.values()}

    def holds(module: nn.Module, deep: bool) -> bool:
        return any(id(parameter) in chosen for parameter in module.parameters(recurse=deep))

    with _set_aside(model, chosen):
        for parameter in wanted.values():
            if hasattr(parameter, "_is_hf_initialized"):  # transformers 5 marks loaded weights, and would leave them
                del parameter._is_hf_initialized
            parameter.fill_(torch.nan)  # what still has some at the end has not been drawn
        modules = [(m, rule) for m, rule in _children_first(model, None, set()) if holds(m, deep=True)]
        for module, _ in modules:
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset) and holds(module, deep=False):
                reset()
        for module, rule in modules:
            if rule is not None:
                rule(module)


def _children_first(
    module: nn.Module, rule: _Rule | None, seen: set[nn.Module]
) -> Iterator[tuple[nn.Module, _Rule | None]]:
    """Yield each module once, with the rule of the innermost model that it is in, as transformers does."""
    if module in seen:
        return
    seen.add(module)
    if rule is None or _is_model(module):
        rule = _rule_of(module) or rule
    for child in module.children():
        yield from _children_first(child, rule, seen)
    yield module, rule


def _rule_of(module: nn.Module) -> _Rule | None:
    """Return the ``_init_weights`` of a module, if it is one that takes modules and not one that draws its own."""
    own: _Rule | None = getattr(module, "_init_weights", None)
    try:
        if own is not None:
            inspect.signature(own).bind(module)
    except TypeError:
        return None
    return own


def _is_model(module: nn.Module) -> bool:
    """Tell a model of transformers, by its class: a wrapper passes on what its model has."""
    return hasattr(type(module), "_init_weights") and hasattr(type(module), "config_class")


@contextmanager
def _set_aside(model: nn.Module, chosen: set[int]) -> Iterator[None]:
    """Let stand-ins without memory take what a rule writes to what must stay, or to a tied parameter a second time."""
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    placed: set[int] = set()
    try:
        for module, name, parameter in places:
            if id(parameter) not in chosen or id(parameter) in placed:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
            placed.add(id(parameter))
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _from_a_second_model(model: nn.Module, wanted: Mapping[str, nn.Parameter]) -> None:
    """Copy what only a constructor sets, as CLIP's ``logit_scale``, or a parametrisation hides, as in wav2vec2."""
    left = set(wanted)
    for path, module in model.named_modules():  # the outermost model first
        prefix = f"{path}." if path else ""
        inside = {name for name in left if name.startswith(prefix)}
        if not inside or not _is_model(module):
            continue
        left -= inside
        try:
            second = type(module)(copy.deepcopy(module.config))
            fresh = dict(second.named_parameters(remove_duplicate=False))
            for name in inside:
                new = fresh.get(name.removeprefix(prefix))
                if new is not None and new.shape == wanted[name].shape:
                    wanted[name].copy_(new)
        except UNBUILT as error:
            raise StructureError(
                f"reinitialize takes {', '.join(sorted(inside))} from a second {type(module).__name__}, as only its "
                f"constructor sets them, and that fails ({error}). Leave their groups out."
            ) from error
