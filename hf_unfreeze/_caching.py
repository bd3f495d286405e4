"""Passing over the frozen prefix of one model: where that gives the same bits, and else not at all."""

from __future__ import annotations

import functools
import itertools
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ._activations import UPSET, Activations, Forward, Stats
from ._ahead import Ahead, fill
from ._coming import Coming
from ._exact import Attributes, Buffers, detached, has_loss, same_outputs, unfit
from ._keys import ASKS_FOR_MORE, PAST, Batch, Unkeyed, is_cache, pasts_of
from ._prefix import Reached, Run
from ._prefixes import find_prefixes
from ._shadow import Shadow, random_state, set_random_state
from ._stacks import SPLIT, Called, Stack, Trust, Watched, problem_of, replay_of, ways
from ._store import Store
from .errors import UnfreezeError
from .schedule import Phase

__all__ = ["Caching"]

WAYS = 32  # of calling a model that are checked at a boundary


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
        self.only_loss_counts = False  # whether nothing else reads what a model returns beside its own loss
        self._inside = False  # of an outermost module
        self._called: Called | None = None  # how the present forward was called; None: it runs in full
        self._watched: Watched | None = None
        self._replay: dict[Stack, Iterator[torch.Tensor]] = {}
        self._partial: weakref.WeakSet[Any] = weakref.WeakSet()  # keys and values without those of the frozen blocks
        self._fresh = False
        self._training: bool | None = None  # mode of the last forward
        self._trainable: set[int] = set()
        self.ahead: Ahead | None = None  # what is computed before it comes by, once it turns out to spare padding
        self.coming: Coming | None = None  # batches that a slow store may begin to fetch
        self._shadows: list[Shadow] = []
        for index, stack in enumerate(self._stacks):
            self._shadows += stack.prefix.shadows(functools.partial(self._at_host, f"host{index}", stack))
        if self._stacks and all(stack.prefix.host is not model for stack in self._stacks):
            self._shadows.append(Shadow(model, functools.partial(self._outermost, "", model)))

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
        if self.coming is not None:
            self.coming.close()
        while self._shadows:
            self._shadows.pop().close()
        self._stacks.clear()

    def _at_host(self, name: str, stack: Stack, original: Forward, args: tuple[Any, ...], kwargs: Any) -> Any:
        host = stack.prefix.host
        through = functools.partial(self._through, stack, original)
        return self._outermost("" if host is self._model else name, host, through, args, kwargs)

    def _outermost(
        self, name: str, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the outermost module of a forward, after a check where one is due."""
        if self.coming is not None and self._model.training and not self._inside:
            self.coming.begin(kwargs)
        if self._inside or not any(stack.boundary for stack in self._stacks):
            return forward(*args, **kwargs)
        self._inside = True
        call = functools.partial(forward, *args, **kwargs)
        try:
            self._look_around()
            if self._in_full(module, kwargs):
                return call()
            self._called = called = Called.of(name, self._model.training, args, kwargs)
            if self._due(called, kwargs):
                return self._check(called, call)
            if self._fresh and self._model.training:
                return self._first(call)
            if self.ahead is not None and self._model.training and not args:
                self._fill(called, forward, kwargs)
            return call()
        finally:
            self._inside, self._called, self._watched, self._replay = False, None, None, {}

    def _look_around(self) -> None:
        """See what may have changed since the last forward without a trace."""
        changed = self._training is not self._model.training
        self._training = self._model.training
        for stack in self._stacks:
            if changed or stack.activations.fingerprints.outdated():
                stack.activations.fingerprints.look_again()
            if stack.boundary and (hooked := stack.prefix.hooked(stack.boundary)):
                self._switch_off(stack, f"a forward hook on a frozen {hooked} would see what is passed over")

    def _in_full(self, module: nn.Module, kwargs: dict[str, Any]) -> bool:
        """Whether a forward asks for what passing over frozen blocks would not compute."""
        config = getattr(module, "config", None)
        for flag in ASKS_FOR_MORE:
            asked = kwargs.get(flag)
            if asked or (asked is None and getattr(config, flag, False)):
                self._say(f"{flag}=True asks for what the frozen blocks compute inside; such a forward runs in full")
                return True
        past = [kwargs[name] for name in PAST if kwargs.get(name) is not None]
        if any(each in self._partial for each in past if is_cache(each)):
            raise UnfreezeError(
                "past_key_values lack those of the frozen blocks, which the cache passed over. Write use_cache=True in "
                "the call that returned them, which then runs in full, or cache=None."
            )
        return bool(past or kwargs.get("use_cache")) or kwargs.get("adapter_names") is not None

    def _due(self, called: Called, kwargs: dict[str, Any]) -> bool:
        for stack in self._stacks:
            if stack.boundary and called not in stack.trust and len(stack.trust) >= WAYS:
                self._say(f"the model is called in more than {WAYS} ways; such a forward runs in full")
            elif stack.due(called, kwargs):
                return True
        return False

    def _check(self, called: Called, call: Forward) -> Any:
        """Run with and without, then for good: that forward finds the activations of this batch at hand."""
        device = self._stacks[0].prefix.device
        frozen = (stack for stack in self._stacks if stack.boundary)
        passed_over = {module for stack in frozen for module in stack.prefix.below(stack.boundary)}
        state, buffers = random_state(device), Buffers(self._model, passed_over)
        versions, attributes = [p._version for p in self._model.parameters()], Attributes(passed_over)
        watched: Watched = {}
        self._watched = watched
        output = call()
        self._watched = None
        written = versions != [p._version for p in self._model.parameters()]
        self._drop_unfit(called, watched, "the model writes into its parameters as it runs" if written else "")
        self._fresh = self._fresh and not called.training
        if not watched:
            return output
        expected = [detached(output), buffers.read()]
        del output
        reason, ragged = "", False
        tries = (True,) if any(stack.prefix.stem_runs for stack in watched) else (False, True)
        with attributes.unreadable():
            for stem_runs, ragged in itertools.product(tries, ways(watched)):
                for stack in watched:
                    stack.prefix.stem_runs = stem_runs
                set_random_state(state, device)
                buffers.restore()
                reason = self._difference(watched, ragged, expected, call, buffers)
                if not reason:
                    break
        set_random_state(state, device)
        buffers.restore()
        for stack, calls in watched.items():
            if reason:
                self._switch_off(stack, reason)
            else:
                stack.accept(called, calls, ragged)
        if not reason and not (any(stack.trusted(called).generates for stack in watched) and not called.training):
            self._replay = replay_of(watched, ragged)
        return call()

    def _drop_unfit(self, called: Called, watched: Watched, reason: str) -> None:
        for stack in self._stacks:
            if stack.boundary and stack not in watched:
                stack.trusted(called).missed += 1
        for stack, calls in list(watched.items()):
            found = (problem_of(stack, batch, run, self._model) for batch, run in calls)
            if problem := reason or next(filter(None, found), ""):
                self._switch_off(stack, problem)
                del watched[stack]

    def _difference(self, watched: Watched, ragged: bool, expected: Any, call: Forward, buffers: Buffers) -> str:
        """Return why the output is another one when the frozen blocks are passed over, or an empty string."""
        self._replay = replay_of(watched, ragged)
        try:
            actual = [call(), buffers.read()]
        except UPSET as error:
            return f"the model fails without what the frozen blocks compute ({type(error).__name__}: {error})"
        finally:
            self._replay = {}
        batch = next(iter(watched.values()))[0][0]
        excused = batch if self.only_loss_counts and has_loss(expected[0]) else None
        if same_outputs(expected[0], actual[0], excused) and same_outputs(expected[1], actual[1], None):
            return ""
        return "something besides the blocks above them reads what the frozen blocks compute"

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

    def _fill(self, called: Called, forward: Forward, kwargs: dict[str, Any]) -> None:
        """Compute the examples to come, once padding has been seen and found to make no difference."""
        active = [stack for stack in self._stacks if stack.boundary]
        ragged = [stack.trusted(called).ragged for stack in active]
        if ragged == [None]:
            return
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ragged == [True]:
            fill(active[0], ahead, self._upcoming(), self._model, forward, kwargs)

    def _through(self, stack: Stack, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run a host from the stored activations, or as it is."""
        if not stack.boundary or self._called is None:
            return original(*args, **kwargs)
        activations, boundary = stack.activations, stack.boundary
        if stack in self._replay:
            output = activations.run(Run(boundary, next(self._replay[stack])), original, *args, **kwargs)
            self._partial.update(filter(is_cache, pasts_of(output)))
            return output
        trust = stack.trust.get(self._called, Trust())
        trusted = min(trust.boundary, boundary)
        unknown = self._watched is not None and trust.ragged is None and not self._called.name
        began, computing = time.perf_counter(), self._stats.seconds
        batch = self._read(stack, args, kwargs, bool(trust.ragged) or unknown, trust.generates)
        if stack.fill is not None:
            if batch is not None:
                stack.fill(batch, original)
            raise Reached
        if batch is None or (self._watched is None and trusted < boundary):
            return original(*args, **kwargs)
        start = 0 if unknown and batch.padded else trusted
        run = Run(start, activations.at(start, batch, original) if start else None)
        if start and self.coming is not None and self._model.training:
            activations.expect(start, bool(trust.ragged), functools.partial(self.coming.like, batch.inputs))
        self._stats.looking += time.perf_counter() - began - (self._stats.seconds - computing)
        if self._watched is not None or self._fresh:
            run.watched, run.state = boundary, random_state(stack.prefix.device)
        if self._watched is not None:
            run.capture = activations.between(start, boundary)
            self._watched.setdefault(stack, []).append((batch, run))
            if run.activation is not None and start == boundary:
                run.captured[start] = run.activation
        output = activations.run(run, original, *args, **kwargs)
        if start:
            self._partial.update(filter(is_cache, pasts_of(output)))
        if self._watched is not None:
            trust.generates = any(past is not None for past in pasts_of(output))
            activations.check_alone(boundary, batch, run, original)
        stack.problem = run.problem
        return output

    def _read(
        self, stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any], ragged: bool, generates: bool
    ) -> Batch | None:
        """Return the batch with its keys, or None for a forward that has to run as it is."""
        names = stack.prefix.positional
        if len(args) > len(names) or (not self._model.training and (generates or kwargs.get("use_cache"))):
            return None
        inputs = dict(zip(names, args, strict=False)) | kwargs
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
