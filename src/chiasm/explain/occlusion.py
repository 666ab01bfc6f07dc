"""Occlusion: how much the image–text cosine falls when a window is covered (Zeiler and Fergus 2014, section 4.2).

It needs nothing from the tower but its output, so it explains any encoder, at the price of many passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chiasm.errors import InputError
from chiasm.explain.towers import scores

_BATCH = 64


def occlusion_maps(
    visual: nn.Module, pixels: Tensor, directions: Tensor, *, window_px: int | None = None, stride_px: int | None = None
) -> Tensor:
    """Return the mean fall of the cosine over all windows that cover a cell: (batch, cells, cells).

    Args:
        visual: Image tower in eval mode.
        pixels: (batch, 3, size, size), normalised; windows are covered with 0, the mean colour of the preprocessing.
        directions: (batch, dim), one a picture.
        window_px: Side of the window; by default two cells.
        stride_px: Step of the window and side of a cell; it divides the image. By default about an eighth of it.

    Raises:
        InputError: When window or stride do not fit the image.
    """
    tower: Any = visual
    size = pixels.shape[-1]
    stride = _default_stride(size) if stride_px is None else stride_px
    window = min(size, 2 * stride) if window_px is None else window_px
    if not 1 <= stride <= window <= size or size % stride:
        raise InputError(
            f"occlusion needs a stride that divides the {size} pixels of the image and a window from one stride to the "
            f"whole image, got a stride of {stride} and a window of {window}"
        )
    cells = size // stride
    reach = -(-window // stride)
    starts = range(1 - reach, cells)
    with torch.inference_mode():
        whole = scores(tower(pixels), directions)
        fall = torch.zeros(len(pixels), cells, cells, device=pixels.device)
        times = torch.zeros(cells, cells, device=pixels.device)
        places = [(top, left) for top in starts for left in starts]
        for start in range(0, len(places), _BATCH):
            part = places[start : start + _BATCH]
            for b in range(len(pixels)):
                covered = pixels[b].expand(len(part), -1, -1, -1).clone()
                for k, (top, left) in enumerate(part):
                    rows, columns = _span(top, stride, window, size), _span(left, stride, window, size)
                    covered[k, :, rows, columns] = 0
                lost = whole[b] - scores(tower(covered), directions[b])
                for k, (top, left) in enumerate(part):
                    fall[b, max(0, top) : top + reach, max(0, left) : left + reach] += lost[k]
            for top, left in part:
                times[max(0, top) : top + reach, max(0, left) : left + reach] += 1
        return fall / times


def _default_stride(size: int) -> int:
    return max(s for s in range(1, max(1, size // 8) + 1) if size % s == 0)


def _span(first: int, stride: int, window: int, size: int) -> slice:
    return slice(max(0, first * stride), min(size, first * stride + window))
