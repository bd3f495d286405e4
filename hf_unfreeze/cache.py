"""The frozen-prefix cache: an example goes through the frozen blocks once in a run, not once in an epoch.

What a frozen block computes for an example never changes. While a stack is frozen up to a boundary, the input of the
first trainable block is looked up by the content of the example, and the stem and the blocks below are passed over;
what is missing is computed for those examples alone, from the highest boundary that is stored. In the first forward
at a boundary the model is run with and without, from one state of the random generators: unless both give the same
bits, the cache switches itself off and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ._caching import Caching
from ._disk import DiskStore
from ._store import MemoryStore, Store, free_memory
from ._tiers import Tiers
from .errors import UnfreezeError, near_match
from .freezing import Follower
from .schedule import RECOMMENDED, Phase, Schedule

__all__ = ["CacheStats", "FrozenPrefixCache", "recommended"]

FOLDER = "~/.cache/hf_unfreeze"
STORES = ("memory", "disk", "device")
ALLOWED = "a cache is 'memory', 'device', 'disk', 'disk:FOLDER', 'off' or a FrozenPrefixCache"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class CacheStats:
    """Examples found and computed so far; how many were timed, and their seconds; the seconds of looking things up.

    What was computed ahead counts as found from its second time on: the first saves nothing.
    """

    hits: int = 0
    misses: int = 0
    timed: int = 0
    seconds: float = 0.0
    looking: float = 0.0

    @property
    def seconds_saved(self) -> float:
        """What computing the found ones would have taken, at the mean of those that were timed, less all looking."""
        return self.hits * self.seconds / self.timed - self.looking if self.timed else 0.0


class FrozenPrefixCache:
    """Activations of the frozen prefix, kept for the whole run and for other runs with the same frozen weights.

    Example:
        >>> UnfreezeCallback("gradual(every=1ep)", cache="memory")
        >>> UnfreezeCallback("gradual(every=1ep)", cache=FrozenPrefixCache("disk", folder="runs/cache"))

    Args:
        store: ``"memory"`` and ``"device"`` go with the process, in main memory and on the device of the model;
            ``"disk"`` is an lmdb file that runs and ranks share.
        max_bytes: Most bytes to keep; by default a quarter of the free memory, for ``"device"`` of what is free there
            when training begins, or half of the free disk.
        dtype: ``"bfloat16"`` or ``"float16"`` halve the bytes, and the results are then no longer exact.
        folder: Folder of the disk store, by default ``~/.cache/hf_unfreeze``.

    Raises:
        UnfreezeError: An argument is not one of those, or lmdb is not installed.
    """

    def __init__(
        self,
        store: str = "memory",
        *,
        max_bytes: int | None = None,
        dtype: str | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if store not in STORES:
            raise UnfreezeError(f"cache={store!r}: {ALLOWED}." + near_match(store, [*STORES, "off"]))
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes <= 0):
            raise UnfreezeError(f"max_bytes={max_bytes!r}: write a number of bytes above 0, for instance 4 * 2**30.")
        if dtype is not None and dtype not in DTYPES:
            raise UnfreezeError(f"dtype={dtype!r}: write {', '.join(DTYPES)} or None." + near_match(dtype, DTYPES))
        if folder is not None and store != "disk":
            raise UnfreezeError("folder is for the disk store. Write FrozenPrefixCache('disk', folder=…).")
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.stats = CacheStats()
        self.active: Caching  # once it follows a model
        self.store: Store
        self.fetches = False  # whether it gains from knowing what comes next
        if store == "disk":
            self.store = DiskStore(folder or FOLDER, max_bytes)
        elif store == "device":
            self.store = MemoryStore(max_bytes or 0, beside_model=True)  # 0: not known before the model is
        else:
            self.store = MemoryStore(max_bytes or free_memory() // 4)

    @classmethod
    def parse(cls, cache: str | FrozenPrefixCache | None) -> FrozenPrefixCache | None:
        """Make the cache that ``"memory"``, ``"disk:FOLDER"`` and the like name; none for ``"off"``, as for None.

        Example:
            >>> FrozenPrefixCache.parse("disk:runs/cache").store.folder.parent.name
            'cache'

        Args:
            cache: One of these; a ``FrozenPrefixCache`` comes back as it is.

        Raises:
            UnfreezeError: It is none of these.
        """
        if cache is None or cache == "off":  # a command line cannot say None
            return None
        if isinstance(cache, FrozenPrefixCache):
            return cache
        if not isinstance(cache, str):
            raise UnfreezeError(f"cache={cache!r}: {ALLOWED}.")
        store, _, folder = cache.partition(":")
        return cls(store, folder=folder or None)

    def record(self) -> dict[str, float]:
        """Return the statistics under the names that they have in a log.

        Example:
            >>> FrozenPrefixCache().record()["unfreeze/cache_hits"]
            0
        """
        stats = self.stats
        return {
            "unfreeze/cache_hits": stats.hits,
            "unfreeze/cache_misses": stats.misses,
            "unfreeze/cache_bytes": self.store.nbytes,
            "unfreeze/cache_max_bytes": self.store.max_bytes,
            "unfreeze/cache_seconds_saved": round(stats.seconds_saved, 3),
        }

    def follow(
        self, model: nn.Module, upcoming: Callable[[], Sequence[Phase]], prefix_dtype: str | None = None
    ) -> Follower:
        """Start caching for a model; used by ``Unfreezer``.

        Args:
            model: The model, without wrappers.
            upcoming: Returns the present and the later phases: what they will need is kept in passing.
            prefix_dtype: What the frozen blocks compute in, where that is not the dtype of the model.
        """
        store, weight = self.store, next(model.parameters())
        if isinstance(store, MemoryStore) and not store.max_bytes:
            store.max_bytes = free_memory(weight.device) // 4
        if isinstance(store, DiskStore):
            near = MemoryStore(free_memory() // 4)
            self.fetches = near.takes(weight)
            store = Tiers(near, store) if self.fetches else store
        self.active = Caching(store, self.stats, self.dtype, model, upcoming, prefix_dtype)
        return self.active


def recommended(
    schedule: str | Schedule | None, cache: str | FrozenPrefixCache | None
) -> tuple[str | Schedule, str | FrozenPrefixCache | None]:
    """Return both as given; where there is no schedule, the recommended one, and on a CPU the cache in memory with it.

    On a GPU, where to fill it costs most of what an epoch saves, whether the data fits is not known beforehand.
    """
    if schedule is not None:
        return schedule, cache
    if cache is None:
        cache = "off" if torch.accelerator.is_available() else "memory"
    return RECOMMENDED, cache
