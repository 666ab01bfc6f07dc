"""Arrays of NumPy's ``.npz`` files, as MedMNIST is stored: the header at once, the rows when they are asked for.

Comes in: a file and the name of an array. Goes out: a `NpzArray`, which is indexed like one of h5py. The file is a zip, so
a row cannot be reached without what stands before it: the first row that is read unpacks the array into a temporary file.
A forked worker reads what was unpacked before it was forked, and unpacks the rest into a file of its own. Arrays of objects, which only pickle could read, are refused.
"""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.datasets.packed import MAX_GROWTH, Spool
from chiasm.errors import FileFormatError, InputError

NPZ_SUFFIXES = (".npz",)
_BLOCK_BYTES = 1 << 20
#: What zipfile and NumPy raise for damaged files.
_ERRORS = (OSError, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass
class NpzArray:
    """An array in a zip: ``array[3]`` is its row 3, ``array[()]`` the whole.

    Attributes:
        path: The file.
        key: Name of the array.
        shape: Of the array, at least one axis.
        dtype: Of its elements.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _place: tuple[Spool, int] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, row: int | tuple[()]) -> NDArray[Any]:
        """Return a row, or everything.

        Raises:
            OSError: The file is damaged behind its header.
            InputError: There is no room to unpack it.
        """
        file, start = self._unpack()
        whole = self.size * self.dtype.itemsize
        if isinstance(row, tuple):
            return np.frombuffer(_read(file, start, whole), self.dtype).reshape(self.shape)
        width = whole // self.shape[0]
        return np.frombuffer(_read(file, start + row * width, width), self.dtype).reshape(self.shape[1:])

    def _unpack(self) -> tuple[Spool, int]:
        """Return the temporary file and where the array begins in it."""
        with self._lock:
            if self._place is None:
                to = _spool(os.getpid())
                with to.lock:
                    self._place = to, self._write(to)
            return self._place

    def _write(self, to: Spool) -> int:
        left = self.size * self.dtype.itemsize
        start = to.size
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.key}.npy") as file:
                _read_header(file)
                while left:
                    block = file.read(min(left, _BLOCK_BYTES))
                    if not block:
                        raise EOFError
                    to.write(block, name=self.path.name)
                    left -= len(block)
            to.file.flush()
        except BaseException as error:
            to.cut(start)
            if isinstance(error, _ERRORS) and not isinstance(error, InputError):
                raise OSError("the array ends early") from error
            raise
        return start


@cache
def _spool(process: int) -> Spool:
    """Return the temporary file of a process: two that wrote into one would overwrite each other."""
    return Spool()


def _read(file: Spool, offset: int, size: int) -> bytes:
    """Read without moving the place in the file, which forked workers share."""
    return os.pread(file.file.fileno(), size, offset)


def open_npz(path: Path, key: str) -> NpzArray:
    """Return an array of a file by its header.

    Raises:
        FileFormatError: The file is no ``.npz``, has no such array, or one that is no plain array of numbers.
        InputError: The file is absent.
    """
    try:
        state = path.stat()
    except OSError:
        raise InputError(f"`{path.name}` does not exist") from None
    return _open(path, key, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _open(path: Path, key: str, modified_ns: int, size: int) -> NpzArray:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name.removesuffix(".npy") for name in archive.namelist())
            if key in names:
                with archive.open(f"{key}.npy") as file:
                    shape, fortran, dtype = _read_header(file)
                packed = archive.getinfo(f"{key}.npy").compress_size
    except _ERRORS as error:
        raise FileFormatError(f"`{path.name}` is not a whole npz file", hint="download it again") from error
    if key not in names:
        shown = ", ".join(f"`{name}`" for name in names[:8]) or "nothing"
        raise FileFormatError(f"`{path.name}` has no array `{key}`; it holds {shown}")
    if dtype.hasobject or fortran or not shape:
        raise FileFormatError(f"array `{key}` of `{path.name}` is not a plain array of numbers, row by row")
    found = NpzArray(path, key, shape, dtype)
    if found.size * dtype.itemsize > MAX_GROWTH * packed + _BLOCK_BYTES:
        raise FileFormatError(
            f"array `{key}` of `{path.name}` grows more than {MAX_GROWTH}-fold when it is unpacked",
            hint="store it again with numpy.savez if you trust it",
        )
    return found


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError("unknown version")
