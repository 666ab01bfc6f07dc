"""JPEG pixels by simplejpeg (libjpeg-turbo without Pillow's detours), where it is installed and gives Pillow's bits.

Comes in: a JPEG that Pillow has opened, so its header is read and its size checked, but that is not decoded. Goes out:
an image whose pixels are a NumPy array already, or None where Pillow should decode: simplejpeg is absent, the file is
neither plain grey nor plain RGB or YCbCr, the decoder says anything but yes (a damaged file, too: then Pillow decides
what of it counts, as it always did), or the file is far longer than its pixels.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import numpy as np
from PIL import Image, ImageFile

from chiasm.io.decoded import DecodedImage, bytes_of

#: A longer file than its raw pixels and this is left to Pillow, which does not read it whole.
_SLACK_BYTES = 4 << 20
_COLOURS = {"L": ("GRAY", ("Gray",)), "RGB": ("RGB", ("YCbCr", "RGB"))}


def draft(image: Image.Image, side_px: int) -> None:
    """Let a JPEG that is not decoded yet be decoded smaller, both sides no shorter than ``side_px``. Lossy.

    Does nothing to other formats, to decoded images, and to those that are less than twice as large: Pillow's own
    ``draft`` would do nothing either, but would keep :func:`decode_jpeg` away.
    """
    if isinstance(image, ImageFile.ImageFile) and image.format == "JPEG" and min(image.size) >= 2 * side_px:
        image.draft(None, (side_px, side_px))


@functools.cache
def _decoder() -> ModuleType | None:
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def decode_jpeg(image: Image.Image) -> DecodedImage | None:
    """Return the decoded form of a JPEG that Pillow has opened and not loaded, or None: let Pillow decode it.

    Slow but exact settings: accurate DCT, smooth upsampling of the colours, as in Pillow. Strict: what libjpeg warns of
    is refused here, and Pillow then repairs or refuses it.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.format != "JPEG" or image.mode not in _COLOURS:
        return None
    decoder = _decoder()
    if decoder is None or getattr(image, "decoderconfig", None):
        return None  # a drafted image has a decoder configuration
    colour, spaces = _COLOURS[image.mode]
    width, height = image.size
    data = bytes_of(image, at_most=width * height * 3 + _SLACK_BYTES)
    if data is None:
        return None
    try:
        # Asked first: the decoder allocates what its own reading of the header says, which must be what was checked.
        promised = decoder.decode_jpeg_header(data)
        if promised[:2] != (height, width) or promised[2] not in spaces:
            return None
        pixels = decoder.decode_jpeg(data, colour, fastdct=False, fastupsample=False)
    except (ValueError, MemoryError, RuntimeError):
        return None
    if pixels.dtype != np.uint8 or pixels.shape != (height, width, len(image.mode)):
        return None
    return DecodedImage.of(pixels[..., 0] if image.mode == "L" else pixels, image)
