"""The named schedules as a table: their arguments, and the changes they make to a model's groups. Needs no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ._openings import Change, Length, blocks_of, freezings, openings
from ._spec import Group, Selector
from ._time import Time
from ._top import top_changes
from .errors import ScheduleError

__all__ = ["NAMED", "NamedSchedule", "Value", "multiple"]

Value = Time | int | float | bool | str | None


def _sets_opening(groups: Sequence[Group], arguments: dict[str, Any]) -> list[frozenset[str]]:
    opened = openings(groups, arguments)
    return [frozenset().union(*opened[: number + 1]) for number in range(1, len(opened))]


def _sets_freezing(groups: Sequence[Group], arguments: dict[str, Any]) -> list[frozenset[str]]:
    everything, units = frozenset(group.name for group in groups), freezings(groups)
    return [everything.difference(*units[: number + 1]) for number in range(len(units) - 1)]  # one always trains


def _gradual_changes(groups: Sequence[Group], arguments: dict[str, Any], length: Length) -> list[Change]:
    every = arguments["every"]
    most = Fraction(100) if every.unit == "%" else math.inf  # an opening beyond the run is one that it does not reach
    opened = enumerate(openings(groups, arguments))
    return [(Time(min(every.value * n, most), every.unit), names, False) for n, names in opened]


def _first_opening(groups: Sequence[Group], arguments: dict[str, Any], length: Length) -> list[Change]:
    return [(Time(Fraction(0)), openings(groups, arguments)[0], False)]


def _linear_probe_changes(groups: Sequence[Group], arguments: dict[str, Any], length: Length) -> list[Change]:
    everything = frozenset(group.name for group in groups)
    return [
        (Time(Fraction(0)), frozenset(Selector("head").select(groups)), False),
        (arguments["until"], everything, False),
    ]


def _all_at_once_changes(groups: Sequence[Group], arguments: dict[str, Any], length: Length) -> list[Change]:
    return [(Time(Fraction(0)), frozenset(group.name for group in groups), False)]


def _rotate_changes(groups: Sequence[Group], arguments: dict[str, Any], length: Length) -> list[Change]:
    total = _total("rotate", length)
    blocks = [block.name for block in blocks_of(groups)]
    if not blocks:
        names = ", ".join(group.name for group in groups)
        raise ScheduleError(f"rotate needs blocks, and this model has none (groups: {names}). Write all_at_once.")
    parts = {"head": ("head", "connector"), "embeddings": ("embeddings",)}  # a projector is small and may be fresh
    kept = [name for argument, names in parts.items() if arguments[argument] for name in names]
    always = frozenset(group.name for group in groups if group.name.rpartition(".")[2] in kept)
    turns = _turns(blocks, arguments["blocks"], arguments["order"], random.Random(arguments["seed"]))
    changes: list[Change] = [(Time(Fraction(0)), always, False)]
    before, number, step = frozenset[str](), 0, 0
    while step < max(total, 1):
        start, turn = Time(Fraction(step)), next(turns)
        changes += [(start, before - turn, True), (start, turn, False)]
        before, number = turn, number + 1
        step = multiple(arguments["every"], number, length)
    return changes


def _freezing_shares(groups: Sequence[Group], arguments: dict[str, Any]) -> list[tuple[Fraction, frozenset[str]]]:
    """List for what share of the run each level trains, bottom → top: evenly from the first one's to the head's, 1."""
    units = freezings(groups)
    units.append(frozenset(group.name for group in groups).difference(*units))
    first, levels = Fraction(str(arguments["first"])), max(len(units) - 1, 1)
    shares = [1 - (1 - first) * (len(units) - 1 - number) / levels for number in range(len(units))]
    return [(share**3 if arguments["cubed"] else share, unit) for share, unit in zip(shares, units, strict=True)]


def _freeze_out_changes(groups: Sequence[Group], arguments: dict[str, Any], length: Length) -> list[Change]:
    total = _total("freeze_out", length)
    frozen = [(math.ceil(share * total), unit) for share, unit in _freezing_shares(groups, arguments)]
    changes = [(Time(Fraction(step)), unit, True) for step, unit in frozen if step < total]
    return _all_at_once_changes(groups, arguments, length) + changes


def _cosines(groups: Sequence[Group], arguments: dict[str, Any]) -> dict[str, tuple[float, Fraction]]:
    shares = _freezing_shares(groups, arguments)
    return {name: (float(1 / share) if arguments["scaled"] else 1.0, share) for share, unit in shares for name in unit}


def _total(name: str, length: Length) -> int:
    if length[0] is None:
        raise ScheduleError(f"{name} goes on to the end of the run and needs its length. Pass total_steps (max_steps).")
    return length[0]


def _turns(blocks: Sequence[str], count: int, order: str, draw: random.Random) -> Iterator[frozenset[str]]:
    """Yield the blocks of each turn without end; every round visits each block once."""
    while True:
        rest = list(reversed(blocks)) if order == "descending" else list(blocks)
        if order == "random":
            draw.shuffle(rest)
        for first in range(0, len(rest), count):
            yield frozenset(rest[first : first + count])


def multiple(every: Time, number: int, length: Length) -> int:
    """Return the step at ``number`` times a distance; one of 30 % may lie beyond the run four times over."""
    total = length[0] or 1  # of a run without a step, every share is beyond the end
    if every.unit == "%":
        return math.ceil(every.value * number * total / 100)
    return Time(every.value * number, every.unit).to_step(*length)


@dataclass(frozen=True)
class NamedSchedule:
    """A row of the table of named schedules.

    Args:
        arguments: Their defaults, which say of what type each is; None is that of a time which may be left out.
        changes: What it does to the groups of a model in a run of some length.
        choices: The words allowed, where an argument is one.
        zero: Arguments that may be 0.
        positional: The argument that may stand first without its name.
        terse: Arguments that are written only where they are not as by default.
        decided: Lists the trainable sets that follow the first, where the data decides when.
        required: Arguments that have no default.
        most: Upper limit of an argument.
        annealed: Gives each group whose rate falls along a cosine the factor with which it starts, and the share of the
            run at which it comes to 0.
    """

    arguments: dict[str, Any]
    changes: Callable[[Sequence[Group], dict[str, Any], Length], list[Change]]
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    zero: tuple[str, ...] = ()
    positional: str = ""
    terse: tuple[str, ...] = ()
    decided: Callable[[Sequence[Group], dict[str, Any]], list[frozenset[str]]] | None = None
    required: tuple[str, ...] = ()
    most: dict[str, float] = field(default_factory=dict)
    annealed: Callable[[Sequence[Group], dict[str, Any]], dict[str, tuple[float, Fraction]]] | None = None

    def kind(self, key: str) -> type:
        """Return the type of an argument."""
        default = self.arguments[key]
        return Time if default is None else type(default)


_PLATEAU = {
    "metric": "", "patience": 2, "min_delta": 0.0, "mode": "auto", "at_least": Time(Fraction(0)), "at_most": None,
    "stop": "none", "back": True, "restore_best": False, "blocks": 1, "embeddings": True,
}  # fmt: skip
_EPOCH, _EVERY_20, _TENTH = Time(Fraction(1), "ep"), Time(Fraction(20)), Time(Fraction(10), "%")
_ORDERS = ("random", "ascending", "descending")

NAMED = {
    "top": NamedSchedule(
        {"share": 0.5, "encoder_until": None},
        top_changes,
        most={"share": 1.0},
        positional="share",
        terse=("encoder_until",),
    ),
    "gradual": NamedSchedule({"every": _EPOCH, "blocks": 1, "embeddings": True}, _gradual_changes),
    "linear_probe": NamedSchedule({"until": _EPOCH}, _linear_probe_changes),
    "all_at_once": NamedSchedule({}, _all_at_once_changes),
    "rotate": NamedSchedule(
        {"blocks": 2, "every": _EVERY_20, "seed": 0, "order": "random", "embeddings": True, "head": True},
        _rotate_changes,
        {"order": _ORDERS},
        zero=("seed",),
    ),
    "freeze_out": NamedSchedule(
        {"first": 0.8, "cubed": True, "scaled": True},
        _freeze_out_changes,
        positional="first",
        most={"first": 1.0},
        annealed=_cosines,
    ),
    "plateau": NamedSchedule(
        _PLATEAU,
        _first_opening,
        {"mode": ("auto", "min", "max"), "stop": ("none", "no_gain")},
        zero=("min_delta", "at_least"),
        positional="metric",
        terse=tuple(key for key in _PLATEAU if key != "patience"),
        decided=_sets_opening,
    ),
    "auto": NamedSchedule(
        {"criterion": "", "blocks": 1, "every": _EPOCH, "batches": 8, "embeddings": True, "per": "block"},
        _gradual_changes,
        {"per": ("block", "parameter")},
        positional="criterion",
        terse=("per",),
        required=("criterion",),
    ),
    "auto_rates": NamedSchedule(
        {"criterion": "relative_gradient_norm", "every": _EPOCH, "batches": 8},
        _all_at_once_changes,
        positional="criterion",
    ),
    "learn_rates": NamedSchedule(
        {"speed": 0.5, "start": 1.0, "every": _TENTH, "batches": 8},
        _all_at_once_changes,
        most={"start": 1.0},
    ),
    "freeze_converged": NamedSchedule(
        {"criterion": "gradient_change", "percentile": 50, "every": _TENTH, "batches": 8},
        _all_at_once_changes,
        positional="criterion",
        decided=_sets_freezing,
        most={"percentile": 100},
    ),
}
