"""Applies a row of the registry to a model: all of it, or nothing."""

from __future__ import annotations

import re

from torch import nn

from ._blocks import Stack
from ._structure import find_stacks
from .architectures import Architecture
from .detection import Layout, Place, base_of, prefixes

__all__ = ["match_row"]


def match_row(model: nn.Module, row: Architecture) -> tuple[Layout | None, str]:
    """Place every parameter by a row, or say which pattern of it failed.

    Example:
        >>> match_row(bert, find_architecture("bert"))[1]
        ''

    Args:
        model: The model, wrapped or not.
        row: A row of the registry.
    """
    stacks = find_stacks(model)
    owner: dict[str, Place] = {}
    present: list[str] = []
    for stack, paths in row.stacks:
        pattern, blocks = _blocks(model, stacks, paths)
        if not blocks:
            continue
        present.append(stack)
        for index, block in enumerate(blocks):
            owner |= {path: Place(stack, index, f"row {row.model_type}: {pattern}") for path in block}
    if not present:
        tried = ", ".join(path for _, paths in row.stacks for path in paths)
        return None, f"nothing matches {tried}"
    for found in stacks:
        if not all(any(path in owner for path in block) for block in found.blocks):
            return None, f"no pattern of the row places the blocks in {found.source}"
    single = len(present) == 1
    outside = base_of(model, stacks)
    stems = re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, row.embeddings)) or '(?!)'})(?:\.|$)")
    tables = re.compile(r"relative_attention_bias|rel_attn_embed")
    places: dict[str, Place] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        place = next((owner[path] for path in prefixes(name) if path in owner), None)
        if outside and not name.startswith(outside):
            places[name] = Place("head", None, f"row {row.model_type}: outside the base model")
        elif (stem := stems.search(name)) and (place is None or tables.search(name)):
            places[name] = Place("embeddings", None, f"row {row.model_type}: {stem[0].strip('.')}")
        elif place is not None:
            places[name] = Place("", place.index, place.reason) if single else place
        elif _stem_norm(model, name):
            places[name] = Place("embeddings", None, f"row {row.model_type}: norm before the blocks")
        else:
            places[name] = Place("head", None, f"row {row.model_type}: head")
    order = [""] if single else present
    return Layout(places, (tuple(order),) if row.parallel else tuple((name,) for name in order)), ""


def _blocks(model: nn.Module, stacks: list[Stack], paths: tuple[str, ...]) -> tuple[str, list[tuple[str, ...]]]:
    """The blocks under the first alternative that the model has, with the parts that detection gives them."""
    parts = {path: block for stack in stacks for block in stack.blocks for path in block}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        pattern = re.compile(rf"(?:.*\.)?{re.escape(path)}".replace(r"\*", r"\d+"))
        lists = [n for n, m in modules.items() if isinstance(m, nn.ModuleList) and pattern.fullmatch(n)]
        lists = [n for n in lists if not any(n.startswith(f"{outer}.") for outer in lists)]
        if "*" not in path:
            lists = lists[:1]
        blocks = [f"{name}.{index}" for name in lists for index in range(len(modules[name]))]
        if blocks:
            return path, [parts.get(block, (block,)) for block in blocks]
    return "", []


def _stem_norm(model: nn.Module, name: str) -> bool:
    """Wav2Vec2 and its kin: ``encoder.layer_norm`` runs before the blocks, unless do_stable_layer_norm."""
    stable = getattr(getattr(model, "config", None), "do_stable_layer_norm", None)
    return stable is False and re.search(r"(?:^|\.)encoder\.layer_norm\.", name) is not None
