"""Average precision and nDCG: parity with scikit-learn, ties as the mean over all orders, chance exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from chiasm.errors import InputError
from chiasm.metrics.ranking import average_precision, chance_reciprocal_rank, ndcg
from chiasm.metrics.retrieval import mean_interval

CASES = given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 100_000), st.sampled_from([2, 4, 1000]))


def draw(n: int, m: int, seed: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, (n, m)).astype(float), rng.integers(0, 3, (n, m)).astype(float)


@settings(deadline=None, max_examples=60)
@CASES
def test_parity_with_scikit_learn(n: int, m: int, seed: int, levels: int) -> None:
    scores, gains = draw(n, m, seed, levels)
    together = average_precision(scores, gains > 0, ties="together")
    for i in range(n):
        if not (gains[i] > 0).any():
            assert math.isnan(together[i])
            assert math.isnan(ndcg(scores, gains)[i])
            continue
        assert together[i] == pytest.approx(average_precision_score(gains[i] > 0, scores[i]))
        if m < 2:
            continue  # scikit-learn refuses one item
        for k in (None, 1, 3):
            expected = ndcg_score(gains[[i]], scores[[i]], k=k)
            assert ndcg(scores, gains, depth=k)[i] == pytest.approx(expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(0, 100_000), st.sampled_from([None, "R", 1, 2, 4]))
def test_ties_have_the_mean_of_all_orders(m: int, seed: int, depth: int | str | None) -> None:
    scores, gains = draw(1, m, seed, 2)
    relevant = gains[0] > 0
    if not relevant.any():
        return
    count = int(relevant.sum())
    limit = {None: m, "R": count}.get(depth, depth)
    found = []
    for order in itertools.permutations(range(m)):
        values = scores[0][list(order)]
        if (np.diff(values) > 0).any():
            continue
        hits = relevant[list(order)]
        precision = np.cumsum(hits) / np.arange(1, m + 1)
        found.append((precision * hits)[:limit].sum() / min(count, limit))
    assert average_precision(scores, gains > 0, depth=depth)[0] == pytest.approx(np.mean(found))  # type: ignore[arg-type]


@settings(deadline=None)
@CASES
def test_laws(n: int, m: int, seed: int, levels: int) -> None:
    """Order of items and any rising map of similarities change nothing; the perfect order scores 1."""
    scores, gains = draw(n, m, seed, levels)
    order = np.random.default_rng(seed).permutation(m)
    for measure in (lambda s, g: average_precision(s, g > 0, depth="R"), lambda s, g: ndcg(s, g, depth=3)):
        value = measure(scores, gains)
        np.testing.assert_allclose(value, measure(scores[:, order], gains[:, order]))
        np.testing.assert_allclose(value, measure(np.exp(scores / levels), gains))
        known = gains.max(1) > 0
        np.testing.assert_allclose(measure(gains, gains)[known], 1)
        assert (value[known] <= 1).all()
        assert np.isnan(value[~known]).all()
    hidden = np.hstack([scores, np.full((n, 2), -np.inf)])
    zero = np.hstack([gains, np.zeros((n, 2))])
    np.testing.assert_allclose(average_precision(hidden, zero > 0), average_precision(scores, gains > 0))


def test_chance_is_that_of_random_orders() -> None:
    rng = np.random.default_rng(0)
    relevant = np.zeros((4000, 12), dtype=bool)
    relevant[:, :3] = True
    random = rng.random(relevant.shape)
    tied = np.zeros((1, 12))
    for depth in (None, "R", 5):
        simulated = average_precision(random, relevant, depth=depth).mean()  # type: ignore[arg-type]
        exact = average_precision(tied, relevant[:1], depth=depth)[0]  # type: ignore[arg-type]
        assert simulated == pytest.approx(exact, abs=0.012)
    assert ndcg(random, relevant, depth=5).mean() == pytest.approx(ndcg(tied, relevant[:1], depth=5)[0], abs=0.012)
    first = np.argmax(np.take_along_axis(relevant, np.argsort(-random, 1), 1), 1) + 1
    assert (1 / first).mean() == pytest.approx(chance_reciprocal_rank(12, 3), abs=0.012)
    assert chance_reciprocal_rank(5, 5) == 1
    assert chance_reciprocal_rank(4, 1) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_what_makes_no_sense_is_refused() -> None:
    good = np.zeros((1, 2))
    with pytest.raises(InputError, match="both have shape"):
        average_precision(good, np.zeros((2, 1)))
    with pytest.raises(InputError, match="NaN"):
        ndcg([[0.0, math.nan]], good)
    with pytest.raises(InputError, match="at least 0"):
        ndcg(good, [[-1.0, 0.0]])
    with pytest.raises(InputError, match="at least 1"):
        ndcg(good, good, depth=0)
    with pytest.raises(InputError, match="no depth"):
        average_precision(good, good, depth=2, ties="together")
    with pytest.raises(InputError, match="ties must"):
        average_precision(good, good, ties="lucky")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="undefined"):
        chance_reciprocal_rank(2, 3)
    assert mean_interval([math.nan, 0.5, 1.0], ["a", "b", "c"], n_resamples=10).value == 0.75
