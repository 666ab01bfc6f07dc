"""Learning curves to a drawing: score over shots with its band of patients and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from chiasm.evaluate.few_shot_scores import FewShotScores, Point, shots_name
from chiasm.evaluate.figures import COLOURS, SOFT, WARM, draw
from chiasm.tasks.k_shot import TEXT_METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def learning_curves(scores: FewShotScores) -> str:
    """Draw balanced accuracy over the number of shots, one line a method, chance dashed.

    Methods that use texts stand in a panel of their own, beside the reference. Bands are 95 % intervals over test
    patients and seeds.
    """
    with_texts = [m for m in scores.methods if m in TEXT_METHODS]
    without = [m for m in scores.methods if m not in TEXT_METHODS]
    panels = [p for p in (without, with_texts) if p]
    titles = ["images only", "with texts"] if len(panels) == 2 else [""]
    low = min([scores.chance, *(_bound(p, "low") for p in scores.points)])
    high = max(_bound(p, "high") for p in scores.points)
    pad = 0.04 * max(high - low, 0.05)

    def paint(figure: MatplotlibFigure) -> None:
        found = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, methods, title in zip(found, panels, titles, strict=True):
            if title == "with texts" and scores.reference not in methods:
                _curve(axes, scores, scores.reference, SOFT, "o", faint=True)
            for method in methods:
                place = scores.methods.index(method) % len(_MARKS)
                _curve(axes, scores, method, COLOURS[place % (len(COLOURS) - 1)], _MARKS[place])
            axes.axhline(scores.chance, color=WARM, linestyle=(0, (3, 2)), linewidth=1.4)
            axes.annotate(
                "chance", (0, scores.chance), xytext=(0, 3), textcoords="offset points", fontsize=8, color=WARM
            )
            axes.set_xticks(range(len(scores.shots)), [str(shots_name(k)) for k in scores.shots])
            axes.set_xlabel("images a class to learn from")
            axes.set_ylim(low - pad, high + pad)
            axes.set_title(title, fontsize=10, loc="left")
            axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        found[0].set_ylabel("balanced accuracy")

    return draw(11.2 if len(panels) == 2 else 8.6, 4.6 if len(panels) == 2 else 4.2, paint)


def _curve(axes: Axes, scores: FewShotScores, method: str, colour: str, mark: str, *, faint: bool = False) -> None:
    points: Sequence[Point] = [p for p in scores.points if p.method == method]
    x = [scores.shots.index(p.shots) for p in points]
    y = [p.balanced_accuracy.value for p in points]
    low, high = ([_bound(p, side) for p in points] for side in ("low", "high"))
    if len(x) > 1:
        axes.fill_between(x, low, high, color=colour, alpha=0.10, linewidth=0)
    else:
        axes.plot([x[0], x[0]], [low[0], high[0]], color=colour, alpha=0.35, linewidth=3)
    style = (0, (4, 2)) if method == "zero-shot" else "-"
    axes.plot(
        x,
        y,
        color=colour,
        marker=None if method == "zero-shot" and len(x) > 1 else mark,
        markersize=4.5,
        linewidth=1.2 if faint else 1.8,
        linestyle=style,
        label=f"{method} (reference)" if faint else method,
    )


def _bound(point: Point, side: str) -> float:
    found = float(getattr(point.balanced_accuracy, side))
    return found if np.isfinite(found) else point.balanced_accuracy.value
