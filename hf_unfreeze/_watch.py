"""Notices that a method of one object raised, where no event tells of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

__all__ = ["watch"]


def watch(
    owner: Any, name: str, on_error: Callable[[], None], over: Callable[[], bool] = lambda: False
) -> Callable[[], None]:
    """Call ``on_error`` when this method of this instance raises, whatever it raises; nothing is caught.

    Args:
        owner: The instance.
        name: The method.
        on_error: What to call.
        over: Says after the method whether to call it although nothing was raised.

    Returns:
        A function that ends the watch: the instance is as it was before.
    """
    method = getattr(owner, name)

    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.callback(on_error)
            result = method(*args, **kwargs)
            if not over():
                stack.pop_all()
        return result

    previous = vars(owner).get(name)
    setattr(owner, name, watched)
    if previous is None:
        return functools.partial(delattr, owner, name)
    return functools.partial(setattr, owner, name, previous)
