"""Agreement of two labellings: parity with scikit-learn, chance, missing labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, f1_score, precision_score, recall_score

from chiasm.errors import InputError
from chiasm.metrics.agreement import agreement


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 40), st.integers(0, 10_000))
def test_parity_with_scikit_learn(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, given_ = rng.integers(0, 2, n), rng.integers(0, 2, n)
    if len(set(truth)) < 2 or len(set(given_)) < 2:
        return
    found = agreement(truth, given_, np.arange(n), n_resamples=5)
    assert found.precision.value == pytest.approx(precision_score(truth, given_))
    assert found.recall.value == pytest.approx(recall_score(truth, given_))
    assert found.f1.value == pytest.approx(f1_score(truth, given_))
    assert found.kappa.value == pytest.approx(cohen_kappa_score(truth, given_))
    assert found.always == pytest.approx(f1_score(truth, np.ones(n)))
    swapped = agreement(given_, truth, np.arange(n), n_resamples=5)
    assert swapped.kappa.value == pytest.approx(found.kappa.value)
    assert swapped.precision.value == pytest.approx(found.recall.value)


def test_chance_is_that_of_shuffled_labels() -> None:
    rng = np.random.default_rng(0)
    truth, given_ = rng.random(40_000) < 0.3, rng.random(40_000) < 0.2
    found = agreement(truth.astype(int), given_.astype(int), np.arange(40_000), n_resamples=2)
    for name in ("precision", "recall", "f1", "kappa"):
        value = getattr(found, name)
        assert value.value == pytest.approx(value.chance, abs=0.01)


def test_missing_labels_are_left_out() -> None:
    found = agreement([1, 0, None, 1], [1, math.nan, 1, 0], list("abcd"), n_resamples=20)
    assert (found.n, found.positives, found.given, found.recall.value) == (2, 2, 1, 0.5)
    assert found.to_dict()["kappa"]["value"] == 0
    nothing = agreement([0, 0], [0, 0], list("ab"), n_resamples=5)
    assert math.isnan(nothing.f1.value)
    assert nothing.to_dict()["always"] is None


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="no row has both"):
        agreement([1, None], [None, 0], list("ab"))
    with pytest.raises(InputError, match="2 given"):
        agreement([1], [1, 0], list("a"))
