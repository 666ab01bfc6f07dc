"""Four directions of search: what is right, what may not be found, and what a number is compared with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from chiasm.errors import InputError, UnknownName
from chiasm.evaluate.page import render_page
from chiasm.evaluate.retrieval_page import make_retrieval_page
from chiasm.evaluate.run_card import make_run_card
from chiasm.evaluate.search_relevance import relevant_by_labels, same_keys
from chiasm.evaluate.search_scores import NoRightAnswer, recall_curve, score_search
from chiasm.types import Embeddings, Space


def rows(
    vectors: Any, modality: Any = "image", *, labels: Any = None, patients: Any = None, texts: Any = None
) -> Embeddings:
    values = np.asarray(vectors, dtype=np.float32)
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    n = len(values)
    return Embeddings(
        values, tuple(f"r{i}" for i in range(n)), Space("t", "w", "p", values.shape[1]), modality,
        labels=labels or {}, patients=patients, texts=texts,
    )  # fmt: skip


def both(images: Embeddings, texts: Embeddings | None = None) -> Any:
    return {"image": images, "text": texts if texts is not None else images}.__getitem__


def test_the_same_class_without_oneself_and_ones_patient() -> None:
    vectors = np.eye(4)[[0, 0, 0, 1, 1]] + 0.01 * np.eye(5, 4)
    images = rows(vectors, labels={"kind": ("a", "a", "a", "b", "b")}, patients=("p", "p", "q", "r", "r"))
    found = score_search(both(images), directions=["image_to_image"], relevant_by=["kind"], n_resamples=20)
    scores = found.directions["image_to_image"]
    assert scores.exclude == "patient"
    assert (scores.n_queries, scores.n_unanswerable) == (3, 2), "both of class b are one patient"
    assert scores.recall_at_1.value == scores.average_precision.value == scores.ndcg.value == 1
    # Queries p, p: 3 rows of others, 1 right; q: 4 rows, 2 right.
    assert scores.recall_at_1.chance == pytest.approx((1 / 3 + 1 / 3 + 2 / 4) / 3)
    itself = score_search(both(images), directions=["image_to_image"], relevant_by=["kind"], exclude="self")
    assert itself.directions["image_to_image"].n_queries == 5
    json.dumps(found.to_dict(), allow_nan=False)


@settings(deadline=None, max_examples=25)
@given(st.integers(4, 14), st.integers(0, 10_000))
def test_average_precision_of_vectors_equals_scikit_learn(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = rows(rng.normal(size=(n, 6)), labels={"k": tuple(rng.choice(["x", "y"], n).tolist())})
    try:
        found = score_search(both(images), directions=["image_to_image"], relevant_by=["k"], n_resamples=5)
    except NoRightAnswer:
        return
    similar, kinds = images.vectors @ images.vectors.T, np.array(images.labels["k"])
    expected = []
    for i in range(n):
        others = np.arange(n) != i
        right = kinds[others] == kinds[i]
        if right.any():
            expected.append(average_precision_score(right, similar[i, others]))
    assert found.directions["image_to_image"].average_precision.value == pytest.approx(np.mean(expected), abs=1e-6)


def test_shared_findings_are_graded() -> None:
    labels = {"a": (1, 1, 0, 0, None), "b": (1, 0, 0, 0, 1)}
    images = rows(np.eye(5), labels=labels)
    found = relevant_by_labels(images, images, ["a", "b"], exclude="self")
    gains = found.gains(np.arange(5))
    assert found.graded
    np.testing.assert_allclose(gains[0], [0, 0.5, 0, 0, 0])
    np.testing.assert_allclose(gains[2], [0, 0, 0, 1, 0], err_msg="two normal films are alike")
    assert gains[4].sum() == gains[:, 4].sum() == 0, "an unlabelled row neither searches nor is found"
    joined = rows(np.eye(3), labels={"all": ("x|y", "y", "z")})
    np.testing.assert_allclose(relevant_by_labels(joined, joined, ["all"]).gains(np.arange(3))[0], [1, 0.5, 0])


def test_a_collapsed_model_scores_chance_everywhere() -> None:
    kinds = ("a", "b", "c") * 7
    images = rows(np.eye(3)[[0] * 21], labels={"k": kinds}, texts=kinds)
    texts = rows(np.eye(3)[[0] * 21], "text", labels={"k": kinds}, texts=kinds)
    found = score_search(both(images, texts), relevant_by=["k"], n_resamples=5)
    assert len(found.directions) == 4
    for scores in found.directions.values():
        for name in ("average_precision", "average_precision_at_r", "ndcg"):
            value = getattr(scores, name)
            assert value.value == pytest.approx(value.chance)
            assert 0 < scores.constant[name] < 1


def test_the_same_text_says_nothing_of_text_to_text() -> None:
    texts = rows(np.eye(4), "text", texts=("x", "X ", "y", "y"), patients=("p", "q", "q", "p"))
    images = rows(np.eye(4), patients=("p", "q", "q", "p"))
    assert same_keys(images, texts, ["text"])["caption"][0] == ["x", "x", "y", "y"], "an image has its pair's text"
    images = rows(np.eye(4), patients=("p", "q", "q", "p"), texts=texts.texts)
    found = score_search(both(images, texts), n_resamples=5)
    assert set(found.directions) == {"text_to_image", "image_to_text", "image_to_image"}
    assert "own row" in found.left_out["text_to_text"]
    assert found.directions["image_to_image"].n_queries == 4
    by_case = score_search(both(images, texts), same=["case"], n_resamples=5)
    assert by_case.directions["text_to_text"].n_queries == 4
    only = score_search(both(images, texts), same=["text"], n_resamples=5)
    assert only.left_out["text_to_text"] == "the same text always finds itself"


def test_wrong_words_are_named() -> None:
    images = rows(np.eye(3), labels={"k": ("a", "b", "c"), "n": (0, 1, 2)})
    with pytest.raises(UnknownName, match="direction"):
        score_search(both(images), directions=["up"])
    with pytest.raises(UnknownName, match="label column"):
        score_search(both(images), relevant_by=["kk"])
    with pytest.raises(UnknownName, match="sameness"):
        score_search(both(images), same=["colour"])
    with pytest.raises(UnknownName, match="exclude"):
        score_search(both(images), exclude="me")
    with pytest.raises(InputError, match="not 0, 1 or blank"):
        score_search(both(images), relevant_by=["k", "n"])
    with pytest.raises(NoRightAnswer):
        score_search(both(images), directions=["image_to_image"], relevant_by=["k"])


def test_the_curve_and_the_page() -> None:
    depths, recall = recall_curve(np.array([1.0, 3.0, 10.0]), 10)
    assert (depths[0], depths[-1], recall[-1]) == (1, 10, 1)
    assert (np.diff(recall) >= 0).all()
    texts = rows(np.eye(6), "text", texts=tuple(f"secret {i}" for i in range(6)))
    images = rows(np.eye(6)[::-1])
    scores = score_search(both(images, texts), n_resamples=5)
    card = make_run_card("chiasm retrieval", {"image": images}, seed=0)
    page = render_page(make_retrieval_page(scores, both(images, texts), card))
    assert "secret" not in page
    assert "not a medical device" in page
    shown = render_page(make_retrieval_page(scores, both(images, texts), card, examples=2))
    assert "secret" in shown
    assert "patient data" in shown
