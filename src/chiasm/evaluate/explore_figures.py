"""Maps and clusters to drawings: a static map, how k was chosen, how labels are spread over clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.evaluate.explore_map import MapColumn
from chiasm.evaluate.figures import ACCENT, COLOURS, INK, SOFT, WARM, draw
from chiasm.tasks.cluster_structure import STABLE, Candidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

#: Points of a static map; the interactive one has all.
STATIC_POINTS = 3_000
_MARKS = ("o", "s", "D", "v", "P")


def static_map(
    points: NDArray[np.floating[Any]], column: MapColumn, *, is_text: NDArray[np.bool_] | None = None, seed: int = 0
) -> str:
    """Draw a map coloured by one column: nine colours, then other marks; grey below for rows without a class."""
    rows = np.arange(len(points))
    if len(points) > STATIC_POINTS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, STATIC_POINTS, replace=False))

    def paint(figure: MatplotlibFigure) -> None:
        import matplotlib as mpl

        axes: Axes = figure.subplots()
        steps = mpl.colormaps["viridis"](np.linspace(0, 0.92, max(len(column.categories), 2)))
        size = float(np.clip(9_000 / max(len(rows), 1), 5, 22))
        for code in (-1, *range(len(column.categories))):
            here = rows[column.codes[rows] == code]
            name = column.missing if code < 0 else column.categories[code]
            colour = "#c9ced3" if code < 0 else steps[code] if column.ordered else COLOURS[code % 9]
            for text in (False, True):
                part = here if is_text is None else here[is_text[here] == text]
                if is_text is None and text:
                    continue
                mark = "^" if text else "o" if column.ordered or code < 0 else _MARKS[min(code // 9, 4)]
                axes.scatter(
                    points[part, 0], points[part, 1], s=size, color=colour, marker=mark, alpha=0.8, linewidths=0,
                    label=_short(name) if len(here) and not text else None,
                )  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="datalim")
        axes.grid(visible=False)
        entries = min(len(column.categories), 24)
        if entries:
            handles, names = axes.get_legend_handles_labels()
            axes.legend(
                handles[: entries + 1], names[: entries + 1], loc="upper center", bbox_to_anchor=(0.5, 0.0), fontsize=9.5,
                title=column.name, markerscale=1.8, ncols=1 if entries < 3 else 2 if entries < 13 else 3, handletextpad=0.1,
            )  # fmt: skip

    return draw(6.2, 4.4 + 0.22 * min(len(column.categories), 24) / 2, paint)


def choice_of_k(candidates: Sequence[Candidate], chosen: int) -> str:
    """Draw silhouette, its value on structureless clouds, and stability over k."""

    def paint(figure: MatplotlibFigure) -> None:
        left, right = figure.subplots(1, 2)
        k = [c.k for c in candidates]
        left.plot(k, [c.silhouette for c in candidates], "o-", color=ACCENT, label="these rows")
        left.plot(k, [c.null_silhouette for c in candidates], "s--", color=WARM, label="structureless clouds")
        left.set_ylabel("silhouette")
        left.legend(fontsize=8.5)
        right.plot(k, [c.stability for c in candidates], "o-", color=ACCENT)
        right.axhline(STABLE, color=WARM, linestyle=(0, (3, 2)), linewidth=1.4)
        right.annotate("stable", (k[-1], STABLE), ha="right", va="bottom", fontsize=9, color=WARM)
        right.set_ylabel("agreement of other patients (ARI)")
        right.set_ylim(min(0.0, *[c.stability for c in candidates if np.isfinite(c.stability)] or [0.0]) - 0.02, 1.04)
        for axes in (left, right):
            axes.axvline(chosen, color=SOFT, linewidth=1, linestyle=":")
            axes.set_xlabel("clusters k   (dotted: taken)")
            axes.set_xticks(k)

    return draw(9.6, 3.0, paint)


def labels_in_clusters(clusters: NDArray[np.int64], column: MapColumn, *, names: Sequence[str]) -> str:
    """Draw how the labels of each cluster are spread: every row of the table adds up to 100 %."""
    codes = column.codes[: len(clusters)]
    table = np.zeros((len(names), len(column.categories)))
    keep = codes >= 0
    order = np.where(clusters < 0, len(names) - 1, clusters)
    np.add.at(table, (order[keep], codes[keep]), 1)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)

    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        axes.imshow(share, cmap="BuGn", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_xticks(
            range(len(column.categories)), [_short(c, 18) for c in column.categories], rotation=28, ha="right"
        )
        axes.set_yticks(range(len(names)), [f"{n}  ({int(s)})" for n, s in zip(names, table.sum(axis=1), strict=True)])
        axes.grid(visible=False)
        for row in range(len(names)):
            for c in range(len(column.categories)):
                if share[row, c] >= 0.005:
                    axes.annotate(
                        f"{100 * share[row, c]:.0f}", (c, row), ha="center", va="center", fontsize=8.5,
                        color="#ffffff" if share[row, c] > 0.6 else INK,
                    )  # fmt: skip
        axes.set_xlabel(f"{column.name}, per cent of the cluster")

    return draw(10.4, 0.32 * len(names) + 1.6, paint)


def _short(text: str, letters: int = 30) -> str:
    """Return a legend entry; matplotlib would leave out a name that begins with an underscore."""
    plain = text if len(text) <= letters else text[: letters - 1] + "…"
    return "\u200b" + plain if plain.startswith("_") else plain
