"""Page-locked main memory: a GPU reads from it by itself, and the host goes on meanwhile.

torch rounds each such allocation up to a power of two, up to twice what was asked for, so rows share slabs of that
size. A slab comes and goes as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["SIZE", "Slab", "Slot"]

SIZE = 1 << 25  # bytes, or as many as a longer row takes
ALIGN = 64  # bytes


class Slot(NamedTuple):
    """A row that is to be written, and the slab that it lies in."""

    row: torch.Tensor
    slab: Slab


class Slab:
    """Room for some rows; ``keys`` are those of the rows that are kept.

    Args:
        nbytes: Least bytes that it holds.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = 1 << (nbytes - 1).bit_length()
        self.keys: list[bytes] = []
        self._memory = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._used = 0

    def fits(self, nbytes: int) -> bool:
        """Whether there is room for so many bytes more."""
        return self._used + nbytes <= self.nbytes

    def slot(self, dtype: torch.dtype, shape: Sequence[int]) -> Slot:
        """Return room for one more row."""
        end = self._used + dtype.itemsize * math.prod(shape)
        row = self._memory[self._used : end].view(dtype).reshape(tuple(shape))
        self._used = -(-end // ALIGN) * ALIGN
        return Slot(row, self)
