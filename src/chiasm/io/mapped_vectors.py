"""Vectors in a memory-mapped ``.npy`` file: written once, found again, and pages given back after reading.

Comes in: blocks of vectors, or an array, perhaps mapped. Goes out: mapped vectors, the file of an array. Pages of a mapped file count as memory of the process
until they are given back; they stay in the system's cache.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import FileFormatError
from chiasm.io.manifest import disk_errors, write_json_atomic

_SORTED_ROWS = 8192
_ATTEMPTS = 5

#: A folder that a store keeps for searching: all vectors of one modality, and what they are of.
VECTORS, STAMP = "vectors.npy", "stamp.json"


def release_pages(array: NDArray[Any]) -> None:
    """Give the memory of an array back that lies in a file mapped for reading; does nothing for other arrays."""
    mapping = _mapping(array)
    if mapping is None or not hasattr(mapping, "madvise"):
        return
    whole = np.frombuffer(mapping, np.uint8)
    first = array.ctypes.data - whole.ctypes.data
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (first + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        mapping.madvise(mmap.MADV_DONTNEED, start, length)


def mapped_file(array: NDArray[Any]) -> Path | None:
    """Return the file that an array is mapped from for reading, or None."""
    base: Any = array
    while isinstance(base, np.ndarray):
        name = getattr(base, "filename", None)
        if name is not None:
            return Path(name) if _mapping(base) is not None else None
        base = base.base
    return None


def mapped_stamp(array: NDArray[Any]) -> str | None:
    """Return the stamp of the vectors that an array is a view of, whatever lies at their place by now; None for others."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and "stamp" in vars(base):
            return str(vars(base)["stamp"])
        base = base.base
    return None


def _mapping(array: NDArray[Any]) -> mmap.mmap | None:
    """Return the read-only mapping that an array is a view of; one that can be written to may hold changes."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) and memoryview(base).readonly else None


def map_vectors(
    folder: Path, stamp: str, shape: tuple[int, int], blocks: Callable[[], Iterator[tuple[NDArray[Any], NDArray[Any]]]]
) -> NDArray[np.float32]:
    """Return vectors mapped from ``folder/vectors.npy``, writing the file when it is not there or of another stamp.

    Args:
        folder: Made when absent; replaced as a whole by a rename, so it is never half written.
        stamp: Changes with the vectors.
        shape: (n, dim) of all of them.
        blocks: Gives numbers and vectors of some rows at a time, each number once; the file is in rising order of these.

    Raises:
        InputError: The disk is full, or the folder may not be written.
        FileFormatError: The blocks do not have n rows together.
    """
    found = _open_mapped(folder, stamp, shape)
    if found is not None:
        return found
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with disk_errors("the mapped vectors"):
            temporary.mkdir(parents=True)
            _write_blocks(temporary / VECTORS, shape, blocks())
            write_json_atomic(temporary / STAMP, {"stamp": stamp, "rows": shape[0], "dim": shape[1]})
            _put_in_place(temporary, folder, lambda: _open_mapped(folder, stamp, shape) is not None)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    found = _open_mapped(folder, stamp, shape)
    if found is None:
        raise FileFormatError(f"the vectors in `{folder.name}` were replaced while they were opened")
    return found


def _put_in_place(temporary: Path, folder: Path, is_there: Callable[[], bool]) -> None:
    """Replace a folder, unless another process has put the same there meanwhile."""
    for _ in range(_ATTEMPTS):
        if is_there():
            return
        shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise FileFormatError(f"the vectors in `{folder.name}` are being replaced by other processes")


def _open_mapped(folder: Path, stamp: str, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    try:
        facts = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    same = facts == {"stamp": stamp, "rows": shape[0], "dim": shape[1]}
    if not same or not isinstance(vectors, np.memmap) or vectors.shape != shape or vectors.dtype != np.float32:
        return None
    vars(vectors)["stamp"] = stamp
    return vectors


def _write_blocks(path: Path, shape: tuple[int, int], blocks: Iterator[tuple[NDArray[Any], NDArray[Any]]]) -> None:
    numbers: list[NDArray[Any]] = [np.empty(0, np.int64)]
    with path.open("wb") as file:
        # Not through a map: a full disk would end the process.
        _write_header(file, shape)
        for rows, vectors in blocks:
            file.write(np.ascontiguousarray(vectors, dtype=np.float32).data)
            numbers.append(rows)
    number = np.concatenate(numbers)
    if len(number) != shape[0]:
        raise FileFormatError(f"expected {shape[0]} vectors, got {len(number)}")
    if len(number) < 2 or (np.diff(number) > 0).all():
        return
    order, unsorted = np.argsort(number, kind="stable"), np.load(path, mmap_mode="r")
    with path.with_suffix(".sorted").open("wb") as file:
        _write_header(file, shape)
        for first in range(0, shape[0], _SORTED_ROWS):
            file.write(unsorted[order[first : first + _SORTED_ROWS]].data)
    path.with_suffix(".sorted").replace(path)


def _write_header(file: BinaryIO, shape: tuple[int, int]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
