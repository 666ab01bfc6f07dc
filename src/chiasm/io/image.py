"""Image files in, fully decoded Pillow images out; hostile files become clear errors before they cost memory.

The image keeps the mode of its file (palette, grey, RGB, CMYK ...), because a model's preprocessing decides when to
convert it. The exception is greyscale of more than 8 bits: Pillow's conversions clip it at 255, a silent loss, so it is
windowed to 8 bits here. Messages carry the file's name only, never its folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from chiasm.errors import FileFormatError, InputError
from chiasm.io.jpeg import decode_jpeg, draft
from chiasm.io.png import decode_png

#: Pixels above which a file is refused unless the caller allows more; Pillow's own limit for "decompression bombs".
MAX_PIXELS = 178_956_970

#: Drawings that Pillow would hand to an interpreter (Ghostscript, Windows).
_PROGRAMS = ("EPS", "WMF", "EMF")
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")

# Pillow's decoders report damage with whatever the damaged value happened to break.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


def open_image(
    source: str | os.PathLike[str] | bytes | BinaryIO,
    *,
    max_pixels: int = MAX_PIXELS,
    frame: int | None = None,
    exif: bool = False,
    window: tuple[float, float] | None = None,
    draft_px: int | None = None,
) -> Image.Image:
    """Return the image of a file, decoded, in the file's own mode.

    Args:
        source: Path of the file, its bytes, or a binary stream.
        max_pixels: A larger image is refused from its header, before it is decoded. Pillow has a say too: it warns
            above ``PIL.Image.MAX_IMAGE_PIXELS`` (89 million) and refuses twice that, whatever is allowed here.
        frame: Which frame of an animation or of a multi-page file, from 0; such files are refused without it. A JPEG
            with extra pictures (MPO, as telephones write it) counts as its first picture.
        exif: Turn the image as its EXIF orientation says. Off by default, as in open_clip and transformers.
        window: For greyscale of more than 8 bits (modes ``I;16``, ``I``, ``F``): the values that become 0 and 255.
            Default: the smallest and the largest finite value of the image, so that nothing is clipped; the result
            has mode ``L`` and the window in ``info["window"]``. A constant image becomes 0. Images of 8 bits are left
            alone.
        draft_px: Lossy. A large JPEG may be decoded at a half, a quarter or an eighth of its size, while both sides keep
            at least this many pixels (``PIL.Image.Image.draft``); see ``chiasm.data.transforms.ImageTransform`` for
            what it costs. Other formats and small images are as without it.

    Raises:
        InputError: The file is absent, a folder or unreadable; it has too many pixels or several frames.
        FileFormatError: The file is empty, truncated or not an image that Pillow knows.
    """
    name = _name_of(source)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        return _decode(source, name, max_pixels=max_pixels, frame=frame, exif=exif, window=window, draft_px=draft_px)
    with _open_file(source, name) as stream:
        return _decode(stream, name, max_pixels=max_pixels, frame=frame, exif=exif, window=window, draft_px=draft_px)


def _name_of(source: object) -> str:
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")
    return Path(os.fspath(name)).name if isinstance(name, str | os.PathLike) and str(name) else "(bytes)"


def _open_file(path: str | os.PathLike[str], name: str) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):  # asked first: opening a pipe would wait for its writer
            return open(path, "rb")
        problem = "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
    except FileNotFoundError:
        problem = "does not exist"
    except PermissionError:
        problem = "cannot be read: permission denied"
    except (OSError, ValueError) as error:
        problem = f"cannot be opened: {type(error).__name__}"
    # Raised outside the handlers: the original messages hold the whole path, and folders are named after patients.
    raise InputError(f"image `{name}` {problem}")


def _decode(
    stream: BinaryIO,
    name: str,
    *,
    max_pixels: int,
    frame: int | None,
    exif: bool,
    window: tuple[float, float] | None,
    draft_px: int | None,
) -> Image.Image:
    if draft_px is not None and draft_px < 1:
        raise InputError(f"draft_px must be at least 1, got {draft_px}")
    image: Image.Image
    try:
        image = Image.open(stream)
    except UnidentifiedImageError:
        empty = stream.seek(0, os.SEEK_END) == 0
        what = "is empty" if empty else "is not an image in a known format, or its header is damaged"
        raise FileFormatError(f"image `{name}` {what}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"image `{name}` is too large: {error}", hint="scale it down first") from None
    except _DECODER_ERRORS as error:
        raise FileFormatError(f"image `{name}` cannot be read: {_reason(error)}") from error
    try:
        if image.format in _PROGRAMS:
            raise FileFormatError(
                f"image `{name}` is a drawing ({image.format}), expected pixels", hint="save it as PNG"
            )
        _check_size(image, name, max_pixels)
        _select_frame(image, name, frame)
        _check_size(image, name, max_pixels)
        if draft_px is not None:
            draft(image, draft_px)
        decoded = decode_jpeg(image) or decode_png(image)
        if decoded is None:
            image.load()
        else:
            image = decoded
        result = ImageOps.exif_transpose(image) if exif else image
        if result.mode in _DEEP_MODES:
            result = _window_to_8_bits(result, window)
        elif result is image and hasattr(image, "seek") and getattr(image, "n_frames", 1) > 1:
            result = image.copy()  # detached from the file, which is about to be closed
        return result
    except (InputError, FileFormatError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"image `{name}` is too large: {error}", hint="scale it down first") from None
    except _DECODER_ERRORS as error:
        raise FileFormatError(f"image `{name}` is damaged: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return one line about a decoder's error: what Pillow says where it speaks to people, else the error's type."""
    text = str(error).splitlines()[0].rstrip(".") if isinstance(error, OSError | SyntaxError) and str(error) else ""
    return text if text and len(text) <= 100 and "/" not in text else type(error).__name__


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"image `{name}` has {width} × {height} pixels, more than the {max_pixels:,} allowed",
            hint="scale it down, or allow more with `max_pixels`",
        )
    if width < 1 or height < 1:
        raise FileFormatError(f"image `{name}` has no pixels ({width} × {height})")


def _select_frame(image: Image.Image, name: str, frame: int | None) -> None:
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frame is None:
        if frames > 1:
            raise InputError(
                f"image `{name}` has {frames} frames, expected one", hint="choose one with `frame=0`, or split the file"
            )
    elif not 0 <= frame < frames:
        raise InputError(f"image `{name}` has no frame {frame}; it has {frames}, counted from 0")
    elif frames > 1:
        image.seek(frame)


def _window_to_8_bits(image: Image.Image, window: tuple[float, float] | None) -> Image.Image:
    values = np.asarray(image)
    if window is None:
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    else:
        low, high = window
        if not low < high:
            raise InputError(f"window ({low}, {high}) is empty: its first value must be below its second")
    with np.errstate(invalid="ignore"):  # infinite values of an otherwise constant image
        levels = (values.astype(np.float64) - low) * 255.0 / (high - low if high > low else np.inf)
    levels = np.nan_to_num(levels, nan=0.0, posinf=255.0, neginf=0.0)
    result = Image.fromarray(np.rint(np.clip(levels, 0.0, 255.0)).astype(np.uint8))
    result.info["window"] = (low, high)
    return result


def image_digest(image: Image.Image) -> str:
    """Return the SHA-256 (hex) of an image's mode, size, palette and pixels: equal only for identical images."""
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height}".encode())
    if image.mode in ("P", "PA"):
        digest.update(bytes(image.getpalette() or ()))
    digest.update(image.tobytes())
    return digest.hexdigest()


def average_hash(image: Image.Image) -> int:
    """Return 64 bits that change little under rescaling, recompression and brightness: a filter for near-duplicates.

    The grey image is averaged to 9 × 8 cells; each bit says whether a cell is brighter than its left neighbour. The
    number of differing bits (``(a ^ b).bit_count()``) is the distance. A small one is a suspicion, not a proof: among
    1,800 chest films of children 26,214 pairs lie within 4 bits (80 films share a hash), among 1,800 tissue patches 6.
    Compare pixels before acting on it.

    References:
        N. Krawetz, Kind of Like That (dHash), 2013, http://www.hackerfactor.com/blog/?/archives/529
    """
    if image.mode in _DEEP_MODES:
        image = _window_to_8_bits(image, None)
    if image.mode in ("P", "PA"):
        image = image.convert("RGB")
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")
