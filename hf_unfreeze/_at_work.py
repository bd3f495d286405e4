"""Which Unfreezer is at work on a model: two would undo each other."""

from __future__ import annotations

import warnings
from typing import Protocol
from weakref import WeakKeyDictionary, ref

from torch import nn

__all__ = ["claim", "release", "take_over"]


class Closes(Protocol):
    """What puts a model back as it was."""

    def close(self) -> None:
        """Do so."""


_AT_WORK: WeakKeyDictionary[nn.Module, ref[Closes]] = WeakKeyDictionary()  # by the model without wrappers


def take_over(model: nn.Module) -> None:
    """Close the Unfreezer that is still at work on a model: two would undo each other, and a notebook loses one easily.

    It cannot go on unseen: its next ``step()`` says that it is closed.
    """
    known = _AT_WORK.pop(model, None)
    earlier = known() if known is not None else None
    if earlier is not None:
        earlier.close()
        warnings.warn(
            "an earlier Unfreezer was still at work on this model, and is closed now. "
            "Write unfreezer.close() at the end of each run.",
            UserWarning,
            stacklevel=3,
        )


def claim(model: nn.Module, unfreezer: Closes) -> None:
    """Note who is at work on a model."""
    _AT_WORK[model] = ref(unfreezer)


def release(model: nn.Module, unfreezer: Closes) -> None:
    """Note that it is at work no more."""
    if model in _AT_WORK and _AT_WORK[model]() is unfreezer:
        del _AT_WORK[model]
