"""What opens together, and what freezes together, in the order of a model's levels. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._spec import BLOCK, Group
from ._time import Time
from .errors import ScheduleError

__all__ = ["Change", "Length", "blocks_of", "freezings", "openings"]

Change = tuple[Time, frozenset[str], bool]  # when, which groups, and True where they are frozen again
Length = tuple[int | None, int | None]  # optimizer updates of the whole run and of one epoch, where known


def blocks_of(groups: Sequence[Group]) -> list[Group]:
    """List the blocks that have parameters, bottom → top."""
    return [group for group in groups if BLOCK.fullmatch(group.name) and group.parameter_names]


def openings(groups: Sequence[Group], arguments: dict[str, Any]) -> list[frozenset[str]]:
    """List what opens together, from the top: the head, ``blocks`` blocks at a time, the embeddings if wanted."""
    count = arguments["blocks"]
    if not any(BLOCK.fullmatch(group.name) for group in groups):
        there = ", ".join(group.name for group in groups)
        raise ScheduleError(
            f"the schedule needs blocks, and this model has none (groups: {there}). "
            "Write all_at_once, or give its structure with register_architecture."
        )
    levels: dict[int, list[Group]] = {}  # groups of one level open together
    for position, group in enumerate(groups):
        levels.setdefault(position if group.level is None else group.level, []).append(group)
    opened: list[set[str]] = [set()]
    in_opening = count  # of the blocks; the head has an opening of its own
    for level in sorted(levels, reverse=True):
        members = levels[level]
        names = {group.name for group in members if group.parameter_names}
        if all(group.name == "head" for group in members) or not opened[0]:
            opened[0] |= names  # a head without parameters takes the first blocks with it
        elif all(group.name.rpartition(".")[2] == "embeddings" for group in members):
            opened += [names] if arguments["embeddings"] and names else []
        elif names:
            if in_opening == count:
                opened.append(set())
                in_opening = 0
            opened[-1] |= names
            in_opening += 1
    return [frozenset(names) for names in opened]


def freezings(groups: Sequence[Group]) -> list[frozenset[str]]:
    """List what freezes together, from the bottom: one level of blocks at a time, the embeddings with the lowest."""
    *units, lowest = [set(names) for names in openings(groups, {"blocks": 1, "embeddings": True})[1:]] or [set()]
    if units and not any(BLOCK.fullmatch(name) for name in lowest):
        units[-1] |= lowest
    elif lowest:
        units.append(lowest)
    return [frozenset(unit) for unit in reversed(units)]
