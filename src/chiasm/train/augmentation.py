"""Augmentation of whole batches: the fields of ``Augment`` as a few tensor operations over all images at once.

Comes in: bytes of a batch (n, height, width) or (n, height, width, 3) at the model's size, a generator. Goes out:
float32 (n, 3, size, size), normalised. Without augmentation it is bit for bit what ``data.transforms.image_transform``
makes of an image that has the model's size already.

Deviations from ``data.augment.Augmentation``, which works on one Pillow image at its full resolution: crops are cut
from the resized image by bilinear sampling, so a crop of 90 % is a little softer; half of the images of a batch are
blurred, all equally; hue and saturation are linear in RGB instead of HSV.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from chiasm.data.transforms import resize_again
from chiasm.types import Preprocess

if TYPE_CHECKING:
    from chiasm.data.augment import Augment

# Luma weights of ITU-R BT.601, as Pillow converts to grey.
_LUMA = (0.299, 0.587, 0.114)
# Optical density of haematoxylin, eosin and DAB, one stain a row (Ruifrok and Johnston 2001, table 1).
_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


class BatchTransform:
    """Turn bytes into normalised pixels, augmented when ``rng`` is given.

    Args:
        preprocess: Mean, standard deviation and size.
        augment: None: never augment.
    """

    def __init__(self, preprocess: Preprocess, augment: Augment | None = None) -> None:
        self.preprocess = preprocess
        self.augment = augment
        self._mean = torch.tensor(preprocess.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocess.std).view(1, 3, 1, 1)

    def __call__(self, images: NDArray[np.uint8], rng: np.random.Generator | None = None) -> Tensor:
        """Return (n, 3, size, size) float32."""
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        values = pixels.float().div_(255)
        if self.augment is not None and rng is not None:
            values = augment_batch(values, self.augment, rng, fill=self.preprocess.fill / 255)
        return resize_again(values.expand(-1, 3, -1, -1).sub(self._mean).div_(self._std), self.preprocess)


def augment_batch(values: Tensor, augment: Augment, rng: np.random.Generator, *, fill: float = 0.0) -> Tensor:
    """Return changed copies of images in [0, 1], (n, 1 or 3, size, size); each draws its own strengths.

    Colour fields (saturation, hue, stain) do nothing to grey images.

    Args:
        values: The images.
        augment: Largest deviations.
        rng: The only source of randomness.
        fill: Value of corners that a rotation uncovers.
    """
    n = len(values)
    affine = _draw_affine(augment, n, rng)
    if affine is not None:
        where = _grid(affine, values.shape[-1])
        if fill:
            values = F.grid_sample(values - fill, where, mode="bilinear", align_corners=False) + fill
        else:
            values = F.grid_sample(values, where, mode="bilinear", align_corners=False)
    is_rgb = values.shape[1] == 3
    if is_rgb and augment.stain:
        values = _restain(values, augment.stain, rng)
    if augment.brightness:
        values = (values * _column(rng.uniform(1 - augment.brightness, 1 + augment.brightness, n))).clamp(0, 1)
    if augment.contrast:
        mean = values.mean(dim=(1, 2, 3), keepdim=True)
        values = (values - mean) * _column(rng.uniform(1 - augment.contrast, 1 + augment.contrast, n)) + mean
    if is_rgb and (augment.saturation or augment.hue):
        values = _recolour(values, augment, rng)
    if augment.blur:
        values = _blur(values, augment.blur, rng)
    if augment.noise:
        strength = _column(rng.uniform(0, augment.noise, n))
        values = values + torch.from_numpy(rng.standard_normal(values.shape, np.float32)) * strength
    return values.clamp(0, 1)


def _column(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1)


def _draw_affine(augment: Augment, n: int, rng: np.random.Generator) -> Tensor | None:
    """Return (n, 2, 3), which maps places of the output to places of the input, both in [-1, 1]; None: identity."""
    low, high = augment.crop_scale
    is_still = (low, high) == (1.0, 1.0) and not (augment.rotate_deg or augment.translate)
    if is_still and not (augment.horizontal_flip or augment.vertical_flip or augment.quarter_turns):
        return None
    side = np.sqrt(rng.uniform(low, high, n))
    angle = np.deg2rad(rng.uniform(-augment.rotate_deg, augment.rotate_deg, n))
    if augment.quarter_turns:
        angle = angle + rng.integers(0, 4, n) * (math.pi / 2)
    shift = rng.uniform(-1, 1, (n, 2)) * ((1 - side)[:, None] + 2 * augment.translate)
    flip_x = np.where(rng.random(n) < 0.5, -1.0, 1.0) if augment.horizontal_flip else np.ones(n)
    flip_y = np.where(rng.random(n) < 0.5, -1.0, 1.0) if augment.vertical_flip else np.ones(n)
    cos, sin = np.cos(angle) * side, np.sin(angle) * side
    matrix = np.stack(
        [
            np.stack([cos * flip_x, -sin * flip_y, shift[:, 0]], 1),
            np.stack([sin * flip_x, cos * flip_y, shift[:, 1]], 1),
        ],
        1,
    )
    return torch.from_numpy(matrix.astype(np.float32))


def _grid(affine: Tensor, size: int) -> Tensor:
    """Return what ``F.affine_grid`` returns for square images, by sums instead of its slow products with K = 3."""
    centres = (torch.arange(size) * 2 + 1) / size - 1
    columns = affine[:, :, 0, None] * centres  # (n, 2, size)
    rows = affine[:, :, 1, None] * centres + affine[:, :, 2, None]
    where = torch.empty(len(affine), size, size, 2)
    for axis in range(2):
        torch.add(rows[:, axis, :, None], columns[:, axis, None, :], out=where[..., axis])
    return where


def _mix(values: Tensor, matrices: Tensor) -> Tensor:
    """Return each image with its channels mixed by its own 3 × 3 matrix."""
    return torch.bmm(matrices, values.flatten(2)).view_as(values)


def _recolour(values: Tensor, augment: Augment, rng: np.random.Generator) -> Tensor:
    """Change saturation and turn the hue: a blend with grey, then a rotation about the grey axis."""
    n = len(values)
    strength = torch.from_numpy(rng.uniform(1 - augment.saturation, 1 + augment.saturation, n).astype(np.float32))
    turn = rng.uniform(-augment.hue, augment.hue, n) * 2 * math.pi
    grey = torch.tensor(_LUMA).expand(3, 3)
    saturate = strength.view(-1, 1, 1) * torch.eye(3) + (1 - strength).view(-1, 1, 1) * grey
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cos, sin = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    rotate = cos * np.eye(3) + (1 - cos) * axis + sin * cross
    return _mix(values, torch.from_numpy(rotate.astype(np.float32)) @ saturate)


def _restain(values: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Scale the amount of each stain; white stays white (Tellez et al. 2018, without the additive term)."""
    stains = torch.tensor(_STAINS)
    amounts = torch.from_numpy(rng.uniform(1 - strength, 1 + strength, (len(values), 3, 1)).astype(np.float32))
    density = -torch.log(values.clamp(min=0.5 / 255))
    return torch.exp(-_mix(density, stains.T @ (amounts * torch.linalg.inv(stains.T))))


def _blur(values: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    """Blur half of the images with a Gaussian of up to ``sigma`` pixels, one strength per batch."""
    drawn = float(rng.uniform(0.1, max(sigma, 0.1)))
    chosen = _column((rng.random(len(values)) < 0.5).astype(np.float64))
    radius = max(1, math.ceil(2.5 * drawn))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / drawn) ** 2)
    taps = taps / taps.sum()
    channels = values.shape[1]
    padded = F.pad(values, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    blurred = F.conv2d(rows, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return values + chosen * (blurred - values)
