from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chiasm.data import loader
from chiasm.data.loader import Batches, PixelBatches, available_cpus
from chiasm.errors import FileFormatError, InputError
from chiasm.io.manifest import RejectLog
from chiasm.types import Sample


def draw(row: int, generator: np.random.Generator) -> tuple[int, float]:
    return row, float(generator.random())


@settings(max_examples=30)
@given(
    n=st.integers(0, 23),
    size=st.integers(1, 7),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    drop=st.booleans(),
    data=st.data(),
)
def test_batches_do_not_depend_on_workers_or_start(
    n: int, size: int, seed: int, epoch: int, shuffle: bool, drop: bool, data: st.DataObject
) -> None:
    def batches(workers: int, start: int = 0) -> Batches[tuple[int, float]]:
        return Batches(
            range(n), batch_size=size, load=draw, seed=seed, epoch=epoch, shuffle=shuffle,
            workers=workers, drop_last=drop, start=start,
        )  # fmt: skip

    whole = list(batches(0))
    assert len(whole) == len(batches(0))
    assert whole == list(batches(3))
    k = data.draw(st.integers(0, len(whole)))
    assert list(batches(2, start=k)) == whole[k:]
    rows = [row for batch in whole for row in batch.rows]
    assert len(set(rows)) == len(rows)
    assert len(rows) == (n // size * size if drop else n)
    assert all(item[0] == row for batch in whole for row, item in zip(batch.rows, batch.items, strict=True))
    if not shuffle:
        assert rows == list(range(len(rows)))


def test_epochs_and_seeds_change_order_and_draws() -> None:
    def values(seed: int, epoch: int) -> list[float]:
        loader = Batches(range(50), batch_size=50, load=draw, seed=seed, epoch=epoch, shuffle=True, workers=0)
        return [value for _, value in sorted(next(iter(loader)).items)]

    assert values(0, 0) == values(0, 0)
    assert values(0, 0) != values(0, 1) != values(1, 0)
    orders = {tuple(Batches(range(50), batch_size=1, load=draw, epoch=e, shuffle=True).order()) for e in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("workers", [0, 3])
def test_bad_rows_are_noted_and_left_out(workers: int) -> None:
    samples = [Sample(id=f"s{i}", image=Path(f"/clinic/scan{i}.png")) for i in range(10)]

    def load(row: int, _: np.random.Generator) -> int:
        if row == 3:
            raise FileFormatError("image `scan3.png` is truncated")
        if row in (4, 5):
            raise FileNotFoundError(2, "No such file", "/clinic/doe_john.png")
        return row

    rejects = RejectLog()
    loader = Batches(samples, batch_size=2, load=load, workers=workers, rejects=rejects)
    batches = list(loader)
    assert [b.rows for b in batches] == [(0, 1), (2,), (6, 7), (8, 9)]
    assert [b.number for b in batches] == [0, 1, 3, 4]
    assert [(r.row, r.id, r.reason) for r in rejects] == [
        (3, "s3", "image file is truncated"),
        (4, "s4", "file cannot be read: No such file or directory"),
        (5, "s5", "file cannot be read: No such file or directory"),
    ]
    with pytest.raises(InputError, match="row 3 of the data cannot be loaded: image file is truncated") as caught:
        list(Batches(samples, batch_size=2, load=load, workers=workers, on_bad="fail"))
    assert caught.value.hint


@pytest.mark.parametrize("workers", [0, 2])
def test_a_programming_error_is_never_swallowed(workers: int) -> None:
    def load(row: int, _: np.random.Generator) -> int:
        raise ZeroDivisionError

    rejects = RejectLog()
    with pytest.raises(ZeroDivisionError):
        list(Batches(range(4), batch_size=2, load=load, workers=workers, rejects=rejects))
    assert len(rejects) == 0


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("chiasm-loader")]


def test_prefetch_is_bounded_and_a_dropped_iterator_ends_its_threads() -> None:
    started: list[int] = []

    def load(row: int, _: np.random.Generator) -> int:
        started.append(row)
        return row

    loader = Batches(range(1000), batch_size=5, load=load, workers=2)
    iterator = iter(loader)
    first = next(iterator)
    assert first.rows == (0, 1, 2, 3, 4)
    bound = 5 + 2 + 2 * 5
    until = time.monotonic() + 5
    while len(started) < bound - 1 and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(0.05)
    assert len(started) <= bound
    assert loader_threads()
    iterator.close()  # type: ignore[attr-defined]
    assert not loader_threads()
    assert len(started) <= bound


def test_an_error_in_the_consumer_ends_the_threads() -> None:
    def consume() -> None:
        for batch in Batches(range(100), batch_size=4, load=draw, workers=2):
            if batch.number == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert not loader_threads()


def test_only_some_rows_may_be_visited() -> None:
    loader = Batches(range(100), rows=[7, 3, 50, 9], batch_size=3, load=draw)
    assert [b.rows for b in loader] == [(7, 3, 50), (9,)]
    assert len(loader) == 2
    shuffled = Batches(range(100), rows=[7, 3, 50, 9], batch_size=4, load=draw, shuffle=True, seed=3)
    assert sorted(next(iter(shuffled)).rows) == [3, 7, 9, 50]
    everything = {row: value for b in Batches(range(100), batch_size=9, load=draw) for row, value in b.items}
    assert all(everything[row] == value for b in loader for row, value in b.items)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"workers": -1}, {"start": -1}, {"seed": -1}])
def test_wrong_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Batches(range(3), load=draw, **{"batch_size": 2, **wrong})  # type: ignore[arg-type]


SHAPE = (3, 4, 4)


def write_row(row: int, out: NDArray[np.float32]) -> None:
    out[...] = row


def pixel_batches(
    batches: list[list[int]], fill: Callable[[int, NDArray[np.float32]], None] = write_row, **options: Any
) -> PixelBatches:
    return PixelBatches(range(10_000), batches, fill=fill, shape=SHAPE, **options)


def in_batches(n: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 40), size=st.integers(1, 7), workers=st.integers(0, 4), ahead=st.integers(0, 3),
    bad=st.sets(st.integers(0, 39)),
)  # fmt: skip
def test_the_ring_gives_every_good_row_once_in_order_whatever_its_size(
    n: int, size: int, workers: int, ahead: int, bad: set[int]
) -> None:
    def fill(row: int, out: NDArray[np.float32]) -> None:
        out[...] = np.nan  # what a bad image leaves behind must not come out
        if row in bad:
            raise FileFormatError("image is torn")
        out[...] = row

    rejects = RejectLog()
    found: list[int] = []
    for batch in pixel_batches(in_batches(n, size), fill, workers=workers, ahead=ahead, rejects=rejects):
        assert batch.pixels.shape == (len(batch.rows), *SHAPE)
        assert batch.pixels.dtype == torch.float32
        assert batch.pixels.is_contiguous()
        assert torch.equal(batch.pixels, torch.tensor(batch.rows).float()[:, None, None, None].expand(-1, *SHAPE))
        assert len({row // size for row in batch.rows}) == 1
        found.extend(batch.rows)
    assert found == [row for row in range(n) if row not in bad]
    assert [r.row for r in rejects] == sorted(row for row in bad if row < n)


@pytest.mark.parametrize("workers", [0, 3])
def test_bad_rows_of_the_ring_are_told_as_those_of_batches(workers: int) -> None:
    samples = [Sample(id=f"s{i}", image=Path(f"/clinic/scan{i}.png")) for i in range(10)]

    def fill(row: int, out: NDArray[np.float32]) -> None:
        if row == 3:
            raise FileFormatError("image `scan3.png` is truncated")
        if row in (4, 5):
            raise FileNotFoundError(2, "No such file", "/clinic/doe_john.png")
        out[...] = row

    def load(row: int, _: np.random.Generator) -> int:
        fill(row, np.empty(SHAPE, np.float32))
        return row

    ours, theirs = RejectLog(), RejectLog()
    cut = in_batches(10, 2)
    found = list(PixelBatches(samples, cut, fill=fill, shape=SHAPE, workers=workers, rejects=ours))
    expected = list(Batches(samples, batch_size=2, load=load, workers=workers, rejects=theirs))
    assert [b.rows for b in found] == [b.rows for b in expected] == [(0, 1), (2,), (6, 7), (8, 9)]
    assert ours.items == theirs.items
    assert len(ours) == 3
    messages = []
    for stopped in (
        PixelBatches(samples, cut, fill=fill, shape=SHAPE, workers=workers, on_bad="fail"),
        Batches(samples, batch_size=2, load=load, workers=workers, on_bad="fail"),
    ):
        with pytest.raises(InputError, match="row 3 of the data cannot be loaded: image file is truncated") as caught:
            for _ in stopped:
                pass
        messages.append((str(caught.value), caught.value.hint))
    assert messages[0] == messages[1]
    assert not loader_threads()


def test_a_slot_is_never_written_while_the_consumer_has_it() -> None:
    """A slow consumer and decoders that would run ahead; the consumer spoils what it has read."""
    order: list[str] = []

    def fill(row: int, out: NDArray[np.float32]) -> None:
        order.append(f"write {row // 4}")
        out[...] = row

    places = []
    for k, batch in enumerate(pixel_batches(in_batches(48, 4), fill, workers=3, ahead=1)):
        before = batch.pixels.clone()
        time.sleep(0.005)
        assert torch.equal(batch.pixels, before)
        assert batch.pixels[:, 0, 0, 0].tolist() == [4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3]
        places.append(batch.pixels.data_ptr())
        assert max(int(o.split()[1]) for o in order) <= k + 1, "decoded further ahead than the ring is long"
        batch.pixels.fill_(torch.nan)
    assert len(set(places)) == 2
    assert places == places[:2] * 6
    assert all(p % 64 == 0 for p in places)


@pytest.mark.parametrize(("held", "ahead", "workers"), [(2, 0, 2), (3, 1, 3), (4, 2, 1), (3, 2, 0)])
def test_several_batches_may_be_held_at_a_time(held: int, ahead: int, workers: int) -> None:
    kept: deque[tuple[int, torch.Tensor]] = deque()
    for k, batch in enumerate(pixel_batches(in_batches(60, 3), workers=workers, ahead=ahead, held=held)):
        kept.append((k, batch.pixels))
        time.sleep(0.002)
        for number, pixels in kept:
            assert pixels[:, 0, 0, 0].tolist() == [3 * number, 3 * number + 1, 3 * number + 2]
        if len(kept) == held:
            kept.popleft()[1].fill_(torch.nan)
    assert k == 19


def test_a_view_that_is_kept_too_long_shows_other_rows() -> None:
    """The price of memory that is used again, and the proof that it is."""
    iterator = iter(pixel_batches(in_batches(30, 2), workers=1, ahead=2))
    kept = next(iterator).pixels
    assert kept[:, 0, 0, 0].tolist() == [0, 1]
    for _ in range(4):
        next(iterator)
    assert kept[:, 0, 0, 0].tolist() != [0, 1]
    iterator.close()  # type: ignore[attr-defined]


def test_the_ring_holds_decoders_back_and_a_dropped_iterator_ends_them() -> None:
    started: list[int] = []

    def fill(row: int, out: NDArray[np.float32]) -> None:
        started.append(row)
        out[...] = row

    iterator = iter(pixel_batches(in_batches(1000, 5), fill, workers=2, ahead=2))
    assert next(iterator).rows == (0, 1, 2, 3, 4)
    until = time.monotonic() + 5
    while len(started) < 15 and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(0.03)
    assert sorted(started) == list(range(15))
    assert loader_threads()
    iterator.close()  # type: ignore[attr-defined]
    assert not loader_threads()
    assert len(started) == 15


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_on_either_side_of_the_ring_ends_the_threads(error: type[BaseException]) -> None:
    def consume() -> None:
        for batch in pixel_batches(in_batches(100, 4), workers=2):
            if batch.rows[0] == 8:
                raise error

    def fill(row: int, out: NDArray[np.float32]) -> None:
        if row == 9:
            raise error

    rejects = RejectLog()
    with pytest.raises(error):
        consume()
    assert not loader_threads()
    for workers in (0, 2):
        with pytest.raises(error):
            for _ in pixel_batches(in_batches(100, 4), fill, workers=workers, rejects=rejects):
                pass
        assert not loader_threads()
    assert len(rejects) == 0


def test_a_second_pass_starts_afresh_and_nothing_is_allocated_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = pixel_batches([[3, 1], [], [2]], workers=1, ahead=9)
    assert [b.rows for b in batches] == [b.rows for b in batches] == [(3, 1), (2,)]
    made: list[tuple[int, ...]] = []
    empty = torch.empty

    def noted(*size: int, **options: Any) -> torch.Tensor:
        made.append(size)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", noted)
    list(batches)
    assert made == [(2, *SHAPE)] * 2
    made.clear()
    assert list(pixel_batches([])) == []
    assert made == []
    with pytest.raises(InputError, match="got -1, 2 and 1"):
        pixel_batches([[0]], workers=-1)
    with pytest.raises(InputError, match="must not be negative"):
        pixel_batches([[0]], ahead=-1)
    with pytest.raises(InputError, match="held at least 1"):
        pixel_batches([[0]], held=0)


def test_available_cpus_are_what_affinity_and_cgroup_grant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cpus() == 8
    for text, expected in (
        ("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8),
        ("0 0", 8), ("-1 100000", 8), ("nonsense", 8), ("", 8),
    ):  # fmt: skip
        (tmp_path / "cpu.max").write_text(text)
        assert available_cpus() == expected, text
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for quota, expected in (("-1", 8), ("200000", 2)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        assert available_cpus() == expected
    assert pixel_batches([[0]]).workers == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 24),
    size=st.integers(1, 3),
    bad=st.sets(st.integers(0, 23)),
    workers=st.integers(0, 2),
    ahead=st.integers(0, 2),
    held=st.integers(1, 3),
)
def test_batches_without_a_good_row_do_not_give_a_slot_away_that_is_held(
    n: int, size: int, bad: set[int], workers: int, ahead: int, held: int
) -> None:
    def fill(row: int, out: NDArray[np.float32]) -> None:
        out[...] = row  # a bad row may have written before it fails
        if row in bad:
            raise InputError("no image")

    kept: deque[Any] = deque()
    seen: list[int] = []
    options = {"workers": workers, "ahead": ahead, "held": held}
    samples = [Sample(id=str(i), text="x") for i in range(n)]
    cut = [list(range(k, min(k + size, n))) for k in range(0, n, size)]
    for batch in PixelBatches(samples, cut, fill=fill, shape=SHAPE, **options):  # type: ignore[arg-type]
        seen.extend(batch.rows)
        kept.append(batch)
        if len(kept) == held:
            for one in kept:
                assert one.pixels[:, 0, 0, 0].tolist() == list(one.rows)
            kept.popleft()
    assert seen == [row for row in range(n) if row not in bad]


@pytest.mark.parametrize("workers", [0, 1])
def test_three_bad_batches_behind_a_held_one(workers: int) -> None:
    def fill(row: int, out: NDArray[np.float32]) -> None:
        out[...] = row
        if row in (1, 2, 3):
            raise InputError("no image")

    batches = PixelBatches(
        [Sample(id=str(i), text="x") for i in range(6)], [[i] for i in range(6)], fill=fill, shape=SHAPE,
        workers=workers, ahead=1, held=2,
    )  # fmt: skip
    run = iter(batches)
    first, second = next(run), next(run)
    assert (first.rows, second.rows) == ((0,), (4,))
    assert (first.pixels == 0).all()
    assert (second.pixels == 4).all()
