"""Images that are rows of an array in an HDF5 or npz file, as PatchCamelyon and MedMNIST are stored: ``set_x.h5/x/12`` is
row 12 of ``x``.

Comes in: a file, the name of an array and a row, counted from 0. Goes out: a Pillow image. A row is read when it is
asked for, never the file. Links to other files, virtual arrays and external storage are refused: a data file has no
business reading elsewhere; see `chiasm.datasets.npz` for the other kind. h5py serialises calls, so threads may share a file; every process opens its own.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.datasets.npz import NPZ_SUFFIXES, open_npz
from chiasm.errors import FileFormatError, InputError, MissingExtra
from chiasm.io.image import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

ARRAY_SUFFIXES = (".h5", ".hdf5", *NPZ_SUFFIXES)
#: Labels of the largest patch set are 2 MB; images are read row by row and have no such limit.
MAX_ARRAY_BYTES = 1 << 30
_CHUNK_CACHE_BYTES = 16 << 20
#: What h5py raises for damaged files.
_H5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)


def array_shape(path: Path, key: str) -> tuple[int, ...]:
    """Return the shape of an array.

    Raises:
        InputError: The file is absent.
        FileFormatError: It is no HDF5 file or has no such array.
        MissingExtra: h5py is not installed.
    """
    return tuple(int(side) for side in _array(path, key).shape)


def read_array(path: Path, key: str) -> NDArray[Any]:
    """Return a whole array, for labels.

    Raises:
        InputError: The file is absent.
        FileFormatError: It is no HDF5 file, has no such array, or the array is damaged or over 1 GB.
        MissingExtra: h5py is not installed.
    """
    array = _array(path, key)
    if array.size * array.dtype.itemsize > MAX_ARRAY_BYTES:
        raise FileFormatError(f"array `{key}` of `{path.name}` is larger than {MAX_ARRAY_BYTES >> 30} GB")
    try:
        return np.asarray(array[()])
    except _H5_ERRORS as error:
        raise FileFormatError(f"array `{key}` of `{path.name}` is damaged") from error


def read_array_image(path: Path, member: str, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Return one row of an array of images, ``(rows, height, width[, 3])`` of unsigned bytes, as RGB or grey image.

    Raises:
        InputError: The file is absent, has no such row, or the image is too large.
        FileFormatError: The array holds no images or is damaged.
        MissingExtra: h5py is not installed.
    """
    from PIL.Image import fromarray

    key, row = _split(member)
    array = _array(path, key)
    sides = tuple(array.shape[1:])
    if not (len(sides) == 2 or (len(sides) == 3 and sides[2] == 3)) or array.dtype != np.uint8 or 0 in sides:
        raise FileFormatError(
            f"array `{key}` of `{path.name}` holds no images: shape {tuple(array.shape)}, type {array.dtype}",
            hint="expected unsigned bytes of shape (rows, height, width, 3)",
        )
    if sides[0] * sides[1] > max_pixels:
        raise InputError(f"images of `{path.name}` have {sides[1]} × {sides[0]} pixels, more than {max_pixels:,}")
    if row is None or row >= array.shape[0]:
        raise InputError(f"array `{key}` of `{path.name}` has no such row; it has {array.shape[0]}, counted from 0")
    try:
        return fromarray(np.ascontiguousarray(array[row]))
    except _H5_ERRORS as error:
        raise FileFormatError(f"`{path.name}` is damaged at row {row}") from error


def has_row(path: Path, member: str) -> bool:
    """Return whether an array has the row that a member names.

    Raises:
        InputError: The file is absent.
        FileFormatError: It is no HDF5 file or has no such array.
        MissingExtra: h5py is not installed.
    """
    key, row = _split(member)
    return row is not None and row < _array(path, key).shape[0]


def _split(member: str) -> tuple[str, int | None]:
    key, _, row = member.rpartition("/")
    return key, int(row) if row.isascii() and row.isdigit() and len(row) < 12 else None


def _array(path: Path, key: str) -> Any:
    """Return the handle of an array that lies in this very file."""
    if path.name.casefold().endswith(NPZ_SUFFIXES):
        return open_npz(path, key)
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise MissingExtra("h5py", "data") from error
    try:
        state = path.stat()
    except OSError:
        raise InputError(f"`{path.name}` does not exist") from None
    return _open(path, key, state.st_mtime_ns, state.st_size, os.getpid())


@lru_cache(maxsize=16)  # an array's decompressed chunks are remembered as long as its handle lives
def _open(path: Path, key: str, modified_ns: int, size: int, process: int) -> Any:
    import h5py

    try:
        file = h5py.File(path, "r", rdcc_nbytes=_CHUNK_CACHE_BYTES)
        plain = bool(key) and isinstance(file.get(key, getlink=True), h5py.HardLink)
        found = file[key] if plain else None
        if isinstance(found, h5py.Dataset) and found.ndim and not found.is_virtual and not found.external:
            return found
        names = sorted(str(name) for name in file)[:8]
    except _H5_ERRORS as error:
        raise FileFormatError(
            f"`{path.name}` is not a whole HDF5 file",
            hint="download it again; a file that ends in .gz is unpacked first",
        ) from error
    shown = ", ".join(f"`{name}`" for name in names) or "nothing"
    raise FileFormatError(f"`{path.name}` has no array `{key}`; it holds {shown}")
