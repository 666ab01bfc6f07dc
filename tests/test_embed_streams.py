from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from chiasm.data.tokens import Tokens
from chiasm.embed_streams import (
    TEXTS_PER_IMAGE,
    TOKENS_PER_IMAGE,
    WAITING,
    ChunkWriter,
    ImageStream,
    TextStream,
    Vectors,
    cut_by_tokens,
    encoders_for,
)
from chiasm.encoders.base import Encoder
from chiasm.errors import ConfigError, InputError
from chiasm.io.manifest import RejectLog
from chiasm.testing import TinyEncoder
from chiasm.types import Sample


class Watched(Encoder):
    """The tiny real encoder; it notes what it is given and where."""

    def __init__(self) -> None:
        tiny = TinyEncoder()
        super().__init__(tiny.model, tiny.config, name="tiny")
        self.pixels: list[Tensor] = []
        self.tokens: list[Tokens] = []

    def encode_image(self, pixels: Tensor, normalize: bool = False, **_: Any) -> Tensor:
        self.pixels.append(pixels.clone())
        return super().encode_image(pixels, normalize)

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        self.tokens.append(tokens)
        return super().encode_text(tokens, normalize)


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("chiasm-")]


def pictures(n: int) -> dict[int, Image.Image]:
    rng = np.random.default_rng(0)
    return {i: Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for i in range(n)}


def image_stream(n: int, encoder: Encoder | None = None, workers: int | None = 2, batch_size: int = 4) -> ImageStream:
    samples = [Sample(id=str(i)) for i in range(n)]
    return ImageStream(encoder or Watched(), samples, batch_size, workers, "fail", RejectLog(), pictures(n))


def text_stream(texts: list[str | None], encoder: Encoder, *, batch_size: int = 2, window: int = 6) -> TextStream:
    samples = [Sample(id=str(i), text=t) for i, t in enumerate(texts)]
    return TextStream(encoder, samples, batch_size, window, "skip", RejectLog())


# Images


SHARED = Watched()


@settings(max_examples=10, deadline=None)
@given(wanted=st.sets(st.integers(0, 12)), workers=st.integers(0, 3))
def test_batches_are_cut_by_position_whatever_is_wanted(wanted: set[int], workers: int) -> None:
    encoder = SHARED
    encoder.pixels.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chiasm.embed_streams.ENCODERS", 1)
        found = list(image_stream(13, encoder, workers).run(sorted(wanted)))
    by_position = {k: [r for r in sorted(wanted) if r // 4 == k] for k in range(4)}
    assert [f.rows for f in found] == [rows for rows in by_position.values() if rows]
    every = pictures(13)
    for seen, part in zip(encoder.pixels, found, strict=True):
        assert torch.equal(seen, torch.stack([encoder.preprocess(every[row]) for row in part.rows]))


def test_whole_batches_have_the_bits_of_an_uninterrupted_run() -> None:
    whole = {row: v for f in image_stream(12).run(range(12)) for row, v in zip(f.rows, f.vectors, strict=True)}
    rest = {row: v for f in image_stream(12).run(range(4, 12)) for row, v in zip(f.rows, f.vectors, strict=True)}
    assert set(rest) == set(range(4, 12))
    for row, vector in rest.items():
        np.testing.assert_array_equal(vector, whole[row])


def test_a_batch_of_one_has_the_same_bits_first_and_last() -> None:
    """A resumed run may begin with the single row of a last batch; the encoder's first call must not be special."""
    whole = list(image_stream(5).run(range(5)))
    rest = list(image_stream(5).run([4]))
    np.testing.assert_array_equal(rest[0].vectors, whole[1].vectors)
    texts: list[str | None] = [f"text {i}" for i in range(7)]
    both = list(text_stream(texts, Watched()).run(range(7)))
    last = list(text_stream(texts, Watched()).run([6]))
    np.testing.assert_array_equal(last[0].vectors, both[1].vectors)
    for stream in (image_stream(5), text_stream(texts, Watched())):
        list(stream.run([]))
        assert stream.encoder._engine is None, "weights are laid out although nothing is wanted"


class Held(Watched):
    """Waits in ``encode_image`` until several calls are in it, checks that its pixels stay, and may fail."""

    def __init__(self, together: int, fail_at: int = -1, error: type[BaseException] = ZeroDivisionError) -> None:
        super().__init__()
        self.barrier = threading.Barrier(together)
        self.fail_at = fail_at
        self.error = error
        self.threads: list[tuple[str, int]] = []

    def encode_image(self, pixels: Tensor, normalize: bool = False, **_: Any) -> Tensor:
        before = pixels.clone()
        with contextlib.suppress(threading.BrokenBarrierError):
            self.barrier.wait(5)
        time.sleep(0.01)
        assert torch.equal(pixels, before), "a slot was written while it was encoded"
        self.threads.append((threading.current_thread().name, torch.get_num_threads()))
        if len(self.threads) == self.fail_at:
            raise self.error
        found = super().encode_image(pixels, normalize)
        pixels.fill_(torch.nan)  # nobody may read it again
        return found


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("encoders", [2, 4])
def test_several_batches_are_encoded_at_a_time_each_with_its_share_of_threads(
    monkeypatch: pytest.MonkeyPatch, encoders: int
) -> None:
    monkeypatch.setattr("chiasm.embed_streams.ENCODERS", encoders)
    encoder = Held(encoders)
    found = list(image_stream(32, encoder).run(range(32)))
    assert [f.rows for f in found] == [list(range(k, k + 4)) for k in range(0, 32, 4)]
    assert {share for _, share in encoder.threads} == {4 // encoders}
    assert len({name for name, _ in encoder.threads}) == encoders
    assert torch.get_num_threads() == 4
    late: list[int] = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [4], "threads that are started afterwards have what they had"
    monkeypatch.setattr("chiasm.embed_streams.ENCODERS", 1)
    alone = list(image_stream(32).run(range(32)))
    for ours, plain in zip(found, alone, strict=True):
        np.testing.assert_allclose(ours.vectors, plain.vectors, atol=1e-6)
    assert not own_threads()


@pytest.mark.usefixtures("four_threads")
def test_the_number_of_encoders_follows_the_data_set_not_what_is_left_of_it() -> None:
    cpu = torch.device("cpu")
    assert [encoders_for(n, cpu) for n in (0, 1, 3, 100)] == [1, 1, 3, 4]
    assert encoders_for(100, torch.device("cuda")) == 1
    rest, small = Held(1), Held(1)
    list(image_stream(32, rest).run([31]))
    assert rest.threads == [("chiasm-encoder_0", 1)], "with the threads of the uninterrupted run, for the same bits"
    list(image_stream(4, small).run(range(4)))
    assert small.threads == [("MainThread", 4)], "a single batch is shared by all threads"


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_in_one_encoder_comes_after_the_batches_before_it_and_ends_all(error: type[BaseException]) -> None:
    encoder = Held(4, fail_at=3, error=error)
    stream = image_stream(400, encoder).run(range(400))
    rows: list[int] = []
    with pytest.raises(error):
        rows.extend(row for found in stream for row in found.rows)
    assert len(rows) <= 12
    assert not own_threads()
    assert torch.get_num_threads() == 4
    dropped = image_stream(400).run(range(400))
    next(dropped)
    dropped.close()
    assert not own_threads()
    assert torch.get_num_threads() == 4


class Shaped(Watched):
    """Its preprocessing gives pixels of another size than it declares."""

    @property
    def preprocess(self) -> Any:
        return lambda image: torch.zeros(3, 1, 1)


class Plain(Watched):
    """Its preprocessing is a mere function, as that of a plug-in may be."""

    @property
    def preprocess(self) -> Any:
        own = super().preprocess
        return lambda image, more=None: own(image)


def test_a_plain_function_may_prepare_images_and_its_shape_is_checked() -> None:
    expected = np.concatenate([f.vectors for f in image_stream(5).run(range(5))])
    found = np.concatenate([f.vectors for f in image_stream(5, Plain()).run(range(5))])
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ConfigError, match=r"shape \(3, 1, 1\), expected"):
        list(image_stream(3, Shaped()).run(range(3)))
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        image_stream(3, batch_size=0)


def test_threads_follow_the_cpus_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.embed_streams.available_cpus", lambda: 6)
    assert image_stream(3, workers=None).workers == 6
    assert image_stream(3, workers=1).workers == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_path_gives_the_vectors_of_the_plain_one() -> None:
    encoder = Watched()
    encoder.to("cuda")
    found = list(image_stream(37, encoder).run(range(37)))
    plain = [encoder.encode_image(p.cuda(), normalize=True).cpu().numpy() for p in encoder.pixels]
    assert [row for f in found for row in f.rows] == list(range(37))
    for f, expected in zip(found, plain, strict=False):
        np.testing.assert_array_equal(f.vectors, expected)


# Texts


@given(lengths=st.lists(st.integers(1, 300), max_size=80), batch_size=st.integers(1, 5))
def test_batches_of_texts_hold_every_text_once_and_never_too_many_tokens(lengths: list[int], batch_size: int) -> None:
    array = np.asarray(lengths, np.int64)
    batches = cut_by_tokens(array, batch_size)
    assert sorted(i for b in batches for i in b.tolist()) == list(range(len(lengths)))
    ordered = [int(array[i]) for b in batches for i in b]
    assert ordered == sorted(lengths)
    if len(lengths) <= batch_size:
        assert len(batches) == bool(lengths)
        return
    for batch in batches:
        assert len(batch) == 1 or array[batch].sum() <= TOKENS_PER_IMAGE * batch_size
        assert 1 <= len(batch) <= TEXTS_PER_IMAGE * batch_size
    for batch, following in itertools.pairwise(batches):
        full = len(batch) == TEXTS_PER_IMAGE * batch_size
        assert full or array[batch].sum() + array[following[0]] > TOKENS_PER_IMAGE * batch_size


def test_short_texts_are_many_to_a_batch_and_long_ones_few() -> None:
    assert [len(b) for b in cut_by_tokens(np.full(300, 8), 32)] == [128, 128, 44]
    assert [len(b) for b in cut_by_tokens(np.full(120, 77), 32)] == [53, 53, 14]
    assert [len(b) for b in cut_by_tokens(np.full(40, 256), 32)] == [16, 16, 8]
    assert [len(b) for b in cut_by_tokens(np.full(2, 512), 1)] == [1, 1]
    assert [len(b) for b in cut_by_tokens(np.full(32, 512), 32)] == [32]


@pytest.mark.parametrize("encoders", [1, 2])
def test_windows_of_texts_are_cut_by_position_and_come_back_in_order(
    monkeypatch: pytest.MonkeyPatch, encoders: int
) -> None:
    texts: list[str | None] = ["one two three", "a", "b", "a", "", "one two three", "c d", "a", None, "e"]
    monkeypatch.setattr("chiasm.embed_streams.ENCODERS", encoders)
    encoder = Watched()
    stream = text_stream(texts, encoder, batch_size=1)
    found = list(stream.run(range(10)))
    assert [f.rows for f in found] == [[0, 1, 2, 3, 5], [6, 7, 9]]
    assert [r.row for r in stream.rejects] == [4, 8]
    plain = TinyEncoder()
    for part in found:
        for row, vector in zip(part.rows, part.vectors, strict=True):
            alone = plain.encode_text([texts[row] or ""], normalize=True)[0].numpy()
            np.testing.assert_allclose(vector, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[0].vectors[1], found[0].vectors[3])
    assert sum(len(t.ids) for t in encoder.tokens) == 3 + 3
    assert all((t.lengths.diff() >= 0).all() for t in encoder.tokens)
    # What is left after an interruption between windows gets the same bits.
    rest = list(text_stream(texts, Watched(), batch_size=1).run(range(6, 10)))
    np.testing.assert_array_equal(rest[0].vectors, found[1].vectors)
    assert not own_threads()


def test_a_text_that_is_refused_is_told_after_the_windows_before_it() -> None:
    samples = [Sample(id=str(i), text="" if i == 5 else f"t{i}") for i in range(6)]
    stream = TextStream(Watched(), samples, 2, 2, "fail", RejectLog())
    found = stream.run(range(6))
    assert [next(found).rows, next(found).rows] == [[0, 1], [2, 3]]
    with pytest.raises(InputError, match="row 5 of the data cannot be embedded: text is empty"):
        next(found)
    assert not own_threads()


def test_windows_of_texts_are_cut_by_position_whatever_is_wanted() -> None:
    found = list(text_stream([f"t{i}" for i in range(15)], Watched()).run([3, 4, 5, 6, 7, 12, 13, 14]))
    assert [f.rows for f in found] == [[3, 4, 5], [6, 7], [12, 13, 14]]  # windows of six, as in a run without a break


def test_tokenizing_is_one_window_ahead_and_ends_with_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Watched()
    asked: list[int] = []
    tokenizer = encoder.tokenizer
    encode = tokenizer.encode

    def noted(texts: Any, context: int | None = None) -> Tokens:
        asked.append(len(texts))
        return encode(texts, context)

    monkeypatch.setattr(tokenizer, "encode", noted)
    iterator = text_stream([f"t{i}" for i in range(60)], encoder).run(range(60))
    next(iterator)
    until = time.monotonic() + 5
    while len(asked) < 2 and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(0.02)
    assert asked == [6, 6]
    iterator.close()
    assert not own_threads()


# Writing


class Disk:
    """Takes chunks; slowly, and until it is full."""

    def __init__(self, room: int = 10**6, seconds: float = 0) -> None:
        self.chunks: list[Vectors] = []
        self.room = room
        self.seconds = seconds
        self.thread = ""

    def __call__(self, chunk: Vectors) -> int:
        self.thread = threading.current_thread().name
        time.sleep(self.seconds)
        if sum(len(c.rows) for c in self.chunks) + len(chunk.rows) > self.room:
            raise InputError("the disk is full")
        self.chunks.append(chunk)
        return len(chunk.rows)


def some(first: int, n: int = 4) -> Vectors:
    return Vectors(list(range(first, first + n)), np.arange(first, first + n, dtype=np.float32)[:, None])


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), max_size=12), chunk=st.integers(1, 9))
def test_chunks_hold_all_rows_in_order(sizes: list[int], chunk: int) -> None:
    disk = Disk()
    ends = np.cumsum([0, *sizes]).tolist()
    with ChunkWriter(disk, chunk_rows=chunk, chunk_seconds=60) as writer:
        for first, n in zip(ends, sizes, strict=False):
            writer.put(some(first, n))
    assert writer.added == ends[-1]
    assert [row for c in disk.chunks for row in c.rows] == list(range(ends[-1]))
    for c in disk.chunks:
        np.testing.assert_array_equal(c.vectors[:, 0], c.rows)
    assert all(len(c.rows) >= chunk for c in disk.chunks[:-1])
    assert all(len(c.rows) < chunk + 5 for c in disk.chunks)
    assert not own_threads()


def test_the_writer_has_its_own_thread_and_old_rows_do_not_wait_for_new_ones() -> None:
    disk = Disk()
    with ChunkWriter(disk, chunk_rows=1000, chunk_seconds=0.05) as writer:
        writer.put(some(0))
        until = time.monotonic() + 5
        while not disk.chunks and time.monotonic() < until:
            time.sleep(0.002)
        assert [c.rows for c in disk.chunks] == [[0, 1, 2, 3]]
    assert disk.thread == "chiasm-writer"
    assert len(disk.chunks) == 1


def test_a_slow_writer_holds_the_encoder_back() -> None:
    gate = threading.Event()
    put: list[int] = []

    def commit(chunk: Vectors) -> int:
        assert gate.wait(10)
        return len(chunk.rows)

    with ChunkWriter(commit, chunk_rows=4, chunk_seconds=60) as writer:

        def feed() -> None:
            for k in range(40):
                writer.put(some(4 * k))
                put.append(k)

        feeder = threading.Thread(target=feed)
        feeder.start()
        time.sleep(0.1)
        assert len(put) <= WAITING + 2
        gate.set()
        feeder.join()
    assert writer.added == 160


def test_what_fails_in_the_writer_is_raised_once_in_the_caller_and_the_rest_is_kept() -> None:
    disk = Disk(room=8)
    handed = 0

    def run() -> None:
        nonlocal handed
        with ChunkWriter(disk, chunk_rows=4, chunk_seconds=60) as writer:
            for k in range(1000):
                writer.put(some(4 * k))
                handed += 1
                time.sleep(0.001)

    with pytest.raises(InputError, match="the disk is full") as caught:
        run()
    assert caught.value.__context__ is None
    assert [c.rows for c in disk.chunks] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert handed < 1000
    assert not own_threads()


def test_a_failure_in_the_last_chunk_is_raised_too() -> None:
    with (
        pytest.raises(InputError, match="the disk is full"),
        ChunkWriter(Disk(room=0), chunk_rows=100, chunk_seconds=60) as writer,
    ):
        writer.put(some(0))
    assert writer.added == 0
    assert not own_threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_was_handed_over_before_an_error_is_committed(error: type[BaseException]) -> None:
    disk = Disk(seconds=0.02)

    def run(to: Disk) -> None:
        with ChunkWriter(to, chunk_rows=4, chunk_seconds=60) as writer:
            for k in range(3):
                writer.put(some(5 * k, 5 if k < 2 else 2))
            raise error

    with pytest.raises(error):
        run(disk)
    assert [row for c in disk.chunks for row in c.rows] == list(range(12))
    with pytest.raises(InputError, match="the disk is full") as caught:
        run(Disk(room=5))
    assert isinstance(caught.value.__context__, error)
    assert not own_threads()


def test_a_second_ctrl_c_waits_for_the_commit_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(seconds=0.05)
    writer = ChunkWriter(disk, chunk_rows=100, chunk_seconds=60)
    join, joined = writer._thread.join, 0

    def interrupted(timeout: float | None = None) -> None:
        nonlocal joined
        joined += 1
        if joined == 1:
            raise KeyboardInterrupt
        join(timeout)

    monkeypatch.setattr(writer._thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.put(some(0))
    assert [c.rows for c in disk.chunks] == [[0, 1, 2, 3]]
    assert writer.added == 4
    assert not own_threads()


def test_no_folder_is_named(tmp_path: Path) -> None:
    encoder = Watched()
    samples = [Sample(id="doe", image=tmp_path / "doe" / "scan.png")]
    rejects = RejectLog()
    assert list(ImageStream(encoder, samples, 4, 1, "skip", rejects).run([0])) == []
    assert [r.reason for r in rejects] == ["image file does not exist"]
