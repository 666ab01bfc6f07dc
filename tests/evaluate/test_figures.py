"""Figures are valid SVG, the same for the same numbers, and cope with missing intervals."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import numpy as np
import pytest

from chiasm.evaluate import figures
from chiasm.types import Interval

NUMBERS = {"a": Interval(0.8, 0.7, 0.9, 10, 0.5), "b": Interval(0.6, float("nan"), float("nan"), 10)}
DRAWINGS: dict[str, Callable[[], str]] = {
    "dots": lambda: figures.interval_dots(NUMBERS, xlabel="AUROC", limits=(0.4, 1.0)),
    "curve": lambda: figures.training_curve(
        list(range(30)), [5.0 - i / 10 for i in range(30)], {"R@10": [(10, 0.2), (20, 0.5)]}, chance_loss=4.8
    ),
    "short curve": lambda: figures.training_curve([1], [2.0], {}),
    "matrix": lambda: figures.similarity_matrix(np.eye(6)),
    "map": lambda: figures.point_map(
        np.random.default_rng(0).normal(size=(8, 2)), ["x", "y"] * 3 + ["no finding"] * 2, shapes=["i"] * 4 + ["t"] * 4
    ),
    "bars": lambda: figures.grouped_bars({"s": NUMBERS, "t": NUMBERS}, ylabel="R@K"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_figures_are_repeatable_svg(name: str) -> None:
    svg = DRAWINGS[name]()
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert len(list(root.iter())) > 20
    assert svg == DRAWINGS[name]()


def test_no_global_state_is_touched() -> None:
    import matplotlib as mpl

    before = mpl.rcParams["font.size"], mpl.rcParams["axes.grid"]
    DRAWINGS["dots"]()
    assert (mpl.rcParams["font.size"], mpl.rcParams["axes.grid"]) == before


@pytest.mark.parametrize("name", ["$\\frac{$", "$x$", "a$b", "_quiet", "<b>&\"'", "ß Ω é", "^ \\alpha"])
def test_a_name_is_no_formula(name: str) -> None:
    """What a user calls a model, a label or a method is drawn as it is, or a finished run would end without its page."""
    from chiasm.evaluate.explain_figures import method_dots
    from chiasm.evaluate.explore_figures import labels_in_clusters, static_map
    from chiasm.evaluate.explore_map import MapColumn
    from chiasm.evaluate.suite.figures import HeatCell, heat_table, model_dots

    number = Interval(0.7, 0.6, 0.8, 9, 0.5)
    column = MapColumn(name, (name, "b"), np.asarray([0, 1, 0, -1], dtype=np.int16))
    drawn = [
        heat_table([name], [name], {(name, name): HeatCell(0.7, 0.4)}),
        model_dots({name: {name: number}}, xlabels={name: name}, models=[name]),
        method_dots({name: {name: number, "x": number}}, xlabel=name),
        figures.interval_dots({name: number}, xlabel=name),
        static_map(np.eye(4)[:, :2], column),
        labels_in_clusters(np.asarray([0, 1, 0, -1]), column, names=[name, "b", "none"]),
    ]
    assert all(d.startswith("<svg") and "<b>" not in d for d in drawn)
