"""Points in time of a run: optimizer steps, epochs and shares, exact. Needs no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from .errors import ScheduleError, near_match

__all__ = ["Time"]

UNITS = ("step", "ep", "%")
_TIME = re.compile(r"(\d{1,999}(?:\.\d{1,999})?)\s*([A-Za-z%]*)")  # Python reads no whole number over 4,300 digits


@dataclass(frozen=True)
class Time:
    """A point in the run, or a distance in it, exact.

    Example:
        >>> Time.parse("1.5ep").to_step(total_steps=None, steps_per_epoch=100)
        150

    Args:
        value: Number of units, a ``Fraction`` or an int, never negative, a decimal with an end; a whole number where
            the unit is ``step``.
        unit: ``step`` (optimizer updates), ``ep`` (epochs) or ``%`` (of all optimizer updates of the run).
    """

    value: Fraction
    unit: str = "step"

    def __post_init__(self) -> None:
        value: object = self.value
        if not isinstance(value, (int, Fraction)) or isinstance(value, bool):
            raise ScheduleError(f"a time is a whole number or a Fraction, not {value!r}. Write Time.parse('1.5ep').")
        object.__setattr__(self, "value", Fraction(value))
        _check_unit(self.unit, "", f"Time({value}, {self.unit!r})")
        if value < 0:
            raise ScheduleError(f"{value}{self.unit} lies before the run. Write 0 or more.")
        if self.value == 0:
            object.__setattr__(self, "unit", "step")
        if 10 ** self.value.denominator.bit_length() % self.value.denominator:  # has other factors than 2 and 5
            near = math.ceil(self.value) if self.unit == "step" else f"{float(self.value):.4g}"
            raise ScheduleError(
                f"{self.value}{self.unit} has no end as a decimal. Write for instance {near}{self.unit}."
            )
        if self.unit == "step" and self.value.denominator != 1:
            raise ScheduleError(f"{self}: steps are whole numbers. Write for instance {math.ceil(self.value)}step.")
        if self.unit == "%" and self.value > 100:
            raise ScheduleError(f"{self} lies beyond the run. Percentages go from 0% to 100%.")

    @classmethod
    def parse(cls, text: str) -> Time:
        """Read ``0``, ``500step``, ``1.5ep`` or ``30%``; raise ScheduleError for anything else."""
        match = _TIME.fullmatch(text.strip())
        if not match:
            raise ScheduleError(f"{text.strip()!r} is no time. Write 0, 500step, 1.5ep or 30%.")
        number, unit = match.groups()
        if not unit and Fraction(number) != 0:
            *others, last = map(str, _with_units(Fraction(number)))
            raise ScheduleError(f"{number} has no unit. Write {', '.join(others)}{' or ' if others else ''}{last}.")
        _check_unit(unit or "step", number, text.strip())
        return cls(Fraction(number), unit or "step")

    def to_step(self, total_steps: int | None, steps_per_epoch: int | None) -> int:
        """Return the first optimizer step that begins at or after this time.

        Args:
            total_steps: Optimizer updates in the whole run; needed for ``%``.
            steps_per_epoch: Optimizer updates in one epoch, a last partial accumulation window included; needed for
                ``ep``.
        """
        if self.unit == "step":
            return int(self.value)
        known = steps_per_epoch if self.unit == "ep" else total_steps
        if known is None:
            what, other = ("steps_per_epoch", "%") if self.unit == "ep" else ("total_steps", "ep")
            raise ScheduleError(
                f"{self} needs {what}, which is not known here (a dataset without a length has no epochs). "
                f"Write the time in step or {other} instead, or pass {what}."
            )
        return math.ceil(self.value * known / (1 if self.unit == "ep" else 100))

    def __str__(self) -> str:
        if self.value == 0:
            return "0"
        digits = 0
        while (self.value * 10**digits).denominator != 1:
            digits += 1
        number = f"{int(self.value * 10**digits):0{digits + 1}d}"
        return f"{number[:-digits]}.{number[-digits:]}{self.unit}" if digits else f"{number}{self.unit}"


def _check_unit(unit: str, number: str, written: str) -> None:
    if unit not in UNITS:
        guess = next((u for u in UNITS if str(unit).lower().startswith(u)), "")
        hint = f" Did you mean {number}{guess}?" if guess else near_match(str(unit), UNITS)
        raise ScheduleError(f"{unit!r} in {written!r} is no unit. Units are step, ep and %.{hint}")


def _with_units(number: Fraction) -> list[Time]:
    """List what a number without a unit can mean: no step is a part of one, and 0.5 as a share is 50%."""
    share = number if number >= 1 or number.denominator == 1 else number * 100
    steps = [Time(number)] if number.denominator == 1 else []
    return [*steps, Time(number, "ep"), *([Time(share, "%")] if share <= 100 else [])]
