"""Layer groups of any model, told from the model itself: its lists of blocks, and names and places of the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ._blocks import Signature, Stack, signature
from ._loose import Loose, Place, base_of, prefixes
from ._naming import arrange, in_parallel, name_stacks, settle
from ._roles import SHARED_TABLE, matches
from ._runs import repeated_runs
from ._structure import find_stacks
from ._trace import first_use

__all__ = ["Layout", "Place", "base_of", "detect", "prefixes"]


@dataclass(frozen=True)
class Layout:
    """What a row or detection says of a model.

    Args:
        places: Name of each parameter (all names of a tied one) → its place.
        tiers: Stacks bottom → top; stacks in one tier are parallel and open together, from the top.
    """

    places: dict[str, Place]
    tiers: tuple[tuple[str, ...], ...]


def detect(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Layout | None:
    """Tell the layout of any model, or None when nothing in it repeats.

    Example:
        >>> detect(bert).places["pooler.dense.weight"]
        Place(stack='head', index=None, reason='head (pooler)')

    Args:
        model: Any module, on any device; meta is enough.
        inputs: Keyword arguments of one forward, which then places the parameters whose name tells nothing.
    """
    stacks = find_stacks(model) or repeated_runs(model)
    if not stacks:
        return None
    names = name_stacks(stacks, model)
    parallel = in_parallel(names, model)
    tiers = arrange(dict.fromkeys(names), parallel)
    loose = Loose(model, stacks, names, tiers)
    owner = _owners(stacks, names)
    places: dict[str, Place] = {}
    unsure: list[str] = []
    twins = _twins(model)
    tables = Counter(_numberless(name) for name, _ in model.named_parameters(remove_duplicate=False))
    for name, _ in model.named_parameters(remove_duplicate=False):
        found = next((owner[path] for path in prefixes(name) if path in owner), None)
        if found is not None and found.index == 0 and tables[_numberless(name)] == 1 and _is_table(name):
            found = Place("embeddings", None, "table for all blocks")
        twin = next((path for path in prefixes(name) if path in twins), None) if found is None else None
        if twin is not None:  # a tower that others read lies where it is reached first
            found = places.get(twins[twin] + name.removeprefix(twin))
        if found is None:
            found, sure = loose.place(name)
            unsure += [] if sure else [name]
        places[name] = found
    if inputs is not None:
        loose.place_by_use(places, unsure, first_use(model, inputs))
    connectors = dict.fromkeys(place.stack for place in places.values() if place.stack.endswith("connector"))
    if not connectors:
        return Layout(places, tiers)
    called, tiers = settle(connectors, tiers, parallel)
    return Layout({name: replace(p, stack=called.get(p.stack, p.stack)) for name, p in places.items()}, tiers)


def _owners(stacks: list[Stack], names: list[str]) -> dict[str, Place]:
    """Path of each module in a block → its place; stacks of one name number their blocks through."""
    owner: dict[str, Place] = {}
    offsets: Counter[str] = Counter()
    for stack, name in zip(stacks, names, strict=True):
        for index, block in enumerate(stack.blocks, offsets[name]):
            owner |= {path: Place(name, index, f"block list {stack.source}".rstrip()) for path in block}
        offsets[name] += len(stack.blocks)
    return owner


def _twins(model: nn.Module) -> dict[str, str]:
    """Modules that are tied as a whole to an earlier one of their class → that one."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    seen: dict[Signature, str] = {}
    found: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if uses[id(next(module.parameters(), None))] > 1 and not any(outer in found for outer in prefixes(path)):
            kind = signature(module)
            first = seen.setdefault(kind, path)
            if first != path and len(kind[1]) > 1:
                found[path] = first
    return found


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _is_table(name: str) -> bool:
    return any(matches(SHARED_TABLE, word) for word in name.split("."))
