"""Heat maps and true boxes to scores: does the map point at the finding?

Every map is scored on its original image. Beside each number stands what chance gives: a map that points anywhere hits
the boxes as often as they cover the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import weighted_interval
from chiasm.metrics.localization import box_mask, chance_pointing, contrast_to_noise, iou_at_threshold, pointing_game
from chiasm.metrics.weighted import mean_statistic
from chiasm.types import Box, Interval

if TYPE_CHECKING:
    from chiasm.explain.heatmap import HeatMap


#: Side of the grid on which the one best place is sought.
_PLACES = 64


@dataclass(frozen=True)
class PointingScores:
    """How well heat maps find the true boxes.

    Attributes:
        pointing_game: Share of maps whose maximum lies in a box (Zhang et al. 2018). Chance is the mean share of the
            image that the boxes cover, and what a flat map scores.
        iou: Mean overlap of the boxes with the part of the map above the middle of its range; chance is that of marking
            the whole image.
        contrast_to_noise: Mean difference of the map inside and outside the boxes, over its spread; chance is 0. Maps
            without any spread, and boxes that cover the whole image, are left out.
        per_label: The pointing game of each label.
        method: Of the maps, where all have the same.
        n: Maps.
        n_flat: Maps that point nowhere.
        majority: The pointing game of one place for all maps: that which lies in most boxes, chosen with the boxes at
            hand. Places are shares of width and height.
        majority_by_label: The same with a place of its own for each label, over all maps: what knowing the text alone
            would reach.
    """

    pointing_game: Interval
    iou: Interval
    contrast_to_noise: Interval
    per_label: Mapping[str, Interval]
    method: str
    n: int
    n_flat: int
    majority: float
    majority_by_label: float

    @property
    def times_chance(self) -> float:
        """How many times chance the pointing game reaches; NaN where chance is 0."""
        chance = self.pointing_game.chance
        return self.pointing_game.value / chance if chance else float("nan")

    def table(self) -> list[tuple[str, str, str, str]]:
        """Return rows of text for print: measure, value with interval, n, chance."""
        rows = {
            "pointing game": self.pointing_game,
            "IoU": self.iou,
            "contrast to noise": self.contrast_to_noise,
            **{f"pointing game {label}": value for label, value in self.per_label.items()},
        }
        return [(name, str(v), str(v.n), "-" if v.chance is None else f"{v.chance:.3f}") for name, v in rows.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; every number is ``{"value", "low", "high", "n", "chance"}``."""
        return {
            "method": self.method,
            "pointing_game": self.pointing_game.to_dict(),
            "iou": self.iou.to_dict(),
            "contrast_to_noise": self.contrast_to_noise.to_dict(),
            "per_label": {label: {"pointing_game": value.to_dict()} for label, value in self.per_label.items()},
            "times_chance": None if np.isnan(self.times_chance) else self.times_chance,
            "n": self.n,
            "n_flat": self.n_flat,
            "majority": self.majority,
            "majority_by_label": self.majority_by_label,
        }


def score_pointing(
    heats: Sequence[HeatMap],
    boxes: Sequence[Sequence[Box]],
    *,
    labels: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> PointingScores:
    """Score heat maps against the true boxes of what they look for.

    Args:
        heats: One per image and finding.
        boxes: The true boxes of each map, in pixels of the original image; at least one each.
        labels: Label of each map; by default that of its first box.
        groups: Patient of each map; by default each map is its own.
        n_resamples: Bootstrap samples per interval.
        seed: Of the bootstrap.

    Raises:
        InputError: When lengths differ, or a map has no box inside its image.
    """
    if not heats or len(heats) != len(boxes):
        raise InputError(f"every map needs its boxes; got {len(heats)} maps and {len(boxes)} lists of boxes")
    names = [part[0].label if part else "" for part in boxes] if labels is None else list(labels)
    if len(names) != len(heats):
        raise InputError(f"{len(heats)} maps came with {len(names)} labels")
    own = [str(k) for k in range(len(heats))] if groups is None else list(groups)
    if len(own) != len(heats):
        raise InputError(f"{len(heats)} maps came with {len(own)} groups")
    hit, iou, contrast, cover = (np.zeros(len(heats)) for _ in range(4))
    for k, (heat, found) in enumerate(zip(heats, boxes, strict=True)):
        if not found:
            raise InputError(f"map {k} has no box", hint="leave out images without a box")
        cover[k] = chance_pointing(found, heat.image_size[1], heat.image_size[0])
        full = heat.to_image_size()
        hit[k] = pointing_game(full, found)
        iou[k] = iou_at_threshold(full, found)
        contrast[k] = contrast_to_noise(full, found)
    contrast[np.isinf(contrast)] = np.nan
    rows_of = {name: np.flatnonzero([n == name for n in names]) for name in dict.fromkeys(names)}
    places = np.stack(
        [np.sum([_places(heats[k], boxes[k]) for k in rows.tolist()], axis=0) for rows in rows_of.values()]
    )

    def interval(values: NDArray[np.float64], chance: float, rows: NDArray[np.intp] | None = None) -> Interval:
        kept = np.arange(len(heats)) if rows is None else rows
        statistic = mean_statistic(values[kept])
        return weighted_interval(
            statistic, [own[i] for i in kept.tolist()], n_resamples=n_resamples, seed=seed, chance=chance
        )

    methods = {heat.method for heat in heats}
    return PointingScores(
        interval(hit, float(cover.mean())),
        interval(iou, float(cover.mean())),
        interval(contrast, 0.0),
        {name: interval(hit, float(cover[rows].mean()), rows) for name, rows in rows_of.items()},
        methods.pop() if len(methods) == 1 else "several",
        len(heats),
        sum(heat.is_flat for heat in heats),
        float(places.sum(axis=0).max()) / len(heats),
        float(places.max(axis=(1, 2)).sum()) / len(heats),
    )


def _places(heat: HeatMap, boxes: Sequence[Box]) -> NDArray[np.int64]:
    """Return 1 where the boxes lie on a grid that is the same for images of every size, else 0."""
    x, y = _PLACES / heat.image_size[0], _PLACES / heat.image_size[1]
    scaled = [Box(b.x0_px * x, b.y0_px * y, b.x1_px * x, b.y1_px * y) for b in boxes]
    return box_mask(scaled, _PLACES, _PLACES).astype(np.int64)
