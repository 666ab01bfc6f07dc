"""Survival scores to drawings: curves of risk groups with numbers at risk, AUC over time, calibration at a horizon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from chiasm.evaluate.figures import ACCENT, COLOURS, INK, SOFT, WARM, draw
from chiasm.types import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

    from chiasm.evaluate.survival_scores import CalibrationPoint, RiskGroup


def survival_curves(groups: Sequence[RiskGroup], ticks: Sequence[float], *, unit: str, end: float) -> str:
    """Draw the Kaplan–Meier curve of each risk group with its interval up to ``end``, and how many are at risk below."""
    colours = (ACCENT, WARM) if len(groups) <= 2 else (ACCENT, "#8a8f94", WARM, *COLOURS)

    def paint(figure: MatplotlibFigure) -> None:
        axes, below = figure.subplots(2, 1, height_ratios=(5.2, 0.42 * len(groups) + 0.35), sharex=True)
        for colour, group in zip(colours, groups, strict=False):
            curve = group.curve
            time = np.concatenate([[0.0], curve.time])
            axes.step(
                time, np.concatenate([[1.0], curve.survival]), where="post", color=colour, linewidth=2,
                label=f"{group.name}: {group.events} events of {curve.n} patients",
            )  # fmt: skip
            low, high = (np.concatenate([[1.0], b]) for b in (curve.low, curve.high))
            axes.fill_between(time, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0, end)
        axes.set_xticks(list(ticks))
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(unit)
        axes.set_ylabel("without the event")
        axes.legend(loc="lower left", fontsize=9)
        _risk_table(below, groups, ticks, colours)

    return draw(8.6, 4.2 + 0.26 * len(groups), paint)


def _risk_table(axes: Axes, groups: Sequence[RiskGroup], ticks: Sequence[float], colours: Sequence[str]) -> None:
    axes.set_ylim(len(groups) - 0.4, -1.0)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelbottom=False, pad=22)
    axes.set_yticks(range(len(groups)), [g.name for g in groups])
    axes.text(0, -0.75, "patients at risk", fontsize=9, color=SOFT, ha="left", va="center")
    for row, (group, colour) in enumerate(zip(groups, colours, strict=False)):
        for tick, count in zip(ticks, group.at_risk, strict=True):
            axes.text(tick, row, f"{count}", ha="center", va="center", fontsize=9, color=colour, clip_on=False)


def auc_over_time(series: Mapping[str, Sequence[Interval]], times: Sequence[float], *, unit: str) -> str:
    """Draw the AUC at each time: the first series with its interval, the others as lines, chance dashed."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        for k, (name, values) in enumerate(series.items()):
            colour = ACCENT if k == 0 else COLOURS[k % len(COLOURS)]
            axes.plot(times, [v.value for v in values], "o-" if k == 0 else "-", color=colour, markersize=4,
                      linewidth=2 if k == 0 else 1.4, label=name)  # fmt: skip
            if k == 0:
                axes.fill_between(times, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.15,
                                  linewidth=0)  # fmt: skip
        axes.axhline(0.5, color=WARM, linestyle=(0, (3, 2)), linewidth=1.4)
        lowest = min([v.low for s in series.values() for v in s if np.isfinite(v.low)] + [0.4])
        axes.set_ylim(max(0.0, lowest - 0.03), 1.0)
        axes.set_xlabel(f"event until, {unit}")
        axes.set_ylabel("AUC   (dashed: chance)")
        axes.legend(fontsize=9, loc="upper right")

    return draw(8.2, 3.6, paint)


def calibration_points(points: Sequence[CalibrationPoint]) -> str:
    """Draw the observed against the predicted probability of the event, with intervals and the diagonal."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        highest = max([p.predicted for p in points] + [p.observed.high for p in points if np.isfinite(p.observed.high)])
        top = min(1.0, highest * 1.1 + 0.02)
        axes.plot([0, top], [0, top], color=WARM, linestyle=(0, (3, 2)), linewidth=1.4)
        for point in points:
            o = point.observed
            if not np.isfinite(o.value):
                continue
            if np.isfinite(o.low) and np.isfinite(o.high):
                axes.plot([point.predicted] * 2, [o.low, o.high], color=ACCENT, linewidth=3, alpha=0.35)
            axes.plot([point.predicted], [o.value], "o", color=ACCENT, markersize=7)
            axes.annotate(f"{o.n}", (point.predicted, o.value), xytext=(7, 0), textcoords="offset points", fontsize=8,
                          color=INK, va="center")  # fmt: skip
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        axes.set_xlabel("predicted probability of the event")
        axes.set_ylabel("observed   (dashed: perfect)")

    return draw(4.4, 3.8, paint)
