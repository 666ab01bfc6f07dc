"""Reports for images that came without one: the exact best k reports of every image, from similarity alone.

Comes in: embeddings of images, embeddings of chunks of reports, and which report each chunk is of. Goes out: a frozen
:class:`Pairing`. No signature here takes a label, and no label that an `Embeddings` carries is read.

The similarity of an image and a report is made of the fp64 cosines of the image with the report's chunks. A fp32 product
of blocks proposes candidates and these are scored again in fp64 (:mod:`chiasm.tasks.top_rows`), so the answer is that of
a double loop over images and reports, equal scores in the order of the reports' rows, whatever the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.tasks.report_blocks import (
    Aggregate,
    Product,
    ReportBlock,
    Reports,
    aggregate_chunks,
    float32_product,
    image_blocks,
    unit_rows,
)
from chiasm.tasks.top_rows import TopRows
from chiasm.tasks.zero_shot import FALLBACK_LOGIT_SCALE
from chiasm.types import Embeddings, check_same_space

Correction = Literal["none", "csls", "inverted_softmax"]

#: Rows of chunks that are compared at once.
BLOCK_ROWS = 16_384
#: Nearest images of a report that CSLS looks at.
NEIGHBOURS = 10
#: ``auto``: a pair must beat this share of the best similarities of images without content.
AUTO_QUANTILE = 0.5
#: ``auto``: images whose coordinates are drawn from; fewer than the least say nothing about a quantile.
AUTO_IMAGES = 2_048
AUTO_LEAST_IMAGES = 40


@dataclass(frozen=True)
class Pairing:
    """The reports of every image, best first.

    Attributes:
        image_ids: One per image.
        report_rows: int64, (n, k): as numbered by ``report_of``; -1 where no report is left above ``min_similarity``.
        chunk_rows: int64, (n, k): the chunk of the report that is nearest to the image; -1 where there is no report.
        similarity: float32, (n, k): aggregated cosine, uncorrected; NaN where there is no report.
        margin: float32, (n,): score of the best report less that of the second, before ``min_similarity``; with a
            correction, of corrected scores. NaN when there is one report only.
        best_similarity: float32, (n,): similarity of the report that is best before ``min_similarity``.
        min_similarity: What a pair had to reach, with ``auto`` resolved; None: nothing.
    """

    image_ids: tuple[str, ...]
    report_rows: NDArray[np.int64]
    chunk_rows: NDArray[np.int64]
    similarity: NDArray[np.float32]
    margin: NDArray[np.float32]
    best_similarity: NDArray[np.float32]
    min_similarity: float | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def paired(self) -> NDArray[np.bool_]:
        """Which images have a report."""
        found: NDArray[np.bool_] = self.report_rows[:, 0] >= 0
        return found


def pair(
    images: Embeddings,
    chunks: Embeddings,
    *,
    report_of: Sequence[int] | NDArray[np.int64],
    k: int = 1,
    aggregate: Aggregate = "max",
    min_similarity: float | Literal["auto"] | None = None,
    correction: Correction = "none",
    block: int = BLOCK_ROWS,
    product: Product = float32_product,
) -> Pairing:
    """Return the k best reports of every image, exactly.

    Args:
        images: Any number of rows, raw or normalised; may be memory-mapped.
        chunks: At least one, of the same space.
        report_of: Number of the report that each chunk is of (not negative); any order, gaps allowed. Equal scores go
            to the lowest number.
        k: Reports an image; rows are filled with -1 when there are fewer.
        aggregate: Similarity of a report from those of its chunks: ``max`` the best chunk (a report says something that
            the image shows), ``mean`` all chunks, ``top_mean`` the best three.
        min_similarity: What the uncorrected similarity of a pair must reach. ``auto``: the median
            of :func:`null_similarity`.
        correction: Against hubs, reports that are near to everything. ``csls``: less half the mean similarity of the
            report with its ten nearest images. ``inverted_softmax``: less log-mean-exp of its similarities with all
            images at the logit scale. It changes the choice and the margin, never the similarity that is returned.
        block: Rows of chunks compared at once. Memory is a few times ``block`` × (512 + dimensions) floats, and 16
            bytes an image and report asked for.
        product: Proposes candidates; a faster one may be rougher as long as it knows its error. The result is the same.

    Raises:
        SpaceMismatch: Images and chunks come from two spaces.
        InputError: A side is empty, a vector is zero or not finite, or an argument is out of its range.

    References:
        Conneau et al., 2018, Word translation without parallel data, https://arxiv.org/abs/1710.04087 (CSLS); Smith et
        al., 2017, Offline bilingual word vectors, https://arxiv.org/abs/1702.03859 (inverted softmax).
        Deviations: both corrections are written as a term that is taken off a cosine, which leaves every ranking as it
        is; CSLS's other term does not depend on the report and is left out.
    """
    _check(images, chunks, aggregate=aggregate, correction=correction, k=k, block=block)
    reports = Reports(chunks, report_of, aggregate, product)
    offset = np.zeros(len(reports))
    if correction == "csls":
        offset = _csls_offset(images, reports, block)
    elif correction == "inverted_softmax":
        offset = _softmax_offset(images, reports)
    least = _threshold(images, reports, min_similarity, block)
    wide = min(max(k, 2), len(reports))
    place, score = _best(images, reports, wide, offset, block)
    margin = np.full(len(images), np.nan, dtype=np.float32)
    if wide > 1:
        margin = (score[:, 0] - score[:, 1]).astype(np.float32)
    place = place[:, : min(k, wide)]
    similarity, nearest = reports.compare(images, np.arange(len(images))[:, None], place)
    best = similarity[:, 0].astype(np.float32)
    rows = np.full((len(images), k), -1, dtype=np.int64)
    chunk_rows, kept_similarity = rows.copy(), np.full((len(images), k), np.nan, dtype=np.float32)
    keep = np.ones(place.shape, dtype=bool) if least is None else similarity.astype(np.float32) >= np.float32(least)
    order = np.argsort(~keep, axis=1, kind="stable")  # a correction can rank a pair below the threshold first
    image, column = np.nonzero(np.take_along_axis(keep, order, axis=1))
    source = order[image, column]
    rows[image, column] = reports.numbers[place[image, source]]
    chunk_rows[image, column] = nearest[image, source]
    kept_similarity[image, column] = similarity[image, source]
    return Pairing(images.ids, rows, chunk_rows, kept_similarity, margin, best, least)


def similarity_of(
    images: Embeddings,
    chunks: Embeddings,
    report_rows: NDArray[np.int64],
    *,
    report_of: Sequence[int] | NDArray[np.int64],
    aggregate: Aggregate = "max",
) -> NDArray[np.float32]:
    """Return the similarity of each image with a report given to it, as :func:`pair` computes it.

    Args:
        images: n rows.
        chunks: Of the same space.
        report_rows: (n,): a report an image, -1 for none.
        report_of: As for :func:`pair`.
        aggregate: As for :func:`pair`.

    Returns:
        (n,), NaN where the image has no report.

    Raises:
        InputError: A report has no chunk, or lengths differ.
    """
    _check(images, chunks, aggregate=aggregate)
    reports = Reports(chunks, report_of, aggregate)
    if len(report_rows) != len(images):
        raise InputError(f"{len(report_rows)} reports were given to {len(images)} images")
    result = np.full(len(images), np.nan, dtype=np.float32)
    given = np.flatnonzero(np.asarray(report_rows) >= 0)
    place = np.searchsorted(reports.numbers, report_rows[given])
    if (place == len(reports)).any() or (reports.numbers[place] != report_rows[given]).any():
        raise InputError("an image was given a report that has no chunk")
    result[given] = reports.compare(images, given[:, None], place[:, None])[0][:, 0]
    return result


def shuffled_reports(pairing: Pairing, *, seed: int = 0) -> NDArray[np.int64]:
    """Return the best reports dealt out anew to the paired images at random: every report keeps its number of images.

    Returns:
        (n,) rows of reports, -1 for images without a report.
    """
    rows = pairing.report_rows[:, 0].copy()
    paired = np.flatnonzero(rows >= 0)
    rows[paired] = np.random.default_rng(seed).permutation(rows[paired])
    return rows


def null_similarity(
    images: Embeddings,
    chunks: Embeddings,
    *,
    report_of: Sequence[int] | NDArray[np.int64],
    aggregate: Aggregate = "max",
    seed: int = 0,
    block: int = BLOCK_ROWS,
) -> NDArray[np.float32]:
    """Return the best similarities of images that show nothing in particular with this very corpus.

    Vectors of up to 2,048 images are taken apart into their principal components, every coordinate gets a random sign,
    and the parts are put together again: mean and covariance of the images stay (so does the distance between images
    and texts as such), what an image shows is gone. Their best similarities say what the best of so many reports
    reaches by chance. ``min_similarity="auto"`` is their median, rounded to four digits: an image whose nearest report
    is no nearer than that of a middling image without content stays without a report. Half of such images would still
    get one; a higher quantile costs most pairs where a corpus is small beside what images can show, and a high
    similarity does not make a pair right. No label is used.

    Returns:
        float32, one per drawn image.

    Raises:
        InputError: Fewer than 40 images.
    """
    _check(images, chunks, aggregate=aggregate, block=block)
    return _null(images, Reports(chunks, report_of, aggregate), seed, block)


def _check(
    images: Embeddings,
    chunks: Embeddings,
    *,
    aggregate: str,
    correction: str = "none",
    k: int = 1,
    block: int = 1,
) -> None:
    check_same_space(images, chunks)
    if images.modality != "image" or chunks.modality != "text":
        raise InputError(f"expected images and texts, got {images.modality} and {chunks.modality} embeddings")
    if len(images) == 0 or len(chunks) == 0:
        raise InputError(f"there is nothing to pair: {len(images)} images, {len(chunks)} chunks of reports")
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if block < 1:
        raise InputError(f"block must be at least 1, got {block}")
    if aggregate not in get_args(Aggregate):
        raise UnknownName("way to aggregate", aggregate, get_args(Aggregate))
    if correction not in get_args(Correction):
        raise UnknownName("correction", correction, get_args(Correction))


def _best(
    images: Embeddings, reports: Reports, k: int, offset: NDArray[np.float64], block: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the places of the k best reports of every image and their scores, best first."""
    found: list[TopRows] = []
    offset_error = 1.2 * 2.0**-23 * float(np.abs(offset).max())
    for part in reports.blocks(block):
        off = offset[part.places]
        shift = off.astype(np.float32) if off.any() else None
        for number, (_, units) in enumerate(image_blocks(images)):
            if number == len(found):
                found.append(TopRows(len(units), k))
            top = found[number]
            rough, error = part.rough(units)
            if shift is not None:
                rough -= shift

            def exact(
                image: NDArray[np.int64],
                report: NDArray[np.int64],
                units: NDArray[np.float32] = units,
                part: ReportBlock = part,
                off: NDArray[np.float64] = off,
            ) -> NDArray[np.float64]:
                return part.exact(units, image, report) - off[report]

            top.add(rough, part.places, exact, error=error + offset_error, width=part.width)
    return np.concatenate([t.rows for t in found]), np.concatenate([t.scores for t in found])


def _csls_offset(images: Embeddings, reports: Reports, block: int) -> NDArray[np.float64]:
    """Return half the mean similarity of each report with its nearest images, from exact similarities."""
    offset = np.empty(len(reports))
    for part in reports.blocks(block):
        top = TopRows(len(part.places), min(NEIGHBOURS, len(images)))
        for start, units in image_blocks(images):

            def exact(
                report: NDArray[np.int64],
                image: NDArray[np.int64],
                units: NDArray[np.float32] = units,
                part: ReportBlock = part,
            ) -> NDArray[np.float64]:
                return part.exact(units, image, report)

            rows = np.arange(start, start + len(units), dtype=np.int64)
            rough, error = part.rough(units)
            top.add(np.ascontiguousarray(rough.T), rows, exact, error=error, width=part.width)
        offset[part.places] = top.scores.mean(axis=1) / 2
    return offset


def _softmax_offset(images: Embeddings, reports: Reports) -> NDArray[np.float64]:
    """Return log-mean-exp of each report's similarities with all images at the logit scale, in units of a cosine.

    Computed in fp64 in blocks of a fixed size, so that it does not depend on the caller's; equal reports get the value
    of the first of them to the last bit, or their ties would break at random.
    """
    scale = next(
        (s for s in (images.logit_scale, reports.embeddings.logit_scale) if s is not None), FALLBACK_LOGIT_SCALE
    )
    offset = np.empty(len(reports))
    first: dict[bytes, int] = {}
    for part in reports.blocks(1_024):
        peak = np.full(len(part.places), -np.inf)
        total = np.zeros(len(part.places))
        vectors = part.vectors.astype(np.float64)
        for _, units in image_blocks(images):
            cosines = (units.astype(np.float64) @ vectors.T).reshape(len(units), part.chunks, len(part.places))
            logits = scale * aggregate_chunks(cosines, reports.aggregate)
            higher = np.maximum(peak, logits.max(axis=0))
            total = total * np.exp(peak - higher) + np.exp(logits - higher).sum(axis=0)
            peak = higher
        offset[part.places] = (peak + np.log(total / len(images))) / scale
        shaped = part.vectors.reshape(part.chunks, len(part.places), -1)
        for column, place in enumerate(part.places.tolist()):
            offset[place] = offset[first.setdefault(shaped[:, column].tobytes(), place)]
    return offset


def _threshold(images: Embeddings, reports: Reports, least: float | Literal["auto"] | None, block: int) -> float | None:
    if least is None:
        return None
    if least == "auto":
        return round(float(np.quantile(_null(images, reports, 0, block), AUTO_QUANTILE)), 4)
    if not -1 <= least <= 1:
        raise InputError(f"min_similarity must lie between -1 and 1, got {least}", hint="give a cosine, or `auto`")
    return float(least)


def _null(images: Embeddings, reports: Reports, seed: int, block: int) -> NDArray[np.float32]:
    if len(images) < AUTO_LEAST_IMAGES:
        raise InputError(
            f"{len(images)} images are too few to derive a least similarity from; {AUTO_LEAST_IMAGES} are needed",
            hint="give a number, or none",
        )
    random = np.random.default_rng(seed)
    rows = np.sort(random.permutation(len(images))[:AUTO_IMAGES])
    units = unit_rows(images, rows, "image").astype(np.float64)
    mean = units.mean(axis=0)
    centred = units - mean
    _, directions = np.linalg.eigh(centred.T @ centred)
    signs = random.integers(0, 2, size=units.shape) * 2 - 1
    made = mean + ((centred @ directions) * signs) @ directions.T
    null = Embeddings(
        made.astype(np.float32), tuple(map(str, range(len(made)))), images.space, "image", normalized=False
    )
    best = _best(null, reports, 1, np.zeros(len(reports)), block)[1][:, 0]
    return best.astype(np.float32)
