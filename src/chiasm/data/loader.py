"""Samples to batches: an order that depends on (seed, epoch) only, decoding in threads, memory that stays bounded.

Comes in: a sequence of samples and a function that makes one item of a row. Goes out: batches in order. Threads
suffice because Pillow releases the interpreter lock while it decodes and resizes; nothing has to be pickled, and
Ctrl-C ends at once.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from chiasm.errors import ChiasmError, FileFormatError, InputError
from chiasm.io.manifest import RejectLog

T = TypeVar("T")
_BAD_ROW = (InputError, FileFormatError, OSError, MemoryError)


class Batch(NamedTuple, Generic[T]):
    """One batch.

    Attributes:
        number: Its place in the epoch; pass ``start=number + 1`` to go on after it.
        rows: Rows of the samples, in the order of ``items``; rejected rows are absent.
        items: What ``load`` returned for each row.
    """

    number: int
    rows: tuple[int, ...]
    items: list[T]


class Batches(Generic[T]):
    """Iterate over batches of loaded items; each iteration starts afresh from ``start``.

    The order of rows and the generator of every row depend on ``seed``, ``epoch`` and the row alone, not on the
    number of workers nor on where the iteration starts, so a run that is resumed at batch k sees what the
    uninterrupted run saw. At most ``workers + 2 * batch_size`` items are loaded ahead of the consumer.

    Args:
        samples: Only its length and the ids (for the reject log) are used here.
        rows: Visit only these, in this order unless shuffled; None: all.
        batch_size: Rows a batch; the last one may be smaller.
        load: ``load(row, generator)`` makes one item; called from several threads at a time.
        seed: Of the shuffling and of the generators.
        epoch: Changes both.
        shuffle: Whether rows are permuted.
        workers: Threads; 0 loads in the calling thread.
        drop_last: Leave out a last batch with fewer than ``batch_size`` rows.
        start: Number of the first batch to yield.
        on_bad: ``skip`` notes a row that cannot be loaded in ``rejects`` and goes on with a smaller batch (a batch
            without any row is left out); ``fail`` raises.
        rejects: Where bad rows are noted.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        *,
        batch_size: int,
        rows: Sequence[int] | None = None,
        load: Callable[[int, np.random.Generator], T],
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        workers: int = 2,
        drop_last: bool = False,
        start: int = 0,
        on_bad: Literal["skip", "fail"] = "skip",
        rejects: RejectLog | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if workers < 0 or start < 0 or seed < 0 or epoch < 0:
            raise InputError("workers, start, seed and epoch must not be negative")
        self.samples = samples
        self.rows = np.asarray(range(len(samples)) if rows is None else rows, dtype=np.int64)
        self.batch_size = batch_size
        self.load = load
        self.seed = seed
        self.epoch = epoch
        self.shuffle = shuffle
        self.workers = workers
        self.drop_last = drop_last
        self.start = start
        self.on_bad = on_bad
        self.rejects = RejectLog() if rejects is None else rejects

    def __len__(self) -> int:
        """Return the number of batches of the whole epoch, whatever ``start`` is."""
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the rows of this epoch in the order in which they are visited."""
        if not self.shuffle:
            return self.rows
        return np.random.default_rng([self.seed, self.epoch, 0]).permutation(self.rows)

    def generator(self, row: int) -> np.random.Generator:
        """Return the random generator that ``load`` gets for this row in this epoch."""
        return np.random.default_rng([self.seed, self.epoch, 1, row])

    def _load(self, row: int) -> T:
        return self.load(row, self.generator(row))

    def __iter__(self) -> Iterator[Batch[T]]:
        order = self.order()
        batches = [
            (k, order[k * self.batch_size : (k + 1) * self.batch_size].tolist()) for k in range(self.start, len(self))
        ]
        if self.workers == 0:
            for number, rows in batches:
                kept = [(row, item) for row in rows for item in self._settle(row, partial(self._load, row))]
                if kept:
                    yield Batch(number, tuple(r for r, _ in kept), [i for _, i in kept])
            return
        yield from self._iterate_threads(batches)

    def _iterate_threads(self, batches: list[tuple[int, list[int]]]) -> Iterator[Batch[T]]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="chiasm-loader")
        pending: deque[Future[T]] = deque()
        upcoming = (row for _, rows in batches for row in rows)
        ahead = self.workers + 2 * self.batch_size

        def refill() -> None:
            while len(pending) < ahead:
                row = next(upcoming, None)
                if row is None:
                    return
                pending.append(pool.submit(self._load, row))

        try:
            for number, rows in batches:
                kept: list[tuple[int, T]] = []
                for row in rows:
                    refill()
                    kept.extend((row, item) for item in self._settle(row, pending.popleft().result))
                if kept:
                    yield Batch(number, tuple(r for r, _ in kept), [i for _, i in kept])
        finally:
            # Reached at the end, on an error, on Ctrl-C and when the consumer drops the iterator.
            pool.shutdown(wait=True, cancel_futures=True)

    def _settle(self, row: int, call: Callable[[], T]) -> list[T]:
        """Return the loaded item, or nothing when the row is bad and may be skipped."""
        try:
            return [call()]
        except _BAD_ROW as error:
            sample = self.samples[row]
            reason = _reason(error, getattr(getattr(sample, "image", None), "name", ""))
            if self.on_bad == "fail":
                hint = "repair or remove the row, or choose to skip bad rows"
                raise InputError(f"row {row} of the data cannot be loaded: {reason}", hint=hint) from error
            self.rejects.add(row, str(getattr(sample, "id", row)), reason)
            return []


def _reason(error: BaseException, file_name: str) -> str:
    """Say what was wrong with a row, without naming its file, so that equal reasons can be counted."""
    if isinstance(error, ChiasmError):
        if not file_name:
            return error.message
        return error.message.replace(f"image `{file_name}`", "image file").replace(f"`{file_name}`", "image file")
    if isinstance(error, OSError) and error.errno is not None:
        return f"file cannot be read: {os.strerror(error.errno)}"
    return f"cannot be loaded: {type(error).__name__}"
