"""Structure of timm models, from the ``group_matcher`` that each of them has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .detection import Layout, Place

__all__ = ["match_groups"]

PREVIOUS = 99999  # timm's MATCH_PREV_GROUP: the end of a stage, or what follows all stages


def match_groups(model: nn.Module) -> Layout | None:
    """Place every parameter by timm's matcher, or return None where the model has none that tells blocks.

    Example:
        >>> match_groups(timm.create_model("vit_tiny_patch16_224")).places["norm.weight"].stack
        'head'

    Args:
        model: A timm model, or transformers' wrapper around one.
    """
    inner = next((name for name in ("timm_model", "") if hasattr(_child(model, name), "group_matcher")), None)
    if inner is None:
        return None
    timm_model: Any = _child(model, inner)
    matcher = timm_model.group_matcher(coarse=False)
    if not isinstance(matcher, Mapping):
        return None
    prefix = f"{inner}." if inner else ""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    keys = {name: _key(name.removeprefix(prefix), matcher) for name in names if name.startswith(prefix)}
    blocks = sorted({key for key in keys.values() if _is_block(key)})
    if not blocks:
        return None
    places = {name: _place(keys.get(name, ()), blocks, model) for name in names}
    return Layout(places, (("",),))


def _child(model: nn.Module, name: str) -> nn.Module | None:
    return getattr(model, name, None) if name else model


def _key(name: str, matcher: Mapping[str, Any]) -> tuple[int, ...]:
    """``(rank of the rule, captured indices…, suffix…)`` of the first pattern that matches; empty for none."""
    for rank, (kind, rules) in enumerate(matcher.items()):
        for pattern, suffix in _rules(rules):
            found = re.match(pattern, name)
            if found:
                indices = tuple(int(part) for part in found.groups() if part is not None)
                return (0,) if kind == "stem" else (rank + 1, *indices, *(suffix or ()))
    return ()


def _rules(rules: Any) -> Iterable[tuple[str, tuple[int, ...] | None]]:
    if isinstance(rules, str):
        return [(rules, None)]
    return [rule if isinstance(rule, tuple) else (rule, None) for rule in rules]


def _is_block(key: tuple[int, ...]) -> bool:
    return len(key) > 1 and key[-1] != PREVIOUS


def _place(key: tuple[int, ...], blocks: list[tuple[int, ...]], model: nn.Module) -> Place:
    reason = f"group_matcher of {type(model).__name__}"
    if key == (0,):
        return Place("embeddings", None, f"{reason}: stem")
    if not key or key[1:] == (PREVIOUS,):
        return Place("head", None, f"{reason}: after the blocks")
    below = [block for block in blocks if block <= key]
    return Place("", max(len(below) - 1, 0), f"{reason}: block")
