"""Calibration: scikit-learn's numbers, the order kept, and no fit where there is too little to fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.calibration import _sigmoid_calibration
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from chiasm.errors import InputError, UnknownName
from chiasm.metrics.calibration import expected_calibration_error, log_loss
from chiasm.metrics.classification import auroc
from chiasm.tasks.calibration import (
    METHODS,
    Calibrator,
    IsotonicCalibration,
    PlattScaling,
    TemperatureScaling,
    cross_calibrate,
)
from chiasm.tasks.zero_shot import sigmoid, softmax

laws = settings(max_examples=15, deadline=None)
ALL = [TemperatureScaling(), PlattScaling(), PlattScaling(smooth=False), IsotonicCalibration()]


def too_sure(seed, n=2000, factor=3.0, offset=0.0):
    """Truth drawn from sigmoid(z), scores = factor × z + offset: T = factor is right when the offset is 0."""
    random = np.random.default_rng(seed)
    z = random.normal(size=n) * 1.5
    return factor * z + offset, (random.random(n) < sigmoid(z)).astype(float)


def test_platt_is_scikit_learns():
    scores, truth = too_sure(0, offset=40)
    plain = PlattScaling(smooth=False).fit(scores, truth).fitted_[0]
    peer = LogisticRegression(C=np.inf, tol=1e-12, max_iter=5000, solver="newton-cholesky").fit(scores[:, None], truth)
    assert plain["slope"] == pytest.approx(peer.coef_[0, 0], rel=1e-6)
    assert plain["intercept"] == pytest.approx(peer.intercept_[0], rel=1e-6)
    smooth = PlattScaling().fit(scores, truth).fitted_[0]
    a, b = _sigmoid_calibration(scores, truth)
    assert [smooth["slope"], smooth["intercept"]] == pytest.approx([-a, -b], rel=2e-3)


def test_isotonic_is_scikit_learns():
    scores, truth = too_sure(1, 500)
    scores = np.round(scores, 1)
    new = np.linspace(-20, 20, 200)
    peer = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, truth)
    np.testing.assert_allclose(IsotonicCalibration().fit(scores, truth).transform(new), peer.predict(new), atol=1e-12)


def test_temperature_is_found_and_is_the_best():
    scores, truth = too_sure(2, 20_000)
    found = TemperatureScaling().fit(scores, truth)
    assert found.temperatures_[0] == pytest.approx(3.0, rel=0.05)
    loss = [log_loss(truth, sigmoid(scores / (found.temperatures_[0] * f))) for f in (0.99, 1.0, 1.01)]
    assert loss[1] < min(loss[0], loss[2])


def test_temperature_of_classes():
    random = np.random.default_rng(3)
    z = random.normal(size=(8000, 4))
    truth = (z + random.gumbel(size=z.shape)).argmax(1)
    found = TemperatureScaling(classes=True).fit(2.5 * z, truth)
    assert found.temperatures_[0] == pytest.approx(2.5, rel=0.05)
    probabilities = found.transform(2.5 * z)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (probabilities.argmax(1) == z.argmax(1)).all()
    assert expected_calibration_error(truth, probabilities) < 0.03 < expected_calibration_error(truth, softmax(2.5 * z))
    with pytest.raises(InputError, match="fitted on 4 columns"):
        found.transform(z[:, :3])


@pytest.mark.parametrize("calibrator", ALL, ids=lambda c: c.method)
def test_calibration_error_falls_on_other_rows(calibrator):
    fitted = clone(calibrator).fit(*too_sure(4))
    scores, truth = too_sure(5)
    before = expected_calibration_error(truth, sigmoid(scores))
    after = expected_calibration_error(truth, fitted.transform(scores))
    assert after < 0.045 < before


@pytest.mark.parametrize("calibrator", ALL, ids=lambda c: c.method)
@laws
@given(st.integers(0, 2**31))
def test_order_is_kept(calibrator, seed):
    scores, truth = too_sure(seed, 300, offset=0.5)
    fitted = clone(calibrator).fit(scores, truth)
    new = np.sort(np.random.default_rng(seed).normal(size=100) * 6)
    found = fitted.transform(new)
    assert (np.diff(found) >= 0).all()
    assert ((found >= 0) & (found <= 1)).all()
    if calibrator.method != "isotonic":
        assert auroc(truth, fitted.transform(scores)) == pytest.approx(auroc(truth, scores), abs=1e-12)


@laws
@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(-50, 50))
def test_platt_does_not_care_for_units(seed, factor, offset):
    scores, truth = too_sure(seed, 200)
    here = PlattScaling().fit(scores, truth).transform(scores)
    there = PlattScaling().fit(scores * factor + offset, truth).transform(scores * factor + offset)
    np.testing.assert_allclose(here, there, atol=1e-6)


@pytest.mark.parametrize("calibrator", ALL, ids=lambda c: c.method)
def test_labels_are_fitted_alone_gaps_left_out_and_saved_exactly(calibrator):
    scores = np.stack([too_sure(6)[0], too_sure(7)[0]], 1)
    truth = np.stack([too_sure(6)[1], too_sure(7)[1]], 1)
    truth[:500, 1] = np.nan
    fitted = clone(calibrator).set_params(labels=["effusion", "nodule"]).fit(scores, truth)
    alone = clone(calibrator).fit(scores[500:, 1], truth[500:, 1])
    np.testing.assert_array_equal(fitted.transform(scores)[:, 1], alone.transform(scores[:, 1]))
    again = Calibrator.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert type(again) is type(calibrator)
    np.testing.assert_array_equal(again.transform(scores), fitted.transform(scores))
    assert again.to_dict() == fitted.to_dict()


@pytest.mark.parametrize("calibrator", ALL, ids=lambda c: c.method)
def test_too_few_patients_are_refused(calibrator):
    scores, truth = too_sure(8, 200)
    rare = np.where(np.cumsum(truth) <= 9, truth, 0.0)
    with pytest.raises(InputError, match="9 patients with it"):
        clone(calibrator).fit(scores, rare)
    with pytest.raises(InputError, match=r"label `nodule` has 8 patients with it and 8 without"):
        clone(calibrator).set_params(labels=["nodule"]).fit(scores, truth, np.arange(200) // 25)
    clone(calibrator).set_params(min_positives=5).fit(scores, truth)


@pytest.mark.parametrize("calibrator", ALL, ids=lambda c: c.method)
def test_scores_that_fall_are_refused(calibrator):
    scores, truth = too_sure(9, 500)
    with pytest.raises(InputError, match="do not rise"):
        clone(calibrator).fit(-scores, truth)


def test_separated_scores_have_no_temperature():
    truth = np.repeat([0.0, 1.0], 30)
    scores = np.linspace(-1, 1, 60)
    for calibrator in (TemperatureScaling(), PlattScaling(smooth=False)):
        with pytest.raises(InputError, match="separate"):
            calibrator.fit(scores, truth)
    found = PlattScaling().fit(scores, truth).transform(scores)
    assert 0 < found.min() < 0.1
    assert found.max() < 1
    assert IsotonicCalibration().fit(scores, truth).transform(scores).tolist() == truth.tolist()


def test_cross_calibration_keeps_patients_together():
    scores, truth = too_sure(10, 600)
    patients = np.arange(600) // 3
    found = cross_calibrate(PlattScaling(), scores, truth, patients)
    order = np.random.default_rng(0).permutation(600)
    moved = cross_calibrate(PlattScaling(), scores[order], truth[order], patients[order])
    np.testing.assert_allclose(moved, found[order], atol=1e-9)
    # A patient whose labels are turned round changes other folds, never its own probabilities.
    turned = truth.copy()
    turned[:3] = 1 - turned[:3]
    other = cross_calibrate(PlattScaling(), scores, turned, patients)
    assert (other[:3] == found[:3]).all()
    assert (other != found).any()
    with pytest.raises(InputError, match="folds"):
        cross_calibrate(PlattScaling(), scores, truth, patients, folds=1)


def test_what_cannot_be_calibrated():
    scores, truth = too_sure(11, 100)
    for calibrator in ALL:
        with pytest.raises(InputError, match="not fitted"):
            clone(calibrator).transform(scores)
        with pytest.raises(InputError, match="not finite"):
            clone(calibrator).fit(np.where(np.arange(100) == 3, np.nan, scores), truth)
        with pytest.raises(InputError, match="shape"):
            clone(calibrator).fit(scores[:-1], truth)
        with pytest.raises(InputError, match="groups"):
            clone(calibrator).fit(scores, truth, ["a"])
        with pytest.raises(InputError, match="fitted on 1 columns"):
            clone(calibrator).fit(scores, truth).transform(np.zeros((4, 2)))
    with pytest.raises(InputError, match="all scores"):
        PlattScaling().fit(np.ones(100), truth)
    with pytest.raises(UnknownName):
        Calibrator.from_dict({"method": "beta", "fitted": []})
    with pytest.raises(InputError, match="fitted"):
        Calibrator.from_dict({"method": "platt"})
    with pytest.raises(InputError, match="unknown field"):
        Calibrator.from_dict({"method": "platt", "fitted": [], "other": 1})
    with pytest.raises(UnknownName):
        PlattScaling().set_params(other=1)
    assert set(METHODS) == {"temperature", "platt", "isotonic"}
