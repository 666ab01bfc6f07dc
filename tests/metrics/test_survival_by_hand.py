"""Survival curves, tests and scores on tables that a reader can follow with a pencil, and laws that hold for all."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.metrics.agreement import agreement
from chiasm.metrics.concordance import auc_at, brier_statistic, harrell_c, integrated_brier, mean_auc, uno_c, usable_tau
from chiasm.metrics.survival import (
    as_survival,
    breslow_baseline,
    event_counts,
    from_target,
    kaplan_meier,
    log_rank,
    numbers_at_risk,
    survival_target,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("time", "event", "survival"),
    [
        ([1, 2, 3], [1, 1, 1], ["2/3", "1/3", "0"]),
        ([1, 2, 3], [0, 1, 0], ["1", "1/2", "1/2"]),
        ([1, 1, 2, 2], [1, 0, 1, 0], ["3/4", "3/8"]),
        ([5, 5, 5], [1, 1, 0], ["1/3"]),
        ([4, 3, 2, 1], [0, 0, 0, 0], ["1", "1", "1", "1"]),
        ([6, 6, 6, 7, 10], [1, 1, 0, 1, 1], ["3/5", "3/10", "0"]),
    ],
)
def test_product_limit_by_hand(time: list[float], event: list[int], survival: list[str]) -> None:
    curve = kaplan_meier(time, event)
    assert curve.survival == pytest.approx([float(Fraction(s)) for s in survival])
    assert curve.time.tolist() == sorted(set(time))
    assert curve.n == len(time)
    assert curve.events.sum() == sum(event)


@pytest.mark.parametrize(
    ("time", "event", "median"),
    [
        ([1, 2, 3, 4], [1, 1, 1, 1], 2),
        ([1, 2, 3], [1, 1, 1], 2),
        ([1, 2, 3, 4], [0, 0, 1, 1], 3),
        ([1, 2, 3, 4], [1, 0, 0, 0], NAN),
        ([7], [1], 7),
        ([7], [0], NAN),
    ],
)
def test_medians_by_hand(time: list[float], event: list[int], median: float) -> None:
    assert kaplan_meier(time, event).median.value == pytest.approx(median, nan_ok=True)


def test_greenwood_by_hand() -> None:
    """10 patients, one event at time 1: S = 0.9, variance of log S = 1 / (10 · 9)."""
    curve = kaplan_meier(range(1, 11), [1] + [0] * 9)
    width = 1.959963984540054 * math.sqrt(1 / 90) / abs(math.log(0.9))
    assert curve.interval(1).low == pytest.approx(0.9 ** math.exp(width))
    assert curve.interval(1).high == pytest.approx(0.9 ** math.exp(-width))
    assert curve.at([0.5, 1, 10, 11]) == pytest.approx([1, 0.9, 0.9, NAN], nan_ok=True)


def test_counts_by_hand() -> None:
    times, died, at_risk = event_counts(np.array([2.0, 1, 2, 3, 2]), np.array([True, False, True, True, False]))
    assert (times.tolist(), died.tolist(), at_risk.tolist()) == ([1, 2, 3], [0, 2, 1], [5, 4, 1])
    assert numbers_at_risk([2, 1, 2, 3, 2], [0, 1, 1.5, 2, 3, 4]).tolist() == [5, 5, 4, 4, 1, 0]


def test_log_rank_by_hand() -> None:
    """Times 1 (a), 2 (b), 3 (a), all events: expected of a is 1/2 + ... with two a and two b, the last b at 4."""
    found = log_rank([1, 2, 3, 4], [1, 1, 1, 1], ["a", "b", "a", "b"])
    expected = Fraction(2, 4) + Fraction(1, 3) + Fraction(1, 2)
    variance = Fraction(1, 4) + Fraction(2, 9) + Fraction(1, 4)
    assert found.expected["a"] == pytest.approx(float(expected))
    assert found.observed == {"a": 2, "b": 2}
    assert found.chi2 == pytest.approx(float((2 - expected) ** 2 / variance))
    assert found.p_value == pytest.approx(math.erfc(math.sqrt(found.chi2 / 2)))


@pytest.mark.parametrize(
    ("time", "event", "risk", "c"),
    [
        ([1, 2, 3], [1, 1, 1], [3, 2, 1], 1),
        ([1, 2, 3], [1, 1, 1], [1, 2, 3], 0),
        ([1, 2, 3], [1, 1, 1], [1, 1, 1], 1 / 2),
        ([1, 2, 3], [1, 0, 0], [2, 3, 1], 1 / 2),
        ([1, 2, 3], [0, 1, 0], [9, 2, 1], 1),
        ([2, 2, 3], [1, 0, 1], [3, 2, 1], 1),
        ([2, 2, 3], [1, 1, 1], [1, 5, 3], 1 / 2),
        ([1, 2, 3, 4], [1, 0, 1, 0], [4, 9, 1, 2], 2 / 4),
    ],
)
def test_concordance_by_hand(time: list[float], event: list[int], risk: list[float], c: float) -> None:
    found = harrell_c(time, event, risk, n_resamples=2)
    assert found.value == pytest.approx(c)
    flipped = harrell_c(time, event, [-r for r in risk], n_resamples=2)
    assert flipped.value == pytest.approx(1 - c)


def test_uno_weighs_late_events_up() -> None:
    """One of four is censored at 1.5, so G = 2/3 afterwards: a pair begun at 2 weighs 9/4 of one begun at 1."""
    time, event, risk = [1, 1.5, 2, 3], [1, 0, 1, 1], [9, 5, 0, 1]
    assert harrell_c(time, event, risk, n_resamples=2).value == pytest.approx(3 / 4)
    assert uno_c(time, event, risk, n_resamples=2).value == pytest.approx(3 / (3 + 9 / 4))


def test_auc_at_a_time_by_hand() -> None:
    """Until 2: two cases; after it two controls; the one who was lost at 1.5 is neither. Later cases weigh 1/G = 4/3."""
    time, event, risk = [1, 1.5, 2, 3, 4], [1, 0, 1, 0, 1], [5, 9, 2, 3, 1]
    expected = (1 * 2 + 4 / 3 * 1) / (1 * 2 + 4 / 3 * 2)
    assert auc_at(time, event, risk, 2, n_resamples=2).value == pytest.approx(expected)


def test_brier_by_hand() -> None:
    """Nobody is censored: the mean square of what was said less what came."""
    survival = np.array([[0.2, 0.1], [0.6, 0.3], [0.9, 0.8]])
    statistic = brier_statistic([1, 2, 3], [1, 1, 1], survival, [1, 2])
    found = statistic(np.ones((1, 3)))[0]
    assert found == pytest.approx([(0.2**2 + 0.4**2 + 0.1**2) / 3, (0.1**2 + 0.3**2 + 0.2**2) / 3])
    whole = integrated_brier([1, 2, 3], [1, 1, 1], survival, [1, 2], n_resamples=2)
    assert whole.value == pytest.approx(found.mean()), "the trapezium between two times"


def test_the_mean_auc_is_weighed_by_events() -> None:
    assert mean_auc([1, 2, 3, 4], [1, 1, 1, 0], [1, 3], [0.9, 0.6]) == pytest.approx((0.9 * 1 + 0.6 * 2) / 3)
    assert math.isnan(mean_auc([1, 2, 3], [0, 0, 1], [1, 2], [0.9, 0.6])), "no event until then"


@pytest.mark.parametrize(
    ("time", "event", "tau"),
    [(range(1, 11), [1] * 10, 9), (range(1, 11), [1] * 5 + [0] * 5, 5), (range(1, 11), [0] * 9 + [1], 10)],
)
def test_the_latest_usable_time(time: range, event: list[int], tau: float) -> None:
    assert usable_tau(list(time), event) == tau


def test_breslow_by_hand() -> None:
    """Risks 2, 1, 1 (as factors): hazards 1/4 at time 1 and 1/1 at time 3."""
    base = breslow_baseline([1, 2, 3], [1, 0, 1], [math.log(2), 0, 0])
    assert (base.time.tolist(), base.longest) == ([1, 3], 3)
    assert base.cumulative == pytest.approx([1 / 4, 1 / 4 + 1])
    found = base.survival([0, math.log(2)], [0.5, 1, 3])
    assert found == pytest.approx(np.exp([[0, -0.25, -1.25], [0, -0.5, -2.5]]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 400))
def test_the_unit_of_time_changes_no_score(seed: int, unit: float) -> None:
    random = np.random.default_rng(seed)
    time, event, risk = random.integers(1, 9, 25).astype(float), random.random(25) < 0.7, random.normal(size=25)
    event[:3] = True
    one, other = (harrell_c(t, event, risk, n_resamples=2).value for t in (time, time * unit))
    assert one == pytest.approx(other)
    groups = (risk > 0).astype(int)
    if len(set(groups)) == 2:
        assert log_rank(time, event, groups).chi2 == pytest.approx(
            log_rank(time * unit, event, groups).chi2, nan_ok=True
        )
    np.testing.assert_allclose(kaplan_meier(time, event).survival, kaplan_meier(time * unit, event).survival)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(12)))
def test_groups_may_be_renamed_and_rows_reordered(seed: int, order: list[int]) -> None:
    random = np.random.default_rng(seed)
    time, event = random.integers(1, 6, 12).astype(float), random.random(12) < 0.7
    group = np.array([0, 1, 2] * 4)
    one = log_rank(time, event, group)
    other = log_rank(time[order], event[order], np.array(["z", "x", "y"])[group][order])
    assert one.chi2 == pytest.approx(other.chi2, abs=1e-8, nan_ok=True)
    assert sum(one.observed.values()) == pytest.approx(sum(one.expected.values())) == event.sum()


def test_targets_come_back() -> None:
    time, event = as_survival([3, 1.5], [1, 0])
    found = from_target(survival_target(time, event))
    assert (found[0].tolist(), found[1].tolist()) == ([3, 1.5], [True, False])


@pytest.mark.parametrize(
    ("truth", "given_", "expected"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], (1, 1, 1, 1)),
        ([1, 1, 0, 0], [0, 0, 1, 1], (0, 0, 0, -1)),
        ([1, 1, 0, 0], [1, 0, 1, 0], (1 / 2, 1 / 2, 1 / 2, 0)),
        ([1, 0, 0, 0], [1, 1, 1, 1], (1 / 4, 1, 2 / 5, 0)),
        ([1, 0, 0, 0], [0, 0, 0, 0], (NAN, 0, 0, 0)),
        ([0, 0, 0, 0], [1, 0, 0, 0], (0, NAN, 0, 0)),
        ([0, 0, 0, 0], [0, 0, 0, 0], (NAN, NAN, NAN, NAN)),
        ([1, 1, 1, 0, None], [1, 1, 0, 0, 1], (1, 2 / 3, 4 / 5, 1 / 2)),
        ([True, False, True, False], ["1", "0", "0", "0"], (1, 1 / 2, 2 / 3, 1 / 2)),
    ],
)
def test_agreement_by_hand(truth: list[object], given_: list[object], expected: tuple[float, ...]) -> None:
    found = agreement(truth, given_, range(len(truth)), n_resamples=2)
    values = tuple(getattr(found, n).value for n in ("precision", "recall", "f1", "kappa"))
    assert values == pytest.approx(expected, nan_ok=True)
