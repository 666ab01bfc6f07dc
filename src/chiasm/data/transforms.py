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

from chiasm.data import bicubic
from chiasm.data.bicubic import Placement
from chiasm.data.resize import area_resize
from chiasm.errors import ConfigError, InputError
from chiasm.io.decoded import pixels_of
from chiasm.io.jpeg import draft
from chiasm.types import Preprocess

if TYPE_CHECKING:
    import torch

_MAX_RESIZED_PIXELS = 178_956_970  # a strip of 1 × 60,000 pixels would otherwise become 224 × 13,440,000
_CROPPED = ("shortest", "squash")  # what else is resized is padded too
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class ImageTransform:
    """Turns a Pillow image into a float32 tensor of shape (3, size, size). Safe to share between threads.

    Bicubic reductions of 8-bit greyscale and RGB run in compiled code that has Pillow's bits (:mod:`chiasm.data.bicubic`),
    the normalisation is a look-up table; every other image and filter takes Pillow.

    Args:
        preprocess: What the encoder declares.
        fast: Lossy, for JPEGs only: those of at least four times ``resized_side`` on both sides are decoded at a half, a
            quarter or an eighth of their size (``PIL.Image.Image.draft``), but no smaller than twice ``resized_side``.
            Measured on 2048 × 2048 pixels, before the normalisation: at most 6/255 (mean 0.3) on phantom films and tissue,
            10/255 (mean 0.7) where the reduction does not divide the sides, 23/255 (mean 0.9) on thin white lines.
            It works on files that ``PIL.Image.open`` has opened and nobody has loaded, which stay small afterwards;
            for ``chiasm.io.image.open_image`` pass ``draft_px=transform.draft_px``.

    Raises:
        ConfigError: The declaration contradicts itself.
    """

    def __init__(self, preprocess: Preprocess, *, fast: bool = False) -> None:
        _check(preprocess)
        self.preprocess = preprocess
        self.fast = fast
        # The same three float32 operations as the peers', once per grey value: bit-equal to doing them per pixel.
        unit = np.arange(256, dtype=np.float32) / np.float32(255)
        mean, std = np.array(preprocess.mean, np.float32), np.array(preprocess.std, np.float32)
        self._table = (unit - mean[:, None]) / std[:, None]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the tensor of one image."""
        return 3, self.preprocess.size, self.preprocess.size

    @property
    def draft_px(self) -> int | None:
        """Side in pixels that a JPEG decoded smaller keeps at least; None unless ``fast``."""
        return 2 * self.preprocess.resized_side if self.fast else None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the tensor of one image.

        Raises:
            InputError: Not a Pillow image, or one of more than 8 bits, which the conversion to RGB would clip.
        """
        import torch

        out = np.empty(self.shape, np.float32)
        self.into(image, out)
        return torch.from_numpy(out)

    def into(self, image: Image.Image, out: NDArray[np.float32]) -> None:
        """Write the tensor of one image into ``out``, a row of a batch say; the same bits as calling the transform.

        Args:
            image: As for calling it. The interpreter lock is released while the image is resized and normalised.
            out: float32 of :attr:`shape`, writable; fastest when it is C-contiguous.

        Raises:
            InputError: As for calling it, or ``out`` does not fit.
        """
        if not (isinstance(out, np.ndarray) and out.dtype == np.float32 and out.shape == self.shape):
            got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise InputError(f"`out` must be a float32 array of shape {self.shape}, got {got}")
        if not out.flags.writeable:
            raise InputError("`out` cannot be written to")
        p = self.preprocess
        if self.draft_px is not None and isinstance(image, Image.Image):
            draft(image, self.draft_px)
        image = _prepared(image, p)
        if p.second_resize is None and p.resize in _CROPPED and _is_compiled(image, p):
            placement = _placement(image, p)
            if bicubic.resize_to_planes(pixels_of(image), placement, table=self._table, out=out):
                return
        picture = _fitted(image, p)
        if p.second_resize is None:
            self._look_up(picture, out)
        else:
            out[...] = self.normalize(picture).numpy()

    def normalize(self, image: Image.Image) -> torch.Tensor:
        """Return the tensor (3, size, size) of an ``L`` or ``RGB`` picture as :func:`fit_image` returns it.

        The second resize, where one is declared, is done here; its values may overshoot those of the picture.
        """
        import torch

        planes: NDArray[np.float32] = np.empty((3, image.height, image.width), dtype=np.float32)
        self._look_up(image, planes)
        return resize_again(torch.from_numpy(planes)[None], self.preprocess)[0]

    def _look_up(self, image: Image.Image, planes: NDArray[np.float32]) -> None:
        pixels = pixels_of(image)
        for c in range(3):
            np.take(self._table[c], pixels if pixels.ndim == 2 else pixels[..., c], out=planes[c], mode="clip")

    def __repr__(self) -> str:
        return f"ImageTransform({self.preprocess}{', fast=True' if self.fast else ''})"


def image_transform(preprocess: Preprocess, *, fast: bool = False) -> ImageTransform:
    """Return the function that turns a Pillow image into the encoder's input, float32 of shape (3, size, size)."""
    return ImageTransform(preprocess, fast=fast)


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
    return _fitted(_prepared(image, preprocess), preprocess)


def _prepared(image: Image.Image, p: Preprocess) -> Image.Image:
    """Everything before the resize; refuses what cannot be prepared."""
    if not isinstance(image, Image.Image):
        raise InputError(
            f"expected a Pillow image, got {type(image).__name__}", hint="use `PIL.Image.fromarray` for arrays"
        )
    if image.mode in _DEEP_MODES:
        raise InputError(
            f"an image of mode {image.mode} has more than 8 bits, which the conversion to RGB would clip",
            hint="open it with `chiasm.io.image.open_image`, which windows it to 8 bits",
        )
    if p.cut_bottom:
        image = image.crop((0, 0, image.width, p.kept_height(image.height)))
    if p.stretch is not None:
        image = _stretched(image)
    if p.grey:
        return image.convert("L")
    if p.rgb == "before_resize":
        return _rgb_on_white(image)
    return image.convert("RGB") if p.interpolation == "area" and image.mode != "L" else image


def _fitted(image: Image.Image, p: Preprocess) -> Image.Image:
    """The resize and what follows it, up to ``L`` or ``RGB``."""
    if p.resize in _CROPPED:
        image = _resize(image, _placement(image, p), p)
    else:
        image = _resize_and_pad(image, p) if p.resize == "longest_pad" else _pad_and_resize(image, p)
        if image.width != p.picture_size:
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


def _placement(image: Image.Image, p: Preprocess) -> Placement:
    """Where ``shortest`` and ``squash`` put an image.

    Raises:
        InputError: Too long a strip.
    """
    size, width, height = p.picture_size, p.resized_side, p.resized_side
    if p.resize == "shortest":
        longer = int(p.resized_side * max(image.size) / min(image.size))
        width, height = (width, longer) if image.width <= image.height else (longer, height)
    _check_pixels(image, width, height)
    return Placement(width, height, p.crop_offset(width - size), p.crop_offset(height - size), size, size)


def _check_pixels(image: Image.Image, width: int, height: int) -> None:
    if width * height > _MAX_RESIZED_PIXELS:
        raise InputError(
            f"a strip of {image.width} × {image.height} pixels would become {width} × {height}",
            hint="cut it into tiles first",
        )


def _is_compiled(image: Image.Image, p: Preprocess) -> bool:
    return p.interpolation == "bicubic" and image.mode in ("L", "RGB") and bicubic.available()


def _resize(image: Image.Image, placement: Placement, p: Preprocess) -> Image.Image:
    width, height, left, top, kept_width, kept_height = placement
    if _is_compiled(image, p):
        pixels = bicubic.resize(pixels_of(image), placement)
        if pixels is not None:
            picture = Image.fromarray(pixels)
            picture.info = image.info.copy()
            return picture
    if p.interpolation == "area":
        image = Image.fromarray(area_resize(np.asarray(image), width, height))
    else:
        image = image.resize((width, height), Image.Resampling[p.interpolation.upper()])
    return image.crop((left, top, left + kept_width, top + kept_height))


def _resize_whole(image: Image.Image, width: int, height: int, p: Preprocess) -> Image.Image:
    _check_pixels(image, width, height)
    return _resize(image, Placement(width, height, 0, 0, width, height), p)


def _center_crop(image: Image.Image, p: Preprocess) -> Image.Image:
    size = p.picture_size
    left, top = p.crop_offset(image.width - size), p.crop_offset(image.height - size)
    return image.crop((left, top, left + size, top + size))


def _resize_and_pad(image: Image.Image, p: Preprocess) -> Image.Image:
    """As open_clip's ``longest`` mode."""
    width, height = p.scaled_sides(*image.size)
    image = _resize_whole(image, width, height, p)
    extra_x, extra_y = p.resized_side - width, p.resized_side - height
    return _padded(image, (extra_x // 2, extra_y // 2, (extra_x + 1) // 2, (extra_y + 1) // 2), p.fill)


def _pad_and_resize(image: Image.Image, p: Preprocess) -> Image.Image:
    """As MedCLIP does it: a small image is not enlarged, but surrounded."""
    square, left, top = p.pad_margins(*image.size)
    if square**2 > _MAX_RESIZED_PIXELS:
        raise InputError(f"a strip of {image.width} × {image.height} pixels is too long to be padded to a square")
    image = _padded(image, (left, top, square - image.width - left, square - image.height - top), p.fill)
    return _resize_whole(image, p.resized_side, p.resized_side, p)


def _padded(image: Image.Image, border: tuple[int, int, int, int], fill: int) -> Image.Image:
    """The padding is a value of the image's own mode, a palette index say."""
    bands = len(image.getbands())
    padded = ImageOps.expand(image, border, fill=fill if bands == 1 else (fill,) * bands)
    if image.mode == "P":
        padded.putpalette(image.getpalette() or [])
    return padded
