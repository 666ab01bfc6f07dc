"""Survival times must follow the hazard that is stated."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from chiasm.data.phantom_survival import CHEST_HAZARD, TISSUE_HAZARD, StatedHazard


def random_labels(rng: np.random.Generator, hazard: StatedHazard) -> dict[str, int]:
    return {name: int(rng.random() < 0.3) for name in hazard.coefficients}


@pytest.mark.parametrize("hazard", [CHEST_HAZARD, TISSUE_HAZARD])
def test_the_cumulative_hazard_of_event_times_is_exponential(hazard: StatedHazard) -> None:
    rng = np.random.default_rng(0)
    values = []
    for _ in range(3000):
        labels = random_labels(rng, hazard)
        values.append(hazard.cumulative(hazard.draw(rng, labels)[0], labels))
    assert stats.kstest(values, "expon").pvalue > 0.01
    wrong = StatedHazard(hazard.shape * 1.25, hazard.scale_days, hazard.coefficients)
    times = [wrong.draw(rng, {})[0] for _ in range(3000)]
    assert stats.kstest([hazard.cumulative(t, {}) for t in times], "expon").pvalue < 1e-3


@pytest.mark.parametrize("hazard", [CHEST_HAZARD, TISSUE_HAZARD])
def test_hazard_ratios_are_recovered_from_censored_times(hazard: StatedHazard) -> None:
    rng = np.random.default_rng(1)
    for name, beta in hazard.coefficients.items():
        rates = []
        for value in (0, 1):
            seen = [hazard.observe(rng, {name: value}) for _ in range(2500)]
            # The maximum-likelihood rate of a Weibull of known shape: events / sum of t^k.
            rates.append(sum(e for _, e in seen) / sum(t**hazard.shape for t, _ in seen))
        assert math.log(rates[1] / rates[0]) == pytest.approx(beta, abs=0.17), name


def test_censoring_is_independent_of_the_findings() -> None:
    rng = np.random.default_rng(2)
    ill = [CHEST_HAZARD.draw(rng, {"oedema": 1, "effusion": 1})[1] for _ in range(1500)]
    well = [CHEST_HAZARD.draw(rng, {})[1] for _ in range(1500)]
    assert stats.ks_2samp(ill, well).pvalue > 0.01
    low, high = CHEST_HAZARD.censoring_days
    assert low <= min(ill + well)
    assert max(ill + well) <= high


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_observations_are_whole_days(seed: int, ill: bool) -> None:
    days, event = CHEST_HAZARD.observe(np.random.default_rng(seed), {"oedema": int(ill)})
    event_days, censored_days = CHEST_HAZARD.draw(np.random.default_rng(seed), {"oedema": int(ill)})
    assert isinstance(days, int)
    assert days >= 1
    assert event in (0, 1)
    assert 0 <= days - min(event_days, censored_days) <= 1
    assert event == int(event_days <= censored_days)


@given(st.floats(1, 1e5), st.floats(1, 1e5))
def test_the_cumulative_hazard_grows_with_time_and_with_risk(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert CHEST_HAZARD.cumulative(low, {}) <= CHEST_HAZARD.cumulative(high, {})
    assert CHEST_HAZARD.cumulative(a, {"nodule": 1}) > CHEST_HAZARD.cumulative(a, {"nodule": 0})
    assert TISSUE_HAZARD.cumulative(a, {"lymphocytes": 1}) < TISSUE_HAZARD.cumulative(a, {})


def test_unlabelled_counts_as_absent_and_foreign_labels_do_not_count() -> None:
    assert CHEST_HAZARD.linear_predictor({"oedema": None, "visit": 2, "synthetic": 1}) == 0.0
    assert CHEST_HAZARD.linear_predictor({"oedema": 1, "nodule": 1}) == pytest.approx(1.8)
