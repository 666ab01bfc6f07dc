"""Pairing: exactly the double loop over images and reports, whatever the blocks; laws, corrections, refusals."""

from __future__ import annotations

import dataclasses
import inspect
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError, SpaceMismatch, UnknownName
from chiasm.tasks import pairing as module
from chiasm.tasks.pairing import Pairing, null_similarity, pair, shuffled_reports, similarity_of

Make = Callable[..., Any]


def rows_of(rng: np.random.Generator, n: int, dim: int, levels: int) -> np.ndarray:
    """Rows of few different values: many exact ties."""
    rows = rng.integers(-levels, levels + 1, size=(n, dim)).astype(np.float32)
    rows[np.abs(rows).sum(axis=1) == 0] = 1
    return rows


def double_loop(
    images: Any, chunks: Any, report_of: np.ndarray, aggregate: str, offset: dict[int, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One image and one report at a time: reports in order (falling score, rising number), and their similarities."""
    numbers = np.unique(report_of)
    x, t = images.normalize().vectors.astype(float), chunks.normalize().vectors.astype(float)
    order, values = [], []
    for i in range(len(x)):
        similarity = []
        for number in numbers:
            cosines = sorted(float((x[i] * t[c]).sum()) for c in np.flatnonzero(report_of == number))
            best = {"max": cosines[-1:], "mean": cosines, "top_mean": cosines[-3:]}[aggregate]
            similarity.append(sum(best) / len(best))
        score = np.array(similarity) - [0.0 if offset is None else offset[int(n)] for n in numbers]
        rank = np.argsort(-np.round(score, 12), kind="stable")
        order.append(numbers[rank])
        values.append(np.array(similarity)[rank])
    return np.stack(order), np.stack(values)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 9),
    reports=st.integers(1, 12),
    most=st.integers(1, 5),
    k=st.integers(1, 4),
    block=st.integers(1, 30),
    levels=st.sampled_from([1, 50]),
    aggregate=st.sampled_from(["max", "mean", "top_mean"]),
)
def test_equals_the_double_loop(
    make: Make, seed: int, n: int, reports: int, most: int, k: int, block: int, levels: int, aggregate: Any
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, most + 1, size=reports)
    report_of = rng.permutation(np.repeat(3 * np.arange(reports), counts))  # gaps and any order are allowed
    images = make(rng.normal(size=(n, 3)))
    chunks = make(rows_of(rng, len(report_of), 3, levels), "text")
    found = pair(images, chunks, report_of=report_of, k=k, aggregate=aggregate, block=block)
    rows, values = double_loop(images, chunks, report_of, aggregate)
    wide = min(k, reports)
    np.testing.assert_array_equal(found.report_rows[:, :wide], rows[:, :wide])
    np.testing.assert_allclose(found.similarity[:, :wide], values[:, :wide], atol=1e-6)
    assert (found.report_rows[:, wide:] == -1).all()
    assert np.isnan(found.similarity[:, wide:]).all()
    if reports > 1:
        np.testing.assert_allclose(found.margin, values[:, 0] - values[:, 1], atol=1e-6)
        assert (found.margin >= 0).all()
    else:
        assert np.isnan(found.margin).all()
    x, t = images.normalize().vectors, chunks.normalize().vectors
    for i, row in enumerate(found.report_rows[:, 0]):
        mine = np.flatnonzero(report_of == row)
        assert found.chunk_rows[i, 0] in mine
        assert (x[i] @ t[mine].T).max() == pytest.approx(x[i] @ t[found.chunk_rows[i, 0]], abs=1e-6)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), correction=st.sampled_from(["csls", "inverted_softmax"]))
def test_corrections_equal_their_formulas(make: Make, seed: int, correction: Any) -> None:
    rng = np.random.default_rng(seed)
    images, chunks = make(rng.normal(size=(14, 4))), make(rng.normal(size=(9, 4)), "text", logit_scale=20.0)
    cosines = images.normalize().vectors.astype(float) @ chunks.normalize().vectors.astype(float).T
    if correction == "csls":  # formula of Conneau et al.: 2 cos - r_T - r_S
        r_s, r_t = np.sort(cosines, axis=0)[-10:].mean(axis=0), np.sort(cosines, axis=1)[:, -9:].mean(axis=1)
        score = 2 * cosines - r_t[:, None] - r_s
    else:  # softmax over the images instead of over the texts
        score = np.exp(20 * cosines) / np.exp(20 * cosines).sum(axis=0)
    results = [pair(images, chunks, report_of=range(9), k=3, correction=correction, block=b) for b in (1, 4, 100)]
    np.testing.assert_array_equal(results[0].report_rows, np.argsort(-score, axis=1)[:, :3])
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].report_rows, other.report_rows)
    picked = np.take_along_axis(cosines, results[0].report_rows, axis=1)
    np.testing.assert_allclose(results[0].similarity, picked, atol=1e-6)  # what is returned is not corrected


def test_corrections_take_images_from_hubs(make: Make) -> None:
    rng = np.random.default_rng(0)
    images = make(rng.normal(size=(400, 24)) + 0.3)
    chunks = make(rng.normal(size=(60, 24)) + np.linspace(0, 1, 60)[:, None], "text")  # the later, the more of a hub
    loads = {
        c: np.bincount(pair(images, chunks, report_of=range(60), correction=c).report_rows[:, 0], minlength=60)
        for c in ("none", "csls", "inverted_softmax")
    }
    assert loads["csls"][-20:].sum() < loads["none"][-20:].sum()
    assert loads["inverted_softmax"][-20:].sum() < loads["none"][-20:].sum()


@given(seed=st.integers(0, 10_000), correction=st.sampled_from(["none", "csls", "inverted_softmax"]))
@settings(max_examples=15)
def test_permuting_the_corpus_permutes_the_rows(make: Make, seed: int, correction: Any) -> None:
    rng = np.random.default_rng(seed)
    images, text = make(rng.normal(size=(20, 6))), rng.normal(size=(30, 6))
    report_of = np.sort(rng.integers(0, 12, size=30))
    base = pair(images, make(text, "text"), report_of=report_of, k=2, correction=correction)
    new_number = rng.permutation(12)
    order = rng.permutation(30)
    moved = pair(images, make(text[order], "text"), report_of=new_number[report_of[order]], k=2, correction=correction)
    np.testing.assert_array_equal(new_number[base.report_rows], moved.report_rows)
    np.testing.assert_array_equal(base.chunk_rows, order[moved.chunk_rows])
    np.testing.assert_array_equal(base.similarity, moved.similarity)


def test_duplicates_go_to_the_lowest_row(make: Make) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(300, 16))
    text = np.vstack([base, base, base])[rng.permutation(900)]
    images = make(rng.normal(size=(50, 16)))
    first = {row.tobytes(): i for i, row in reversed(list(enumerate(make(text).vectors)))}
    for correction in ("none", "csls", "inverted_softmax"):
        found = pair(images, make(text, "text"), report_of=range(900), correction=correction, block=77)
        for row in found.report_rows[:, 0]:
            assert first[make(text).vectors[row].tobytes()] == row


def test_scaling_vectors_changes_nothing(make: Make) -> None:
    rng = np.random.default_rng(1)
    image, text = rng.normal(size=(30, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    base = pair(make(image), make(text, "text"), report_of=range(40), k=3)
    for c in (0.25, 3.7, 1e3):
        same = pair(make(image * np.float32(c)), make(text * np.float32(c), "text"), report_of=range(40), k=3)
        np.testing.assert_array_equal(base.report_rows, same.report_rows)
        np.testing.assert_allclose(base.similarity, same.similarity, atol=1e-6)


def test_a_text_that_is_worse_for_all_changes_nothing(make: Make) -> None:
    rng = np.random.default_rng(2)
    image, text = rng.normal(size=(30, 8)) + 4, rng.normal(size=(10, 8)) + 4
    base = pair(make(image), make(text, "text"), report_of=range(10), k=3)
    worse = make(np.vstack([text, -np.ones(8)]), "text")
    assert_same(base, pair(make(image), worse, report_of=range(11), k=3))


def assert_same(one: Pairing, other: Pairing) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        np.testing.assert_array_equal(a, b, err_msg=field.name)


def test_one_chunk_a_report_is_no_chunking(make: Make) -> None:
    rng = np.random.default_rng(3)
    images, chunks = make(rng.normal(size=(20, 8))), make(rng.normal(size=(15, 8)), "text")
    results = [pair(images, chunks, report_of=range(15), aggregate=a) for a in ("max", "mean", "top_mean")]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    of = np.repeat(np.arange(5), 3)
    best = pair(images, chunks, report_of=of, aggregate="max")
    for part in range(3):  # the best chunk is at least as near as any single one
        single = pair(images, chunks.select(np.arange(15) % 3 == part), report_of=range(5))
        assert (best.best_similarity >= single.best_similarity).all()
    np.testing.assert_array_equal(
        pair(images, chunks, report_of=of, aggregate="top_mean").report_rows,
        pair(images, chunks, report_of=of, aggregate="mean").report_rows,  # three chunks each
    )


def test_one_image_and_one_text(make: Make) -> None:
    found = pair(make([[1.0, 1.0]]), make([[1.0, 0.0]], "text"), report_of=[0], k=2)
    assert found.report_rows.tolist() == [[0, -1]]
    assert found.similarity[0, 0] == pytest.approx(np.sqrt(0.5))
    assert np.isnan(found.margin[0])
    assert found.paired.tolist() == [True]


def test_no_label_enters(make: Make) -> None:
    for function in (pair, null_similarity, similarity_of, shuffled_reports):
        assert not [name for name in inspect.signature(function).parameters if "label" in name]
    assert ".labels" not in inspect.getsource(module)
    rng = np.random.default_rng(4)
    image, text = rng.normal(size=(60, 6)), make(rng.normal(size=(9, 6)), "text")
    labels = tuple(rng.integers(0, 3, 60).tolist())
    results = [
        pair(make(image, labels={"y": y}), text, report_of=range(9), min_similarity="auto")
        for y in (labels, labels[::-1])
    ]
    assert_same(*results)


def test_the_least_similarity(make: Make) -> None:
    rng = np.random.default_rng(5)
    images, chunks = make(rng.normal(size=(50, 6))), make(rng.normal(size=(20, 6)), "text")
    free = pair(images, chunks, report_of=range(20), k=3)
    least = float(np.median(free.similarity))
    for correction in ("none", "csls"):
        gated = pair(images, chunks, report_of=range(20), k=3, min_similarity=least, correction=correction)
        free = pair(images, chunks, report_of=range(20), k=3, correction=correction)
        assert gated.min_similarity == least
        there = gated.report_rows >= 0
        assert (gated.similarity[there] >= np.float32(least)).all()
        assert np.isnan(gated.similarity[~there]).all()
        assert (gated.chunk_rows[~there] == -1).all()
        assert (np.diff(there.astype(int), axis=1) <= 0).all(), "reports that are left come first"
        for i in range(50):
            kept = free.report_rows[i][free.similarity[i] >= np.float32(least)]
            np.testing.assert_array_equal(gated.report_rows[i][there[i]], kept)
        np.testing.assert_array_equal(gated.best_similarity, free.best_similarity)
        np.testing.assert_array_equal(gated.margin, free.margin)


@pytest.mark.parametrize("least", [0.0, 0.5, 1.0])
def test_a_similarity_that_just_reaches_the_least_one_pairs(make: Make, least: float) -> None:
    images = make(np.array([[1.0, 0.0, 0.0], [least, np.sqrt(1 - least**2), 0.0]]))
    found = pair(images, make(np.array([[2.0, 0.0, 0.0]]), "text"), report_of=[0], min_similarity=least)
    assert found.similarity[1, 0] == np.float32(least)
    assert found.paired.all()


def test_auto_keeps_what_is_matched_and_drops_what_shows_nothing(make: Make) -> None:
    rng = np.random.default_rng(6)
    topics = rng.normal(size=(6, 32))
    text = np.repeat(topics, 10, axis=0) + 0.5 * rng.normal(size=(60, 32))
    shown = topics[rng.integers(0, 6, 300)] + 0.5 * rng.normal(size=(300, 32))
    nothing = rng.normal(size=(100, 32))
    chunks = make(text, "text")
    found = pair(make(np.vstack([shown, nothing])), chunks, report_of=range(60), min_similarity="auto")
    assert found.paired[:300].mean() > 0.95
    assert found.paired[300:].mean() < 0.25
    noise = pair(make(rng.normal(size=(400, 32))), chunks, report_of=range(60), min_similarity="auto")
    assert 0.35 < noise.paired.mean() < 0.65  # a half is meant
    assert noise.min_similarity is not None
    null = null_similarity(make(rng.normal(size=(400, 32))), chunks, report_of=range(60), block=7)
    assert null.shape == (400,)
    with pytest.raises(InputError, match="too few"):
        pair(make(nothing[:20]), chunks, report_of=range(60), min_similarity="auto")


def test_a_random_assignment(make: Make) -> None:
    rng = np.random.default_rng(7)
    images, chunks = make(rng.normal(size=(80, 6))), make(rng.normal(size=(30, 6)), "text")
    of = np.repeat(np.arange(10), 3)
    found = pair(images, chunks, report_of=of, aggregate="mean", min_similarity=0.2)
    again = similarity_of(images, chunks, found.report_rows[:, 0], report_of=of, aggregate="mean")
    np.testing.assert_array_equal(again, found.similarity[:, 0])
    mixed = shuffled_reports(found, seed=1)
    assert sorted(mixed) == sorted(found.report_rows[:, 0])
    assert ((mixed >= 0) == found.paired).all()
    assert (mixed != found.report_rows[:, 0]).any()
    worse = similarity_of(images, chunks, mixed, report_of=of, aggregate="mean")
    assert (worse[found.paired] <= found.best_similarity[found.paired]).all()
    with pytest.raises(InputError, match="no chunk"):
        similarity_of(images, chunks, np.full(80, 10), report_of=of)


def test_refusals(make: Make) -> None:
    images, chunks = make(np.eye(3)), make(np.eye(3), "text")
    of = [0, 1, 2]
    with pytest.raises(SpaceMismatch):
        pair(images, make(np.eye(3), "text", name="other"), report_of=of)
    with pytest.raises(InputError, match="expected images and texts"):
        pair(chunks, chunks, report_of=of)
    with pytest.raises(InputError, match="nothing to pair: 0 images"):
        pair(images.select([]), chunks, report_of=of)
    with pytest.raises(InputError, match="nothing to pair: 3 images, 0 chunks"):
        pair(images, chunks.select([]), report_of=[])
    for wrong in ([0, 1], [0, 1, -1], [0.0, 1.0, 2.0]):
        with pytest.raises(InputError, match="report_of"):
            pair(images, chunks, report_of=wrong)
    with pytest.raises(InputError, match="k must be"):
        pair(images, chunks, report_of=of, k=0)
    with pytest.raises(InputError, match="block must be"):
        pair(images, chunks, report_of=of, block=0)
    with pytest.raises(UnknownName, match="top_mean"):
        pair(images, chunks, report_of=of, aggregate="topmean")
    with pytest.raises(UnknownName, match="csls"):
        pair(images, chunks, report_of=of, correction="cls")
    for least in (1.5, float("nan")):
        with pytest.raises(InputError, match="between -1 and 1"):
            pair(images, chunks, report_of=of, min_similarity=least)
    for bad, words in ((np.nan, "not finite"), (0.0, "all zero")):
        broken = np.eye(3)
        broken[1, 1] = bad
        with pytest.raises(InputError, match=f"image embeddings are {words}"):
            pair(make(broken), chunks, report_of=of)
        with pytest.raises(InputError, match=f"report embeddings are {words}"):
            pair(images, make(broken, "text"), report_of=of)


def test_memory_is_bounded(make: Make) -> None:
    rng = np.random.default_rng(8)
    images, chunks = make(rng.normal(size=(6000, 16))), make(rng.normal(size=(6000, 16)), "text")
    tracemalloc.start()
    pair(images, chunks, report_of=range(6000), block=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # all similarities at once would take 144 MB
