"""The cache of vectors: by content, whole shards only, another key sees nothing of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError
from chiasm.io.vector_cache import VectorCache


def contents(*names: object) -> list[bytes]:
    return [hashlib.sha256(str(n).encode()).digest() for n in names]


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), max_size=5, unique=True), max_size=6))
def test_the_last_vector_of_every_content(tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache, known = VectorCache(folder, "k", 5), {}
    for number, names in enumerate(shards):
        fresh = [n for n in names if contents(n)[0] not in cache]
        made = vectors(len(fresh), seed=number)
        cache.add(contents(*fresh), made)
        known.update(zip(fresh, made, strict=True))
    for again in (cache, VectorCache(folder, "k", 5)):
        assert len(again) == len(known)
        names = sorted(known, reverse=True)
        np.testing.assert_array_equal(again.read(contents(*names)), np.array([known[n] for n in names]).reshape(-1, 5))


def test_another_key_or_dimension_is_another_cache(tmp_path: Path) -> None:
    VectorCache(tmp_path, {"encoder": "a"}, 5).add(contents(1), vectors(1))
    assert contents(1)[0] in VectorCache(tmp_path, {"encoder": "a"}, 5)
    assert contents(1)[0] not in VectorCache(tmp_path, {"encoder": "b"}, 5)
    assert contents(1)[0] not in VectorCache(tmp_path, {"encoder": "a"}, 6)


def test_shards_are_mapped(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, "k", 5)
    cache.add(contents(1, 2), vectors(2))
    assert all(isinstance(s, np.memmap) for s in cache._shards)


def test_damaged_shards_count_as_absent(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, "k", 5)
    cache.add(contents(1, 2), vectors(2))
    cache.add(contents(3), vectors(1))
    first, second = sorted(cache.path.glob("shard-*.npy"))
    whole = first.read_bytes()
    for damage in (b"", whole[:60], whole[:-3], b"nonsense"):
        first.write_bytes(damage)
        assert len(VectorCache(tmp_path, "k", 5)) < 3
    bad = np.load(second).copy()
    bad["vector"] = np.nan
    np.save(second, bad)
    first.write_bytes(b"")
    again = VectorCache(tmp_path, "k", 5)
    assert len(again) == 0
    again.add(contents(1, 2), vectors(2))
    again.add(contents(3), vectors(1))
    assert len(VectorCache(tmp_path, "k", 5)) == 3
    assert not list(cache.path.glob("*.part"))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, "k", 5)
    with pytest.raises(InputError, match="do not fit"):
        cache.add(contents(1), vectors(2))
    with pytest.raises(InputError, match="do not fit"):
        cache.add([b"short"], vectors(1))
    assert cache.read([]).shape == (0, 5)
    cache.add([], vectors(0))
    assert not cache.path.exists()
