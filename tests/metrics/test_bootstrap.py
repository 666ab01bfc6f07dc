"""Intervals that tell the truth: coverage, patients instead of rows, the same draws for everybody."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError
from chiasm.metrics import bootstrap
from chiasm.metrics.bootstrap import Clusters, bootstrap_interval, holm, paired_difference, weighted_interval
from chiasm.metrics.classification import accuracy, auprc, auroc, balanced_accuracy, macro_auroc
from chiasm.metrics.weighted import (
    accuracy_statistic,
    auprc_statistic,
    auroc_statistic,
    balanced_accuracy_statistic,
    macro_auroc_statistic,
    mean_statistic,
    median_statistic,
)

laws = settings(max_examples=30, deadline=None)


def some_rows(seed, n=60, patients=20):
    random = np.random.default_rng(seed)
    truth = random.integers(0, 2, n)
    score = np.round(random.normal(size=n) + truth, 1)
    return truth, score, random.integers(0, patients, n)


@laws
@given(st.integers(0, 2**31), st.integers(2, 30))
def test_weights_and_indices_give_the_same_interval(seed, patients):
    """The fast path is the slow path: every statistic, with ties and undefined resamples."""
    truth, score, groups = some_rows(seed, 40, patients)
    predicted = (score > 0.5).astype(int)
    both = np.stack([truth, 1 - truth], 1), np.stack([score, score**2], 1)
    couples = [
        (auroc_statistic(truth, score), lambda i: auroc(truth[i], score[i])),
        (auprc_statistic(truth, score), lambda i: auprc(truth[i], score[i])),
        (accuracy_statistic(truth, predicted), lambda i: accuracy(truth[i], predicted[i])),
        (balanced_accuracy_statistic(truth, predicted), lambda i: balanced_accuracy(truth[i], predicted[i])),
        (macro_auroc_statistic(*both), lambda i: macro_auroc(both[0][i], both[1][i]).value),
        (mean_statistic(score), lambda i: float(score[i].mean())),
        (median_statistic(score), lambda i: float(np.median(score[i]))),
    ]
    for fast, slow in couples:
        a = weighted_interval(fast, groups, n_resamples=30, seed=seed)
        b = bootstrap_interval(slow, groups, n_resamples=30, seed=seed)
        assert np.allclose([a.value, a.low, a.high], [b.value, b.low, b.high], equal_nan=True, atol=1e-12)
        assert a.n == b.n == 40


@laws
@given(st.integers(0, 2**31))
def test_order_of_rows_does_not_matter(seed):
    truth, score, groups = some_rows(seed)
    order = np.random.default_rng(seed).permutation(len(truth))
    a = weighted_interval(auroc_statistic(truth, score), groups, n_resamples=50)
    b = weighted_interval(auroc_statistic(truth[order], score[order]), groups[order], n_resamples=50)
    assert np.allclose([a.value, a.low, a.high], [b.value, b.low, b.high], equal_nan=True)


def test_size_of_the_blocks_does_not_matter(monkeypatch):
    truth, score, groups = some_rows(3)
    statistic = auroc_statistic(truth, score)
    expected = weighted_interval(statistic, groups, n_resamples=101, method="bca")
    monkeypatch.setattr(bootstrap, "CELLS_AT_ONCE", 250)
    assert weighted_interval(statistic, groups, n_resamples=101, method="bca") == expected


@pytest.mark.parametrize("copies", [2, 10])
def test_copies_of_a_patients_rows_do_not_shrink_the_interval(copies):
    """Ten images of one patient are not ten patients."""
    truth, score, _ = some_rows(1, 80)
    groups = np.arange(80)
    once = weighted_interval(auroc_statistic(truth, score), groups)
    many = [np.repeat(x, copies) for x in (truth, score, groups)]
    clustered = weighted_interval(auroc_statistic(many[0], many[1]), many[2])
    naive = weighted_interval(auroc_statistic(many[0], many[1]), np.arange(80 * copies))
    assert clustered.value == pytest.approx(once.value)
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low)
    assert naive.high - naive.low < 0.85 * (once.high - once.low)


def test_groups_widen_the_interval_of_correlated_rows():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 8)
    values = np.repeat(random.normal(size=30), 8) + 0.1 * random.normal(size=240)
    clustered = weighted_interval(mean_statistic(values), groups)
    naive = weighted_interval(mean_statistic(values), np.arange(240))
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_coverage(method):
    """In 200 worlds with 40 patients of 3 images each, a 90 % interval holds the true AUROC about 90 % of the time."""
    random = np.random.default_rng(7)
    # Patient effect and image noise of variance 1/2 each, shift 1: true AUROC = Phi(1 / sqrt(2)).
    true = 0.5 * (1 + math.erf(0.5))
    held = 0
    for world in range(200):
        truth = np.repeat(np.arange(40) % 2, 3)
        score = truth + np.sqrt(0.5) * (np.repeat(random.normal(size=40), 3) + random.normal(size=120))
        groups = np.repeat(np.arange(40), 3)
        interval = weighted_interval(
            auroc_statistic(truth, score), groups, n_resamples=200, level=0.9, seed=world, method=method
        )
        held += interval.low <= true <= interval.high
    # Binomial standard deviation 2.1 %; percentile intervals of 40 patients are known to be a little short.
    assert 0.82 <= held / 200 <= 0.97


def test_coverage_fails_without_groups():
    """Negative test of the one above: rows taken for independent patients promise too much."""
    random = np.random.default_rng(7)
    held = 0
    for world in range(100):
        values = np.repeat(random.normal(size=20), 8) + 0.2 * random.normal(size=160)
        interval = weighted_interval(mean_statistic(values), np.arange(160), n_resamples=200, level=0.9, seed=world)
        held += interval.low <= 0 <= interval.high
    assert held / 100 < 0.65


def test_bca_corrects_a_skewed_statistic():
    """The variance of few normal values is biased low: BCa moves the interval up."""
    random = np.random.default_rng(0)
    values = random.normal(size=25)

    def variance(weights):
        total = weights.sum(1)
        mean = weights @ values / total
        return weights @ values**2 / total - mean**2

    plain = weighted_interval(variance, np.arange(25))
    corrected = weighted_interval(variance, np.arange(25), method="bca")
    assert corrected.low > plain.low
    assert corrected.high > plain.high
    assert corrected.value == plain.value


def test_bca_of_a_constant_is_the_constant():
    interval = weighted_interval(mean_statistic(np.ones(9)), np.arange(9), method="bca")
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_bca_falls_back_to_percentiles_where_it_is_undefined():
    """Every resample lies on one side of the value, so that no bias can be estimated."""
    values = np.arange(30.0)

    def statistic(weights):
        return np.where((weights == 1).all(1), 99.0, weights @ values / weights.sum(1))

    corrected = weighted_interval(statistic, range(30), method="bca")
    assert corrected == weighted_interval(statistic, range(30))
    assert corrected.high < corrected.value


def test_one_patient_has_no_interval():
    for interval in (
        weighted_interval(mean_statistic([1.0, 2.0]), ["a", "a"]),
        bootstrap_interval(lambda i: float(i.mean()), ["a", "a"]),
    ):
        assert math.isfinite(interval.value)
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
        assert interval.to_dict()["low"] is None


def test_mostly_undefined_resamples_give_no_interval():
    truth, score = np.array([1] + [0] * 4), np.arange(5.0)
    rare = weighted_interval(auroc_statistic(truth, score), np.arange(5))
    assert math.isfinite(rare.low)  # the positive is drawn in 67 % of resamples
    never = bootstrap_interval(lambda i: 1.0 if len(np.unique(i)) == 5 else math.nan, np.arange(5))
    assert never.value == 1.0
    assert math.isnan(never.low)


def test_paired_difference_sees_what_separate_intervals_hide():
    random = np.random.default_rng(0)
    n = 300
    truth, groups = random.integers(0, 2, n), np.repeat(np.arange(n // 3), 3)
    base = truth + 1.5 * random.normal(size=n)
    better = base + 0.25 * (2 * truth - 1)
    first, second = auroc_statistic(truth, better), auroc_statistic(truth, base)
    found = paired_difference(first, second, groups)
    assert found.difference.value == pytest.approx(auroc(truth, better) - auroc(truth, base))
    assert found.difference.low > 0
    assert found.difference.chance == 0.0
    assert found.p_value < 0.01
    a, b = weighted_interval(first, groups), weighted_interval(second, groups)
    assert a.low < b.high  # the intervals of the two overlap all the same
    reverse = paired_difference(second, first, groups)
    assert reverse.p_value == found.p_value
    assert reverse.difference.value == -found.difference.value


def test_no_difference_is_not_significant():
    truth, score, groups = some_rows(0)
    same = paired_difference(auroc_statistic(truth, score), auroc_statistic(truth, score * 2), groups)
    assert same.difference.value == 0
    assert same.p_value == 1.0
    assert math.isnan(paired_difference(mean_statistic([1.0]), mean_statistic([2.0]), ["a"]).p_value)


def test_p_values_under_no_difference_are_spread_out():
    random = np.random.default_rng(5)
    p_values = []
    for world in range(100):
        values = random.normal(size=(2, 40))
        p_values.append(
            paired_difference(
                mean_statistic(values[0]), mean_statistic(values[1]), np.arange(40), n_resamples=200, seed=world
            ).p_value
        )
    assert np.mean(np.array(p_values) < 0.05) < 0.15
    assert 0.3 < np.mean(p_values) < 0.7


@laws
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_laws(p_values):
    adjusted = holm(p_values)
    given_, n = np.array(p_values), len(p_values)
    assert (adjusted >= given_).all()
    assert (adjusted <= np.minimum(1, n * given_) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(given_, kind="stable")]) >= 0).all()
    order = np.random.default_rng(0).permutation(n)
    assert np.array_equal(holm(given_[order]), adjusted[order])


def test_holm_by_hand():
    # Holm's example: 4 tests, sorted 0.01, 0.02, 0.03, 0.04 -> times 4, 3, 2, 1, never falling.
    assert holm([0.04, 0.01, 0.03, 0.02]).tolist() == [0.06, 0.04, 0.06, 0.06]
    assert np.array_equal(holm([0.5, math.nan, 0.01]), [0.5, math.nan, 0.02], equal_nan=True)
    for bad in ([1.5], [-0.1], [[0.1]]):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            holm(bad)


def test_groups_are_sorted_by_name():
    clusters = Clusters(["b", "a", "b"])
    assert clusters.count == 2
    assert [m.tolist() for m in clusters.members()] == [[1], [0, 2]]
    (weights,) = clusters.weights(5, 0)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, :2].sum(1) == 2).all()


def test_no_rows():
    with pytest.raises(InputError, match="no rows"):
        weighted_interval(mean_statistic([]), [])
    with pytest.raises(InputError, match="no rows"):
        bootstrap_interval(lambda i: 0.0, [])


@laws
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-9, 9)), min_size=1, max_size=20))
def test_whole_weights_are_repeated_rows(rows):
    weights, values = (np.array(c) for c in zip(*rows, strict=True))
    repeated = np.repeat(values, weights)
    for statistic, plain in ((mean_statistic(values), np.mean), (median_statistic(values), np.median)):
        (found,) = statistic(weights[None, :].astype(float))
        if len(repeated):
            assert found == pytest.approx(plain(repeated), abs=1e-12)
        else:
            assert math.isnan(found)
