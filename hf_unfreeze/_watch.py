"""Notices that a method of one object raised, where no event tells of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

__all__ = ["watch"]


def watch(owner: Any, name: str, on_error: Callable[[], None]) -> Callable[[], None]:
    """Call ``on_error`` when this method of this instance raises, whatever it raises; nothing is caught.

    Returns:
        A function that ends the watch: the instance is as it was before.
    """
    method = getattr(owner, name)

    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.callback(on_error)
            result = method(*args, **kwargs)
            stack.pop_all()
        return result

    previous = vars(owner).get(name)
    setattr(owner, name, watched)
    if previous is None:
        return functools.partial(delattr, owner, name)
    return functools.partial(setattr, owner, name, previous)
