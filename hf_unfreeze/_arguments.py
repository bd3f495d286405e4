"""Arguments of named schedules: read from text, checked against the table, written back. Needs no torch."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from ._named import NAMED, Value
from ._time import Time
from .errors import ScheduleError, near_match

__all__ = ["check_arguments", "from_python", "read_arguments", "write_arguments"]

Arguments = tuple[tuple[str, Value], ...]
_EXAMPLES = {  # of arguments whose default shows no use of them
    "criterion": "relative_gradient_norm",
    "metric": "eval_loss",
    "at_least": "1ep",
    "at_most": "3ep",
    "encoder_until": "40%",
}
_WORD = re.compile(r"[^\s,=()]+")


def read_arguments(name: str, text: str | None) -> Arguments:
    """Read what stands between the brackets of a named schedule; raise ScheduleError with what is allowed."""
    if name not in NAMED:
        selectors = ("head", "embeddings", "block", "all")
        hint = f" To open it at a time, write {name}@0 or {name}@1ep." if name in selectors else near_match(name, NAMED)
        raise ScheduleError(f"{name!r} is no named schedule. There are {', '.join(NAMED)}.{hint}")
    row = NAMED[name]
    given: dict[str, Any] = {}
    for number, part in enumerate(text.split(",") if text and text.strip() else ()):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if number == 0 and row.positional and not equals:
            key, equals, value = row.positional, "=", key
        if key not in row.arguments or not equals:
            hint = _only_time(name, key) if not equals else ""
            raise ScheduleError(
                f"{part.strip()!r} is no argument of {name}. It takes {_listed(name)}."
                + (hint or near_match(key, row.arguments))
            )
        if key in given:
            raise ScheduleError(f"{name} is given {key} twice. Write it once.")
        given[key] = _read(name, key, value)
    return check_arguments(name, given)


def from_python(name: str, given: dict[str, Any]) -> Arguments:
    """Return every argument of a named schedule called as a function: times may be text, and numbers whole."""
    return check_arguments(name, {key: _converted(name, key, value) for key, value in given.items()})


def _converted(name: str, key: str, value: Any) -> Any:
    kind = NAMED[name].kind(key)
    if kind is Time and isinstance(value, str):
        return _time(name, key, value)
    if kind is not float or isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value  # which check_arguments refuses


def _time(name: str, key: str, text: str) -> Time:
    try:
        return Time.parse(text)
    except ScheduleError as error:
        raise ScheduleError(f"{name}: {key}={text} is of no use. {error}") from None


def _only_time(name: str, text: str) -> str:
    """Suggest the one argument that is a time for a time without a name."""
    keys = [key for key in NAMED[name].arguments if NAMED[name].kind(key) is Time]
    try:
        return f" Write {keys[0]}={Time.parse(text)}." if len(keys) == 1 else ""
    except ScheduleError:
        return ""


def _listed(name: str) -> str:
    return ", ".join(f"{key}={_example(name, key)}" for key in NAMED[name].arguments) or "no arguments"


def _example(name: str, key: str) -> str:
    """Write a value that an argument can have: its default, or another where that tells nothing."""
    return _EXAMPLES.get(key) or _text(NAMED[name].arguments[key])


def _read(name: str, key: str, text: str) -> Value:
    kind, default = NAMED[name].kind(key), NAMED[name].arguments[key]
    if kind is Time:
        return _time(name, key, text)
    if kind is bool:
        if text not in ("true", "false"):
            raise ScheduleError(f"{key}={text}: write {key}=true or {key}=false.")
        return text == "true"
    if kind is str:
        return text
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise ScheduleError(f"{key}={text}: write a number, for instance {key}={default or 0.01}.") from None
    if not (text.isascii() and text.isdecimal() and len(text) < 1000):
        raise ScheduleError(f"{key}={text}: write a whole number, for instance {key}={default}.")
    return int(text)


def check_arguments(name: str, given: dict[str, Any]) -> Arguments:
    """Return every argument of a named schedule with its value; raise ScheduleError for one of no use."""
    row = NAMED[name]
    arguments = {**row.arguments, **given}
    for key, value in arguments.items():
        default, choices, example = row.arguments[key], row.choices.get(key), f"{key}={_example(name, key)}"
        if not value and key in row.required:
            raise ScheduleError(f"{name} needs a {key}, which has no default. Write {name}({_EXAMPLES[key]}).")
        if not (type(value) is row.kind(key) or value is default is None):
            raise ScheduleError(f"{name}: {key}={value!r} is of no use. Write for instance {example}.")
        if choices and value not in choices:
            raise ScheduleError(
                f"{name}: {key}={value} is none of {', '.join(choices)}.{near_match(str(value), choices)}"
            )
        if isinstance(value, str) and value != default and not _WORD.fullmatch(value):
            raise ScheduleError(f"{name}: {key}={value!r} is no word. Write it without spaces, commas and brackets.")
        if isinstance(value, float) and not 0 <= value < math.inf:
            raise ScheduleError(f"{name}: {key}={value} is no number from 0 up. Write for instance {key}=0.01.")
        if value in (0, Time(Fraction(0))) and not isinstance(value, bool) and key not in row.zero:
            raise ScheduleError(f"{name}: {key} must be more than 0. Write for instance {example}.")
        if isinstance(value, (int, float)) and value > row.most.get(key, value):
            raise ScheduleError(f"{name}: {key}={value} lies above {row.most[key]}. Write {key}={_text(default)}.")
    return tuple(arguments.items())


def write_arguments(name: str, arguments: Arguments) -> str:
    """Write arguments so that ``read_arguments`` gives equal ones; those of a terse row only where they matter."""
    row = NAMED[name]
    parts = []
    for key, value in arguments:
        if value == row.arguments[key] and key in row.terse:
            continue
        parts.append(_text(value) if key == row.positional else f"{key}={_text(value)}")
    return ", ".join(parts)


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
