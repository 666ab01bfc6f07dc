"""Scores: they equal scikit-learn's and counting by hand, skip what is not labelled, and warn where a score is inverted."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError, SpaceMismatch, UnknownName
from chiasm.evaluate.scores import (
    InvertedScoreWarning,
    prediction_rows,
    score_pointing,
    score_retrieval,
    score_zero_shot,
)
from chiasm.evaluate.search_relevance import Relevance
from chiasm.evaluate.search_scores import best_ranks, constant_recall, default_keys
from chiasm.explain.heatmap import HeatMap
from chiasm.tasks.prompts import PromptSet
from chiasm.tasks.zero_shot import TextClassifier, ZeroShotResult, classify
from chiasm.types import Box, Embeddings, Modality, Space

RNG = np.random.default_rng(0)


def embed(vectors: Any, modality: Modality = "image", *, space: str = "made", **fields: Any) -> Embeddings:
    array = np.asarray(vectors, dtype=np.float32)
    fields.setdefault("ids", tuple(f"r{i}" for i in range(len(array))))
    return Embeddings(
        vectors=array, space=Space(space, "0", "1", array.shape[1]), modality=modality, normalized=False, **fields
    )


def result_of(cosines: Any, *, multi: bool, patients: tuple[str, ...] | None = None) -> ZeroShotResult:
    """Images whose cosines with label k are what the k-th column says (rows are completed to unit norm)."""
    wanted = np.asarray(cosines, dtype=np.float64)
    rest = np.sqrt(1 - (wanted**2).sum(axis=1, keepdims=True))
    images = embed(np.concatenate([wanted, rest], axis=1), patients=patients, logit_scale=10.0)
    names = [chr(ord("a") + k) for k in range(wanted.shape[1])]
    directions = np.eye(wanted.shape[1] + 1, dtype=np.float32)
    prompts = PromptSet.from_pairs([f"{n}" for n in names]) if multi else PromptSet.from_names(names, "{}")
    against = np.zeros((len(names), wanted.shape[1] + 1), dtype=np.float32) if multi else None
    classifier = TextClassifier(prompts, directions[: len(names)], against, images.space, 10.0)
    return classify(images, classifier, mode="multi" if multi else "single")


def noisy(n: int = 80, labels: int = 3, strength: float = 0.25) -> tuple[ZeroShotResult, np.ndarray]:
    truth = RNG.integers(0, 2, (n, labels))
    cosines = 0.5 * np.clip(strength * (truth - 0.5) + 0.2 * RNG.normal(size=(n, labels)), -1, 1)
    return result_of(cosines, multi=True, patients=tuple(f"p{i // 2}" for i in range(n))), truth


def test_multi_label_scores_equal_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

    result, truth = noisy()
    scores = score_zero_shot(result, {n: truth[:, k].tolist() for k, n in enumerate("abc")}, n_resamples=200)
    aucs = []
    for k, found in enumerate(scores.per_label):
        aucs.append(roc_auc_score(truth[:, k], result.probabilities[:, k]))
        assert found.auroc.value == pytest.approx(aucs[-1])
        assert found.auprc.value == pytest.approx(average_precision_score(truth[:, k], result.probabilities[:, k]))
        assert found.auprc.chance == pytest.approx(truth[:, k].mean())
        assert found.balanced_accuracy is not None
        assert found.balanced_accuracy.value == pytest.approx(
            balanced_accuracy_score(truth[:, k], result.probabilities[:, k] >= 0.5)
        )
        assert found.auroc.low <= found.auroc.value <= found.auroc.high
        assert (found.positives, found.negatives) == (truth[:, k].sum(), 80 - truth[:, k].sum())
    assert scores.macro_auroc.value == pytest.approx(np.mean(aucs))
    assert scores.macro_auroc.chance == 0.5
    assert scores.macro_auprc.chance == pytest.approx(truth.mean(axis=0).mean())
    assert (scores.n, scores.n_groups) == (80, 40)
    assert scores.accuracy is None
    assert scores.label("b") is scores.per_label[1]
    with pytest.raises(UnknownName):
        scores.label("z")
    values = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert set(values["per_label"]["a"]["auroc"]) == {"value", "low", "high", "n", "chance"}
    assert {row[0] for row in scores.table()} >= {"macro AUROC", "AUROC a", "AUPRC b"}
    assert all("-" not in row[3:] for row in scores.table())  # chance and majority stand beside every number


def test_a_single_label_problem() -> None:
    truth = [*"aabbbbbc", None, ""]
    cosines = np.full((10, 3), 0.1)
    for i, name in enumerate([*"aabbbbac", "a", "b"]):
        cosines[i, ord(name) - ord("a")] = 0.4
    result = result_of(cosines, multi=False)
    scores = score_zero_shot(result, truth, n_resamples=50)
    assert scores.accuracy is not None
    assert scores.balanced_accuracy is not None
    assert scores.accuracy.value == pytest.approx(7 / 8)
    assert scores.accuracy.chance == pytest.approx(1 / 3)
    assert scores.balanced_accuracy.value == pytest.approx((1 + 4 / 5 + 1) / 3)
    assert scores.majority_accuracy == pytest.approx(5 / 8)
    assert scores.confusion == ((2, 0, 0), (1, 4, 0), (0, 0, 1))
    assert scores.n == 8
    by_label = {n: [None if t in (None, "") else int(t == n) for t in truth] for n in "abc"}
    again = score_zero_shot(result, by_label, n_resamples=50)
    assert again.to_dict() == scores.to_dict()
    assert json.dumps(scores.to_dict(), allow_nan=False)
    assert ("accuracy", str(scores.accuracy), "8", "0.333", "0.625") in scores.table()
    assert score_zero_shot(result, ["A ", *[None] * 8, "B"], n_resamples=20).n == 2


def test_rows_without_truth_do_not_count() -> None:
    result, truth = noisy()
    blank = truth.astype(object)
    blank[::3, 0] = None
    blank[1::3, 0] = [float("nan")] * len(blank[1::3])
    scores = score_zero_shot(result, {n: blank[:, k].tolist() for k, n in enumerate("abc")}, n_resamples=20)
    assert scores.per_label[0].auroc.n == len(truth[2::3])
    part = score_zero_shot(result, {"b": truth[:, 1].tolist()}, n_resamples=20)
    assert [s.label for s in part.per_label] == ["b"]
    assert part.macro_auroc.value == part.per_label[0].auroc.value
    assert "label `a` has no truth and is not scored" in part.warnings
    one_sided = score_zero_shot(result, {"a": [1] * 80, "b": truth[:, 1].tolist()}, n_resamples=20)
    assert np.isnan(one_sided.per_label[0].auroc.value)
    assert one_sided.macro_auroc.value == one_sided.per_label[1].auroc.value
    assert any("only positive rows" in w for w in one_sided.warnings)
    assert json.dumps(one_sided.to_dict(), allow_nan=False)
    rows = prediction_rows(result, {"a": blank[:, 0].tolist()})
    assert len(rows) == len(truth[2::3])
    assert set(rows[0]) == {"patient", "label", "truth", "score"}


def test_predictions_are_enough_to_compute_the_scores_again() -> None:
    from sklearn.metrics import roc_auc_score

    result, truth = noisy()
    columns = {n: truth[:, k].tolist() for k, n in enumerate("abc")}
    scores = score_zero_shot(result, columns, n_resamples=20)
    rows = prediction_rows(result, columns)
    for found in scores.per_label:
        mine = [r for r in rows if r["label"] == found.label]
        assert roc_auc_score([r["truth"] for r in mine], [r["score"] for r in mine]) == pytest.approx(found.auroc.value)


def test_saturated_probabilities_still_rank() -> None:
    cosines = np.linspace(0.5, 0.9, 40)[:, None]
    result = result_of(cosines, multi=True)
    far = ZeroShotResult(**{**result.__dict__, "logits": result.logits * 100, "probabilities": np.ones((40, 1))})
    truth = {"a": [0] * 20 + [1] * 20}
    assert score_zero_shot(far, truth, n_resamples=20).macro_auroc.value == 1


def test_an_inverted_prompt_warns() -> None:
    result, truth = noisy(strength=-0.6)
    with pytest.warns(InvertedScoreWarning, match="say the opposite"):
        scores = score_zero_shot(result, {"a": truth[:, 0].tolist()}, n_resamples=200)
    assert any("say the opposite" in w for w in scores.warnings)


def test_the_interval_is_that_of_patients() -> None:
    """Copies of images add rows but no patients: the interval must not shrink."""
    n = 40
    truth = np.tile(RNG.integers(0, 2, n), 8)
    cosines = np.tile(0.1 * truth[:n] + 0.2 * RNG.normal(size=n), 8)[:, None] / 2
    patients = tuple(f"p{i}" for i in range(n))
    one = score_zero_shot(result_of(cosines[:n], multi=True, patients=patients), {"a": truth[:n].tolist()}, seed=1)
    many = score_zero_shot(result_of(cosines, multi=True, patients=patients * 8), {"a": truth.tolist()}, seed=1)
    naive = score_zero_shot(
        result_of(cosines, multi=True), {"a": truth.tolist()}, [str(i) for i in range(8 * n)], seed=1
    )
    width = [s.macro_auroc.high - s.macro_auroc.low for s in (one, many, naive)]
    assert width[1] == pytest.approx(width[0], rel=0.1)
    assert width[2] < 0.6 * width[0]
    assert many.n_groups == n


@pytest.mark.parametrize(
    ("truth", "problem"),
    [
        ({"a": [1, 0]}, "2 truth values for 3"),
        ({"a": [1, 0, 2]}, "must be 0, 1 or blank"),
        ({"a": [1, 0, -1]}, "uncertain"),
        ({"a": [1, 0, "maybe"]}, "must be 0, 1 or blank"),
        ({"a": [None, None, None]}, "no row of the truth"),
        (["a", "b"], "2 classes for 3"),
        ("abc", "got one text"),
    ],
)
def test_bad_truth_is_refused(truth: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        score_zero_shot(result_of([[0.1], [0.2], [0.3]], multi=True), truth)


def test_unknown_names_and_groups() -> None:
    result = result_of([[0.1, 0.2], [0.2, 0.1]], multi=False)
    with pytest.raises(UnknownName):
        score_zero_shot(result, {"c": [1, 0]})
    with pytest.raises(UnknownName, match="unknown class `c`"):
        score_zero_shot(result, ["a", "c"])
    with pytest.raises(InputError, match="1 groups"):
        score_zero_shot(result, ["a", "b"], ["p"])
    with pytest.raises(InputError, match="no group"):
        score_zero_shot(result, ["a", "b"], ["p", None])  # type: ignore[list-item]
    assert score_zero_shot(result, {"a": ["1", True], "b": [0.0, "0"]}, n_resamples=5).n == 2


def test_retrieval_by_hand() -> None:
    images = embed(np.eye(4), texts=("x", "y", "z", "w"))
    texts = embed(
        [[1, 0.5, 0, 0], [1, 0.9, 0, 0], [0, 0, 1, 0], [0.1, 0.2, 0.3, 0]], "text", texts=("x", "y", "z", "w")
    )
    scores = score_retrieval(images, texts, ks=(1, 2, 4), n_resamples=50)
    assert [scores.text_to_image.recall[k].value for k in (1, 2, 4)] == [0.5, 0.75, 1.0]
    assert scores.text_to_image.median_rank.value == 1.5
    assert [scores.text_to_image.recall[k].chance for k in (1, 2, 4)] == pytest.approx([0.25, 0.5, 1.0])
    assert scores.text_to_image.median_rank.chance == 2.5
    assert scores.text_to_image.majority == scores.image_to_text.majority == {1: 0.25, 2: 0.5, 4: 1.0}
    assert scores.keys == ("id", "caption")
    json.dumps(scores.to_dict(), allow_nan=False)
    assert "recall_at_2" in scores.to_dict()["text_to_image"]
    assert len(scores.table()) == 16
    with pytest.raises(UnknownName):
        scores.text_to_image.recall_at(10)


def test_the_same_caption_is_a_right_answer() -> None:
    images = embed(np.eye(3), ids=("a", "b", "c"))
    texts = embed(np.eye(3)[[1, 0, 2]], "text", ids=("a", "b", "c"), texts=("No  effusion", "no effusion", "nodule"))
    strict = score_retrieval(images, texts, keys={"id": (images.ids, texts.ids)}, n_resamples=5)
    fair = score_retrieval(images, texts, n_resamples=5)
    assert strict.text_to_image.recall_at_1.value == pytest.approx(1 / 3)
    assert fair.text_to_image.recall_at_1.value == 1
    assert fair.image_to_text.recall_at_1.value == 1
    assert fair.text_to_image.recall_at_1.chance == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert strict.text_to_image.recall_at_5.value == strict.image_to_text.recall_at_10.value == 1
    assert default_keys(images, texts)["caption"][0] == ["no effusion", "no effusion", "nodule"]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 10_000))
def test_the_best_constant_answer(n: int, m: int, seed: int) -> None:
    """One row is the very best; more rows never serve fewer; blocks change nothing."""
    rng = np.random.default_rng(seed)
    codes = [(rng.integers(0, 3, n), rng.integers(0, 3, m)), (rng.integers(5, 9, n), rng.integers(5, 9, m))]
    right = np.array([[any(q[i] == c[j] for q, c in codes) for j in range(m)] for i in range(n)])
    if not right.any():
        return
    found = constant_recall(Relevance(("a", "b"), tuple(codes)), right.sum(1), (1, 2, 3, 10))
    answerable = right[right.any(1)]
    assert found[1] == pytest.approx(answerable.mean(0).max())
    assert found[1] <= found[2] <= found[3] <= found[10]
    assert found[10] == pytest.approx(1)
    best_pair = max(answerable[:, [a, b]].any(1).mean() for a in range(m) for b in range(m))
    assert (1 - 1 / np.e) * best_pair - 1e-9 <= found[2] <= best_pair + 1e-9


def test_captions_that_repeat_lift_the_constant_answer() -> None:
    images = embed(np.eye(5), ids=tuple("abcde"))
    texts = embed(np.eye(5), "text", ids=tuple("abcde"), texts=("Normal.", "normal.", "normal.", "nodule", "effusion"))
    scores = score_retrieval(images, texts, ks=(1, 2), n_resamples=5)
    assert scores.text_to_image.majority == pytest.approx({1: 0.6, 2: 0.8})
    assert scores.to_dict()["image_to_text"]["majority"] == pytest.approx({"recall_at_1": 0.6, "recall_at_2": 0.8})
    assert [row[4] for row in (*scores.table()[:2], scores.table()[6])] == ["0.600", "0.800", "-"]


def test_queries_without_a_right_answer_are_left_out() -> None:
    images, texts = embed(np.eye(3)), embed(np.eye(3), "text", ids=("r0", "q1", "q2"))
    scores = score_retrieval(images, texts, n_resamples=5)
    assert (scores.text_to_image.n_queries, scores.text_to_image.n_unanswerable) == (1, 2)
    keys = {"case": (("k", None, "m"), (None, "k", None))}
    assert score_retrieval(images, texts, keys=keys, n_resamples=5).image_to_text.n_queries == 1
    with pytest.raises(InputError, match="no query has a right answer"):
        score_retrieval(images, texts, keys={"case": (("a",) * 3, ("b",) * 3)})
    with pytest.raises(InputError, match="key `case`"):
        score_retrieval(images, texts, keys={"case": (("a",) * 2, ("b",) * 3)})
    with pytest.raises(InputError, match="depths"):
        score_retrieval(images, texts, ks=())
    with pytest.raises(InputError, match="expected images and texts"):
        score_retrieval(images, images)
    with pytest.raises(SpaceMismatch):
        score_retrieval(images, embed(np.eye(3), "text", space="other"))


def test_a_model_that_says_one_thing_is_reported_at_chance() -> None:
    images, texts = embed(np.eye(8)[[0] * 30]), embed(np.eye(8)[[0] * 30], "text")
    scores = score_retrieval(images, texts, n_resamples=20)
    assert scores.text_to_image.recall_at_10.value == 0  # everybody's expected rank is 15.5
    assert scores.text_to_image.median_rank.value == scores.text_to_image.median_rank.chance == 15.5


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000))
def test_ranks_equal_sorting(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 5)), rng.normal(size=(m, 5))
    a, b = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (a, b))
    keys_a, keys_b = rng.integers(0, 4, n), rng.integers(0, 4, m)
    ranks, right = best_ranks(a, b, Relevance(("key",), ((keys_a, keys_b),)))
    for i in range(n):
        order = np.argsort(-(a[i] @ b.T), kind="stable")
        hits = np.flatnonzero(keys_b[order] == keys_a[i])
        assert right[i] == len(hits)
        assert np.isnan(ranks[i]) if len(hits) == 0 else ranks[i] == hits[0] + 1


def heat(row: int, column: int, *, cells: int = 4, size: int = 40) -> HeatMap:
    values = np.zeros((cells, cells), dtype=np.float32)
    values[row, column] = 1
    return HeatMap(values, (size, size), (0.0, 0.0, float(size), float(size)), "similarity", "text")


def test_pointing_by_hand() -> None:
    boxes = [[Box(0, 0, 10, 10, "a")], [Box(0, 0, 10, 10, "a")], [Box(20, 20, 40, 40, "b"), Box(0, 0, 10, 10, "b")]]
    scores = score_pointing([heat(0, 0), heat(3, 3), heat(3, 3)], boxes, n_resamples=50)
    assert scores.pointing_game.value == pytest.approx(2 / 3)
    assert scores.pointing_game.chance == pytest.approx((1 / 16 + 1 / 16 + 5 / 16) / 3)
    assert scores.per_label["a"].value == 0.5
    assert scores.per_label["b"].value == 1
    assert scores.majority == scores.majority_by_label == 1  # the upper left corner lies in a box of every image
    assert scores.times_chance == pytest.approx((2 / 3) / (7 / 48))
    assert 0 < scores.iou.value < 1
    assert scores.contrast_to_noise.chance == 0
    assert scores.method == "similarity"
    assert json.dumps(scores.to_dict(), allow_nan=False)
    assert scores.table()[0][0] == "pointing game"


def test_one_place_for_all_maps_is_found_on_images_of_any_size() -> None:
    boxes = [[Box(0, 0, 10, 10, "a")], [Box(0, 0, 5, 20, "a")], [Box(30, 30, 40, 40, "b")]]
    wide = HeatMap(np.eye(4, dtype=np.float32), (20, 80), (0.0, 0.0, 20.0, 80.0), "similarity", "text")
    scores = score_pointing([heat(3, 3), wide, heat(0, 0)], boxes, n_resamples=5)
    assert scores.majority == pytest.approx(2 / 3)
    assert scores.majority_by_label == 1
    assert scores.to_dict()["majority_by_label"] == 1


def test_a_flat_map_points_nowhere() -> None:
    flat = HeatMap(np.zeros((4, 4)), (40, 40), (0.0, 0.0, 40.0, 40.0), "grad_cam", "text")
    scores = score_pointing([flat], [[Box(0, 0, 20, 20, "a")]], n_resamples=5)
    assert scores.pointing_game.value == scores.pointing_game.chance == 0.25
    assert scores.iou.value == 0
    assert scores.n_flat == 1


def test_random_maps_reach_chance() -> None:
    rng = np.random.default_rng(0)
    heats = [heat(*rng.integers(0, 4, 2)) for _ in range(600)]
    corners = rng.integers(0, 3, (600, 2)) * 10
    boxes = [[Box(float(x), float(y), float(x + 20), float(y + 20), "a")] for x, y in corners]
    scores = score_pointing(heats, boxes, n_resamples=100)
    assert scores.pointing_game.low < 0.25 < scores.pointing_game.high
    assert scores.pointing_game.chance == pytest.approx(0.25)


def test_bad_maps_are_refused() -> None:
    with pytest.raises(InputError, match="got 0 maps"):
        score_pointing([], [])
    with pytest.raises(InputError, match="2 lists"):
        score_pointing([heat(0, 0)], [[Box(0, 0, 1, 1)], []])
    for boxes, problem in (([], "has no box"), ([Box(100, 100, 120, 120, "a")], "outside the image")):
        with pytest.raises(InputError, match=problem):
            score_pointing([heat(0, 0)], [boxes])
    with pytest.raises(InputError, match="groups"):
        score_pointing([heat(0, 0)], [[Box(0, 0, 9, 9)]], groups=["a", "b"])
    with pytest.raises(InputError, match="labels"):
        score_pointing([heat(0, 0)], [[Box(0, 0, 9, 9)]], labels=[])
