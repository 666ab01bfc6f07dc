"""Zero-shot: the numbers follow the published protocol, spaces never mix, damaged vectors are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from chiasm.errors import InputError, SpaceMismatch, UnknownName
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.tasks.zero_shot import build_classifier, choose_logit_scale, classify, sigmoid, softmax

Make = Callable[..., Any]
PAIRS = PromptSet(
    (LabelPrompts("a", ("a1", "a2"), ("not a",)), LabelPrompts("b", ("b1",), ("not b", "b absent")))
)  # fmt: skip
RNG = np.random.default_rng(3)
DIRECTIONS = {text: RNG.normal(size=6) for text in PAIRS.texts()}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_ensemble_is_the_mean_of_unit_vectors(embedder: Make) -> None:
    classifier = build_classifier(PAIRS, embedder(DIRECTIONS, logit_scale=20.0))
    expected = unit(unit(DIRECTIONS["a1"]) + unit(DIRECTIONS["a2"]))
    np.testing.assert_allclose(classifier.positive[0], expected, rtol=1e-6)
    assert classifier.negative is not None
    np.testing.assert_allclose(
        classifier.negative[1], unit(unit(DIRECTIONS["not b"]) + unit(DIRECTIONS["b absent"])), rtol=1e-6
    )
    raw_mean = unit(DIRECTIONS["a1"] + DIRECTIONS["a2"])  # the trap: averaging before normalising
    assert np.abs(classifier.positive[0] - raw_mean).max() > 1e-3
    assert classifier.labels == ("a", "b")
    assert classifier.logit_scale == 20.0


def test_single_label_numbers(make: Make, embedder: Make) -> None:
    classifier = build_classifier(PAIRS, embedder(DIRECTIONS, logit_scale=20.0))
    images = make(RNG.normal(size=(5, 6)), patients=("p", "p", None, "q", "q"), paths=tuple("abcde"))
    result = classify(images, classifier)
    cosines = unit(images.vectors) @ classifier.positive.T
    np.testing.assert_allclose(result.cosines, cosines, atol=1e-6)
    np.testing.assert_allclose(result.logits, 20 * cosines, atol=1e-4)
    np.testing.assert_allclose(result.probabilities, softmax(20 * cosines.astype(np.float64)), atol=1e-5)
    np.testing.assert_allclose(result.probabilities.sum(axis=1), 1)
    assert result.groups == ("p", "p", "r2", "q", "q")
    assert result.predicted == tuple("ab"[k] for k in cosines.argmax(axis=1))
    assert result.logit_scale_source == "model"
    assert classify(images.normalize(), classifier).probabilities == pytest.approx(result.probabilities, abs=1e-5)


def test_pairs(make: Make, embedder: Make) -> None:
    classifier = build_classifier(PAIRS, embedder(DIRECTIONS))
    images = make(RNG.normal(size=(4, 6)))
    result = classify(images, classifier, mode="multi", logit_scale=10.0)
    assert result.negative_cosines is not None
    both = np.stack([result.cosines, result.negative_cosines], axis=-1).astype(np.float64)
    np.testing.assert_allclose(result.probabilities, softmax(10 * both)[..., 0], atol=1e-12)
    assert result.activation == "pair"
    assert result.logit_scale_source == "argument"
    np.testing.assert_array_equal(result.scores, result.logits)


def test_a_model_without_scale_uses_the_stated_fallback(make: Make, embedder: Make) -> None:
    result = classify(make(np.eye(6)), build_classifier(PAIRS, embedder(DIRECTIONS)))
    assert (result.logit_scale, result.logit_scale_source) == (100.0, "fallback")
    assert result.to_dict()["logit_scale_source"] == "fallback"


def test_sigmoid_models(make: Make, embedder: Make) -> None:
    prompts = PromptSet.from_names(["a1", "b1"], "{}")
    classifier = build_classifier(prompts, embedder(DIRECTIONS, logit_scale=10.0, logit_bias=-5.0))
    images = make(RNG.normal(size=(4, 6)))
    multi = classify(images, classifier, mode="multi")
    assert multi.activation == "sigmoid"
    np.testing.assert_allclose(
        multi.probabilities, 1 / (1 + np.exp(-(10 * multi.cosines.astype(float) - 5))), rtol=1e-6
    )
    single = classify(images, classifier)
    np.testing.assert_allclose(single.probabilities, softmax(10 * single.cosines.astype(float)), rtol=1e-6)


def test_multi_label_without_negatives_is_refused(make: Make, embedder: Make) -> None:
    prompts = PromptSet((PAIRS.labels[0], LabelPrompts("b", ("b1",))))
    classifier = build_classifier(prompts, embedder(DIRECTIONS, logit_bias=-1.0))
    with pytest.raises(InputError, match="label `b` has none"):
        classify(make(np.eye(6)), classifier, mode="multi")
    with pytest.raises(UnknownName):
        classify(make(np.eye(6)), classifier, mode="both")


def test_records_have_the_shape_of_the_pipeline(make: Make, embedder: Make) -> None:
    result = classify(make(RNG.normal(size=(3, 6))), build_classifier(PAIRS, embedder(DIRECTIONS)))
    records = result.to_records()
    assert [set(hit) for row in records for hit in row] == [{"score", "label"}] * 6
    assert all(row[0]["score"] >= row[1]["score"] for row in records)
    assert [row[0]["label"] for row in records] == list(result.predicted)
    assert [len(row) for row in result.to_records(top_k=1)] == [1, 1, 1]
    json.dumps(result.to_dict(), allow_nan=False)
    frame = result.to_frame()
    assert list(frame.columns) == ["id", "a", "b"]
    assert result.column("b") == 1
    with pytest.raises(UnknownName):
        result.column("c")


def test_foreign_and_damaged_vectors_are_refused(make: Make, embedder: Make) -> None:
    classifier = build_classifier(PAIRS, embedder(DIRECTIONS))
    with pytest.raises(SpaceMismatch, match="no meaning"):
        classify(make(np.eye(6), name="other"), classifier)
    with pytest.raises(InputError, match="needs image embeddings"):
        classify(make(np.eye(6), "text"), classifier)
    for value, problem in ((np.nan, "not finite"), (np.inf, "not finite"), (0.0, "all zero")):
        vectors = np.eye(6)
        vectors[2] = value
        with pytest.raises(InputError, match=f"1 of 6 image embeddings are {problem}"):
            classify(make(vectors), classifier)
    with pytest.raises(InputError, match="marked as normalised"):
        classify(make(3 * np.eye(6), normalized=True), classifier)
    with pytest.raises(InputError, match="cancel each other out"):
        build_classifier(PAIRS, embedder({**DIRECTIONS, "a2": -DIRECTIONS["a1"]}))
    with pytest.raises(InputError, match="gave 1 embeddings"):
        build_classifier(PAIRS, lambda texts: make(np.eye(6)[:1], "text"))
    with pytest.raises(InputError, match="embedded as text"):
        build_classifier(PAIRS, lambda texts: make(np.eye(6)[: len(texts)]))


def test_the_logit_scale_is_the_multiplier(make: Make, embedder: Make) -> None:
    assert choose_logit_scale(None, 50.0) == (50.0, "model")
    assert choose_logit_scale(50.0001, 50.0)[0] == 50.0
    with pytest.raises(InputError, match="one model"):
        choose_logit_scale(50.0, 40.0)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="positive number"):
            choose_logit_scale(None, None, bad)
    with pytest.warns(UserWarning, match="looks like its logarithm"):
        choose_logit_scale(None, float(np.log(100)))


def test_empty_input_gives_an_empty_result(make: Make, embedder: Make) -> None:
    result = classify(make(np.zeros((0, 6))), build_classifier(PAIRS, embedder(DIRECTIONS)))
    assert result.probabilities.shape == (0, 2)
    assert result.to_records() == []
    assert result.scores.shape == (0, 2)


@given(arrays(np.float64, (4, 3), elements=st.floats(-60, 60)))
def test_scores_are_the_log_odds(logits: np.ndarray) -> None:
    from chiasm.tasks.zero_shot import ZeroShotResult

    prompts = PromptSet.from_names(["a", "b", "c"], "{}")
    fields = {f.name: None for f in dataclasses.fields(ZeroShotResult)}
    result = ZeroShotResult(
        **{**fields, "logits": logits, "activation": "softmax", "labels": prompts.names}  # type: ignore[arg-type]
    )
    p = softmax(logits.astype(np.longdouble))
    expected = np.log(p) - np.log(np.stack([np.delete(p, k, axis=1).sum(axis=1) for k in range(3)], axis=1))
    np.testing.assert_allclose(result.scores, expected.astype(np.float64), rtol=1e-9, atol=1e-9)


@given(arrays(np.float64, 5, elements=st.floats(-1e4, 1e4)))
def test_sigmoid_and_softmax_never_overflow(x: np.ndarray) -> None:
    assert np.isfinite(sigmoid(x)).all()
    np.testing.assert_allclose(sigmoid(x) + sigmoid(-x), 1)
    assert softmax(x).sum() == pytest.approx(1)


@given(order=st.permutations(range(5)))
def test_rows_do_not_see_each_other(make: Make, embedder: Make, order: list[int]) -> None:
    classifier = build_classifier(PAIRS, embedder(DIRECTIONS))
    images = make(np.random.default_rng(0).normal(size=(5, 6)))
    whole = classify(images, classifier, mode="multi")
    part = classify(images.select(order), classifier, mode="multi")
    np.testing.assert_allclose(part.probabilities, whole.probabilities[order], rtol=1e-4)
    assert part.ids == tuple(whole.ids[k] for k in order)


def test_ways_that_exclude_each_other_are_not_averaged_away() -> None:
    """Left and right point in opposite directions: their mean says nothing, their log-mean-exp says "one of them"."""
    import numpy as np

    from chiasm.tasks.prompt_files import parse_prompts
    from chiasm.tasks.zero_shot import build_classifier, classify
    from chiasm.types import Embeddings, Space

    space = Space("toy", "a", "b", 3)
    directions = {"left": (1.0, 0.1, 0.0), "right": (-1.0, 0.1, 0.0), "none": (0.0, 0.0, 1.0)}

    def embed(texts: list[str]) -> Embeddings:
        rows = [directions[t.split()[0]] for t in texts]
        return Embeddings(np.array(rows), tuple(texts), space, "text", normalized=False, logit_scale=20.0)

    images = Embeddings(
        np.array([(1.0, 0, 0.2), (-1.0, 0, 0.2), (0, 0, 1.0)]), ("l", "r", "n"), space, "image", normalized=False
    )
    forms = {"any_of": [["left effusion"], ["right effusion"]], "negative": ["none"]}
    prompts = parse_prompts({"labels": {"effusion": forms}})
    assert parse_prompts(prompts.to_dict()) == prompts
    logits = classify(images, build_classifier(prompts, embed), mode="multi").logits[:, 0]
    assert min(logits[0], logits[1]) > logits[2] + 10
    flat = parse_prompts(
        {"labels": {"effusion": {"positive": ["left effusion", "right effusion"], "negative": ["none"]}}}
    )
    averaged = classify(images, build_classifier(flat, embed), mode="multi").logits[:, 0]
    assert min(averaged[:2]) < min(logits[:2]) - 5
    one = parse_prompts({"labels": {"effusion": {"any_of": [["left effusion"]], "negative": ["none"]}}})
    same = parse_prompts({"labels": {"effusion": {"positive": ["left effusion"], "negative": ["none"]}}})
    a, b = (classify(images, build_classifier(p, embed), mode="multi").logits for p in (one, same))
    np.testing.assert_allclose(a, b, rtol=1e-5)
