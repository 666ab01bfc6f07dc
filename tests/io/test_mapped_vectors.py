"""Vectors mapped from a file: the store's own rows in their order, never those of another version, nothing half written."""

from __future__ import annotations

import mmap
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.errors import FileFormatError, InputError
from chiasm.io.mapped_vectors import map_vectors, mapped_file, mapped_stamp, release_pages
from chiasm.io.store import StoreMetadata, create_store, open_store, save_embeddings
from chiasm.types import Embeddings, Modality, Space

SPACE = Space("tiny", "abc123", "def456", 4)


def make(n: int, *, first: int = 0, modality: Modality = "image") -> Embeddings:
    vectors = np.random.default_rng(first).normal(size=(n, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = tuple(f"id{i}" for i in range(first, first + n))
    return Embeddings(
        vectors, ids, SPACE, modality, patients=tuple(f"p{i}" for i in range(n)), labels={"age": tuple(range(n))}
    )


def in_blocks(vectors: np.ndarray, order: list[int], step: int = 3) -> Callable[[], Any]:
    def blocks() -> Any:
        for first in range(0, len(order), step):
            rows = np.array(order[first : first + step])
            yield rows, vectors[rows]

    return blocks


def test_blocks_in_any_order_become_rising_rows(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    for name, order in (("rising", list(range(10))), ("falling", list(range(9, -1, -1)))):
        found = map_vectors(tmp_path / name, "a", (10, 4), in_blocks(vectors, order))
        np.testing.assert_array_equal(found, vectors)
        assert not found.flags.writeable
        assert sorted(f.name for f in (tmp_path / name).iterdir()) == ["stamp.json", "vectors.npy"]


def test_another_stamp_shape_or_damage_is_written_anew(tmp_path: Path) -> None:
    old, new = np.zeros((6, 4), np.float32), np.ones((6, 4), np.float32)
    folder = tmp_path / "image"
    map_vectors(folder, "a", (6, 4), in_blocks(old, list(range(6))))
    np.testing.assert_array_equal(map_vectors(folder, "a", (6, 4), in_blocks(new, list(range(6)))), old)
    np.testing.assert_array_equal(map_vectors(folder, "b", (6, 4), in_blocks(new, list(range(6)))), new)
    for damage in (
        lambda: (folder / "vectors.npy").write_bytes(b"none"),
        lambda: (folder / "stamp.json").write_text("{"),
    ):
        damage()
        np.testing.assert_array_equal(map_vectors(folder, "b", (6, 4), in_blocks(old, list(range(6)))), old)
    with pytest.raises(FileFormatError, match="expected 7 vectors, got 6"):
        map_vectors(folder, "c", (7, 4), in_blocks(old, list(range(6))))
    assert [f.name for f in tmp_path.iterdir()] == ["image"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    vectors = np.zeros((5000, 4), np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match="disk is full"):
            map_vectors(tmp_path / "image", "a", (5000, 4), in_blocks(vectors, list(range(5000)), 500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_store_gives_the_same_rows_mapped(tmp_path: Path) -> None:
    save_embeddings(tmp_path, make(20), make(5, modality="text"))
    with open_store(tmp_path) as store:
        plain, mapped = store.read("image"), store.read("image", mapped=True)
        assert len(store.read("text", mapped=True)) == 5
        few = store.read("image", mapped=True, ids=["id7", "id2"], columns=("patient",))
    np.testing.assert_array_equal(plain.vectors, mapped.vectors)
    assert (plain.ids, plain.patients, dict(plain.labels)) == (mapped.ids, mapped.patients, dict(mapped.labels))
    assert few.ids == ("id7", "id2")
    np.testing.assert_array_equal(few.vectors, plain.vectors[[7, 2]])
    file = mapped_file(mapped.vectors)
    assert file == tmp_path / "search" / "image" / "vectors.npy"
    written = file.stat().st_mtime_ns
    with open_store(tmp_path) as store:
        store.read("image", mapped=True)
    assert file.stat().st_mtime_ns == written


def test_rows_that_were_added_are_mapped_too(tmp_path: Path) -> None:
    save_embeddings(tmp_path, make(6))
    with open_store(tmp_path) as store:
        before = store.read("image", mapped=True)
    save_embeddings(tmp_path, make(3, first=50))
    with open_store(tmp_path) as store:
        after = store.read("image", mapped=True)
        np.testing.assert_array_equal(after.vectors, store.read("image").vectors)
    assert len(after) == 9
    np.testing.assert_array_equal(before.vectors, after.vectors[:6])  # an open map stays whole


def test_an_empty_store_maps_nothing(tmp_path: Path) -> None:
    with create_store(tmp_path, StoreMetadata(SPACE)) as store:
        assert len(store.read("image", mapped=True)) == 0
    assert not (tmp_path / "search").exists()


def test_pages_are_given_back_only_of_maps_for_reading(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.arange(2**16, dtype=np.float32).reshape(-1, 16))
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    view = np.ascontiguousarray(mapped)[100:3000]
    release_pages(view)
    np.testing.assert_array_equal(view, np.arange(2**16, dtype=np.float32).reshape(-1, 16)[100:3000])
    changed = np.load(tmp_path / "v.npy", mmap_mode="c")
    changed[:] = 7  # would be lost
    release_pages(changed)
    assert (changed == 7).all()
    assert mapped_file(changed) is None
    plain = np.zeros((4, 4), np.float32)
    release_pages(plain)
    assert mapped_file(plain) is None
    assert mapped_file(np.frombuffer(mmap.mmap(-1, 4096), np.float32)) is None


def test_the_stamp_goes_with_the_mapping_not_with_the_place(tmp_path: Path) -> None:
    old, new = np.zeros((6, 4), np.float32), np.ones((6, 4), np.float32)
    first = map_vectors(tmp_path / "image", "a", (6, 4), in_blocks(old, list(range(6))))
    second = map_vectors(tmp_path / "image", "b", (6, 4), in_blocks(new, list(range(6))))
    assert (mapped_stamp(first), mapped_stamp(second)) == ("a", "b")
    assert mapped_stamp(np.asarray(first)[2:]) == "a"
    assert mapped_stamp(np.load(tmp_path / "image" / "vectors.npy", mmap_mode="r")) is None
    assert mapped_stamp(new) is None
    np.testing.assert_array_equal(first, old)


def test_two_readers_that_map_at_once_both_get_their_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, folder = np.arange(24, dtype=np.float32).reshape(6, 4), tmp_path / "image"
    blocks = in_blocks(vectors, list(range(6)))
    removed = shutil.rmtree

    def beaten(path: Path, **options: Any) -> None:
        removed(path, **options)
        if path == folder:  # another process puts its own there just before this one does
            monkeypatch.setattr(shutil, "rmtree", removed)
            other = threading.Thread(target=map_vectors, args=(folder, "a", (6, 4), blocks))
            other.start()
            other.join()
            (folder / "int8").mkdir()  # and what it goes on to make of them

    monkeypatch.setattr(shutil, "rmtree", beaten)
    np.testing.assert_array_equal(map_vectors(folder, "a", (6, 4), blocks), vectors)
    assert [f.name for f in tmp_path.iterdir()] == ["image"]
    assert (folder / "int8").is_dir()


def test_a_place_fought_over_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "image"
    map_vectors(folder, "b", (6, 4), in_blocks(np.ones((6, 4), np.float32), list(range(6))))
    removed = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda p, **o: None if p == folder else removed(p, **o))
    with pytest.raises(FileFormatError, match="being replaced"):
        map_vectors(folder, "a", (6, 4), in_blocks(np.zeros((6, 4), np.float32), list(range(6))))
    assert [f.name for f in tmp_path.iterdir()] == ["image"]
