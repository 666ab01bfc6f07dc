"""A decoded image that stays an array until Pillow is asked to work on it.

Pillow keeps RGB in four bytes a pixel, so that an array becomes an image, and an image an array, by a copy each. A model's
preprocessing needs neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile


class DecodedImage(Image.Image):
    """An ``L`` or ``RGB`` image made of an array; an ordinary Pillow image from the first thing that Pillow does to it.

    Use :func:`pixels_of` to read the pixels without that copy.
    """

    _pixels: NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, pixels: NDArray[np.uint8], source: Image.Image) -> DecodedImage:
        """Return an image with the mode, size, format and metadata of ``source`` and these pixels."""
        image = cls()
        image._mode, image._size = source.mode, source.size
        image.format, image.format_description = source.format, source.format_description
        image.info = dict(source.info)
        image._pixels = pixels
        return image

    def load(self) -> Any:
        """Hand the pixels to Pillow; called by Pillow before it touches them."""
        pixels = self._pixels
        if pixels is not None:
            plain = Image.fromarray(pixels)
            self.im, self.readonly = plain.im, plain.readonly
            self._pixels = None  # they would grow stale when the image is drawn upon
        return super().load()


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an ``L`` or ``RGB`` image, (height, width) or (height, width, 3); not to be written to."""
    pixels = image._pixels if isinstance(image, DecodedImage) else None
    return np.asarray(image) if pixels is None else pixels


def bytes_of(image: ImageFile.ImageFile, *, at_most: int) -> bytes | None:
    """Return the file of an image that Pillow has opened and not loaded; None if it is longer than ``at_most``."""
    stream = image.fp
    if stream is None:
        return None
    place = stream.tell()
    try:
        stream.seek(0)
        data = stream.read(at_most + 1)
    finally:
        stream.seek(place)
    return data if len(data) <= at_most else None
