"""The page marks a best model only where tests say so, hides small groups, and tells of every failure."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

from chiasm.evaluate.page import render_page
from chiasm.evaluate.suite.figures import HeatCell, heat_table, model_dots, shade_of
from chiasm.evaluate.suite.page import suite_page
from chiasm.evaluate.suite.run import SuiteRun, run_suite
from chiasm.evaluate.suite.settings import ModelEntry, Suite
from chiasm.types import Interval


@pytest.fixture(scope="module")
def ended(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> SuiteRun:
    models = {"colours": ModelEntry(floor="colours"), "random": ModelEntry(floor="random")}
    small = dataclasses.replace(suite, models=models, tasks={"prototype": {}, "zero_shot": {}})
    return run_suite(small, tmp_path_factory.mktemp("page"))


def test_the_page_has_every_part(ended: SuiteRun) -> None:
    text = render_page(suite_page(ended))
    for part in (
        "Models × tasks",
        "Data set: films",
        "Paired tests",
        "Leakage",
        "Without a result",
        "Cells",
        "Run card",
    ):
        assert part in text
    for c in ended.cells:
        if c.card is not None:
            assert c.card.digest in text
    assert text.count("no text tower") == 2  # once a model
    assert "not a medical device" in text


def test_a_frame_needs_a_test(ended: SuiteRun) -> None:
    best = {("films", "prototype"): "random"}
    framed = render_page(suite_page(dataclasses.replace(ended, best=best)))
    bare = render_page(suite_page(dataclasses.replace(ended, best={})))
    assert framed.count("better than every other</td>") == 1
    assert "better than every other</td>" not in bare


def test_shades_go_from_chance_to_perfect() -> None:
    assert shade_of(0.5, 0.5, lower=False) == 0
    assert shade_of(0.3, 0.5, lower=False) == 0  # worse than chance is no better than chance
    assert shade_of(1.0, 0.5, lower=False) == 1
    assert shade_of(0.75, 0.5, lower=False) == pytest.approx(0.5)
    assert shade_of(0.2, None, lower=False) == pytest.approx(0.2)
    assert shade_of(0.0, None, lower=True) == 1
    assert shade_of(0.5, None, lower=True) == 0
    assert math.isnan(shade_of(math.nan, 0.5, lower=False))


def test_drawings_are_the_same_for_the_same_numbers_and_bear_holes() -> None:
    cells = {("a", "x\ny"): HeatCell(0.9, 0.8, best=True), ("b", "x\ny"): HeatCell(math.nan, math.nan)}
    drawn = heat_table(["a", "b", "c"], ["x\ny"], cells)
    assert drawn.startswith("<svg")
    assert drawn == heat_table(["a", "b", "c"], ["x\ny"], cells)
    plain = {k: dataclasses.replace(v, best=False) for k, v in cells.items()}
    assert drawn != heat_table(["a", "b", "c"], ["x\ny"], plain)
    numbers = {"a": Interval(0.7, math.nan, math.nan, 9, 0.5), "b": Interval(math.nan, math.nan, math.nan, 0)}
    panels = {f"t{k}": numbers for k in range(4)}
    assert model_dots(panels, xlabels=dict.fromkeys(panels, "AUROC"), models=["a", "b", "c"]).startswith("<svg")


def test_nothing_of_a_patient_is_on_the_page(ended: SuiteRun, suite_dir: Path) -> None:
    text = render_page(suite_page(ended))
    rows = ended.rows["films"]
    secrets = {s.id for s in rows.samples} | set(rows.groups) | {str(suite_dir)}
    assert not [s for s in secrets if re.search(rf"\b{re.escape(s)}\b", text)]


def test_findings_of_few_patients_are_named(ended: SuiteRun) -> None:
    rows = ended.rows["films"]
    truth = rows.truth.copy()
    truth[rows.rows_of("test")[1:], 0] = 0
    truth[rows.rows_of("test")[0], 0] = 1
    thin = dataclasses.replace(ended, rows={"films": dataclasses.replace(rows, truth=truth)})
    assert "cardiomegaly (1 with, " in render_page(suite_page(thin))
    many = np.tile([[0.0], [1.0]], (len(truth), 1))[: len(truth)]
    enough = dataclasses.replace(rows, truth=np.repeat(many, 2, axis=1))
    assert "on a side among" not in render_page(suite_page(dataclasses.replace(ended, rows={"films": enough})))
