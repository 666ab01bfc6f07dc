"""Heat maps and curves as drawings for the pages of ``chiasm explain``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw

from chiasm.evaluate.figures import COLOURS, SOFT, WARM, draw
from chiasm.types import Box, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure
    from PIL.Image import Image

    from chiasm.explain.curves import Curves
    from chiasm.explain.heatmap import HeatMap

#: Width of a picture on a page, in pixels.
WIDTH_PX = 300
BOX_COLOUR, PEAK_COLOUR = "#56d4ff", "#ffffff"
#: Lines of the orders that know nothing.
QUIET_LINES = {"random": ("#8a8f94", (0, (1, 1.5))), "centre": (WARM, (0, (4, 2)))}


def overlay_picture(
    image: Image, heat: HeatMap | None, boxes: Sequence[Box] = (), *, width_px: int = WIDTH_PX
) -> Image:
    """Return the image with the map over it, its highest place as a cross and the true boxes as frames.

    Args:
        image: The original.
        heat: A map of this image; None draws only the boxes. A map that points nowhere has no cross.
        boxes: In pixels of the original.
        width_px: Of the picture; lines are drawn after the scaling, so they stay thin.
    """
    from chiasm.explain.heatmap import overlay

    drawn = image.convert("RGB") if heat is None else overlay(image, heat)
    scale = width_px / drawn.width
    size = (width_px, max(1, round(drawn.height * scale)))
    picture = drawn.resize(size, PilImage.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        frame = [box.x0_px * scale, box.y0_px * scale, box.x1_px * scale - 1, box.y1_px * scale - 1]
        pen.rectangle(
            [min(frame[0], frame[2]), min(frame[1], frame[3]), frame[2], frame[3]], outline=BOX_COLOUR, width=2
        )
    if heat is not None and not heat.is_flat:
        x, y = ((c + 0.5) * scale for c in heat.peak())
        for width, colour in ((4, "#000000"), (2, PEAK_COLOUR)):
            pen.line([x - 7, y, x + 7, y], fill=colour, width=width)
            pen.line([x, y - 7, x, y + 7], fill=colour, width=width)
    return picture


def curve_lines(curves: Sequence[Curves]) -> str:
    """Draw mean deletion (left) and insertion (right) curves; orders that know nothing are dashed or dotted."""

    def paint(figure: MatplotlibFigure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, name in ((left, "deletion"), (right, "insertion")):
            _paint_curves(axes, curves, name)
        left.set_ylabel("score (cosine, less that of the opposite)")
        right.legend(loc="lower right", fontsize=8)

    return draw(9.4, 3.5, paint)


def _paint_curves(axes: Axes, curves: Sequence[Curves], name: str) -> None:
    colour = 0
    for curve in curves:
        values = (curve.deletion if name == "deletion" else curve.insertion).mean(0)
        area = float((curve.deletion_area if name == "deletion" else curve.insertion_area).mean())
        label = f"{curve.method} {area:.3f}"
        if curve.method in QUIET_LINES:
            ink, dash = QUIET_LINES[curve.method]
            axes.plot(curve.shares, values, color=ink, linestyle=dash, linewidth=1.6, label=label)
        else:
            axes.plot(curve.shares, values, color=COLOURS[colour % len(COLOURS)], linewidth=2, label=label)
            colour += 1
    axes.set_title("taken away, best first" if name == "deletion" else "brought in, best first", fontsize=10)
    axes.set_xlabel("share of the pixels")
    axes.set_xlim(0, 1)
    if name == "deletion":
        axes.legend(loc="upper right", fontsize=8)


def method_dots(
    rows: Mapping[str, Mapping[str, Interval]], *, xlabel: str, chance: float | None = None, width: float = 6.2
) -> str:
    """Draw a dot with its interval for every method (rows) and set of findings (colours), and a line where chance lies."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        names = list(rows)[::-1]
        kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
        for y, name in enumerate(names):
            for k, kind in enumerate(kinds):
                number = rows[name].get(kind)
                if number is None or not np.isfinite(number.value):
                    continue
                place = y + (0.16 if k == 0 else -0.16) * (len(kinds) > 1)
                low = number.low if np.isfinite(number.low) else number.value
                high = number.high if np.isfinite(number.high) else number.value
                axes.plot([low, high], [place] * 2, color=COLOURS[k], linewidth=3, alpha=0.35, solid_capstyle="round")
                axes.plot([number.value], [place], "o", color=COLOURS[k], label=kind if y == 0 else None)
        if chance is not None:
            axes.axvline(chance, color=SOFT, linestyle=(0, (3, 2)), linewidth=1.4)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(xlabel + ("   (dashed: chance)" if chance is not None else ""))
        if len(kinds) > 1:
            axes.legend(loc="lower right", fontsize=8.5)

    return draw(width, 0.42 * len(rows) + 1.0, paint)
