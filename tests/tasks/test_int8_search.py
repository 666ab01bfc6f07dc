"""The int8 engine gives the very answer of the fp32 engine and of fp64, whatever the vectors; its bound is a bound."""

from __future__ import annotations

import importlib.machinery
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import InputError, UnknownName
from chiasm.tasks import int8_scan, quantized, retrieval
from chiasm.tasks.hidden_cells import HiddenCells
from chiasm.tasks.int8_scan import Product, best_product, compiled_product, is_exact, kernel_product, torch_product
from chiasm.tasks.quantized import find_candidates, quantize
from chiasm.tasks.retrieval import Searcher, search
from chiasm.types import Embeddings

Make = Callable[..., Any]
pytestmark = pytest.mark.skipif(best_product() is None, reason="no exact int8 product on this machine")


def products() -> Iterator[Any]:
    library = int8_scan.load_library(Path(int8_scan.__file__).parent)
    for path, name in enumerate(("plain", "avx2", "vnni")) if library is not None else ():
        found = kernel_product(library, path)
        yield pytest.param(found if is_exact(found) else None, id=name)
    yield pytest.param(torch_product(), id="torch")


def made(kind: str, n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Vectors as they come: clusters, a narrow cone with a strong dimension, copies, one direction, unequal lengths."""
    draw = np.random.default_rng(seed)
    noise = draw.normal(size=(n, dim))
    if kind == "clusters":
        return draw.normal(size=(30, dim))[draw.integers(0, 30, n)] + 0.5 * noise
    if kind == "cone":
        mean = draw.normal(size=dim)
        mean[0] = 30
        return 3 * mean + noise
    if kind == "copies":
        return noise[draw.integers(0, max(1, n // 5), n)]
    if kind == "one direction":
        return draw.normal(size=dim) + 1e-6 * noise
    if kind == "sparse":
        return np.where(draw.random((n, dim)) < 2 / dim, noise, 0) + 1e-3 * draw.normal(size=dim)
    return noise * 10.0 ** draw.uniform(-6, 6, size=(n, 1))


KINDS = ("clusters", "cone", "copies", "one direction", "sparse", "lengths")


def same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.ids == expected.ids


@pytest.mark.parametrize("product", list(products()))
@given(n=st.integers(0, 41), m=st.integers(0, 19), steps=st.integers(1, 9), seed=st.integers(0, 99))
def test_products_are_exact(product: Product | None, n: int, m: int, steps: int, seed: int) -> None:
    if product is None:
        pytest.skip("this machine lacks it")
    draw = np.random.default_rng(seed)
    rows = draw.choice(np.array([-127, -1, 0, 1, 127], np.int8), (n, 64 * steps))
    queries = draw.integers(-127, 128, (m, 64 * steps), dtype=np.int8)
    room = np.full((m + 2, n), 77, np.int32)  # nothing is written outside
    product(rows, queries, room[1:-1])
    np.testing.assert_array_equal(room[1:-1], queries.astype(np.int32) @ rows.astype(np.int32).T)
    assert (room[0] == 77).all()
    assert (room[-1] == 77).all()


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_a_bound(kind: str, normalized: bool) -> None:
    vectors = made(kind, 2500, 70).astype(np.float32)
    if normalized:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    corpus = quantize(vectors, normalized=normalized, threads=2)
    exact = vectors.astype(np.float64)
    if not normalized:
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    told = corpus.centre.astype(np.float64) + corpus.scale * corpus.codes[:, :70].astype(np.float64)
    lost = np.linalg.norm(exact - told, axis=1)
    assert (lost <= corpus.error + corpus.rounding).all()
    assert (lost >= corpus.error - 1e-4).all()  # and not a loose one
    assert corpus.rounding < 1e-5
    assert (np.linalg.norm(told - corpus.centre, axis=1) <= corpus.length).all()
    assert (np.abs((exact - told) @ corpus.direction.astype(np.float64) - corpus.lean) <= corpus.rounding).all()
    queries = (made("clusters", 9, 70, 1) + exact[:9]).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    found = find_candidates(corpus, queries, 5)
    right = queries.astype(np.float64) @ exact.T
    assert (right[found.query, found.row] <= found.upper).all()
    best = np.argsort(-right, axis=1, kind="stable")[:, :5]
    for q in np.flatnonzero(~found.crowded):
        assert set(best[q]) <= set(found.row[found.query == q])


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10_000),
    n=st.integers(1, 400),
    dim=st.integers(1, 80),
    k=st.integers(1, 12),
    normalized=st.booleans(),
    exclude=st.sampled_from(["none", "self", "patient"]),
)
def test_equals_the_fp32_engine(
    make: Make, kind: str, seed: int, n: int, dim: int, k: int, normalized: bool, exclude: Any
) -> None:
    vectors = made(kind, n, dim, seed)
    vectors[np.abs(vectors).sum(axis=1) < 1e-9] = 1
    corpus = make(vectors, patients=tuple(f"p{i % 7}" for i in range(n)))
    corpus = corpus.normalize() if normalized else corpus
    queries = corpus.select(np.arange(0, n, 3))
    same(
        Searcher(corpus, engine="int8").search(queries, k, exclude=exclude),
        Searcher(corpus, engine="fp32").search(queries, k, exclude=exclude),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exclude", ["none", "patient"])
def test_many_blocks_and_threads(make: Make, monkeypatch: pytest.MonkeyPatch, kind: str, exclude: Any) -> None:
    monkeypatch.setattr(quantized, "_SCORES", 2**14)
    monkeypatch.setattr(quantized, "default_threads", lambda: 3)
    monkeypatch.setattr(quantized, "_QUERY_ROWS", 16)
    n = 9000
    corpus = make(made(kind, n, 24), patients=tuple(f"p{i // 40}" for i in range(n)))
    queries = corpus.select(np.arange(0, n, 301))
    searcher = Searcher(corpus, engine="int8")
    for k in (1, 7, 200):
        same(searcher.search(queries, k, exclude=exclude), search(queries, corpus, k, exclude=exclude, block_rows=999))


def test_crowded_queries_are_given_up_and_answered_in_fp32(make: Make) -> None:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(12_000, 16))
    vectors[3000:9000] = vectors[0] + 1e-7 * draw.normal(size=(6000, 16))  # more than may be candidates
    corpus = make(vectors)
    queries = corpus.select([0, 1, 10_000, 4000])
    found = find_candidates(quantize(corpus.vectors, normalized=False), queries.normalize().vectors, 5)
    assert found.crowded.tolist() == [True, False, False, True]
    assert not set(found.query) & {0, 3}
    same(Searcher(corpus, engine="int8").search(queries, 5), Searcher(corpus, engine="fp32").search(queries, 5))
    hidden = Searcher(corpus, engine="int8").search(queries, 5, exclude="self")
    same(hidden, Searcher(corpus, engine="fp32").search(queries, 5, exclude="self"))


def test_few_candidates_on_clusters_and_in_a_cone() -> None:
    for kind, most in (("clusters", 700), ("cone", 100)):
        vectors = made(kind, 20_000, 256).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        corpus = quantize(vectors, normalized=True)
        found = find_candidates(corpus, vectors[:20], 10)
        assert not found.crowded.any()
        assert len(found.query) / 20 < most
        assert quantized._wants_fine(corpus, vectors[:20], 10, best_product()).all() == (kind == "cone")  # type: ignore[arg-type]


def test_long_rows_of_equal_values_do_not_overflow(make: Make) -> None:
    signs = np.where(np.random.default_rng(0).random((200, 2048)) < 0.5, -1, 1).astype(np.float32)
    corpus = make(signs)  # 2,048 products of 127 and 127 * 128 would pass 2^31
    for queries in (corpus.select([17, 90]), make(-signs[[17, 90]])):
        expected = Searcher(corpus, engine="fp32").search(queries, 3)
        found = find_candidates(quantize(signs, normalized=False), queries.normalize().vectors, 3)
        for q in range(2):
            assert set(expected.rows[q]) <= set(found.row[found.query == q])
        same(Searcher(corpus, engine="int8").search(queries, 3), expected)


def test_damage_is_told_as_by_fp32(make: Make) -> None:
    vectors = np.tile(np.eye(8, dtype=np.float32), (1000, 1))
    vectors[7998, 0] = np.nan
    for normalized in (True, False):
        with pytest.raises(InputError, match="not finite, in rows 7"):
            Searcher(make(vectors, normalized=normalized), engine="int8")
    vectors[7998] = 0
    with pytest.raises(InputError, match="all zero"):
        Searcher(make(vectors), engine="int8")
    with pytest.raises(InputError, match="marked as normalised"):
        Searcher(make(5 * np.eye(3), normalized=True))
    with pytest.raises(InputError, match="empty"):
        Searcher(make(np.eye(3)).select([]))
    with pytest.raises(UnknownName, match="int8"):
        Searcher(make(np.eye(3)), engine="int4")  # type: ignore[arg-type]
    ready = Searcher(make(np.eye(3)), engine="int8")
    with pytest.raises(InputError, match="at least 1"):
        ready.search(make(np.eye(3)), 0)
    with pytest.raises(InputError, match="not finite"):
        ready.search(make([[np.nan, 0, 0]]), 1)
    assert ready.search(make(np.eye(3)).select([]), 2).rows.shape == (0, 2)


def test_one_long_row_among_unit_rows(make: Make) -> None:
    """A row whose norm is wrong where nobody looked is clipped by the codes, and still found as fp32 finds it."""
    vectors = made("lengths", 5000, 32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[1237] *= 50
    corpus = make(vectors, normalized=True)
    queries = make(vectors[1200:1240:3], normalized=False)
    found = Searcher(corpus, engine="int8").search(queries, 3)
    same(found, Searcher(corpus, engine="fp32").search(queries, 3))


def test_a_saturating_product_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vpmaddubsw does: pairs are added in 16 bits."""

    def saturating(rows: np.ndarray, queries: np.ndarray, scores: np.ndarray) -> None:
        pairs = (rows[None].astype(np.int32) + 128) * queries[:, None].astype(np.int32)
        halves = np.clip(pairs.reshape(len(queries), len(rows), -1, 2).sum(axis=3), -32768, 32767)
        scores[:] = halves.sum(axis=2) - 128 * queries.astype(np.int32).sum(axis=1)[:, None]

    assert not is_exact(saturating)
    monkeypatch.setattr(int8_scan, "_torch_int_mm", saturating)
    int8_scan._torch.cache_clear()
    try:
        assert torch_product() is None
    finally:
        monkeypatch.undo()
        int8_scan._torch.cache_clear()


def test_engines_agree_and_fall_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(made("clusters", 4000, 48))
    queries = corpus.select(np.arange(0, 4000, 97))
    expected = Searcher(corpus, engine="fp32").search(queries, 6)
    monkeypatch.setattr(retrieval, "INT8_VALUES", 1000)
    monkeypatch.setattr(retrieval, "ONCE_QUERIES", 2)
    same(search(queries, corpus, 6), expected)
    assert Searcher(corpus).index is not None
    monkeypatch.setattr(int8_scan, "compiled_product", lambda: None)
    assert best_product() is torch_product()
    same(search(queries, corpus, 6), expected)
    monkeypatch.setattr(int8_scan, "torch_product", lambda: None)
    assert Searcher(corpus).index is None
    same(search(queries, corpus, 6), expected)
    with pytest.raises(InputError, match="no exact int8"):
        Searcher(corpus, engine="int8")
    with pytest.raises(RuntimeError, match="no exact int8"):
        find_candidates(quantize(corpus.vectors, normalized=False), queries.vectors, 2)


def test_without_torch_and_without_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert int8_scan.load_library(tmp_path) is None
    name = f"_int8_scan{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    (tmp_path / name).write_bytes(b"no library")
    assert int8_scan.load_library(tmp_path) is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not is_exact(int8_scan._torch_int_mm)


compiler = shutil.which("gcc") or shutil.which("clang")


@pytest.mark.skipif(compiler is None or sys.platform == "win32", reason="no C compiler here")
@pytest.mark.parametrize("change", [("{ return 1; }", "{ return 2; }"), ("_scan_version(", "_scan_other(")])
def test_a_kernel_of_another_version_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    source = Path(int8_scan.__file__).with_name("int8_scan.c").read_text()
    assert source.count(change[0]) == 1
    for text, used in ((source, True), (source.replace(*change), False)):
        folder = tmp_path / str(used)
        folder.mkdir()
        (folder / "k.c").write_text(text)
        library = folder / f"_int8_scan{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([str(compiler), *flags, str(folder / "k.c"), "-o", str(library)], check=True)
        assert (int8_scan.load_library(folder) is not None) == used


def test_small_searches_make_no_copy(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an int8 copy was made")

    monkeypatch.setattr(retrieval, "quantize", refuse)
    corpus = make(np.random.default_rng(0).normal(size=(2000, 8)))
    assert search(corpus, corpus, 2).rows[:, 0].tolist() == list(range(2000))
    assert Searcher(corpus).index is None
    big: Embeddings = make(np.zeros((2**18, 64), np.float32) + np.float32(1))
    assert retrieval._index_for(big, 3) is None


def test_operands_are_checked_before_c_sees_them() -> None:
    product = compiled_product() or torch_product()
    assert product is not None
    good = np.zeros((4, 64), np.int8)
    for rows, queries, scores in (
        (good, good, np.zeros((4, 5), np.int32)),
        (good, good, np.zeros((4, 4), np.int64)),
        (good, good[:, :63], np.zeros((4, 4), np.int32)),
        (good[:, :32], good[:, :32], np.zeros((4, 4), np.int32)),
        (np.zeros((4, 128), np.int8)[:, ::2], good, np.zeros((4, 4), np.int32)),
        (good.view(np.uint8), good, np.zeros((4, 4), np.int32)),
    ):
        with pytest.raises(TypeError):
            product(rows, queries, scores)


def test_hidden_cells() -> None:
    cells = HiddenCells.of([np.array([5, 1]), np.array([], np.int64), np.array([1])])
    assert cells.row.tolist() == [1, 1, 5]
    query, column = cells.rows(1, 5)
    assert sorted(zip(query.tolist(), column.tolist(), strict=True)) == [(0, 0), (2, 0)]
    assert cells.queries(np.array([1, 2])).query.tolist() == [1]
    assert cells.queries(np.array([], np.int64)).row.tolist() == []


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert int8_scan.default_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert int8_scan.default_threads() >= 1
