"""The activations of one stack: found in the store, or computed from the highest boundary that is stored."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from ._keys import Batch, by_length, can_be_cut, fingerprint, read_batch, take
from ._prefix import Prefix, Reached, Run
from ._store import Store
from .errors import UnfreezeError

__all__ = ["Activations", "Stats", "blank"]

# Missing examples are divided into parts of like length, since padding is computed for nothing. What the forward of a
# part costs besides its tokens is worth some forty tokens of a small model on a CPU, and thousands elsewhere.
PART_COST, PART_COST_ELSEWHERE = 40, 8192
CHECK_EVERY = 1000  # found examples, of which one is computed again
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the largest activation: another batch shape rounds anew
HALF_TOLERANCE = 5e-2

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
        self._coarse = prefix_dtype is not None
        self.wanted: set[int] = set()  # boundaries that this or a later phase of the schedule needs
        self.written = 0  # bytes given to the store
        self._computed_in = torch.float32
        self._next_check = CHECK_EVERY
        self._ahead = 0  # examples computed before they came by
        self._parts = prefix.parts()
        library = getattr(sys.modules.get("transformers"), "__version__", None)
        self._text = f"{prefix.text()}\n{torch.__version__} {library} {prefix_dtype}"
        self._stamps: list[Any] = [None] * len(self._parts)
        self._digests = [b""] * len(self._parts)
        self._prints: dict[tuple[int, str], bytes] = {}

    def forget_trained(self) -> None:
        """Read the weights again of what trains now, once it is frozen: fused optimizers do not count their changes."""
        for index, part in enumerate(self._parts):
            if any(tensor.requires_grad for _, tensor in part):
                self._stamps[index] = None

    def read(self, inputs: dict[str, Any], ragged: bool) -> Batch:
        """Compute the keys of a batch.

        Raises:
            Unkeyed: There are none.
        """
        batch = read_batch(inputs, ragged)
        batch.salt += _ambient(self.prefix.device)
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

    def keep(self, batch: Batch, members: Sequence[int], captured: dict[int, torch.Tensor]) -> None:
        """Store what a run has captured, an example at a time and without its padding."""
        for boundary, hidden in captured.items():
            self._computed_in = hidden.dtype
            there = hidden.detach().to("cpu", self.dtype or hidden.dtype)
            salt = self._fingerprint(boundary, batch.salt)
            rows = zip(members, there, strict=True)
            kept = [(row[: batch.lengths[member]] if batch.padded else row).clone() for member, row in rows]
            self.store.put((salt + batch.keys[member], row) for member, row in zip(members, kept, strict=True))
            self.written += sum(row.nbytes for row in kept)

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
                self.keep(batch, part, run.captured)  # copies to the host, and so waits for an accelerator
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
        with torch.no_grad(), contextlib.suppress(Reached):
            self.run(run, forward, **inputs)

    def _get(self, batch: Batch, members: Sequence[int], boundary: int) -> list[torch.Tensor | None]:
        salt = self._fingerprint(boundary, batch.salt)
        return self.store.get([salt + batch.keys[member] for member in members])

    def _assembled(self, batch: Batch, rows: list[torch.Tensor], tokens: int = 0) -> torch.Tensor:
        """Put stored rows into one tensor on the device of the model, as long as the batch or as ``tokens``."""
        device = self.prefix.device
        tokens = tokens or (batch.tokens if batch.padded else rows[0].shape[0])
        shape = (len(rows), tokens, *rows[0].shape[1:])
        make = torch.zeros if any(row.shape[0] < tokens for row in rows) else torch.empty
        there = make(shape, dtype=self._computed_in, pin_memory=device.type == "cuda")
        for place, row in zip(there, rows, strict=True):
            place[: row.shape[0]] = row
        return there.to(device, non_blocking=True)

    def _check_one(
        self, batch: Batch, places: list[int], rows: list[torch.Tensor], boundary: int, forward: Forward
    ) -> None:
        """Compute one of many found examples again, alone."""
        if self.stats.hits < self._next_check or not rows:
            return
        self._next_check = self.stats.hits + CHECK_EVERY
        chosen = self.stats.hits % len(rows)
        run = Run(stop=boundary, capture=frozenset({boundary}))
        self._run_to_stop(run, forward, take(batch, [places[chosen]]))
        stored = rows[chosen]
        again = run.captured[boundary][0, : stored.shape[0]].to("cpu", stored.dtype)
        share = HALF_TOLERANCE if self._coarse else TOLERANCE.get(stored.dtype, HALF_TOLERANCE)
        allowed = share * max(float(again.abs().max()), 1.0)
        difference = float((again - stored).abs().max())
        if not difference <= allowed:
            raise UnfreezeError(
                f"the cache holds an activation below block {boundary} that is off by {difference:.3g} when it is "
                f"computed again (allowed: {allowed:.3g}). Delete the folder of the disk store, or write cache=None."
            )

    def _fingerprint(self, boundary: int, salt: str) -> bytes:
        """Return 16 bytes of all that decides an activation but the example; weights are read only after a change."""
        for index, part in enumerate(self._parts[: boundary + 1]):
            stamp = [(tensor._version, tensor.data_ptr()) for _, tensor in part]
            if stamp != self._stamps[index]:
                self._stamps[index], self._digests[index] = stamp, fingerprint(part)
                self._prints.clear()
        if (boundary, salt) not in self._prints:
            text = f"{self._text}\n{salt}\n".encode() + b"".join(self._digests[: boundary + 1])
            self._prints[boundary, salt] = hashlib.blake2b(text, digest_size=16).digest()
        return self._prints[boundary, salt]


def blank(batch: Batch, members: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
    """Set the padding to zero, as it is when the rest comes from the store."""
    if not batch.padded:
        return hidden
    lengths = torch.tensor([batch.lengths[member] for member in members], device=hidden.device)
    padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]
    return hidden.masked_fill(padding.reshape(*padding.shape, *[1] * (hidden.dim() - 2)), 0.0)


def _ambient(device: torch.device) -> str:
    """What decides the bits of an activation outside of the model: device, autocast, precision."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return f" {device.type} {autocast} {_precision()}"


def _precision() -> str:
    """How float32 products are rounded. The old question fails once one of the settings of torch 2.9 was written."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return f"{torch.get_float32_matmul_precision()} {backends.cudnn.allow_tf32}"
    settings = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return " ".join(setting.fp32_precision for setting in settings)
