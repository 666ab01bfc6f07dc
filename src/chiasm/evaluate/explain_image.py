"""One image, several texts, several methods, side by side: the maps with what can be said of each.

Comes in: an encoder, an image, texts, and boxes where they are known. Goes out: an :class:`ImageExplanation` of panels,
one a text and method. With boxes a panel has its scores; with curves, how the model's score falls and rises.
One image proves nothing about a method: ``evaluate.explain_scores`` scores methods on many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from chiasm.errors import InputError
from chiasm.metrics.localization import chance_pointing, contrast_to_noise, iou_at_threshold, pointing_game
from chiasm.types import Box

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder
    from chiasm.explain.curves import Curves
    from chiasm.explain.heatmap import HeatMap


@dataclass(frozen=True)
class BoxScores:
    """What one map says of the boxes.

    Attributes:
        hit: The pointing game, 0 to 1.
        chance: Share of the image that the boxes cover.
        iou: Of the part above the middle of the map's range.
        contrast: Contrast to noise; infinite for a map without noise.
    """

    hit: float
    chance: float
    iou: float
    contrast: float

    def to_dict(self) -> dict[str, float | None]:
        """Return plain JSON values."""
        values = {"pointing_game": self.hit, "chance": self.chance, "iou": self.iou, "contrast_to_noise": self.contrast}
        return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True)
class Panel:
    """One map: a text by a method.

    Attributes:
        heat: The map.
        boxes: Its scores against the boxes, where these are known.
        curves: Its deletion and insertion curves, where these were asked for.
    """

    heat: HeatMap
    boxes: BoxScores | None = None
    curves: Curves | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the map's own numbers."""
        document = self.heat.to_dict()
        document["rows"], document["columns"] = self.heat.values.shape
        del document["values"]
        return {
            **document,
            "is_flat": self.heat.is_flat,
            "boxes": None if self.boxes is None else self.boxes.to_dict(),
            "curves": None if self.curves is None else self.curves.to_dict(),
        }


@dataclass(frozen=True)
class ImageExplanation:
    """All panels of one image.

    Attributes:
        image: The original.
        texts: What was looked for, one a row of panels.
        methods: One a column.
        rows: (texts, methods).
        boxes: True ones, or none.
        baselines: Curves of ``random`` and ``centre`` for each text, where curves were asked for.
    """

    image: Image
    texts: tuple[str, ...]
    methods: tuple[str, ...]
    rows: tuple[tuple[Panel, ...], ...]
    boxes: tuple[Box, ...] = ()
    baselines: tuple[tuple[Curves, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "width_px": self.image.width,
            "height_px": self.image.height,
            "texts": list(self.texts),
            "methods": list(self.methods),
            "boxes": [[b.x0_px, b.y0_px, b.x1_px, b.y1_px] for b in self.boxes],
            "maps": [panel.to_dict() for row in self.rows for panel in row],
            "baselines": [[curve.to_dict() for curve in row] for row in self.baselines],
        }


def explain_image(
    encoder: Encoder,
    image: Image,
    texts: Sequence[str],
    *,
    methods: Sequence[str] | Literal["all"] = "all",
    against: Sequence[str] = (),
    boxes: Sequence[Box] = (),
    curves: bool = False,
    steps: int = 20,
    fill: Literal["blur", "mean"] = "blur",
    seed: int = 0,
) -> ImageExplanation:
    """Return the maps of every text by every method.

    Args:
        encoder: Draws the maps.
        image: Of any size and mode.
        texts: At least one.
        methods: Names, or ``all`` that the encoder's towers can serve.
        against: Texts that say the opposite, of all texts; method ``gloria`` does without.
        boxes: Where the finding of all texts lies.
        curves: Whether to draw deletion and insertion curves.
        steps: Of the curves.
        fill: Of the curves.
        seed: Of the random order.

    Raises:
        InputError: No text, or a method that the towers cannot serve.
    """
    from chiasm.explain.curves import deletion_insertion
    from chiasm.explain.methods import choose_method, explain, methods_for

    if not texts:
        raise InputError("a heat map needs a text, got none")
    names = methods_for(encoder) if methods == "all" else tuple(choose_method(encoder, cast(Any, m)) for m in methods)
    names = tuple(dict.fromkeys(names))
    options: dict[str, Any] = {"fill": fill, "steps": steps, "seed": seed}

    def curve(text: str, order: Any, opposite: Sequence[str]) -> Curves:
        return deletion_insertion(encoder, [image], [text], order, against=[opposite], **options)

    rows, baselines = [], []
    for text in texts:
        panels = []
        for name in names:
            opposite = () if name == "gloria" else tuple(against)
            heat = explain(encoder, image, text, method=cast(Any, name), against=opposite)
            drawn = curve(text, [heat], against) if curves else None
            panels.append(Panel(heat, score_boxes(heat, boxes) if boxes else None, drawn))
        rows.append(tuple(panels))
        if curves:
            baselines.append(tuple(curve(text, order, against) for order in ("random", "centre")))
    return ImageExplanation(image, tuple(texts), names, tuple(rows), tuple(boxes), tuple(baselines))


def score_boxes(heat: HeatMap, boxes: Sequence[Box]) -> BoxScores:
    """Return how one map stands to the boxes of its image."""
    full = heat.to_image_size()
    width, height = heat.image_size
    return BoxScores(
        pointing_game(full, boxes),
        chance_pointing(boxes, height, width),
        iou_at_threshold(full, boxes),
        contrast_to_noise(full, boxes),
    )
