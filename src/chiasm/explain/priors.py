"""Maps that know neither image nor text: what every heat map must beat.

A finding in medicine seldom lies at the border, so a bump in the middle of the picture is right more often than a random
place. A method is worth something where it beats both.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.explain.heatmap import HeatMap

#: Cells of a prior map along each side.
CELLS = 15
#: Width of the bump in the middle, as a share of the image's side.
SPREAD = 0.25


def centre_map(image_size: tuple[int, int], *, text: str = "") -> HeatMap:
    """Return a Gaussian bump in the middle of an image of this width and height, in pixels."""
    return _map(image_size, centre_values(), "centre", text)


def random_map(image_size: tuple[int, int], *, text: str = "", seed: int = 0) -> HeatMap:
    """Return independent uniform numbers on an image of this width and height, in pixels."""
    values = np.random.default_rng(seed).random((CELLS, CELLS)).astype(np.float32)
    return _map(image_size, values, "random", text)


def centre_values() -> NDArray[np.float32]:
    """Return the bump on its grid, float32 (cells, cells), 1 in the middle."""
    line = ((np.arange(CELLS) + 0.5) / CELLS - 0.5) / SPREAD
    values: NDArray[np.float32] = np.exp(-0.5 * (line[:, None] ** 2 + line[None, :] ** 2)).astype(np.float32)
    return values


def _map(image_size: tuple[int, int], values: NDArray[np.float32], method: str, text: str) -> HeatMap:
    width, height = image_size
    if width < 1 or height < 1:
        raise InputError(f"an image of {width} × {height} pixels has no map")
    return HeatMap(values, (width, height), (0.0, 0.0, float(width), float(height)), method, text)
