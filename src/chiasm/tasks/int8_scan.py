"""Exact int32 dot products of int8 rows: the compiled kernel where it was built, torch's int8 product where it is not.

Comes in: int8 rows and queries in -127..127, width a multiple of 64. Goes out: int32, exact, the same from every engine.
``int8_scan.c`` is compiled when the package is installed and called through ctypes, which releases the interpreter lock.
An engine that does not give exact sums on a probe of extreme values is not used: int8 products of processors without
VNNI may saturate at 16 bits, and a bound on rounding errors would then mean nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chiasm.io import compiled

_VERSION = 1  # of the interface of int8_scan.c
#: Widths are padded to a multiple of this.
WIDTH_STEP = 64
#: Longest row: int32 holds the sums.
MAX_WIDTH = 65_536
_LEAST_TORCH_QUERIES = 32  # torch._int_mm wants more than 16 rows, and is slow for odd counts

#: rows (n, width), queries (m, width), scores (m, n) to write; all C-contiguous.
Product = Callable[[NDArray[np.int8], NDArray[np.int8], NDArray[np.int32]], None]


def compiled_product() -> Product | None:
    """Return the compiled product, or None where it was not built or is wrong on this processor."""
    return _compiled()


def torch_product() -> Product | None:
    """Return the product of torch, or None where torch lacks it or it is wrong on this processor."""
    return _torch()


def best_product() -> Product | None:
    """Return the compiled product, else torch's, else None."""
    return compiled_product() or torch_product()


def default_threads() -> int:
    """Return how many threads to use: torch's setting once it is loaded, ``OMP_NUM_THREADS``, else all CPUs allowed."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return max(1, int(torch.get_num_threads()))
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdecimal() and int(named) > 0:
        return int(named)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_exact(product: Product) -> bool:
    """Return whether a product is exact on extreme and on random values."""
    draw = np.random.default_rng(0)
    rows = draw.integers(-127, 128, (67, 2 * WIDTH_STEP), dtype=np.int8)
    queries = draw.integers(-127, 128, (7, 2 * WIDTH_STEP), dtype=np.int8)
    rows[:4], queries[:2] = np.array([[127], [-127], [127], [-127]]), np.array([[127], [-127]])
    rows[2:4, ::2] *= -1
    found = np.empty((7, 67), np.int32)
    try:
        product(rows, queries, found)
    except (RuntimeError, TypeError, AttributeError):
        return False
    return bool(np.array_equal(found, queries.astype(np.int32) @ rows.astype(np.int32).T))


@functools.cache
def _compiled() -> Product | None:
    library = load_library(Path(__file__).parent)
    if library is None:
        return None
    product = kernel_product(library, int(library.chiasm_int8_best()))
    return product if is_exact(product) else None


@functools.cache
def _torch() -> Product | None:
    return _torch_int_mm if is_exact(_torch_int_mm) else None


def load_library(folder: Path) -> ctypes.CDLL | None:
    """Return the compiled code of a folder, or None where it is absent, foreign to this machine or of another version."""
    library = compiled.load_library(folder, "int8_scan", version=_VERSION)
    if library is not None:
        best, scan = library.chiasm_int8_best, library.chiasm_int8_scan
        best.argtypes, best.restype, scan.restype = [], ctypes.c_int, ctypes.c_int
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        scan.argtypes = [ctypes.c_int, pointer, size, pointer, size, size, pointer, size]
    return library


def kernel_product(library: ctypes.CDLL, path: int) -> Product:
    """Return the product of one instruction set: 0 plain C, 1 AVX2, 2 AVX-512 with VNNI.

    Calling it raises ``RuntimeError`` where the processor lacks the path.
    """

    def product(rows: NDArray[np.int8], queries: NDArray[np.int8], scores: NDArray[np.int32]) -> None:
        check_operands(rows, queries, scores)
        n, width = rows.shape
        if library.chiasm_int8_scan(
            path, rows.ctypes.data, n, queries.ctypes.data, len(queries), width, scores.ctypes.data, n
        ):
            raise RuntimeError(f"path {path} of the int8 kernel does not run on this processor")

    return product


def check_operands(rows: NDArray[np.int8], queries: NDArray[np.int8], scores: NDArray[np.int32]) -> None:
    """Check what C reads and writes: nothing there goes outside of what this allows.

    Raises:
        TypeError: A type, shape or layout is another.
    """
    kinds = rows.dtype == np.int8 and queries.dtype == np.int8 and scores.dtype == np.int32
    plain = all(a.ndim == 2 and a.flags.c_contiguous for a in (rows, queries, scores)) and scores.flags.writeable
    if not kinds or not plain or scores.shape != (len(queries), len(rows)) or rows.shape[1] != queries.shape[1]:
        raise TypeError(f"int8 product of {rows.shape} and {queries.shape} into {scores.shape} {scores.dtype}")
    if rows.shape[1] % WIDTH_STEP or rows.shape[1] > MAX_WIDTH:
        raise TypeError(f"the width of an int8 product is a multiple of {WIDTH_STEP}, got {rows.shape[1]}")


def _torch_int_mm(rows: NDArray[np.int8], queries: NDArray[np.int8], scores: NDArray[np.int32]) -> None:
    try:
        import torch
    except ImportError as error:
        raise RuntimeError("torch is not installed") from error
    check_operands(rows, queries, scores)
    if not scores.size:
        return
    count = max(len(queries), _LEAST_TORCH_QUERIES)
    padded = np.zeros((count, queries.shape[1]), np.int8)
    padded[: len(queries)] = queries
    found = torch._int_mm(torch.from_numpy(padded), torch.from_numpy(_writable_view(rows)).T)
    scores[:] = found.numpy()[: len(queries)]


def _writable_view(rows: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return the same memory as an array that torch takes without a warning; nobody writes to it."""
    if rows.flags.writeable:
        return rows
    buffer = (ctypes.c_int8 * rows.size).from_address(rows.ctypes.data)
    return np.ctypeslib.as_array(buffer).reshape(rows.shape)
