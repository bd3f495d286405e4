"""The activations of one stack: found in the store, or computed from the highest boundary that is stored."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from ._exact import Attributes, scales_by_length
from ._fingerprints import Fingerprints
from ._keys import Batch, Unkeyed, by_length, can_be_cut, read_batch, take
from ._prefix import Prefix, Reached, Run
from ._shadow import random_state, set_random_state
from ._store import Store
from .errors import UnfreezeError

__all__ = ["Activations", "Stats", "blank"]

# Missing examples are divided into parts of like length, since padding is computed for nothing. What the forward of a
# part costs besides its tokens is worth some forty tokens of a small model on a CPU, and thousands elsewhere.
PART_COST, PART_COST_ELSEWHERE = 40, 8192
CHECK_EVERY = 1000  # found examples, of which one is computed again
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the largest activation: another batch shape rounds anew
HALF_TOLERANCE = 5e-2
UPSET = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)

Forward = Callable[..., Any]


class Stats(Protocol):
    """Examples found and computed so far; how many were timed, and their seconds; the seconds of looking things up."""

    hits: int
    misses: int
    timed: int
    seconds: float
    looking: float


class Activations:
    """What goes into the blocks of one stack, for every example that came by.

    Args:
        prefix: The stack.
        store: Where activations are kept.
        stats: Counts lookups.
        dtype: What they are kept in; None: as they are.
        prefix_dtype: What the blocks compute in; None: as the model.
    """

    def __init__(
        self, prefix: Prefix, store: Store, stats: Stats, dtype: torch.dtype | None, prefix_dtype: str | None
    ) -> None:
        self.prefix, self.store, self.stats, self.dtype = prefix, store, stats, dtype
        self.wanted: set[int] = set()  # boundaries that this or a later phase of the schedule needs
        self.written = 0  # bytes given to the store
        self._computed_in = torch.float32
        self._next_check = CHECK_EVERY
        self._ahead = 0  # examples computed before they came by
        self._alone_to = 0  # boundary up to which an example has come out alike without the others of its batch
        self._ragged: bool | None = None  # and without its padding; None: there was none
        self.fingerprints = Fingerprints(prefix, prefix_dtype)

    def read(self, inputs: dict[str, Any], ragged: bool) -> Batch:
        """Compute the keys of a batch.

        Raises:
            Unkeyed: There are none.
        """
        batch = read_batch(inputs, ragged)
        batch.salt += self.fingerprints.ambient()
        return batch

    def run(self, run: Run, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Call the host with its blocks doing what the run says."""
        self.prefix.run = run
        try:
            return forward(*args, **kwargs)
        finally:
            self.prefix.run = None

    def at(self, boundary: int, batch: Batch, forward: Forward) -> torch.Tensor:
        """Return the input of block ``boundary`` for a batch; padding is zero where keys leave it out."""
        rows = self._get(batch, range(batch.size), boundary)
        places = [index for index, row in enumerate(rows) if row is not None]
        missing = [index for index, row in enumerate(rows) if row is None]
        found = [row for row in rows if row is not None]
        early = min(self._ahead, len(found))  # the first time that they are found, nothing is saved
        self._ahead -= early
        self.stats.hits += len(found) - early
        self.stats.misses += len(missing)
        self._check_one(batch, places, found, boundary, forward)
        if not missing:
            return self._assembled(batch, found)
        computed = list(self._compute(boundary, batch, missing, forward, len(missing)))
        members, first = computed[0]
        tokens = batch.tokens if batch.padded else first.shape[1]
        if members == list(range(batch.size)) and first.shape[1] == tokens:
            return first
        result = first.new_zeros((batch.size, tokens, *first.shape[2:]))
        if found:
            result[places] = self._assembled(batch, found)
        for members, hidden in computed:
            result[members, : hidden.shape[1]] = hidden
        return result

    def fill(self, boundary: int, most: int, batch: Batch, forward: Forward) -> None:
        """Compute what is missing of examples that are to come, ``most`` at a time, where that spares padding."""
        if not can_be_cut(batch):
            return
        for part, _ in by_length(batch, range(batch.size), self._part_cost(), most):
            found = zip(part, self._get(batch, part, boundary), strict=True)
            missing = [index for index, row in found if row is None]
            for members, _ in self._compute(boundary, batch, missing, forward, most):
                self._ahead += len(members)
                self.stats.misses += len(members)

    def expect(self, boundary: int, ragged: bool, following: Callable[[], dict[str, Any] | None]) -> None:
        """Let the store fetch what the next batch will ask for; nothing where that is not known."""

        def keys() -> list[bytes]:
            with contextlib.suppress(Unkeyed):
                if (inputs := following()) is not None:
                    batch = self.read(inputs, ragged)
                    return self._stored_as(boundary, batch, range(batch.size))
            return []

        self.store.expect(keys)

    def accept(self, boundary: int, batch: Batch, captured: dict[int, torch.Tensor]) -> None:
        """Keep what a check has computed; what is stored already has to be the same."""
        hidden = captured[boundary]
        for index, row in enumerate(self._get(batch, range(batch.size), boundary)):
            if row is not None:
                self._compare(boundary, row, hidden[index].detach())
            self.stats.misses += row is None
        self.keep(batch, range(batch.size), captured)

    def keep(self, batch: Batch, members: Sequence[int], captured: dict[int, torch.Tensor]) -> None:
        """Store what a run has captured, an example at a time and without its padding."""
        for boundary, hidden in captured.items():
            self._computed_in = hidden.dtype
            device = hidden.device if self.store.takes(hidden) else "cpu"
            rows = hidden.detach().to(device, self.dtype or hidden.dtype).unbind()
            if batch.padded:
                rows = tuple(row[: batch.lengths[member]] for member, row in zip(members, rows, strict=True))
            self.store.put(zip(self._stored_as(boundary, batch, members), rows, strict=True))
            self.written += sum(row.nbytes for row in rows)

    def _compute(
        self, boundary: int, batch: Batch, missing: list[int], forward: Forward, most: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Compute examples up to a boundary, each from as high as it is stored; keep what later phases need too."""
        lower = sorted((b for b in self.wanted if b < boundary and not self.prefix.splits(b)), reverse=True)
        for start in (*lower, 0):
            rows = self._get(batch, missing, start) if start else [None] * len(missing)
            members = [index for index, row in zip(missing, rows, strict=True) if row is not None or not start]
            if not members:
                continue
            found = dict(zip(missing, rows, strict=True))
            missing = [index for index in missing if index not in members]
            for part, tokens in by_length(batch, members, self._part_cost(), most):
                run = Run(start, stop=boundary, capture=self.between(start, boundary))
                if start:
                    held = [row for row in map(found.get, part) if row is not None]
                    run.activation = self._assembled(batch, held, tokens)
                began = time.perf_counter()
                self._run_to_stop(run, forward, take(batch, part, tokens))
                self.keep(batch, part, run.captured)
                if self.prefix.device.type != "cpu":
                    torch.accelerator.synchronize(self.prefix.device)  # else only the launches would be timed
                self.stats.seconds += time.perf_counter() - began
                self.stats.timed += len(part)
                yield part, blank(batch, part, run.captured[boundary])
            if not missing:
                break

    def _part_cost(self) -> int:
        return PART_COST if self.prefix.device.type == "cpu" else PART_COST_ELSEWHERE

    def between(self, start: int, boundary: int) -> frozenset[int]:
        """Boundaries to keep on the way from one to another."""
        return frozenset(b for b in self.wanted | {boundary} if start < b <= boundary)

    def _run_to_stop(self, run: Run, forward: Forward, inputs: dict[str, Any]) -> None:
        state = random_state(self.prefix.device)  # LayerDrop of transformers 4 draws for each block, at a rate of 0 too
        try:
            with torch.no_grad(), contextlib.suppress(Reached):
                self.run(run, forward, **inputs)
        finally:
            set_random_state(state, self.prefix.device)

    def _get(self, batch: Batch, members: Sequence[int], boundary: int) -> list[torch.Tensor | None]:
        return self.store.get(self._stored_as(boundary, batch, members))

    def _stored_as(self, boundary: int, batch: Batch, members: Sequence[int]) -> list[bytes]:
        salt = self.fingerprints.of(boundary, batch.salt)
        return [salt + batch.keys[member] for member in members]

    def _assembled(self, batch: Batch, rows: list[torch.Tensor], tokens: int = 0) -> torch.Tensor:
        """Put stored rows into one tensor on the device of the model, as long as the batch or as ``tokens``."""
        device, kept_on = self.prefix.device, rows[0].device
        tokens = tokens or (batch.tokens if batch.padded else rows[0].shape[0])
        shape = (len(rows), tokens, *rows[0].shape[1:])
        dtype = rows[0].dtype if self.dtype is None else self._computed_in
        if kept_on != device and rows[0].is_pinned():  # read by the GPU itself, while the host goes on
            there = torch.zeros(shape, dtype=dtype, device=device)
            for place, row in zip(there, rows, strict=True):
                place[: len(row)].copy_(row, non_blocking=True)
            return there
        short = [tokens - row.shape[0] for row in rows]
        zeros = rows[0].new_zeros((max(short), *rows[0].shape[1:]))
        pieces = [piece for row, count in zip(rows, short, strict=True) for piece in (row, zeros[:count])]
        pinned = kept_on.type == "cpu" and device.type == "cuda"
        there = torch.empty((len(rows) * tokens, *shape[2:]), dtype=dtype, device=kept_on, pin_memory=pinned)
        torch.cat(pieces, out=there)  # at once: a copy for each row would be a launch for each on a GPU
        return there.reshape(shape).to(device, non_blocking=True)

    def _check_one(
        self, batch: Batch, places: list[int], rows: list[torch.Tensor], boundary: int, forward: Forward
    ) -> None:
        """Compute one of many found examples again, alone and without its padding."""
        if self.stats.hits < self._next_check or not rows:
            return
        self._next_check = self.stats.hits + CHECK_EVERY
        chosen = self.stats.hits // CHECK_EVERY % len(rows)
        tokens = max(batch.lengths[places[chosen]], 1) if can_be_cut(batch) else 0
        self._compare(boundary, rows[chosen], self._alone(boundary, batch, places[chosen], forward, tokens))

    def _compare(self, boundary: int, stored: torch.Tensor, again: torch.Tensor) -> None:
        difference, allowed = self._off(stored, again)
        if not difference <= allowed:
            raise UnfreezeError(
                f"the cache holds an activation below block {boundary} that is off by {difference:.3g} when it is "
                f"computed again (allowed: {allowed:.3g}). Delete the folder of the disk store, or write cache=None."
            )

    def _alone(self, boundary: int, batch: Batch, row: int, forward: Forward, tokens: int = 0) -> torch.Tensor:
        """Compute one example without the others of its batch."""
        run = Run(stop=boundary, capture=frozenset({boundary}))
        self._run_to_stop(run, forward, take(batch, [row], tokens))
        return run.captured[boundary][0]

    def _off(self, stored: torch.Tensor, again: torch.Tensor) -> tuple[float, float]:
        """Return how far apart two activations of an example are, and how far they may be."""
        again = again[: stored.shape[0]].to(stored.device, stored.dtype)
        allowed = self._tolerance(stored.dtype) * max(float(again.abs().max()), 1.0)
        return float((again - stored).abs().max()), allowed

    def _tolerance(self, dtype: torch.dtype) -> float:
        return HALF_TOLERANCE if self.fingerprints.coarse else TOLERANCE.get(dtype, HALF_TOLERANCE)

    def check_alone(self, boundary: int, batch: Batch, run: Run, forward: Forward) -> None:
        """Note whether an example comes out the same without the others of its batch, and without its padding."""
        hidden = run.captured.get(boundary)
        if run.problem or hidden is None or hidden.shape[:1] != (batch.size,) or hidden.dim() < 3:
            return  # which has a reason of its own
        attributes = Attributes(self.prefix.host.modules())
        if boundary > self._alone_to:
            self._ragged = None
            if not self._same_alone(boundary, batch, hidden, 0, 0, forward):
                run.crowded = True
        if batch.padded and self._ragged is None and not run.crowded:
            row = min(range(batch.size), key=batch.lengths.__getitem__)
            tokens = max(batch.lengths[row], 1)
            cut = can_be_cut(batch) and not scales_by_length(self.prefix.host, "longrope")
            self._ragged = cut and self._same_alone(boundary, batch, hidden, row, tokens, forward)
        self._alone_to = max(self._alone_to, 0 if run.crowded else boundary)
        run.ragged = bool(self._ragged)
        attributes.restore()  # the model may read them after its blocks

    def _same_alone(
        self, boundary: int, batch: Batch, hidden: torch.Tensor, row: int, tokens: int, forward: Forward
    ) -> bool:
        try:
            again = self._alone(boundary, batch, row, forward, tokens)
        except UPSET:
            return False  # a batch of another form is not what these blocks can take
        stored = hidden[row, : tokens or None].detach().cpu()
        if again.shape != stored.shape:
            return False
        tolerance, size = self._tolerance(stored.dtype), again.cpu().abs()
        channels = size.amax(dim=tuple(range(size.dim() - 1)))  # one of some thousands is usual, and hides the others
        rounding = 1.0 if tolerance == HALF_TOLERANCE else 0.01
        allowed = tolerance * channels.clamp(min=rounding * float(size.max()))
        return bool(((again.cpu() - stored).abs() <= allowed).all())


def blank(batch: Batch, members: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
    """Set the padding to zero, as it is when the rest comes from the store."""
    if not batch.padded:
        return hidden
    lengths = torch.tensor([batch.lengths[member] for member in members], device=hidden.device)
    padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]
    return hidden.masked_fill(padding.reshape(*padding.shape, *[1] * (hidden.dim() - 2)), 0.0)
