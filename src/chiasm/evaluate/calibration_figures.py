"""Calibration to drawings: reliability before and after, and what "cannot tell" buys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from chiasm.evaluate.figures import ACCENT, COLOURS, INK, SOFT, WARM, draw
from chiasm.metrics.calibration import ReliabilityCurve
from chiasm.types import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

_COLUMNS = 4


def reliability_plots(curves: Mapping[str, tuple[ReliabilityCurve, ReliabilityCurve]], *, width: float = 10.4) -> str:
    """Draw stated probability against observed share, before (orange) and after (blue), one square a label.

    Args:
        curves: Name -> curves before and after; bars are 95 % intervals over patients.
        width: Of the whole drawing, in inches.
    """
    columns = min(_COLUMNS, max(len(curves), 1))
    rows = -(-len(curves) // columns)
    side = width / (columns if columns > 2 else 3)

    def paint(figure: MatplotlibFigure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for empty in grid.ravel()[len(curves) :]:
            empty.set_visible(False)
        for k, (name, pair) in enumerate(curves.items()):
            axes: Axes = grid[k // columns, k % columns]
            axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (3, 2)))
            for curve, colour, what in zip(pair, (WARM, ACCENT), ("before", "after"), strict=True):
                x, y = np.asarray(curve.confidence), np.asarray(curve.accuracy)
                low, high = np.asarray(curve.low), np.asarray(curve.high)
                bars = np.stack([y - np.minimum(low, y), np.maximum(high, y) - y]) if np.isfinite(low).all() else None
                axes.errorbar(x, y, bars, fmt="o-", color=colour, markersize=4, linewidth=1.3, elinewidth=1, alpha=0.9,
                              label=what)  # fmt: skip
            axes.set_title(name, fontsize=10)
            axes.set_xlim(-0.03, 1.03)
            axes.set_ylim(-0.03, 1.03)
            axes.set_aspect("equal")
            if k % columns == 0:
                axes.set_ylabel("observed share")
            if k // columns == rows - 1 or k + columns >= len(curves):
                axes.set_xlabel("stated probability")
                axes.tick_params(labelbottom=True)
            if k == 0:
                axes.legend(fontsize=9, loc="upper left")

    return draw(min(width, side * columns), (side + 0.25) * rows, paint)


def abstention_bars(values: Mapping[str, tuple[Interval, Interval, Interval]]) -> str:
    """Draw, a label a row, the share of "cannot tell" and the accuracy with and without it.

    Args:
        values: Name -> share undecided, accuracy of the rest, accuracy when every row is answered.
    """

    def paint(figure: MatplotlibFigure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        names = list(values)[::-1]
        for row, name in enumerate(names):
            undecided, rest, forced = values[name]
            left.barh(row, undecided.value, 0.55, color=COLOURS[-1])
            if np.isfinite(undecided.low):
                left.plot([undecided.low, undecided.high], [row, row], color=INK, linewidth=1.2)
            for number, colour, shift in ((forced, WARM, -0.14), (rest, ACCENT, 0.14)):
                if np.isfinite(number.low):
                    right.plot([number.low, number.high], [row + shift] * 2, color=colour, linewidth=3, alpha=0.35)
                right.plot([number.value], [row + shift], "o", color=colour, markersize=6,
                           label=None if row else {WARM: "every row answered", ACCENT: "without “cannot tell”"}[colour])  # fmt: skip
        left.set_yticks(range(len(names)), names)
        left.set_ylim(-0.6, len(names) - 0.4)
        left.set_xlim(0, 1)
        left.set_xlabel("share “cannot tell”")
        right.set_xlabel("share of right answers")
        for axes in (left, right):
            axes.grid(visible=False, axis="y")
        right.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)

    return draw(10.4, 0.42 * len(values) + 1.2, paint)
