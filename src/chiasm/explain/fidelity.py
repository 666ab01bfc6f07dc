"""Does a map depend on what the model learnt? The randomised-weights check.

A method that draws the same map for a trained model and for one with shuffled weights shows the image (its edges, its
centre), not the model. The check draws maps with both and compares them.

References:
    Adebayo et al. 2018, "Sanity Checks for Saliency Maps", https://arxiv.org/abs/1810.03292. Deviation: weights are
    shuffled within each tensor, which keeps their distribution, instead of drawn anew; the text tower is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.errors import InputError
from chiasm.explain.methods import METHODS, MethodName, choose_method
from chiasm.explain.towers import image_batch, quiet, text_direction

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder

#: A method passes when maps of shuffled weights explain less than half of the rank variance of the trained ones.
PASS_BELOW = 0.7


@dataclass(frozen=True)
class FidelityReport:
    """How alike the maps of trained and of shuffled weights are.

    Attributes:
        method: Which method was checked.
        rank_correlation: Spearman correlation of each pair of maps, one per image and seed; 0 for flat maps.
        structural_similarity: SSIM of each pair, after scaling each map to 0..1.
        seeds: Of the shuffled weights.
    """

    method: str
    rank_correlation: tuple[float, ...]
    structural_similarity: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def mean_rank_correlation(self) -> float:
        """Mean of the absolute correlations; near 0 for a method that follows the weights."""
        return float(np.mean(np.abs(self.rank_correlation)))

    @property
    def mean_structural_similarity(self) -> float:
        """Mean SSIM."""
        return float(np.mean(self.structural_similarity))

    @property
    def passes(self) -> bool:
        """Whether the mean absolute rank correlation is below 0.7 (less than half of the rank variance is shared)."""
        return self.mean_rank_correlation < PASS_BELOW

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "method": self.method,
            "mean_rank_correlation": self.mean_rank_correlation,
            "mean_structural_similarity": self.mean_structural_similarity,
            "passes": self.passes,
            "n": len(self.rank_correlation),
            "seeds": list(self.seeds),
        }


def randomisation_check(
    encoder: Encoder,
    images: Sequence[Image],
    texts: Sequence[str | Sequence[str]],
    *,
    method: MethodName = "auto",
    seeds: Sequence[int] = (0,),
    batch_size: int = 16,
) -> FidelityReport:
    """Draw maps with trained and with shuffled weights of the image tower and compare them.

    Args:
        encoder: Left as it is; a copy of its image tower is shuffled.
        images: At least one.
        texts: One (or one ensemble) per image.
        method: What ``explain`` accepts.
        seeds: One shuffling per seed.
        batch_size: Images per pass.

    Raises:
        InputError: When images and texts do not match, or no seed was given.
    """
    if not images or len(images) != len(texts):
        raise InputError(
            f"the check needs as many texts as images, and at least one; got {len(images)} and {len(texts)}"
        )
    if not seeds:
        raise InputError("the check needs at least one seed")
    name = choose_method(encoder, method)
    keys = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    correlations, similarities = [], []
    with quiet(encoder.model):
        known = {key: text_direction(encoder, key) for key in dict.fromkeys(keys)}
        directions = torch.stack([known[key] for key in keys])
        pixels = image_batch(encoder, images)
        trained = _draw(encoder.model.image_side(), pixels, directions, name, batch_size)
        for seed in seeds:
            shuffled = _draw(shuffle_weights(encoder.model.image_side(), seed), pixels, directions, name, batch_size)
            for a, b in zip(trained, shuffled, strict=True):
                correlations.append(rank_correlation(a, b))
                similarities.append(structural_similarity(a, b))
    return FidelityReport(name, tuple(correlations), tuple(similarities), tuple(seeds))


def shuffle_weights(module: nn.Module, seed: int) -> nn.Module:
    """Return a copy whose parameters and running statistics are permuted within each tensor."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.is_floating_point() and tensor.numel() > 1:
                order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
                tensor.copy_(tensor.flatten()[order].view_as(tensor))
    return other


def rank_correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return Spearman's correlation of two maps (ties share their mean rank); 0 when one of them is flat."""
    from scipy.stats import rankdata

    x, y = rankdata(a.ravel()), rankdata(b.ravel())
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 0.0


def structural_similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return the mean SSIM of two maps, each scaled to 0..1; -1 to 1.

    References:
        Wang et al. 2004, equation 13, with its constants. The Gaussian window has σ = 1.5 cells and is renormalised at
        the edges, because maps can be smaller than its usual 11 cells.
    """
    x, y = _unit_range(a), _unit_range(b)
    rows, columns = (_window(size) for size in x.shape)

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return rows @ values @ columns.T

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(ssim.mean())


def _draw(
    visual: nn.Module, pixels: Tensor, directions: Tensor, method: str, batch_size: int
) -> list[NDArray[np.float32]]:
    found: list[NDArray[np.float32]] = []
    for start in range(0, len(pixels), batch_size):
        part = slice(start, start + batch_size)
        found.extend(METHODS[method](visual, pixels[part], directions[part]).float().cpu().numpy())
    return found


def _unit_range(values: NDArray[np.float32]) -> NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    scaled: NDArray[np.float64] = (values.astype(np.float64) - low) / (high - low if high > low else 1.0)
    return scaled


def _window(size: int) -> NDArray[np.float64]:
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    weights = np.exp(-0.5 * (distance / 1.5) ** 2)
    result: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return result
