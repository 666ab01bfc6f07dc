"""Two heat maps that fail at different findings, added: what gradients and attention say, and what occlusion says.

In: what every method gets. Out: a map on a grid of at most ``FINEST`` cells a side. Each map is enlarged bilinearly, brought
to mean 0 and deviation 1 picture by picture (their units have nothing in common), the two are added, and the sum is
smoothed by ``SMOOTHING`` of the side, so that the maximum is a place and not a pixel of one of them.

Not from a paper: sums of standardised maps are common practice. docs/lab-notes.md, 2026-11-21, has what the sum points at
beside each of the two. It costs an occlusion map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import InputError
from chiasm.explain.gradients import attention_relevance, layer_cam
from chiasm.explain.occlusion import occlusion_maps
from chiasm.explain.towers import natural_method

#: Cells a side of the sum, at most.
FINEST = 64
#: Standard deviation of the smoothing, as a share of the side.
SMOOTHING = 0.03
_PARTNERS = {"attention": attention_relevance, "layer_cam": layer_cam}


def can_combine(visual: nn.Module) -> bool:
    """Return whether a tower has a map of its own kind beside occlusion."""
    return natural_method(visual) in _PARTNERS


def combined_maps(visual: nn.Module, pixels: Tensor, directions: Tensor) -> Tensor:
    """Return the standardised sum of the tower's own map and of occlusion: (batch, cells, cells).

    Args:
        visual: Image tower in eval mode: CLIP's ViT or ResNet.
        pixels: (batch, 3, size, size), normalised.
        directions: (batch, dim), one a picture.

    Raises:
        InputError: The tower has no map but occlusion.
    """
    partner = _PARTNERS.get(natural_method(visual))
    if partner is None:
        raise InputError(
            "method `combined` needs CLIP's ViT or its ResNet, whose own map it adds to occlusion",
            hint="take `occlusion`",
        )
    cells = min(FINEST, pixels.shape[-1])
    found = [partner(visual, pixels, directions), occlusion_maps(visual, pixels, directions)]
    with torch.inference_mode():
        return _smoothed(sum((_standardised(one, cells) for one in found), torch.zeros(())))


def _standardised(maps: Tensor, cells: int) -> Tensor:
    """Return maps of (batch, cells, cells) with mean 0 and deviation 1 each; a flat one stays flat."""
    large = F.interpolate(maps.detach().float()[:, None], size=(cells, cells), mode="bilinear", align_corners=False)[
        :, 0
    ]
    centred = large - large.mean(dim=(1, 2), keepdim=True)
    spread = centred.pow(2).mean(dim=(1, 2), keepdim=True).sqrt()
    return centred / torch.where(spread > 1e-12, spread, torch.ones_like(spread))


def _smoothed(maps: Tensor) -> Tensor:
    """Return maps after a Gaussian of ``SMOOTHING`` of their side, mirrored at the border so that no edge is favoured."""
    sigma = SMOOTHING * maps.shape[-1]
    reach = min(max(1, round(3 * sigma)), maps.shape[-1] - 1)
    if reach < 1:
        return maps
    offsets = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    padded = F.pad(maps[:, None], (reach,) * 4, mode="reflect")
    rows = F.conv2d(padded, weights.view(1, 1, -1, 1))
    return F.conv2d(rows, weights.view(1, 1, 1, -1))[:, 0]
