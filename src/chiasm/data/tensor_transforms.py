"""What ``transforms.fit_image`` does to a Pillow image, done to tensors, so that gradients flow back to the pixels.

In: pixels in [0, 1], (batch, 3, height, width). Out: the encoder's input. Not bit-equal to Pillow's: no rounding to 8 bits
happens between the steps, and ``lanczos`` becomes the antialiased bicubic filter. On smooth images a pixel differs by less
than two grey values; ``transforms`` stays the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.data.transforms import resize_again
from chiasm.errors import InputError
from chiasm.types import Preprocess

# Luma weights of ITU-R BT.601, as Pillow converts to grey.
_LUMA = (0.299, 0.587, 0.114)


def fit_tensor(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Return the encoder's input (batch, 3, size, size) for pixels in [0, 1], differentiably.

    Args:
        pixels: (batch, 3, height, width), float32 or float64; values outside [0, 1] are cut as an 8-bit image would.
        preprocess: What the encoder declares.

    Raises:
        InputError: Another shape.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape[2:]:
        raise InputError(f"pixels must have shape (batch, 3, height, width), got {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise InputError(f"pixels must be numbers in [0, 1], got {pixels.dtype}", hint="divide bytes by 255")
    p, x = preprocess, pixels.clamp(0, 1)
    if p.cut_bottom:
        x = x[:, :, : p.kept_height(x.shape[2])]
    if p.stretch is not None:
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = (x - low) / (high - low).clamp(min=1e-6)
    if p.grey:
        weights = x.new_tensor(_LUMA).view(1, 3, 1, 1)
        x = (x * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    x = _sized(x, p)
    mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (p.mean, p.std))
    return resize_again((x - mean) / std, p)


def _sized(x: Tensor, p: Preprocess) -> Tensor:
    """Resize, pad and crop to ``picture_size``."""
    height, width = x.shape[2:]
    side = p.resized_side
    if p.resize == "squash":
        x = _resized(x, side, side, p)
    elif p.resize == "longest_pad":
        new_width, new_height = p.scaled_sides(width, height)
        extra_x, extra_y = side - new_width, side - new_height
        margins = (extra_x // 2, (extra_x + 1) // 2, extra_y // 2, (extra_y + 1) // 2)
        x = F.pad(_resized(x, new_width, new_height, p), margins, value=p.fill / 255)
    elif p.resize == "pad_square":
        square, left, top = p.pad_margins(width, height)
        margins = (left, square - width - left, top, square - height - top)
        x = _resized(F.pad(x, margins, value=p.fill / 255), side, side, p)
    else:
        longer = int(side * max(width, height) / min(width, height))
        x = _resized(x, *((side, longer) if width <= height else (longer, side)), p)
    size = p.picture_size
    if p.resize == "shortest" or x.shape[3] != size:
        left, top = p.crop_offset(x.shape[3] - size), p.crop_offset(x.shape[2] - size)
        x = x[:, :, top : top + size, left : left + size]
    return x


def _resized(x: Tensor, width: int, height: int, p: Preprocess) -> Tensor:
    if x.shape[2:] == (height, width):
        return x
    options: dict[str, Any] = {"mode": p.interpolation}
    if p.interpolation in ("bicubic", "lanczos", "bilinear"):
        options = {
            "mode": "bilinear" if p.interpolation == "bilinear" else "bicubic",
            "align_corners": False,
            "antialias": True,
        }
    elif p.interpolation == "nearest":
        options = {"mode": "nearest-exact"}
    return torch.clamp(F.interpolate(x, (height, width), **options), 0, 1)
