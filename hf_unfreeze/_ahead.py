"""Filling the cache before the examples come by, where batches of the run would put padding through frozen blocks.

A batch is padded to its longest example. Here a thousand examples at a time are sorted by length, so that parts of
almost equal length go through the frozen blocks, as many examples at a time as the run itself gives the model.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader, IterableDataset

from ._prefix import Reached
from ._shadow import random_state, set_random_state
from ._stacks import Stack
from .schedule import Phase

__all__ = ["Ahead", "fill", "holds_all"]

WINDOW = 1024  # examples that are collated, and sorted, at a time
AS_IN_THE_RUN = ("collate_fn", "num_workers", "worker_init_fn", "multiprocessing_context")
PROBED = 4  # examples that are fetched twice, to see whether they come out alike


@dataclass
class Ahead:
    """The training data of a run, to be gone through once more than its epochs do.

    Args:
        loader: What the run reads.
        prepare: Puts what comes out of it where the model is.
        at_a_time: Examples that the model is given at a time.
        until: Step before which all of them will have come by.
        show_progress: Whether a bar says how far it is.
    """

    loader: Any
    prepare: Callable[[Any], Mapping[str, Any]]
    at_a_time: int
    until: int
    show_progress: bool

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.loader.dataset)

    def batches(self) -> Iterator[Mapping[str, Any]]:
        """Yield the inputs of a thousand examples at a time; nothing where they come out anew each time."""
        from tqdm.auto import tqdm

        data = self.loader.dataset
        alike = {name: getattr(self.loader, name) for name in AS_IN_THE_RUN}
        if _holds_generator((data, alike["collate_fn"])):  # which a fetch more would move on
            return
        few = range(min(PROBED, len(data)))
        once, again = (alike["collate_fn"]([data[index] for index in few]) for _ in range(2))
        if _alike(once, again):
            sampler = self.loader.batch_sampler  # a collator may ask for whole batches
            size = getattr(sampler, "batch_size", None) or 1
            whole = bool(getattr(sampler, "drop_last", False))
            windows = DataLoader(data, batch_size=max(WINDOW // size, 1) * size, drop_last=whole, **alike)
            shown = tqdm(windows, "frozen-prefix cache", leave=False, disable=not self.show_progress)
            yield from map(self.prepare, shown)


def holds_all(loader: Any, batch_size: int) -> bool:
    """Whether an epoch of a loader is all of a data set that can be read by index."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    data: Any = loader.dataset  # + 1: an incomplete last batch may be dropped
    return hasattr(data, "__len__") and (len(loader) + 1) * batch_size > len(data)


def fill(
    stack: Stack,
    ahead: Ahead,
    phases: Sequence[Phase],
    model: nn.Module,
    forward: Callable[..., Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Compute the examples to come up to the lowest boundary under which they will all come by.

    Args:
        stack: What to fill; its host is run by ``forward``.
        ahead: The examples.
        phases: The present and the later ones.
        model: Runs the host, and nothing else with weights before it.
        forward: The model's.
        kwargs: What the run has just called it with.
    """
    soon = [stack.prefix.boundary_in(phase.trainable) for phase in phases if phase.start < ahead.until]
    boundary, activations = min([stack.boundary, *soon]), stack.activations
    if not boundary:
        return
    state, done = random_state(stack.prefix.device), 0
    room, before = activations.store.max_bytes - activations.store.nbytes, activations.written
    options = {name: value for name, value in kwargs.items() if not _is_batch(value)}
    host = {*stack.prefix.host.modules()}
    allowed = host | {module for module in model.modules() if stack.prefix.host in module.modules()}
    stack.fill = functools.partial(activations.fill, boundary, ahead.at_a_time)
    try:
        for inputs in ahead.batches():
            given = {name: value for name, value in inputs.items() if name in kwargs and _is_batch(value)}
            if not given or given.keys() | options.keys() != kwargs.keys():
                break  # the run makes its inputs from these in a way of its own
            try:
                with torch.no_grad(), _nothing_before(allowed):
                    forward(**options, **given)
            except Reached:
                pass
            except _Elsewhere:
                break  # it would get a thousand examples at once, and may keep statistics of them
            done += len(next(iter(given.values())))
            if not 0 < (activations.written - before) / done * ahead.examples <= room:
                break  # all are there already, or have no room: the first would be out before they come by
    finally:
        stack.fill = None
        set_random_state(state, stack.prefix.device)


class _Elsewhere(Exception):
    """A module with weights was called before the host."""


@contextlib.contextmanager
def _nothing_before(allowed: Set[nn.Module]) -> Iterator[None]:
    def look(module: nn.Module, args: Any) -> None:
        if module not in allowed and (module._parameters or module._buffers):
            raise _Elsewhere

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _holds_generator(thing: Any, depth: int = 4) -> bool:
    """Whether an object has a random generator of its own, in itself or in what it wraps."""
    numpy = sys.modules.get("numpy")
    kinds = (torch.Generator, random.Random, *((numpy.random.Generator, numpy.random.RandomState) if numpy else ()))
    if isinstance(thing, kinds) or not depth:
        return isinstance(thing, kinds)
    inside = [*getattr(thing, "__dict__", {}).values()]
    if isinstance(thing, (tuple, list, set, dict)):  # the first of many rows of data are looked at
        inside += itertools.islice(thing.values() if isinstance(thing, dict) else thing, WINDOW)
    inside += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
    inside += [getattr(thing, "__self__", None), *getattr(thing, "args", ())] if callable(thing) else []
    return any(_holds_generator(part, depth - 1) for part in inside if not isinstance(part, torch.nn.Module))


def _is_batch(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _alike(one: Any, other: Any) -> bool:
    """Whether two collated batches hold the same values by name."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping) or one.keys() != other.keys():
        return False
    pairs = [(value, other[name]) for name, value in one.items()]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
