"""Scores of learned prompts, and the pages of prompts: what they must say, and what they must not hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from chiasm.errors import InputError, LeakageError
from chiasm.evaluate.page import render_page
from chiasm.evaluate.prompts_page import effects_page, search_page, tuning_page
from chiasm.evaluate.run_card import make_run_card
from chiasm.evaluate.tuning_scores import coop_method, score_tuning, take_shots, tuned_classifier
from chiasm.metrics.classification import auroc, balanced_accuracy
from chiasm.tasks.k_shot import draw_episodes, run_episodes
from chiasm.tasks.prompt_effects import explain_prompts
from chiasm.tasks.prompt_grid import PromptGrid
from chiasm.tasks.prompt_search import search_prompts, split_patients
from chiasm.tasks.zero_shot import classifier_of_directions, classify
from chiasm.testing import TinyEncoder
from chiasm.train.prompt_tuning import TunedPrompts
from chiasm.train.prompt_writer import TuningConfig
from chiasm.types import Embeddings, Space

SPACE = Space("toy", "abc", "def", 16)
NAMES = ("effusion", "oedema")


def embed_text(texts: list[str]) -> Embeddings:
    rows = [np.random.default_rng(list(t.encode())).normal(size=16) for t in texts]
    return Embeddings(np.asarray(rows), tuple(texts), SPACE, "text", normalized=False, logit_scale=20.0)


def images_of(n: int = 80) -> tuple[Embeddings, dict[str, list[int]]]:
    rng = np.random.default_rng(0)
    truth = {name: rng.integers(0, 2, n).tolist() for name in NAMES}
    rows = rng.normal(size=(n, 16))
    rows[:, 0] += 3 * np.asarray(truth["effusion"]) - 1.5
    patients = tuple(f"SECRET-{k // 2}" for k in range(n))
    return Embeddings(
        rows, tuple(f"id-{k}" for k in range(n)), SPACE, "image", normalized=False, patients=patients
    ), truth


def learned() -> TunedPrompts:
    positive = np.eye(16, dtype=np.float32)[:2]
    history = tuple({"train_loss": 1.0 / k, "validation_loss": 1.1 / k} for k in range(1, 4))
    return TunedPrompts(
        NAMES, NAMES, TuningConfig(mode="multi"), {}, positive, -positive, SPACE, 20.0, None, history, 2, (30, 10)
    )  # fmt: skip


def test_learned_prompts_are_scored_beside_the_plain_ones() -> None:
    images, truth = images_of()
    train, test = split_patients(images)
    vectors = PromptGrid.from_templates(NAMES, ("{}",), pairs=True).embed(embed_text)
    arms = {"learned": tuned_classifier(learned()), "plain": vectors.classifier()}
    found = score_tuning(images, arms, truth, train=train, test=test, n_resamples=200)
    result = classify(images.select(test), arms["learned"], mode="multi")
    right = np.asarray(truth["effusion"])[test]
    assert found.arms[0].per_label["effusion"].value == pytest.approx(auroc(right, result.logits[:, 0]))
    assert found.differences["plain"].value == pytest.approx(found.arms[0].whole.value - found.arms[1].whole.value)
    assert found.findings["plain"]["effusion"].p >= found.findings["plain"]["effusion"].p_raw
    with pytest.raises(LeakageError, match="1 patients taught"):
        score_tuning(images, arms, truth, train=[0], test=[1, 2, 3])


def test_classes_are_scored_by_balanced_accuracy_with_the_majority_beside() -> None:
    images, truth = images_of()
    classes = ["effusion" if t else "oedema" for t in truth["effusion"]]
    train, test = split_patients(images)
    direction = np.zeros((2, 16), np.float32)
    direction[:, 0] = (1, -1)
    arms = {
        "learned": classifier_of_directions(NAMES, direction, space=SPACE),
        "plain": PromptGrid.from_templates(NAMES, ("{}",)).embed(embed_text).classifier(),
    }
    found = score_tuning(images, arms, classes, train=train, test=test, n_resamples=200)
    predicted = classify(images.select(test), arms["learned"]).predicted
    assert found.arms[0].whole.value == pytest.approx(balanced_accuracy([classes[k] for k in test], list(predicted)))
    assert found.majority is not None
    assert found.p_values["plain"] < 0.05
    with pytest.raises(InputError, match="no test row is labelled"):
        score_tuning(images, arms, [None] * 80, train=train, test=test)


def test_shots_are_of_different_patients_and_of_every_class() -> None:
    images, truth = images_of()
    classes = ["a" if t else "b" for t in truth["effusion"]]
    rows = take_shots(classes, images.groups, range(80), 5, seed=1)
    taken = [classes[k] for k in rows]
    assert (taken.count("a"), taken.count("b")) == (5, 5)
    assert len({images.groups[k] for k in rows}) == 10
    several = take_shots(truth, images.groups, range(80), 3)
    for name in NAMES:
        values = [truth[name][k] for k in several]
        assert min(values.count(0), values.count(1)) >= 3
    np.testing.assert_array_equal(rows, take_shots(classes, images.groups, range(80), 5, seed=1))
    with pytest.raises(InputError, match="fewer than 50 patients"):
        take_shots(classes, images.groups, range(80), 50)
    with pytest.raises(InputError, match="at least 1"):
        take_shots(classes, images.groups, range(80), 0)


def test_learned_prompts_are_a_method_of_the_k_shot_protocol() -> None:
    encoder = TinyEncoder()
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 60)
    rows = rng.normal(size=(60, encoder.dim)) + 4 * (2 * truth[:, None] - 1) * np.eye(encoder.dim)[0]
    ids = tuple(map(str, range(60)))
    images = Embeddings(rows, ids, encoder.space, "image", normalized=False, logit_scale=encoder.logit_scale)
    draws = draw_episodes(truth.tolist(), ids, np.arange(60) >= 40, shots=(4,), seeds=(0, 1))
    method = coop_method(
        encoder,
        images,
        draws,
        spoken=("healthy", "ill"),
        config=TuningConfig(epochs=20, learning_rate=0.02, class_specific=True),
    )
    answers = run_episodes(draws, {"coop": method})
    assert [a.probabilities.shape for a in answers] == [(20, 2)] * 2
    assert all(0 <= a.chosen["epoch"] <= 20 for a in answers)
    right = truth[draws.episodes[0].test]
    assert auroc(right, answers[0].probabilities[:, 1]) > 0.8
    with pytest.raises(InputError, match="1 names for 2 classes"):
        coop_method(encoder, images, draws, spoken=("ill",))


def test_pages_say_what_they_must_and_hold_no_patient() -> None:
    images, truth = images_of()
    train, test = split_patients(images)
    vectors = PromptGrid.from_templates(NAMES, ("{}", "a film with {}"), pairs=True).embed(embed_text)
    card = make_run_card("chiasm prompts", {"images": images}, seed=0)
    effects = explain_prompts(images, vectors, truth, n_resamples=20)
    search = search_prompts(images, vectors, truth, choose=train, test=test, redraws=4, n_resamples=20)
    arms = {"learned": tuned_classifier(learned()), "plain": vectors.classifier()}
    scores = score_tuning(images, arms, truth, train=train, test=test, n_resamples=20)
    pages = [
        effects_page(effects, card),
        effects_page(explain_prompts(images, vectors), card),
        search_page(search, card),
        tuning_page(learned(), scores, {"positive": [["no"]]}, card),
    ]
    for page in pages:
        text = render_page(page)
        assert "not a medical device" in text
        assert "Run card" in text
        assert "SECRET" not in text
        assert "id-1" not in text
    verdict = render_page(pages[2])
    assert ("No gain is shown" in verdict) == (search.difference.low <= 0 <= search.difference.high)
    harmed = dataclasses.replace(search, difference=dataclasses.replace(search.difference, low=-0.2, high=-0.1))
    assert "The search harms" in render_page(search_page(harmed, card))
