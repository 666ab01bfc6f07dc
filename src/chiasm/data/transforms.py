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

The order of all steps: ``cut_bottom``, ``stretch``, ``grey``, ``resize`` to ``resize_size``, ``crop`` to ``size``,
conversion to RGB, ``mean`` and ``std``, ``second_resize``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from chiasm.data.resize import area_resize
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
        """Return the tensor (3, size, size) of an ``L`` or ``RGB`` picture as :func:`fit_image` returns it.

        The second resize, where one is declared, is done here; its values may overshoot those of the picture.
        """
        import torch

        pixels = np.asarray(image)
        planes: NDArray[np.float32] = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for c in range(3):
            np.take(self._table[c], pixels if pixels.ndim == 2 else pixels[..., c], out=planes[c], mode="clip")
        return resize_again(torch.from_numpy(planes)[None], self.preprocess)[0]

    def __repr__(self) -> str:
        return f"ImageTransform({self.preprocess})"


def image_transform(preprocess: Preprocess) -> ImageTransform:
    """Return the function that turns a Pillow image into the encoder's input, float32 of shape (3, size, size)."""
    return ImageTransform(preprocess)


def resize_again(pixels: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Return normalised pixels (n, 3, picture_size, picture_size) after the second resize, where one is declared."""
    if preprocess.second_resize is None:
        return pixels
    import torch

    sides = (preprocess.size, preprocess.size)
    return torch.nn.functional.interpolate(pixels, sides, mode="bicubic", align_corners=False)


def resize_and_crop(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Return the RGB picture that the encoder sees, before the normalisation: square, of ``picture_size``."""
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
    if p.stretch is not None:
        image = _stretched(image)
    if p.grey:
        image = image.convert("L")
    elif p.rgb == "before_resize" or (p.interpolation == "area" and image.mode != "L"):
        image = _rgb_on_white(image) if p.rgb == "before_resize" else image.convert("RGB")
    side = p.resized_side
    if p.resize == "squash":
        image = _resize(image, side, side, p)
    elif p.resize == "longest_pad":
        image = _resize_and_pad(image, p)
    elif p.resize == "pad_square":
        image = _pad_and_resize(image, p)
    else:
        width, height = image.size
        short, long = min(width, height), max(width, height)
        longer = int(side * long / short)
        image = _resize(image, *((side, longer) if width <= height else (longer, side)), p)
    if p.resize == "shortest" or image.width != p.picture_size:
        image = _center_crop(image, p)
    if image.mode == "P":
        image.info.pop("transparency", None)  # Pillow would warn that it is dropped; `image` is our own copy
    try:
        return image if image.mode in ("L", "RGB") else image.convert("RGB")
    except ValueError as error:
        raise InputError(f"an image of mode {image.mode} cannot be converted to RGB") from error


def _check(p: Preprocess) -> None:
    allowed: dict[str, tuple[str | None, ...]] = {
        "resize": ("shortest", "squash", "longest_pad", "pad_square"),
        "crop": ("center", "none"),
        "interpolation": ("bicubic", "bilinear", "lanczos", "nearest", "area"),
        "rgb": ("after_resize", "before_resize"),
        "crop_rounding": (None, "even", "down"),
        "side_rounding": (None, "shorter_down", "both_down"),
        "stretch": (None, "min_max"),
        "second_resize": (None, "bicubic_tensor"),
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
    if p.resized_side < p.picture_size:
        raise ConfigError(f"`preprocess.resize_size` is {p.resize_size}, less than `preprocess.size` {p.size}")
    if p.crop == "none" and p.resized_side != p.picture_size:
        raise ConfigError(
            f'`preprocess.crop = "none"` leaves {p.resize_size} pixels where {p.size} are wanted',
            hint='use crop = "center" or drop `resize_size`',
        )
    if p.second_resize is not None and p.resize_size is None:
        raise ConfigError("`preprocess.second_resize` needs the side to resize from", hint="set `resize_size`")
    if p.side_rounding is not None and p.resize != "longest_pad":
        raise ConfigError('`preprocess.side_rounding` goes with resize = "longest_pad" only')
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


def _stretched(image: Image.Image) -> Image.Image:
    """Spread the file's own range of values, of all its channels together, over 0 to 255, rounding down."""
    pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")).astype(np.float64)
    pixels -= pixels.min()
    pixels /= pixels.max() or 1.0
    pixels *= 255
    return Image.fromarray(pixels.astype(np.uint8))


def _resize(image: Image.Image, width: int, height: int, p: Preprocess) -> Image.Image:
    if width * height > _MAX_RESIZED_PIXELS:
        raise InputError(
            f"a strip of {image.width} × {image.height} pixels would become {width} × {height}",
            hint="cut it into tiles first",
        )
    if p.interpolation == "area":
        return Image.fromarray(area_resize(np.asarray(image), width, height))
    return image.resize((width, height), Image.Resampling[p.interpolation.upper()])


def _center_crop(image: Image.Image, p: Preprocess) -> Image.Image:
    size = p.picture_size
    left, top = p.crop_offset(image.width - size), p.crop_offset(image.height - size)
    return image.crop((left, top, left + size, top + size))


def _resize_and_pad(image: Image.Image, p: Preprocess) -> Image.Image:
    """As open_clip's ``longest`` mode."""
    width, height = p.scaled_sides(*image.size)
    image = _resize(image, width, height, p)
    extra_x, extra_y = p.resized_side - width, p.resized_side - height
    return _padded(image, (extra_x // 2, extra_y // 2, (extra_x + 1) // 2, (extra_y + 1) // 2), p.fill)


def _pad_and_resize(image: Image.Image, p: Preprocess) -> Image.Image:
    """As MedCLIP does it: a small image is not enlarged, but surrounded."""
    square, left, top = p.pad_margins(*image.size)
    if square**2 > _MAX_RESIZED_PIXELS:
        raise InputError(f"a strip of {image.width} × {image.height} pixels is too long to be padded to a square")
    image = _padded(image, (left, top, square - image.width - left, square - image.height - top), p.fill)
    return _resize(image, p.resized_side, p.resized_side, p)


def _padded(image: Image.Image, border: tuple[int, int, int, int], fill: int) -> Image.Image:
    """The padding is a value of the image's own mode, a palette index say."""
    bands = len(image.getbands())
    padded = ImageOps.expand(image, border, fill=fill if bands == 1 else (fill,) * bands)
    if image.mode == "P":
        padded.putpalette(image.getpalette() or [])
    return padded
