"""The package's compiled files: found beside their Python face, loaded through ctypes, of the expected version or absent.

They are built when the package is installed, where there is a compiler for them (setup.py). Nothing depends on them but
speed: every caller has a plain way to the same bits.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def load_library(folder: Path, name: str, *, version: int) -> ctypes.CDLL | None:
    """Return ``_NAME`` of a folder, or None where it is absent, foreign to this machine or of another version.

    Args:
        folder: Where it lies.
        name: It has a function ``chiasm_NAME`` and one ``chiasm_NAME_version``.
        version: Of the interface that the caller knows.
    """
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_{name}{suffix}"
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            stated = getattr(library, f"chiasm_{name}_version")
            getattr(library, f"chiasm_{name}").restype = ctypes.c_int32
        except (OSError, AttributeError):
            continue
        stated.argtypes, stated.restype = [], ctypes.c_int32
        if stated() == version:
            return library
    return None
