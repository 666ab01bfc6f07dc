"""Exact search on embeddings: text to image, image to text, image to image, text to text.

In: query and corpus :class:`~chiasm.types.Embeddings` of one space. Out: a frozen :class:`SearchResult`.

The corpus is read in blocks of 16,384 rows, so memory does not grow with it and it may be memory-mapped. A fp32 matrix
product proposes candidates: every row whose score could, within the rounding error of fp32, still be among the best k.
Candidates are scored again in fp64. The answer is therefore the exact top k of the stored vectors, equal scores in the
order of their rows, whatever the block size, the thread count or the BLAS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings, Modality, Space, check_same_space

BLOCK_ROWS = 16_384
_QUERY_ROWS = 1_024
_RESCORE_VALUES = 2**22  # fp64 numbers held while candidates are scored again: 32 MiB a side

Exclude = Literal["none", "self", "patient"]


@dataclass(frozen=True)
class SearchResult:
    """The best rows of the corpus for every query, best first.

    Attributes:
        rows: int64, shape (queries, k): rows of the corpus; -1 where fewer than k rows were allowed.
        scores: float32, same shape: cosines; NaN where there is no row.
        query_ids: One per query.
        ids: Per query, the ids of the rows.
        texts: Per query, the texts of the rows, where the corpus has some.
        paths: Per query, the image paths of the rows, where the corpus has some.
        query_modality: What the queries were.
        corpus_modality: What was searched.
        corpus_size: Number of rows searched.
        space: Where they were compared.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    query_ids: tuple[str, ...]
    ids: tuple[tuple[str, ...], ...]
    texts: tuple[tuple[str | None, ...], ...] | None
    paths: tuple[tuple[str | None, ...], ...] | None
    query_modality: Modality
    corpus_modality: Modality
    corpus_size: int
    space: Space

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def direction(self) -> str:
        """What was searched by what: ``text → image``."""
        return f"{self.query_modality} → {self.corpus_modality}"

    def answers(self, query: int) -> tuple[tuple[str, float], ...]:
        """Return the ids and cosines of one query's answers, best first."""
        return tuple((name, float(s)) for name, s in zip(self.ids[query], self.scores[query], strict=False))

    def to_records(self) -> list[list[dict[str, Any]]]:
        """Return, per query, its hits as ``{"rank", "id", "score", "row"}`` with ``text`` and ``path`` where known."""
        records = []
        for q, ids in enumerate(self.ids):
            hits: list[dict[str, Any]] = []
            for k, name in enumerate(ids):
                hit = {"rank": k + 1, "id": name, "score": float(self.scores[q, k]), "row": int(self.rows[q, k])}
                for key, column in (("text", self.texts), ("path", self.paths)):
                    if column is not None and column[q][k] is not None:
                        hit[key] = column[q][k]
                hits.append(hit)
            records.append(hits)
        return records

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "direction": self.direction,
            "corpus_size": self.corpus_size,
            "space": self.space.to_dict(),
            "queries": [
                {"id": name, "hits": hits} for name, hits in zip(self.query_ids, self.to_records(), strict=True)
            ],
        }


def search(
    queries: Embeddings,
    corpus: Embeddings,
    k: int = 10,
    *,
    exclude: Exclude = "none",
    block_rows: int = BLOCK_ROWS,
) -> SearchResult:
    """Return the k most similar rows of the corpus for every query, exactly.

    Args:
        queries: Any number of rows, raw or normalised.
        corpus: At least one row, of the same space.
        k: How many; at most the size of the corpus is returned.
        exclude: ``self`` leaves out the row with the query's own id (image to image search in one set); ``patient``
            leaves out all rows of the query's patient.
        block_rows: Rows of the corpus compared at once.

    Raises:
        SpaceMismatch: When the two sides come from two spaces.
        InputError: When the corpus is empty, k is not positive, or vectors are damaged.
    """
    space = check_same_space(queries, corpus)
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if block_rows < 1:
        raise InputError(f"block_rows must be at least 1, got {block_rows}")
    if len(corpus) == 0:
        raise InputError("the corpus is empty, so there is nothing to search")
    k = min(k, len(corpus))
    _check_corpus(corpus)
    hidden = _hidden_rows(queries, corpus, exclude)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), np.nan, dtype=np.float32)
    for start in range(0, len(queries), _QUERY_ROWS):
        part = queries.select(np.arange(start, min(start + _QUERY_ROWS, len(queries))))
        top = _Top(unit_vectors(part, "query"), k, hidden[start : start + len(part)] if hidden is not None else None)
        for first in range(0, len(corpus), block_rows):
            top.add(corpus.vectors[first : first + block_rows], first, normalized=corpus.normalized)
        rows[start : start + len(part)] = top.rows
        scores[start : start + len(part)] = np.where(top.rows >= 0, top.scores, np.nan)

    def column(values: tuple[Any, ...] | None) -> tuple[tuple[Any, ...], ...] | None:
        return None if values is None else tuple(tuple(values[i] for i in row if i >= 0) for row in rows.tolist())

    ids = column(corpus.ids)
    assert ids is not None
    return SearchResult(
        rows,
        scores,
        queries.ids,
        ids,
        column(corpus.texts),
        column(corpus.paths),
        queries.modality,
        corpus.modality,
        len(corpus),
        space,
    )


def _check_corpus(corpus: Embeddings) -> None:
    """Check unit norms on at most 1,024 rows, evenly spaced; damaged values show in the scores of every block."""
    if corpus.normalized:
        sample = np.unique(np.linspace(0, len(corpus) - 1, min(len(corpus), 1024)).astype(np.int64))
        unit_vectors(corpus.select(sample), "corpus")


def _row_norms(block: NDArray[np.float32]) -> NDArray[np.float32]:
    norms: NDArray[np.float32] = np.sqrt(np.einsum("nd,nd->n", block, block))
    if (norms < 1e-12).any():
        raise InputError("a row of the corpus is all zero, so it has no direction")
    return norms


def _hidden_rows(queries: Embeddings, corpus: Embeddings, exclude: Exclude) -> list[NDArray[np.int64]] | None:
    """Return, per query, the rows that it may not find."""
    if exclude == "none":
        return None
    if exclude not in ("self", "patient"):
        raise UnknownName("value of exclude", exclude, ("none", "self", "patient"))
    wanted, keys = (queries.ids, corpus.ids) if exclude == "self" else (queries.groups, corpus.groups)
    rows: dict[str, list[int]] = {key: [] for key in wanted}
    for row, key in enumerate(keys):
        if key in rows:
            rows[key].append(row)
    return [np.asarray(rows[key], dtype=np.int64) for key in wanted]


class _Top:
    """The running k best rows of a block of queries, in the order (falling fp64 score, rising row)."""

    def __init__(self, queries: NDArray[np.float32], k: int, hidden: list[NDArray[np.int64]] | None) -> None:
        self.queries = queries
        self.k = k
        self.hidden = hidden
        self.rows = np.full((len(queries), k), -1, dtype=np.int64)
        self.scores = np.full((len(queries), k), -np.inf)
        # |fp32 dot - exact| <= dim * 2^-24 * |a||b| for any order of summation (Higham 2002, section 3.1), and as much
        # again where raw rows are divided by a fp32 norm; norms are 1 up to 2 % (bf16 vectors marked as normalised).
        self.error = 1.2 * (2 * queries.shape[1] + 4) * 2.0**-24

    def add(self, block: NDArray[np.float32], first: int, *, normalized: bool) -> None:
        """Take in the rows ``first, first + 1, ...`` of the corpus."""
        rough = self.queries @ block.T
        if not normalized:
            rough /= _row_norms(block)
        if not np.isfinite(rough).all():
            raise InputError(
                f"the corpus holds values that are not finite, in rows {first} to {first + len(block) - 1}",
                hint="embed these rows again",
            )
        if self.hidden is not None:
            for q, rows in enumerate(self.hidden):
                inside = rows[(rows >= first) & (rows < first + len(block))]
                rough[q, inside - first] = -np.inf
        threshold = self.scores[:, -1] - self.error
        if not np.isfinite(threshold).all():
            self._raise_threshold(rough, threshold, ~np.isfinite(threshold))
        keep = rough >= threshold.astype(np.float32)[:, None]
        crowded = np.count_nonzero(keep, axis=1) > 8 * self.k + 64
        if crowded.any():
            self._raise_threshold(rough, threshold, crowded)
            keep[crowded] = rough[crowded] >= threshold[crowded].astype(np.float32)[:, None]
        flat = np.flatnonzero(keep)
        if len(flat) == 0:
            return
        query, column = np.divmod(flat, len(block))
        allowed = np.isfinite(rough[query, column])
        query, column = query[allowed], column[allowed]
        for part in self._chunks(query, block.shape[1]):
            q, c = query[part], column[part]
            found = block[c].astype(np.float64)
            exact = np.einsum("nd,nd->n", self.queries[q].astype(np.float64), found)
            if not normalized:
                exact /= np.sqrt(np.einsum("nd,nd->n", found, found))
            self._merge(q, c + first, exact)

    def _raise_threshold(
        self, rough: NDArray[np.float32], threshold: NDArray[np.float64], which: NDArray[np.bool_]
    ) -> None:
        """Raise the threshold of some queries to the k-th best of this block, less the rounding error."""
        if rough.shape[1] < self.k:
            return
        kth = np.partition(rough[which], rough.shape[1] - self.k, axis=1)[:, rough.shape[1] - self.k]
        threshold[which] = np.maximum(threshold[which], kth.astype(np.float64) - 2 * self.error)

    @staticmethod
    def _chunks(query: NDArray[np.int64], dim: int) -> Iterator[slice]:
        step = max(1, _RESCORE_VALUES // dim)
        for start in range(0, len(query), step):
            yield slice(start, start + step)

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
