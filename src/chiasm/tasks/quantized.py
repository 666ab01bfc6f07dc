"""An int8 copy of a corpus that proves which rows can be among the best k, so that only those are scored in fp64.

Comes in: vectors, once; then unit queries. Goes out: candidate rows of every query, with no row of the exact top k
missing, or the word that a query has too many.

A row x is kept as int8 codes c with x = centre + scale * c + e, beside |e|, |scale * c| and u.e, where u is the centre's
direction. A query is q = t * p + f with int8 p, and q = (q.u) u + r. Then

    q.x = q.centre + scale * t * (p.c) + (q.u)(u.e) + f.(scale * c) + r.e

where p.c is exact in int32, so by Cauchy and Schwarz q.x differs from the first three terms by at most
|f| |scale * c| + |r| |e|, and what fp32 rounds. A row whose score plus that bound lies below the k-th best score minus
bound cannot be an answer. The centre is the mean: vectors of a CLIP lie in a narrow cone, and what is left of rows and
queries without it is shorter. A query that has too many candidates is asked again with p of 15 bits, in two int8
products, which leaves nearly nothing of f.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.io.mapped_vectors import release_pages
from chiasm.tasks.hidden_cells import HiddenCells
from chiasm.tasks.int8_scan import (
    MAX_WIDTH,
    WIDTH_STEP,
    Product,
    best_product,
    compiled_product,
    default_threads,
)
from chiasm.tasks.top_rows import kth_best

#: Rows that share one largest error.
GRANULE = 1024
_BUILD_ROWS = 1024
_SAMPLE_ROWS, _RUN_ROWS = 2048, 64
_CLIP = 0.9999  # of the sampled values; what is clipped is counted in the error like all the rest
_QUERY_ROWS = 256
_FINE_QUERIES = 4  # so few wait for memory, and a second product costs nothing
_SCORES = 2**19  # int32 scores held a thread: 2 MiB, which caches hold
_HIDDEN = np.iinfo(np.int32).min
_NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class QuantizedCorpus:
    """Unit rows as int8, with what was lost.

    Attributes:
        codes: int8, (n, width): in -127..127; width is the dimension padded with zeros to a multiple of 64. May be
            memory-mapped.
        error: float32, (n,): upper bound of the norm of what the codes leave out.
        length: float32, (n,): upper bound of the norm of scale * codes.
        lean: float32, (n,): what the codes leave out, along the centre.
        centre: float32, (dim,): what was subtracted before.
        scale: What a code of 1 stands for.
        rounding: Upper bound of what fp32 did to the score of a query of norm 1 with any row.
    """

    codes: NDArray[np.int8]
    error: NDArray[np.float32]
    length: NDArray[np.float32]
    lean: NDArray[np.float32]
    centre: NDArray[np.float32]
    scale: float
    rounding: float

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def largest(self) -> tuple[NDArray[np.float32], ...]:
        """Largest error, length and size of lean of every 1,024 rows."""
        starts = np.arange(0, len(self), GRANULE)
        return tuple(np.maximum.reduceat(v, starts) for v in (self.error, self.length, np.abs(self.lean)))

    @cached_property
    def direction(self) -> NDArray[np.float32]:
        """Direction of the centre, float32 (dim,)."""
        return direction_of(self.centre)


@dataclass(frozen=True)
class Candidates:
    """Rows that may be among the best k; every row that is among them is here, unless its query is crowded.

    Attributes:
        query: int64: which query.
        row: int64: which row of the corpus.
        score: fp64: its score by the codes.
        upper: fp64: the exact score is at most this.
        crowded: bool, (queries,): these had too many; they have no candidates here and are to be searched otherwise.
    """

    query: NDArray[np.int64]
    row: NDArray[np.int64]
    score: NDArray[np.float64]
    upper: NDArray[np.float64]
    crowded: NDArray[np.bool_]


def row_norms(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the norms of raw rows; NaN where squares leave fp32, as dividing by infinity would hide the row.

    Raises:
        InputError: A row is all zero.
    """
    norms: NDArray[np.float32] = np.sqrt(np.einsum("nd,nd->n", block, block))
    norms[np.isinf(norms)] = np.nan
    if (norms < 1e-12).any():
        raise InputError("a row of the corpus is all zero, so it has no direction")
    return norms


def not_finite(first: int, last: int) -> InputError:
    """Return the error for damaged values in rows ``first`` to ``last - 1``."""
    return InputError(
        f"the corpus holds values that are too large or not finite, in rows {first} to {last - 1}",
        hint="embed these rows again",
    )


def padded_width(dim: int) -> int:
    """Return the width of the codes."""
    return -(-dim // WIDTH_STEP) * WIDTH_STEP


def quantize(
    vectors: NDArray[np.float32],
    *,
    normalized: bool,
    threads: int | None = None,
    write: Callable[[int, NDArray[np.int8]], None] | None = None,
) -> QuantizedCorpus:
    """Return the int8 copy of a corpus.

    Args:
        vectors: (n, dim), n at least 1; may be memory-mapped: pages that were read are given back.
        normalized: False: rows are divided by their norms first.
        threads: At once; None: as many as torch or the machine has.
        write: Is given the first row and the codes of every block, in any order and from several threads; then no codes
            are kept in memory, and ``codes`` of the result is empty.

    Raises:
        InputError: A value is not finite, or a raw row is all zero.
    """
    n, dim = vectors.shape
    centre, scale = _centre_and_scale(vectors, normalized=normalized)
    width = padded_width(dim)
    codes = np.zeros((n if write is None else 0, width), np.int8)
    error, length, lean = (np.empty(n, np.float32) for _ in range(3))
    rounding = np.zeros(-(-n // _BUILD_ROWS))
    direction = direction_of(centre)
    room = threading.local()

    def block(first: int) -> None:
        last = min(first + _BUILD_ROWS, n)
        if not hasattr(room, "rest"):
            room.rest, room.rounded = (np.empty((_BUILD_ROWS, dim), np.float32) for _ in range(2))
        rest, rounded = room.rest[: last - first], room.rounded[: last - first]
        rows = vectors[first:last]
        with np.errstate(all="ignore"):  # what is not finite is told below
            _round(rows, centre, scale, rest, rounded, normalized=normalized)
            found = codes[first:last] if write is None else np.zeros((last - first, width), np.int8)
            found[:, :dim] = rounded
            rounded *= np.float32(scale)
            rest -= rounded
            size = np.sqrt(np.einsum("nd,nd->n", rounded, rounded))
            lost = np.sqrt(np.einsum("nd,nd->n", rest, rest))
        if not np.isfinite(lost).all():
            raise not_finite(first, last)
        # Sums of dim terms in fp32 are off by at most dim + 2 units of rounding, relative to the norms (Higham 2002).
        unit = 2.0**-24
        length[first:last] = size * (1 + (dim + 8) * unit)
        error[first:last] = lost * (1 + (dim + 8) * unit)
        lean[first:last] = rest @ direction
        # Subtractions and products of single values; the sum of lean; the norm that raw rows were divided by.
        off = 8 * (size + lost) + (dim + 4) * lost + (0 if normalized else dim / 2 + 4)
        rounding[first // _BUILD_ROWS] = 1.2 * unit * float(off.max())
        if write is not None:
            write(first, found)
        release_pages(rows)

    threads = default_threads() if threads is None else threads
    for _ in _in_threads(block, range(0, n, _BUILD_ROWS), threads):
        pass
    return QuantizedCorpus(codes, error, length, lean, centre, scale, float(rounding.max()))


def direction_of(centre: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a vector with unit norm, or zeros where there is no direction."""
    norm = float(np.linalg.norm(centre.astype(np.float64)))
    direction: NDArray[np.float32] = (centre / norm if norm > 1e-6 else np.zeros_like(centre)).astype(np.float32)
    return direction


def codes_of(
    vectors: NDArray[np.float32], centre: NDArray[np.float32], scale: float, *, normalized: bool
) -> NDArray[np.int8]:
    """Return the codes that :func:`quantize` gives these rows."""
    n, dim = vectors.shape
    rest, rounded = np.empty((n, dim), np.float32), np.empty((n, dim), np.float32)
    _round(vectors, centre, scale, rest, rounded, normalized=normalized)
    codes = np.zeros((n, padded_width(dim)), np.int8)
    with np.errstate(invalid="ignore"):
        codes[:, :dim] = rounded
    return codes


def _round(
    rows: NDArray[np.float32],
    centre: NDArray[np.float32],
    scale: float,
    rest: NDArray[np.float32],
    rounded: NDArray[np.float32],
    *,
    normalized: bool,
) -> None:
    """Write unit rows without the centre to ``rest``, and the same in whole steps to ``rounded``."""
    if normalized:
        np.subtract(rows, centre, out=rest)
    else:
        np.divide(rows, row_norms(rows)[:, None], out=rest)
        rest -= centre
    np.multiply(rest, np.float32(1 / scale), out=rounded)
    np.rint(rounded, out=rounded)
    np.clip(rounded, -127, 127, out=rounded)


def _centre_and_scale(vectors: NDArray[np.float32], *, normalized: bool) -> tuple[NDArray[np.float32], float]:
    """Return the mean of a sample of rows, and what a code of 1 stands for."""
    # Runs of rows: reading one row of a mapped file brings its neighbours into memory too.
    starts = np.unique(np.linspace(0, max(0, len(vectors) - _RUN_ROWS), _SAMPLE_ROWS // _RUN_ROWS).astype(np.int64))
    sample = np.concatenate([vectors[first : first + _RUN_ROWS] for first in starts])
    release_pages(vectors)
    norms = np.linalg.norm(sample, axis=1)
    sample = sample[np.isfinite(norms) & (norms > 0)]  # others are told when their block is reached
    if not normalized:
        sample = sample / np.linalg.norm(sample, axis=1, keepdims=True)
    if not len(sample):
        return np.zeros(vectors.shape[1], np.float32), 1.0
    centre = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    largest = float(np.quantile(np.abs(sample - centre), _CLIP, method="higher"))
    return centre, float(np.float32(max(largest, 1e-6) / 127))


def find_candidates(
    corpus: QuantizedCorpus,
    units: NDArray[np.float32],
    k: int,
    *,
    hidden: HiddenCells | None = None,
    product: Product | None = None,
    threads: int | None = None,
) -> Candidates:
    """Return all rows that may be among the best k of each query.

    Args:
        corpus: Of :func:`quantize`.
        units: float32, (queries, dim), of unit norm.
        k: At most the number of rows.
        hidden: What may not be found.
        product: Of int8; None: the best there is.
        threads: At once, for the compiled product; None: as many as torch or the machine has.

    Raises:
        RuntimeError: There is no exact int8 product on this machine (:func:`can_scan`).
    """
    product = product or best_product()
    if product is None:
        raise RuntimeError("no exact int8 product on this machine")
    threads = default_threads() if threads is None else threads
    if product is not compiled_product():
        threads = 1  # torch has threads of its own
    cells, crowded = _EMPTY, np.ones(len(units), dtype=bool)
    fine_first = _wants_fine(corpus, units, k, product)
    for fine, which in ((False, ~fine_first), (True, crowded)):  # crowded is what is left by then
        rows = np.flatnonzero(which)
        for start in range(0, len(rows), _QUERY_ROWS):
            some = rows[start : start + _QUERY_ROWS]
            masked = None if hidden is None else hidden.queries(some)
            found, given_up = _Scan(corpus, units[some], k, masked, product, fine).run(threads)
            crowded[some] = given_up
            found = (some[found[0]], *found[1:])
            cells = tuple(np.concatenate(c) for c in zip(cells, found, strict=True))  # type: ignore[assignment]
    query, row, score, half = cells
    return Candidates(query, row, score, score + half, crowded)


def _wants_fine(corpus: QuantizedCorpus, units: NDArray[np.float32], k: int, product: Product) -> NDArray[np.bool_]:
    """Return which queries keep too much of 1,024 rows when they have 8 bits; all where a second product costs nothing."""
    n = len(corpus)
    if len(units) <= _FINE_QUERIES or n < 8 * GRANULE:
        return np.full(len(units), len(units) <= _FINE_QUERIES)
    wanted = np.zeros(len(units), dtype=bool)
    first = n // 2 // GRANULE * GRANULE
    for start in range(0, len(units), _QUERY_ROWS):
        part = units[start : start + _QUERY_ROWS]
        scan = _Scan(corpus, part, min(k, GRANULE), None, product, False)
        kept = scan.kept(first, first + GRANULE)
        wanted[start : start + len(part)] = kept > max(4 * k, GRANULE // 4)
    return wanted


def can_scan(dim: int) -> bool:
    """Return whether this machine has an exact int8 product for vectors of this length."""
    return padded_width(dim) <= MAX_WIDTH and best_product() is not None


_Cells = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
_EMPTY: _Cells = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))


@dataclass
class _Scan:
    """One pass over the codes for some queries."""

    corpus: QuantizedCorpus
    units: NDArray[np.float32]
    k: int
    hidden: HiddenCells | None
    product: Product
    fine: bool
    _found: list[_Cells] = field(default_factory=list)

    def __post_init__(self) -> None:
        m, dim = self.units.shape
        exact = self.units.astype(np.float64)
        width = self.corpus.codes.shape[1]
        # Fine: 128 * high + low; the sums stay within int32.
        largest = min(127 * 128, (2**31 - 1) // (127 * width)) if self.fine else 127
        step = np.maximum(np.abs(exact).max(axis=1), 1e-30) / largest
        whole = np.clip(np.rint(exact / step[:, None]), -largest, largest).astype(np.int32)
        high = (whole + 64) // 128 if self.fine else whole
        self._codes = np.zeros((2 * m if self.fine else m, width), np.int8)
        self._codes[:m, :dim] = high
        if self.fine:
            self._codes[m:, :dim] = whole - 128 * high
        lost = exact - step[:, None] * whole
        self._lost = np.sqrt(np.einsum("nd,nd->n", lost, lost))
        direction = self.corpus.direction.astype(np.float64)
        self._along = exact @ direction
        rest = exact - self._along[:, None] * direction
        self._rest = np.sqrt(np.einsum("nd,nd->n", rest, rest))
        norm = np.sqrt(np.einsum("nd,nd->n", exact, exact))
        self._rounding = norm * (self.corpus.rounding + 1e-9)
        self._offset = exact @ self.corpus.centre.astype(np.float64)
        self._step = step * self.corpus.scale
        #: At least k rows have exact scores of at least this.
        self._sure = np.full(m, -np.inf)
        self._best = np.full((m, self.k), -np.inf)
        self._count = np.zeros(m, np.int64)
        self._crowded = np.zeros(m, bool)
        self._limit = max(1024, 4 * self.k, len(self.corpus) // 64)
        self._lock = threading.Lock()
        self._scores = threading.local()

    def run(self, threads: int) -> tuple[_Cells, NDArray[np.bool_]]:
        """Scan all rows; return what may be among the best (score and half width), and which queries were given up."""
        n, m = len(self.corpus), len(self._codes)
        rows = max(GRANULE, _SCORES // max(m, 1) // GRANULE * GRANULE)
        rows = min(rows, max(GRANULE, -(-n // threads // GRANULE) * GRANULE))
        for _ in _in_threads(lambda first: self._block(first, min(first + rows, n)), range(0, n, rows), threads):
            if self._crowded.all():
                break
        query, row, score, half = (np.concatenate(c) for c in zip(_EMPTY, *self._found, strict=True))
        keep = (score + half >= self._sure[query]) & ~self._crowded[query]
        return (query[keep], row[keep], score[keep], half[keep]), self._crowded

    def kept(self, first: int, last: int) -> NDArray[np.int64]:
        """Return how many of some rows each query cannot rule out when it has seen these alone."""
        self._block(first, last)
        count: NDArray[np.int64] = self._count + GRANULE * self._crowded
        return count

    def _block(self, first: int, last: int) -> None:
        if self._crowded.all():
            return
        m, size = len(self.units), len(self._codes) * (last - first)
        if getattr(self._scores, "room", None) is None or self._scores.room.size < size:
            self._scores.room = np.empty(size, np.int32)
        scores = self._scores.room[:size].reshape(len(self._codes), last - first)
        self.product(self.corpus.codes[first:last], self._codes, scores)
        if self.fine:
            high, low = scores[:m], scores[m:]
            high *= 128
            high += low
            scores = high
        if self.hidden is not None:
            scores[self.hidden.rows(first, last)] = _HIDDEN
        part = slice(first // GRANULE, -(-last // GRANULE))
        error, length, lean = (float(values[part].max()) for values in self.corpus.largest)
        widest = self._rest * error + self._lost * length + np.abs(self._along) * lean + self._rounding
        self._start(scores, widest)
        sure = self._sure.copy()
        query, column = _cells(scores, self._integer_threshold(sure - widest))
        if not len(query):
            return
        found = scores[query, column]
        row = column + first
        score = self._offset[query] + self._step[query] * found + self._along[query] * self.corpus.lean[row]
        half = self._rest[query] * self.corpus.error[row] + self._lost[query] * self.corpus.length[row]
        half += self._rounding[query]
        keep = (score + half >= sure[query]) & (found != _HIDDEN)
        with self._lock:
            self._take(query[keep], row[keep], score[keep], half[keep])

    def _start(self, scores: NDArray[np.int32], widest: NDArray[np.float64]) -> None:
        """Give queries without k sure rows the k-th best of this block."""
        new = np.flatnonzero(~np.isfinite(self._sure) & ~self._crowded)
        if not len(new) or scores.shape[1] < self.k:
            return
        kth = kth_best(scores[new] if len(new) < len(scores) else scores, self.k)
        sure = np.where(kth == _HIDDEN, -np.inf, self._offset[new] + self._step[new] * kth - widest[new])
        with self._lock:
            self._sure[new] = np.maximum(self._sure[new], sure)

    def _integer_threshold(self, least: NDArray[np.float64]) -> NDArray[np.int32]:
        """Return the int32 score below which a row's score by the codes lies below ``least``."""
        with np.errstate(invalid="ignore", over="ignore"):
            value = np.floor((least - self._offset) / self._step) - 1
        value[self._crowded] = _NEVER
        threshold: NDArray[np.int32] = np.clip(value, _HIDDEN + 1, _NEVER).astype(np.int32)
        return threshold

    def _take(
        self,
        query: NDArray[np.int64],
        row: NDArray[np.int64],
        score: NDArray[np.float64],
        half: NDArray[np.float64],
    ) -> None:
        self._found.append((query, row, score, half))
        self._count += np.bincount(query, minlength=len(self._count))
        lower = score - half
        better = lower > self._best[query, -1]
        query, lower = query[better], lower[better]
        touched = np.unique(query)
        if len(touched):
            of = np.concatenate([np.repeat(touched, self.k), query])
            value = np.concatenate([self._best[touched].ravel(), lower])
            order = np.lexsort((-value, of))
            starts = np.searchsorted(of[order], touched)
            self._best[touched] = value[order[starts[:, None] + np.arange(self.k)]]
            self._sure[touched] = np.maximum(self._sure[touched], self._best[touched, -1])
        full = self._count > self._limit
        if full.any():
            self._recount(full)

    def _recount(self, full: NDArray[np.bool_]) -> None:
        """Count what is still in question of the queries that have much; those with too much are given up."""
        query, row, score, half = (np.concatenate(c) for c in zip(*self._found, strict=True))
        keep = (score + half >= self._sure[query]) & ~self._crowded[query]
        self._found[:] = [(query[keep], row[keep], score[keep], half[keep])]
        self._count = np.bincount(query[keep], minlength=len(self._count))
        self._crowded |= full & (self._count > self._limit // 2)


def _cells(scores: NDArray[np.int32], threshold: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    flat = np.flatnonzero(scores >= threshold[:, None])
    query, column = np.divmod(flat, scores.shape[1])
    return query, column


def _in_threads(call: Callable[[int], None], items: range, threads: int) -> Iterator[None]:
    """Call with every item; yields as they end, raises the error of the first item that failed."""
    if threads <= 1 or len(items) == 1:
        yield from map(call, items)
        return
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        yield from pool.map(call, items)
