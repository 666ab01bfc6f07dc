"""Samples to batches: an order that depends on (seed, epoch) only, decoding in threads, memory that stays bounded.

Comes in: a sequence of samples and a function that makes one item of a row. Goes out: batches in order. Threads
suffice because Pillow releases the interpreter lock while it decodes and resizes; nothing has to be pickled, and
Ctrl-C ends at once.

:class:`Batches` gathers items of any kind for training. :class:`PixelBatches` is for one pass over images: threads
write pixels where the encoder reads them, in a few batches that are allocated once and used again and again.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import ChiasmError, FileFormatError, InputError
from chiasm.io.manifest import RejectLog

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
OnBad = Literal["skip", "fail"]
_BAD_ROW = (InputError, FileFormatError, OSError, MemoryError)
#: Batches of pixels that are decoded while the consumer works on one.
AHEAD = 2
_CGROUPS = Path("/sys/fs/cgroup")


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
        on_bad: OnBad = "skip",
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
        return _settle(self.samples, row, call, self.on_bad, self.rejects)


class PixelBatch(NamedTuple):
    """One batch of pixels.

    Attributes:
        rows: Rows of the samples, in the order of ``pixels``; rejected rows are absent.
        pixels: float32 (rows, 3, size, size): a view of a slot of the ring. It holds these rows only until the next
            batch is asked for, or the ``held``-th one after it; copy what is to be kept.
    """

    rows: tuple[int, ...]
    pixels: torch.Tensor


class PixelBatches:
    """Iterate over batches of pixels that threads write into a ring of ``ahead + held`` batches allocated beforehand.

    Image i of a batch is written at place i of a free slot. The slot of a batch that was handed out is free again only when
    the consumer asks for the batch after it (the ``held``-th that it gets after it), so no pixel changes while it is read, a slow consumer holds the
    decoders back, and memory is that of the ring (each slot ``4 * 3 * size² * longest batch`` bytes) plus one decoded
    image a thread, however many samples there are. The threads end with the iteration: at its end, on an error, on
    Ctrl-C, and when the iterator is dropped.

    Args:
        samples: Only the ids and the names of files (for the reject log) are used here.
        batches: Rows of each batch, in the order of the batches.
        fill: ``fill(row, out)`` writes the pixels of one row into ``out``, float32 of ``shape``, all of it; called from
            several threads at a time.
        shape: Of one image: (3, height, width).
        workers: Threads; 0 decodes in the calling thread; None: as many as :func:`available_cpus`.
        ahead: Batches that are decoded while the consumer works.
        held: Batches that the consumer works on at a time.
        pinned: Allocate the ring in page-locked memory, from which copies to a GPU run beside other work.
        on_bad: As in :class:`Batches`: a bad row is noted and the batch is smaller, or ``InputError`` is raised.
        rejects: Where bad rows are noted.

    Raises:
        InputError: Negative numbers; a bad row where ``on_bad`` is ``fail``.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        batches: Sequence[Sequence[int]],
        *,
        fill: Callable[[int, NDArray[np.float32]], None],
        shape: tuple[int, int, int],
        workers: int | None = None,
        ahead: int = AHEAD,
        held: int = 1,
        pinned: bool = False,
        on_bad: OnBad = "skip",
        rejects: RejectLog | None = None,
    ) -> None:
        workers = available_cpus() if workers is None else workers
        if workers < 0 or ahead < 0 or held < 1:
            raise InputError(
                f"workers and ahead must not be negative and held at least 1, got {workers}, {ahead} and {held}"
            )
        self.samples = samples
        self.batches = [list(rows) for rows in batches if len(rows)]
        self.fill = fill
        self.shape = shape
        self.workers = workers
        self.ahead = ahead
        self.held = held
        self.pinned = pinned
        self.on_bad: OnBad = on_bad
        self.rejects = RejectLog() if rejects is None else rejects

    def __iter__(self) -> Iterator[PixelBatch]:
        if not self.batches:
            return
        ahead = self.ahead if self.workers else 0
        slots = self._allocate(min(ahead + self.held, len(self.batches)))
        free, lent = deque(slots), deque[Any]()

        def lend(rows: list[int], slot: torch.Tensor, calls: Sequence[Callable[[], None]]) -> Iterator[PixelBatch]:
            batch = self._gather(rows, slot, calls)
            if batch is None:
                free.append(slot)
                return
            lent.append(slot)
            yield batch
            if len(lent) == self.held:  # the consumer asks for more, so it has at most ``held - 1`` batches left
                free.append(lent.popleft())

        if self.workers == 0:
            for rows in self.batches:
                chosen = free.popleft()
                slot = chosen.numpy()
                yield from lend(rows, chosen, [partial(self.fill, row, slot[i]) for i, row in enumerate(rows)])
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="chiasm-loader")
        pending: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()
        upcoming = iter(self.batches)

        def refill() -> None:
            # At most ``held - 1`` slots are lent by now, so one is free for each of the others.
            while len(pending) <= ahead and (rows := next(upcoming, None)) is not None:
                chosen = free.popleft()
                slot = chosen.numpy()
                pending.append((chosen, [pool.submit(self.fill, row, slot[i]) for i, row in enumerate(rows)]))

        try:
            for rows in self.batches:
                refill()
                chosen, futures = pending.popleft()
                yield from lend(rows, chosen, [future.result for future in futures])
        finally:
            # Reached at the end, on an error, on Ctrl-C and when the consumer drops the iterator.
            pool.shutdown(wait=True, cancel_futures=True)

    def _allocate(self, n: int) -> list[torch.Tensor]:
        import torch

        longest = max(len(rows) for rows in self.batches)
        # One by one: torch aligns each, and the bits of a matrix product may depend on how its input is aligned.
        return [torch.empty(longest, *self.shape, dtype=torch.float32, pin_memory=self.pinned) for _ in range(n)]

    def _gather(self, rows: list[int], slot: torch.Tensor, calls: Sequence[Callable[[], None]]) -> PixelBatch | None:
        """Wait for every row of a batch and close the gaps that bad rows leave; None when nothing is left."""
        kept: list[int] = []
        for place, (row, call) in enumerate(zip(rows, calls, strict=True)):
            if _settle(self.samples, row, call, self.on_bad, self.rejects):
                kept.append(place)
        for to, place in enumerate(kept):
            if to != place:
                slot[to] = slot[place]
        return PixelBatch(tuple(rows[place] for place in kept), slot[: len(kept)]) if kept else None


def available_cpus() -> int:
    """Return how many CPUs this process may keep busy: those of its affinity, or less where a cgroup grants less.

    References:
        Linux, Documentation/admin-guide/cgroup-v2.rst, ``cpu.max`` (quota and period in µs), and for version 1
        Documentation/scheduler/sched-bwc.rst.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (_CGROUPS / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((_CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except (OSError, ValueError):
            return cpus
    try:
        granted = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return cpus
    return max(1, min(cpus, math.ceil(granted))) if granted > 0 else cpus


def _settle(samples: Sequence[Any], row: int, call: Callable[[], T], on_bad: OnBad, rejects: RejectLog) -> list[T]:
    """Return what was loaded as a list of one, or an empty list when the row is bad and may be skipped."""
    try:
        return [call()]
    except _BAD_ROW as error:
        sample = samples[row]
        reason = _reason(error, getattr(getattr(sample, "image", None), "name", ""))
        if on_bad == "fail":
            hint = "repair or remove the row, or choose to skip bad rows"
            raise InputError(f"row {row} of the data cannot be loaded: {reason}", hint=hint) from error
        rejects.add(row, str(getattr(sample, "id", row)), reason)
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
