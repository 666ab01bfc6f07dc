"""Random variations of training images that keep what their texts say true.

They are drawn from a given NumPy generator, so a sample, an epoch and a seed fix the picture. All work on 8-bit Pillow
images before the normalisation; greyscale stays one channel. With every knob off the result equals that of
``image_transform`` bit for bit.

A report says "left" and "right": nothing that mirrors is on by default, and the presets for patients' bodies never
mirror. A patch of tissue has no side, so its preset may.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from chiasm.data.transforms import ImageTransform, fit_image
from chiasm.errors import ConfigError, UnknownName
from chiasm.types import Preprocess

if TYPE_CHECKING:
    import torch

# Optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001, table 1).
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


@dataclass(frozen=True)
class Augment:
    """How much training images may vary. Every value is the largest deviation; 0 (or False) switches it off.

    Attributes:
        crop_scale: Smallest and largest share of the area that a random crop keeps, in (0, 1].
        rotate_deg: Rotation to either side, in degrees; uncovered corners get the preprocessing's ``fill``.
        translate: Shift in either direction, as a share of the side.
        brightness: Factor 1 ± this on all grey values.
        contrast: Factor 1 ± this on the distance from the image's mean.
        saturation: Factor 1 ± this on the distance from grey. No effect on greyscale.
        hue: Turn of the colour wheel by ± this share of a full turn, up to 0.5. No effect on greyscale.
        stain: Factor 1 ± this on the amounts of haematoxylin, eosin and DAB; white stays white. No effect on greyscale.
        horizontal_flip: Mirror left and right half of the time.
        vertical_flip: Mirror top and bottom half of the time.
        quarter_turns: Turn by 0, 90, 180 or 270 degrees.
        blur: Largest standard deviation of a Gaussian blur, in pixels of the model's input.
        noise: Largest standard deviation of Gaussian noise, as a share of the grey range.

    Raises:
        ConfigError: A value outside its range; the message names the field.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    rotate_deg: float = 0.0
    translate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    stain: float = 0.0
    horizontal_flip: bool = False
    vertical_flip: bool = False
    quarter_turns: bool = False
    blur: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"`augment.crop_scale` must rise within (0, 1], got {low} to {high}")
        largest = {"rotate_deg": 180.0, "hue": 0.5, "blur": math.inf}
        for field in dataclasses.fields(self):
            value, limit = getattr(self, field.name), largest.get(field.name, 1.0)
            if isinstance(value, int | float) and not 0 <= value <= limit:
                raise ConfigError(f"`augment.{field.name}` must be 0 to {limit:g}, got {value}")

    @classmethod
    def preset(cls, name: str) -> Augment:
        """Return the variations that suit a kind of image: ``chest``, ``ct-mr``, ``histology`` or ``none``.

        Raises:
            UnknownName: No preset has this name.
        """
        if name not in PRESETS:
            raise UnknownName("augmentation", name, PRESETS, hint=f"one of: {', '.join(PRESETS)}")
        return PRESETS[name]

    @property
    def keeps_laterality(self) -> bool:
        """Whether left stays left: nothing mirrors, and no rotation reaches a quarter turn."""
        return not (self.horizontal_flip or self.vertical_flip or self.quarter_turns) and self.rotate_deg < 90

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


#: Chosen by eye to stay within what differs between two films or slides of one case; recipes may change any of them.
PRESETS: dict[str, Augment] = {
    "none": Augment(crop_scale=(1.0, 1.0)),
    "chest": Augment(crop_scale=(0.85, 1.0), rotate_deg=8.0, translate=0.04, brightness=0.15, contrast=0.15),
    "ct-mr": Augment(crop_scale=(0.85, 1.0), rotate_deg=6.0, translate=0.03, brightness=0.1, contrast=0.15),
    "histology": Augment(
        crop_scale=(0.7, 1.0),
        brightness=0.1,
        contrast=0.1,
        saturation=0.1,
        stain=0.2,
        horizontal_flip=True,
        vertical_flip=True,
        quarter_turns=True,
    ),
}


def augmentation(augment: Augment, preprocess: Preprocess) -> Augmentation:
    """Return the training counterpart of ``image_transform``: image and generator in, float32 (3, size, size) out."""
    return Augmentation(augment, preprocess)


class Augmentation:
    """A random transform with the preprocessing of an encoder. Safe to share between threads.

    Args:
        augment: How much images may vary.
        preprocess: What the encoder declares; resizing and conversion follow its rules.
    """

    def __init__(self, augment: Augment, preprocess: Preprocess) -> None:
        self.augment = augment
        self.preprocess = preprocess
        self._transform = ImageTransform(preprocess)

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> torch.Tensor:
        """Return the tensor of one variation; the generator decides which."""
        return self._transform.normalize(self.picture(image, generator))

    def picture(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """Return one variation as an ``L`` or ``RGB`` image of ``picture_size``, before the normalisation."""
        a = self.augment
        image = _flipped(self._placed(image, generator), a, generator)
        if a.stain and image.mode == "RGB":
            image = _restained(image, 1 + generator.uniform(-a.stain, a.stain, 3))
        if a.brightness or a.contrast:
            image = _relit(
                image,
                1 + generator.uniform(-a.brightness, a.brightness),
                1 + generator.uniform(-a.contrast, a.contrast),
            )
        if (a.saturation or a.hue) and image.mode == "RGB":
            image = _recoloured(
                image, 1 + generator.uniform(-a.saturation, a.saturation), generator.uniform(-a.hue, a.hue)
            )
        if a.blur:
            image = image.filter(ImageFilter.GaussianBlur(generator.uniform(0, a.blur)))
        if a.noise:
            image = _noisy(image, generator.uniform(0, a.noise), generator)
        return image

    def _placed(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """Scale the image to more than the final size, turn and shift it, and cut a window of the final size."""
        a, size = self.augment, self.preprocess.picture_size
        side = round(size / math.sqrt(generator.uniform(*a.crop_scale)))
        larger = self.preprocess
        if larger.resize_size is not None:
            larger = dataclasses.replace(larger, resize_size=round(larger.resize_size * side / size))
        view = fit_image(image, dataclasses.replace(larger, size=side))
        if a.rotate_deg or a.translate:
            angle = generator.uniform(-a.rotate_deg, a.rotate_deg)
            shift = generator.uniform(-a.translate, a.translate, 2) * side
            fill = self.preprocess.fill
            view = view.rotate(
                angle,
                Image.Resampling.BILINEAR,
                translate=(float(shift[0]), float(shift[1])),  # type: ignore[arg-type]  # Pillow takes fractions too
                fillcolor=fill if view.mode == "L" else (fill,) * 3,
            )
        left, top = (int(v) for v in generator.integers(0, side - size, 2, endpoint=True))
        return view.crop((left, top, left + size, top + size))


def _flipped(image: Image.Image, a: Augment, generator: np.random.Generator) -> Image.Image:
    if a.horizontal_flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if a.vertical_flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if a.quarter_turns and (turns := int(generator.integers(4))):
        way = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)[turns - 1]
        image = image.transpose(way)
    return image


def _relit(image: Image.Image, brightness: float, contrast: float) -> Image.Image:
    """Scale the grey values, then their distance from the image's mean, in one table."""
    counts = np.array(image.histogram()).reshape(-1, 256).sum(0)
    levels = np.arange(256) * brightness
    mean = float((counts * levels).sum() / counts.sum())
    table = np.clip(np.rint((levels - mean) * contrast + mean), 0, 255).astype(np.uint8)
    return image.point(table.tolist() * len(image.getbands()))


def _recoloured(image: Image.Image, saturation: float, hue: float) -> Image.Image:
    if saturation != 1:
        image = Image.blend(image.convert("L").convert("RGB"), image, saturation)
    shift = round(hue * 256) % 256
    if shift:
        h, s, v = image.convert("HSV").split()
        image = Image.merge("HSV", (h.point([(i + shift) % 256 for i in range(256)]), s, v)).convert("RGB")
    return image


@cache
def _densities() -> NDArray[np.float32]:
    """Optical density of each grey value; black gets that of half a grey value."""
    return -np.log(np.maximum(np.arange(256), 0.5) / 255).astype(np.float32)


def _restained(image: Image.Image, amounts: NDArray[np.float64]) -> Image.Image:
    """Multiply the amount of each stain: unmix the optical density, scale, mix again, all as one 3 × 3 matrix.

    References:
        A. C. Ruifrok, D. A. Johnston, Quantification of histochemical staining by color deconvolution, 2001.
        D. Tellez et al., Whole-slide mitosis detection in H&E breast histology, 2018 (the augmentation). Deviation: no
        additive term, so that an empty background stays white.
    """
    matrix = (np.linalg.inv(_STAINS) * amounts) @ _STAINS
    density = _densities()[np.asarray(image)] @ matrix.astype(np.float32)
    pixels = np.rint(255 * np.exp(-density))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _noisy(image: Image.Image, deviation: float, generator: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image)
    noise = generator.standard_normal(pixels.shape, dtype=np.float32) * np.float32(255 * deviation)
    return Image.fromarray(np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8))
