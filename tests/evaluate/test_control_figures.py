"""Drawings of controls: valid, repeatable, whole with one seed, without intervals, without chance, without answers."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from chiasm.evaluate.control_figures import difference_rows, reliability_panels, seed_dots
from chiasm.metrics.calibration import ReliabilityCurve, reliability_curve
from chiasm.metrics.paired import seed_difference
from chiasm.types import Interval

NAN = math.nan
ROWS = {
    "CLIP-IT": (Interval(81.0, 79.0, 83.0, 3, 25.0), (80.0, 81.0, 82.0)),
    "one <seed> & more": (Interval(70.0, NAN, NAN, 1), (70.0,)),
    "nothing": (Interval(NAN, NAN, NAN, 0), (NAN,)),
}
DIFFERENCES = {
    "a - b": replace(
        seed_difference({0: 0.8, 1: 0.9, 2: 0.7}, {0: 0.7, 1: 0.6, 2: 0.6}), patients=Interval(0.1, 0, 0.2, 9)
    ),
    "one": seed_difference({0: 0.8}, {0: 0.9}),
    "none": seed_difference({}, {}),
}
CURVE = reliability_curve(np.arange(40) % 2, np.random.default_rng(0).dirichlet([1, 1], 40), groups=range(40), bins=4)
EMPTY = ReliabilityCurve((), (), (), (), ())
DRAWINGS: dict[str, Callable[[], str]] = {
    "dots": lambda: seed_dots(ROWS, xlabel="%", chance=25.0, emphasis=("CLIP-IT",)),
    "dots without chance": lambda: seed_dots(ROWS, xlabel="%", chance=NAN),
    "differences": lambda: difference_rows(DIFFERENCES, xlabel="points", shown=("a - b",)),
    "panels": lambda: reliability_panels(dict.fromkeys("abcde", CURVE) | {"empty": EMPTY}),
    "no panel": lambda: reliability_panels({"empty": EMPTY}),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_figures_are_repeatable_svg(name: str) -> None:
    svg = DRAWINGS[name]()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg == DRAWINGS[name]()
