"""Every error that hf_unfreeze raises on purpose.

    UnfreezeError (ValueError)
    ├── ScheduleError      a schedule, selector or time that cannot be read, or does not fit the model or the run
    ├── StructureError     a model whose layer groups cannot be told, or an architecture row that does not fit
    ├── OptimizerError     an optimizer that cannot train what the schedule opens
    └── EnvironmentRefused a wrapper or launcher under which freezing would go wrong

Each message says what was given, what is allowed, and what to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "EnvironmentRefused",
    "OptimizerError",
    "ScheduleError",
    "StructureError",
    "UnfreezeError",
    "near_match",
]


class UnfreezeError(ValueError):
    """Base of every error raised on purpose by hf_unfreeze."""


class ScheduleError(UnfreezeError):
    """A schedule, selector or time that cannot be read, or that does not fit the model or the run."""


class StructureError(UnfreezeError):
    """A model whose layer groups cannot be told, or an architecture row that does not fit it."""


class OptimizerError(UnfreezeError):
    """An optimizer that cannot train what the schedule opens."""


class EnvironmentRefused(UnfreezeError):
    """A wrapper or launcher under which freezing would go wrong."""


def near_match(given: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest allowed word, or an empty string.

    Example:
        >>> near_match("gradul", ["gradual", "all_at_once"])
        " Did you mean 'gradual'?"
    """
    matches = difflib.get_close_matches(given, list(allowed), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
