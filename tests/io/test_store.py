from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chiasm
from chiasm.errors import FileFormatError, InputError, SpaceMismatch, UnknownName
from chiasm.io.store import StoreMetadata, create_store, open_store, save_embeddings, stored_precision
from chiasm.types import Embeddings, Modality, Space

SPACE = Space("tiny", "abc123", "def456", 4)


def make(n: int, *, first: int = 0, modality: Modality = "image", space: Space = SPACE, seed: int = 0) -> Embeddings:
    vectors = np.random.default_rng([seed, first]).normal(size=(n, space.dim)).astype(np.float32)
    return Embeddings(
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        tuple(f"id{i}" for i in range(first, first + n)),
        space,
        modality,
        logit_scale=14.3,
        paths=tuple(f"images/{i}.png" for i in range(first, first + n)) if modality == "image" else None,
        texts=tuple(f"text {i}" if i % 3 else None for i in range(first, first + n)),
        patients=tuple(f"p{i // 2}" for i in range(first, first + n)),
        labels={"age": tuple(range(n)), "edema": tuple(0.5 if i % 2 else None for i in range(n))},
    )


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as a full disk or a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_equal(a: Embeddings, b: Embeddings) -> None:
    np.testing.assert_array_equal(a.vectors, b.vectors)
    for name in ("ids", "space", "modality", "normalized", "logit_scale", "logit_bias", "texts", "paths", "patients"):
        assert getattr(a, name) == getattr(b, name), name
    assert dict(a.labels) == dict(b.labels)


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    images, texts = make(7), make(5, modality="text", seed=1)
    save_embeddings(tmp_path / "s", images, texts)
    store = open_store(tmp_path / "s")
    check_equal(store.read("image"), images)
    check_equal(store.read("text"), texts)
    assert store.count() == 12
    assert store.count("text") == 5
    assert store.ids("image") == images.ids
    assert store.space == SPACE
    assert store.metadata.chiasm_version == chiasm.__version__
    plain = store.read("image", columns=())
    assert (plain.texts, plain.paths, plain.patients, dict(plain.labels)) == (None, None, None, {})
    some = store.read("image", ids=["id4", "id1", "id4"])
    check_equal(some, images.select([4, 1, 4]))


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    ids=st.lists(st.text(min_size=1, max_size=6), unique=True, min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 8), max_size=3),
    labels=st.dictionaries(
        st.text(max_size=4), st.none() | st.text(max_size=4) | st.integers(-(2**40), 2**40) | st.booleans(), max_size=3
    ),
)
def test_any_ids_in_any_chunks_come_back_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], cuts: list[int], labels: dict[str, object]
) -> None:
    n = len(ids)
    whole = replace(
        make(n),
        ids=tuple(ids),
        texts=tuple(ids),
        labels={k: (v,) * n for k, v in labels.items()},  # type: ignore[misc]
    )
    path = tmp_path_factory.mktemp("store")
    with create_store(path, StoreMetadata.of(whole)) as store:
        for cut in sorted(c for c in cuts if c <= n):
            store.append(whole.select(range(cut)))
        store.append(whole)
        assert store.append(whole) == 0
    check_equal(open_store(path).read("image"), whole)


def test_appending_is_idempotent_and_keeps_the_first(tmp_path: Path) -> None:
    with create_store(tmp_path, StoreMetadata.of(make(1))) as store:
        assert store.append(make(6)) == 6
        assert store.append(make(6, seed=9)) == 0
        assert store.append(make(6, first=3)) == 3
        assert store.append(make(6, modality="text")) == 6
        assert store.append(make(0)) == 0
    again = open_store(tmp_path)
    assert again.ids("image") == tuple(f"id{i}" for i in range(9))
    np.testing.assert_array_equal(again.read("image").vectors[:6], make(6).vectors)


def test_versions_and_files_are_merged_at_close_and_order_stays(tmp_path: Path) -> None:
    with create_store(tmp_path, StoreMetadata.of(make(1))) as store:
        for k in range(12):
            store.append(make(3, first=3 * k))
            store.append(make(3, first=3 * k, modality="text"))
    table = tmp_path / "embeddings.lance"
    assert len(list((table / "data").glob("*.lance"))) == 1
    assert len(list((table / "_versions").glob("*.manifest"))) == 1
    expected = np.concatenate([make(3, first=3 * k).vectors for k in range(12)])
    np.testing.assert_array_equal(open_store(tmp_path).read("image").vectors, expected)
    with open_store(tmp_path) as store:
        assert store.append(make(3, first=36)) == 3
    assert open_store(tmp_path).ids("image") == tuple(f"id{i}" for i in range(39))


def test_long_runs_are_compacted_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.io.store.COMPACT_EVERY", 4)
    with create_store(tmp_path, StoreMetadata.of(make(1))) as store:
        for k in range(9):
            store.append(make(2, first=2 * k))
        assert len(list((tmp_path / "embeddings.lance" / "data").glob("*.lance"))) <= 4
        assert store.count() == 18
    assert open_store(tmp_path).ids("image") == tuple(f"id{i}" for i in range(18))


def test_a_foreign_space_is_refused(tmp_path: Path) -> None:
    save_embeddings(tmp_path, make(3))
    foreign = replace(SPACE, weights="ffff")
    with open_store(tmp_path) as store, pytest.raises(SpaceMismatch, match=r"tiny@abc123.*tiny@ffff"):
        store.append(make(3, first=9, space=foreign))
    with pytest.raises(SpaceMismatch, match="holds embeddings of"):
        create_store(tmp_path, StoreMetadata(foreign))
    with pytest.raises(SpaceMismatch):
        save_embeddings(tmp_path, make(3, space=Space("tiny", "abc123", "def456", 8)))
    with pytest.raises(InputError, match="already"):
        create_store(tmp_path, StoreMetadata(SPACE), exist_ok=False)
    assert open_store(tmp_path).count() == 3


def test_normalisation_follows_the_store(tmp_path: Path) -> None:
    raw = replace(make(3), vectors=make(3).vectors * 5, normalized=False)
    save_embeddings(tmp_path / "unit", make(1, first=50), raw)
    np.testing.assert_allclose(open_store(tmp_path / "unit").read("image").vectors[1:], make(3).vectors, rtol=1e-6)
    save_embeddings(tmp_path / "raw", raw)
    read = open_store(tmp_path / "raw").read("image")
    assert not read.normalized
    np.testing.assert_array_equal(read.vectors, raw.vectors)
    with open_store(tmp_path / "raw") as store, pytest.raises(InputError, match="not normalised"):
        store.append(make(2, first=80))


def test_bad_chunks_are_refused_whole(tmp_path: Path) -> None:
    good = make(3)
    save_embeddings(tmp_path, good)
    vectors = make(2, first=10).vectors.copy()
    vectors[1, 0] = np.nan
    bad = [
        replace(make(2, first=10), vectors=vectors),
        replace(make(2, first=10), ids=("a", "a")),
        replace(make(2, first=10), ids=("a", "")),
    ]
    with open_store(tmp_path) as store:
        for chunk in bad:
            with pytest.raises(InputError):
                store.append(chunk)
        with pytest.raises(InputError, match="1 of 2 ids are not in the store"):
            store.read("image", ids=["id0", "zzz"])
        with pytest.raises(UnknownName, match="did you mean `text`"):
            store.read("image", columns=("texts",))  # type: ignore[arg-type]
        with pytest.raises(InputError, match="modality must be"):
            store.read("sound' OR 1=1 --")  # type: ignore[arg-type]
    check_equal(open_store(tmp_path).read("image"), good)
    with pytest.raises(InputError, match="no embeddings"):
        save_embeddings(tmp_path)


def test_what_is_no_store_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no store in `none`"):
        open_store(tmp_path / "none")
    (tmp_path / "half" / "embeddings.lance" / "_versions").mkdir(parents=True)
    (tmp_path / "half" / "embeddings.lance" / "data").mkdir()
    with pytest.raises(InputError, match="there is no store"):
        open_store(tmp_path / "half")
    save_embeddings(tmp_path / "half", make(2))  # what a writer killed at the start leaves is made good
    assert open_store(tmp_path / "half").count() == 2

    import lancedb
    import pyarrow as pa

    lancedb.connect(tmp_path / "foreign").create_table("embeddings", data=pa.table({"x": [1]}))
    with pytest.raises(FileFormatError, match="not a store of chiasm"):
        open_store(tmp_path / "foreign")
    for manifest in (tmp_path / "half" / "embeddings.lance" / "_versions").glob("*.manifest"):
        manifest.write_bytes(b"damaged")
    with pytest.raises(FileFormatError, match="is damaged"):
        open_store(tmp_path / "half")


def test_a_reader_of_lost_files_gets_a_clear_error(tmp_path: Path) -> None:
    save_embeddings(tmp_path, make(3))
    store = open_store(tmp_path)
    for file in (tmp_path / "embeddings.lance" / "data").glob("*.lance"):
        file.unlink()
    with pytest.raises(FileFormatError, match="cannot be read"):
        store.read("image")


def test_one_writer_at_a_time_and_readers_any_time(tmp_path: Path) -> None:
    with create_store(tmp_path, StoreMetadata.of(make(1))) as store:
        store.append(make(3))
        with pytest.raises(InputError, match="another process writes"):
            save_embeddings(tmp_path, make(3, first=7))
        assert open_store(tmp_path).count() == 3
    save_embeddings(tmp_path, make(3, first=7))
    store.close()
    assert open_store(tmp_path).count() == 6
    assert store.append(make(2, first=7)) == 0  # an old handle looks again before it writes
    store.close()


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_store import make
from chiasm.io.store import StoreMetadata, create_store
with create_store(sys.argv[1], StoreMetadata.of(make(1))) as store:
    print("open", flush=True)
    k = len(store.ids("image")) // 5
    while k < 400:
        store.append(make(5, first=5 * k))
        k += 1
        print(k, flush=True)
        if k % 7 == 0:
            store.close()
"""


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    """Kill a writer at random moments, also while it compacts: chunks stay whole, acknowledged ones are there."""
    rng = np.random.default_rng(5)
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "s"), str(Path(__file__).parent)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        time.sleep(float(rng.uniform(0, 0.25)))
        os.kill(process.pid, signal.SIGKILL)
        lines = process.stdout.read().splitlines()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        acknowledged = max((int(x) for x in lines if x.isdigit()), default=0)
        store = open_store(tmp_path / "s")
        read = store.read("image")
        assert len(read) % 5 == 0
        assert len(read) >= 5 * acknowledged
        assert read.ids == tuple(f"id{i}" for i in range(len(read)))
        for k in range(len(read) // 5):
            np.testing.assert_array_equal(read.vectors[5 * k : 5 * k + 5], make(5, first=5 * k).vectors)
    with open_store(tmp_path / "s") as store:  # the lock of the dead is gone
        n = store.count()
        assert store.append(make(5, first=n)) == 5


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    """Real failures of the file system: files may not grow beyond a limit, at every place within a data file.

    Lance notices a failure in the middle of a file; one at its end it does not, and commits a file that cannot be
    opened. The store must take that back, also when it compacts.
    """

    def sizes() -> list[int]:
        return [p.stat().st_size for p in (tmp_path / "embeddings.lance" / "data").glob("*.lance")]

    with create_store(tmp_path, StoreMetadata.of(make(1))) as store:
        store.append(make(5))
        store.append(make(60, first=5))
        whole, n = max(sizes()), 65
        for size in (whole // 2, *range(whole - 1700, whole, 212), whole - 1):
            with file_limit(size), pytest.raises(InputError, match="the disk is full: the store could not") as caught:
                store.append(make(60, first=n))
            assert caught.value.hint == "free some space and run the same command again"
            assert str(tmp_path) not in caught.value.message
            assert len(open_store(tmp_path).read("image")) == n
            n += store.append(make(2, first=n))
        with file_limit(whole + 500):  # enough for the chunks, not for the merged file
            store.close()
    assert len(sizes()) > 2
    assert open_store(tmp_path).ids("image") == tuple(f"id{i}" for i in range(n))
    with open_store(tmp_path) as store:
        store.append(make(1, first=n))
    assert len(sizes()) == 1
    assert open_store(tmp_path).count() == n + 1


def test_a_version_that_is_not_whole_is_left_by_the_next_writer(tmp_path: Path) -> None:
    """A writer may die between the commit of a torn file and its repair: cut the newest file by hand."""
    store = create_store(tmp_path, StoreMetadata.of(make(1)))
    for k in range(3):
        store.append(make(20, first=20 * k))
    assert store._lock is not None
    store._lock.release()  # as if it had died: nothing is compacted
    newest = max((tmp_path / "embeddings.lance" / "data").glob("*.lance"), key=lambda p: p.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-30])
    with pytest.raises(FileFormatError, match="cannot be read") as caught:
        open_store(tmp_path).read("image")
    assert "goes back to the last whole version" in str(caught.value.hint)
    with open_store(tmp_path) as again:
        again.lock()
        assert again.ids("image") == make(40).ids
        assert again.append(make(20, first=40)) == 20
    assert open_store(tmp_path).ids("image") == make(60).ids
    for file in (tmp_path / "embeddings.lance" / "data").glob("*.lance"):
        file.write_bytes(file.read_bytes()[:-30])
    with open_store(tmp_path) as lost, pytest.raises(FileFormatError, match="no earlier version"):
        lost.lock()


def test_threads_may_read_one_store(tmp_path: Path) -> None:
    save_embeddings(tmp_path, make(500))
    store = open_store(tmp_path)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(store.read("image")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [500] * 4


def test_importing_the_store_is_light() -> None:
    heavy = "{'torch', 'lancedb', 'pyarrow', 'pandas'}"
    code = f"import sys, chiasm.io.store, chiasm.io.clip_retrieval; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_precision_is_stored_and_left_out_where_it_is_fp32(tmp_path: Path) -> None:
    assert stored_precision(tmp_path / "s") is None
    plain, mixed = StoreMetadata(SPACE), StoreMetadata(SPACE, precision="bf16")
    assert "precision" not in plain.to_dict()  # as stores were written before it was known
    assert StoreMetadata.from_dict(plain.to_dict()) == plain
    assert mixed.to_dict()["precision"] == "bf16"
    with create_store(tmp_path / "s", mixed) as store:
        store.append(make(3))
    assert open_store(tmp_path / "s").metadata == mixed
    assert stored_precision(tmp_path / "s") == "bf16"
    save_embeddings(tmp_path / "p", make(3))
    assert stored_precision(tmp_path / "p") == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_rows_that_are_read_know_their_precision(tmp_path: Path, precision: str) -> None:
    save_embeddings(tmp_path / "s", replace(make(4), precision=precision))
    store = open_store(tmp_path / "s")
    for read in (store.read("image"), store.read("image", ids=["id2"]), store.read("image", mapped=True)):
        assert read.precision == precision
    assert stored_precision(tmp_path / "s") == precision
