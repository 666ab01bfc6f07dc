"""The three parts of embedding that run side by side: decode or tokenise, encode, write.

Comes in: samples, an encoder, the rows that are wanted. Goes out: vectors of rows, and chunks that are committed.
Images are decoded by the threads of :class:`PixelBatches`, texts are tokenised one window ahead, and
:class:`ChunkWriter` commits in a thread of its own. Every queue between them is bounded.

The CPU's threads: torch's threads (``torch.get_num_threads()``, set by ``OMP_NUM_THREADS``) do not share a batch. Each
takes batches of its own, up to :data:`ENCODERS` batches at a time (more threads share them evenly), so none of them
waits for another at the end of every operation. That matters because the decoding threads, as many as there are CPUs,
want the same CPUs: threads that wait for each other spin meanwhile, which doubled CPU time and wall time alike on two
CPUs, where threads that wait for nobody leave the CPUs to whoever has work. A single batch is shared by all threads.

Batches are cut by the position of a sample in the data set, not by what is left to do, so a run that is resumed forms
the batches of the uninterrupted one, and its vectors have the same bits.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from chiasm.data.loader import OnBad, PixelBatches, available_cpus
from chiasm.datasets.images import open_sample_image
from chiasm.errors import ConfigError, InputError
from chiasm.io.manifest import RejectLog
from chiasm.types import Sample

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from chiasm.data.tokens import Tokens
    from chiasm.encoders.base import Encoder

T = TypeVar("T")
#: A batch of texts holds up to this many tokens, and up to this many texts, for each image that a batch would hold.
TOKENS_PER_IMAGE = 128
TEXTS_PER_IMAGE = 4
#: Batches that are encoded at a time on a CPU, at most; each holds its own activations.
ENCODERS = 8
#: Batches of vectors that may wait for the writer.
WAITING = 8


class Vectors(NamedTuple):
    """Vectors of some rows of a list of samples: (rows, dim), float32."""

    rows: list[int]
    vectors: NDArray[np.float32]


class ImageStream:
    """Yields the vectors of the wanted rows, batch by batch; batches are cut by position.

    Args:
        encoder: Gives preprocessing and vectors.
        samples: The whole data set.
        batch_size: Images a forward pass.
        workers: Threads that decode; 0 decodes in the caller's; None: :func:`decoding_threads`.
        on_bad: ``skip`` or ``fail``.
        rejects: Where images that cannot be decoded are noted.
        pictures: Images by row that need not be opened.
    """

    truncated = 0

    def __init__(
        self,
        encoder: Encoder,
        samples: Sequence[Sample],
        batch_size: int,
        workers: int | None,
        on_bad: OnBad,
        rejects: RejectLog,
        pictures: Mapping[int, Image] | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.encoder = encoder
        self.samples = samples
        self.batch_size = batch_size
        self.workers = decoding_threads() if workers is None else workers
        self.on_bad: OnBad = on_bad
        self.rejects = rejects
        self.pictures = pictures or {}
        self.preprocess: Any = encoder.preprocess

    def run(self, wanted: Sequence[int]) -> Generator[Vectors]:
        """Yield vectors; a batch in which nothing is wanted is not touched.

        Raises:
            PrecisionRefused: int8 is too far from float32 on the first 64 images, before any vector is yielded.
        """
        with self.encoder.one_run(), closing(self._run(wanted)) as found:
            yield from _once_checked(self.encoder, found)

    def _run(self, wanted: Sequence[int]) -> Generator[Vectors]:
        cuts: dict[int, list[int]] = {}
        for row in wanted:
            cuts.setdefault(row // self.batch_size, []).append(row)
        if cuts:
            self.encoder.prepare()
        device = self.encoder.device
        size = self.encoder.preprocess_spec.size
        # By the length of the data set, not of what is wanted, which changes with every interruption.
        held = encoders_for(math.ceil(len(self.samples) / self.batch_size), device)
        batches = PixelBatches(
            self.samples, [rows for _, rows in sorted(cuts.items())], fill=self._fill, shape=(3, size, size),
            workers=self.workers, held=held, pinned=device.type == "cuda", on_bad=self.on_bad, rejects=self.rejects,
        )  # fmt: skip
        if device.type == "cuda":
            yield from _encode_on_gpu(self.encoder, batches, device)
            return
        running: deque[tuple[tuple[int, ...], Future[NDArray[np.float32]]]] = deque()
        with encoder_pool(held) as submit:
            for batch in batches:
                running.append((batch.rows, submit(partial(self._encode, batch.pixels))))
                if len(running) == held:
                    rows, found = running.popleft()
                    yield Vectors(list(rows), found.result())
            for rows, found in running:
                yield Vectors(list(rows), found.result())

    def _encode(self, pixels: Tensor) -> NDArray[np.float32]:
        return to_numpy(self.encoder.encode_image(pixels, normalize=True))

    def _fill(self, row: int, out: NDArray[np.float32]) -> None:
        picture = self.pictures.get(row)
        image = open_sample_image(self.samples[row]) if picture is None else picture
        into = getattr(self.preprocess, "into", None)
        if into is not None:
            into(image, out)
            return
        pixels = self.preprocess(image)
        if tuple(pixels.shape) != out.shape:
            raise ConfigError(f"the preprocessing gave pixels of shape {tuple(pixels.shape)}, expected {out.shape}")
        out[...] = pixels.numpy()


def _once_checked(encoder: Encoder, found: Iterator[Vectors]) -> Iterator[Vectors]:
    """Hold the vectors of int8 back until its check is complete or there are no more: refused ones are never stored."""
    waiting: list[Vectors] = []
    for vectors in found:
        waiting.append(vectors)
        check = encoder.precision_check
        if check is None or check.complete:
            yield from waiting
            waiting.clear()
    yield from waiting


def _encode_on_gpu(encoder: Encoder, batches: PixelBatches, device: torch.device) -> Iterator[Vectors]:
    """Copy a batch while the one before it is computed, and wait for vectors one batch later: the GPU never waits.

    The ring is page-locked; a slot of it is given back when the copy out of it has ended.
    """
    import torch

    def fetch(rows: tuple[int, ...], vectors: Tensor, ready: torch.cuda.Event) -> Vectors:
        ready.synchronize()
        return Vectors(list(rows), to_numpy(vectors))

    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    compute = torch.cuda.current_stream(device)
    before: tuple[tuple[int, ...], Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            pixels = batch.pixels.to(device, non_blocking=True)
        compute.wait_stream(copies)
        pixels.record_stream(compute)
        found = encoder.encode_image(pixels, normalize=True).float()
        vectors = torch.empty(found.shape, pin_memory=True).copy_(found, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(compute)
        if before is not None:
            yield fetch(*before)
        before = (batch.rows, vectors, ready)
        copies.synchronize()
    if before is not None:
        yield fetch(*before)


class TextStream:
    """Yields the vectors of the wanted rows, window by window; windows are cut by position.

    Within a window equal texts are embedded once, and texts are sorted by length and cut into batches of about equal
    numbers of tokens; the next window is tokenised meanwhile.

    Args:
        encoder: Gives tokenizer and vectors.
        samples: The whole data set.
        batch_size: A batch holds up to 128 tokens and 4 texts for each of these.
        window: Texts that are sorted together.
        on_bad: ``skip`` or ``fail``.
        rejects: Where empty texts are noted.
        normalize: Whether vectors are scaled to unit norm.

    Attributes:
        truncated: Texts so far that were cut to the context.
    """

    def __init__(
        self,
        encoder: Encoder,
        samples: Sequence[Sample],
        batch_size: int,
        window: int,
        on_bad: OnBad,
        rejects: RejectLog,
        normalize: bool = True,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.encoder = encoder
        self.samples = samples
        self.batch_size = batch_size
        self.window = window
        self.on_bad: OnBad = on_bad
        self.rejects = rejects
        self.normalize = normalize
        self.truncated = 0

    def run(self, wanted: Sequence[int]) -> Generator[Vectors]:
        """Yield vectors."""
        cuts: dict[int, list[int]] = {}
        for row in wanted:
            cuts.setdefault(row // self.window, []).append(row)
        windows = [rows for _, rows in sorted(cuts.items())]
        if windows:
            self.encoder.prepare()
        if len(windows) < 2:
            for rows in windows:
                yield from self._embed(self._tokenize(rows))
            return
        with ThreadPoolExecutor(1, thread_name_prefix="chiasm-tokenizer") as pool:
            following = pool.submit(self._tokenize, windows[0])
            for rows in windows[1:]:
                tokenized = following.result()
                following = pool.submit(self._tokenize, rows)
                yield from self._embed(tokenized)
            yield from self._embed(following.result())

    def _tokenize(self, rows: list[int]) -> tuple[list[int], list[str], Tokens | None]:
        """Return the rows that have a text, the different texts among them, and the tokens of those."""
        kept = [row for row in rows if self._has_text(row)]
        unique = list(dict.fromkeys(self.samples[row].text or "" for row in kept))
        return kept, unique, self.encoder.tokenizer.encode(unique) if unique else None

    def _has_text(self, row: int) -> bool:
        text = self.samples[row].text
        if text is not None and text.strip():
            return True
        if self.on_bad == "fail":
            raise InputError(f"row {row} of the data cannot be embedded: text is empty", hint="fill in or skip the row")
        self.rejects.add(row, self.samples[row].id, "text is empty")
        return False

    def _embed(self, tokenized: tuple[list[int], list[str], Tokens | None]) -> Iterator[Vectors]:
        rows, unique, tokens = tokenized
        if tokens is None:
            return
        place = {text: i for i, text in enumerate(unique)}
        places = [place[self.samples[row].text or ""] for row in rows]
        cut = set(tokens.truncated)
        self.truncated += sum(i in cut for i in places)
        vectors = np.empty((len(unique), self.encoder.dim), np.float32)
        parts = cut_by_tokens(tokens.lengths.numpy(), self.batch_size)
        with encoder_pool(encoders_for(len(parts), self.encoder.device)) as submit:
            batches = [type(tokens)(tokens.ids[part], tokens.lengths[part], ()) for part in parts]
            # Longest first, so that no encoder is left with the most work at the end.
            found = [submit(partial(self._encode, batch)) for batch in reversed(batches)]
            for part, future in zip(reversed(parts), found, strict=True):
                vectors[part] = future.result()
        yield Vectors(rows, vectors[places])

    def _encode(self, tokens: Tokens) -> NDArray[np.float32]:
        return to_numpy(self.encoder.encode_text(tokens, normalize=self.normalize))


def cut_by_tokens(lengths: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Return the positions of texts, shortest first, cut into batches that are even in memory.

    Args:
        lengths: Tokens of each text.
        batch_size: A batch holds up to ``128 * batch_size`` tokens and ``4 * batch_size`` texts, and at least one text.
            No more than ``batch_size`` texts altogether are one batch, however long they are.
    """
    order = np.argsort(lengths, kind="stable")
    if 0 < len(order) <= batch_size:
        return [order]
    batches: list[NDArray[np.int64]] = []
    first = tokens = 0
    for i, length in enumerate(lengths[order].tolist()):
        tokens += length
        if i > first and (tokens > TOKENS_PER_IMAGE * batch_size or i - first >= TEXTS_PER_IMAGE * batch_size):
            batches.append(order[first:i])
            first, tokens = i, length
    return [*batches, order[first:]] if len(order) else []


class ChunkWriter:
    """Collects vectors and commits them in chunks, in a thread of its own; use as a context manager.

    What was handed over before an error, or before Ctrl-C, is committed on leaving, whoever failed.

    Args:
        commit: Stores some rows and returns how many it added; called from one other thread.
        chunk_rows: A chunk is committed when it has this many rows ...
        chunk_seconds: ... or this age, whichever comes first.

    Attributes:
        added: Rows stored; final after leaving.
    """

    def __init__(self, commit: Callable[[Vectors], int], *, chunk_rows: int, chunk_seconds: float) -> None:
        self.added = 0
        self._commit = commit
        self._chunk_rows = chunk_rows
        self._chunk_seconds = chunk_seconds
        self._queue: queue.Queue[Vectors | None] = queue.Queue(WAITING)
        self._rows: list[int] = []
        self._parts: list[NDArray[np.float32]] = []
        self._error: BaseException | None = None
        self._told_to_end = False
        self._thread = threading.Thread(target=self._work, name="chiasm-writer")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, found: Vectors) -> None:
        """Hand over vectors; waits while the writer is :data:`WAITING` batches behind.

        Raises:
            BaseException: What went wrong in the writer.
        """
        if self._error is not None:
            raise self._error
        self._queue.put(found)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for the last commit; raise what went wrong in it, unless that is what is being raised."""
        stopped: KeyboardInterrupt | None = None
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.1)
                self._thread.join()
            except queue.Full:
                continue
            except KeyboardInterrupt as stop:  # a second one: the store must not be closed under a commit
                stopped = stop
        if self._error is not None and self._error is not error:
            raise self._error
        if stopped is not None:
            raise stopped

    def _work(self) -> None:
        try:
            self._collect()
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, whatever it is
            self._error = error
            while not self._told_to_end:  # so that the caller never waits for a writer that is gone
                self._told_to_end = self._queue.get() is None

    def _collect(self) -> None:
        since = time.monotonic()
        while True:
            left = since + self._chunk_seconds - time.monotonic()
            try:
                found = self._queue.get(timeout=max(0.0, left) if self._rows else None)
            except queue.Empty:
                found = Vectors([], np.empty(0, np.float32))
            if found is None:
                self._told_to_end = True
                self._flush()
                return
            if found.rows:
                self._rows.extend(found.rows)
                self._parts.append(found.vectors)
            if len(self._rows) >= self._chunk_rows or time.monotonic() - since > self._chunk_seconds:
                self._flush()
                since = time.monotonic()

    def _flush(self) -> None:
        if self._rows:
            chunk = Vectors(list(self._rows), np.concatenate(self._parts))
            self._rows.clear()
            self._parts.clear()
            self.added += self._commit(chunk)


def encoders_for(batches: int, device: torch.device) -> int:
    """Return how many batches are encoded at a time: one a thread of torch on a CPU, one elsewhere."""
    import torch

    return max(1, min(torch.get_num_threads(), ENCODERS, batches)) if device.type == "cpu" else 1


@contextmanager
def encoder_pool(n: int) -> Iterator[Callable[[Callable[[], T]], Future[T]]]:
    """Give a function that runs calls in ``n`` threads, among which torch's threads are shared out.

    With ``n`` of 1 calls run at once, in the caller's thread and with all of torch's threads. Leaving waits for what is
    running, drops what is not, and threads started later have as many of torch's threads as before.
    """
    if n == 1:
        yield _run_now
        return
    import torch

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        n, thread_name_prefix="chiasm-encoder", initializer=torch.set_num_threads, initargs=(max(1, threads // n),)
    )
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def _run_now(call: Callable[[], T]) -> Future[T]:
    done: Future[T] = Future()
    done.set_result(call())
    return done


def decoding_threads() -> int:
    """Return how many threads decode when nobody says: one a CPU that this process may use."""
    return available_cpus()


def to_numpy(vectors: Tensor) -> NDArray[np.float32]:
    """Return vectors as a float32 array."""
    result: NDArray[np.float32] = vectors.detach().float().cpu().numpy()
    return result
