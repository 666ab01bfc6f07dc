"""Search: exactly the brute-force answer in fp64, ties by row, whatever the blocks; memory stays bounded."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import InputError, SpaceMismatch, UnknownName
from chiasm.tasks.retrieval import search

Make = Callable[..., Any]


def brute_force(queries: np.ndarray, corpus: np.ndarray, k: int) -> np.ndarray:
    q = queries.astype(np.float64)
    c = corpus.astype(np.float64)
    norms = np.sqrt(np.einsum("nd,nd->n", c, c))
    scores = np.stack([np.einsum("nd,nd->n", np.broadcast_to(row, c.shape), c) for row in q]) / norms
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 90),
    k=st.integers(1, 12),
    block=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 50]),
)
def test_equals_brute_force_with_ties_by_row(make: Make, seed: int, n: int, k: int, block: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    corpus = rng.integers(-levels, levels + 1, size=(n, 3)).astype(np.float32)  # few values: many exact ties
    corpus[np.abs(corpus).sum(axis=1) == 0] = 1
    queries = rng.normal(size=(3, 3))
    result = search(make(queries, "text", prefix="q"), make(corpus), k, block_rows=block)
    units = make(queries).normalize().vectors
    np.testing.assert_array_equal(result.rows, brute_force(units, corpus, min(k, n)))
    assert (np.diff(result.scores, axis=1) <= 0).all()


def test_near_ties_across_blocks(make: Make) -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=64)
    corpus = base + 1e-5 * rng.normal(size=(3000, 64))  # cosines differ only in the last digits of fp32
    corpus[2500:] = corpus[:500]  # and some are equal
    queries = base + 0.1 * rng.normal(size=(7, 64))
    images = make(corpus).normalize()
    expected = brute_force(make(queries).normalize().vectors, images.vectors / 1, 20)
    for block in (64, 1000, 4096):
        result = search(make(queries, "text"), images, 20, block_rows=block)
        exact = np.take_along_axis(
            make(queries).normalize().vectors.astype(float) @ images.vectors.T.astype(float), result.rows, axis=1
        )
        wanted = np.take_along_axis(
            make(queries).normalize().vectors.astype(float) @ images.vectors.T.astype(float), expected, axis=1
        )
        np.testing.assert_allclose(exact, wanted, atol=1e-7)


def test_a_row_finds_itself(make: Make) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 8))
    images = make(vectors, patients=tuple(f"p{i // 5}" for i in range(50)), paths=tuple(f"{i}.png" for i in range(50)))
    assert (search(images, images, 3).rows[:, 0] == np.arange(50)).all()
    others = search(images, images, 49, exclude="self")
    assert not (others.rows == np.arange(50)[:, None]).any()
    patients = search(images, images, 50, exclude="patient")
    for q in range(50):
        found = patients.rows[q][patients.rows[q] >= 0]
        assert len(found) == 45
        assert not (found // 5 == q // 5).any()
    assert len(patients.ids[0]) == 45
    assert np.isnan(patients.scores[0, 45:]).all()
    json.dumps(patients.to_dict(), allow_nan=False)
    with pytest.raises(UnknownName):
        search(images, images, 1, exclude="me")


def test_records(make: Make) -> None:
    texts = make(np.eye(4), "text", prefix="t", texts=("a", "b", None, "d"))
    result = search(make([[0, 1, 0, 0.5]]), texts, 3)
    assert result.direction == "image → text"
    hits = result.to_records()[0]
    assert [h["id"] for h in hits] == ["t1", "t3", "t0"]
    assert hits[0] == {"rank": 1, "id": "t1", "score": pytest.approx(0.894427), "row": 1, "text": "b"}
    assert "path" not in hits[0]
    assert [name for name, _ in result.answers(0)] == ["t1", "t3", "t0"]
    assert result.answers(0)[0][1] == hits[0]["score"]
    assert result.corpus_size == 4
    assert len(result) == 1


def test_refusals(make: Make) -> None:
    images = make(np.eye(3))
    with pytest.raises(SpaceMismatch):
        search(images, make(np.eye(3), name="other"), 1)
    with pytest.raises(InputError, match="at least 1"):
        search(images, images, 0)
    with pytest.raises(InputError, match="at least 1"):
        search(images, images, 1, block_rows=0)
    with pytest.raises(InputError, match="empty"):
        search(images, images.select([]), 1)
    broken = np.eye(3)
    broken[1, 1] = np.nan
    with pytest.raises(InputError, match="not finite"):
        search(images, make(broken), 1)
    with pytest.raises(InputError, match="not finite"):
        search(make(broken), images, 1)
    with pytest.raises(InputError, match="all zero"):
        search(images, make(np.diag([1.0, 0.0, 1.0])), 1)
    with pytest.raises(InputError, match="marked as normalised"):
        search(images, make(5 * np.eye(3), normalized=True), 1)
    assert search(images.select([]), images, 2).rows.shape == (0, 2)


def test_nan_in_a_late_block_of_normalised_rows(make: Make) -> None:
    corpus = np.tile(np.eye(4, dtype=np.float32), (2000, 1))
    corpus[7998, 0] = np.nan
    with pytest.raises(InputError, match="rows 7000 to 7999"):
        search(make(np.eye(4)), make(corpus, normalized=True), 2, block_rows=1000)


def test_memory_does_not_grow_with_a_mapped_corpus(make: Make, tmp_path: Path) -> None:
    n, dim = 60_000, 64
    mapped = np.lib.format.open_memmap(tmp_path / "v.npy", mode="w+", dtype=np.float32, shape=(n, dim))
    mapped[:] = np.random.default_rng(0).normal(size=(n, dim))
    mapped /= np.linalg.norm(mapped, axis=1, keepdims=True)
    corpus = make(np.load(tmp_path / "v.npy", mmap_mode="r"), normalized=True)
    queries = make(np.array(mapped[:64]), "text")
    tracemalloc.start()
    search(queries, corpus, 5, block_rows=2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # the scores of all rows would take 15 MB, a copy of the vectors as much
