"""Paired differences: SciPy's p values, published figures tested again, exact laws, and what one seed cannot say."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import holm, weighted_interval
from chiasm.metrics.classification import balanced_accuracy
from chiasm.metrics.paired import (
    ArmPredictions,
    Summary,
    correct,
    joint_draws,
    mcnemar_exact,
    mean_over_seeds,
    seed_difference,
    smallest_wilcoxon_p,
    welch_t,
    wilcoxon_exact,
)
from chiasm.metrics.weighted import mean_statistic

laws = settings(max_examples=40, deadline=None)
numbers = st.lists(st.floats(-1, 1).map(lambda x: round(x, 4)), min_size=2, max_size=10)

#: Mean, std of three runs (macro accuracy, %): unimodal, CLIP-IT; then the two-sided p of the specification.
PUBLISHED = {
    "PCAM": [
        ((94.24, 0.14), (95.49, 0.27), 0.006),
        ((88.88, 0.75), (92.32, 0.84), 0.006),
        ((88.13, 1.09), (91.42, 1.28), 0.029),
        ((88.43, 0.26), (90.93, 1.12), 0.054),
        ((87.54, 0.71), (91.92, 0.87), 0.003),
        ((87.90, 0.61), (90.24, 0.90), 0.026),
    ],
    "BACH": [
        ((78.89, 1.56), (81.79, 1.98), 0.12),
        ((84.26, 2.30), (86.11, 3.21), 0.47),
        ((80.78, 2.14), (82.94, 4.52), 0.51),
        ((82.90, 5.56), (84.64, 6.68), 0.75),
        ((86.90, 2.32), (87.06, 1.22), 0.92),
        ((81.01, 3.04), (82.55, 1.57), 0.49),
    ],
    "CRC": [
        ((94.66, 0.41), (95.92, 0.07), 0.03),
        ((94.40, 0.40), (95.91, 0.06), 0.02),
        ((93.77, 0.29), (95.34, 0.20), 0.002),
    ],
}


@pytest.mark.parametrize(("first", "second", "p"), [row for rows in PUBLISHED.values() for row in rows])
def test_welch_gives_the_p_values_of_the_published_table(first, second, p):
    found = welch_t(Summary(*second, 3), Summary(*first, 3))
    digits = len(str(p).split(".")[1])
    assert abs(found.p - p) <= 0.51 * 10**-digits
    assert found.value == pytest.approx(second[0] - first[0])
    assert (found.low > 0) == (found.p < 0.05)


@laws
@given(numbers, numbers)
def test_welch_is_that_of_scipy(a, b):
    if np.std(a) + np.std(b) < 1e-3:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SciPy says so when all runs of one side are equal
        expected = stats.ttest_ind(a, b, equal_var=False)
    first, second = (Summary(float(np.mean(x)), float(np.std(x, ddof=1)), len(x)) for x in (a, b))
    found = welch_t(first, second)
    bounds = expected.confidence_interval()
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high))
    back = welch_t(second, first)
    assert (back.p, back.value) == pytest.approx((found.p, -found.value))


def test_welch_without_scatter_and_refusals():
    flat = welch_t(Summary(0.5, 0, 3), Summary(0.4, 0, 3))
    assert flat.low == flat.high == flat.value
    assert math.isnan(flat.p)
    for bad in (Summary(0.5, 0.1, 1), Summary(0.5, -0.1, 3), Summary(0.5, math.nan, 3)):
        with pytest.raises(InputError, match="cannot be tested"):
            welch_t(bad, Summary(0.5, 0.1, 3))


@laws
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=10))
def test_paired_t_is_that_of_scipy_and_needs_pairs(rows):
    first, second = (dict(enumerate(c)) for c in zip(*rows, strict=True))
    found = seed_difference(first, second)
    differences = np.array([a - b for a, b in rows])
    assert found.value == pytest.approx(differences.mean(), abs=1e-12)
    if found.std > 1e-6:
        expected = stats.ttest_rel(*(np.array(c) for c in zip(*rows, strict=True)))
        bounds = expected.confidence_interval()
        assert found.p_raw == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
        assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), abs=1e-9)
        assert (found.low > 0 or found.high < 0) == (found.p_raw < 0.05)
    back = seed_difference(second, first)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert math.isnan(found.p)


def test_pairing_sees_what_means_hide():
    """The trap: seeds differ by far more than arms; an unpaired test is blind, a paired one is not."""
    base = np.array([0.6, 0.7, 0.8, 0.65, 0.75])
    gain = np.array([0.03, 0.035, 0.028, 0.033, 0.031])
    paired = seed_difference(dict(enumerate(base + gain)), dict(enumerate(base)))
    unpaired = welch_t(*(Summary(float(x.mean()), float(x.std(ddof=1)), 5) for x in (base + gain, base)))
    assert paired.p_raw < 0.001
    assert unpaired.p > 0.5


def test_one_seed_proves_nothing():
    found = seed_difference({3: 0.9}, {3: 0.5})
    assert found.value == pytest.approx(0.4)
    assert math.isnan(found.low)
    assert math.isnan(found.p_raw)
    assert found.smallest_p_wilcoxon == found.p_wilcoxon == 1.0
    nothing = seed_difference({1: 0.9}, {2: 0.5})
    assert math.isnan(nothing.value)
    assert nothing.left_out == (1, 2)
    assert nothing.seeds == ()


def test_only_common_and_defined_seeds_are_paired():
    first = {0: 0.8, 1: 0.82, 2: math.nan, 4: 0.9}
    second = {4: 0.85, 1: 0.8, 0: 0.75, 2: 0.7, 3: 0.1}
    found = seed_difference(first, second)
    assert found.seeds == (0, 1, 4)
    assert found.left_out == (2, 3)
    assert found.per_seed == pytest.approx((0.05, 0.02, 0.05))


def test_differences_without_scatter():
    """Seeds that change nothing are no evidence: the p is that of a sign test, never 0."""
    same = seed_difference({s: 0.7 + s / 10 for s in range(5)}, {s: 0.6 + s / 10 for s in range(5)})
    assert (same.low, same.high) == pytest.approx((0.1, 0.1))
    assert same.p_raw == 2 / 2**5
    none = seed_difference(dict.fromkeys(range(5), 0.5), dict.fromkeys(range(5), 0.5))
    assert (none.value, none.low, none.high, none.p_raw, none.p_wilcoxon) == (0, 0, 0, 1.0, 1.0)


@laws
@given(st.lists(st.sampled_from([-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.25]), min_size=1, max_size=9))
def test_wilcoxon_is_its_definition_with_ties_and_zeros(differences):
    kept = np.array([d for d in differences if d != 0])
    found = wilcoxon_exact(differences)
    if not len(kept):
        assert found == 1.0
        return
    ranks = stats.rankdata(np.abs(kept))
    law = [
        sum(r for r, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=len(kept))
    ]
    reached = ranks[kept > 0].sum()
    tails = np.mean(np.array(law) <= reached), np.mean(np.array(law) >= reached)
    assert found == pytest.approx(min(1.0, 2 * min(tails)))
    assert found >= smallest_wilcoxon_p(len(kept)) - 1e-12


@laws
@given(st.integers(1, 30), st.integers(0, 2**31))
def test_wilcoxon_is_that_of_scipy_without_ties(n, seed):
    differences = np.random.default_rng(seed).normal(0.3, 1, n)
    assert wilcoxon_exact(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_what_five_seeds_can_reach():
    assert smallest_wilcoxon_p(5) == 0.0625
    assert wilcoxon_exact([0.1, 0.2, 0.3, 0.4, 0.5]) == 0.0625  # cannot be significant at .05, whatever the gain
    assert smallest_wilcoxon_p(6) < 0.05
    assert math.isnan(smallest_wilcoxon_p(0))
    assert math.isnan(wilcoxon_exact([]))


@laws
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_definition_rejects(p_values):
    """Step down: the k-th smallest of m is rejected while p <= alpha / (m - k), k counted from 0."""
    adjusted, m = holm(p_values), len(p_values)
    for alpha in (0.01, 0.05, 0.2):
        rejected = np.zeros(m, bool)
        for k, i in enumerate(np.argsort(p_values, kind="stable")):
            if p_values[i] * (m - k) > alpha:
                break
            rejected[i] = True
        assert np.array_equal(adjusted <= alpha, rejected)


def test_families_are_corrected_one_by_one():
    made = {
        name: seed_difference(
            dict(enumerate(np.random.default_rng(i).normal(0.1, 0.05, 5))), dict.fromkeys(range(5), 0.0)
        )
        for i, name in enumerate("abcd")
    }
    found = correct(made, [["b", "a", "absent"]])
    assert list(found) == list("abcd")
    assert [found["a"].p, found["b"].p] == pytest.approx(holm([made["a"].p_raw, made["b"].p_raw]).tolist())
    assert [found["c"].p, found["d"].p] == pytest.approx(holm([made["c"].p_raw, made["d"].p_raw]).tolist())
    one = correct(made)
    assert all(one[n].p >= found[n].p >= made[n].p_raw for n in made)
    assert correct({}) == {}
    single = correct({"x": seed_difference({0: 1.0}, {0: 0.0})})
    assert math.isnan(single["x"].p)


@laws
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_a_binomial_test(rows):
    first, second = (np.array(c) for c in zip(*rows, strict=True))
    found = mcnemar_exact(first, second)
    only = int((first & ~second).sum()), int((second & ~first).sum())
    assert (found.only_first, found.only_second) == only
    expected = stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
    assert found.p == pytest.approx(expected)
    with pytest.raises(InputError, match="samples"):
        mcnemar_exact(first, np.append(second, True))


def test_mean_over_seeds():
    values = [0.8, 0.85, 0.9, math.nan]
    found = mean_over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values[:3]), scale=stats.sem(values[:3]))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.85, low, high, 3))
    assert mean_over_seeds([]).n == 0
    assert mean_over_seeds([0.5]).value == 0.5
    with pytest.raises(InputError, match="level"):
        mean_over_seeds([0.5], level=95)


def crossed(random, n_seeds=5, n_patients=40, *, of_seed=0.05, of_patient=0.3, noise=0.2):
    """Numbers with a part of the seed, a part of the patient and a rest: shape (seeds, patients)."""
    parts = random.normal(0, of_seed, (n_seeds, 1)) + random.normal(0, of_patient, n_patients)
    return parts + random.normal(0, noise, (n_seeds, n_patients))


def test_joint_intervals_cover_where_intervals_over_seeds_do_not():
    """Truth 0; few seeds, one test set: over seeds only, the patients' luck is invisible."""
    random = np.random.default_rng(0)
    joint = seeds = 0
    rounds = 120
    for i in range(rounds):
        rows = crossed(random)
        over_seeds = mean_over_seeds(rows.mean(1))
        draws = joint_draws([[mean_statistic(r) for r in rows]], np.arange(40), n_resamples=200, seed=i)
        both = draws.interval(over_seeds.value, 0)
        joint += both.low <= 0 <= both.high
        seeds += over_seeds.low <= 0 <= over_seeds.high
    assert joint / rounds >= 0.9
    assert seeds / rounds < joint / rounds - 0.05


def test_joint_draws_of_one_seed_are_the_patient_bootstrap():
    values, groups = np.random.default_rng(1).normal(size=30), np.arange(30) // 2
    draws = joint_draws([[mean_statistic(values)]], groups, n_resamples=300, seed=5)
    expected = weighted_interval(mean_statistic(values), groups, n_resamples=300, seed=5)
    assert draws.interval(expected.value, 0) == expected


def test_joint_difference_is_paired_and_leaves_out_absent_seeds():
    random = np.random.default_rng(2)
    rows = crossed(random, of_patient=1.0, noise=0.01)
    first = [mean_statistic(r + 0.1) for r in rows]
    second = [mean_statistic(r) if s != 3 else None for s, r in enumerate(rows)]
    draws = joint_draws([first, second], np.arange(40), n_resamples=300)
    paired = draws.interval(0.1, 0, 1)
    assert paired.high - paired.low < 0.001  # patients differ by 1.0, but both arms see the same ones
    assert paired.low == pytest.approx(0.1, abs=1e-9)
    assert draws.interval(0.0, 0).high - draws.interval(0.0, 0).low > 0.2
    again = joint_draws([first, second], np.arange(40), n_resamples=300)
    assert again.interval(0.1, 0, 1) == paired


def test_joint_draws_where_nothing_can_be_said():
    one = joint_draws([[mean_statistic([1.0, 2.0])]], ["same", "same"], n_resamples=20)
    assert math.isnan(one.interval(1.5, 0).low)
    absent = joint_draws([[None, None]], ["a", "b"], n_resamples=20)
    assert math.isnan(absent.interval(math.nan, 0).low)
    with pytest.raises(InputError, match="same seeds"):
        joint_draws([[None], [None, None]], ["a"])
    with pytest.raises(InputError, match="no group"):
        joint_draws([[None]], ["a", None])


def make(**changed):
    values = {
        "arm": "clip_it",
        "seed": 1,
        "ids": ("secret-1", "secret-2"),
        "groups": ("p", "q"),
        "truth": np.array([0, 1]),
        "probabilities": np.array([[0.5, 0.5], [0.2, 0.8]]),
    }
    return ArmPredictions(**(values | changed))


def test_predictions_of_an_arm():
    given = make(probabilities=np.array([[0.5, 0.5], [0.2, 0.8]], dtype=np.float32))
    assert (given.n, given.n_classes) == (2, 2)
    assert given.predicted.tolist() == [0, 1]  # a tie takes the lowest class
    assert given.probabilities.dtype == np.float64
    assert given.truth.dtype == np.int64
    assert balanced_accuracy(given.truth, given.predicted) == 1.0
    assert given.test_digest == make(seed=2, arm="lambda0").test_digest
    assert given.test_digest != make(ids=("a", "b")).test_digest
    assert given.test_digest != make(groups=("p", "p")).test_digest
    assert given.digest != make(probabilities=np.array([[0.6, 0.4], [0.2, 0.8]])).digest


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids": ("a",)}, "1 ids, 2 groups"),
        ({"ids": ("secret-1", "secret-1")}, "1 of 2 ids repeat"),
        ({"truth": np.array([0, 2])}, "0 to 1"),
        ({"truth": np.array([0, np.nan])}, "no label"),
        ({"probabilities": np.array([[3.0, -2.0], [0.0, 1.0]])}, "softmax"),
        ({"ids": (), "groups": (), "truth": np.zeros(0), "probabilities": np.zeros((0, 2))}, "no test samples"),
    ],
)
def test_hostile_predictions(changed, message):
    with pytest.raises(InputError, match=message) as caught:
        make(**changed)
    assert "secret" not in str(caught.value)
