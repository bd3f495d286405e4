"""The batches that a loader has fetched and the model has not seen yet: accelerate's is one ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ._keys import IGNORED

__all__ = ["Coming"]


class Coming:
    """Tells what the model will be given next, and moves nothing: no batch is fetched earlier for it.

    Args:
        base: The loader whose batches are looked at; its ``__iter__`` is called by name.
        prepare: Puts what comes out of it where the model is.
        at_once: Batches that are fetched before the model is given the first of them.
    """

    def __init__(self, base: Any, prepare: Callable[[Any], Mapping[str, Any]], at_once: int) -> None:
        self._base, self._prepare = base, prepare
        self._fetched: deque[Any] = deque(maxlen=at_once + 1)  # no more: nobody may come for them
        self._given: Mapping[str, Any] = {}
        vars(base)["__iter__"] = self._batches

    def _batches(self) -> Iterator[Any]:
        self._fetched.clear()
        for batch in type(self._base).__iter__(self._base):
            self._fetched.append(batch)
            yield batch

    def begin(self, given: Mapping[str, Any]) -> None:
        """Go on to the next batch, of which the model is given this by name."""
        self._given = given
        if self._fetched:
            self._fetched.popleft()

    def like(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what these inputs will be next time, where they are what the model is given, or do not differ."""
        if not self._fetched:
            return None
        following, names = self._fetched[0], {id(value): name for name, value in self._given.items()}
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        sources = {name: names.get(id(value)) for name, value in tensors.items() if name not in IGNORED}
        if not isinstance(following, Mapping) or not set(sources.values()) <= following.keys():
            return None
        following = self._prepare(following)
        return {**inputs, **{name: following[str(source)] for name, source in sources.items()}}

    def close(self) -> None:
        """Look at the loader no more."""
        vars(self._base).pop("__iter__", None)
        self._fetched.clear()
        self._given = {}
