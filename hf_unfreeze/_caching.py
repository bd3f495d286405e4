"""Passing over the frozen prefix of one model: where that gives the same bits, and else not at all."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ._activations import UPSET, Activations, Forward, Stats
from ._ahead import Ahead, fill
from ._exact import buffers_kept, detached, has_loss, same_outputs, unfit
from ._keys import PAST, Batch, Unkeyed
from ._prefix import Reached, Run, find_prefixes
from ._shadow import Shadow, random_state, set_random_state
from ._stacks import SPLIT, Stack, Trust, Watched, is_padded, problem_of, replay_of, ways
from ._store import Store
from .schedule import Phase

__all__ = ["Caching"]

PATIENCE = 3  # forwards that do not come by a stack before its check is given up


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
        self._stacks = [Stack(prefix, Activations(prefix, store, stats, dtype, prefix_dtype)) for prefix in prefixes]
        if not self._stacks:
            self._say(reason or "the model has no stack of blocks, each one module, with embeddings below")
        self._stats = stats
        self._outer: str | None = None  # name of the outermost module of the present forward; the root has none
        self._watched: Watched | None = None
        self._replay: dict[Stack, Iterator[torch.Tensor]] = {}
        self._fresh = False
        self._training: bool | None = None  # mode of the last forward
        self._trainable: set[int] = set()
        self.ahead: Ahead | None = None  # what is computed before it comes by, once it turns out to spare padding
        self._shadows: list[Shadow] = []
        for index, stack in enumerate(self._stacks):
            self._shadows += stack.prefix.shadows(functools.partial(self._at_host, f"host{index}", stack))
        if self._stacks and all(stack.prefix.host is not model for stack in self._stacks):
            self._shadows.append(Shadow(model, functools.partial(self._outermost, "")))

    def update(self) -> None:
        """Move the boundaries to where the flags are now."""
        phases = self._upcoming()
        for stack in self._stacks:
            before, stack.boundary = stack.boundary, 0 if stack.off else stack.prefix.frozen_blocks()
            if stack.boundary != before:  # what holds at one boundary may not at another: a block that opens reads more
                stack.trust.clear()
            if stack.prefix.splits(stack.boundary):
                self._switch_off(stack, SPLIT)
            later = {stack.prefix.boundary_in(phase.trainable) for phase in phases}
            stack.activations.wanted |= (later | {stack.boundary}) - {0}
            stack.activations.fingerprints.forget_trained()
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

    def _at_host(self, name: str, stack: Stack, original: Forward, args: tuple[Any, ...], kwargs: Any) -> Any:
        return self._outermost(name, functools.partial(self._through, stack, original), args, kwargs)

    def _outermost(self, name: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the outermost module of a forward, after a check where one is due."""
        if self._outer is not None or not any(stack.boundary for stack in self._stacks):
            return forward(*args, **kwargs)
        self._outer = name
        if self._training is not self._model.training:
            self._training = self._model.training
            for stack in self._stacks:
                stack.activations.fingerprints.look_again()
        call = functools.partial(forward, *args, **kwargs)
        try:
            if self._due(name, kwargs):
                self._check(name, call)
            elif self._fresh and self._model.training:
                return self._first(call)
            elif self.ahead is not None and self._model.training and not args:
                self._fill(name, forward, kwargs)
            return call()
        finally:
            self._outer, self._watched, self._replay = None, None, {}

    def _due(self, name: str, kwargs: dict[str, Any]) -> bool:
        for stack in self._stacks:
            trust = stack.trust.setdefault(name, Trust())
            if not stack.boundary or trust.missed >= PATIENCE:
                continue
            if trust.up_to(self._model.training) < stack.boundary:
                return True
            if trust.ragged is None and not name and is_padded(kwargs):
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
            for ragged in ways(watched):
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
        self._replay = {} if reason else replay_of(watched, ragged)
        self._fresh = self._fresh and not self._model.training

    def _drop_unfit(self, name: str, watched: Watched) -> None:
        for stack in self._stacks:
            if stack.boundary and stack not in watched:
                stack.trust[name].missed += 1
        for stack, calls in list(watched.items()):
            reason = next(filter(None, (problem_of(stack, batch, run, self._model) for batch, run in calls)), "")
            if reason:
                self._switch_off(stack, reason)
                del watched[stack]

    def _difference(self, watched: Watched, ragged: bool, expected: Any, call: Forward) -> str:
        """Return why the output is another one when the frozen blocks are passed over, or an empty string."""
        self._replay = replay_of(watched, ragged)
        try:
            actual = call()
        except UPSET as error:
            return f"the model fails without what the frozen blocks compute ({type(error).__name__}: {error})"
        finally:
            self._replay = {}
        batch = next(iter(watched.values()))[0][0]
        if same_outputs(expected, actual, batch if has_loss(expected) else None):
            return ""
        return "something besides the blocks above them reads what the frozen blocks compute"

    def _accept(self, stack: Stack, trust: Trust, calls: list[tuple[Batch, Run]], ragged: bool) -> None:
        training = self._model.training
        trust.boundary[training] = max(stack.boundary, trust.boundary[training])
        for batch, run in calls:
            if batch.padded:
                trust.ragged = ragged
                if not ragged:
                    batch = stack.activations.read(batch.inputs, False)
            if run.start < stack.boundary:
                stack.activations.accept(stack.boundary, batch, run.captured)

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

    def _fill(self, name: str, forward: Forward, kwargs: dict[str, Any]) -> None:
        """Compute the examples to come, once padding has been seen and found to make no difference."""
        active = [stack for stack in self._stacks if stack.boundary]
        ragged = [stack.trust[name].ragged for stack in active]
        if ragged == [None]:
            return
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ragged == [True]:
            fill(active[0], ahead, self._upcoming(), self._model, forward, kwargs)

    def _through(self, stack: Stack, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run a host from the stored activations, or as it is."""
        if not stack.boundary or self._outer is None:
            return original(*args, **kwargs)
        activations, boundary = stack.activations, stack.boundary
        if stack in self._replay:
            return activations.run(Run(boundary, next(self._replay[stack])), original, *args, **kwargs)
        trust = stack.trust.setdefault(self._outer, Trust())
        trusted = min(trust.up_to(self._model.training), boundary)
        unknown = self._watched is not None and trust.ragged is None and not self._outer
        began, computing = time.perf_counter(), self._stats.seconds
        batch = self._read(stack, args, kwargs, bool(trust.ragged) or unknown)
        if stack.fill is not None:
            if batch is not None:
                stack.fill(batch, original)
            raise Reached
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
        if self._watched is not None:
            activations.check_alone(boundary, batch, run, original)
        stack.problem = run.problem
        return output

    def _read(self, stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any], ragged: bool) -> Batch | None:
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

    def _switch_off(self, stack: Stack, reason: str) -> None:
        stack.off, stack.boundary = True, 0
        self._say(f"{reason}; it is off" + (f" for {stack.prefix.stack}" if stack.prefix.stack else ""))

    def _say(self, reason: str) -> None:
        if reason not in self.off:
            self.off = f"{self.off}; {reason}" if self.off else reason
            warnings.warn(f"frozen-prefix cache: {reason}", UserWarning, stacklevel=2)
