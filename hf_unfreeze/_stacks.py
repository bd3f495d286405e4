"""What a run with and without the frozen prefix has shown of a stack, and what it takes to compare the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ._activations import Activations, Forward, blank
from ._exact import gradient_source
from ._keys import Batch
from ._prefix import Prefix, Run

__all__ = ["SPLIT", "Called", "Stack", "Trust", "Watched", "problem_of", "replay_of", "ways"]

PATIENCE = 3  # forwards that do not come by a stack before its check is given up
SPLIT = "the blocks hand on more than one tensor, and not all of them are frozen"


class Called(NamedTuple):
    """A way to call the outermost module of a forward: what a check shows of one need not hold for another."""

    name: str  # of the module; empty for the root
    training: bool
    graph: bool  # whether gradients are recorded
    given: frozenset[str | int]  # names of the arguments, and the number of those without
    flags: frozenset[tuple[str, bool | str]]

    @classmethod
    def of(cls, name: str, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called:
        """Return that of a call."""
        given: list[str | int] = [len(args), *(name for name, value in kwargs.items() if value is not None)]
        flags = frozenset((name, value) for name, value in kwargs.items() if isinstance(value, (bool, str)))
        return cls(name, training, torch.is_grad_enabled(), frozenset(given), flags)


@dataclass
class Trust:
    """Up to which boundary the check held for one way of calling."""

    boundary: int = 0
    ragged: bool | None = None  # whether padding may be left out of keys and rows; None: not seen yet
    missed: int = 0
    generates: bool = False  # the host returns keys and values of every block, which in eval mode somebody may want


class Stack:
    """A prefix, and how far it is frozen and trusted."""

    def __init__(self, prefix: Prefix, activations: Activations) -> None:
        self.prefix, self.activations = prefix, activations
        self.boundary = 0
        self.off = False
        self.fill: Callable[[Batch, Forward], None] | None = None  # what takes a batch in place of the host
        self.problem = ""
        self.trust: dict[Called, Trust] = {}

    def trusted(self, called: Called) -> Trust:
        """Return what is known of a way of calling."""
        return self.trust.setdefault(called, Trust())

    def due(self, called: Called, kwargs: dict[str, Any]) -> bool:
        """Whether a way of calling is still to be checked, up to the present boundary or with padding."""
        if not self.boundary:
            return False
        trust = self.trusted(called)
        if trust.missed >= PATIENCE:
            return False
        return trust.boundary < self.boundary or (trust.ragged is None and not called.name and _is_padded(kwargs))

    def accept(self, called: Called, calls: list[tuple[Batch, Run]], ragged: bool) -> None:
        """Trust a way of calling from now on, and keep what its check has computed."""
        trust = self.trusted(called)
        trust.boundary = max(self.boundary, trust.boundary)
        for batch, run in calls:
            if batch.padded:
                trust.ragged = ragged
                if not ragged:
                    batch = self.activations.read(batch.inputs, False)
            if run.start < self.boundary:
                self.activations.accept(self.boundary, batch, run.captured)


Watched = dict[Stack, list[tuple[Batch, Run]]]


def problem_of(stack: Stack, batch: Batch, run: Run, model: nn.Module) -> str:
    """Return why a stack cannot be cached, as a full run showed it, or an empty string."""
    below = [index for index in run.calls if index < stack.boundary]
    hidden = run.captured.get(stack.boundary)
    if run.problem:
        return run.problem
    if hidden is None or below != list(range(run.start, stack.boundary)):
        return "the blocks are not called once each, in order"
    if stack.prefix.splits(stack.boundary):
        return SPLIT
    if stack.prefix.batch_norm(stack.boundary):
        return "a batch norm in the frozen blocks uses the statistics of each batch"
    if hidden.dim() < 3 or hidden.shape[0] != batch.size:
        return "the frozen blocks do not return one activation for each example"
    if run.crowded:
        return "what the frozen blocks compute for an example depends on the others of its batch"
    return gradient_source(hidden, model)


def ways(watched: Watched) -> tuple[bool, ...]:
    """First without padding, where there is any along the tokens and it makes no difference; then with it."""
    if not watched:
        return ()
    padded = [(batch, run) for calls in watched.values() for batch, run in calls if batch.padded]
    fits = all(run.ragged and list(run.captured.values())[-1].shape[1] == batch.tokens for batch, run in padded)
    return (True, False) if padded and fits else (False,)


def replay_of(watched: Watched, ragged: bool) -> dict[Stack, Iterator[torch.Tensor]]:
    """Return the activations that the check saw, in the order of the calls, for a forward that passes over them."""
    replay = {}
    for stack, calls in watched.items():
        # copies: a block may write into its input, and the originals are stored later
        hidden = [(batch, run.captured[stack.boundary].detach().clone()) for batch, run in calls]
        replay[stack] = iter([blank(b, range(b.size), h) if ragged else h for b, h in hidden])
    return replay


def _is_padded(kwargs: dict[str, Any]) -> bool:
    """Tell whether a call has a mask that leaves out a token."""
    mask = kwargs.get("attention_mask")
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool((mask != 0).all())
