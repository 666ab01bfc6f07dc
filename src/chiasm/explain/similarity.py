"""Patch–text similarity: how well the vector of each patch fits the text.

No gradient is needed; one pass of the tower serves any number of texts. It works for every tower that gives patch
vectors in the joint space (``patch_features``, ``patch_tokens``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Width of BioViL's blur, in cells of the grid.
BIOVIL_SIGMA = 1.5


def patch_vectors(visual: nn.Module, pixels: Tensor) -> Tensor:
    """Return the unit vector of every patch in the joint space: (batch, rows, columns, dim), float32.

    Raises:
        InputError: When the tower has no patch vectors.
    """
    tower: Any = visual
    with torch.inference_mode():
        vectors: Tensor = tower.patch_features(pixels)
        return F.normalize(vectors.float(), dim=-1)


def patch_text_maps(visual: nn.Module, pixels: Tensor, directions: Tensor) -> Tensor:
    """Return the cosine of every patch with its image's text: (batch, rows, columns).

    Args:
        visual: Image tower in eval mode.
        pixels: (batch, 3, size, size).
        directions: (batch, dim), one a picture; see ``towers.text_direction``.
    """
    vectors = patch_vectors(visual, pixels)
    with torch.inference_mode():
        return torch.einsum("brcd,bd->brc", vectors, directions.to(vectors))


def biovil_maps(visual: nn.Module, pixels: Tensor, directions: Tensor) -> Tensor:
    """Return :func:`patch_text_maps` blurred as BioViL publishes it: (batch, rows, columns).

    References:
        Boecking et al. 2022; microsoft/hi-ml, hi-ml-multimodal: ``scipy.ndimage.gaussian_filter`` with sigma 1.5 cells,
        which mirrors the map at its borders.
    """
    from scipy.ndimage import gaussian_filter

    maps = patch_text_maps(visual, pixels, directions).cpu().numpy()
    blurred = np.stack([gaussian_filter(m, sigma=BIOVIL_SIGMA, order=0) for m in maps]) if len(maps) else maps
    return torch.from_numpy(blurred)
