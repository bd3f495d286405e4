"""A store on the disk behind one in page-locked memory, from which a GPU reads while the host goes on.

What the disk has is checked and copied once in a run, as far as there is room in memory. What the next batch will ask
for is fetched by a thread while the GPU is at the present one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ._disk import DiskStore
from ._slabs import Slot
from ._store import MemoryStore

__all__ = ["Tiers"]


class Tiers:
    """All that is kept is on the disk, and what was used last in memory too.

    Args:
        near: In memory.
        far: On the disk.
    """

    def __init__(self, near: MemoryStore, far: DiskStore) -> None:
        self._near, self._far = near, far
        self._fetcher = ThreadPoolExecutor(1)
        self._fetched: Future[tuple[list[torch.Tensor | None], bool]] | None = None
        self._reads = False  # whether the disk had something that memory did not, for what was asked for last

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self._far.nbytes

    @property
    def max_bytes(self) -> int:
        """Most bytes to keep."""
        return self._far.max_bytes

    def get(self, keys: Sequence[bytes]) -> list[torch.Tensor | None]:
        """Return what is stored under each key, or None."""
        ahead = self._wait()
        rows, read = self._fetch(keys)
        self._reads = ahead or read
        return rows

    def takes(self, activations: torch.Tensor) -> bool:
        """Whether these may come from the device that computed them."""
        return self._near.takes(activations)

    def put(self, items: Iterable[tuple[bytes, torch.Tensor]]) -> None:
        """Keep these, as far as there is room."""
        self._wait()
        rows = dict(items)
        slots = {key: self._near.copied(row) for key, row in rows.items()}
        for device in {row.device for row in rows.values()}:
            torch.get_device_module(device).synchronize(device)
        self._near.adopt(slots)
        self._far.put((key, slot.row) for key, slot in slots.items())

    def expect(self, keys: Callable[[], Sequence[bytes]]) -> None:
        """Begin to fetch what will be asked for next, if what was asked for last had to be."""
        self._wait()
        if self._reads:
            self._fetched = self._fetcher.submit(self._fetch, keys())

    def _wait(self) -> bool:
        """Wait for what is being fetched; return whether any of it was on the disk alone."""
        fetched, self._fetched = self._fetched, None
        return fetched is not None and fetched.result()[1]

    def _fetch(self, keys: Sequence[bytes]) -> tuple[list[torch.Tensor | None], bool]:
        near = dict(zip(keys, self._near.get(keys), strict=True))
        slots: dict[bytes, Slot] = {}

        def room(key: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
            slots[key] = self._near.room(dtype, shape)
            return slots[key].row

        missing = [key for key, row in near.items() if row is None]
        read = self._far.get(missing, room) if missing else []
        far = {key: row for key, row in zip(missing, read, strict=True) if row is not None}
        self._near.adopt({key: slots[key] for key in far})
        return [far.get(key, near[key]) for key in keys], bool(far)
