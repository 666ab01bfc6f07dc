"""Reports as sets of chunks: their similarities with images, rough in fp32 for many, exact in fp64 for chosen pairs.

Comes in: embeddings of chunks and which report each is of. Goes out: blocks of reports of one number of chunks, so that a
block is one matrix product; and the exact similarity of any image with any report, which depends on nothing but their
vectors: not on the block, not on what else is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.tasks.top_rows import RESCORE_VALUES, dot_error
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings

Aggregate = Literal["max", "mean", "top_mean"]
#: ``top_mean`` is the mean over this many chunks, or over all of a report that has fewer.
TOP_CHUNKS = 3
_IMAGE_ROWS = 256  # a block of similarities of usual size then stays near the processor
#: Unit rows of images (n, dim) -> their cosines with known reports (n, m), roughly, and how far one can be off. The array
#: may be written over by the next call.
Rough = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], float]]
#: Unit rows of reports (m, dim) -> what compares images with them.
Product = Callable[[NDArray[np.float32]], Rough]
_Float = TypeVar("_Float", np.float32, np.float64)


def float32_product(reports: NDArray[np.float32]) -> Rough:
    """Compare images with these reports in fp32."""
    error = dot_error(reports.shape[1])
    return lambda images: (images @ reports.T, error)


class ReportBlock:
    """Reports of one number of chunks: their places among all reports, and their chunks one after the other.

    Attributes:
        places: (reports,), rising.
        vectors: (chunks × reports, dim): first the first chunks of all reports, then the second ones.
    """

    def __init__(
        self, places: NDArray[np.int64], vectors: NDArray[np.float32], aggregate: Aggregate, product: Product
    ) -> None:
        self.places = places
        self.vectors = vectors
        self.chunks = len(vectors) // len(places)
        self.aggregate: Aggregate = aggregate
        self._product = product(vectors)

    @property
    def width(self) -> int:
        """Numbers that scoring one report again takes."""
        return self.chunks * int(self.vectors.shape[1])

    def rough(self, units: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return fp32 similarities (images, reports), and how far one can lie from the exact one."""
        cosines, error = self._product(units)
        if self.chunks > 1:
            cosines = aggregate_chunks(cosines.reshape(len(units), self.chunks, len(self.places)), self.aggregate)
            error += 1.2 * (self.chunks + 2) * 2.0**-24  # sums over chunks are rounded, too
        return cosines, error

    def exact(
        self, units: NDArray[np.float32], image: NDArray[np.int64], report: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return fp64 similarities of positions in ``units`` with positions in the block."""
        where = report[:, None] + len(self.places) * np.arange(self.chunks)[None, :]
        cosines = dot_rows(units[np.repeat(image, self.chunks)], self.vectors[where.ravel()])
        return aggregate_chunks(cosines.reshape(len(image), self.chunks, 1), self.aggregate)[:, 0]


class Reports:
    """Chunks by the report that they are of.

    Attributes:
        numbers: (reports,), rising: what ``report_of`` calls them.
    """

    def __init__(
        self,
        chunks: Embeddings,
        report_of: Sequence[int] | NDArray[np.int64],
        aggregate: Aggregate,
        product: Product = float32_product,
    ) -> None:
        of = np.asarray(report_of)
        if of.shape != (len(chunks),):
            raise InputError(f"report_of has {len(of)} entries for {len(chunks)} chunks")
        if of.dtype.kind not in "iu" or of.min() < 0:
            raise InputError("report_of must hold row numbers that are not negative")
        self.embeddings = chunks
        self.aggregate: Aggregate = aggregate
        self.product = product
        self.numbers, counts = np.unique(of.astype(np.int64), return_counts=True)
        self.order = np.argsort(of, kind="stable")
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.counts = counts

    def __len__(self) -> int:
        return len(self.numbers)

    def chunks_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the chunk rows (reports, chunks) of reports that have equally many."""
        count = int(self.counts.item(int(places[0])))
        rows: NDArray[np.int64] = self.order[self.starts[places][:, None] + np.arange(count)[None, :]]
        return rows

    def blocks(self, size: int) -> Iterator[ReportBlock]:
        """Yield all reports in blocks of at most ``size`` chunks, or of one report."""
        for count in np.unique(self.counts).tolist():
            places = np.flatnonzero(self.counts == count)
            step = max(1, size // count)
            for start in range(0, len(places), step):
                part = places[start : start + step]
                rows = self.chunks_of(part)
                yield ReportBlock(
                    part, unit_rows(self.embeddings, rows.T.ravel(), "report"), self.aggregate, self.product
                )

    def compare(
        self, images: Embeddings, image: NDArray[np.int64], place: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return fp64 similarities of rows of images with places of reports, and the nearest chunk; shapes broadcast."""
        image, place = np.broadcast_arrays(image, place)
        similarity, nearest = np.empty(place.shape), np.empty(place.shape, dtype=np.int64)
        of_pair = self.counts[place]
        for count in np.unique(of_pair).tolist():
            where = np.nonzero(of_pair == count)
            step = max(1, RESCORE_VALUES // (count * images.dim))
            for start in range(0, len(where[0]), step):
                part = tuple(axis[start : start + step] for axis in where)
                rows = self.chunks_of(place[part])
                cosines = dot_rows(
                    np.repeat(unit_rows(images, image[part], "image"), count, axis=0),
                    unit_rows(self.embeddings, rows.ravel(), "report"),
                ).reshape(len(rows), count)
                similarity[part] = aggregate_chunks(cosines[:, :, None], self.aggregate)[:, 0]
                nearest[part] = rows[np.arange(len(rows)), cosines.argmax(axis=1)]
        return similarity, nearest


def unit_rows(embeddings: Embeddings, rows: NDArray[np.int64] | slice, what: str) -> NDArray[np.float32]:
    """Return checked unit vectors of some rows, without the columns that stand beside them."""
    vectors = embeddings.vectors[rows]
    part = Embeddings(
        vectors, ("",) * len(vectors), embeddings.space, embeddings.modality, normalized=embeddings.normalized
    )
    return unit_vectors(part, what)


def image_blocks(images: Embeddings) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the first row and the unit vectors of blocks of images."""
    for start in range(0, len(images), _IMAGE_ROWS):
        yield start, unit_rows(images, slice(start, start + _IMAGE_ROWS), "image")


def dot_rows(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return fp64 dot products of rows; each depends on its two rows only, not on what stands beside them."""
    result: NDArray[np.float64] = np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))
    return result


def aggregate_chunks(cosines: NDArray[_Float], how: Aggregate) -> NDArray[_Float]:
    """Reduce (images, chunks, reports) over the chunks, in the precision given."""
    if cosines.shape[1] == 1:
        result: NDArray[_Float] = cosines[:, 0]
    elif how == "max":
        result = cosines.max(axis=1)
    else:
        count = cosines.shape[1]
        if how == "top_mean" and count > TOP_CHUNKS:
            cosines = np.partition(cosines, count - TOP_CHUNKS, axis=1)[:, count - TOP_CHUNKS :]
        if cosines.dtype == np.float64:  # sorted: equal sets of cosines have equal sums, whatever the order of chunks
            cosines = np.sort(cosines, axis=1)
        result = cosines.mean(axis=1, dtype=cosines.dtype)
    return result
