"""Drawings of a suite: the table of models × tasks in colour, and the models of one data set with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chiasm.evaluate.figures import ACCENT, COLOURS, INK, SOFT, WARM, draw
from chiasm.types import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

#: Models of one panel that get a colour of their own.
MOST_COLOURS = len(COLOURS) - 1


@dataclass(frozen=True)
class HeatCell:
    """One cell of the coloured table.

    Attributes:
        value: The number; NaN: no result.
        shade: 0 (what chance gives) to 1 (perfect).
        best: Whether corrected tests call it better than every other in its column.
    """

    value: float
    shade: float
    best: bool = False


def shade_of(value: float, chance: float | None, *, lower: bool) -> float:
    """Return how far a number lies from chance to perfect, in [0, 1]."""
    if not math.isfinite(value):
        return math.nan
    if lower:
        return float(np.clip(1 - value / 0.5, 0, 1))
    floor = 0.0 if chance is None or not math.isfinite(chance) or chance >= 1 else chance
    return float(np.clip((value - floor) / (1 - floor), 0, 1))


def heat_table(rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], HeatCell]) -> str:
    """Draw models × columns in shades of one colour, with the numbers in it; a frame marks a proven best."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        shades = np.full((len(rows), len(columns)), np.nan)
        for r, row in enumerate(rows):
            for c, column in enumerate(columns):
                cell = cells.get((row, column))
                if cell is not None:
                    shades[r, c] = cell.shade
        axes.imshow(shades, cmap="BuGn", vmin=0, vmax=1.35, aspect="auto", interpolation="nearest")
        for r, row in enumerate(rows):
            for c, column in enumerate(columns):
                cell = cells.get((row, column))
                if cell is None or not math.isfinite(cell.value):
                    text, ink = ("–" if cell is not None else ""), SOFT
                else:
                    text, ink = f"{cell.value:.2f}", "#ffffff" if cell.shade > 0.85 else INK
                best = cell is not None and cell.best
                axes.text(
                    c, r, text, ha="center", va="center", color=ink, fontsize=10, weight="bold" if best else "normal"
                )
                if best:
                    axes.plot(
                        [c - 0.46, c + 0.46, c + 0.46, c - 0.46, c - 0.46],
                        [r - 0.44, r - 0.44, r + 0.44, r + 0.44, r - 0.44],
                        color=WARM,
                        linewidth=2,
                    )
        axes.grid(visible=False)
        axes.set_xticks(range(len(columns)), columns, fontsize=9)
        axes.set_yticks(range(len(rows)), rows)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    longest = max(len(line) for column in columns for line in column.split("\n"))
    width = max(4.6, 1.2 + len(columns) * max(0.8, 0.085 * longest + 0.15))
    return draw(width, 0.42 * len(rows) + 0.7, paint)


def model_dots(
    panels: Mapping[str, Mapping[str, Interval]], *, xlabels: Mapping[str, str], models: Sequence[str]
) -> str:
    """Draw one panel a task: a dot with its interval a model, the same colour everywhere; dashed: chance."""
    colour = {m: COLOURS[k % MOST_COLOURS] if len(models) > 1 else ACCENT for k, m in enumerate(models)}

    def paint(figure: MatplotlibFigure) -> None:
        many = min(len(panels), 3)
        lines = -(-len(panels) // many)
        grid = np.atleast_1d(figure.subplots(lines, many, squeeze=False)).ravel()
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for place, (axes, (task, intervals)) in enumerate(zip(grid, panels.items(), strict=False)):
            names = list(models)[::-1]
            for row, name in enumerate(names):
                number = intervals.get(name)
                if number is None or not math.isfinite(number.value):
                    axes.text(
                        0.02,
                        row,
                        "no result",
                        fontsize=8,
                        color=SOFT,
                        va="center",
                        transform=axes.get_yaxis_transform(),
                    )
                    continue
                low = number.low if math.isfinite(number.low) else number.value
                high = number.high if math.isfinite(number.high) else number.value
                axes.plot([low, high], [row, row], color=colour[name], linewidth=4, alpha=0.35, solid_capstyle="round")
                axes.plot([number.value], [row], "o", color=colour[name], markersize=7)
                axes.annotate(f"{number.value:.2f}", (number.value, row), xytext=(0, 7), textcoords="offset points",
                              ha="center", fontsize=8, bbox={"facecolor": "#ffffff", "edgecolor": "none", "alpha": 0.75, "pad": 0.4})  # fmt: skip
                if number.chance is not None:
                    axes.plot(
                        [number.chance] * 2, [row - 0.42, row + 0.42], color=WARM, linewidth=1.6, linestyle=(0, (3, 2))
                    )
            axes.set_yticks(range(len(names)), names if place % many == 0 else [""] * len(names))
            axes.set_ylim(-0.6, len(names) - 0.2)
            axes.grid(visible=False, axis="y")
            if xlabels[task] == "AUROC":
                least = min((i.low for i in intervals.values() if math.isfinite(i.low)), default=0.5)
                axes.set_xlim(min(0.45, least - 0.03), 1.03)
            axes.set_title(task, fontsize=10.5, loc="left")
            axes.set_xlabel(xlabels[task])

    many = min(len(panels), 3)
    lines = -(-len(panels) // many)
    return draw(3.4 * many + 1.2, lines * (0.4 * len(models) + 1.2), paint)
