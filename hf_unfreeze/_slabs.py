"""Page-locked main memory: a GPU reads from it by itself, and the host goes on meanwhile.

torch rounds each such allocation up to a power of two, up to twice what was asked for, so rows share slabs of that
size. A slab comes and goes as a whole.
"""

from __future__ import annotations

import torch

__all__ = ["SIZE", "Slab"]

SIZE = 1 << 25  # bytes, or as many as a longer row takes
ALIGN = 64  # bytes


class Slab:
    """Room for some rows.

    Args:
        nbytes: Least bytes that it holds.
        page_locked: Whether a GPU is to read it.
    """

    def __init__(self, nbytes: int, page_locked: bool) -> None:
        self.nbytes = 1 << (nbytes - 1).bit_length()
        self.keys: list[bytes] = []
        self._memory = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=page_locked)
        self._used = 0

    def fits(self, row: torch.Tensor) -> bool:
        """Whether there is room for one more."""
        return self._used + row.nbytes <= self.nbytes

    def put(self, key: bytes, row: torch.Tensor) -> torch.Tensor:
        """Return a copy of a row, which a GPU may still be writing."""
        end = self._used + row.nbytes
        copy = self._memory[self._used : end].view(row.dtype).reshape(row.shape)
        self._used = -(-end // ALIGN) * ALIGN
        self.keys.append(key)
        return copy.copy_(row, non_blocking=True)
