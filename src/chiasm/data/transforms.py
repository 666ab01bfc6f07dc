"""From a decoded image to the tensor that an encoder wants, as its ``Preprocess`` declares, bit-equal to the peers.

``rgb="after_resize"`` follows open_clip and OpenAI's CLIP, ``rgb="before_resize"`` follows transformers. The two
families differ in more than that order, and each keeps its peer's rules (``crop_rounding`` states the last one apart):

==================  ==========================================  =========================================
step                after_resize (open_clip)                    before_resize (transformers)
==================  ==========================================  =========================================
palette, 1-bit      resized by nearest neighbour                resized as RGB, with the filter
transparency        dropped after the resize                    laid on white before it
centre-crop offset  half the margin, rounded to the even pixel  half the margin, rounded down
==================  ==========================================  =========================================

The shorter side becomes ``size`` and the longer one ``int(size · long / short)``. Pillow's filters antialias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from chiasm.errors import ConfigError, InputError
from chiasm.types import Preprocess

if TYPE_CHECKING:
    import torch

_MAX_RESIZED_PIXELS = 178_956_970  # a strip of 1 × 60,000 pixels would otherwise become 224 × 13,440,000
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class ImageTransform:
    """Turns a Pillow image into a float32 tensor of shape (3, size, size). Safe to share between threads.

    Args:
        preprocess: What the encoder declares.

    Raises:
        ConfigError: The declaration contradicts itself.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        _check(preprocess)
        self.preprocess = preprocess
        # The same three float32 operations as the peers', once per grey value: bit-equal to doing them per pixel.
        unit = np.arange(256, dtype=np.float32) / np.float32(255)
        mean, std = np.array(preprocess.mean, np.float32), np.array(preprocess.std, np.float32)
        self._table = (unit - mean[:, None]) / std[:, None]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the tensor of one image.

        Raises:
            InputError: Not a Pillow image, or one of more than 8 bits, which the conversion to RGB would clip.
        """
        return self.normalize(fit_image(image, self.preprocess))

    def normalize(self, image: Image.Image) -> torch.Tensor:
        """Return the tensor (3, height, width) of an ``L`` or ``RGB`` image that already has its final size."""
        import torch

        pixels = np.asarray(image)
        planes: NDArray[np.float32] = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for c in range(3):
            np.take(self._table[c], pixels if pixels.ndim == 2 else pixels[..., c], out=planes[c], mode="clip")
        return torch.from_numpy(planes)

    def __repr__(self) -> str:
        return f"ImageTransform({self.preprocess})"


def image_transform(preprocess: Preprocess) -> ImageTransform:
    """Return the function that turns a Pillow image into the encoder's input, float32 of shape (3, size, size)."""
    return ImageTransform(preprocess)


def resize_and_crop(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Return the RGB picture that the encoder sees, before the normalisation: size × size pixels."""
    return fit_image(image, preprocess).convert("RGB")


def fit_image(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Cut, resize, crop or pad an image and convert it to ``RGB``; greyscale stays ``L``, which holds the same pixels.

    Raises:
        InputError: Not a Pillow image, one of more than 8 bits, or too long a strip.
    """
    if not isinstance(image, Image.Image):
        raise InputError(
            f"expected a Pillow image, got {type(image).__name__}", hint="use `PIL.Image.fromarray` for arrays"
        )
    if image.mode in _DEEP_MODES:
        raise InputError(
            f"an image of mode {image.mode} has more than 8 bits, which the conversion to RGB would clip",
            hint="open it with `chiasm.io.image.open_image`, which windows it to 8 bits",
        )
    p = preprocess
    if p.cut_bottom:
        image = image.crop((0, 0, image.width, p.kept_height(image.height)))
    if p.rgb == "before_resize":
        image = _rgb_on_white(image)
    resample = Image.Resampling[p.interpolation.upper()]
    if p.resize == "squash":
        image = _resize(image, p.size, p.size, resample)
    elif p.resize == "longest_pad":
        image = _resize_and_pad(image, p, resample)
    else:
        width, height = image.size
        short, long = min(width, height), max(width, height)
        longer = int(p.size * long / short)
        image = _resize(image, *((p.size, longer) if width <= height else (longer, p.size)), resample)
        image = _center_crop(image, p)
    if image.mode == "P":
        image.info.pop("transparency", None)  # Pillow would warn that it is dropped; `image` is our own copy
    try:
        return image if image.mode in ("L", "RGB") else image.convert("RGB")
    except ValueError as error:
        raise InputError(f"an image of mode {image.mode} cannot be converted to RGB") from error


def _check(p: Preprocess) -> None:
    allowed: dict[str, tuple[str | None, ...]] = {
        "resize": ("shortest", "squash", "longest_pad"),
        "crop": ("center", "none"),
        "interpolation": ("bicubic", "bilinear", "lanczos", "nearest"),
        "rgb": ("after_resize", "before_resize"),
        "crop_rounding": (None, "even", "down"),
    }
    for name, values in allowed.items():
        if getattr(p, name) not in values:
            known = ", ".join(v for v in values if v is not None)
            raise ConfigError(f"`preprocess.{name}` is `{getattr(p, name)}`", hint=f"one of: {known}")
    if p.size < 1:
        raise ConfigError(f"`preprocess.size` must be at least 1, got {p.size}")
    if p.resize == "shortest" and p.crop == "none":
        raise ConfigError(
            '`preprocess.crop = "none"` leaves images that are not square',
            hint='use resize = "squash" or "longest_pad"',
        )
    if len(p.mean) != 3 or len(p.std) != 3 or not all(s > 0 for s in p.std):
        raise ConfigError("`preprocess.mean` and `preprocess.std` need three numbers each, and every std above 0")
    if not 0 <= p.fill <= 255:
        raise ConfigError(f"`preprocess.fill` must be 0 to 255, got {p.fill}")
    if not 0 <= p.cut_bottom < 1:
        raise ConfigError(f"`preprocess.cut_bottom` must be in [0, 1), got {p.cut_bottom}")


def _rgb_on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image if image.mode == "L" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _resize(image: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    if width * height > _MAX_RESIZED_PIXELS:
        raise InputError(
            f"a strip of {image.width} × {image.height} pixels would become {width} × {height}",
            hint="cut it into tiles first",
        )
    return image.resize((width, height), resample)


def _center_crop(image: Image.Image, p: Preprocess) -> Image.Image:
    left, top = p.crop_offset(image.width - p.size), p.crop_offset(image.height - p.size)
    return image.crop((left, top, left + p.size, top + p.size))


def _resize_and_pad(image: Image.Image, p: Preprocess, resample: Image.Resampling) -> Image.Image:
    """As open_clip's ``longest`` mode; the padding is a value of the image's own mode, a palette index say."""
    ratio = max(image.width, image.height) / p.size
    width, height = (max(1, round(side / ratio)) for side in image.size)
    image = _resize(image, width, height, resample)
    extra_x, extra_y = p.size - width, p.size - height
    border = (extra_x // 2, extra_y // 2, (extra_x + 1) // 2, (extra_y + 1) // 2)
    bands = len(image.getbands())
    padded = ImageOps.expand(image, border, fill=p.fill if bands == 1 else (p.fill,) * bands)
    if image.mode == "P":
        padded.putpalette(image.getpalette() or [])
    return padded
