"""The int8 copy of a corpus on disk, memory-mapped, beside the vectors that it was made of.

Comes in: vectors. Goes out: a :class:`~chiasm.tasks.quantized.QuantizedCorpus` whose codes are mapped. The folder appears
by a rename, so a killed process leaves a whole copy or none. A copy is used when it says that it is of these vectors (of
the stamp of a store, else of the SHA-256 of all of them), its bounds are undamaged, and some of its codes are the vectors'
own; otherwise it is made anew. Nothing else is ever replaced: a folder that holds anything but a copy is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.io.manifest import disk_errors, write_json_atomic
from chiasm.io.mapped_vectors import STAMP, VECTORS, mapped_file, mapped_stamp, release_pages
from chiasm.tasks.quantized import QuantizedCorpus, codes_of, padded_width, quantize

#: Raised when a copy of before cannot be read as one of now.
VERSION = 2
FOLDER = "int8"
_CHECKED_ROWS = 64
_DIGEST_ROWS = 8192
_FILES = {"codes.npy", "rows.npy", "centre.npy", "index.json"}


def is_whole_store(vectors: NDArray[np.float32]) -> bool:
    """Return whether these are all vectors that a store keeps mapped, so that a copy may lie beside them."""
    return _beside(vectors) is not None


def open_index(
    vectors: NDArray[np.float32], *, normalized: bool, folder: str | Path | None = None, make: bool = True
) -> QuantizedCorpus | None:
    """Return the int8 copy that is kept on disk, making it when there is none.

    Args:
        vectors: (n, dim).
        normalized: Whether rows are used as they are.
        folder: Where: a new or empty folder, or that of a copy; None: beside the file that the vectors are mapped from.
        make: False: only look.

    Returns:
        None where there is none and none was to be made, or the folder cannot be written.

    Raises:
        InputError: Vectors are damaged, or the folder holds something else.
    """
    target = Path(folder) if folder is not None else _beside(vectors)
    if target is None:
        return None
    _check_replaceable(target)
    origin = (mapped_stamp(vectors) if folder is None else None) or _digest(vectors)
    found = _read(target, vectors, origin, normalized=normalized)
    if found is not None or not make:
        return found
    temporary = target.with_name(f".{target.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with disk_errors("the search index"):
            temporary.mkdir(parents=True)
            _write(temporary, vectors, origin, normalized=normalized)
            _check_replaceable(target)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    except (InputError, OSError) as error:
        if isinstance(error, InputError) and not isinstance(error.__cause__, OSError):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _read(target, vectors, origin, normalized=normalized)


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder with anything in it that is not of a copy: making one would delete it."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return
    except OSError:
        names = set()  # a file in the way, or a folder that may not be read: found out when it is written
    if names - _FILES:
        raise InputError(
            f"the folder `{folder.name}` holds other files than a search index", hint="name a new or an empty folder"
        )


def _digest(vectors: NDArray[np.float32]) -> str:
    """Return the SHA-256 of all vectors."""
    digest = hashlib.sha256()
    for first in range(0, len(vectors), _DIGEST_ROWS):
        block = vectors[first : first + _DIGEST_ROWS]
        digest.update(np.ascontiguousarray(block).data)
        release_pages(block)
    return digest.hexdigest()


def _beside(vectors: NDArray[np.float32]) -> Path | None:
    file = mapped_file(vectors)
    if file is None or file.name != VECTORS:
        return None
    try:
        facts = json.loads((file.parent / STAMP).read_text(encoding="utf-8"))
        # The file may have been replaced since these vectors were mapped.
        whole = (facts["rows"], facts["dim"]) == vectors.shape and facts["stamp"] == mapped_stamp(vectors)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return file.parent / FOLDER if whole else None


def _write(folder: Path, vectors: NDArray[np.float32], origin: str, *, normalized: bool) -> None:
    n, dim = vectors.shape
    width, lock = padded_width(dim), threading.Lock()
    with (folder / "codes.npy").open("wb") as file:
        header = {"descr": "|i1", "fortran_order": False, "shape": (n, width)}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()

        def write(first: int, codes: NDArray[np.int8]) -> None:
            # Not through a map: a full disk would end the process.
            with lock:
                file.seek(begin + first * width)
                file.write(codes.tobytes())

        index = quantize(vectors, normalized=normalized, write=write)
    np.save(folder / "rows.npy", np.stack([index.error, index.length, index.lean]))
    np.save(folder / "centre.npy", index.centre)
    facts = {"version": VERSION, "rows": n, "dim": dim, "normalized": normalized, "of": origin}
    facts |= {"bounds": _digest_of_bounds(folder), "scale": index.scale, "rounding": index.rounding}
    write_json_atomic(folder / "index.json", facts)


def _digest_of_bounds(folder: Path) -> str:
    return hashlib.sha256((folder / "rows.npy").read_bytes() + (folder / "centre.npy").read_bytes()).hexdigest()


def _read(folder: Path, vectors: NDArray[np.float32], origin: str, *, normalized: bool) -> QuantizedCorpus | None:
    """Return the copy, or None when it is absent, damaged, or of other vectors."""
    n, dim = vectors.shape
    try:
        facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        scale, rounding = facts.pop("scale"), facts.pop("rounding")
        bounds_digest = facts.pop("bounds")
        if facts != {"version": VERSION, "rows": n, "dim": dim, "normalized": normalized, "of": origin}:
            return None
        if bounds_digest != _digest_of_bounds(folder):
            return None
        if not (isinstance(scale, float) and isinstance(rounding, float) and scale > 0 and rounding >= 0):
            return None
        codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
        bounds = np.load(folder / "rows.npy", allow_pickle=False)
        centre = np.load(folder / "centre.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
        return None
    kinds = (codes.dtype, bounds.dtype, centre.dtype) == (np.int8, np.float32, np.float32)
    shapes = (codes.shape, bounds.shape, centre.shape) == ((n, padded_width(dim)), (3, n), (dim,))
    if not kinds or not shapes or not codes.flags.c_contiguous:
        return None
    if not np.isfinite(bounds).all() or (bounds[:2] < 0).any() or not np.isfinite(centre).all():
        return None
    error, length, lean = bounds
    index = QuantizedCorpus(codes, error, length, lean, centre, scale, rounding)
    rows = np.unique(np.linspace(0, n - 1, min(n, _CHECKED_ROWS)).astype(np.int64))
    same = np.array_equal(codes_of(vectors[rows], centre, index.scale, normalized=normalized), codes[rows])
    return index if same else None
