"""Ranks and recall: against a plain sort, with ties, several relevant items, none, and exact chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from chiasm.errors import InputError
from chiasm.metrics.retrieval import (
    chance_recall_at_k,
    count_relevant,
    mean_reciprocal_rank,
    mean_reciprocal_rank_interval,
    median_rank,
    median_rank_interval,
    ranks_from_vectors,
    ranks_of_relevant,
    recall_at_k,
    recall_interval,
)

laws = settings(max_examples=50, deadline=None)


def a_world(seed, queries=7, items=9, levels=None, keys=4):
    random = np.random.default_rng(seed)
    similarity = (
        random.normal(size=(queries, items)) if levels is None else random.integers(0, levels, (queries, items)) * 1.0
    )
    return similarity, random.integers(0, keys, queries), random.integers(0, keys, items)


@laws
@given(st.integers(0, 2**31))
def test_without_ties_a_rank_is_the_place_in_a_sort(seed):
    similarity, query_keys, item_keys = a_world(seed)
    ranks = ranks_of_relevant(similarity, (query_keys, item_keys))
    for row, key, rank in zip(similarity, query_keys, ranks, strict=True):
        places = 1 + np.flatnonzero(item_keys[np.argsort(-row)] == key)
        assert (math.isnan(rank) and len(places) == 0) or rank == places[0]
    for ties in ("best", "worst"):
        same = ranks_of_relevant(similarity, (query_keys, item_keys), ties=ties)
        assert np.array_equal(same, ranks, equal_nan=True)


@laws
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_expected_rank_is_the_mean_over_random_orders(seed, levels):
    similarity, query_keys, item_keys = a_world(seed, queries=3, items=5, levels=levels)
    ranks = ranks_of_relevant(similarity, (query_keys, item_keys))
    random = np.random.default_rng(0)
    orders = np.array([random.permutation(5) for _ in range(3000)])
    for row, key, rank in zip(similarity, query_keys, ranks, strict=True):
        if math.isnan(rank):
            assert key not in item_keys
            continue
        # Sort by similarity, equal ones by a random number.
        place = np.argsort(np.argsort(np.where(True, -row * 10 + orders, 0), axis=1, kind="stable"), axis=1) + 1
        first = place[:, item_keys == key].min(1)
        assert rank == pytest.approx(first.mean(), abs=0.15)
    best = ranks_of_relevant(similarity, (query_keys, item_keys), ties="best")
    worst = ranks_of_relevant(similarity, (query_keys, item_keys), ties="worst")
    known = ~np.isnan(ranks)
    assert (best[known] <= ranks[known]).all()
    assert (ranks[known] <= worst[known]).all()


def test_a_collapsed_encoder_is_not_rewarded():
    """All similarities equal: the order of the table must not look like skill."""
    ranks = ranks_of_relevant(np.ones((100, 100)))
    assert (ranks == 50.5).all()
    assert recall_at_k(ranks, 10) == 0.0
    assert median_rank(ranks) == 50.5
    assert recall_at_k(ranks_of_relevant(np.ones((100, 100)), ties="best"), 1) == 1.0  # what some peers report


@laws
@given(st.integers(0, 2**31), st.integers(1, 9))
def test_recall_grows_with_k_and_ends_at_one(seed, k):
    similarity, query_keys, item_keys = a_world(seed)
    item_keys[0] = query_keys[0]
    ranks = ranks_of_relevant(similarity, (query_keys, item_keys))
    assert recall_at_k(ranks, k) <= recall_at_k(ranks, k + 1)
    assert recall_at_k(ranks, 9) == 1.0
    assert 0 < mean_reciprocal_rank(ranks) <= 1
    assert median_rank(ranks) == np.nanmedian(ranks)


@laws
@given(st.integers(0, 2**31))
def test_more_relevant_items_never_rank_worse(seed):
    similarity, query_keys, item_keys = a_world(seed)
    few = query_keys[:, None] == item_keys
    more = few | (np.random.default_rng(seed).random(few.shape) < 0.3)
    a, b = ranks_of_relevant(similarity, few), ranks_of_relevant(similarity, more)
    known = ~np.isnan(a)
    assert (b[known] <= a[known]).all()


@laws
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 30))
def test_vectors_in_blocks_equal_the_matrix(seed, n, m):
    random = np.random.default_rng(seed)
    queries, items = random.integers(-3, 4, (n, 4)).astype(float), random.integers(-3, 4, (m, 4)).astype(float)
    keys = [str(i) for i in random.integers(0, 5, n)], [str(i) for i in random.integers(0, 5, m)]
    expected = ranks_of_relevant(queries @ items.T, keys)
    assert np.array_equal(ranks_from_vectors(queries, items, keys), expected, equal_nan=True)


def test_many_queries_take_several_blocks():
    vectors = np.eye(4)[np.arange(1200) % 4]
    ranks = ranks_from_vectors(vectors, np.eye(4), ((np.arange(1200) % 4).tolist(), range(4)))
    assert len(ranks) == 1200
    assert (ranks == 1).all()
    assert ranks_from_vectors(np.eye(3), np.eye(3)).tolist() == [1, 1, 1]


@laws
@given(st.integers(1, 60), st.integers(1, 70), st.data())
def test_chance_is_the_hypergeometric_law(n, k, data):
    relevant = data.draw(st.integers(1, n))
    expected = 1 - hypergeom.pmf(0, n, relevant, min(k, n))
    assert chance_recall_at_k(n, k, relevant) == pytest.approx(expected, abs=1e-9)
    assert chance_recall_at_k(n, k) == pytest.approx(min(k, n) / n)


def test_chance_is_what_a_random_order_reaches():
    random = np.random.default_rng(0)
    keys = random.integers(0, 12, 60)
    hits = []
    for _ in range(300):
        ranks = ranks_of_relevant(random.random((60, 60)), (keys, keys))
        hits.append(recall_at_k(ranks, 5))
    counts = count_relevant((keys, keys))
    assert chance_recall_at_k(60, 5, counts) == pytest.approx(np.mean(hits), abs=0.01)


def test_chance_of_large_collections_is_quick_and_exact():
    assert chance_recall_at_k(1_000_000, 10) == pytest.approx(1e-5)
    assert chance_recall_at_k(1_000_000, 10, [1, 2, 0]) == pytest.approx(1.5e-5, rel=1e-4)
    assert math.isnan(chance_recall_at_k(5, 1, [0, 0]))


def test_counts_of_relevant_items():
    assert count_relevant((["a", "b", None, "z"], ["b", "a", "b", None])).tolist() == [1, 2, 0, 0]
    assert count_relevant(np.eye(3, dtype=bool)).tolist() == [1, 1, 1]
    assert count_relevant((["a"], [])).tolist() == [0]


def test_queries_without_a_relevant_item_are_left_out():
    ranks = ranks_of_relevant(np.eye(3), (["a", "b", None], ["a", "x", None]))
    assert ranks[0] == 1
    assert np.isnan(ranks[1:]).all()
    assert recall_at_k(ranks, 1) == 1.0
    interval = recall_interval(ranks, 1, ["p", "q", "r"])
    assert interval.n == 1
    nothing = np.full(3, np.nan)
    assert math.isnan(recall_at_k(nothing, 1))
    assert math.isnan(median_rank(nothing))
    assert math.isnan(mean_reciprocal_rank(nothing))
    assert recall_interval(nothing, 1, ["p", "q", "r"]).n == 0
    assert np.isnan(ranks_of_relevant(np.empty((2, 0)), np.empty((2, 0), dtype=bool))).all()


def test_intervals():
    random = np.random.default_rng(0)
    ranks = random.integers(1, 30, 90).astype(float)
    patients = np.repeat(np.arange(30), 3)
    recall = recall_interval(ranks, 10, patients, chance=0.3)
    assert recall.value == recall_at_k(ranks, 10)
    assert recall.low < recall.value < recall.high
    assert recall.chance == 0.3
    middle = median_rank_interval(ranks, patients)
    assert middle.value == median_rank(ranks)
    assert 1 <= middle.low <= middle.value <= middle.high
    reciprocal = mean_reciprocal_rank_interval(ranks, patients, n_resamples=50)
    assert reciprocal.value == mean_reciprocal_rank(ranks)
    # Copies of the queries of a patient must not narrow the interval.
    copied = recall_interval(np.repeat(ranks, 4), 10, np.repeat(patients, 4))
    assert copied.high - copied.low == pytest.approx(recall.high - recall.low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks_of_relevant(np.ones(3)), "queries, items"),
        (lambda: ranks_of_relevant(np.ones((2, 3))), "cannot be pairs"),
        (lambda: ranks_of_relevant(np.full((2, 2), np.nan)), "4 of 4 similarities are NaN"),
        (lambda: ranks_of_relevant(np.ones((2, 2)), np.ones((2, 3), dtype=bool)), "booleans of shape"),
        (lambda: ranks_of_relevant(np.ones((2, 2)), np.ones((2, 2))), "got float64"),
        (lambda: ranks_of_relevant(np.ones((2, 2)), (["a"], ["a", "b"])), "keys do not fit"),
        (lambda: ranks_of_relevant(np.ones((2, 2)), ties="lucky"), "ties must be"),
        (lambda: ranks_from_vectors(np.ones((2, 2)), np.ones((2, 3))), "one dimension"),
        (lambda: ranks_from_vectors(np.full((2, 2), np.inf), np.ones((2, 2))), "NaN or infinite"),
        (lambda: recall_at_k([1.0], 0), "at least 1"),
        (lambda: recall_interval([1.0], 1, ["a", "b"]), "1 queries and 2 groups"),
        (lambda: chance_recall_at_k(3, 1, 4), "undefined"),
        (lambda: chance_recall_at_k(3, 0), "undefined"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
