"""How well a whole ranking is ordered: average precision and nDCG of each query, with chance exactly.

Comes in: similarities of queries to items and what each item is worth to each query. Goes out: one number a query, for
the means and intervals of :mod:`chiasm.metrics.retrieval`.

Notable choice: equal similarities have no order, so every value is the expected one over their orders (McSherry and
Najork 2008). A model that gives all items one similarity therefore scores what chance would, and chance itself is the
same formula with all items tied: exact, not simulated.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError

Floats = NDArray[np.float64]
Depth = int | Literal["R"] | None


def average_precision(
    similarity: ArrayLike,
    relevant: ArrayLike,
    *,
    depth: Depth = None,
    ties: Literal["expected", "together"] = "expected",
) -> Floats:
    """Return the average precision of each query: the mean, over its relevant items, of the precision at their ranks.

    Args:
        similarity: (queries, items), higher is nearer; −inf puts an item last.
        relevant: (queries, items) booleans.
        depth: Ranks that count: all (None), the first K, or ``R``: as many as the query has relevant items, so that 1
            means that they come first (mAP@R of Musgrave et al.). The sum is divided by the relevant items that could
            lie within the depth.
        ties: ``expected``: the mean over all orders of equal similarities; ``together``: equal similarities enter at
            once, as in scikit-learn's ``average_precision_score`` (whole depth only).

    Returns:
        (queries,) numbers in [0, 1]; NaN for queries without a relevant item.

    Raises:
        InputError: Shapes do not fit, similarities are NaN, or the depth is below 1.

    References:
        F. McSherry, M. Najork, Computing information retrieval performance measures efficiently in the presence of tied
        scores, 2008. K. Musgrave, S. Belongie, S.-N. Lim, A metric learning reality check, 2020, section 3.1.
    """
    values, worth = _checked(similarity, relevant)
    found = np.asarray(worth > 0)
    counts = found.sum(1)
    if ties not in ("expected", "together"):
        raise InputError(f"ties must be `expected` or `together`, got {ties!r}")
    if ties == "together" and depth is not None:
        raise InputError("ties that enter together have no depth", hint="leave `depth` out, or take expected ties")
    blocks = _Blocks(values, found.astype(np.float64))
    if ties == "together":
        precision = (blocks.before + blocks.total) / (blocks.start + blocks.size)
        sums = (blocks.total / blocks.size * precision).sum(1)
        return _divide(sums, counts)
    place = np.arange(1, values.shape[1] + 1, dtype=np.float64)[None, :]
    inside = place - blocks.start
    share = blocks.total / blocks.size
    earlier = (blocks.total - 1) * (inside - 1) / np.maximum(blocks.size - 1, 1)
    gain = share * (blocks.before + 1 + earlier) / place
    limit = _limits(depth, counts, values.shape[1])
    sums = np.where(place <= limit[:, None], gain, 0.0).sum(1)
    return _divide(sums, np.minimum(counts, limit))


def ndcg(similarity: ArrayLike, gains: ArrayLike, *, depth: int | None = None) -> Floats:
    """Return the normalised discounted cumulative gain of each query: gains over log2(rank + 1), of the best possible.

    Args:
        similarity: (queries, items), higher is nearer; −inf puts an item last.
        gains: (queries, items) numbers of at least 0, or booleans.
        depth: Ranks that count; None: all.

    Returns:
        (queries,) numbers in [0, 1]; NaN for queries to which nothing is worth anything. Equal similarities share the
        mean of their gains, as in scikit-learn's ``ndcg_score``.

    Raises:
        InputError: Shapes do not fit, values are NaN or negative, or the depth is below 1.

    References:
        K. Järvelin, J. Kekäläinen, Cumulated gain-based evaluation of IR techniques, 2002; McSherry and Najork 2008 for
        ties.
    """
    values, worth = _checked(similarity, gains)
    n = values.shape[1]
    limit = _limits(depth, np.zeros(len(values)), n)
    place = np.arange(n)
    discount = np.where(place[None, :] < limit[:, None], 1 / np.log2(place + 2)[None, :], 0.0)
    blocks = _Blocks(values, worth)
    reached = (blocks.total / blocks.size * discount).sum(1)
    best = (-np.sort(-worth, axis=1) * discount).sum(1)
    return _divide(reached, best)


def chance_reciprocal_rank(n_items: int, n_relevant: int) -> float:
    """Return the mean of 1 / rank of the first of ``n_relevant`` items in a random order of ``n_items``, exactly.

    Raises:
        InputError: There is no relevant item, or there are more than items.
    """
    if not 1 <= n_relevant <= n_items:
        raise InputError(f"chance of {n_relevant} relevant among {n_items} items is undefined")
    rank = np.arange(1, n_items - n_relevant + 2, dtype=np.float64)
    # P(first at rank k + 1) = P(first at rank k) · (n − k − r + 1) / (n − k).
    steps = (n_items - rank - n_relevant + 1) / np.maximum(n_items - rank, 1)
    first = n_relevant / n_items * np.concatenate([[1.0], np.cumprod(steps[:-1])])
    return float((first / rank).sum())


class _Blocks:
    """Items in the order of their similarity, each with the block of equal similarities that it lies in.

    Attributes (each (queries, items), by rank):
        start: Items before the block.
        size: Items of the block.
        total: Worth of the block.
        before: Worth of everything before the block.
    """

    def __init__(self, values: NDArray[Any], worth: Floats) -> None:
        n = values.shape[1]
        order = np.argsort(-values, axis=1, kind="stable")
        ordered = np.take_along_axis(values, order, 1)
        gain = np.take_along_axis(worth, order, 1)
        new = np.ones(ordered.shape, dtype=bool)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        block = np.cumsum(new, axis=1) - 1 + np.arange(len(values))[:, None] * n
        flat = block.ravel()
        self.size = np.bincount(flat, minlength=values.size)[block].astype(np.float64)
        self.total: Floats = np.bincount(flat, gain.ravel(), minlength=values.size)[block]
        place = np.broadcast_to(np.arange(n), ordered.shape)
        self.start: Floats = np.maximum.accumulate(np.where(new, place, 0), axis=1).astype(np.float64)
        sums = np.cumsum(gain, axis=1) - gain
        self.before: Floats = np.take_along_axis(sums, self.start.astype(np.int64), 1)


def _checked(similarity: ArrayLike, worth: ArrayLike) -> tuple[NDArray[Any], Floats]:
    values = np.asarray(similarity)
    values = values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
    gains = np.asarray(worth).astype(np.float64)
    if values.ndim != 2 or values.shape != gains.shape or values.shape[1] == 0:
        raise InputError(
            f"similarity and relevance must both have shape (queries, items), got {values.shape} and {gains.shape}"
        )
    if np.isnan(values).any():
        raise InputError(f"{int(np.isnan(values).sum())} of {values.size} similarities are NaN")
    if not (np.isfinite(gains).all() and (gains >= 0).all()):
        raise InputError("gains must be finite and at least 0")
    return values, gains


def _limits(depth: Depth, counts: NDArray[Any], n: int) -> Floats:
    if depth is None:
        return np.full(len(counts), float(n))
    if depth == "R":
        return np.asarray(np.maximum(counts, 1), dtype=np.float64)
    if depth < 1:
        raise InputError(f"the depth must be at least 1, got {depth}")
    return np.full(len(counts), float(depth))


def _divide(above: Floats, below: NDArray[Any]) -> Floats:
    found: Floats = np.full(len(above), math.nan)
    np.divide(above, below, out=found, where=below > 0)
    clipped: Floats = np.clip(found, 0.0, 1.0)
    return clipped
