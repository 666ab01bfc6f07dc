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
