"""Where runs share activations: an lmdb file."""

from __future__ import annotations

import math
import shutil
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch

from .errors import UnfreezeError

__all__ = ["DiskStore"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HEADER = struct.Struct("<BBHI")  # version, dtype, dimensions, checksum of the bytes that follow the shape
VERSION = 1
INSTALL = "cache='disk' needs lmdb. Run: pip install 'hf-unfreeze[cache]'"
SLACK = 1 << 20  # lmdb needs a few pages of its own
SHARED = 1 << 22  # bytes of rows from which threads share the copying of them
THREADS = 8  # more are no faster
_OPEN: dict[Path, tuple[Any, threading.Lock]] = {}  # lmdb must not open one file twice in a process

Room = Callable[[bytes, torch.dtype, tuple[int, ...]], torch.Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")


def _own(key: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


class DiskStore:
    """Keeps activations in an lmdb file: several processes may use it, and one that is killed does no harm.

    A full disk or a full file only ends the writing; a file that cannot be read is begun again.
    """

    def __init__(self, folder: str | Path, max_bytes: int | None = None) -> None:
        try:
            import lmdb
        except ImportError:
            raise UnfreezeError(INSTALL) from None
        self._error: type[Exception] = lmdb.Error
        self._resized: type[Exception] = lmdb.MapResizedError
        self.folder = Path(folder).expanduser().resolve() / f"v{VERSION}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._refuse(error)
        self._writes = True
        shared = self.folder in _OPEN
        if not shared:
            _OPEN[self.folder] = self._open(lmdb, max_bytes), threading.Lock()
        self._env, self._lock = _OPEN[self.folder]
        if shared and max_bytes is not None:  # for all who share it
            with self._lock:  # lmdb must not be reading meanwhile
                self._env.set_mapsize(max_bytes + SLACK)

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return int((self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"])

    @property
    def max_bytes(self) -> int:
        """Most bytes to keep."""
        return int(self._env.info()["map_size"]) - SLACK

    def get(self, keys: Sequence[bytes], room: Room = _own) -> list[torch.Tensor | None]:
        """Return what is stored under each key, or None; also None where the bytes do not match their checksum.

        Args:
            keys: Whose rows are wanted.
            room: Returns the tensor that a row is copied to, from its key, dtype and shape.
        """
        try:
            with self._lock, self._begin(buffers=True) as transaction:
                packed = [_Packed.of(transaction.get(key)) for key in keys]
                found = [(value, room(key, *value.form)) for key, value in zip(keys, packed, strict=True) if value]
                rows = iter(_in_threads(_copied, found, sum(row.nbytes for _, row in found)))
                return [next(rows) if value else None for value in packed]
        except self._error as error:
            self._stop(error)
            return [None] * len(keys)

    def expect(self, keys: Callable[[], Sequence[bytes]]) -> None:
        """Do nothing: the file is mapped into memory."""

    def takes(self, activations: torch.Tensor) -> bool:
        """Whether these may come from the device that computed them."""
        return False

    def put(self, items: Iterable[tuple[bytes, torch.Tensor]]) -> None:
        """Keep these, until the file or the disk is full."""
        if not self._writes:
            return
        rows = dict(items)
        packed = _in_threads(_pack, [*rows.values()], sum(row.nbytes for row in rows.values()))
        try:
            with self._lock, self._begin(write=True) as transaction:
                for key, value in zip(rows, packed, strict=True):
                    transaction.put(key, value)
        except self._error as error:
            self._stop(error)

    def _begin(self, **options: bool) -> Any:
        try:
            return self._env.begin(**options)
        except self._resized:  # another process has given the file more room
            self._env.set_mapsize(0)
            return self._env.begin(**options)

    def _stop(self, error: Exception) -> None:
        if self._writes:
            self._writes = False
            warnings.warn(
                f"the frozen-prefix cache writes no more to {self.folder} ({error}); training goes on. "
                "Give it more room with FrozenPrefixCache('disk', max_bytes=…), or delete the folder.",
                UserWarning,
                stacklevel=2,
            )

    def _open(self, lmdb: Any, max_bytes: int | None) -> Any:
        path = self.folder / "data.mdb"
        for _ in range(2):
            size = path.stat().st_size if path.exists() else 0
            room = max_bytes or shutil.disk_usage(self.folder).free // 2 + size
            options = {"map_size": max(room, size) + SLACK, "sync": False, "metasync": False, "readahead": False}
            try:
                env = lmdb.open(str(self.folder), max_readers=512, **options)
                if (env.info()["last_pgno"] + 1) * env.stat()["psize"] <= path.stat().st_size:
                    env.reader_check()  # a process that was killed as it read would hold its place
                    return env
                env.close()  # cut short: to read beyond its end would kill the process
            except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError):
                pass
            except lmdb.Error as error:  # not damaged: no memory for it, or no right to read it
                self._refuse(error)
            warnings.warn(f"{path} cannot be read; the cache is begun again", UserWarning, stacklevel=2)
            for name in ("data.mdb", "lock.mdb"):
                (self.folder / name).unlink(missing_ok=True)
        self._refuse("its file cannot be read")

    def _refuse(self, why: object) -> NoReturn:
        raise UnfreezeError(f"{self.folder} cannot hold a cache: {why}. Give another folder: cache='disk:FOLDER'.")


class _Packed(NamedTuple):
    """A row as it is in the file: behind a header and its shape."""

    payload: memoryview
    form: tuple[torch.dtype, tuple[int, ...]]
    checksum: int

    @classmethod
    def of(cls, value: Any) -> _Packed | None:
        """Return what a value of the file holds, or None where it cannot be a row."""
        if value is None or len(value) < HEADER.size:
            return None
        version, dtype, dimensions, checksum = HEADER.unpack_from(value)
        start = HEADER.size + 4 * dimensions
        if version != VERSION or dtype >= len(DTYPES) or len(value) <= start:
            return None
        shape = struct.unpack_from(f"<{dimensions}I", value, HEADER.size)
        if len(value) - start != DTYPES[dtype].itemsize * math.prod(shape):
            return None
        return cls(memoryview(value)[start:], (DTYPES[dtype], shape), checksum)


def _pack(row: torch.Tensor) -> bytearray:
    shape = struct.pack(f"<{row.dim()}I", *row.shape)
    start = HEADER.size + len(shape)
    value = bytearray(start + row.nbytes)
    np.frombuffer(value, np.uint8, offset=start)[:] = _bytes(row.contiguous())
    HEADER.pack_into(value, 0, VERSION, DTYPES.index(row.dtype), row.dim(), zlib.crc32(memoryview(value)[start:]))
    value[HEADER.size : start] = shape
    return value


def _copied(item: tuple[_Packed, torch.Tensor]) -> torch.Tensor | None:
    """Copy a row to where it is wanted; None where it is not what was stored."""
    packed, row = item
    copy = _bytes(row)
    copy[:] = np.frombuffer(packed.payload, np.uint8)
    return row if zlib.crc32(copy) == packed.checksum else None


def _bytes(row: torch.Tensor) -> Any:
    return row.reshape(-1).view(torch.uint8).numpy()


def _in_threads(call: Callable[[Item], Result], items: Sequence[Item], nbytes: int) -> list[Result]:
    """Apply a function that waits for memory to each; numpy and zlib let other threads run meanwhile."""
    threads = min(torch.get_num_threads(), THREADS)
    if threads == 1 or nbytes < SHARED:
        return [call(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return [*pool.map(call, items)]
