"""The int8 copy on disk: found again, never that of other vectors, never half; searching needs little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.errors import InputError
from chiasm.io.mapped_vectors import map_vectors
from chiasm.tasks import retrieval, search_index
from chiasm.tasks.int8_scan import best_product, compiled_product
from chiasm.tasks.quantized import quantize
from chiasm.tasks.retrieval import Searcher, search
from chiasm.tasks.search_index import is_whole_store, open_index

Make = Callable[..., Any]
pytestmark = pytest.mark.skipif(best_product() is None, reason="no exact int8 product on this machine")


def vectors_of(n: int = 3000, dim: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def mapped_store(folder: Path, vectors: np.ndarray, stamp: str = "a") -> np.ndarray:
    return map_vectors(folder, stamp, vectors.shape, lambda: iter([(np.arange(len(vectors)), vectors)]))  # type: ignore[arg-type]


def test_what_is_read_is_what_was_made(tmp_path: Path) -> None:
    vectors = vectors_of()
    assert open_index(vectors, normalized=False, folder=tmp_path / "i", make=False) is None
    found = open_index(vectors, normalized=False, folder=tmp_path / "i")
    expected = quantize(vectors, normalized=False)
    assert found is not None
    for name in ("codes", "error", "length", "lean", "centre"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.scale, found.rounding) == (expected.scale, expected.rounding)
    assert not found.codes.flags.writeable
    assert [f.name for f in tmp_path.iterdir()] == ["i"]
    written = (tmp_path / "i" / "codes.npy").stat().st_mtime_ns
    open_index(vectors, normalized=False, folder=tmp_path / "i")
    assert (tmp_path / "i" / "codes.npy").stat().st_mtime_ns == written


def test_a_copy_of_other_vectors_or_a_damaged_one_is_made_anew(tmp_path: Path, make: Make) -> None:
    old, new = vectors_of(), vectors_of(seed=1)
    folder = tmp_path / "i"

    def check(vectors: np.ndarray) -> None:
        corpus = make(vectors)
        queries = corpus.select(np.arange(0, 3000, 211))
        found = Searcher(corpus, engine="int8", folder=folder).search(queries, 4)
        np.testing.assert_array_equal(found.rows, search(queries, corpus, 4).rows)

    check(old)
    check(new)
    for name, content in (
        ("codes.npy", b""),
        ("rows.npy", b"\x93NUMPY"),
        ("index.json", b"[]"),
        ("index.json", b"{}"),
        ("centre.npy", (folder / "rows.npy").read_bytes()),
    ):
        (folder / name).write_bytes(content)
        check(new)
    bounds = np.load(folder / "rows.npy")
    bounds[0, 5] = np.nan
    np.save(folder / "rows.npy", bounds)
    check(new)
    facts = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**facts, "version": 0}))
    check(new)


def test_it_lies_beside_the_vectors_of_a_store_only(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "INT8_VALUES", 1000)
    vectors = vectors_of()
    mapped = mapped_store(tmp_path / "image", vectors)
    corpus = make(mapped)
    assert is_whole_store(corpus.vectors)
    assert not is_whole_store(corpus.vectors[5:])
    queries = make(vectors[:9])
    expected = search(queries, make(vectors), 3, block_rows=100)
    np.testing.assert_array_equal(search(queries, corpus, 3).rows, expected.rows)
    assert (tmp_path / "image" / "int8" / "codes.npy").is_file()
    monkeypatch.setattr(search_index, "quantize", lambda *_, **__: pytest.fail("made again"))
    np.testing.assert_array_equal(search(queries, corpus, 3).rows, expected.rows)
    monkeypatch.undo()
    np.save(tmp_path / "own.npy", vectors)  # somebody's own file: nothing is written beside it
    own = make(np.load(tmp_path / "own.npy", mmap_mode="r"))
    assert not is_whole_store(own.vectors)
    np.testing.assert_array_equal(Searcher(own, engine="int8").search(queries, 3).rows, expected.rows)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["image", "own.npy"]


def test_a_folder_that_cannot_be_written_costs_speed_only(tmp_path: Path, make: Make) -> None:
    (tmp_path / "file").write_text("in the way")
    corpus = make(vectors_of())
    assert open_index(corpus.vectors, normalized=False, folder=tmp_path / "file" / "i") is None
    ready = Searcher(corpus, engine="int8", folder=tmp_path / "file" / "i")
    assert ready.index is not None
    damaged = vectors_of()
    damaged[17, 3] = np.inf
    with pytest.raises(InputError, match="not finite"):
        Searcher(make(damaged), engine="int8", folder=tmp_path / "i")
    assert not (tmp_path / "i").exists()


PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from chiasm.io.mapped_vectors import map_vectors
from chiasm.tasks.retrieval import search
from chiasm.types import Embeddings, Space

def field(name):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name)) * 1024

n, dim = 60_000, 512
draw = np.random.default_rng(0)
def blocks():
    for first in range(0, n, 1000):
        part = draw.standard_normal((1000, dim), dtype=np.float32)
        yield np.arange(first, first + 1000), part / np.linalg.norm(part, axis=1, keepdims=True)
vectors = map_vectors(Path(sys.argv[1]) / "image", "a", (n, dim), blocks)
space = Space("made", "0", "0", dim)
corpus = Embeddings(vectors, tuple(map(str, range(n))), space, "image")
queries = Embeddings(np.array(vectors[:int(sys.argv[2])]), tuple(map(str, range(int(sys.argv[2])))), space, "image")
small = Embeddings(np.array(vectors[:2000]), tuple(map(str, range(2000))), space, "image")
search(queries, small, 10)
Path("/proc/self/clear_refs").write_text("5")
before = field("VmRSS")
found = search(queries, corpus, 10)
assert found.rows[:, 0].tolist() == list(range(len(queries)))
print(json.dumps((field("VmHWM") - before) / vectors.nbytes))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from /proc")
@pytest.mark.skipif(compiled_product() is None, reason="torch, which searches then, takes memory of its own")
@pytest.mark.parametrize("queries", [1, 64])
def test_a_search_of_mapped_vectors_needs_little_memory(tmp_path: Path, queries: int) -> None:
    for _ in range(2):  # makes the copy, finds it
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path), str(queries)], capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) <= 1.2  # of the vectors' file, the int8 copy and mapped pages included
    assert (tmp_path / "image" / "int8" / "codes.npy").is_file()


def test_a_folder_with_other_files_is_never_touched(tmp_path: Path, make: Make) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match="`mine` holds other files"):
        Searcher(make(vectors_of()), engine="int8", folder=folder)
    (folder / "codes.npy").write_bytes(b"")  # a copy with somebody's file among it
    with pytest.raises(InputError, match="holds other files"):
        Searcher(make(vectors_of()), engine="int8", folder=folder)
    assert (folder / "thesis.txt").read_text() == "ten years of work"
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]
    (folder / "thesis.txt").unlink()
    assert Searcher(make(vectors_of()), engine="int8", folder=folder).index is not None
    empty = tmp_path / "empty"
    empty.mkdir()
    assert open_index(vectors_of(), normalized=False, folder=empty) is not None


def test_a_file_that_appears_while_a_copy_is_made_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*args: Any, **options: Any) -> Any:
        (tmp_path / "i").mkdir()
        (tmp_path / "i" / "note").write_text("mine")
        return quantize(*args, **options)

    monkeypatch.setattr(search_index, "quantize", slowly)
    with pytest.raises(InputError, match="holds other files"):
        open_index(vectors_of(), normalized=False, folder=tmp_path / "i")
    assert [f.name for f in tmp_path.rglob("*")] == ["i", "note"]


def test_one_changed_row_is_noticed(tmp_path: Path, make: Make) -> None:
    old = vectors_of()
    Searcher(make(old), engine="int8", folder=tmp_path / "i")
    new = old.copy()
    new[[1001, 1003]] = old[[1003, 1001]]  # none of the rows whose codes are looked at
    found = Searcher(make(new), engine="int8", folder=tmp_path / "i").search(make(old[1001:1002]), 1)
    assert found.rows.tolist() == [[1003]]


@pytest.mark.parametrize("row", [0, 1, 2])
def test_damaged_bounds_are_noticed(tmp_path: Path, row: int) -> None:
    vectors, folder = vectors_of(), tmp_path / "i"
    first = open_index(vectors, normalized=False, folder=folder)
    bounds = np.load(folder / "rows.npy")
    bounds[row, 1234] *= 0.5
    np.save(folder / "rows.npy", bounds)
    found = open_index(vectors, normalized=False, folder=folder)
    assert first is not None
    assert found is not None
    for name in ("error", "length", "lean"):
        np.testing.assert_array_equal(getattr(found, name), getattr(first, name))


def test_a_store_replaced_under_a_mapping_gets_no_copy_of_the_old_vectors(tmp_path: Path, make: Make) -> None:
    old = vectors_of()
    new = old.copy()
    new[[1001, 1003]] = old[[1003, 1001]]
    before = make(mapped_store(tmp_path / "image", old, "a"))
    after = make(mapped_store(tmp_path / "image", new, "b"))
    assert not is_whole_store(before.vectors)
    assert open_index(before.vectors, normalized=False) is None
    query = make(old[1001:1002])
    assert Searcher(before, engine="int8").search(query, 1).rows.tolist() == [[1001]]
    assert not (tmp_path / "image" / "int8").exists()
    assert Searcher(after, engine="int8").search(query, 1).rows.tolist() == [[1003]]
    assert (tmp_path / "image" / "int8").is_dir()


@pytest.mark.parametrize("engine", ["fp32", "int8"])
def test_rows_too_long_for_float32_are_refused(make: Make, engine: str) -> None:
    vectors = vectors_of()
    query = make(vectors[77:78].copy())
    vectors[77] *= np.float32(1e21)  # its norm is infinite in float32: the best answer would be lost
    with pytest.raises(InputError, match="too large"):
        Searcher(make(vectors), engine=engine).search(query, 3)  # type: ignore[arg-type]
