"""How well searching finds what belongs to a query: ranks, recall among the first K, and what chance would find.

Comes in: similarities of queries to items (or their vectors), and which items are relevant; there may be several.
Goes out: the rank of the first relevant item of each query, plain floats over queries, or intervals clustered by patient.

Notable choice: equal similarities share their expected rank, so a collapsed encoder that gives every item the same
similarity is reported near chance, not as perfect or as lucky as its order in the table.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import weighted_interval
from chiasm.metrics.labels import is_missing
from chiasm.metrics.weighted import mean_statistic, median_statistic
from chiasm.types import Interval

Floats = NDArray[np.float64]
Ties = Literal["expected", "best", "worst"]
Keys = Sequence[Hashable] | NDArray[np.generic]
Groups = Sequence[Hashable] | NDArray[np.generic]

QUERIES_AT_ONCE = 512


def ranks_of_relevant(
    similarity: ArrayLike, relevant: ArrayLike | tuple[Keys, Keys] | None = None, *, ties: Ties = "expected"
) -> Floats:
    """Return, for each query, the rank of the relevant item that comes first; 1 is best.

    Args:
        similarity: (queries, items), higher is nearer; NaN is refused.
        relevant: (queries, items) booleans; or the keys of queries and of items, where equal keys are relevant to each
            other (missing keys to nothing); None: item ``i`` belongs to query ``i``.
        ties: What equal similarities give: the ``expected`` rank when their order is random (may be fractional), or the
            ``best`` or ``worst`` one.

    Returns:
        (queries,) ranks in [1, items]; NaN for queries without any relevant item.

    Raises:
        InputError: When shapes do not fit, or similarities are NaN.
    """
    values = np.asarray(similarity)
    values = values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
    if values.ndim != 2:
        raise InputError(f"similarity must have shape (queries, items), got {values.shape}")
    if np.isnan(values).any():
        raise InputError(f"{int(np.isnan(values).sum())} of {values.size} similarities are NaN")
    return _ranks(values, _relevance(relevant, values.shape), ties)


def ranks_from_vectors(
    queries: ArrayLike, items: ArrayLike, relevant: tuple[Keys, Keys] | None = None, *, ties: Ties = "expected"
) -> Floats:
    """Return :func:`ranks_of_relevant` of the dot products, a block of queries at a time: memory stays small.

    Args:
        queries: (n, dim) vectors, L2-normalised for cosines.
        items: (m, dim) vectors of the same space.
        relevant: Keys of queries and of items; None: item ``i`` belongs to query ``i``.
        ties: As :func:`ranks_of_relevant`.

    Raises:
        InputError: When shapes do not fit, or vectors hold NaN.
    """
    left, right = np.asarray(queries, dtype=np.float32), np.asarray(items, dtype=np.float32)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise InputError(f"queries {left.shape} and items {right.shape} must be matrices of one dimension")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise InputError("vectors hold NaN or infinite values")
    query_keys, item_keys = _numbered(relevant, (len(left), len(right)))
    found = [np.empty(0)]
    for start in range(0, len(left), QUERIES_AT_ONCE):
        block = slice(start, start + QUERIES_AT_ONCE)
        is_relevant = (query_keys[block, None] == item_keys) & (item_keys >= 0)
        found.append(_ranks(left[block] @ right.T, is_relevant, ties))
    return np.concatenate(found)


def recall_at_k(ranks: ArrayLike, k: int) -> float:
    """Return the share of queries with a relevant item among the first ``k``: R@K as CLIP papers report it.

    Args:
        ranks: From :func:`ranks_of_relevant`; NaN (nothing relevant) is left out.
        k: At least 1.

    Returns:
        A number in [0, 1]; NaN when no query has a relevant item.
    """
    return _only(mean_statistic(_hits(ranks, k)), ranks)


def median_rank(ranks: ArrayLike) -> float:
    """Return the median rank of the first relevant item, at least 1; NaN ranks are left out, NaN when there is none."""
    return _only(median_statistic(ranks), ranks)


def mean_reciprocal_rank(ranks: ArrayLike) -> float:
    """Return the mean of 1 / rank, in (0, 1]; NaN ranks are left out, NaN when there is none."""
    return _only(mean_statistic(1 / np.asarray(ranks, dtype=np.float64)), ranks)


def recall_interval(
    ranks: ArrayLike, k: int, groups: Groups, *, chance: float | None = None, **options: Any
) -> Interval:
    """Return :func:`recall_at_k` with its interval, resampling the patients of the queries; the items stay as they are.

    Args:
        ranks: As :func:`recall_at_k`.
        k: At least 1.
        groups: Patient of each query.
        chance: From :func:`chance_recall_at_k`.
        **options: ``method``, ``n_resamples``, ``seed``, ``level`` of :func:`chiasm.metrics.bootstrap.weighted_interval`.
    """
    return _interval(_hits(ranks, k), groups, "mean", chance, options)


def median_rank_interval(ranks: ArrayLike, groups: Groups, *, chance: float | None = None, **options: Any) -> Interval:
    """Return :func:`median_rank` with its interval, resampling the patients of the queries.

    Args:
        ranks: As :func:`median_rank`.
        groups: Patient of each query.
        chance: For example (items + 1) / 2 when one item is relevant.
        **options: As :func:`recall_interval`.
    """
    return _interval(np.asarray(ranks, dtype=np.float64), groups, "median", chance, options)


def mean_reciprocal_rank_interval(
    ranks: ArrayLike, groups: Groups, *, chance: float | None = None, **options: Any
) -> Interval:
    """Return :func:`mean_reciprocal_rank` with its interval, resampling the patients of the queries.

    Args:
        ranks: As :func:`mean_reciprocal_rank`.
        groups: Patient of each query.
        chance: Passed on.
        **options: As :func:`recall_interval`.
    """
    return _interval(1 / np.asarray(ranks, dtype=np.float64), groups, "mean", chance, options)


def mean_interval(values: ArrayLike, groups: Groups, *, chance: float | None = None, **options: Any) -> Interval:
    """Return the mean over queries of any measure of :mod:`chiasm.metrics.ranking`, resampling their patients.

    Args:
        values: One number a query; NaN is left out.
        groups: Patient of each query.
        chance: Passed on.
        **options: As :func:`recall_interval`.
    """
    return _interval(np.asarray(values, dtype=np.float64), groups, "mean", chance, options)


def chance_recall_at_k(n_items: int, k: int, n_relevant: ArrayLike = 1) -> float:
    """Return the recall of a random order, exactly: 1 − C(items − relevant, k) / C(items, k), averaged over queries.

    Args:
        n_items: Number of items searched.
        k: At least 1; more than ``n_items`` counts as all of them.
        n_relevant: Relevant items of each query, or one number for all; queries with 0 are left out.

    Returns:
        A number in [0, 1]; k / items when one item is relevant; NaN when no query has a relevant item.

    Raises:
        InputError: When a query has more relevant items than there are, or a number is negative.
    """
    counts = np.atleast_1d(np.asarray(n_relevant)).astype(np.int64)
    if k < 1 or n_items < 1 or (counts < 0).any() or (counts > n_items).any():
        raise InputError(
            f"chance of K = {k} among {n_items} items with up to {counts.max(initial=0)} relevant ones is undefined"
        )
    counts = counts[counts > 0]
    if len(counts) == 0:
        return math.nan
    values, times = np.unique(counts, return_counts=True)
    total = math.comb(n_items, min(k, n_items))
    chances = [1 - math.comb(n_items - int(r), min(k, n_items)) / total for r in values]
    return float(np.average(chances, weights=times))


def count_relevant(relevant: ArrayLike | tuple[Keys, Keys]) -> NDArray[np.int64]:
    """Return how many items are relevant to each query, for :func:`chance_recall_at_k`.

    Args:
        relevant: (queries, items) booleans, or the keys of queries and of items.
    """
    if not isinstance(relevant, tuple):
        flags: NDArray[np.bool_] = np.asarray(relevant, dtype=bool)
        return np.array([np.count_nonzero(row) for row in flags], dtype=np.int64)
    query_keys, item_keys = _numbered(relevant, (len(relevant[0]), len(relevant[1])))
    known = item_keys[item_keys >= 0]
    sizes = np.bincount(known, minlength=max(int(query_keys.max(initial=-1)), int(known.max(initial=-1))) + 1)
    counts: NDArray[np.int64] = np.zeros(len(query_keys), dtype=np.int64)
    has_key = query_keys >= 0
    counts[has_key] = sizes[query_keys[has_key]]
    return counts


def _ranks(similarity: NDArray[Any], relevant: NDArray[np.bool_], ties: Ties) -> Floats:
    if similarity.shape[1] == 0:
        return np.full(len(similarity), np.nan)
    best = np.where(relevant, similarity, -np.inf).max(1, keepdims=True)
    has_any = relevant.any(1)
    above = (similarity > best).sum(1)
    level = similarity == best
    tied_relevant = (level & relevant).sum(1)
    tied_others = level.sum(1) - tied_relevant
    if ties == "best":
        ranks = above + 1.0
    elif ties == "worst":
        ranks = above + 1.0 + tied_others
    elif ties == "expected":
        # The first of r relevant among t others in random order has t / (r + 1) of them before it.
        ranks = above + 1.0 + tied_others / (tied_relevant + 1.0)
    else:
        raise InputError(f"ties must be `expected`, `best` or `worst`, got {ties!r}")
    return np.where(has_any, ranks, np.nan)


def _relevance(relevant: ArrayLike | tuple[Keys, Keys] | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if relevant is None or isinstance(relevant, tuple):
        query_keys, item_keys = _numbered(relevant, shape)
        return np.asarray((query_keys[:, None] == item_keys) & (item_keys >= 0))
    mask = np.asarray(relevant)
    if mask.shape != shape or mask.dtype != bool:
        raise InputError(f"relevant must be booleans of shape {shape}, got {mask.dtype} of shape {mask.shape}")
    return mask


def _numbered(
    relevant: tuple[Keys, Keys] | None, shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return small numbers in place of keys, −1 for missing ones."""
    if relevant is None:
        if shape[0] != shape[1]:
            raise InputError(
                f"{shape[0]} queries and {shape[1]} items cannot be pairs", hint="say what is relevant to what"
            )
        return np.arange(shape[0]), np.arange(shape[1])
    if tuple(len(keys) for keys in relevant) != shape:
        raise InputError(
            f"{len(relevant[0])} and {len(relevant[1])} keys do not fit {shape[0]} queries and {shape[1]} items"
        )
    number: dict[Hashable, int] = {}
    columns = [[-1 if is_missing(key) else number.setdefault(key, len(number)) for key in keys] for keys in relevant]
    return np.array(columns[0], dtype=np.int64), np.array(columns[1], dtype=np.int64)


def _hits(ranks: ArrayLike, k: int) -> Floats:
    if k < 1:
        raise InputError(f"K must be at least 1, got {k}")
    values = np.asarray(ranks, dtype=np.float64)
    return np.where(np.isnan(values), np.nan, values <= k)


def _only(statistic: Any, rows: ArrayLike) -> float:
    return float(statistic(np.ones((1, len(np.asarray(rows)))))[0])


def _interval(
    values: Floats, groups: Groups, kind: Literal["mean", "median"], chance: float | None, options: dict[str, Any]
) -> Interval:
    patients = list(groups)
    if len(patients) != len(values):
        raise InputError(f"there are {len(values)} queries and {len(patients)} groups")
    known = np.flatnonzero(~np.isnan(values))
    if len(known) == 0:
        return Interval(math.nan, math.nan, math.nan, 0, chance)
    make = mean_statistic if kind == "mean" else median_statistic
    return weighted_interval(make(values[known]), [patients[i] for i in known], chance=chance, **options)
