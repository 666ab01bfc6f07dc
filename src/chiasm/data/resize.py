"""Resizing 8-bit pixels by area, as OpenCV's ``INTER_AREA`` does it, derived from its definition.

Shrinking: a pixel of the result is the mean of the rectangle that it covers, cut pixels counting by their share.
Enlarging: each source pixel keeps its own square of the result, and only a result pixel that lies across the border of
two source pixels mixes them, by the shares of it that they cover. Both are separable, and rounded once, half to even.

Deviation: OpenCV adds in single precision or, for factors of two and for enlarging, in fixed point; the result differs
by at most 1 of 255, where the exact value lies beside a half.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def area_resize(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Return pixels (height, width) or (height, width, channels) of another size.

    Args:
        pixels: uint8, (rows, columns) or (rows, columns, channels).
        width: Columns of the result, at least 1.
        height: Rows of the result, at least 1.

    References:
        OpenCV ``cv::resize`` with ``INTER_AREA``; where one side shrinks and the other grows, OpenCV interpolates along
        both as it does for enlarging.
    """
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    along = _covered if width <= columns and height <= rows else _mixed
    tall = along(pixels.astype(np.float64), height)
    wide = along(np.swapaxes(tall, 0, 1), width)
    result: NDArray[np.uint8] = np.rint(np.clip(np.swapaxes(wide, 0, 1), 0, 255)).astype(np.uint8)
    return result


def _covered(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Return the means of ``size`` equal stretches of the first axis, from differences of the running sum."""
    length = len(values)
    sums = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    edges = np.arange(size + 1) * length / size
    whole = np.minimum(edges.astype(np.int64), length - 1)
    share = (edges - whole).reshape(-1, *(1,) * (values.ndim - 1))
    at_edges = sums[whole] + share * values[whole]
    means: NDArray[np.float64] = np.diff(at_edges, axis=0) * (size / length)
    return means


def _mixed(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Return each stretch as a mixture of the source pixel where it begins and the next one."""
    length = len(values)
    first = np.arange(size) * length // size
    share = np.arange(1, size + 1) - (first + 1) * (size / length)
    share = np.where(share <= 0, 0.0, share - np.floor(share))
    share = share.reshape(-1, *(1,) * (values.ndim - 1))
    following = np.minimum(first + 1, length - 1)
    mixed: NDArray[np.float64] = (1 - share) * values[first] + share * values[following]
    return mixed
