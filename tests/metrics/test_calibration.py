"""Calibration: scikit-learn's numbers where it has them, the definition by loops where not, laws, gaps, hostile input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import bootstrap_interval, weighted_interval
from chiasm.metrics.calibration import (
    brier_score,
    brier_score_interval,
    brier_statistic,
    ece_statistic,
    expected_calibration_error,
    expected_calibration_error_interval,
    log_loss,
    log_loss_interval,
    log_loss_statistic,
    reliability_curve,
)
from chiasm.metrics.weighted import accuracy_statistic

laws = settings(max_examples=25, deadline=None)


def some_rows(seed, n=80, classes=3, sharp=1.5):
    """Rows whose truth is drawn from their own probabilities: perfectly calibrated in the limit."""
    random = np.random.default_rng(seed)
    logits = sharp * random.normal(size=(n, classes))
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(1, keepdims=True)
    truth = (probabilities.cumsum(1) < random.random((n, 1))).sum(1).clip(0, classes - 1)
    return truth, probabilities


def ece_by_loop(truth, probabilities, bins):
    """The definition: bins (i/B, (i+1)/B], a loop over rows."""
    total = 0.0
    confidence = probabilities.max(1)
    for i in range(bins):
        rows = [r for r in range(len(truth)) if i / bins < confidence[r] <= (i + 1) / bins]
        if rows:
            right = np.mean([probabilities[r].argmax() == truth[r] for r in rows])
            total += len(rows) / len(truth) * abs(right - np.mean(confidence[rows]))
    return total


@laws
@given(st.integers(0, 2**31), st.integers(2, 5))
def test_brier_and_log_loss_are_those_of_scikit_learn(seed, classes):
    truth, probabilities = some_rows(seed, classes=classes)
    labels = list(range(classes))
    if classes == 2:
        assert brier_score(truth, probabilities) == pytest.approx(sk.brier_score_loss(truth, probabilities[:, 1]))
        assert brier_score(truth, probabilities[:, 1]) == pytest.approx(brier_score(truth, probabilities))
    else:
        assert brier_score(truth, probabilities) == pytest.approx(
            sk.brier_score_loss(truth, probabilities, labels=labels)
        )
    assert log_loss(truth, probabilities) == pytest.approx(sk.log_loss(truth, probabilities, labels=labels))


def test_a_sure_mistake_costs_what_scikit_learn_says():
    truth, probabilities = [0, 1], np.array([[0.0, 1.0], [0.0, 1.0]])
    assert log_loss(truth, probabilities) == pytest.approx(sk.log_loss(truth, probabilities), rel=1e-12)
    assert brier_score(truth, probabilities) == 0.5
    assert expected_calibration_error(truth, probabilities) == 0.5


@laws
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(2, 4))
def test_ece_is_its_definition(seed, bins, classes):
    truth, probabilities = some_rows(seed, classes=classes)
    found = expected_calibration_error(truth, probabilities, bins=bins)
    assert found == pytest.approx(ece_by_loop(truth, probabilities, bins), abs=1e-12)
    assert 0 <= found <= 1


@laws
@given(st.integers(0, 2**31), st.sampled_from(["width", "mass"]), st.booleans())
def test_order_of_rows_and_weights(seed, binning, debiased):
    truth, probabilities = some_rows(seed)
    options = {"bins": 7, "binning": binning, "debiased": debiased}
    order = np.random.default_rng(seed).permutation(len(truth))
    plain = expected_calibration_error(truth, probabilities, **options)
    assert plain == pytest.approx(expected_calibration_error(truth[order], probabilities[order], **options))
    # A weight of 2 is a row twice; equal-width bins do not move with the rows.
    weights = np.random.default_rng(seed).integers(0, 3, (1, len(truth))).astype(float)
    repeated = np.repeat(np.arange(len(truth)), weights[0].astype(int))
    for make in (lambda t, p: ece_statistic(t, p, bins=7, debiased=debiased), brier_statistic, log_loss_statistic):
        once = float(make(truth, probabilities)(weights)[0])
        assert once == pytest.approx(
            float(make(truth[repeated], probabilities[repeated])(np.ones((1, len(repeated))))[0])
        )


def test_one_bin_is_the_gap_of_the_means():
    truth, probabilities = some_rows(3, n=200)
    gap = abs((probabilities.argmax(1) == truth).mean() - probabilities.max(1).mean())
    for binning in ("width", "mass"):
        assert expected_calibration_error(truth, probabilities, bins=1, binning=binning) == pytest.approx(gap)


def test_equal_mass_bins_hold_equal_numbers_and_keep_ties_together():
    truth, probabilities = some_rows(4, n=100)
    assert reliability_curve(truth, probabilities, bins=5, binning="mass").count == (20,) * 5
    uneven = np.column_stack([np.linspace(0.6, 0.9, 7), np.linspace(0.4, 0.1, 7)])
    assert reliability_curve([0] * 7, uneven, bins=3).count == (3, 2, 2)
    tied = np.tile([0.7, 0.2, 0.1], (10, 1))
    curve = reliability_curve([0] * 7 + [1] * 3, tied, bins=5, binning="mass")
    assert curve.count == (10,)
    assert curve.accuracy == (0.7,)
    assert curve.confidence == pytest.approx((0.7,))
    assert expected_calibration_error([0] * 7 + [1] * 3, tied, binning="mass") == pytest.approx(0, abs=1e-12)


def test_debiasing_takes_off_what_chance_adds():
    """Calibrated by construction: the plain error is well above 0 in small sets, the debiased one nearer."""
    plain, debiased = [], []
    for seed in range(60):
        truth, probabilities = some_rows(seed, n=150)
        plain.append(expected_calibration_error(truth, probabilities, binning="mass", bins=10))
        debiased.append(expected_calibration_error(truth, probabilities, binning="mass", bins=10, debiased=True))
    assert np.mean(plain) > 0.07
    assert np.mean(debiased) < 0.65 * np.mean(plain)
    # A real error survives it.
    truth, probabilities = some_rows(1, n=4000)
    wrong = probabilities**3 / (probabilities**3).sum(1, keepdims=True)
    sharp = expected_calibration_error(truth, wrong)
    assert sharp > 0.1
    assert expected_calibration_error(truth, wrong, debiased=True) == pytest.approx(sharp, abs=0.01)


def test_overconfidence_worsens_every_number():
    truth, probabilities = some_rows(5, n=3000)
    sharper = probabilities**4 / (probabilities**4).sum(1, keepdims=True)
    for number in (expected_calibration_error, brier_score, log_loss):
        assert number(truth, sharper) > number(truth, probabilities)


def test_missing_labels_and_missing_classes():
    truth, probabilities = some_rows(6, n=50)
    gaps = [None if i % 5 == 0 else int(t) for i, t in enumerate(truth)]
    kept = np.array([t is not None for t in gaps])
    for number in (expected_calibration_error, brier_score, log_loss):
        assert number(gaps, probabilities) == pytest.approx(number(truth[kept], probabilities[kept]))
        assert math.isnan(number([None] * 50, probabilities))
        assert math.isfinite(number(np.zeros(50, int), probabilities))  # two of three classes have no row
    assert reliability_curve([None] * 50, probabilities, groups=range(50)).count == ()
    for interval in (expected_calibration_error_interval, brier_score_interval, log_loss_interval):
        empty = interval([None] * 50, probabilities, range(50))
        assert empty.n == 0
        assert math.isnan(empty.value)
        assert interval(gaps, probabilities, range(50), n_resamples=50).n == kept.sum()


def test_intervals_are_those_of_the_slow_bootstrap():
    truth, probabilities = some_rows(7, n=60)
    groups = np.arange(60) // 3
    for fast, slow in (
        (brier_score_interval, brier_score),
        (log_loss_interval, log_loss),
        (expected_calibration_error_interval, expected_calibration_error),
    ):
        a = fast(truth, probabilities, groups, n_resamples=40)
        b = bootstrap_interval(lambda i, f=slow: f(truth[i], probabilities[i]), groups, n_resamples=40)
        assert np.allclose([a.value, a.low, a.high], [b.value, b.low, b.high])


def test_reliability_curve_with_and_without_patients():
    truth, probabilities = some_rows(8, n=400)
    curve = reliability_curve(truth, probabilities, groups=np.arange(400) // 2, n_resamples=200)
    assert sum(curve.count) == 400
    assert list(curve.confidence) == sorted(curve.confidence)
    assert all(lo <= a <= hi for lo, a, hi in zip(curve.low, curve.accuracy, curve.high, strict=True))
    one_bin = reliability_curve(truth, probabilities, groups=np.arange(400) // 2, bins=1, n_resamples=200, seed=3)
    share = weighted_interval(
        accuracy_statistic(truth, probabilities.argmax(1)), np.arange(400) // 2, n_resamples=200, seed=3
    )
    assert (one_bin.low[0], one_bin.high[0]) == pytest.approx((share.low, share.high))
    bare = reliability_curve(truth, probabilities)
    assert bare.accuracy == curve.accuracy
    assert np.isnan(bare.low).all()
    assert np.isnan(reliability_curve(truth, probabilities, groups=["one"] * 400).low).all()


@pytest.mark.parametrize(
    ("truth", "probabilities", "message"),
    [
        ([0, 1], [[2.0, -1.0], [0.5, 0.5]], "outside"),
        ([0, 1], [[np.nan, 1.0], [0.5, 0.5]], "outside"),
        ([0, 1], [[0.5, 0.6], [0.5, 0.5]], "sum to 1"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], "0 to 1"),
        ([0, 0.5], [[0.5, 0.5], [0.5, 0.5]], "0 to 1"),
        ([0, "patient-7"], [[0.5, 0.5], [0.5, 0.5]], "text"),
        ([0], [[0.5, 0.5], [0.5, 0.5]], "2 rows for 1"),
        ([0, 1], [[1.0], [1.0]], "two classes"),
    ],
)
def test_hostile_input(truth, probabilities, message):
    for number in (expected_calibration_error, brier_score, log_loss):
        with pytest.raises(InputError, match=message) as caught:
            number(truth, probabilities)
        assert "patient" not in str(caught.value)


def test_wrong_options_and_groups():
    truth, probabilities = some_rows(9, n=10)
    with pytest.raises(InputError, match="bins"):
        expected_calibration_error(truth, probabilities, bins=0)
    with pytest.raises(InputError, match="binning"):
        reliability_curve(truth, probabilities, binning="equal")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="groups"):
        reliability_curve(truth, probabilities, groups=["a"])
    with pytest.raises(InputError, match="groups"):
        brier_score_interval(truth, probabilities, ["a"])


def test_rounding_of_float32_is_no_error():
    probabilities = np.array([[1.0 + 1e-7, -1e-8], [0.25, 0.75]])
    assert brier_score([0, 1], probabilities) == pytest.approx(0.03125)
