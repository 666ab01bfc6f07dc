"""Survival scores and their page: paired gains, honest baselines, figures whose numbers are those of the scores."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from chiasm.errors import InputError
from chiasm.evaluate.page import render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.evaluate.survival_figures import auc_over_time, calibration_points, survival_curves
from chiasm.evaluate.survival_page import survival_page
from chiasm.evaluate.survival_scores import NOTHING, score_survival
from chiasm.metrics.survival import numbers_at_risk
from chiasm.tasks.survival import survival_data
from chiasm.tasks.survival_models import CoxNet, NoFeatures

pytest.importorskip("sksurv", reason="the extra `survival` is not installed")

CARD = RunCard("chiasm survival", {}, {}, "none", 0)
SETTINGS = {"method": "coxnet", "unit": "days", "folds": 3, "n_resamples": 60}


@pytest.fixture(scope="module")
def sets():
    random = np.random.default_rng(0)
    x = random.normal(size=(240, 3))
    died, lost = random.exponential(300 * np.exp(-x[:, 0] - 0.5 * x[:, 1])), random.exponential(500, 240)
    ids = [f"secret{k}" for k in range(240)]

    def of(columns):
        return survival_data(x[:, columns], ids, np.minimum(died, lost), died <= lost, free=range(len(columns)))

    return {"both": of([0, 1]), "one": of([1]), "noise": of([2])}


@pytest.fixture(scope="module")
def scores(sets):
    return score_survival(sets, lambda data: CoxNet(free=data.free), **SETTINGS)


def test_every_number_has_an_interval_and_a_baseline(scores):
    assert list(scores.models) == ["both", "one", "noise", NOTHING]
    for score in scores.models.values():
        assert score.harrell.low <= score.harrell.value <= score.harrell.high
        assert score.harrell.chance == 0.5
    nothing = scores.models[NOTHING]
    assert nothing.harrell.value == nothing.uno.value == 0.5
    assert all(a.value == 0.5 for a in nothing.auc)
    assert scores.models["both"].harrell.value > 0.68
    assert abs(scores.models["noise"].harrell.value - 0.5) < 0.08


def test_gains_are_paired_and_corrected(scores):
    assert list(scores.gains) == ["one", "noise", NOTHING]
    for name, gain in scores.gains.items():
        expected = scores.models["both"].harrell.value - scores.models[name].harrell.value
        assert gain.difference.value == pytest.approx(expected)
        assert gain.difference.low > 0
        assert gain.p_value <= 3 * 2 / 61 + 1e-9
    own = scores.models["both"].brier.value - scores.models[NOTHING].brier.value
    assert scores.brier_gain.difference.value == pytest.approx(own)
    assert scores.brier_gain.difference.high < 0


def test_risk_groups_and_calibration_are_those_of_the_patients(scores, sets):
    data = sets["both"]
    low, high = scores.groups
    assert low.curve.n + high.curve.n == len(data)
    assert low.events + high.events == data.events
    assert high.events > low.events
    together = np.add(low.at_risk, high.at_risk)
    np.testing.assert_array_equal(together, numbers_at_risk(data.time, scores.ticks))
    assert scores.separation.p_value < 1e-4
    predicted = [p.predicted for p in scores.calibration]
    assert predicted == sorted(predicted)
    assert sum(p.observed.n for p in scores.calibration) == len(data)
    assert sum(p.observed.low <= p.predicted <= p.observed.high for p in scores.calibration) >= 3


def test_the_page_shows_the_numbers_and_nobody(scores):
    text = render_page(survival_page(scores, CARD))
    assert f"{scores.models['both'].harrell.value:.3f}" in text
    assert "secret" not in text
    assert "not a medical device" in text
    for heading in ("Who was studied", "Risk groups", "Over time", "What was chosen", "Run card"):
        assert heading in text
    assert not re.search(r"(src|href)=.http", text)


def test_one_risk_for_all_is_said(sets):
    found = score_survival({"nothing": sets["one"]}, lambda data: NoFeatures(), **SETTINGS)
    assert found.separation is None
    assert len(found.groups) == 1
    assert "nothing to go by" in render_page(survival_page(found, CARD))


def test_drawings_are_deterministic(scores):
    for draw in (
        lambda: survival_curves(scores.groups, scores.ticks, unit="days", end=scores.end),
        lambda: auc_over_time({n: m.auc for n, m in scores.models.items()}, scores.grid, unit="days"),
        lambda: calibration_points(scores.calibration),
    ):
        assert draw() == draw()
        assert draw().startswith("<svg")


def test_other_patients_are_refused(sets):
    random = np.random.default_rng(1)
    other = survival_data(random.normal(size=(240, 1)), range(240), sets["one"].time, sets["one"].event)
    with pytest.raises(InputError, match="same patients"):
        score_survival({"a": sets["one"], "b": other}, lambda data: NoFeatures(), **SETTINGS)
    turned = dataclasses.replace(sets["one"], event=~sets["one"].event)
    with pytest.raises(InputError, match="same outcomes"):
        score_survival({"a": sets["one"], "b": turned}, lambda data: NoFeatures(), **SETTINGS)
    with pytest.raises(InputError, match="no feature set"):
        score_survival({}, lambda data: NoFeatures(), **SETTINGS)
