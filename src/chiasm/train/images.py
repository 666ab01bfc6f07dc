"""The images of a table as the loop wants them: bytes in memory where they fit, files otherwise.

Comes in: a :class:`PairTable`. Goes out: something that makes pixels of rows, and the rows that can be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from chiasm.data.augment import Augment, augmentation
from chiasm.data.loader import available_cpus
from chiasm.data.transforms import fit_image, image_transform
from chiasm.datasets.images import plain_reason
from chiasm.errors import ChiasmError, InputError
from chiasm.io.manifest import RejectLog, write_json_atomic
from chiasm.progress import Progress, SilentProgress
from chiasm.train.augmentation import BatchTransform
from chiasm.train.distributed import current_group
from chiasm.train.pairs import PairTable, file_facts
from chiasm.train.sources import ArrayImages, FileImages, ImageBatch
from chiasm.types import Preprocess, digest_of

T = TypeVar("T")
CHUNK = 256  # rows decoded ahead
MOST_DECODERS = 8
MEMORY_BYTES = 2 * 1024**3


class Reading(Protocol):
    """What decides how images are kept and what an unreadable one means; ``DataConfig`` has both."""

    @property
    def in_memory(self) -> Literal["auto", "always", "never"]:
        """Whether decoded images are kept as bytes; ``auto``: when they take < 2 GB."""

    @property
    def on_bad_row(self) -> Literal["skip", "fail"]:
        """What an image means that cannot be read."""


def images_of(
    table: PairTable,
    preprocess: Preprocess,
    *,
    data: Reading,
    augment: Augment | None,
    rejects: RejectLog,
    progress: Progress | None = None,
    workers: int | None = None,
) -> tuple[ImageBatch, PairTable]:
    """Return what makes pixels of rows, from memory if the recipe allows and they fit, and the rows that can be read.

    Args:
        table: The rows.
        preprocess: Of the encoder.
        data: ``in_memory`` and ``on_bad_row`` count.
        augment: None: never augment.
        rejects: Where unreadable images are noted; those of files that are read later, when they are met.
        progress: Told after every image that is decoded into memory.
        workers: Threads that decode; the pixels do not depend on how many. None: as many as :func:`decoders` says.

    Raises:
        InputError: No image can be read, or one cannot and ``data.on_bad_row`` is ``fail``.
    """
    size, wanted = preprocess.picture_size, data.in_memory
    fitted = table.arrays is not None and table.arrays.shape[1:3] == (size, size) and _leaves_fitted(preprocess)
    if table.arrays is not None and fitted and wanted != "never":
        return ArrayImages(table.arrays, BatchTransform(preprocess, augment)), table
    fits = len(table) * size * size * 3 <= MEMORY_BYTES
    if wanted == "always" or (wanted == "auto" and fits):
        made: list[NDArray[np.uint8]] = []

        def decode(row: int) -> NDArray[np.uint8]:
            return np.asarray(fit_image(table.open(row), preprocess))

        fail = data.on_bad_row == "fail"
        usable = _each(table, decode, made.append, rejects, fail=fail, progress=progress, workers=workers)
        return ArrayImages(_stacked(made), BatchTransform(preprocess, augment)), usable
    # Processes that share a batch must all hold equally many rows of it.
    strict = data.on_bad_row == "fail" or current_group().world > 1
    return file_images(table, preprocess, augment=augment, rejects=None if strict else rejects, workers=workers), table


def _leaves_fitted(p: Preprocess) -> bool:
    """Whether a picture that has the right size already is what the model sees."""
    changes = p.cut_bottom or p.grey or p.stretch is not None
    return not changes and p.resized_side == p.picture_size


def file_images(
    table: PairTable,
    preprocess: Preprocess,
    *,
    augment: Augment | None,
    rejects: RejectLog | None = None,
    workers: int | None = None,
) -> FileImages:
    """Return what decodes rows when they are asked for, augmenting each image at its full resolution."""
    augmented = None if augment is None else augmentation(augment, preprocess)
    return FileImages(
        table.open,
        image_transform(preprocess),
        augmented=augmented,
        rejects=rejects,
        samples=table.samples,
        workers=decoders() if workers is None else workers,
    )


def decoders() -> int:
    """Return how many threads decode: one a processor, at least two and at most eight."""
    return min(max(2, available_cpus()), MOST_DECODERS)


def readable(
    table: PairTable,
    *,
    rejects: RejectLog,
    fail: bool,
    cache: Path,
    progress: Progress | None = None,
    workers: int | None = None,
) -> PairTable:
    """Return the rows whose images decode; the outcome is remembered in ``cache`` while no file changes.

    Raises:
        InputError: No image can be read, or one cannot and ``fail`` is set.
    """
    note = cache / f"readable-{digest_of(file_facts(table.samples), 24)}.json"
    if note.exists():
        bad = {int(row): str(reason) for row, reason in json.loads(note.read_text()).items()}
        for row, reason in bad.items():
            rejects.add(row, table.samples[row].id, reason)
        return table.select([r for r in range(len(table)) if r not in bad])
    mine = RejectLog()
    usable = _each(table, table.open, lambda image: None, mine, fail=fail, progress=progress, workers=workers)
    for rejected in mine:
        rejects.add(rejected.row, rejected.id, rejected.reason)
    write_json_atomic(note, {str(r.row): r.reason for r in mine})
    return usable


def _each(
    table: PairTable,
    make: Callable[[int], T],
    take: Callable[[T], object],
    rejects: RejectLog,
    *,
    fail: bool,
    progress: Progress | None,
    workers: int | None,
) -> PairTable:
    """Make something of every row in threads, hand it over in order, and return the rows for which it worked."""

    def attempt(row: int) -> T | ChiasmError:
        try:
            return make(row)
        except ChiasmError as error:
            return error

    progress = progress or SilentProgress()
    progress.start(len(table), "images")
    rows: list[int] = []
    pool = ThreadPoolExecutor(decoders() if workers is None else max(1, workers), thread_name_prefix="chiasm-decode")
    try:
        for start in range(0, len(table), CHUNK):
            part = range(start, min(start + CHUNK, len(table)))
            for row, made in zip(part, pool.map(attempt, part), strict=True):
                progress.advance(1)
                if isinstance(made, ChiasmError):
                    if fail:
                        raise made
                    rejects.add(row, table.samples[row].id, plain_reason(made, table.samples[row]))
                    continue
                rows.append(row)
                take(made)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        progress.finish()
    if not rows:
        raise InputError("no image can be read", hint="look at `rejected.jsonl`")
    return table if len(rows) == len(table) else table.select(rows)


def _stacked(arrays: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return images as (n, size, size) when all are grey, else as (n, size, size, 3)."""
    if all(a.ndim == 2 for a in arrays):
        return np.stack(arrays)
    return np.stack([a if a.ndim == 3 else np.repeat(a[:, :, None], 3, axis=2) for a in arrays])


def array_digest(arrays: NDArray[np.uint8]) -> str:
    """Return a digest of images in memory."""
    contiguous: Any = np.ascontiguousarray(arrays)
    return hashlib.sha256(contiguous).hexdigest()[:24]
