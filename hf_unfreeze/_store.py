"""Where the cache keeps activations: what a store does, and the one in memory, under a limit of bytes."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from ._slabs import SIZE, Slab, Slot

__all__ = ["MemoryStore", "Store", "free_memory"]

# Where torchrun and those that launch by MPI say how many processes are on this machine.
SHARING = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


class Store(Protocol):
    """Keeps the activation of one example under a key."""

    def get(self, keys: Sequence[bytes]) -> list[torch.Tensor | None]:
        """Return what is stored under each key, or None."""

    def put(self, items: Iterable[tuple[bytes, torch.Tensor]]) -> None:
        """Keep these, as far as there is room."""

    @property
    def nbytes(self) -> int:
        """Bytes in use."""

    @property
    def max_bytes(self) -> int:
        """Most bytes to keep."""

    def takes(self, activations: torch.Tensor) -> bool:
        """Whether these may come from the device that computed them."""

    def expect(self, keys: Callable[[], Sequence[bytes]]) -> None:
        """Fetch what will be asked for next, where that takes long."""


def of_gpu(activations: torch.Tensor) -> bool:
    """Whether a GPU has computed these."""
    return activations.is_cuda


def free_memory(device: torch.device | None = None) -> int:
    """Return the bytes that are free on a device, or in main memory where it has none of its own.

    8 GiB where the operating system does not say. Of main memory each process that was launched on this machine has
    its share.
    """
    of_device = getattr(torch.get_device_module(device), "mem_get_info", None) if device is not None else None
    if of_device is not None:
        return int(of_device(device)[0])
    sharing = next((int(os.environ[name]) for name in SHARING if name in os.environ), 1)
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // sharing
    except OSError:
        pass  # another system than Linux
    return (8 << 30) // sharing


class MemoryStore:
    """Keeps the most recently used activations, up to ``max_bytes``, in main memory or beside the model.

    Those of a GPU lie together in slabs of main memory, and those of a slab go together.
    """

    def __init__(self, max_bytes: int, beside_model: bool = False) -> None:
        self.max_bytes, self.beside_model = max_bytes, beside_model
        self._rows: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._slabs: dict[bytes, Slab] = {}  # in which rows of a GPU lie
        self._filling: Slab | None = None
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self._nbytes

    def get(self, keys: Sequence[bytes]) -> list[torch.Tensor | None]:
        """Return what is stored under each key, or None."""
        found = [self._rows.get(key) for key in keys]
        for key, row in zip(keys, found, strict=True):
            if row is not None:
                self._rows.move_to_end(key)
        return found

    def takes(self, activations: torch.Tensor) -> bool:
        """Whether these may come from the device that computed them."""
        return self.beside_model or of_gpu(activations)

    def expect(self, keys: Callable[[], Sequence[bytes]]) -> None:
        """Do nothing: all is at hand."""

    def put(self, items: Iterable[tuple[bytes, torch.Tensor]]) -> None:
        """Keep these; the least recently used go."""
        for key, row in items:
            if key in self._rows:
                self._rows.move_to_end(key)
            elif row.nbytes <= self.max_bytes:
                if of_gpu(row) and not self.beside_model:
                    self._take_over(key, self.copied(row))
                else:
                    self._rows[key] = row.clone()
                    self._nbytes += row.nbytes
        self._trim()

    def room(self, dtype: torch.dtype, shape: Sequence[int]) -> Slot:
        """Return memory for a row; ``adopt`` keeps it, once it has been written."""
        nbytes = dtype.itemsize * math.prod(shape)
        if self._filling is None or not self._filling.fits(nbytes):
            self._filling = Slab(max(nbytes, min(SIZE, self.max_bytes // 8)))
        return self._filling.slot(dtype, shape)

    def copied(self, row: torch.Tensor) -> Slot:
        """Return such memory with a copy of a row, which a GPU may still be writing."""
        slot = self.room(row.dtype, row.shape)
        slot.row.copy_(row, non_blocking=True)
        return slot

    def adopt(self, slots: Mapping[bytes, Slot]) -> None:
        """Keep rows that lie in slabs already; the least recently used go."""
        for key, slot in slots.items():
            if key not in self._rows:
                self._take_over(key, slot)
        self._trim()

    def _take_over(self, key: bytes, slot: Slot) -> None:
        if not slot.slab.keys:
            self._nbytes += slot.slab.nbytes
        slot.slab.keys.append(key)
        self._rows[key], self._slabs[key] = slot.row, slot.slab

    def _trim(self) -> None:
        while self._nbytes > self.max_bytes:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        key, row = self._rows.popitem(last=False)
        slab = self._slabs.get(key)
        if slab is None:
            self._nbytes -= row.nbytes
            return
        self._nbytes -= slab.nbytes
        for beside in slab.keys:
            self._rows.pop(beside, None)
            del self._slabs[beside]
        if slab is self._filling:
            self._filling = None
