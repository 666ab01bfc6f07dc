"""Exact search on embeddings: text to image, image to text, image to image, text to text.

In: query and corpus :class:`~chiasm.types.Embeddings` of one space. Out: a frozen :class:`SearchResult`.

The corpus is read in blocks of 16,384 rows, so memory does not grow with it and it may be memory-mapped. A fp32 matrix
product proposes candidates: every row whose score could, within the rounding error of fp32, still be among the best k.
Candidates are scored again in fp64. The answer is therefore the exact top k of the stored vectors, equal scores in the
order of their rows, whatever the block size, the thread count or the BLAS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.tasks.top_rows import TopRows, dot_error
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings, Modality, Space, check_same_space

BLOCK_ROWS = 16_384
_QUERY_ROWS = 1_024

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
        units = unit_vectors(part, "query")
        top = TopRows(len(part), k)
        for first in range(0, len(corpus), block_rows):
            block = corpus.vectors[first : first + block_rows]
            _add_block(
                top, units, block, first, normalized=corpus.normalized,
                hidden=None if hidden is None else hidden[start : start + len(part)],
            )  # fmt: skip
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


def _add_block(
    top: TopRows,
    queries: NDArray[np.float32],
    block: NDArray[np.float32],
    first: int,
    *,
    normalized: bool,
    hidden: list[NDArray[np.int64]] | None,
) -> None:
    """Score the rows ``first, first + 1, ...`` of the corpus."""
    rough = queries @ block.T
    if not normalized:
        rough /= _row_norms(block)
    if not np.isfinite(rough).all():
        raise InputError(
            f"the corpus holds values that are not finite, in rows {first} to {first + len(block) - 1}",
            hint="embed these rows again",
        )
    if hidden is not None:
        for q, rows in enumerate(hidden):
            inside = rows[(rows >= first) & (rows < first + len(block))]
            rough[q, inside - first] = -np.inf

    def exact(query: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.float64]:
        found = block[column].astype(np.float64)
        scores: NDArray[np.float64] = np.einsum("nd,nd->n", queries[query].astype(np.float64), found)
        return scores if normalized else scores / np.sqrt(np.einsum("nd,nd->n", found, found))

    rows = np.arange(first, first + len(block), dtype=np.int64)
    top.add(rough, rows, exact, error=dot_error(block.shape[1]), width=block.shape[1])


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
