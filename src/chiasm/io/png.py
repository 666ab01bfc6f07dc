"""PNG pixels by a fast inflater and a compiled prediction, where a file is plain; everything else is Pillow's work.

Comes in: a PNG that Pillow has opened, so its header is read and its size checked, but that is not decoded. Goes out: an
image whose pixels are a NumPy array already, or None where Pillow should decode: the file is not 8-bit grey or RGB, is
interlaced, animated, damaged in any way, or has metadata behind its pixels; or ``png.c`` was not compiled.

PNG is lossless, so there is one right result. The inflater is isal (extra ``fast``), else the one of the standard library.

References:
    Portable Network Graphics (PNG) Specification, third edition, W3C 2025.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from chiasm.io.compiled import load_library
from chiasm.io.decoded import DecodedImage, bytes_of

_VERSION = 1  # of the interface of png.c
#: A longer file than its raw pixels and this is left to Pillow, which does not read it whole.
_SLACK_BYTES = 4 << 20
#: Above it Pillow decodes row by row: here the inflated rows and the pixels lie in memory side by side.
_MAX_PIXELS = 1 << 26
_COLOURS = {"L": 0, "RGB": 2}
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ANIMATED = (b"acTL", b"fcTL", b"fdAT")


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_library(Path(__file__).parent, "png", version=_VERSION)
    if library is not None:
        library.chiasm_png.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 3, ctypes.c_void_p]
    return library


def is_compiled() -> bool:
    """Return whether the compiled prediction is there; without it Pillow decodes."""
    return _library() is not None


@functools.cache
def _inflater() -> Any:
    try:
        return importlib.import_module("isal.isal_zlib")
    except ImportError:
        return zlib


def decode_png(image: Image.Image) -> DecodedImage | None:
    """Return the decoded form of a PNG that Pillow has opened and not loaded, or None: let Pillow decode it."""
    library = _library()
    if not isinstance(image, ImageFile.ImageFile) or image.format != "PNG" or image.mode not in _COLOURS:
        return None
    width, height = image.size
    if width * height > _MAX_PIXELS:
        return None
    channels = len(image.mode)
    raw_bytes = height * (1 + width * channels)
    data = None if library is None else bytes_of(image, at_most=raw_bytes + _SLACK_BYTES)
    packed = None if data is None else _packed_pixels(data, width, height, _COLOURS[image.mode])
    raw = None if packed is None else _inflate(packed, raw_bytes)
    if library is None or raw is None:
        return None
    pixels = np.empty((height, width, channels)[: 2 if channels == 1 else 3], np.uint8)
    given = np.frombuffer(raw, np.uint8)
    if library.chiasm_png(given.ctypes.data, width, height, channels, pixels.ctypes.data) != 0:
        return None
    return DecodedImage.of(pixels, image)


def _packed_pixels(data: bytes, width: int, height: int, colour: int) -> bytes | None:
    """Return the compressed pixels of a plain file: IHDR as expected, anything, IDATs, IEND; else None."""
    header = struct.pack(">I4sIIBBBBB", 13, b"IHDR", width, height, 8, colour, 0, 0, 0)
    if not data.startswith(_SIGNATURE + header):
        return None
    parts: list[bytes] = []
    place = len(_SIGNATURE) + 12 + 13
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if place + 12 + length > len(data):
            return None
        if name == b"IEND":
            return b"".join(parts) if parts else None
        if name == b"IDAT":
            parts.append(data[place + 8 : place + 8 + length])
        elif parts or name == b"IHDR" or name in _ANIMATED:
            return None  # Pillow takes metadata behind the pixels into account, this does not
        place += 12 + length
    return None


def _inflate(packed: bytes, wanted: int) -> bytes | None:
    """Return exactly ``wanted`` bytes, or None if the stream is damaged, shorter or longer: no more is ever unpacked."""
    inflater = _inflater()
    try:
        stream = inflater.decompressobj()
        raw: bytes = stream.decompress(packed, wanted + 1)
    except (inflater.error, zlib.error, ValueError, OverflowError, EOFError, MemoryError):
        return None
    return raw if len(raw) == wanted and stream.eof and not stream.unused_data else None
