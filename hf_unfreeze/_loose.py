"""Places what lies in no block: by its name, the module it lies in, or the first use of it in a forward."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ._blocks import Stack, join
from ._naming import BOTTOM, height
from ._quirks import QUIRKS
from ._roles import (
    CONNECTOR,
    HEAD,
    INPUT_PROJECTION,
    NORM,
    NORM_FIRST,
    NORM_LAST,
    OUTER_STEM,
    OWN_STEM,
    PROPOSALS,
    QUERIES,
    STEM,
    TASK_HEAD,
    TOWER,
    matches,
)

__all__ = ["Loose", "Place", "base_of", "prefixes"]


@dataclass(frozen=True)
class Place:
    """Where a parameter belongs: ``embeddings``, ``head``, a ``connector``, or block ``index`` of a stack."""

    stack: str
    index: int | None
    reason: str


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


def _holds(path: str, inner: str) -> bool:
    return f"{inner}.".startswith(f"{path}.")


class Loose:
    """Places what lies in no block, by the words of its name below the last module that also holds a stack."""

    def __init__(
        self, model: nn.Module, stacks: list[Stack], names: list[str], tiers: tuple[tuple[str, ...], ...]
    ) -> None:
        self.model = model
        self.fused = len(tiers) > 1
        self.ancestors = {prefix for stack in stacks for prefix in prefixes(stack.source)} | {""}
        blocks = {path for stack in stacks for block in stack.blocks for path in block}
        self.holders = self.ancestors | {outer for path in blocks for outer in prefixes(path)}
        self.sources = {stack.source: name for stack, name in zip(stacks, names, strict=True)}
        self.tiers = tiers
        self.tier = {name: index for index, names in enumerate(tiers) for name in names}
        self.lowest = max(height(tiers[0][0]), BOTTOM)
        self.crowned = {name.partition(".")[0] for name in tiers[-1]}  # what the towers stand under
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
                return Place(self._put(stack, parent), None, f"{branch} of {owner}"), True
        if self.base and not name.startswith(self.base):
            stem = matches(OUTER_STEM, branch) and not matches(HEAD, branch)
            return Place("embeddings" if stem else "head", None, "outside the base model"), True
        lower = self._lower(parent)
        words = below[:-1] if len(below) > 1 and below[-1] in ("weight", "bias") else below
        for word in words:
            told = self._by_word(word, parent, branch, lower)
            if told is not None and told.stack.endswith("connector") and matches(QUERIES, below[-1]):
                return Place("embeddings", None, f"learned queries ({below[-1]})"), True
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
                places[name] = Place(f"{lower}.connector" if lower else "head", None, "used after the first block")

    def _split(self, name: str) -> tuple[str, list[str]]:
        """The last module on the way to a parameter that also holds a stack, and the rest of the name."""
        parts = name.split(".")
        depth = 0
        while depth < len(parts) - 1 and ".".join(parts[: depth + 1]) in self.ancestors:
            depth += 1
        return ".".join(parts[:depth]), parts[depth:]

    def _by_word(self, word: str, parent: str, branch: str, lower: str) -> Place | None:
        if self.fused and matches(CONNECTOR, word):
            return Place(self._joint(parent, branch), None, f"connector ({word})")
        if self.sight and matches(PROPOSALS, word):
            return Place(self._under("decoder"), None, f"what the encoder proposes ({word})")
        if self.sight and matches(INPUT_PROJECTION, word):
            return Place(self._between(parent, True), None, f"input projection ({word})")
        if matches(NORM_FIRST, word):
            return Place("embeddings", None, f"stem ({word})")
        if matches(HEAD, word):
            if lower and not matches(TASK_HEAD, word) and (word != "pooler" or self._feeds(lower)):
                return Place(f"{lower}.connector", None, f"above {lower} ({word})")
            return Place("head", None, f"head ({word})")
        return Place("embeddings", None, f"stem ({word})") if matches(STEM, word) else None

    def _by_position(self, parent: str, branch: str, lower: str) -> Place:
        before = self._before(parent, branch)
        if matches(NORM, branch):
            before = before and not matches(NORM_LAST, branch)
            if not before and lower and self._feeds(lower):
                return Place(f"{lower}.connector", None, f"final norm of {lower}")
            return Place("embeddings" if before else "head", None, "first norm" if before else "final norm")
        if not before and lower:
            return Place(f"{lower}.connector", None, f"above {lower}")
        if self.language and matches(TOWER, branch):
            return Place("connector", None, f"tower without blocks ({branch})")
        if before and self._stands_on_others(parent):
            return Place(self._between(parent, True), None, "below a stack that stands on others")
        return Place("embeddings" if before else "head", None, "before the blocks" if before else "after the blocks")

    def _own(self, parent: str) -> list[str]:
        """The stacks that a module holds, bottom → top."""
        held = (name for source, name in self.sources.items() if not parent or _holds(parent, source))
        return sorted(held, key=self.tier.__getitem__)

    def _joint(self, parent: str, branch: str) -> str:
        """The connector of a part of a module: below its stack or above it, and as usual where it holds several."""
        tiers = {self.tier[name] for name in self._own(parent)}
        if len(tiers) > 1:
            coder = self._own(join(parent, "encoder")) if max(tiers) < len(self.tiers) - 1 else []
            return f"{coder[-1]}.connector" if coder else "connector"  # what quantises is above the encoder
        return self._between(parent, tiers == {len(self.tiers) - 1} or self._before(parent, branch))

    def _between(self, parent: str, below: bool) -> str:
        """The connector below all stacks that a module holds, or above them."""
        own = self._own(parent)
        return self._under(own[0]) if below else f"{own[-1]}.connector"

    def _under(self, stack: str) -> str:
        """The connector right below a stack."""
        at = self.tier.get(stack, 0)
        return f"{self.tiers[at - 1][0]}.connector" if at else "connector"

    def _put(self, where: str, parent: str) -> str:
        """The stack that the last column of the quirks means."""
        if where == "amid":
            return self._under(self._own(parent)[-1])
        if where not in ("below", "above"):
            return where
        if not self.fused:
            return "embeddings" if where == "below" else "head"
        return self._between(parent, where == "below")

    def _lower(self, parent: str) -> str:
        """The stack that a module belongs to, if another one stands on it."""
        highest = self._own(parent)[-1] if self.fused and parent else ""
        return highest if highest and self.tier[highest] < len(self.tiers) - 1 else ""

    def _feeds(self, lower: str) -> bool:
        """Whether what stands on top reads a tower, and is no decoder or twin of its own kind."""
        first = lower.partition(".")[0]
        bottom = height(lower) <= BOTTOM or (lower == "text" and lower in self.tiers[0])
        return first not in self.crowned and (self.language or bottom)

    def _stands_on_others(self, parent: str) -> bool:
        """Whether a module holds stacks, and all of them read what lower ones give."""
        return bool(parent) and min(map(height, self._own(parent))) > self.lowest

    def _before(self, parent: str, branch: str) -> bool:
        """Whether a child is registered before the first child that holds blocks, or is a parameter."""
        children = [name for name, _ in self.model.get_submodule(parent).named_children()]
        if branch not in children:
            return True
        holds = (join(parent, name) in self.holders for name in children)
        first = next((index for index, held in enumerate(holds) if held), len(children))
        return children.index(branch) < first
