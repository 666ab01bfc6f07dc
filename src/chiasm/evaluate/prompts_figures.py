"""Effects, searches and learning of prompts to drawings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from chiasm.evaluate.figures import ACCENT, COLOURS, INK, SOFT, WARM, draw
from chiasm.types import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

_LETTERS = 46


def short(text: str, letters: int = _LETTERS) -> str:
    """Return a text that fits beside a figure."""
    return textwrap.shorten(text, letters, placeholder=" …")


def arms_per_label(values: Mapping[str, Mapping[str, Interval]], *, xlabel: str) -> str:
    """Draw, for every label, one dot with its interval an arm, each arm in its colour; chance dashed.

    Args:
        values: Label -> arm -> number.
        xlabel: What the numbers are.
    """
    labels = list(values)[::-1]
    arms = list(next(iter(values.values()))) if values else []

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        for row, label in enumerate(labels):
            for k, arm in enumerate(arms):
                number = values[label][arm]
                y = row + (len(arms) - 1) * 0.11 - k * 0.22
                name = arm if row == 0 else None
                if np.isfinite(number.low) and np.isfinite(number.high):
                    axes.plot([number.low, number.high], [y, y], color=COLOURS[k], linewidth=2.4, alpha=0.4)
                axes.plot([number.value], [y], "o", color=COLOURS[k], markersize=6, label=name)
                if number.chance is not None and k == 0:
                    axes.plot(
                        [number.chance] * 2, [row - 0.4, row + 0.4], color=WARM, linewidth=1.4, linestyle=(0, (3, 2))
                    )
        axes.set_yticks(range(len(labels)), [short(x, 34) for x in labels])
        axes.set_ylim(-0.6, len(labels) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(xlabel + "   (dashed: chance)")
        figure.legend(loc="outside lower center", ncols=len(arms), fontsize=9)

    return draw(6.2, 0.42 * max(1, len(labels)) + 1.7, paint)


def cosine_matrix(cosines: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """Draw the cosines between the labels' directions, with the numbers inside where they fit."""
    values = np.asarray(cosines, dtype=float)

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        drawn = axes.imshow(values, cmap="cividis", vmin=min(0.0, float(values.min())), vmax=1.0)
        if len(labels) <= 15:
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                              color="white" if value < 0.6 else INK)  # fmt: skip
        names = [short(x, 26) for x in labels]
        axes.set_xticks(range(len(labels)), names, rotation=40, ha="right")
        axes.set_yticks(range(len(labels)), names)
        axes.grid(visible=False)
        figure.colorbar(drawn, ax=axes, shrink=0.8, label="cosine")

    side = 0.52 * len(labels)
    return draw(min(10.0, side + 2.8), min(9.0, side + 1.6), paint)


def validation_against_test(points: Mapping[str, Sequence[tuple[float, float]]], *, metric: str) -> str:
    """Draw every single option: its score where options are chosen against its score on other patients.

    Args:
        points: Label -> (validation, test) of its options.
        metric: Name of the score.
    """

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        everything = [v for found in points.values() for point in found for v in point if np.isfinite(v)]
        low, high = (min(everything), max(everything)) if everything else (0.0, 1.0)
        margin = 0.05 * max(high - low, 0.05)
        line = [low - margin, high + margin]
        axes.plot(line, line, color=SOFT, linewidth=1, linestyle=(0, (3, 2)))
        for k, (label, found) in enumerate(points.items()):
            if found:
                x, y = zip(*found, strict=True)
                axes.scatter(
                    x, y, s=26, color=COLOURS[k % len(COLOURS)], alpha=0.85, linewidths=0, label=short(label, 24)
                )
        axes.set_xlabel(f"{metric} on the patients that choose")
        axes.set_ylabel(f"{metric} on other patients")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return draw(6.2, 4.0, paint)


def losses(history: Sequence[Mapping[str, float]], best: int) -> str:
    """Draw training and validation loss over epochs; the kept epoch is marked."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        for colour, name, label in (
            (ACCENT, "train_loss", "training"),
            (COLOURS[1], "validation_loss", "held-out patients"),
        ):
            values = np.array([epoch[name] for epoch in history], dtype=float)
            if np.isfinite(values).any():
                axes.plot(range(len(values)), values, color=colour, linewidth=1.8, label=label)
        axes.axvline(best, color=INK, linewidth=1.2, linestyle=(0, (3, 2)), label=f"kept: epoch {best}")
        axes.set_xlabel("epoch (0: the words themselves)")
        axes.set_ylabel("loss")
        axes.legend(fontsize=9)

    return draw(6.2, 3.2, paint)
