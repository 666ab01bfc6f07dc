"""The exact best k of a matrix of scores that is only seen in blocks, and only in fp32.

Comes in: blocks of rough scores (queries, rows) and a function that scores chosen cells in fp64. Goes out: per query the
k best rows in the order (falling fp64 score, rising row). A cell is scored again when its rough score could, within the
given error, still be among the best k; so the answer does not depend on blocks, threads or the BLAS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

RESCORE_VALUES = 2**19  # fp64 numbers held while candidates are scored again: 4 MiB a side, which caches hold

Number = TypeVar("Number", np.float32, np.int32)

#: Positions in a block (queries, columns of it) -> their fp64 scores.
Exact = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]


def dot_error(dim: int) -> float:
    """Return how far a fp32 dot product of unit rows can lie from the exact one, whatever the order of summation.

    |fp32 dot - exact| <= dim * 2^-24 * |a||b| (Higham 2002, section 3.1), and as much again where raw rows are divided
    by a fp32 norm; norms are 1 up to 2 % (bf16 vectors marked as normalised).
    """
    return 1.2 * (2 * dim + 4) * 2.0**-24


class TopRows:
    """The running k best rows of a block of queries.

    Args:
        queries: How many.
        k: How many rows of each are kept.

    Attributes:
        rows: int64, (queries, k); -1 where fewer were allowed so far.
        scores: fp64, same shape; -inf where there is no row.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.rows = np.full((queries, k), -1, dtype=np.int64)
        self.scores = np.full((queries, k), -np.inf)

    def add(
        self, rough: NDArray[np.float32], rows: NDArray[np.int64], exact: Exact, *, error: float, width: int
    ) -> None:
        """Take in some rows.

        Args:
            rough: (queries, rows of this block); -inf where a query may not find a row.
            rows: Number of each column; rising.
            exact: Scores cells again.
            error: Largest difference between a rough and an exact score of this block.
            width: fp64 numbers that ``exact`` holds a cell, so that it is not asked for too many at once.
        """
        threshold = self.scores[:, -1] - error
        if not np.isfinite(threshold).all():
            self._raise_threshold(rough, threshold, ~np.isfinite(threshold), error)
        query, column = _cells_above(rough, threshold)
        # Counted from the cells: numpy's count along an axis takes several times as long as finding them.
        crowded = np.bincount(query, minlength=len(rough)) > 8 * self.k + 64
        if crowded.any():
            self._raise_threshold(rough, threshold, crowded, error)
            query, column = _cells_above(rough, threshold)
        if len(query) == 0:
            return
        allowed = np.isfinite(rough[query, column])
        query, column = query[allowed], column[allowed]
        for part in _chunks(len(query), width):
            self._merge(query[part], rows[column[part]], exact(query[part], column[part]))

    def take(self, query: NDArray[np.int64], rows: NDArray[np.int64], exact: Exact, *, width: int) -> None:
        """Score some cells exactly and take them in; none of them twice.

        Args:
            query: Of each cell.
            rows: Number of each cell's row, which is also what ``exact`` is given.
            exact: Scores cells.
            width: As for :meth:`add`.
        """
        for part in _chunks(len(query), width):
            self._merge(query[part], rows[part], exact(query[part], rows[part]))

    def _raise_threshold(
        self, rough: NDArray[np.float32], threshold: NDArray[np.float64], which: NDArray[np.bool_], error: float
    ) -> None:
        """Raise the threshold of some queries to at most the k-th best of this block, less the rounding error."""
        if rough.shape[1] < self.k:
            return
        kth = kth_best(rough if which.all() else rough[which], self.k)
        threshold[which] = np.maximum(threshold[which], kth.astype(np.float64) - 2 * error)

    def _merge(self, query: NDArray[np.int64], rows: NDArray[np.int64], exact: NDArray[np.float64]) -> None:
        touched = np.unique(query)
        all_query = np.concatenate([np.repeat(touched, self.k), query])
        all_rows = np.concatenate([self.rows[touched].ravel(), rows])
        all_scores = np.concatenate([self.scores[touched].ravel(), exact])
        order = np.lexsort((all_rows, -all_scores, all_query))
        sorted_query = all_query[order]
        starts = np.searchsorted(sorted_query, touched)
        best = order[(starts[:, None] + np.arange(self.k)[None, :])]
        self.rows[touched] = all_rows[best]
        self.scores[touched] = all_scores[best]


def _cells_above(
    rough: NDArray[np.float32], threshold: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return queries and columns of the cells that reach their query's threshold."""
    flat = np.flatnonzero(rough >= threshold.astype(np.float32)[:, None])
    query, column = np.divmod(flat, rough.shape[1])
    return query, column


def kth_best(rough: NDArray[Number], k: int) -> NDArray[Number]:
    """Return a lower bound of the k-th best score of each query, tight unless several of the best share a stripe.

    Columns are dealt out to stripes; the k-th best of the stripes' maxima belongs to k different columns.
    """
    if k == 1:
        top: NDArray[Number] = rough.max(axis=1)
        return top
    n, columns = rough.shape
    stripes = max(256, 16 * k)
    depth = columns // stripes
    if depth >= 2:
        rough = rough[:, : depth * stripes].reshape(n, depth, stripes).max(axis=1)
    place = rough.shape[1] - k
    best: NDArray[Number] = np.partition(rough, place, axis=1)[:, place]
    return best


def _chunks(count: int, width: int) -> Iterator[slice]:
    step = max(1, RESCORE_VALUES // max(1, width))
    for start in range(0, count, step):
        yield slice(start, start + step)
