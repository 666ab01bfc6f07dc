"""Scores of fusion: every arm beside chance, gains corrected, and a verdict that only a gain over all can change."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score

from chiasm.evaluate.fusion_page import fusion_page
from chiasm.evaluate.fusion_scores import score_fusion
from chiasm.evaluate.page import render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.metrics.compare import compare_auroc
from chiasm.tasks.fusion import FusionRun


def run_of(image: np.ndarray, clinical: np.ndarray, fused: np.ndarray, truth: np.ndarray) -> FusionRun:
    def two(p: np.ndarray) -> np.ndarray:
        return np.column_stack([1 - p, p])

    arms = {"image": two(image), "clinical": two(clinical), "early fusion": two(fused), "late fusion": two(fused)}
    share = np.full(len(truth), 0.3)
    dropped = {"image": {"early fusion": two(clinical), "late fusion": two(clinical)}}
    return FusionRun(
        classes=("no", "yes"), truth=truth, groups=tuple(f"p{i // 2}" for i in range(len(truth))), probabilities=arms,
        priors=two(share), dropped=dropped, present={"image": 1.0, "clinical": 0.5}, weights={"image": 0.7, "clinical": 0.3},
        folds=5, repeats=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def gain() -> FusionRun:
    rng = np.random.default_rng(0)
    truth = (rng.random(300) < 0.3).astype(np.int64)
    a, b = rng.normal(size=(2, 300)) + truth
    squash = [1 / (1 + np.exp(-v + 1)) for v in (a, b, a + b)]
    return run_of(*squash, truth)


def test_numbers_are_scikit_learns(gain: FusionRun) -> None:
    scores = score_fusion(gain, n_resamples=100)
    p = gain.probabilities["early fusion"]
    found = scores.arms["early fusion"]
    assert found.auroc.value == pytest.approx(roc_auc_score(gain.truth, p[:, 1]))
    assert found.log_loss.value == pytest.approx(log_loss(gain.truth, p))
    assert found.log_loss.chance == pytest.approx(log_loss(gain.truth, gain.priors))
    decided = (p / gain.priors).argmax(1)
    assert found.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(gain.truth, decided))
    assert found.auroc.low < found.auroc.value < found.auroc.high
    test = compare_auroc(gain.truth, p[:, 1], gain.probabilities["image"][:, 1], gain.groups, n_resamples=100)
    assert scores.differences["early fusion-image"].p_raw == pytest.approx(test.p_raw)
    assert scores.differences["early fusion-image"].p >= test.p_raw
    assert scores.without["image"]["late fusion"].value == scores.arms["clinical"].auroc.value


def test_the_verdict_needs_a_gain_over_every_modality(gain: FusionRun) -> None:
    assert score_fusion(gain, n_resamples=200).verdict == "Early fusion and late fusion beat every modality alone."
    image = gain.probabilities["image"][:, 1]
    same = run_of(image, gain.probabilities["clinical"][:, 1], image, gain.truth)
    assert score_fusion(same, n_resamples=200).verdict.startswith("No gain over image")


def test_the_page_and_the_json_hold_every_arm(gain: FusionRun) -> None:
    scores = score_fusion(gain, n_resamples=50)
    card = RunCard("chiasm fuse", {"image": "00"}, {"image": 300}, "m@1", 0)
    page = render_page(fusion_page(scores, card, label="<script>outcome</script>"))
    assert "<script>outcome" not in page
    for arm in gain.probabilities:
        assert arm in page
    document = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert set(document["arms"]) == set(gain.probabilities)
    assert document["rows"] == {"no": int((gain.truth == 0).sum()), "yes": int(gain.truth.sum())}
