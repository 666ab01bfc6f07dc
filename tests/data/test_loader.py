from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.data.loader import Batches
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
