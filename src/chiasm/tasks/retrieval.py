"""Exact search on embeddings: text to image, image to text, image to image, text to text.

In: query and corpus :class:`~chiasm.types.Embeddings` of one space. Out: a frozen :class:`SearchResult`.

The answer is the exact top k of the stored vectors: the order of fp64 cosines, equal ones in the order of their rows,
whatever the engine, the block size, the thread count or the BLAS. Two engines propose candidates and fp64 decides:

- int8 (:mod:`chiasm.tasks.quantized`): an int8 copy of the corpus with a proven bound of its errors. It pays when a copy
  is there, or when many queries come at once. Queries with too many candidates go to the other engine.
- fp32: blocks of 16,384 rows, so memory does not grow with the corpus and it may be memory-mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.io.mapped_vectors import mapped_file, release_pages
from chiasm.tasks.hidden_cells import HiddenCells
from chiasm.tasks.quantized import (
    QuantizedCorpus,
    can_scan,
    find_candidates,
    not_finite,
    quantize,
    row_norms,
)
from chiasm.tasks.search_index import is_whole_store, open_index
from chiasm.tasks.top_rows import TopRows, dot_error
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings, Modality, Space, check_same_space

BLOCK_ROWS = 16_384
#: Values (rows × dimensions) from which an int8 copy is worth its making, and queries from which it is in one search.
INT8_VALUES, ONCE_QUERIES = 2**24, 1024
_QUERY_ROWS = 1_024
_SCORES = 2**19

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
    block_rows: int | None = None,
) -> SearchResult:
    """Return the k most similar rows of the corpus for every query, exactly.

    A corpus that is searched again and again is better given to a :class:`Searcher`.

    Args:
        queries: Any number of rows, raw or normalised.
        corpus: At least one row, of the same space. The int8 copy of vectors that are mapped from a store lies beside
            them and is made by the first search of a large one.
        k: How many; at most the size of the corpus is returned.
        exclude: ``self`` leaves out the row with the query's own id (image to image search in one set); ``patient``
            leaves out all rows of the query's patient.
        block_rows: Rows of the corpus compared at once by the fp32 engine; None: 16,384, or more for few queries.

    Raises:
        SpaceMismatch: When the two sides come from two spaces.
        InputError: When the corpus is empty, k is not positive, or vectors are damaged.
    """
    _check_search(queries, corpus, k, block_rows)
    _check_corpus(corpus)
    return _search(queries, corpus, k, exclude, _index_for(corpus, len(queries)), block_rows)


class Searcher:
    """A corpus that is made ready once and searched many times.

    Args:
        corpus: At least one row. Its vectors must not be changed afterwards.
        engine: ``int8`` keeps an int8 copy, a quarter of the vectors' size; ``fp32`` none; ``auto``: int8 from 16
            million values on, where this machine has an exact int8 product.
        folder: Keep the copy there, memory-mapped, and find it there again; a new or empty folder. None: in memory, or beside the vectors that
            are mapped from a store.

    Attributes:
        corpus: As given.
        index: The int8 copy, or None.

    Raises:
        InputError: The corpus is empty, or vectors are damaged, or ``int8`` was asked for where it cannot be exact.
        UnknownName: An unknown engine.
    """

    def __init__(
        self,
        corpus: Embeddings,
        *,
        engine: Literal["auto", "int8", "fp32"] = "auto",
        folder: str | Path | None = None,
    ) -> None:
        if engine not in ("auto", "int8", "fp32"):
            raise UnknownName("engine of search", engine, ("auto", "int8", "fp32"))
        if len(corpus) == 0:
            raise InputError("the corpus is empty, so there is nothing to search")
        possible = engine != "fp32" and can_scan(corpus.dim)
        if engine == "int8" and not possible:
            raise InputError("this machine has no exact int8 product", hint='use engine="auto"')
        _check_corpus(corpus)
        self.corpus = corpus
        self.index: QuantizedCorpus | None = None
        if possible and (engine == "int8" or corpus.vectors.size >= INT8_VALUES):
            kept = folder is not None or is_whole_store(corpus.vectors)
            if kept:
                self.index = open_index(corpus.vectors, normalized=corpus.normalized, folder=folder)
            if self.index is None:
                self.index = quantize(corpus.vectors, normalized=corpus.normalized)

    def search(self, queries: Embeddings, k: int = 10, *, exclude: Exclude = "none") -> SearchResult:
        """Return what :func:`search` returns.

        Raises:
            SpaceMismatch: When the two sides come from two spaces.
            InputError: When k is not positive, or vectors are damaged.
        """
        _check_search(queries, self.corpus, k, None)
        return _search(queries, self.corpus, k, exclude, self.index, None)


def _check_search(queries: Embeddings, corpus: Embeddings, k: int, block_rows: int | None) -> None:
    check_same_space(queries, corpus)
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if block_rows is not None and block_rows < 1:
        raise InputError(f"block_rows must be at least 1, got {block_rows}")
    if len(corpus) == 0:
        raise InputError("the corpus is empty, so there is nothing to search")


def _index_for(corpus: Embeddings, queries: int) -> QuantizedCorpus | None:
    """Return an int8 copy where it saves more than it costs."""
    if corpus.vectors.size < INT8_VALUES or not queries or not can_scan(corpus.dim):
        return None
    if is_whole_store(corpus.vectors):
        found = open_index(corpus.vectors, normalized=corpus.normalized)
        if found is not None:
            return found
    return quantize(corpus.vectors, normalized=corpus.normalized) if queries >= ONCE_QUERIES else None


def _search(
    queries: Embeddings,
    corpus: Embeddings,
    k: int,
    exclude: Exclude,
    index: QuantizedCorpus | None,
    block_rows: int | None,
) -> SearchResult:
    k = min(k, len(corpus))
    hidden = _hidden_cells(queries, corpus, exclude)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), np.nan, dtype=np.float32)
    for start in range(0, len(queries), _QUERY_ROWS):
        last = min(start + _QUERY_ROWS, len(queries))
        units = unit_vectors(queries.select(np.arange(start, last)), "query")
        part = None if hidden is None else hidden.queries(np.arange(start, last))
        top = TopRows(len(units), k)
        rest = np.arange(len(units))
        if index is not None and 16 * k <= len(corpus):
            rest = _by_index(top, units, corpus, index, part)
        if len(rest):
            _by_blocks(top, rest, units, corpus, part, block_rows)
        rows[start:last] = top.rows
        scores[start:last] = np.where(top.rows >= 0, top.scores, np.nan)

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
        corpus.space,
    )


def _check_corpus(corpus: Embeddings) -> None:
    """Check unit norms on at most 1,024 rows, evenly spaced; damaged values show in the scores of every block."""
    if corpus.normalized:
        sample = np.unique(np.linspace(0, len(corpus) - 1, min(len(corpus), 1024)).astype(np.int64))
        unit_vectors(corpus.select(sample), "corpus")
        release_pages(corpus.vectors)


def _by_index(
    top: TopRows,
    units: NDArray[np.float32],
    corpus: Embeddings,
    index: QuantizedCorpus,
    hidden: HiddenCells | None,
) -> NDArray[np.int64]:
    """Score the candidates of the int8 copy; return the queries that had too many."""
    found = find_candidates(index, units, top.k, hidden=hidden)
    query, row = found.query, found.row
    # The best by the codes first: their exact scores rule out most of the others.
    order = np.lexsort((-found.score, query))
    rank = np.empty(len(query), dtype=np.int64)
    rank[order] = np.arange(len(query)) - np.searchsorted(query[order], query[order])
    score = _exact_scores(units, corpus.vectors, normalized=corpus.normalized)

    def exact(query: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.float64]:
        scores = score(query, row)
        release_pages(corpus.vectors)  # scattered rows bring their neighbours into memory
        return scores

    width = corpus.dim * (1 if mapped_file(corpus.vectors) is None else 8)
    first = rank < top.k
    top.take(query[first], row[first], exact, width=width)
    later = ~first & (found.upper >= top.scores[query, -1])
    top.take(query[later], row[later], exact, width=width)
    return np.flatnonzero(found.crowded)


def _by_blocks(
    top: TopRows,
    which: NDArray[np.int64],
    units: NDArray[np.float32],
    corpus: Embeddings,
    hidden: HiddenCells | None,
    block_rows: int | None,
) -> None:
    """Search for some of the queries in fp32."""
    some = len(which) < len(units)
    part = TopRows(len(which), top.k) if some else top
    place = np.full(len(units), -1)
    place[which] = np.arange(len(which))
    block_rows = block_rows or max(BLOCK_ROWS, _SCORES // max(1, len(which)))
    for first in range(0, len(corpus), block_rows):
        block = corpus.vectors[first : first + block_rows]
        cells = None if hidden is None else hidden.rows(first, first + len(block))
        if cells is not None and some:
            cells = (place[cells[0]], cells[1])
            cells = (cells[0][cells[0] >= 0], cells[1][cells[0] >= 0])
        _add_block(part, units[which] if some else units, block, first, normalized=corpus.normalized, hidden=cells)
    if some:
        top.rows[which], top.scores[which] = part.rows, part.scores


def _add_block(
    top: TopRows,
    queries: NDArray[np.float32],
    block: NDArray[np.float32],
    first: int,
    *,
    normalized: bool,
    hidden: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
) -> None:
    """Score the rows ``first, first + 1, ...`` of the corpus."""
    rough = queries @ block.T
    if not normalized:
        rough /= row_norms(block)
    if not np.isfinite(rough).all():
        raise not_finite(first, first + len(block))
    if hidden is not None:
        rough[hidden] = -np.inf
    exact = _exact_scores(queries, block, normalized=normalized)
    rows = np.arange(first, first + len(block), dtype=np.int64)
    top.add(rough, rows, exact, error=dot_error(block.shape[1]), width=block.shape[1])


def _exact_scores(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], *, normalized: bool
) -> Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]:
    def exact(query: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.float64]:
        found = vectors[row].astype(np.float64)
        scores: NDArray[np.float64] = np.einsum("nd,nd->n", queries[query].astype(np.float64), found)
        return scores if normalized else scores / np.sqrt(np.einsum("nd,nd->n", found, found))

    return exact


def _hidden_cells(queries: Embeddings, corpus: Embeddings, exclude: Exclude) -> HiddenCells | None:
    """Return the cells (query, row) that may not be found."""
    if exclude == "none":
        return None
    if exclude not in ("self", "patient"):
        raise UnknownName("value of exclude", exclude, ("none", "self", "patient"))
    wanted, keys = (queries.ids, corpus.ids) if exclude == "self" else (queries.groups, corpus.groups)
    rows: dict[str, list[int]] = {key: [] for key in wanted}
    for row, key in enumerate(keys):
        if key in rows:
            rows[key].append(row)
    return HiddenCells.of([np.asarray(rows[key], dtype=np.int64) for key in wanted])
