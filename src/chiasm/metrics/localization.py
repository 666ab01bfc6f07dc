"""Whether a heat map points at what it should: pointing game, overlap, contrast, against boxes drawn by people.

Comes in: a heat map (height, width) in image pixels, higher is hotter, and the boxes of one finding. Goes out: plain
floats; average them over images with ``bootstrap`` to get an interval. An image without boxes gives NaN: it is left out.
A pixel belongs to a box when its centre does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.types import Box

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


def pointing_game(heat: ArrayLike, boxes: Sequence[Box], *, tolerance_px: float = 0.0) -> float:
    """Return 1.0 when the hottest pixel lies in a box, else 0.0; the share of the hottest pixels when several are equal.

    A map without any structure thus scores what chance would (:func:`chance_pointing`), on every image.

    Args:
        heat: (height, width), finite.
        boxes: Of the finding, in pixels of the map.
        tolerance_px: A pixel whose centre is at most this far outside counts as inside.

    Returns:
        A number in [0, 1]; NaN without boxes.

    Raises:
        InputError: For a map that is empty, not finite or not two-dimensional, or a box without area or outside the map.

    References:
        Zhang et al., 2018, Top-down neural attention by excitation backprop, section 4.2 (tolerance 15 pixels),
        https://arxiv.org/abs/1608.00507. Deviation: equal maxima are shared out instead of taking the first.
    """
    values = _checked(heat)
    if not boxes:
        return math.nan
    inside = box_mask(boxes, *values.shape, tolerance_px=tolerance_px)
    return float(inside[values == values.max()].mean())


def chance_pointing(boxes: Sequence[Box], height_px: int, width_px: int, *, tolerance_px: float = 0.0) -> float:
    """Return the pointing game of a random pixel: the share of the image that the boxes cover.

    Args:
        boxes: Of the finding.
        height_px: Of the image.
        width_px: Of the image.
        tolerance_px: As :func:`pointing_game`.

    Returns:
        A number in (0, 1]; NaN without boxes.
    """
    if not boxes:
        return math.nan
    return float(box_mask(boxes, height_px, width_px, tolerance_px=tolerance_px).mean())


def iou_at_threshold(heat: ArrayLike, boxes: Sequence[Box], *, threshold: float = 0.5, relative: bool = True) -> float:
    """Return intersection over union of the boxes with the pixels at or above a threshold.

    Args:
        heat: (height, width), finite.
        boxes: Of the finding; together they are one region.
        threshold: Choose it on validation data, never on the images that are scored.
        relative: The threshold is a share of the range from the map's minimum to its maximum; else a value of the map.

    Returns:
        A number in [0, 1]; 0 for a constant map with a relative threshold above 0; NaN without boxes.

    Raises:
        InputError: As :func:`pointing_game`, or for a threshold that is not finite.
    """
    values = _checked(heat)
    if not math.isfinite(threshold):
        raise InputError(f"the threshold must be a number, got {threshold}")
    if not boxes:
        return math.nan
    if relative:
        span = float(values.max() - values.min())
        values = (values - values.min()) / span if span > 0 else np.zeros_like(values)
    hot = values >= threshold
    inside = box_mask(boxes, *values.shape)
    return float((hot & inside).sum() / (hot | inside).sum())


def contrast_to_noise(heat: ArrayLike, boxes: Sequence[Box], *, absolute: bool = False) -> float:
    """Return how far the heat in the boxes stands out: difference of means over the root of the summed variances.

    Args:
        heat: (height, width), finite.
        boxes: Of the finding; together they are one region.
        absolute: Drop the sign, as the paper does; a map that is cold on the finding then looks good.

    Returns:
        A number of any sign, 0 for a constant map, ±∞ for two different constants; NaN without boxes or when they cover
        the whole map.

    Raises:
        InputError: As :func:`pointing_game`.

    References:
        Boecking et al., 2022, BioViL, section 4.2, https://arxiv.org/abs/2204.09817. Deviation: signed by default.
    """
    values = _checked(heat)
    if not boxes:
        return math.nan
    inside = box_mask(boxes, *values.shape)
    if inside.all():
        return math.nan
    inner, outer = values[inside], values[~inside]
    difference = float(inner.mean() - outer.mean())
    # Rounding must not make noise out of a constant, nor contrast out of a constant map.
    variances = [0.0 if part.min() == part.max() else float(part.var()) for part in (inner, outer)]
    if values.min() == values.max():
        return 0.0
    noise = math.sqrt(sum(variances))
    contrast = difference / noise if noise > 0 else math.copysign(math.inf, difference)
    return abs(contrast) if absolute else contrast


def box_mask(boxes: Sequence[Box], height_px: int, width_px: int, *, tolerance_px: float = 0.0) -> Booleans:
    """Return which pixels lie in any of the boxes, shape (height, width).

    Args:
        boxes: In pixels; parts outside the image are cut off. A box too small to hold the centre of a pixel takes the
            pixel that it lies in.
        height_px: Of the image.
        width_px: Of the image.
        tolerance_px: Pixels whose centre is at most this far from a box belong to it.

    Raises:
        InputError: For an empty image, a negative tolerance, or a box without area or outside the image.
    """
    if height_px < 1 or width_px < 1 or tolerance_px < 0:
        raise InputError(
            f"an image of {height_px} × {width_px} with a tolerance of {tolerance_px} has no pixels in boxes"
        )
    mask = np.zeros((height_px, width_px), dtype=bool)
    x: Floats = np.arange(width_px, dtype=np.float64) + 0.5
    y: Floats = np.arange(height_px, dtype=np.float64) + 0.5
    for box in boxes:
        edges = (box.x0_px, box.y0_px, box.x1_px, box.y1_px)
        if not all(map(math.isfinite, edges)) or box.x1_px <= box.x0_px or box.y1_px <= box.y0_px:
            raise InputError(f"a box must have x0 < x1 and y0 < y1, got {edges}")
        if box.x1_px <= 0 or box.y1_px <= 0 or box.x0_px >= width_px or box.y0_px >= height_px:
            raise InputError(
                f"a box {edges} lies outside the image of {width_px} × {height_px} pixels",
                hint="scale boxes together with the image",
            )
        columns = _distance(x, max(box.x0_px, 0), min(box.x1_px, width_px))
        rows = _distance(y, max(box.y0_px, 0), min(box.y1_px, height_px))
        if tolerance_px:
            mask |= np.hypot(rows[:, None], columns[None, :]) <= tolerance_px
        mask |= (rows[:, None] == 0) & (columns[None, :] == 0)
    return mask


def _distance(centres: Floats, low: float, high: float) -> Floats:
    """Return how far each centre is from [low, high); at least one centre is at 0."""
    distance = np.maximum(np.maximum(low - centres, centres - high), 0.0)
    # The far edge is exclusive: a centre on it belongs to the next box.
    distance[centres == high] = np.finfo(np.float64).tiny
    if not (distance == 0).any():
        distance[min(int((low + high) / 2), len(centres) - 1)] = 0.0
    return distance


def _checked(heat: ArrayLike) -> Floats:
    values = np.asarray(heat, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise InputError(f"a heat map must have shape (height, width), got {values.shape}")
    if not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values)).sum())} of {values.size} pixels of the heat map are not finite")
    return values
