"""Survival curves, tests and concordance: equal to scikit-survival, their laws, and one negative test a trap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError
from chiasm.metrics.concordance import (
    auc_at,
    auc_statistic,
    brier_statistic,
    compare_statistics,
    harrell_c,
    harrell_statistic,
    integrated_brier,
    integrated_brier_statistic,
    mean_auc,
    uno_c,
    uno_statistic,
    usable_tau,
)
from chiasm.metrics.survival import (
    as_survival,
    breslow_baseline,
    from_target,
    kaplan_meier,
    log_rank,
    numbers_at_risk,
    survival_target,
)

laws = settings(max_examples=25, deadline=None)
FEW = {"n_resamples": 20}


def cohort(seed, n=120, *, ties=True, censored=1.5):
    """Times with ties, flags, and a risk that knows something, with ties of its own."""
    random = np.random.default_rng(seed)
    risk = np.round(random.normal(size=n), 1 if ties else 6)
    died = random.exponential(100 * np.exp(-0.7 * risk))
    lost = random.exponential(100 * censored, n)
    time = np.minimum(died, lost)
    time = np.ceil(time / 4) * 4 if ties else time + 1e-3
    event = died <= lost
    event[:2] = True, False
    return time, event, risk


def closed(t, e):
    """The same patients and one who dies last, as the peer needs it: else somebody has no weight."""
    return np.append(t, t.max() + 40), np.append(e, True)


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("sksurv.metrics", reason="the extra `survival` is not installed")


@pytest.mark.parametrize("ties", [True, False])
def test_concordance_equals_scikit_survival(peer, ties):
    for seed in range(4):
        t, e, f = cohort(seed, ties=ties)
        (t, e), f = closed(t, e), np.append(f, 0.1)
        other = closed(*cohort(seed + 50, ties=ties)[:2])
        other[0][-1] += t.max()
        y, train = survival_target(t, e), survival_target(*other)
        assert harrell_c(t, e, f, **FEW).value == pytest.approx(peer.concordance_index_censored(e, t, f)[0], abs=1e-12)
        tau = usable_tau(t, e)
        for reference, target in ((None, y), (other, train)):
            for limit in (tau, tau / 2):
                ours = uno_c(t, e, f, tau=limit, reference=reference, **FEW).value
                assert ours == pytest.approx(peer.concordance_index_ipcw(target, y, f, tau=limit)[0], abs=1e-10)
            at = np.quantile(t[e], [0.2, 0.5, 0.8])
            theirs, mean = peer.cumulative_dynamic_auc(target, y, f, at)
            ours = [auc_at(t, e, f, x, reference=reference, **FEW).value for x in at]
            np.testing.assert_allclose(ours, theirs, atol=1e-10)
            assert mean_auc(t, e, at, ours) == pytest.approx(mean, abs=1e-10)


def test_brier_score_equals_scikit_survival(peer):
    for seed in range(4):
        t, e = closed(*cohort(seed)[:2])
        other = closed(*cohort(seed + 50)[:2])
        other[0][-1] += t.max()
        at = np.quantile(t[e], [0.2, 0.4, 0.6, 0.8])
        survival = np.random.default_rng(seed).random((len(t), 4))
        for reference, target in ((None, survival_target(t, e)), (other, survival_target(*other))):
            y = survival_target(t, e)
            ours = brier_statistic(t, e, survival, at, reference=reference)(np.ones((1, len(t))))[0]
            np.testing.assert_allclose(ours, peer.brier_score(target, y, survival, at)[1], atol=1e-10)
            whole = integrated_brier(t, e, survival, at, reference=reference, **FEW).value
            assert whole == pytest.approx(peer.integrated_brier_score(target, y, survival, at), abs=1e-10)


def test_curves_and_tests_equal_scikit_survival(peer):
    from sksurv.compare import compare_survival
    from sksurv.nonparametric import kaplan_meier_estimator

    for seed in range(4):
        t, e, _ = cohort(seed)
        ours = kaplan_meier(t, e)
        _, survival, bounds = kaplan_meier_estimator(e, t, conf_type="log-log")
        np.testing.assert_allclose(ours.survival, survival, atol=1e-12)
        inside = (survival > 0) & (survival < 1)
        np.testing.assert_allclose([ours.low[inside], ours.high[inside]], bounds[:, inside], atol=1e-10)
        group = np.random.default_rng(seed).integers(0, 3, len(t))
        test = log_rank(t, e, group)
        assert (test.chi2, test.p_value) == pytest.approx(compare_survival(survival_target(t, e), group), abs=1e-9)


def test_breslow_equals_scikit_survival(peer):
    from sksurv.linear_model.coxph import BreslowEstimator

    t, e, f = cohort(3)
    theirs = BreslowEstimator().fit(f, e, t)
    ours = breslow_baseline(t, e, f)
    at = np.quantile(t, [0.1, 0.3, 0.5, 0.9])
    np.testing.assert_allclose(
        ours.survival(f[:5], at), [fn(at) for fn in theirs.get_survival_function(f[:5])], atol=1e-12
    )


def slow_harrell(time, event, risk, strata):
    """By definition, pair by pair."""
    right = pairs = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            later = time[j] > time[i] or (time[j] == time[i] and not event[j])
            if event[i] and later and strata[i] == strata[j]:
                pairs += 1
                right += 0.5 if abs(risk[i] - risk[j]) <= 1e-8 else float(risk[i] > risk[j])
    return right / pairs


def test_pairs_are_formed_within_strata_only():
    t, e, f = cohort(1, 50)
    strata = np.arange(50) % 3
    assert harrell_c(t, e, f, strata=strata, **FEW).value == pytest.approx(slow_harrell(t, e, f, strata), abs=1e-12)
    shifted = f + 100.0 * strata  # what models of different folds do to their risks
    assert harrell_c(t, e, shifted, strata=strata, **FEW).value == harrell_c(t, e, f, strata=strata, **FEW).value
    assert harrell_c(t, e, shifted, **FEW).value != harrell_c(t, e, f, **FEW).value


@laws
@given(st.integers(0, 10_000), st.floats(0.01, 1000), st.floats(-5, 5))
def test_order_is_all_that_counts(seed, scale, shift):
    t, e, f = cohort(seed, 40)
    at = float(np.median(t[e]))
    if not ((t > at).any() and (e & (t <= at)).any()):
        return
    tau = usable_tau(t, e) + 1
    ones = np.ones((1, 40))
    for measure in (
        harrell_statistic,
        lambda t, e, f: uno_statistic(t, e, f, tau=tau),
        lambda t, e, f: auc_statistic(t, e, f, at),
    ):
        value = measure(t, e, f)(ones)[0]
        np.testing.assert_allclose(measure(t, e, 2 * f + shift)(ones)[0], value, atol=1e-12)
        np.testing.assert_allclose(measure(t, e, -f)(ones)[0], 1 - value, atol=1e-12)
        assert 0 <= value <= 1
        if measure is harrell_statistic:
            np.testing.assert_allclose(measure(t * scale, e, f)(ones)[0], value, atol=1e-12)


@laws
@given(st.integers(0, 10_000))
def test_weights_are_repeated_rows(seed):
    t, e, f = cohort(seed, 40)
    random = np.random.default_rng(seed)
    weights = random.integers(0, 3, 40).astype(float)
    rows = np.repeat(np.arange(40), weights.astype(int))
    at = float(np.median(t[e]))
    survival = random.random((40, 2))
    for make in (
        lambda r: harrell_statistic(t[r], e[r], f[r]),
        lambda r: uno_statistic(t[r], e[r], f[r], tau=at),
        lambda r: auc_statistic(t[r], e[r], f[r], at),
        lambda r: integrated_brier_statistic(t[r], e[r], survival[r], [at / 2, at * 0.9]),
    ):
        try:
            repeated = make(rows)(np.ones((1, len(rows))))
        except InputError:  # no event left, say
            continue
        np.testing.assert_allclose(make(np.arange(40))(weights[None])[0], repeated[0], atol=1e-10, equal_nan=True)


@laws
@given(st.integers(0, 10_000))
def test_a_survival_curve_falls_from_one_and_ignores_the_order_of_patients(seed):
    t, e, _ = cohort(seed, 30)
    curve = kaplan_meier(t, e)
    assert (np.diff(curve.survival) <= 0).all()
    assert ((curve.survival >= 0) & (curve.survival <= 1)).all()
    known = np.isfinite(curve.low)
    assert (curve.low[known] <= curve.survival[known]).all()
    assert (curve.high[known] >= curve.survival[known]).all()
    order = np.random.default_rng(seed).permutation(30)
    np.testing.assert_array_equal(kaplan_meier(t[order], e[order]).survival, curve.survival)
    np.testing.assert_array_equal(numbers_at_risk(t, curve.time), curve.at_risk)
    everyone = kaplan_meier(t, np.ones(30))
    np.testing.assert_allclose(everyone.at(t), [(t > x).mean() for x in t], atol=1e-12)


def test_a_curve_is_not_drawn_beyond_what_was_seen():
    curve = kaplan_meier([1, 2, 3], [1, 1, 0])
    np.testing.assert_allclose(curve.at([0.5, 1, 2.5, 3]), [1, 2 / 3, 1 / 3, 1 / 3])
    assert math.isnan(curve.at([3.1])[0])
    assert curve.median.value == 2
    assert kaplan_meier([1, 2], [1, 1]).at([9])[0] == 0
    assert math.isnan(kaplan_meier([1, 2, 3], [1, 0, 0]).median.value)


def test_a_stratified_test_removes_what_differs_between_strata():
    random = np.random.default_rng(0)
    stratum = np.repeat([0, 1], 400)
    group = (random.random(800) < np.where(stratum == 1, 0.8, 0.2)).astype(int)  # confounded with the stratum
    time = random.exponential(np.where(stratum == 1, 10.0, 100.0))
    event = np.ones(800)
    assert log_rank(time, event, group).p_value < 1e-6
    assert log_rank(time, event, group, strata=stratum).p_value > 0.05


def test_log_rank_of_equal_groups_has_uniform_p_values():
    random = np.random.default_rng(0)
    p = []
    for _ in range(300):
        t, c = random.exponential(1, 60), random.exponential(1.5, 60)
        p.append(log_rank(np.minimum(t, c), t <= c, np.arange(60) % 2).p_value)
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09  # 5 % ± three standard errors


def test_intervals_hold_the_truth_as_often_as_they_say():
    # The true C of a proportional hazard without censoring is the mean of σ(difference of risks), sign by sign.
    random = np.random.default_rng(1)
    risk = random.normal(size=200_000)
    gap = np.abs(risk[::2] - risk[1::2])
    truth = float((1 / (1 + np.exp(-gap))).mean())
    inside = 0
    for seed in range(120):
        random = np.random.default_rng(seed)
        f = random.normal(size=80)
        found = harrell_c(random.exponential(np.exp(-f)), np.ones(80), f, n_resamples=200, seed=seed)
        inside += found.low <= truth <= found.high
    assert inside >= 0.88 * 120


def test_uno_undoes_censoring_that_bends_harrell():
    # Early censoring leaves only early, high-risk pairs: Harrell's C drifts from the value without censoring.
    random = np.random.default_rng(0)
    f = random.normal(size=1500)
    died = random.exponential(np.exp(-(f**2) * np.sign(f)))
    lost = random.exponential(0.7, 1500)
    tau = 1.2
    full = uno_c(died, np.ones(1500), f, tau=tau, **FEW).value
    t, e = np.minimum(died, lost), died <= lost
    assert abs(uno_c(t, e, f, tau=tau, **FEW).value - full) < 0.01
    assert abs(harrell_c(t, e, f, **FEW).value - full) > 0.015


# one negative test a trap


def test_a_flipped_risk_is_seen_in_the_number():
    t, e, f = cohort(0)
    assert harrell_c(t, e, f, **FEW).value > 0.6
    assert harrell_c(t, e, -f, **FEW).value < 0.4


def test_an_inverted_event_flag_changes_every_number():
    t, e, f = cohort(0, censored=0.8)
    assert abs(harrell_c(t, e, f, **FEW).value - harrell_c(t, ~e, f, **FEW).value) > 0.1
    assert abs(kaplan_meier(t, e).at([60])[0] - kaplan_meier(t, ~e).at([60])[0]) > 0.05


def test_times_beyond_the_follow_up_are_refused():
    t, e, f = cohort(0)
    short = (t[t < 40], e[t < 40])
    with pytest.raises(InputError, match="followed up to"):
        auc_at(t, e, f, 100.0, reference=short, **FEW)
    with pytest.raises(InputError, match="no patient beyond"):
        breslow_baseline(*short, f[t < 40]).survival(f, [60.0])
    with pytest.raises(InputError, match="no patient beyond"):
        integrated_brier(t, e, np.full((len(t), 2), 0.5), [10.0, 1e6], **FEW)
    with pytest.raises(InputError, match="not both"):
        auc_at(t, e, f, 1e6, **FEW)


def test_months_asked_of_days_are_refused():
    t, e, f = cohort(0)  # days; a tau or a horizon in months lies before every event
    with pytest.raises(InputError, match="no event lies before"):
        uno_c(t, e, f, tau=float(t.min()) / 30.4, **FEW)
    with pytest.raises(InputError, match="not both"):
        auc_at(t, e, f, float(t.min()) / 30.4, **FEW)


def test_a_weight_without_bound_is_refused():
    t, e, f = np.array([1.0, 2, 3, 3]), np.array([1, 0, 1, 0]), np.array([4.0, 3, 2, 1])
    with pytest.raises(InputError, match="no bound"):
        uno_c(t, e, f, **FEW)  # all under observation at 3 are censored there or die there


@pytest.mark.parametrize(
    ("time", "event", "message"),
    [
        ([1, 0], [1, 0], "zero or negative"),
        ([1, math.nan], [1, 0], "missing"),
        ([1, 2], [1, 2], "0 .censored. or 1"),
        ([1, 2], [1], "shape"),
        ([], [], "list of numbers"),
        ([[1]], [[1]], "list of numbers"),
    ],
)
def test_what_is_no_outcome_is_refused(time, event, message):
    with pytest.raises(InputError, match=message):
        as_survival(time, event)


def test_other_hostile_input_is_refused():
    with pytest.raises(InputError, match="no two patients"):
        harrell_c([1, 2], [0, 0], [1.0, 2.0])
    with pytest.raises(InputError, match="finite"):
        harrell_c([1, 2], [1, 0], [1.0, math.nan])
    with pytest.raises(InputError, match="two groups"):
        log_rank([1, 2], [1, 1], ["a", "a"])
    with pytest.raises(InputError, match="all times are censored"):
        usable_tau([1, 2], [0, 0])
    with pytest.raises(InputError, match="probabilities"):
        brier_statistic([1, 2], [1, 0], [[1.5], [0.2]], [1])
    with pytest.raises(InputError, match="structured array"):
        from_target(np.zeros(3))
    with pytest.raises(InputError, match="needs an event"):
        breslow_baseline([1, 2], [0, 0], [0.0, 1.0])


def test_targets_are_read_whatever_their_fields_are_called():
    other = np.array([(3.0, True), (2.0, False)], dtype=[("months", float), ("dead", bool)])
    time, event = from_target(other)
    np.testing.assert_array_equal(time, [3, 2])
    np.testing.assert_array_equal(event, [True, False])


def test_the_paired_difference_of_a_model_with_itself_is_nothing():
    t, e, f = cohort(2)
    same = harrell_statistic(t, e, f)
    assert compare_statistics(same, same, len(t), n_resamples=50).difference.value == 0
    worse = harrell_statistic(t, e, np.random.default_rng(0).normal(size=len(t)))
    found = compare_statistics(same, worse, len(t), n_resamples=200)
    assert found.difference.low > 0
    assert found.p_value < 0.05
