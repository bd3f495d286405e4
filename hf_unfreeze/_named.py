"""The named schedules as a table: their arguments, and the changes they make to a model's groups. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ._spec import BLOCK, Group, Selector, Time
from .errors import ScheduleError

__all__ = ["NAMED", "Change", "NamedSchedule", "Value"]

Value = Time | int | bool
Change = tuple[Time, frozenset[str], bool]  # when, which groups, and True where they are frozen again


def _gradual_changes(groups: Sequence[Group], arguments: dict[str, Any]) -> list[Change]:
    every, count = arguments["every"], arguments["blocks"]
    if not any(BLOCK.fullmatch(group.name) for group in groups):
        raise ScheduleError(
            f"gradual needs blocks, and this model has none (groups: {', '.join(group.name for group in groups)}). "
            "Write all_at_once, or give its structure with register_architecture."
        )
    levels: dict[int, list[Group]] = {}  # groups of one level open together
    for position, group in enumerate(groups):
        levels.setdefault(position if group.level is None else group.level, []).append(group)
    openings: list[set[str]] = [set()]
    in_opening = count  # of the blocks; the head has an opening of its own
    for level in sorted(levels, reverse=True):
        members = levels[level]
        names = {group.name for group in members if group.parameter_names}
        if all(group.name == "head" for group in members) or not openings[0]:
            openings[0] |= names  # a head without parameters takes the first blocks with it
        elif all(group.name == "embeddings" for group in members):
            openings += [names] if arguments["embeddings"] and names else []
        elif names:
            if in_opening == count:
                openings.append(set())
                in_opening = 0
            openings[-1] |= names
            in_opening += 1
    return [(Time(every.value * n, every.unit), frozenset(names), False) for n, names in enumerate(openings)]


def _linear_probe_changes(groups: Sequence[Group], arguments: dict[str, Any]) -> list[Change]:
    everything = frozenset(group.name for group in groups)
    return [
        (Time(Fraction(0)), frozenset(Selector("head").select(groups)), False),
        (arguments["until"], everything, False),
    ]


def _all_at_once_changes(groups: Sequence[Group], arguments: dict[str, Any]) -> list[Change]:
    return [(Time(Fraction(0)), frozenset(group.name for group in groups), False)]


@dataclass(frozen=True)
class NamedSchedule:
    """A row of the table of named schedules: its arguments with their defaults, and the changes it makes."""

    arguments: dict[str, Any]
    changes: Callable[[Sequence[Group], dict[str, Any]], list[Change]]


NAMED = {
    "gradual": NamedSchedule({"every": Time(Fraction(1), "ep"), "blocks": 1, "embeddings": True}, _gradual_changes),
    "linear_probe": NamedSchedule({"until": Time(Fraction(1), "ep")}, _linear_probe_changes),
    "all_at_once": NamedSchedule({}, _all_at_once_changes),
}
