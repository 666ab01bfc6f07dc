"""Two models on the same samples: DeLong by definition and by bootstrap, swaps of models, honest error rates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import holm, paired_difference, weighted_interval
from chiasm.metrics.classification import auroc
from chiasm.metrics.compare import (
    compare_auroc,
    compare_findings,
    compare_metric,
    delong_covariance,
    delong_test,
    midranks,
    permutation_p,
)
from chiasm.metrics.weighted import accuracy_statistic, auprc_statistic, auroc_statistic, macro_auroc_statistic

laws = settings(max_examples=15, deadline=None)


def two_models(seed, n=200, *, gain=0.0, patients=None, ties=False):
    """Truth, two noisy scores of it that share noise, and patients who share noise and truth."""
    random = np.random.default_rng(seed)
    patient = np.arange(n) if patients is None else random.integers(0, patients, n)
    count = int(patient.max()) + 1
    truth = (random.random(count) < 0.4)[patient].astype(float)
    shared, noise = random.normal(size=n), random.normal(size=(2, n))
    own = random.normal(size=(2, count))[:, patient] * (0.0 if patients is None else 0.8)
    first, second = (truth * s + shared + noise[k] + own[k] for k, s in enumerate((1 + gain, 1.0)))
    if ties:
        first, second = np.round(first), np.round(second)
    return truth, first, second, patient


def brute_force(truth, scores):
    """DeLong et al. 1988, eq. 5: the kernel of every pair, rows averaged, their sample covariances added."""
    ones, zeros = scores[truth == 1], scores[truth == 0]
    kernel = (ones[:, None] > zeros[None]) + 0.5 * (ones[:, None] == zeros[None])
    v10, v01 = kernel.mean(1), kernel.mean(0)
    return kernel.mean((0, 1)), np.cov(v10.T) / len(ones) + np.cov(v01.T) / len(zeros)


@laws
@given(st.integers(0, 2**31), st.booleans())
def test_delong_is_its_definition(seed, ties):
    truth, first, second, _ = two_models(seed, 50, ties=ties)
    truth[:4] = 0, 0, 1, 1
    scores = np.stack([first, second, first + second], 1)
    found = delong_covariance(truth, scores)
    expected = brute_force(truth, scores)
    np.testing.assert_allclose(found.auroc, expected[0], atol=1e-12)
    np.testing.assert_allclose(found.covariance, expected[1], atol=1e-12)
    assert found.auroc[0] == pytest.approx(auroc(truth, first), abs=1e-12)
    assert not found.clustered


@laws
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20))
def test_midranks_are_scipys(values):
    from scipy.stats import rankdata

    assert midranks(values).tolist() == rankdata(values).tolist()


@laws
@given(st.integers(0, 2**31))
def test_laws_of_delong(seed):
    truth, first, second, patient = two_models(seed, 80, patients=30, gain=0.3)
    truth[:4] = 0, 0, 1, 1
    patient[:4] = range(4)
    here = delong_test(truth, first, second, patient)
    back = delong_test(truth, second, first, patient)
    order = np.random.default_rng(seed).permutation(len(truth))
    moved = delong_test(truth[order], np.exp(first[order]), 3 * second[order], patient[order])
    assert here.difference.value == pytest.approx(-back.difference.value, abs=1e-12)
    assert here.p_raw == pytest.approx(back.p_raw, abs=1e-12)
    assert here.p_raw == pytest.approx(moved.p_raw, abs=1e-9)
    assert here.difference.low <= here.difference.value <= here.difference.high
    assert math.isnan(here.p)
    assert 0 < here.p_raw <= 1


@pytest.mark.parametrize("patients", [None, 120])
def test_delong_agrees_with_the_bootstrap_of_patients(patients):
    truth, first, second, patient = two_models(3, 400, patients=patients, gain=0.3)
    here = delong_test(truth, first, second, patient)
    statistics = auroc_statistic(truth, first), auroc_statistic(truth, second)
    there = paired_difference(*statistics, patient, n_resamples=1500).difference
    assert here.difference.value == pytest.approx(there.value, abs=1e-12)
    width = there.high - there.low
    assert here.difference.low == pytest.approx(there.low, abs=0.12 * width)
    assert here.difference.high == pytest.approx(there.high, abs=0.12 * width)
    assert here.test == ("delong" if patients is None else "delong_clustered")


def test_copies_of_a_patients_rows_prove_nothing():
    truth, first, second, patient = two_models(5, 100, gain=0.4)
    once = delong_test(truth, first, second, patient)
    copied = delong_test(*(np.repeat(x, 5) for x in (truth, first, second, patient)))
    assert copied.p_raw == pytest.approx(once.p_raw, rel=1e-9)
    assert copied.test == "delong_clustered"
    naive = delong_test(*(np.repeat(x, 5) for x in (truth, first, second)))
    assert naive.p_raw < once.p_raw / 2


def simulate(count, **options):
    return [two_models(seed, **options) for seed in range(count)]


def test_type_one_error_of_delong_is_nominal():
    """500 pairs of equal models: 5 % ± 3 standard errors (1 point) may be called different."""
    p = [delong_test(*rows).p_raw for rows in simulate(500, n=120)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.08


def test_type_one_error_of_the_clustered_test_is_nominal_where_rows_mislead():
    rows = simulate(300, n=240, patients=80)
    clustered = np.mean([delong_test(*r).p_raw < 0.05 for r in rows])
    by_rows = np.mean([delong_test(*r[:3]).p_raw < 0.05 for r in rows])
    assert 0.02 <= clustered <= 0.085
    assert by_rows > clustered + 0.03


def test_type_one_error_of_the_permutation_test_is_nominal():
    rows = simulate(200, n=100, patients=40)
    p = [permutation_p(auroc_statistic, *r, n_permutations=99, ranks=True) for r in rows]
    assert 0.005 <= np.mean(np.array(p) < 0.05) <= 0.1
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_bootstrap_intervals_cover_the_truth_on_clustered_data():
    """The truth is the AUROC of 100,000 rows; 95 % less 5 points or plus 4 of 200 intervals."""
    truth, first, _, _ = two_models(10**6, 100_000, patients=35_000)
    value = auroc(truth, first)
    intervals = [
        weighted_interval(auroc_statistic(t, a), g, n_resamples=250)
        for t, a, _, g in simulate(200, n=240, patients=80)
    ]  # fmt: skip
    assert 0.90 <= np.mean([i.low <= value <= i.high for i in intervals]) <= 0.99


def test_swaps_are_exact_where_all_can_be_counted():
    truth = np.array([0, 1, 1, 0, 1, 0])
    first, second = np.array([0, 1, 1, 0, 1, 0]), np.array([1, 0, 1, 0, 0, 0])
    groups = ["a", "a", "b", "b", "c", "d"]
    seen = []
    for swap in itertools.product([False, True], repeat=4):
        moved = np.array(swap)[[0, 0, 1, 1, 2, 3]]
        a, b = np.where(moved, second, first), np.where(moved, first, second)
        seen.append(abs(np.mean(a == truth) - np.mean(b == truth)))
    expected = np.mean(np.array(seen) >= seen[0] - 1e-12)
    assert permutation_p(accuracy_statistic, truth, first, second, groups) == expected == 0.5


def test_swaps_of_scores_on_two_scales_go_by_rank():
    truth, first, second, patient = two_models(8, 100)
    p = [permutation_p(auroc_statistic, truth, first, scaled, patient, ranks=True) for scaled in (second, second * 100)]
    assert p[0] == p[1]


def test_power_where_one_model_is_better():
    truth, first, second, patient = two_models(1, 400, patients=150, gain=1.0)
    assert compare_auroc(truth, first, second, patient).p_raw < 0.001
    found = compare_metric(auprc_statistic, truth, first, second, patient, ranks=True, n_resamples=500)
    assert found.p_raw == pytest.approx(1 / 501)
    assert found.difference.low > 0
    assert (found.test, found.interval) == ("permutation", "bootstrap")


def test_the_rule_of_the_test():
    truth, first, second, patient = two_models(2, 100)
    assert compare_auroc(truth, first, second, patient).test == "delong"
    assert compare_auroc(truth, first, second, patient // 2).test == "delong_clustered"
    rare = np.zeros(100)
    rare[:9] = 1
    assert compare_auroc(rare, first, second, patient, n_resamples=99).test == "permutation"
    assert compare_auroc(rare, first, second, patient, test="delong").test == "delong"
    # Perfect against reversed: no spread, which must not become p = 0.
    apart = compare_auroc(truth, truth, -truth, patient, n_resamples=99)
    assert apart.test == "permutation"
    assert apart.p_raw == pytest.approx(0.01)
    assert math.isnan(delong_test(truth, truth, -truth).p_raw)


def test_equal_models_differ_by_nothing():
    truth, first, _, patient = two_models(4, 100)
    found = compare_auroc(truth, first, 2 * first + 1, patient)
    assert (found.difference.value, found.difference.low, found.difference.high, found.p_raw) == (0, 0, 0, 1)


def test_findings_are_corrected_together():
    truth, first, second, patient = two_models(6, 200, gain=0.5)
    flipped = np.where(np.arange(200) < 20, np.nan, truth)
    found = compare_findings(
        {"effusion": truth, "nodule": flipped, "hernia": np.zeros(200)},
        dict.fromkeys(("effusion", "nodule", "hernia"), first),
        dict.fromkeys(("effusion", "nodule", "hernia"), second),
        patient,
    )
    pair = [found["effusion"], found["nodule"]]
    assert [t.p for t in pair] == holm([t.p_raw for t in pair]).tolist()
    assert math.isnan(found["hernia"].p)
    assert found["nodule"].difference.n == 180
    assert found["hernia"].to_dict()["p"] is None
    with pytest.raises(InputError, match="no scores of 1 of 1 findings"):
        compare_findings({"effusion": truth}, {}, {"effusion": second}, patient)


def test_several_labels_and_missing_cells():
    truth, first, second, patient = two_models(7, 120)
    labels = np.stack([truth, np.where(np.arange(120) < 30, np.nan, 1 - truth)], 1)
    scores = np.stack([first, -first], 1), np.stack([second, -second], 1)
    found = compare_metric(macro_auroc_statistic, labels, *scores, patient, ranks=True, n_resamples=99)
    assert 0 < found.p_raw <= 1
    assert found.difference.n == 120
    assert found.patients == 120


def test_what_cannot_be_compared():
    truth, first, second, patient = two_models(9, 40)
    nothing = compare_auroc(np.full(40, np.nan), first, second, patient)
    assert math.isnan(nothing.p_raw)
    assert nothing.difference.n == 0
    with pytest.raises(InputError, match="NaN"):
        compare_auroc(truth, np.full(40, np.nan), second, patient)
    with pytest.raises(InputError, match="groups"):
        compare_auroc(truth, first, second, patient[:-1])
    with pytest.raises(InputError, match="unknown test"):
        compare_auroc(truth, first, second, patient, test="t")
    with pytest.raises(InputError, match="level"):
        delong_test(truth, first, second, level=95)
    with pytest.raises(InputError, match="permutations"):
        permutation_p(auroc_statistic, truth, first, second, patient, n_permutations=0)
    with pytest.raises(InputError, match="answers of shape"):
        permutation_p(auroc_statistic, truth, first[:-1], second, patient)
