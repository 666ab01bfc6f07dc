"""Results to drawings: every function returns SVG text, deterministic for the same numbers.

Matplotlib's object interface is used without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.types import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

INK, SOFT, LINE = "#16202b", "#566575", "#dbe2e8"
ACCENT, WARM = "#0f6c81", "#b4562c"
#: Okabe–Ito, told apart by colour-blind readers; grey last, for "none".
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b5ea7", "#882255", "#117733", "#8a8f94")

GREYS = {"several findings": "#c9ced3"}
#: Groups that are drawn in grey, last.
QUIET = ("none", "no finding", "several findings")

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "chiasm",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a label is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eef1f4",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(width: float, height: float, paint: Any) -> str:
    """Return what ``paint`` puts on a figure of this size (inches) as SVG, in the style of all pages."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as MplFigure

    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]  # its keys are typed as literals
        figure = MplFigure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def interval_dots(
    intervals: Mapping[str, Interval], *, xlabel: str, limits: tuple[float, float] | None = None, width: float = 6.2
) -> str:
    """Draw one dot with its 95 % interval a row, and a dashed line where chance lies."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        names = list(intervals)[::-1]
        for row, name in enumerate(names):
            number = intervals[name]
            low = number.low if np.isfinite(number.low) else number.value
            high = number.high if np.isfinite(number.high) else number.value
            axes.plot([low, high], [row, row], color=ACCENT, linewidth=3, alpha=0.35, solid_capstyle="round")
            axes.plot([number.value], [row], "o", color=ACCENT, markersize=7)
            axes.annotate(
                f"{number.value:.2f}", (high, row), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9
            )
            if number.chance is not None:
                axes.plot(
                    [number.chance] * 2, [row - 0.35, row + 0.35], color=WARM, linewidth=1.6, linestyle=(0, (3, 2))
                )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(xlabel + "   (dashed: chance)")
        if limits:
            axes.set_xlim(*limits)

    return draw(width, 0.36 * len(intervals) + 0.9, paint)


def training_curve(
    steps: Sequence[float],
    losses: Sequence[float],
    validation: Mapping[str, Sequence[tuple[float, float]]],
    *,
    chance_loss: float | None = None,
) -> str:
    """Draw the training loss over steps, smoothed, and validation numbers on an axis of their own."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        x, y = np.asarray(steps, float), np.asarray(losses, float)
        axes.plot(x, y, color=ACCENT, alpha=0.22, linewidth=1)
        if len(y) >= 5:
            window = max(3, len(y) // 25) | 1
            padded = np.pad(y, window // 2, mode="edge")
            axes.plot(
                x,
                np.convolve(padded, np.ones(window) / window, "valid"),
                color=ACCENT,
                linewidth=2,
                label="training loss",
            )
        if chance_loss is not None:
            axes.axhline(chance_loss, color=WARM, linestyle=(0, (3, 2)), linewidth=1.4)
            axes.annotate(
                "knows nothing", (x[-1] if len(x) else 1, chance_loss), ha="right", va="bottom", fontsize=9, color=WARM
            )
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("contrastive loss")
        if validation:
            other = axes.twinx()
            other.spines["right"].set_visible(True)
            other.grid(visible=False)
            for colour, (name, points) in zip(COLOURS[1:], validation.items(), strict=False):
                px, py = zip(*points, strict=True) if points else ((), ())
                other.plot(px, py, "o-", color=colour, markersize=4, linewidth=1.6, label=name)
            other.set_ylim(0, 1)
            other.set_ylabel("held-out patients")
            other.legend(loc="center right", fontsize=9)

    return draw(6.2, 3.5, paint)


def similarity_matrix(
    cosines: NDArray[np.floating[Any]], *, row_name: str = "image", column_name: str = "report"
) -> str:
    """Draw an N×N matrix of cosines: what the contrastive loss sees; right pairs lie on the diagonal."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        n = len(cosines)
        drawn = axes.imshow(cosines, cmap="viridis", interpolation="nearest")
        for i in range(n):
            axes.plot(
                [i - 0.5, i + 0.5, i + 0.5, i - 0.5, i - 0.5],
                [i - 0.5, i - 0.5, i + 0.5, i + 0.5, i - 0.5],
                color="#ffffff",
                linewidth=1,
            )
        axes.grid(visible=False)
        axes.set_xlabel(column_name)
        axes.set_ylabel(row_name)
        axes.set_xticks(range(0, n, 4), [str(i + 1) for i in range(0, n, 4)])
        axes.set_yticks(range(0, n, 4), [str(i + 1) for i in range(0, n, 4)])
        figure.colorbar(drawn, ax=axes, shrink=0.82, label="cosine")

    return draw(5.6, 4.4, paint)


def point_map(
    points: NDArray[np.floating[Any]], groups: Sequence[str], *, shapes: Sequence[str] | None = None, legend: str = ""
) -> str:
    """Draw a 2-D map of embeddings, coloured by group; ``shapes`` marks a second property (image, text)."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        names = sorted(set(groups), key=lambda g: (g in QUIET, g))
        marks = dict(zip(dict.fromkeys(shapes or ()), ("o", "^", "s"), strict=False))
        colour = {
            g: GREYS.get(g, COLOURS[-1]) if g in QUIET else COLOURS[i % (len(COLOURS) - 1)] for i, g in enumerate(names)
        }
        array = np.asarray(groups, dtype=object)
        shape_array = np.asarray(shapes if shapes is not None else [""] * len(array), dtype=object)
        for g in names:
            for s in dict.fromkeys(shape_array):
                rows = (array == g) & (shape_array == s)
                if rows.any():
                    axes.scatter(
                        points[rows, 0],
                        points[rows, 1],
                        s=16,
                        alpha=0.75,
                        color=colour[g],
                        marker=marks.get(s, "o"),
                        linewidths=0,
                        label=g if s == shape_array[0] else None,
                    )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, title=legend or None, markerscale=1.4)

    return draw(9.6, 4.8, paint)


def grouped_bars(values: Mapping[str, Mapping[str, Interval]], *, ylabel: str) -> str:
    """Draw bars with intervals: outer keys are colours, inner keys are groups on the x axis; chance as a dash."""

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        series = list(values)
        groups = list(values[series[0]])
        width = 0.8 / len(series)
        for k, name in enumerate(series):
            for g, group in enumerate(groups):
                number = values[name][group]
                x = g + (k - (len(series) - 1) / 2) * width
                axes.bar(x, number.value, width * 0.92, color=COLOURS[k], label=name if g == 0 else None)
                if np.isfinite(number.low) and np.isfinite(number.high):
                    axes.plot([x, x], [number.low, number.high], color=INK, linewidth=1.2)
                if number.chance is not None:
                    axes.plot([x - width * 0.46, x + width * 0.46], [number.chance] * 2, color=WARM, linewidth=2)
        axes.set_xticks(range(len(groups)), groups)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(ylabel + "   (orange: chance)")
        axes.legend(fontsize=9, loc="upper left")

    return draw(6.2, 3.5, paint)
