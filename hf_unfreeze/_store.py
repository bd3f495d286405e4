"""Where the cache keeps activations: in memory under a limit of bytes, or in an lmdb file that runs share."""

from __future__ import annotations

import shutil
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from ._slabs import SIZE, Slab
from .errors import UnfreezeError

__all__ = ["DiskStore", "MemoryStore", "Store", "free_memory"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HEADER = struct.Struct("<BBHI")  # version, dtype, dimensions, checksum of the bytes that follow the shape
VERSION = 1
INSTALL = "cache='disk' needs lmdb. Run: pip install 'hf-unfreeze[cache]'"
SLACK = 1 << 20  # lmdb needs a few pages of its own
_OPEN: dict[Path, Any] = {}  # lmdb must not open one file twice in a process


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


def of_gpu(activations: torch.Tensor) -> bool:
    """Whether a GPU has computed these."""
    return activations.is_cuda


def free_memory(device: torch.device | None = None) -> int:
    """Return the bytes that are free on a device, or in main memory where it has none of its own.

    8 GiB where the operating system does not say.
    """
    of_device = getattr(torch.get_device_module(device), "mem_get_info", None) if device is not None else None
    if of_device is not None:
        return int(of_device(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # another system than Linux
    return 8 << 30


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

    def put(self, items: Iterable[tuple[bytes, torch.Tensor]]) -> None:
        """Keep these; the least recently used go."""
        for key, row in items:
            if key in self._rows:
                self._rows.move_to_end(key)
            elif row.nbytes <= self.max_bytes:
                if of_gpu(row) and not self.beside_model:
                    self._put_in_slab(key, row)
                else:
                    self._rows[key] = row.clone()
                    self._nbytes += row.nbytes
        while self._nbytes > self.max_bytes:
            self._drop_oldest()

    def _put_in_slab(self, key: bytes, row: torch.Tensor) -> None:
        if self._filling is None or not self._filling.fits(row):
            self._filling = Slab(max(row.nbytes, min(SIZE, self.max_bytes // 8)), page_locked=row.is_cuda)
            self._nbytes += self._filling.nbytes
        self._rows[key], self._slabs[key] = self._filling.put(key, row), self._filling

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
        if self.folder not in _OPEN:
            _OPEN[self.folder] = self._open(lmdb, max_bytes)
        elif max_bytes is not None:  # for all who share it
            _OPEN[self.folder].set_mapsize(max_bytes + SLACK)
        self._env = _OPEN[self.folder]

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return int((self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"])

    @property
    def max_bytes(self) -> int:
        """Most bytes to keep."""
        return int(self._env.info()["map_size"]) - SLACK

    def get(self, keys: Sequence[bytes]) -> list[torch.Tensor | None]:
        """Return what is stored under each key, or None; also None where the bytes do not match their checksum."""
        try:
            with self._begin(buffers=True) as transaction:
                return [_unpack(transaction.get(key)) for key in keys]
        except self._error as error:
            self._stop(error)
            return [None] * len(keys)

    def takes(self, activations: torch.Tensor) -> bool:
        """Whether these may come from the device that computed them."""
        return False

    def put(self, items: Iterable[tuple[bytes, torch.Tensor]]) -> None:
        """Keep these, until the file or the disk is full."""
        if not self._writes:
            return
        try:
            with self._begin(write=True) as transaction:
                for key, row in items:
                    transaction.put(key, _pack(row))
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


def _pack(row: torch.Tensor) -> bytes:
    payload = row.contiguous().view(torch.uint8).numpy().tobytes()
    shape = struct.pack(f"<{row.dim()}I", *row.shape)
    return HEADER.pack(VERSION, DTYPES.index(row.dtype), row.dim(), zlib.crc32(payload)) + shape + payload


def _unpack(value: Any) -> torch.Tensor | None:
    if value is None or len(value) < HEADER.size:
        return None
    version, dtype, dimensions, checksum = HEADER.unpack_from(value)
    start = HEADER.size + 4 * dimensions
    payload = bytearray(value[start:])
    if version != VERSION or zlib.crc32(payload) != checksum:
        return None
    shape = struct.unpack_from(f"<{dimensions}I", value, HEADER.size)
    return torch.frombuffer(payload, dtype=DTYPES[dtype]).reshape(shape)
