"""Vectors in a memory-mapped ``.npy`` file: where an array lies on disk, and pages given back after reading.

Comes in: an array, perhaps mapped. Goes out: its file, or nothing. Pages of a mapped file count as memory of the process
until they are given back; they stay in the system's cache.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def _mapping(array: NDArray[Any]) -> mmap.mmap | None:
    """Return the read-only mapping that an array is a view of; one that can be written to may hold changes."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) and memoryview(base).readonly else None
