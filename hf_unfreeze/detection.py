"""Layer groups of any model, told from the model itself: its lists of blocks, and names and places of the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ._blocks import Signature, Stack, join, signature
from ._naming import BOTTOM, arrange, height, in_parallel, name_stacks
from ._roles import (
    CONNECTOR,
    HEAD,
    INPUT_PROJECTION,
    NORM,
    NORM_FIRST,
    NORM_LAST,
    OUTER_STEM,
    OWN_STEM,
    QUIRKS,
    SHARED_TABLE,
    STEM,
    TASK_HEAD,
    TOWER,
    matches,
)
from ._runs import repeated_runs
from ._structure import find_stacks
from ._trace import first_use

__all__ = ["Layout", "Place", "base_of", "detect", "prefixes"]


@dataclass(frozen=True)
class Place:
    """Where a parameter belongs: ``embeddings``, ``head``, ``connector``, or block ``index`` of a stack."""

    stack: str
    index: int | None
    reason: str


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
    loose = _Loose(model, stacks, names, tiers)
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
    if any(place.stack == "connector" for place in places.values()):
        names = [*names, "connector"]
    return Layout(places, arrange(dict.fromkeys(names), parallel))


def prefixes(name: str) -> Iterator[str]:
    """``a.b.c`` → ``a.b.c``, ``a.b``, ``a``."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def base_of(model: nn.Module, stacks: list[Stack]) -> str:
    """``"bert."`` for a task class around a base model that holds all stacks; else an empty string.

    Some base models (DINOv3) call an inner encoder their base model: they keep their embeddings beside it.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not isinstance(prefix, str) or not prefix or not isinstance(getattr(model, prefix, None), nn.Module):
        return ""
    holds = all(stack.source.startswith(f"{prefix}.") for stack in stacks)
    own = any(matches(OWN_STEM, name) for name, _ in model.named_children())
    return f"{prefix}." if holds and not own else ""


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


class _Loose:
    """Places what lies in no block, by the words of its name below the last module that also holds a stack."""

    def __init__(
        self, model: nn.Module, stacks: list[Stack], names: list[str], tiers: tuple[tuple[str, ...], ...]
    ) -> None:
        self.model = model
        self.fused = len(tiers) > 1
        self.ancestors = {prefix for stack in stacks for prefix in prefixes(stack.source)} | {""}
        self.holders = self.ancestors | {path for stack in stacks for block in stack.blocks for path in block}
        self.sources = {stack.source: name for stack, name in zip(stacks, names, strict=True)}
        self.top = tiers[-1]
        self.lowest = max(height(tiers[0][0]), BOTTOM)
        self.crowned = {name.partition(".")[0] for name in self.top}  # what the towers stand under
        self.language = self.fused and bool({"text", "cross"} & self.crowned)
        self.sight = self.fused and any(name.startswith("vision") for name in tiers[0])
        self.base = base_of(model, stacks)

    def place(self, name: str) -> tuple[Place, bool]:
        """Return the place of a parameter, and whether a word (and not only its position) told it."""
        parent, below = self._split(name)
        branch = below[0]
        owner = type(self.model.get_submodule(parent)).__name__
        for kind, word, stack in QUIRKS:
            if re.search(kind, owner) and re.search(word, branch):
                return Place(stack, None, f"{branch} of {owner}"), True
        if self.base and not name.startswith(self.base):
            stem = matches(OUTER_STEM, branch) and not matches(HEAD, branch)
            return Place("embeddings" if stem else "head", None, "outside the base model"), True
        lower = self._lower(parent)
        words = below[:-1] if len(below) > 1 and below[-1] in ("weight", "bias") else below
        told = next((place for word in words if (place := self._by_word(word, lower)) is not None), None)
        if told is not None:
            return told, True
        if isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            return Place("embeddings", None, "embedding table"), True
        return self._by_position(parent, branch, lower), False

    def place_by_use(self, places: dict[str, Place], unsure: list[str], used: Mapping[str, int]) -> None:
        """Place by first use what only its position placed so far."""
        for name in unsure:
            parent = self._split(name)[0]
            inside = [
                order
                for other, order in used.items()
                if places[other].index is not None and (not parent or other.startswith(f"{parent}."))
            ]
            if name not in used or not inside:
                continue
            lower = self._lower(parent)
            if used[name] < min(inside):
                places[name] = Place("embeddings", None, "used before the blocks")
            else:
                places[name] = Place("connector" if lower else "head", None, "used after the first block")

    def _split(self, name: str) -> tuple[str, list[str]]:
        """The last module on the way to a parameter that also holds a stack, and the rest of the name."""
        parts = name.split(".")
        depth = 0
        while depth < len(parts) - 1 and ".".join(parts[: depth + 1]) in self.ancestors:
            depth += 1
        return ".".join(parts[:depth]), parts[depth:]

    def _by_word(self, word: str, lower: str) -> Place | None:
        if self.fused and matches(CONNECTOR, word):
            return Place("connector", None, f"connector ({word})")
        if self.sight and matches(INPUT_PROJECTION, word):
            return Place("connector", None, f"input projection ({word})")
        if matches(NORM_FIRST, word):
            return Place("embeddings", None, f"stem ({word})")
        if matches(HEAD, word):
            if lower and not matches(TASK_HEAD, word):
                return Place("connector", None, f"above {lower} ({word})")
            return Place("head", None, f"head ({word})")
        return Place("embeddings", None, f"stem ({word})") if matches(STEM, word) else None

    def _by_position(self, parent: str, branch: str, lower: str) -> Place:
        before = self._before(parent, branch)
        if matches(NORM, branch):
            before = before and not matches(NORM_LAST, branch)
            if not before and lower and self._feeds(lower):
                return Place("connector", None, f"final norm of {lower}")
            return Place("embeddings" if before else "head", None, "first norm" if before else "final norm")
        if not before and lower:
            return Place("connector", None, f"above {lower}")
        if self.language and matches(TOWER, branch):
            return Place("connector", None, f"tower without blocks ({branch})")
        if before and self._stands_on_others(parent):
            return Place("connector", None, "below a stack that stands on others")
        return Place("embeddings" if before else "head", None, "before the blocks" if before else "after the blocks")

    def _lower(self, parent: str) -> str:
        """The stack that a module belongs to, if another one stands on it."""
        if not self.fused or not parent:
            return ""
        own = {name for source, name in self.sources.items() if source.startswith(f"{parent}.")}
        return next(iter(own)) if own and not own & set(self.top) else ""

    def _feeds(self, lower: str) -> bool:
        """Whether what stands on top reads a tower, and is no decoder or twin of its own kind."""
        return lower.partition(".")[0] not in self.crowned and (self.language or height(lower) <= BOTTOM)

    def _stands_on_others(self, parent: str) -> bool:
        """Whether a module holds stacks, and all of them read what lower ones give."""
        own = [name for source, name in self.sources.items() if parent and source.startswith(f"{parent}.")]
        return bool(own) and min(map(height, own)) > self.lowest

    def _before(self, parent: str, branch: str) -> bool:
        """Whether a child is registered before the first child that holds blocks, or is a parameter."""
        children = [name for name, _ in self.model.get_submodule(parent).named_children()]
        if branch not in children:
            return True
        first = next((i for i, name in enumerate(children) if join(parent, name) in self.holders), len(children))
        return children.index(branch) < first
