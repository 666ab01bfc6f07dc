"""Deletion and insertion: does the score hang on the places that a map calls important?

Pixels are taken away (deletion) or brought in (insertion) in the order of a map, most important first, and the
image–text score is read after every step. A map that is right about the model makes the score fall early when its
pixels go, and rise early when they come. No box is needed: the curves judge the map against the model, not against the
truth.

Two orders stand beside every map: a random one, and from the centre outwards. A map that does not beat them says nothing
that the middle of the picture would not say.

References:
    Petsiuk, Das and Saenko 2018, "RISE", section 4.2, https://arxiv.org/abs/1806.07421. Deviations: the score is the
    cosine with a text (less that with ``against``), not a probability, so areas are compared with those of the other
    orders and have no absolute scale; what is filled in is stated and the same for all orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.errors import InputError, UnknownName
from chiasm.explain.heatmap import HeatMap
from chiasm.explain.towers import image_batch, quiet, scores, text_direction
from chiasm.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder

Fill = Literal["blur", "mean"]
FILLS = ("blur", "mean")
#: Orders that know neither image nor text.
BASELINES = ("random", "centre")
#: Width of the blur, as a share of the image's side (RISE: sigma 5 of 224 pixels, twice).
BLUR = 0.045
STEPS = 20
_BATCH = 64


@dataclass(frozen=True)
class Curves:
    """Scores while pixels go and come, of several images.

    Attributes:
        method: Whose order it is.
        deletion: float64, (images, steps + 1): the score after each step; column 0 is the whole image, the last column
            the filled one.
        insertion: The same, from the filled image to the whole one.
        fill: What stands where pixels are absent.
    """

    method: str
    deletion: NDArray[np.float64]
    insertion: NDArray[np.float64]
    fill: str

    @property
    def shares(self) -> NDArray[np.float64]:
        """Share of the pixels that were taken away or brought in at each column, 0 to 1."""
        return np.linspace(0.0, 1.0, self.deletion.shape[1])

    @property
    def deletion_area(self) -> NDArray[np.float64]:
        """Area under each deletion curve, a mean score; lower is better."""
        return np.asarray(np.trapezoid(self.deletion, self.shares, axis=1))

    @property
    def insertion_area(self) -> NDArray[np.float64]:
        """Area under each insertion curve, a mean score; higher is better."""
        return np.asarray(np.trapezoid(self.insertion, self.shares, axis=1))

    def to_dict(self) -> dict[str, Any]:
        """Return the mean curves and areas as plain JSON values."""
        return {
            "method": self.method,
            "fill": self.fill,
            "n": len(self.deletion),
            "shares": self.shares.tolist(),
            "deletion": self.deletion.mean(0).tolist(),
            "insertion": self.insertion.mean(0).tolist(),
            "deletion_area": float(self.deletion_area.mean()),
            "insertion_area": float(self.insertion_area.mean()),
        }


def deletion_insertion(
    encoder: Encoder,
    images: Sequence[Image],
    texts: Sequence[str | Sequence[str]],
    orders: Sequence[HeatMap] | Literal["random", "centre"],
    *,
    against: Sequence[Sequence[str]] | None = None,
    fill: Fill = "blur",
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Curves:
    """Return the curves of maps, or of an order that knows nothing.

    Args:
        encoder: The one whose maps these are.
        images: One per map.
        texts: One (or one ensemble) per image, as the maps were drawn for.
        orders: Maps on the images; or ``random``, or ``centre`` (nearest to the middle first).
        against: One list per image, as the maps were drawn with, or None.
        fill: ``blur`` (the image itself, blurred) or ``mean`` (the mean colour of the preprocessing).
        steps: How often pixels are taken; each time an equal share.
        seed: Of the random order and of ties.
        progress: Told after every image.

    Raises:
        InputError: Lengths that differ, or a number of steps that the input's pixels do not allow.
        UnknownName: An unknown fill or order.
    """
    _check(images, texts, orders, against, fill)
    size = encoder.preprocess_spec.size
    if not 1 <= steps <= size * size:
        raise InputError(f"steps must be 1 to {size * size}, the pixels of the model's input, got {steps}")
    keys = [
        ((t,) if isinstance(t, str) else tuple(t), tuple(against[k]) if against is not None else ())
        for k, t in enumerate(texts)
    ]
    rng = np.random.default_rng(seed)
    deleted, inserted = np.zeros((len(images), steps + 1)), np.zeros((len(images), steps + 1))
    progress = progress or SilentProgress()
    with quiet(encoder.model), torch.inference_mode():
        known = {key: text_direction(encoder, *key) for key in dict.fromkeys(keys)}
        visual = encoder.model.image_side()
        progress.start(len(images), "deleting and inserting")
        try:
            for k, image in enumerate(images):
                pixels = image_batch(encoder, [image])[0]
                order = _order(orders if isinstance(orders, str) else orders[k], size, rng)
                filled = _filled(pixels, fill)
                deleted[k] = _scores_along(visual, pixels, filled, order, known[keys[k]], steps)
                inserted[k] = _scores_along(visual, filled, pixels, order, known[keys[k]], steps)
                progress.advance()
        finally:
            progress.finish()
    name = orders if isinstance(orders, str) else (orders[0].method if orders else "none")
    return Curves(name, deleted, inserted, fill)


def _check(images: Sequence[Any], texts: Sequence[Any], orders: Any, against: Any, fill: str) -> None:
    if fill not in FILLS:
        raise UnknownName("fill", fill, FILLS)
    if isinstance(orders, str) and orders not in BASELINES:
        raise UnknownName("order", orders, BASELINES)
    counts = {
        len(images),
        len(texts),
        *(() if isinstance(orders, str) else (len(orders),)),
        *(() if against is None else (len(against),)),
    }
    if len(counts) > 1:
        raise InputError("images, texts, maps and texts against must be equally many")
    if not isinstance(orders, str):
        for k, (image, heat) in enumerate(zip(images, orders, strict=True)):
            if image.size != heat.image_size:
                raise InputError(f"map {k} belongs to an image of another size", hint="give each image its own map")


def _order(of: HeatMap | str, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the pixels of the model's input, flat, most important first; equal ones in random order."""
    tie = rng.random(size * size)
    if of == "random":
        return np.argsort(tie)
    if isinstance(of, HeatMap):
        grid = torch.from_numpy(of.values)[None, None]
        value = F.interpolate(grid, (size, size), mode="bilinear", align_corners=False)[0, 0].numpy().ravel()
    else:
        line = (np.arange(size) - (size - 1) / 2) ** 2
        value = -(line[:, None] + line[None, :]).ravel()
    return np.lexsort((tie, -value.astype(np.float64)))


def _filled(pixels: Tensor, fill: str) -> Tensor:
    if fill == "mean":
        return torch.zeros_like(pixels)  # normalised pixels: 0 is the mean colour
    size = pixels.shape[-1]
    sigma = max(1.0, BLUR * size)
    reach = min(size - 1, int(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=pixels.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(pixels.dtype).expand(3, 1, -1)
    rows = F.pad(pixels[None], (reach, reach, 0, 0), mode="reflect")
    rows = F.conv2d(rows, kernel[:, :, None, :], groups=3)
    both = F.pad(rows, (0, 0, reach, reach), mode="reflect")
    return F.conv2d(both, kernel[:, :, :, None], groups=3)[0]


def _scores_along(
    visual: nn.Module, start: Tensor, end: Tensor, order: NDArray[np.int64], direction: Tensor, steps: int
) -> NDArray[np.float64]:
    """Return the score after 0, 1 ... ``steps`` equal parts of the pixels went from ``start`` to ``end``."""
    rank = torch.empty(len(order), dtype=torch.long)
    rank[torch.from_numpy(order.copy())] = torch.arange(len(order))
    rank = rank.view(start.shape[1:]).to(start.device)
    cuts = np.rint(np.linspace(0, len(order), steps + 1)).astype(int).tolist()
    found = []
    for first in range(0, len(cuts), _BATCH):
        part = torch.tensor(cuts[first : first + _BATCH], device=start.device)
        changed = (rank[None] < part[:, None, None])[:, None]
        batch = torch.where(changed, end[None], start[None])
        found.append(scores(visual(batch), direction.expand(len(part), -1)).double().cpu().numpy())
    return np.concatenate(found)
