"""Pillow's antialiased bicubic resize and a crop in compiled code, bit for bit, several times faster than Pillow.

Comes in: 8-bit pixels, grey or RGB, the size to resize to and the part of it to keep. Goes out: the pixels of that part,
or its normalised planes. Only what the crop keeps is computed.

``bicubic.c`` is compiled when the package is installed, where a C compiler for x86-64 is found. It is called through
ctypes, which releases the interpreter lock. Every function here says no (returns None or False) instead of computing
what it cannot do exactly; the caller then asks Pillow, which gives the same bits: where nothing was compiled, for sides
above 65,536 pixels, for strips taller than 100 times their width (Pillow resizes those in another order), and when the
compiled code does not agree with the installed Pillow on one picture that both resize at the first use.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chiasm.io.compiled import load_library

_VERSION = 1  # of the interface of bicubic.c
_MAX_SIDE = 65_536
_TALL = 100


class Placement(NamedTuple):
    """What a picture is resized to, and which part of the result is kept, all in pixels."""

    width: int
    height: int
    left: int
    top: int
    kept_width: int
    kept_height: int


def available() -> bool:
    """Return whether the compiled code is there and agrees with Pillow."""
    return _library() is not None


def resize(pixels: NDArray[np.uint8], placement: Placement) -> NDArray[np.uint8] | None:
    """Return the kept part of the resized picture, or None where this is Pillow's work.

    Args:
        pixels: Shape (height, width) or (height, width, 3).
        placement: The kept part lies inside the resized picture.

    Returns:
        Shape (kept_height, kept_width) or (kept_height, kept_width, 3).
    """
    library = _library()
    if library is None or not _suits(pixels, placement):
        return None
    picture = np.empty((placement.kept_height, placement.kept_width, *pixels.shape[2:]), np.uint8)
    return picture if _call(library, pixels, placement, picture=picture) else None


def resize_to_planes(
    pixels: NDArray[np.uint8], placement: Placement, *, table: NDArray[np.float32], out: NDArray[np.float32]
) -> bool:
    """Write ``table[c, value]`` of the kept part into ``out[c]``; return False where this is Pillow's work.

    Args:
        pixels: Shape (height, width) or (height, width, 3).
        placement: The kept part lies inside the resized picture.
        table: Shape (3, 256): what a grey value becomes in each plane.
        out: Shape (3, kept_height, kept_width), C-contiguous and writable; undefined when False is returned.
    """
    library = _library()
    if library is None or not _suits(pixels, placement):
        return False
    if not (_plain(table, np.float32) and table.shape == (3, 256)):
        return False
    if not (_plain(out, np.float32) and out.flags.writeable):
        return False
    if out.shape != (3, placement.kept_height, placement.kept_width):
        return False
    return _call(library, pixels, placement, table=table, planes=out)


def _plain(array: NDArray[Any], kind: type[np.generic]) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == kind and array.flags.c_contiguous and array.flags.aligned


def _suits(pixels: NDArray[np.uint8], p: Placement) -> bool:
    """Every size that C is given is checked here: nothing there reads or writes outside what this allows."""
    if not _plain(pixels, np.uint8) or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        return False
    height, width = pixels.shape[:2]
    if not all(1 <= side <= _MAX_SIDE for side in (height, width, p.width, p.height, p.kept_width, p.kept_height)):
        return False
    inside = 0 <= p.left <= p.width - p.kept_width and 0 <= p.top <= p.height - p.kept_height
    return inside and height <= _TALL * width


def _call(
    library: ctypes.CDLL,
    pixels: NDArray[np.uint8],
    p: Placement,
    *,
    picture: NDArray[np.uint8] | None = None,
    table: NDArray[np.float32] | None = None,
    planes: NDArray[np.float32] | None = None,
    wide: int | None = None,
) -> bool:
    height, width = pixels.shape[:2]
    code = library.chiasm_bicubic(
        pixels.ctypes.data,
        width,
        height,
        1 if pixels.ndim == 2 else 3,
        *p,
        _widest() if wide is None else wide,
        None if picture is None else picture.ctypes.data,
        None if table is None else table.ctypes.data,
        None if planes is None else planes.ctypes.data,
    )
    return int(code) == 0  # otherwise there was no memory: Pillow will say so, or manage with less


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = _load(Path(__file__).parent)
    return library if library is not None and _agrees(library) else None


@functools.cache
def _widest() -> int:
    library = _library()
    return 0 if library is None else int(library.chiasm_bicubic_widest())


def _load(folder: Path) -> ctypes.CDLL | None:
    library = load_library(folder, "bicubic", version=_VERSION)
    if library is not None:
        library.chiasm_bicubic.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 10, *[ctypes.c_void_p] * 3]
        library.chiasm_bicubic_widest.argtypes, library.chiasm_bicubic_widest.restype = [], ctypes.c_int32
    return library


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether one picture, reduced along one axis and enlarged along the other, has Pillow's bits.

    A Pillow that changes its arithmetic, or a compiler that reorders ours, is found here and costs speed only.
    """
    widest = int(library.chiasm_bicubic_widest())
    draw = np.random.default_rng(0)
    for shape in ((67, 41), (67, 41, 3)):
        pixels = draw.integers(0, 256, shape, dtype=np.uint8)
        pixels[10:30] = np.where(pixels[10:30] > 127, 255, 0)  # edges: sums below 0 and above 255
        theirs = np.asarray(Image.fromarray(pixels).resize((83, 29), Image.Resampling.BICUBIC))
        ours = np.empty_like(theirs)
        whole = Placement(83, 29, 0, 0, 83, 29)
        if not _call(library, pixels, whole, picture=ours, wide=widest) or not np.array_equal(ours, theirs):
            return False
    return True
