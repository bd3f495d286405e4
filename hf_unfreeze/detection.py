"""Layer groups of any model, told from the model itself: its lists of blocks, and names and places of the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ._roles import (
    CLASS_MODALITIES,
    CONNECTOR,
    HEAD,
    INPUT_PROJECTION,
    MODALITIES,
    NORM,
    NORM_FIRST,
    NORM_LAST,
    OWN_STEM,
    PARALLEL,
    PARTS,
    QUIRKS,
    RANKS,
    SHARED_TABLE,
    STEM,
    TASK_HEAD,
    matches,
)
from ._structure import Stack, find_stacks, repeated_runs
from ._trace import first_use

__all__ = ["Layout", "Place", "arrange", "base_of", "detect", "first_use"]


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


def arrange(stacks: Iterator[str] | list[str], parallel: bool) -> tuple[tuple[str, ...], ...]:
    """Order the stacks bottom → top: vision or audio, connector, text or encoder, decoder, cross.

    Example:
        >>> arrange(["decoder", "encoder"], parallel=False)
        (('encoder',), ('decoder',))

    Args:
        stacks: Names, in the order of registration.
        parallel: Whether the text tower stands beside the others (CLIP) and not on them (LLaVA).
    """

    def rank(name: str) -> int:
        best = max((RANKS.get(part, 0) for part in re.split(r"[._]", name)), default=0)
        first = RANKS.get(name.split(".")[0], best)
        return 10 if parallel and name.split(".")[0] == "text" else first

    ranked: dict[tuple[int, str], list[str]] = {}
    for order, name in enumerate(stacks):
        inner = name.partition(".")[2]
        key = (rank(name), f"{RANKS.get(inner, 0):03d}" if inner else "")
        if not inner and rank(name) == 0:
            key = (45, f"{order:03d}")
        ranked.setdefault(key, []).append(name)
    return tuple(tuple(names) for _, names in sorted(ranked.items()))


def detect(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Layout | None:
    """Tell the layout of any model, or None when nothing in it repeats.

    Example:
        >>> detect(bert).places["pooler.dense.weight"]
        Place(stack='head', index=None, reason='head')

    Args:
        model: Any module, on any device; meta is enough.
        inputs: Keyword arguments of one forward, which then places the parameters whose name tells nothing.
    """
    stacks = find_stacks(model) or repeated_runs(model)
    if not stacks:
        return None
    names = name_stacks(stacks, model)
    used = first_use(model, inputs) if inputs is not None else {}
    towers = dict.fromkeys(names)
    several = len(towers) > 1
    parallel = "cross" in towers or any(
        matches(PARALLEL, part) for name, _ in model.named_parameters() for part in name.split(".")
    )
    if several and "text" in towers and {"encoder", "decoder"} & set(towers) and "vision" in towers:
        parallel = True
    tiers = arrange(list(towers), parallel)
    offsets: dict[str, int] = {}
    owner: dict[str, Place] = {}
    for stack, name in zip(stacks, names, strict=True):
        start = offsets.get(name, 0)
        for i, block in enumerate(stack.blocks):
            for path in block:
                owner[path] = Place(name, start + i, f"block list {stack.source}".rstrip())
        offsets[name] = start + len(stack.blocks)
    loose = _Loose(model, stacks, names, tiers)
    places: dict[str, Place] = {}
    waiting: dict[str, str] = {}
    alike = Counter(re.sub(r"\d+", "#", name) for name, _ in model.named_parameters(remove_duplicate=False))
    for name, _ in model.named_parameters(remove_duplicate=False):
        found = next((owner[path] for path in prefixes(name) if path in owner), None)
        if found is not None and any(matches(SHARED_TABLE, word) for word in name.split(".")):
            shared = re.sub(r"\d+", "#", name)
            found = Place("embeddings", None, "table for all blocks") if alike[shared] == 1 else found
        if found is None:
            found, sure = loose.place(name)
            if not sure:
                waiting[name] = found.stack
        places[name] = found
    if used:
        _place_by_use(places, waiting, used)
    if any(place.stack == "connector" for place in places.values()):
        towers["connector"] = None
    return Layout(places, arrange(list(towers), parallel))


def prefixes(name: str) -> Iterator[str]:
    """``a.b.c`` → ``a.b.c``, ``a.b``, ``a``."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def name_stacks(stacks: list[Stack], model: nn.Module) -> list[str]:
    """One name per stack; an empty one when the model has only one."""
    if len(stacks) == 1:
        return [""]
    described = [_describe(stack, model) for stack in stacks]
    if any(modality for modality, _ in described):
        language = isinstance(_embedding_of(model), nn.Embedding)
        described = [(m or ("text" if not r and language else ""), r) for m, r in described]
    roles = [role for modality, role in described if not modality]
    names = []
    for modality, role in described:
        twins = [r for m, r in described if m == modality]
        distinct = len(twins) > 1 and len(set(twins)) == len(twins)
        names.append(f"{modality}.{role}" if modality and role and distinct else modality or role or "main")
    if "cross" in names and "text" not in names:
        names = ["text" if name == "encoder" else name for name in names]
    if "text" in names and "encoder" in roles and "decoder" not in roles:
        block = (
            type(model.get_submodule(stacks[names.index("encoder")].blocks[0][-1])).__name__
            if "encoder" in names
            else ""
        )
        heard = "audio" if re.search(CLASS_MODALITIES[0][1], block) else "vision"
        names = [heard if name == "encoder" and heard not in names else name for name in names]
    result: list[str] = []
    for i, name in enumerate(names):
        unique = name
        if name in result:
            own = [part for part in stacks[i].source.split(".") if not part.isdigit()]
            other = stacks[result.index(name)].source.split(".")
            word = next((part for part in own if part not in other), "part")
            unique, number = f"{name}.{word}", 2
            while unique in result:
                unique, number = f"{name}.{word}{number}", number + 1
        result.append(unique)
    return result


def _describe(stack: Stack, model: nn.Module) -> tuple[str, str]:
    """Modality and part of a stack: from its path, the outermost word first, then from the class of its blocks."""
    parts = stack.source.split(".")
    modality = next((m for part in parts for m, pattern in MODALITIES if re.search(pattern, part)), "")
    role = next((r for part in parts for r, pattern in PARTS if re.search(pattern, part)), "")
    if not modality and not role:
        block = type(model.get_submodule(stack.blocks[0][-1])).__name__
        modality = next((m for m, pattern in CLASS_MODALITIES if re.search(pattern, block)), "")
    return modality, role


def _embedding_of(model: nn.Module) -> nn.Module | None:
    """The first embedding table, if there is any: a model with one reads tokens."""
    return next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)


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
        self.language = self.fused and "text" in self.top
        self.sight = self.fused and any(name.startswith("vision") for name in tiers[0])
        self.base = base_of(model, stacks)

    def place(self, name: str) -> tuple[Place, bool]:
        """Return the place of a parameter, and whether a word (and not only its position) told it."""
        parts = name.split(".")
        depth = 0
        while depth < len(parts) and ".".join(parts[: depth + 1]) in self.ancestors:
            depth += 1
        parent, below = ".".join(parts[:depth]), parts[depth:]
        branch = below[0] if below else ""
        owner = type(self.model.get_submodule(parent)).__name__
        for kind, word, stack in QUIRKS:
            if re.search(kind, owner) and re.search(word, branch):
                return Place(
                    stack, None, f"runs {'before' if stack == 'embeddings' else 'after'} the blocks of {owner}"
                ), True
        lower = self._lower(parent)
        if self.base and not name.startswith(self.base):
            return Place("head", None, "outside the base model"), True
        words = below[:-1] if len(below) > 1 and below[-1] in ("weight", "bias") else below
        for word in words:
            if self.fused and matches(CONNECTOR, word):
                return Place("connector", None, f"connector ({word})"), True
            if self.sight and matches(INPUT_PROJECTION, word):
                return Place("connector", None, f"input projection ({word})"), True
            if matches(NORM_FIRST, word):
                return Place("embeddings", None, f"stem ({word})"), True
            if matches(HEAD, word):
                up = lower and not matches(TASK_HEAD, word)
                return Place(
                    "connector" if up else "head", None, f"above {lower} ({word})" if up else f"head ({word})"
                ), True
            if matches(STEM, word):
                return Place("embeddings", None, f"stem ({word})"), True
        before = self._before(parent, branch)
        if matches(NORM, branch):
            before = before and not matches(NORM_LAST, branch)
            if not before and lower and self.language:
                return Place("connector", None, f"final norm of {lower}"), False
            return Place("embeddings" if before else "head", None, "first norm" if before else "final norm"), False
        if not before and lower:
            return Place("connector", None, f"above {lower}"), False
        return Place(
            "embeddings" if before else "head", None, "before the blocks" if before else "after the blocks"
        ), False

    def _lower(self, parent: str) -> str:
        """The stack that a module belongs to, if another one stands on it."""
        if not self.fused or not parent:
            return ""
        own = {name for source, name in self.sources.items() if source.startswith(parent + ".")}
        return next(iter(own)) if own and not own & set(self.top) else ""

    def _before(self, parent: str, branch: str) -> bool:
        """Whether a child is registered before the first child that holds blocks; direct parameters are."""
        module = self.model.get_submodule(parent) if parent else self.model
        for child, _ in module.named_children():
            if child == branch:
                return True
            if (f"{parent}.{child}" if parent else child) in self.holders:
                return branch not in dict(module.named_children())
        return True


def _place_by_use(places: dict[str, Place], waiting: Mapping[str, str], used: Mapping[str, int]) -> None:
    """Parameters that only their position placed go where their first use says: before the first block, or after it."""
    blocks = [order for name, order in used.items() if name in places and places[name].index is not None]
    if not blocks:
        return
    first = min(blocks)
    for name in waiting:
        if name in used:
            early = used[name] < first
            places[name] = Place(
                "embeddings" if early else "head", None, "used before the blocks" if early else "used after the blocks"
            )
