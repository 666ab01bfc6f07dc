"""Drawings of an experiment with controls: arms over seeds, differences with their zero line, reliability of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from chiasm.evaluate.figures import ACCENT, INK, LINE, SOFT, WARM, draw
from chiasm.metrics.calibration import ReliabilityCurve
from chiasm.metrics.paired import SeedDifference
from chiasm.types import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

DASHED = (0, (3, 2))


def seed_dots(
    rows: Mapping[str, tuple[Interval, Sequence[float]]],
    *,
    xlabel: str,
    chance: float | None = None,
    emphasis: Sequence[str] = (),
    width: float = 9.6,
) -> str:
    """Draw an arm a row: its mean over seeds with the interval, each seed as a small ring, chance as a dashed line.

    Args:
        rows: Name -> (mean with interval, one number a seed); in percent if the label says so.
        xlabel: Under the axis.
        chance: Where the dashed line stands; None or NaN: none.
        emphasis: Rows drawn in the warm colour.
        width: In inches.
    """

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        names = list(rows)[::-1]
        for row, name in enumerate(names):
            number, seeds = rows[name]
            colour = WARM if name in emphasis else ACCENT
            _interval_row(axes, row, (number.low, number.high), colour, linewidth=5, alpha=0.28)
            known = [v for v in seeds if np.isfinite(v)]
            offsets = np.linspace(-0.16, 0.16, len(known)) if len(known) > 1 else np.zeros(len(known))
            axes.plot(known, row + offsets, "o", markersize=4, markerfacecolor="white", markeredgecolor=colour,
                      markeredgewidth=0.9, alpha=0.9)  # fmt: skip
            if np.isfinite(number.value):
                axes.plot([number.value], [row], "o", color=colour, markersize=8)
        _label_rows(axes, names, [_printed(rows[n][0].value, digits=_digits(rows)) for n in names])
        axes.set_xlabel(xlabel)
        if chance is not None and np.isfinite(chance):
            axes.axvline(chance, color=SOFT, linewidth=1.3, linestyle=DASHED, zorder=0)
            axes.annotate("chance", (chance, len(names) - 0.45), xytext=(4, 0), textcoords="offset points", color=SOFT,
                          fontsize=9, va="center")  # fmt: skip

    return draw(width, 0.42 * len(rows) + 0.95, paint)


def difference_rows(
    rows: Mapping[str, SeedDifference], *, xlabel: str, shown: Sequence[str] = (), width: float = 9.6
) -> str:
    """Draw a difference a row around a zero line, in percentage points.

    The thick bar is the interval over seeds, the thin line with ends the one over seeds and patients, rings are seeds.

    Args:
        rows: Name -> difference, as fractions of 1.
        xlabel: Under the axis.
        shown: Rows whose corrected p value is small enough: in colour; the others are grey.
        width: In inches.
    """

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        names = list(rows)[::-1]
        for row, name in enumerate(names):
            found = rows[name]
            colour = (ACCENT if found.value > 0 else WARM) if name in shown else SOFT
            _interval_row(axes, row, (100 * found.low, 100 * found.high), colour, linewidth=5, alpha=0.3)
            joint = found.patients
            if joint is not None and np.isfinite(joint.low):
                low, high = 100 * joint.low, 100 * joint.high
                axes.plot([low, high], [row - 0.3] * 2, "|-", color=colour, linewidth=1.1, markersize=6)
            seeds = 100 * np.asarray(found.per_seed)
            axes.plot(seeds, np.full(len(seeds), row), "o", markersize=4, markerfacecolor="white", alpha=0.9,
                      markeredgecolor=colour, markeredgewidth=0.9)  # fmt: skip
            if np.isfinite(found.value):
                axes.plot([100 * found.value], [row], "o", color=colour, markersize=8)
        axes.axvline(0, color=INK, linewidth=1.1, zorder=0)
        values = [100 * rows[n].value for n in names]
        _label_rows(axes, names, [f"{v:+.1f}" if np.isfinite(v) else "" for v in values])
        axes.set_xlabel(xlabel)

    return draw(width, 0.48 * len(rows) + 0.95, paint)


def reliability_panels(curves: Mapping[str, ReliabilityCurve], *, columns: int = 4) -> str:
    """Draw confidence against the share of right answers, one panel an arm; on the diagonal, confidence is honest."""
    names = [n for n in curves if curves[n].count]
    n_rows = max(1, -(-len(names) // columns))
    start = min((c for n in names for c in (*curves[n].confidence, *curves[n].accuracy)), default=0.0)
    start = float(np.floor(10 * start) / 10)

    def paint(figure: MatplotlibFigure) -> None:
        panels = figure.subplots(n_rows, min(columns, max(1, len(names))), squeeze=False, sharex=True, sharey=True)
        for axes in panels.ravel()[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(panels.ravel(), names, strict=False):
            curve = curves[name]
            axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=DASHED)
            low, high = np.array(curve.low), np.array(curve.high)
            axes.vlines(curve.confidence, low, high, color=ACCENT, alpha=0.35, linewidth=3)
            axes.plot(curve.confidence, curve.accuracy, "o-", color=ACCENT, markersize=4, linewidth=1.2)
            axes.set_title(name, fontsize=10)
            axes.set_xlim(start, 1.02)
            axes.set_ylim(start, 1.02)
            axes.set_aspect("equal")
        figure.supxlabel("confidence of the answer", fontsize=10, color=SOFT)
        figure.supylabel("share of right answers", fontsize=10, color=SOFT)

    return draw(9.6, 2.55 * n_rows + 0.5, paint)


def _interval_row(
    axes: Axes, row: int, bounds: tuple[float, float], colour: str, *, linewidth: float, alpha: float
) -> None:
    if np.isfinite(bounds).all():
        axes.plot(bounds, [row, row], color=colour, linewidth=linewidth, alpha=alpha, solid_capstyle="butt")


def _label_rows(axes: Axes, names: Sequence[str], values: Sequence[str]) -> None:
    """Put names at the left, values at the right edge, and a line between rows."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.grid(visible=False, axis="y")
    for row, text in enumerate(values):
        axes.axhline(row - 0.5, color=LINE, linewidth=0.6, zorder=0)
        axes.annotate(text, (1.0, row), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
                      va="center", fontsize=10, annotation_clip=False)  # fmt: skip


def _digits(rows: Mapping[str, tuple[Interval, Sequence[float]]]) -> int:
    """Numbers above 1.5 are percentages with one digit, others have three."""
    known = [number.value for number, _ in rows.values() if np.isfinite(number.value)]
    return 1 if known and max(known) > 1.5 else 3


def _printed(value: float, *, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "not defined"
