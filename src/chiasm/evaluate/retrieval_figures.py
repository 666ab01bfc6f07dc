"""Retrieval scores to drawings: recall against depth, and how often the true sentence wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from chiasm.evaluate.figures import COLOURS, SOFT, draw
from chiasm.evaluate.search_scores import DirectionScores, arrow, recall_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure


def recall_curves(scores: Mapping[str, DirectionScores]) -> str:
    """Draw the share of queries with a right answer among the first K, K on a logarithmic axis; dots have intervals."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        for k, (name, found) in enumerate(scores.items()):
            depths, recall = recall_curve(found.ranks, found.corpus_size)
            axes.plot(depths, recall, color=COLOURS[k], linewidth=1.8, label=arrow(name))
            for depth, value in found.recall.items():
                axes.plot([depth, depth], [value.low, value.high], color=COLOURS[k], linewidth=3, alpha=0.35)
                axes.plot([depth], [value.value], "o", color=COLOURS[k], markersize=5)
            known = [(d, v.chance) for d, v in found.recall.items() if v.chance is not None]
            axes.plot(*zip(*known, strict=True), color=COLOURS[k], linewidth=1.2, linestyle=(0, (3, 2)))
        largest = max(found.corpus_size for found in scores.values())
        axes.set_xscale("log")
        axes.set_xlim(0.9, largest * 1.1)
        ticks = [t for t in (1, 5, 10, 50, 100, 500, 1000, 5000, 10_000, 50_000, 100_000) if t <= largest]
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, 1.03)
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.set_xlabel("answers looked at   (dashed: chance)")
        axes.set_ylabel("queries with a right answer", color=SOFT)
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return draw(7.6, 3.7, paint)
