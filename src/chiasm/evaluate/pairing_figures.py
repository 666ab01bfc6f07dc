"""Pairs to drawings: distributions of similarities, and how many images share a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.evaluate.figures import ACCENT, COLOURS, INK, SOFT, WARM, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

_FILLS = (ACCENT, WARM, COLOURS[2])


def distributions(
    values: Mapping[str, NDArray[np.floating[Any]]], *, xlabel: str, line: tuple[float, str] | None = None
) -> str:
    """Draw histograms over each other, on one set of bins; NaN is left out.

    Args:
        values: Name -> numbers; the first is drawn filled in the accent colour.
        xlabel: What they are.
        line: Place and name of a vertical line.
    """
    known = {name: v[np.isfinite(v)] for name, v in values.items()}
    known = {name: v for name, v in known.items() if len(v)}

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        everything = np.concatenate(list(known.values())) if known else np.zeros(1)
        low, high = float(everything.min()), float(everything.max())
        if high - low < 1e-6:
            low, high = low - 0.01, high + 0.01
        bins = np.linspace(low, high, int(np.clip(np.sqrt(len(everything)), 12, 48)) + 1)
        for colour, (name, v) in zip(_FILLS, known.items(), strict=False):
            shares = np.histogram(v, bins)[0] / len(v)
            axes.stairs(shares, bins, fill=True, color=colour, alpha=0.28)
            axes.stairs(shares, bins, color=colour, linewidth=1.8, label=f"{name} (median {np.median(v):.3f})")
        if line is not None:
            axes.axvline(line[0], color=INK, linestyle=(0, (3, 2)), linewidth=1.4, label=line[1])
        axes.set_xlabel(xlabel)
        axes.set_ylabel("share of images")
        axes.set_ylim(0, axes.get_ylim()[1] * (1.16 + 0.1 * (len(known) + (line is not None))))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9, loc="upper left")

    return draw(6.2, 3.6, paint)


def load_curve(loads: NDArray[np.int64], random_loads: NDArray[np.int64] | None = None) -> str:
    """Draw the number of images of each report, the most used report first."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        for colour, name, values in ((ACCENT, "pairs", loads), (WARM, "chosen at random", random_loads)):
            if values is not None and len(values):
                falling = np.sort(values)[::-1]
                axes.stairs(falling, np.arange(len(falling) + 1) + 0.5, fill=name == "pairs", color=colour, alpha=0.3)
                axes.stairs(falling, np.arange(len(falling) + 1) + 0.5, color=colour, linewidth=1.8, label=name)
        axes.set_xlabel("reports, the most used first")
        axes.set_ylabel("images that have this report")
        axes.legend(fontsize=9, loc="upper right")
        unused = int((loads == 0).sum())
        if unused:
            axes.annotate(
                f"{unused} reports have no image", (0.98, 0.55), xycoords="axes fraction", ha="right", color=SOFT,
                fontsize=9,
            )  # fmt: skip

    return draw(10.4, 3.0, paint)
