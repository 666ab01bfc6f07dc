"""A map over an image of how much each place supports a text, and its drawing.

A method gives values on the model's own grid. The model saw the image resized and cropped; :class:`HeatMap` knows which
part of the ORIGINAL image that was (its *view*), so that maps, boxes and overlays share the original's pixels.
torch is not needed here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.types import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

View = tuple[float, float, float, float]

#: Inferno (Smith and van der Walt, CC0), 17 evenly spaced colours: lightness rises evenly.
_INFERNO = np.array(
    [
        [0, 0, 4], [11, 7, 36], [33, 12, 74], [61, 9, 101], [87, 16, 110], [113, 25, 110], [138, 34, 106],
        [163, 44, 97], [188, 55, 84], [210, 70, 68], [228, 90, 49], [241, 115, 29], [249, 142, 9], [252, 172, 17],
        [249, 203, 53], [242, 234, 105], [252, 255, 164],
    ],
    dtype=np.float32,
)  # fmt: skip


@dataclass(frozen=True)
class HeatMap:
    """Support of a text at every place of an image.

    Attributes:
        values: float32, shape (rows, columns), on the model's grid; larger supports the text more. The unit depends on
            the method; only the order within one map has a meaning.
        image_size: Width and height of the original image, in pixels.
        view: Left, top, right and bottom of what the model saw, in pixels of the original image; padding of the model's
            input lies outside the image.
        method: Which method drew it.
        text: What was looked for.
        against: Texts that it was set against.
        cosine: Of the whole image with the text (less that with ``against``).
        encoder: Name of the encoder.
    """

    values: NDArray[np.float32]
    image_size: tuple[int, int]
    view: View
    method: str
    text: str
    against: tuple[str, ...] = ()
    cosine: float = float("nan")
    encoder: str = ""

    def __post_init__(self) -> None:
        values = np.ascontiguousarray(self.values, dtype=np.float32)
        object.__setattr__(self, "values", values)
        if values.ndim != 2 or 0 in values.shape:
            raise InputError(f"a heat map must have shape (rows, columns), got {values.shape}")
        if not np.isfinite(values).all():
            raise InputError(
                f"{int((~np.isfinite(values)).sum())} of {values.size} values of the heat map are not finite",
                hint="check the weights of the model and the pixels of the image",
            )

    @property
    def is_flat(self) -> bool:
        """Whether all values are equal, so that the map points nowhere."""
        return bool(self.values.max() == self.values.min())

    def to_image_size(self) -> NDArray[np.float32]:
        """Return the map on the original image, float32, shape (height, width).

        Values are interpolated between cell centres. Where the model did not look, the map has its least value.
        """
        width, height = self.image_size
        x0, y0, x1, y1 = self.view
        rows, columns = self.values.shape
        y_mix, y_seen = _mixing(height, rows, y0, y1)
        x_mix, x_seen = _mixing(width, columns, x0, x1)
        full = y_mix @ self.values @ x_mix.T
        least = self.values.min()
        result: NDArray[np.float32] = np.where(y_seen[:, None] & x_seen[None, :], full, least).astype(np.float32)
        return result

    def peak(self) -> tuple[int, int]:
        """Return the pixel (x, y) of the original image where the map is highest (ties: the first in reading order)."""
        full = self.to_image_size()
        y, x = np.unravel_index(int(full.argmax()), full.shape)
        return int(x), int(y)

    def smoothed(self, sigma_cells: float = 0.5) -> HeatMap:
        """Return the map blurred by a Gaussian whose width is given in cells of the grid."""
        if sigma_cells <= 0:
            return self
        rows, columns = (_gaussian(size, sigma_cells) for size in self.values.shape)
        blurred: NDArray[np.float32] = (rows @ self.values @ columns.T).astype(np.float32)
        return dataclasses.replace(self, values=blurred)

    def scaled(self) -> NDArray[np.float32]:
        """Return the map on the original image, scaled so that its own range is 0 to 1 (a flat map gives zeros)."""
        full = self.to_image_size()
        low, high = float(self.values.min()), float(self.values.max())
        if high <= low:
            return np.zeros_like(full)
        scaled: NDArray[np.float32] = np.clip((full - low) / (high - low), 0.0, 1.0).astype(np.float32)
        return scaled

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "method": self.method,
            "text": self.text,
            "against": list(self.against),
            "cosine": None if np.isnan(self.cosine) else self.cosine,
            "encoder": self.encoder,
            "image_size": list(self.image_size),
            "view": list(self.view),
            "peak": list(self.peak()),
            "values": self.values.tolist(),
        }


def _mixing(pixels: int, cells: int, start: float, end: float) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the matrix (pixels, cells) of linear interpolation along one axis, and which pixels were seen."""
    centres = np.arange(pixels) + 0.5
    seen = (centres > start) & (centres < end)
    position = np.clip((centres - start) / (end - start) * cells - 0.5, 0, cells - 1)
    below = np.minimum(position.astype(np.int64), cells - 1)
    above = np.minimum(below + 1, cells - 1)
    share = (position - below).astype(np.float32)
    mix = np.zeros((pixels, cells), dtype=np.float32)
    rows = np.arange(pixels)
    mix[rows, below] += 1 - share
    mix[rows, above] += share
    return mix, seen


def _gaussian(size: int, sigma: float) -> NDArray[np.float32]:
    """Return the matrix (size, size) of a Gaussian blur whose rows sum to 1, so that edges are not darkened."""
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    result: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return result


def model_view(preprocess: Preprocess, image_size: tuple[int, int]) -> View:
    """Return what part of an image the model sees: left, top, right, bottom, in pixels of the original.

    Args:
        preprocess: The encoder's declaration.
        image_size: Width and height of the original.

    The rounding is the peers': the longer side is truncated, the crop is centred as the encoder declares. With
    ``longest_pad`` and ``pad_square`` the view is larger than the image; what ``cut_bottom`` takes away lies outside the
    view or in its padding.
    """
    width, height = image_size[0], preprocess.kept_height(image_size[1])
    size, side = preprocess.picture_size, preprocess.resized_side
    left = top = float(preprocess.crop_offset(side - size))
    if preprocess.resize == "squash":
        new_width = new_height = float(side)
    elif preprocess.resize == "longest_pad":
        new_width, new_height = preprocess.scaled_sides(width, height)
        left, top = left - (side - new_width) // 2, top - (side - new_height) // 2
    elif preprocess.resize == "pad_square":
        square, x, y = preprocess.pad_margins(width, height)
        new_width, new_height = width * side / square, height * side / square
        left, top = left - x * side / square, top - y * side / square
    else:
        shortest = min(width, height)
        new_width = side if width == shortest else int(side * width / shortest)
        new_height = side if height == shortest else int(side * height / shortest)
        left = preprocess.crop_offset(int(new_width) - size)
        top = preprocess.crop_offset(int(new_height) - size)
    new_width, new_height = max(1, new_width), max(1, new_height)
    corners = left * width / new_width, top * height / new_height
    return *corners, (left + size) * width / new_width, (top + size) * height / new_height


def overlay(image: Image, heat: HeatMap, *, alpha: float = 0.6, style: Literal["glow", "film"] = "glow") -> Image:
    """Return the image with the map drawn over it, in RGB at the image's own size.

    Args:
        image: The original image.
        heat: A map of this image.
        alpha: Opacity of the colours where the map is highest, 0 to 1.
        style: ``glow`` fades the colours out where the map is low, so the image stays readable; ``film`` keeps the
            same opacity everywhere.

    Raises:
        InputError: When the map belongs to an image of another size, or alpha is out of range.
    """
    from PIL import Image as PilImage

    if image.size != heat.image_size:
        raise InputError(
            f"the map belongs to an image of {heat.image_size[0]} × {heat.image_size[1]} pixels, "
            f"got one of {image.width} × {image.height}"
        )
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in [0, 1], got {alpha}")
    scaled = heat.scaled()
    weight = alpha * (scaled if style == "glow" else np.ones_like(scaled))
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    mixed = pixels * (1 - weight[..., None]) + colours(scaled) * weight[..., None]
    return PilImage.fromarray(np.rint(mixed).astype(np.uint8), "RGB")


def colours(scaled: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the inferno colours (…, 3), 0 to 255, of values in 0 to 1."""
    stops = np.linspace(0, 1, len(_INFERNO))
    return np.stack([np.interp(scaled, stops, _INFERNO[:, k]) for k in range(3)], axis=-1).astype(np.float32)
