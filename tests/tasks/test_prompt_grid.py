"""Grids of prompts: what can be chosen, how it is named, and that every score is the one of the metric itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError, SpaceMismatch
from chiasm.metrics import classification
from chiasm.tasks.prompt_grid import (
    ALL_CLASSES,
    PromptGrid,
    chance_of,
    majority_of,
    make_problems,
    statistic_of,
    truth_of,
)
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.types import Embeddings, Space

SPACE = Space("toy", "abc", "def", 12)


def embed_text(texts: list[str]) -> Embeddings:
    rows = [np.random.default_rng(list(t.encode())).normal(size=12) for t in texts]
    return Embeddings(np.asarray(rows), tuple(texts), SPACE, "text", normalized=False, logit_scale=10.0)


def images(n: int = 20, seed: int = 0) -> Embeddings:
    rows = np.random.default_rng(seed).normal(size=(n, 12))
    return Embeddings(rows, tuple(map(str, range(n))), SPACE, "image", normalized=False)


def problems_of(grid: PromptGrid, mode: Any = "multi") -> Any:
    return make_problems(images(), grid.embed(embed_text), mode=mode)


def test_every_text_is_embedded_once() -> None:
    asked: list[str] = []

    def counting(texts: list[str]) -> Embeddings:
        asked.extend(texts)
        return embed_text(texts)

    grid = PromptGrid.from_templates({"a": ["x", "y"], "b": ["x"]}, ["{}", "see {}"], pairs=True)
    grid.embed(counting)
    assert len(asked) == len(set(asked)) == 8


def test_choices_are_counted_and_named() -> None:
    (first, second) = problems_of(PromptGrid.from_templates({"a": ["x", "y"], "b": ["z"]}, ["{}", "see {}", "no? {}"]))
    assert (first.size, second.size) == (7 * 3, 7)
    pick = (frozenset([2, 0]), frozenset([1]))
    assert first.chosen(pick) == {"a": (("{}", "no? {}"), ("y",))}
    assert first.everything == (frozenset([0, 1, 2]), frozenset([0, 1]))


def test_classes_with_templates_of_their_own_choose_each_for_itself() -> None:
    prompts = PromptSet((LabelPrompts("a", ("x", "y")), LabelPrompts("b", ("u", "v", "w"))))
    (problem,) = problems_of(PromptGrid.from_prompts(prompts), "single")
    assert problem.name == ALL_CLASSES
    assert [(a.kind, a.label, len(a.options)) for a in problem.axes] == [("template", "a", 2), ("template", "b", 3)]
    assert problem.size == 3 * 7
    scores = problem.scores((frozenset([1]), frozenset([0, 2])))
    assert scores.shape == (20, 2)
    vectors = images().normalize().vectors
    expected = vectors @ embed_text(["y"]).normalize().vectors[0]
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-6)


def test_negative_prompts_play_no_part_between_classes() -> None:
    with_pairs = PromptSet((LabelPrompts("a", ("x",), ("not x",)), LabelPrompts("b", ("u",), ("not u",))))
    without = PromptSet((LabelPrompts("a", ("x",)), LabelPrompts("b", ("u",))))
    found = [problems_of(PromptGrid.from_prompts(p), "single")[0] for p in (with_pairs, without)]
    pick = (frozenset([0]), frozenset([0]))
    np.testing.assert_array_equal(found[0].scores(pick), found[1].scores(pick))


def test_shared_negatives_stay_whatever_is_chosen() -> None:
    prompts = PromptSet((LabelPrompts("a", ("x", "y", "z"), ("n", "m")),))
    (problem,) = problems_of(PromptGrid.from_prompts(prompts))
    one, two = (problem.scores((frozenset([k]), frozenset([0])))[:, 0] for k in (0, 1))
    vectors = images().normalize().vectors.astype(float)
    x, y = embed_text(["x", "y"]).normalize().vectors
    np.testing.assert_allclose(one - two, vectors @ (x - y), atol=1e-6)


def test_prompts_that_cancel_out_are_refused() -> None:
    def opposed(texts: list[str]) -> Embeddings:
        rows = np.stack([np.eye(12)[0] * (1 if t == "x" else -1) for t in texts])
        return Embeddings(rows, tuple(texts), SPACE, "text")

    grid = PromptGrid.from_prompts(PromptSet((LabelPrompts("a", ("x", "y")),)))
    (problem,) = make_problems(images(), grid.embed(opposed), mode="multi")
    with pytest.raises(InputError, match="`a` cancel out"):
        problem.scores(problem.everything)


def test_the_two_spaces_must_be_one() -> None:
    grid = PromptGrid.from_templates(["a"]).embed(embed_text)
    with pytest.raises(SpaceMismatch):
        make_problems(dataclasses.replace(images(), space=dataclasses.replace(SPACE, encoder="b")), grid, mode="multi")


BINARY = st.lists(st.sampled_from([0.0, 1.0, np.nan]), min_size=12, max_size=40)


@given(BINARY, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_scores_of_a_label_are_those_of_the_metric(truth: list[float], seed: int) -> None:
    known = np.asarray(truth)
    if not {0.0, 1.0} <= set(known[~np.isnan(known)].tolist()):
        return
    answers = np.random.default_rng(seed).normal(size=len(known)).round(1)
    ones = np.ones((1, len(known)))
    assert statistic_of("auroc", known, answers)(ones)[0] == pytest.approx(classification.auroc(known, answers))
    assert statistic_of("auprc", known, answers)(ones)[0] == pytest.approx(classification.auprc(known, answers))
    assert chance_of("auroc", known) == 0.5
    assert chance_of("auprc", known) == pytest.approx(np.nanmean(known))


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=6, max_size=30), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_scores_of_classes_are_those_of_the_metric(truth: list[float], seed: int) -> None:
    known = np.asarray(truth)
    answers = np.random.default_rng(seed).integers(0, 3, len(known)).astype(float)
    ones = np.ones((1, len(known)))
    right, said = known.astype(int).tolist(), answers.astype(int).tolist()
    assert statistic_of("accuracy", known, answers)(ones)[0] == pytest.approx(classification.accuracy(right, said))
    assert statistic_of("balanced_accuracy", known, answers)(ones)[0] == pytest.approx(
        classification.balanced_accuracy(right, said)
    )
    assert majority_of("accuracy", known) == pytest.approx(classification.majority_baseline(right))
    assert majority_of("balanced_accuracy", known) is None
    assert chance_of("accuracy", known) == pytest.approx(1 / len(set(right)))


def test_truth_is_read_for_labels_and_for_classes() -> None:
    (label, _) = problems_of(PromptGrid.from_templates(["a", "b"]))
    np.testing.assert_array_equal(truth_of(label, {"a": [1, 0, None], "b": [0, 0, 0]}, 3), [1, 0, np.nan])
    np.testing.assert_array_equal(truth_of(label, ["a", "b", None], 3), [1, 0, np.nan])
    (classes,) = problems_of(PromptGrid.from_templates(["a", "b"]), "single")
    np.testing.assert_array_equal(truth_of(classes, ["b", None, "a"], 3), [1, np.nan, 0])
    with pytest.raises(InputError, match="0, 1 or missing"):
        truth_of(label, {"a": [2, 0, 1]}, 3)
