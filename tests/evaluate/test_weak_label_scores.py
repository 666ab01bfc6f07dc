"""Weak labels beside given ones, probes on either, and the page."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from chiasm.errors import InputError, LeakageError
from chiasm.evaluate.page import render_page
from chiasm.evaluate.weak_label_page import make_weak_label_page, report_card
from chiasm.evaluate.weak_label_scores import given_labels, score_weak_labels
from chiasm.evaluate.weak_probe import compare_probes, draw_test
from chiasm.tasks.weak_labels import label_texts
from chiasm.tasks.weak_rules import LabelRules
from chiasm.types import Embeddings, Sample, Space

RULES = LabelRules.load()
TEXTS = [
    "Small effusion.",
    "No effusion.",
    "Possible effusion.",
    "Cardiomegaly.",
    "Clear lungs.",
    "Effusion and nodule.",
]


def test_columns_of_other_tables_are_found_by_name() -> None:
    labels: dict[str, list[Any]] = {
        "Effusion": [1, 0, None, "1", "0", "-1"], "Nodule": [0] * 6, "Mass": [0, 0, 0, 0, 0, 1], "Age": [50] * 6,
        "mesh": ["Pleural Effusion/right", "normal", "Thickening/pleura/mild|Cardiomegaly", None, "Thickening/bronchial", "No Indexing"],
    }  # fmt: skip
    found = given_labels(labels, RULES)
    assert set(found) == {"pleural_effusion", "lung_lesion"}
    np.testing.assert_array_equal(found["pleural_effusion"], [1, 0, np.nan, 1, 0, np.nan])
    np.testing.assert_array_equal(found["lung_lesion"], [0, 0, 0, 0, 0, 1], "a nodule or a mass")
    terms = given_labels(labels, RULES, "mesh")
    np.testing.assert_array_equal(terms["pleural_other"], [0, 0, 1, np.nan, 0, np.nan])
    np.testing.assert_array_equal(terms["no_finding"], [0, 1, 0, np.nan, 0, np.nan])
    np.testing.assert_array_equal(terms["cardiomegaly"], [0, 0, 1, np.nan, 0, np.nan])
    with pytest.raises(InputError, match="no label column"):
        given_labels(labels, RULES, "mash")
    with pytest.raises(InputError, match="no column of 0 and 1"):
        given_labels({"Age": [1, 2]}, RULES)
    with pytest.raises(InputError, match="no term"):
        given_labels({"t": ["x", "y"]}, RULES, "t")


def test_agreement_by_hand() -> None:
    weak = label_texts(TEXTS, RULES)
    truth = {"pleural_effusion": np.array([1.0, 0, 1, 1, 0, 0])}
    for uncertain, given in (("ignore", 5), ("positive", 6), ("negative", 6)):
        scores = score_weak_labels(weak, truth, uncertain=uncertain, n_resamples=20)  # type: ignore[arg-type]
        assert scores.findings["pleural_effusion"].n == given
    scores = score_weak_labels(weak, truth, uncertain="positive", n_resamples=20)
    found = scores.findings["pleural_effusion"]
    assert (found.precision.value, found.recall.value) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert scores.kinds["pleural_effusion"]["given 1"] == {"stated": 1, "denied": 0, "doubted": 1, "not named": 1}
    assert scores.macro_f1 == pytest.approx(2 / 3)
    json.dumps(scores.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="no finding"):
        score_weak_labels(weak, {"other": truth["pleural_effusion"]})


def pictures(n: int, seed: int = 0) -> tuple[Embeddings, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.4).astype(float)
    vectors = rng.normal(size=(n, 8)) + 1.6 * truth[:, None] * np.eye(8)[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = tuple(str(i) for i in range(n))
    patients = tuple(f"p{i // 2}" for i in range(n))
    return Embeddings(vectors.astype(np.float32), ids, Space("t", "w", "p", 8), "image", patients=patients), truth


def test_a_probe_on_weak_labels() -> None:
    images, truth = pictures(400)
    same = compare_probes(images, {"a": truth}, {"a": truth}, n_resamples=50).findings["a"]
    assert same.difference.value == 0
    assert same.weak.value > 0.75
    noise = np.random.default_rng(1).permutation(truth)
    noisy = compare_probes(images, {"a": noise}, {"a": truth}, n_resamples=100).findings["a"]
    assert noisy.weak.value < noisy.given.value
    assert noisy.difference.high < 0
    half = np.where(np.arange(400) % 2, truth, np.nan)
    fewer = compare_probes(images, {"a": half}, {"a": truth}, n_resamples=20).findings["a"]
    assert fewer.trained_weak < fewer.trained_given
    assert fewer.weak.n == fewer.given.n
    json.dumps(fewer.to_dict(), allow_nan=False)


def test_weak_labels_of_test_rows_are_never_used() -> None:
    images, truth = pictures(200)
    test = draw_test(images.groups, 3)
    changed = np.where(test, 1 - truth, truth)
    one = compare_probes(images, {"a": truth}, {"a": truth}, test=test, n_resamples=10)
    other = compare_probes(images, {"a": changed}, {"a": truth}, test=test, n_resamples=10)
    assert one.to_dict() == other.to_dict()


def test_patients_stay_on_one_side() -> None:
    images, truth = pictures(40)
    drawn = draw_test(images.groups, 0)
    assert all(drawn[i] == drawn[i + 1] for i in range(0, 40, 2))
    with pytest.raises(LeakageError):
        compare_probes(images, {"a": truth}, {"a": truth}, test=np.arange(40) % 2 == 0)
    rare = np.zeros(40)
    rare[0] = 1
    with pytest.raises(InputError, match="enough patients"):
        compare_probes(images, {"a": rare}, {"a": rare})
    with pytest.raises(InputError, match="3 and 40 labels"):
        compare_probes(images, {"a": truth[:3]}, {"a": truth})


def test_the_page_shows_texts_only_when_asked() -> None:
    weak = label_texts(TEXTS, RULES)
    scores = score_weak_labels(weak, {"pleural_effusion": np.array([1.0, 0, 1, 1, 0, 0])}, n_resamples=10)
    images, truth = pictures(200)
    probes = compare_probes(images, {"a": truth}, {"a": truth}, n_resamples=10)
    card = report_card(weak, [Sample(id=str(i), text=t) for i, t in enumerate(TEXTS)], {}, seed=0, seconds=0.1)
    page = render_page(make_weak_label_page(weak, card, scores=scores, probes=probes, texts=TEXTS))
    assert "Possible" not in page
    assert "not a medical device" in page
    shown = render_page(make_weak_label_page(weak, card, texts=TEXTS, examples=3))
    assert "Possible" in shown
    assert "texts of patients" in shown
