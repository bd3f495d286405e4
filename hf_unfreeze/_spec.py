"""The words of the schedule language: selectors, and entries that join them with a time. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ._time import Time
from .errors import ScheduleError, near_match

__all__ = ["BLOCK", "Entry", "Group", "Selector", "spec_of"]

BLOCK = re.compile(r"(?:(.+)\.)?block\[(\d+)\]")  # the name of a block: its stack and its index
_SINGLE = ("all", "head", "embeddings", "connector")  # groups that have no index
_SELECTOR = re.compile(r"(?:([A-Za-z_][\w.]*)\.)?([A-Za-z_]\w*)\s*(?:\[([^\]]*)\])?")
_SLIPS = (  # what is written now and then, what is meant, and how to say so
    (r"(@\s*[\d.]+\s*(?:step|ep|%)?)\s+(?=-?\s*[A-Za-z_][^@]*@)|\s*;\s*", r"\1, ", "a comma", "between two entries"),
    (r"\A([^@*]*)@([^@*]*)\*([^@*]*)\Z", r"\1*\3@\2", "the rate", "before @"),
    (r"\A([^@:()\[\]]+(?:\[[^\]]*\][^@:()\[\]]*)?):([^@()\[\]]*)\Z", r"\1@\2", "the time", "after @"),
)
_INDEX = re.compile(r"(-?\d{1,999})|(-?\d{1,999})?\s*:\s*(-?\d{1,999})?")


class Group(Protocol):
    """What a schedule has to know of a layer group."""

    @property
    def name(self) -> str: ...
    @property
    def stack(self) -> str: ...
    @property
    def parameter_names(self) -> tuple[str, ...]: ...
    @property
    def level(self) -> int | None: ...


_NO_STRUCTURE = (
    "no structure was found in this model, so it has one group, all_parameters. Tried: its row in the registry, timm's "
    "group_matcher, lists of blocks told by class, by _no_split_modules or by name, the longest run of equal layers."
    " Write all, or say where the blocks are: give the model a config with a model_type and call "
    'register_architecture(Architecture("my_model", {"": ("tower.layers",)}, ("embed",))).'
)


@dataclass(frozen=True)
class Selector:
    """Names layer groups.

    Example:
        >>> Selector.parse("block[-1:]").select(layer_groups(bert))
        ['block[1]']

    Args:
        group: ``all``, ``head``, ``embeddings``, ``block`` or another name that ``layer_groups`` gives.
        stack: Only groups of this stack, or of those within it; empty for those of every stack.
        index: Blocks wanted, as in Python: an integer, a ``(start, stop)`` pair, or None for all.
    """

    group: str
    stack: str = ""
    index: int | tuple[int | None, int | None] | None = None

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Read a selector; raise ScheduleError that says what is wrong with it."""
        match = _SELECTOR.fullmatch(text.strip())
        if not match:
            if _SELECTOR.fullmatch(f"{text.strip()}]"):
                raise ScheduleError(f"{text.strip()!r}: the bracket is not closed. Write {cls.parse(f'{text}]')}.")
            raise ScheduleError(
                f"{text.strip()!r} is no selector. Write head, embeddings, block[3], block[-4:], decoder.block or all."
            )
        stack, group, index = match.groups()
        if index is None:
            return cls(group, stack or "")
        bounds = _INDEX.fullmatch(index.strip())
        if not bounds:
            raise ScheduleError(f"[{index}] is no index. Write block[3], block[-4:] or block[2:5].")
        if group != "block":
            prefix = f"{stack}." if stack else ""
            plain = f"{prefix}{group} or " if group in _SINGLE else ""
            raise ScheduleError(
                f"only blocks have an index, {group!r} has none. Write {plain}{prefix}block[{index.strip()}]."
            )
        single, start, stop = (None if part is None else int(part) for part in bounds.groups())
        return cls(group, stack or "", single if single is not None else (start, stop))

    def select(self, groups: Sequence[Group]) -> list[str]:
        """Return the names of the groups meant, bottom → top; raise ScheduleError where there is none."""
        if self.group == "all" and not self.stack:
            return [group.name for group in groups]
        stacks = self._stacks(groups)
        if not stacks and [group.name for group in groups] == ["all_parameters"]:
            raise ScheduleError(f"{self} matches nothing: {_NO_STRUCTURE}")
        if not stacks:
            allowed = sorted({"all"} | {group.name.partition("[")[0] for group in groups})
            raise ScheduleError(
                f"{self} matches nothing in this model. It has {', '.join(allowed)}."
                + near_match(str(self).partition("[")[0], allowed)
            )
        found = [name for names in stacks.values() for name in self._take(names)]
        if not found:
            most = max(stacks.values(), key=len)
            if isinstance(self.index, tuple) and all(b is None or -len(most) <= b < len(most) for b in self.index):
                turned = replace(self, index=self.index[::-1])
                meant = turned if turned._take(most) else replace(self, index=self.index[0])
                raise ScheduleError(f"{self} is empty: it ends at or below its start. Write {meant}.")
            sizes = ", ".join(f"{len(names)} {f'in {stack}' if stack else 'blocks'}" for stack, names in stacks.items())
            first, last = replace(self, index=0), replace(self, index=len(most) - 1)
            raise ScheduleError(f"{self} lies outside this model ({sizes}). Write {first} to {last}.")
        return found

    def _stacks(self, groups: Sequence[Group]) -> dict[str, list[str]]:
        """Return the names that fit by stack: of the one named, or where it has none, of the stacks within it."""
        found: dict[str, list[str]] = {}
        for group in groups:
            stack, _, base = group.name.partition("[")[0].rpartition(".")
            stack = group.stack if self.group == "all" else stack
            if self.group in (base, "all") and (not self.stack or f"{stack}.".startswith(f"{self.stack}.")):
                found.setdefault(stack, []).append(group.name)
        if self.stack in found and self.group != "all":
            return {self.stack: found[self.stack]}
        return found

    def _take(self, names: list[str]) -> list[str]:
        if isinstance(self.index, int):
            return [names[self.index]] if -len(names) <= self.index < len(names) else []
        return names[slice(*self.index)] if self.index is not None else names

    def __str__(self) -> str:
        name = f"{self.stack}.{self.group}" if self.stack else self.group
        if self.index is None:
            return name
        if isinstance(self.index, int):
            return f"{name}[{self.index}]"
        return f"{name}[{':'.join('' if bound is None else str(bound) for bound in self.index)}]"


@dataclass(frozen=True)
class Entry:
    """One ``selector@time``: what opens, at what multiple of the rate, or with ``freeze`` is frozen, and when.

    Example:
        >>> str(Entry.parse("block[0] * 0.1 @ 1.0ep"))
        'block[0]*0.1@1ep'

    Args:
        selector: The groups.
        time: When; it holds from the first optimizer step at or after it.
        freeze: Whether they are frozen then.
        rate: Multiple of the learning rate, above 0.
    """

    selector: Selector
    time: Time
    freeze: bool = False
    rate: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read ``block[-4:]@1ep``, ``block[0]*0.1@1ep`` or ``-embeddings@50%``."""
        for slip, meant, part, place in _SLIPS:
            mended = re.sub(slip, meant, text.strip())
            if mended != text.strip():
                entries = ", ".join(str(cls.parse(entry)) for entry in mended.split(",") if entry.strip())
                raise ScheduleError(f"{text.strip()!r}: {part} stands {place}. Write {entries or 'head@0, all@1ep'}.")
        what, at, when = text.partition("@")
        if not at:
            raise ScheduleError(f"{text.strip()!r} has no time. Write {text.strip() or 'head'}@0 or …@1ep.")
        what, star, factor = what.partition("*")
        freeze = what.strip().startswith("-")
        rate = _rate(factor) if star else 1.0
        if not 0 < rate < math.inf or (freeze and star):
            raise ScheduleError(
                f"{text.strip()!r}: a rate is a number above 0, as in block[0]*0.1@{when.strip()}. "
                f"To freeze, write -{what.strip().removeprefix('-')}@{when.strip()}."
            )
        return cls(Selector.parse(what.strip().removeprefix("-")), Time.parse(when), freeze, rate)

    def __str__(self) -> str:
        rate = "" if self.rate == 1 else f"*{self.rate!r}"
        return f"{'-' if self.freeze else ''}{self.selector}{rate}@{self.time}"


def _rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def spec_of(names: Iterable[str], groups: Sequence[Group]) -> str:
    """Write a set of groups as selectors, runs of blocks folded.

    Example:
        >>> spec_of(["block[0]", "block[1]", "head"], layer_groups(bert))
        'block[0:2], head'

    Args:
        names: Names of groups.
        groups: ``layer_groups(model)``, bottom → top.
    """
    wanted = set(names)
    owned = [group.name for group in groups if group.parameter_names]
    if wanted.issuperset(owned):
        return "all"
    runs: list[tuple[str, int, int]] = []  # name without index, first, past the last; -1 where there is no index
    open_runs: dict[str, int] = {}
    for name in (group.name for group in groups if group.name in wanted):
        match = BLOCK.fullmatch(name)
        if not match:
            runs.append((name, -1, -1))
            continue
        base, index = name.partition("[")[0], int(match[2])
        position = open_runs.get(base)
        if position is not None and runs[position][2] == index:
            runs[position] = (base, runs[position][1], index + 1)
        else:
            open_runs[base] = len(runs)
            runs.append((base, index, index + 1))
    return ", ".join(
        base if first < 0 else f"{base}[{first}]" if stop == first + 1 else f"{base}[{first}:{stop}]"
        for base, first, stop in runs
    )
