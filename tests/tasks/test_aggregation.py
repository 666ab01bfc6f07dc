"""Ways to add up prompts: small cases by hand, laws, and what each published quirk changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from chiasm.errors import InputError, UnknownName
from chiasm.tasks.aggregation import (
    mean_direction,
    pair_probability,
    pool_prompts,
    split_members,
    standardise,
    top_mean,
)

FINITE = st.floats(-3, 3, allow_nan=False, width=32)
SCORES = arrays(np.float64, st.tuples(st.integers(2, 6), st.integers(1, 4)), elements=FINITE)


def test_means_by_hand() -> None:
    vectors = np.array([[3.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(mean_direction(vectors), [math.sqrt(0.5)] * 2)
    np.testing.assert_allclose(mean_direction(vectors, unit_first=False), np.array([3, 1]) / math.sqrt(10))
    with pytest.raises(InputError, match="cancel"):
        mean_direction(np.array([[1.0, 0], [-1, 0]]))
    with pytest.raises(InputError, match="cancel"):
        mean_direction(np.array([[50.0, 0], [-50, 0]]), unit_first=False)
    with pytest.raises(InputError, match="zero"):
        mean_direction(np.array([[0.0, 0.0]]))


@given(st.permutations(range(4)), st.floats(0.1, 50))
def test_the_order_of_prompts_and_the_scale_of_all_do_not_matter(order: list[int], scale: float) -> None:
    vectors = np.random.default_rng(5).normal(size=(4, 6)) + 1
    for unit_first in (True, False):
        expected = mean_direction(vectors, unit_first=unit_first)
        np.testing.assert_allclose(mean_direction(vectors[order] * scale, unit_first=unit_first), expected, atol=1e-12)


def test_pair_probability_by_hand() -> None:
    found = pair_probability(np.array([0.3, 1.0, 0.2]), np.array([0.1, -1.0, 0.2]))
    expected = [math.exp(0.3) / (math.exp(0.3) + math.exp(0.1)), 1 / (1 + math.exp(-2)), 0.5]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    with_scale = 1 / (1 + math.exp(-100 * 0.2))  # the trap: the logit scale makes a sure answer of a slight preference
    assert abs(found[0] - with_scale) > 0.4


@given(arrays(np.float64, (5, 2), elements=st.floats(-1, 1, width=32)), st.floats(0.01, 100))
def test_the_order_of_pairs_does_not_depend_on_a_scale(cosines: np.ndarray, scale: float) -> None:
    plain = pair_probability(cosines[:, 0], cosines[:, 1])
    difference = (cosines[:, 0] - cosines[:, 1]) * scale
    for i in range(5):
        for k in range(5):
            if difference[i] > difference[k] + 1e-9:
                assert plain[i] > plain[k]
    np.testing.assert_allclose(plain + pair_probability(cosines[:, 1], cosines[:, 0]), 1)


def test_members_come_apart_again() -> None:
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(3, 4, 5))
    parts /= np.linalg.norm(parts, axis=2, keepdims=True)
    joined = np.concatenate(list(parts), axis=1) / math.sqrt(3)
    np.testing.assert_allclose(split_members(joined, 3), parts, atol=1e-12)
    np.testing.assert_allclose(joined @ joined.T, np.mean([p @ p.T for p in parts], axis=0), atol=1e-12)
    with pytest.raises(InputError, match="2 models"):
        split_members(joined, 2)
    joined[0, :5] = 0
    with pytest.raises(InputError, match="zero vector"):
        split_members(joined, 3)


def test_pooling_of_prompts() -> None:
    similarities = np.array([[0.1, 0.9, 0.2], [0.5, 0.5, 0.5]])
    np.testing.assert_allclose(pool_prompts(similarities, "max"), [0.9, 0.5])
    np.testing.assert_allclose(pool_prompts(similarities, "mean"), [0.4, 0.5])
    with pytest.raises(UnknownName):
        pool_prompts(similarities, "median")  # type: ignore[arg-type]
    with pytest.raises(InputError):
        pool_prompts(np.zeros((2, 0)), "max")


@given(SCORES)
def test_standardised_columns(scores: np.ndarray) -> None:
    z = standardise(scores)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-6)
    for k in range(scores.shape[1]):
        assert z[:, k].std() == pytest.approx(1, abs=1e-6) or not z[:, k].any()
    np.testing.assert_array_equal(standardise(scores[:1]), scores[:1])


def test_a_z_score_depends_on_the_batch() -> None:
    scores = np.array([[0.2, 0.1], [0.4, 0.1], [0.0, 0.7]])
    assert np.abs(standardise(scores)[0] - standardise(scores[:2])[0]).max() > 0.1
    np.testing.assert_array_equal(standardise(scores[:2])[:, 1], 0)  # the reference gives NaN


def test_top_mean_by_hand() -> None:
    tiles = np.array([[0.1, 0.9], [0.5, 0.2], [0.3, 0.4]])
    np.testing.assert_allclose(top_mean(tiles, 1), [0.5, 0.9])
    np.testing.assert_allclose(top_mean(tiles, 2), [0.4, 0.65])
    np.testing.assert_allclose(top_mean(tiles, 100), tiles.mean(axis=0))
    for bad in (0, -1):
        with pytest.raises(InputError):
            top_mean(tiles, bad)
    with pytest.raises(InputError):
        top_mean(tiles[:0], 1)


@given(SCORES, st.integers(1, 8), st.randoms())
def test_the_order_of_tiles_does_not_matter(tiles: np.ndarray, j: int, random: object) -> None:
    order = list(range(len(tiles)))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_allclose(top_mean(tiles[order], j), top_mean(tiles, j), atol=1e-12)
    assert (top_mean(tiles, j) >= top_mean(tiles, j + 1) - 1e-12).all()
