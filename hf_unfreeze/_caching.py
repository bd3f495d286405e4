"""Passing over the frozen prefix of one model: where that gives the same bits, and else not at all."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ._activations import Activations, Forward, Stats, blank
from ._exact import buffers_kept, detached, gradient_source, same_outputs, unfit
from ._keys import PAST, Batch, Unkeyed
from ._prefix import Prefix, Run, find_prefixes
from ._shadow import Shadow, random_state, set_random_state
from ._store import Store
from .schedule import Phase

__all__ = ["Caching"]

PATIENCE = 3  # forwards that do not come by a stack before its check is given up
SPLIT = "the blocks hand on more than one tensor, and not all of them are frozen"
UPSET = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)


@dataclass
class _Trust:
    """Up to which boundary the check held under one outermost module, in train and in eval mode."""

    boundary: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    ragged: bool | None = None  # whether padding may be left out of keys and rows; None: not seen yet
    missed: int = 0
    generates: bool = False  # returns keys and values of every block, which in eval mode somebody may want

    def up_to(self, training: bool) -> int:
        return self.boundary[True] if training else max(self.boundary.values())


class _Stack:
    """A prefix, and how far it is frozen and trusted."""

    def __init__(self, prefix: Prefix, activations: Activations) -> None:
        self.prefix, self.activations = prefix, activations
        self.boundary = 0
        self.off = False
        self.problem = ""
        self.trust: dict[str, _Trust] = {}


Watched = dict[_Stack, list[tuple[Batch, Run]]]


class Caching:
    """A follower that passes over what is frozen; ``off`` says why not, where it has switched itself off."""

    def __init__(
        self,
        store: Store,
        stats: Stats,
        dtype: torch.dtype | None,
        model: nn.Module,
        upcoming: Callable[[], Sequence[Phase]],
        prefix_dtype: str | None,
    ) -> None:
        self.off = ""
        self._model, self._upcoming = model, upcoming
        reason = unfit(model)
        prefixes = [] if reason else find_prefixes(model)
        self._stacks = [_Stack(prefix, Activations(prefix, store, stats, dtype, prefix_dtype)) for prefix in prefixes]
        if not self._stacks:
            self._say(reason or "the model has no stack of blocks, each one module, with embeddings below")
        self._stats = stats
        self._outer: str | None = None  # name of the outermost module of the present forward; the root has none
        self._watched: Watched | None = None
        self._replay: dict[_Stack, Iterator[torch.Tensor]] = {}
        self._fresh = False
        self._trainable: set[int] = set()
        self._shadows: list[Shadow] = []
        for index, stack in enumerate(self._stacks):
            self._shadows += stack.prefix.shadows(functools.partial(self._at_host, f"host{index}", stack))
        if self._stacks and all(stack.prefix.host is not model for stack in self._stacks):
            self._shadows.append(Shadow(model, functools.partial(self._outermost, "")))

    def update(self) -> None:
        """Move the boundaries to where the flags are now."""
        phases = self._upcoming()
        for stack in self._stacks:
            stack.boundary = 0 if stack.off else stack.prefix.frozen_blocks()
            if stack.prefix.splits(stack.boundary):
                self._switch_off(stack, SPLIT)
            later = {stack.prefix.boundary_in(phase.trainable) for phase in phases}
            stack.activations.wanted |= (later | {stack.boundary}) - {0}
            stack.activations.forget_trained()
        if self._stacks and not any(stack.activations.wanted for stack in self._stacks):
            self._say("the schedule never leaves the embeddings and the lowest block frozen")
        inside = {id(p) for stack in self._stacks for block in stack.prefix.blocks for p in block.parameters()}
        around = [p for stack in self._stacks for p in stack.prefix.host.parameters()]
        trainable = {id(p) for p in around if p.requires_grad} - inside
        if not trainable <= self._trainable:  # a gradient may come from elsewhere now: check again
            for stack in self._stacks:
                stack.trust.clear()
        self._trainable |= trainable
        self._fresh = True

    def close(self) -> None:
        """Give every module its own forward back."""
        while self._shadows:
            self._shadows.pop().close()
        self._stacks.clear()

    def _at_host(self, name: str, stack: _Stack, original: Forward, args: tuple[Any, ...], kwargs: Any) -> Any:
        return self._outermost(name, functools.partial(self._through, stack, original), args, kwargs)

    def _outermost(self, name: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the outermost module of a forward, after a check where one is due."""
        if self._outer is not None or not any(stack.boundary for stack in self._stacks):
            return forward(*args, **kwargs)
        self._outer = name
        call = functools.partial(forward, *args, **kwargs)
        try:
            if self._due(name, kwargs):
                self._check(name, call)
            elif self._fresh and self._model.training:
                return self._first(call)
            return call()
        finally:
            self._outer, self._watched, self._replay = None, None, {}

    def _due(self, name: str, kwargs: dict[str, Any]) -> bool:
        for stack in self._stacks:
            trust = stack.trust.setdefault(name, _Trust())
            if not stack.boundary or trust.missed >= PATIENCE:
                continue
            if trust.up_to(self._model.training) < stack.boundary:
                return True
            if trust.ragged is None and not name and _padded(kwargs):
                return True
        return False

    def _check(self, name: str, call: Forward) -> None:
        """Run with and without; the forward that follows finds the activations of this batch at hand."""
        device = self._stacks[0].prefix.device
        state = random_state(device)
        with buffers_kept(self._model):
            watched: Watched = {}
            self._watched = watched
            output = call()
            generates = isinstance(output, Mapping) and any(output[name] is not None for name in PAST & {*output})
            expected = detached(output)
            del output
            self._watched = None
            self._drop_unfit(name, watched)
            reason, ragged = "", False
            for ragged in _ways(watched):
                set_random_state(state, device)
                reason = self._difference(watched, ragged, expected, call)
                if not reason:
                    break
        set_random_state(state, device)
        for stack, calls in watched.items():
            stack.trust[name].generates = generates
            if reason:
                self._switch_off(stack, reason)
            else:
                self._accept(stack, stack.trust[name], calls, ragged)
        self._replay = {} if reason else _replay(watched, ragged)
        self._fresh = self._fresh and not self._model.training

    def _drop_unfit(self, name: str, watched: Watched) -> None:
        for stack in self._stacks:
            if stack.boundary and stack not in watched:
                stack.trust[name].missed += 1
        for stack, calls in list(watched.items()):
            reason = next(filter(None, (_problem(stack, batch, run, self._model) for batch, run in calls)), "")
            if reason:
                self._switch_off(stack, reason)
                del watched[stack]

    def _difference(self, watched: Watched, ragged: bool, expected: Any, call: Forward) -> str:
        """Return why the output is another one when the frozen blocks are passed over, or an empty string."""
        self._replay = _replay(watched, ragged)
        try:
            actual = call()
        except UPSET as error:
            return f"the model fails without what the frozen blocks compute ({type(error).__name__}: {error})"
        finally:
            self._replay = {}
        if same_outputs(expected, actual, next(iter(watched.values()))[0][0]):
            return ""
        return "something besides the blocks above them reads what the frozen blocks compute"

    def _accept(self, stack: _Stack, trust: _Trust, calls: list[tuple[Batch, Run]], ragged: bool) -> None:
        training = self._model.training
        trust.boundary[training] = max(stack.boundary, trust.boundary[training])
        for batch, run in calls:
            if batch.padded:
                trust.ragged = ragged
                if not ragged:
                    batch = stack.activations.read(batch.inputs, False)
            if run.start < stack.boundary:
                self._stats.misses += batch.size
                stack.activations.keep(batch, range(batch.size), run.captured)

    def _first(self, call: Forward) -> Any:
        """Run the first forward of a phase: code between the blocks may draw random numbers in its new modes."""
        device = self._stacks[0].prefix.device
        state = random_state(device)
        output = call()
        self._fresh = False
        failed = [stack for stack in self._stacks if stack.problem]
        if not failed:
            return output
        for stack in failed:
            self._switch_off(stack, stack.problem)
        set_random_state(state, device)
        return call()

    def _through(self, stack: _Stack, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run a host from the stored activations, or as it is."""
        if not stack.boundary or self._outer is None:
            return original(*args, **kwargs)
        activations, boundary = stack.activations, stack.boundary
        if stack in self._replay:
            return activations.run(Run(boundary, next(self._replay[stack])), original, *args, **kwargs)
        trust = stack.trust.setdefault(self._outer, _Trust())
        trusted = min(trust.up_to(self._model.training), boundary)
        unknown = self._watched is not None and trust.ragged is None and not self._outer
        began, computing = time.perf_counter(), self._stats.seconds
        batch = self._read(stack, args, kwargs, bool(trust.ragged) or unknown)
        if batch is None or (self._watched is None and trusted < boundary):
            return original(*args, **kwargs)
        start = 0 if unknown and batch.padded else trusted
        run = Run(start, activations.at(start, batch, original) if start else None)
        self._stats.looking += time.perf_counter() - began - (self._stats.seconds - computing)
        if self._watched is not None or self._fresh:
            run.watched, run.state = boundary, random_state(stack.prefix.device)
        if self._watched is not None:
            run.capture = activations.between(start, boundary)
            self._watched.setdefault(stack, []).append((batch, run))
            if run.activation is not None and start == boundary:
                run.captured[start] = run.activation
        output = activations.run(run, original, *args, **kwargs)
        stack.problem = run.problem
        return output

    def _read(self, stack: _Stack, args: tuple[Any, ...], kwargs: dict[str, Any], ragged: bool) -> Batch | None:
        """Return the batch with its keys, or None for a forward that has to run as it is."""
        names = stack.prefix.positional
        config = getattr(stack.prefix.host, "config", None)
        generates = stack.trust[self._outer or ""].generates or kwargs.get("use_cache")
        if len(args) > len(names) or (generates and not self._model.training):
            return None
        inputs = dict(zip(names, args, strict=False)) | kwargs
        for flag in ("output_hidden_states", "output_attentions"):
            if inputs.get(flag) is None and getattr(config, flag, False):
                inputs[flag] = True
        try:
            return stack.activations.read(inputs, ragged)
        except Unkeyed as reason:
            if str(reason):
                self._say(f"{reason}; such a forward runs in full")
            return None

    def _switch_off(self, stack: _Stack, reason: str) -> None:
        stack.off, stack.boundary = True, 0
        self._say(f"{reason}; it is off" + (f" for {stack.prefix.stack}" if stack.prefix.stack else ""))

    def _say(self, reason: str) -> None:
        if reason not in self.off:
            self.off = f"{self.off}; {reason}" if self.off else reason
            warnings.warn(f"frozen-prefix cache: {reason}", UserWarning, stacklevel=2)


def _problem(stack: _Stack, batch: Batch, run: Run, model: nn.Module) -> str:
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
    return gradient_source(hidden, model)


def _ways(watched: Watched) -> tuple[bool, ...]:
    """First without padding, where there is any along the tokens; then with it."""
    if not watched:
        return ()
    padded = [(batch, run) for calls in watched.values() for batch, run in calls if batch.padded]
    fits = all(list(run.captured.values())[-1].shape[1] == batch.tokens for batch, run in padded)
    return (True, False) if padded and fits else (False,)


def _replay(watched: Watched, ragged: bool) -> dict[_Stack, Iterator[torch.Tensor]]:
    replay = {}
    for stack, calls in watched.items():
        hidden = [(batch, run.captured[stack.boundary].detach()) for batch, run in calls]
        replay[stack] = iter([blank(b, range(b.size), h) if ragged else h for b, h in hidden])
    return replay


def _padded(kwargs: dict[str, Any]) -> bool:
    mask = kwargs.get("attention_mask")
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool((mask != 0).all())
