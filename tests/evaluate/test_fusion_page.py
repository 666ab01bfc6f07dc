"""Fusion scores made by hand: the page holds every number of the JSON, and the verdict is a sentence in every case."""

from __future__ import annotations

import html
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from chiasm.evaluate.fusion_page import fusion_page
from chiasm.evaluate.fusion_scores import ArmScores, FusionScores, _is_gain, _verdict, score_fusion
from chiasm.evaluate.page import Page, Table, render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.metrics.compare import PairedTest
from chiasm.tasks.fusion import FusionRun
from chiasm.types import Interval

CARD = RunCard("chiasm fuse", {"image": "ab"}, {"image": 9}, "m@w.p/3", 1, settings={"label": "outcome"})
FUSED, ALONE = ["early fusion", "late fusion"], ["image", "clinical"]


def interval(value: float, chance: float | None = 0.5) -> Interval:
    return Interval(value, value - 0.011, value + 0.022, 9, chance)


def test_of(value: float, p: float) -> PairedTest:
    return PairedTest(0.8, 0.8 - value, interval(value, None), p, p / 3, "delong", "delong", 9)


test_of.__test__ = False  # type: ignore[attr-defined]  # a maker, no test


def scores(**changes: Any) -> FusionScores:
    arms = {
        arm: ArmScores(interval(0.601 + k / 10), interval(0.503 + k / 10), interval(0.905 - k / 10, 0.666))
        for k, arm in enumerate(["image", "clinical", "early fusion"])
    }
    values: dict[str, Any] = {
        "classes": ("left", "died"), "counts": {"left": 1234, "died": 56}, "patients": 1007, "arms": arms,
        "differences": {"early fusion-image": test_of(0.212, 0.0123), "early fusion-clinical": test_of(0.114, 0.345)},
        "without": {"image": {"early fusion": interval(0.557)}, "clinical": {"early fusion": interval(0.668)}},
        "majority_accuracy": 0.957, "weights": {"image": 0.31, "clinical": 0.69},
        "present": {"image": 0.875, "clinical": 1.0}, "verdict": "No gain over clinical alone was shown.",
    }  # fmt: skip
    return FusionScores(**{**values, **changes})


def plain(page: Page) -> str:
    text = re.sub(r"<svg.*?</svg>|<style>.*?</style>", " ", render_page(page), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text)))


def test_every_number_of_the_json_stands_on_the_page() -> None:
    found = scores()
    text = plain(fusion_page(found, CARD, label="outcome"))
    for arm, s in found.arms.items():
        assert f"{arm} {s.auroc} {s.balanced_accuracy} {s.log_loss} 0.666" in text
    for name, test in found.differences.items():
        assert f"{name.replace('-', ' − ', 1)} {test.difference} {test.p:.3f} {test.p_raw:.3f} DeLong" in text
    assert f"image 87.5% 0.31 {found.without['image']['early fusion']}" in text
    assert f"clinical 100.0% 0.69 {found.without['clinical']['early fusion']}" in text
    for words in ("1,234 left, 56 died; 1,007 patients", "right in 95.7% of the rows", found.verdict, CARD.digest):
        assert words in text
    assert text.count("highest here") == 1


def test_the_json_is_strict_and_has_all_parts() -> None:
    document = json.loads(json.dumps(scores().to_dict(), allow_nan=False))
    assert set(document) == {
        "classes", "rows", "patients", "present", "arms", "majority_accuracy", "differences", "without",
        "late_fusion_weights", "verdict",
    }  # fmt: skip
    assert document["rows"] == {"left": 1234, "died": 56}
    assert document["arms"]["image"]["log_loss"]["chance"] == 0.666
    assert document["without"]["image"]["early fusion"]["value"] == 0.557


def test_a_test_that_is_not_defined_is_a_dash() -> None:
    nan = float("nan")
    text = plain(fusion_page(scores(differences={"early fusion-image": test_of(0.1, nan)}), CARD, label="x"))
    assert "early fusion − image 0.100 [0.089, 0.122] – – DeLong" in text
    assert "nan" not in text


def test_one_modality_alone_has_a_page_too() -> None:
    one = scores(arms={"image": scores().arms["image"]}, differences={}, without={}, weights={}, verdict="Only one.")
    page = fusion_page(one, CARD, label="x")
    assert "Only one." in plain(page)
    assert [t.rows for s in page.sections[1:3] for t in s.blocks if isinstance(t, Table)] == [(), ()]


@pytest.mark.parametrize(
    "hostile", ["<script>x</script>", '"><img src=x onerror=alert(1)>', "{{ 7777*7 }}", "</td></table>"]
)
def test_hostile_names_are_escaped(hostile: str) -> None:
    found = scores(counts={hostile: 3, "b": 2}, verdict=hostile)
    page = render_page(fusion_page(found, CARD, label=hostile))
    if "<" in hostile:
        assert hostile not in page
    assert html.escape(hostile, quote=False).split("&")[0] in html.unescape(page)
    assert "54439" not in re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", page, flags=re.DOTALL)


def differences(gains: dict[str, tuple[float, float]]) -> dict[str, PairedTest]:
    return {name: test_of(*pair) for name, pair in gains.items()}


WON, LOST, UNSURE = (0.1, 0.01), (-0.1, 0.01), (0.1, 0.2)


@pytest.mark.parametrize(
    ("early_image", "early_clinical", "late_image", "late_clinical", "verdict"),
    [
        (WON, WON, WON, WON, "Early fusion and late fusion beat every modality alone."),
        (WON, WON, UNSURE, WON, "Early fusion beat every modality alone."),
        (UNSURE, WON, WON, WON, "Late fusion beat every modality alone."),
        (UNSURE, WON, UNSURE, WON, "No gain over image alone was shown."),
        (UNSURE, UNSURE, LOST, LOST, "No gain over image or clinical alone was shown."),
        (WON, UNSURE, UNSURE, WON, "No single fusion beat every modality alone."),
        (WON, LOST, WON, LOST, "No gain over clinical alone was shown."),
    ],
)
def test_verdicts(early_image: Any, early_clinical: Any, late_image: Any, late_clinical: Any, verdict: str) -> None:
    found = differences({
        "early fusion-image": early_image, "early fusion-clinical": early_clinical,
        "late fusion-image": late_image, "late fusion-clinical": late_clinical,
    })  # fmt: skip
    assert _verdict(found, FUSED, ALONE) == verdict


def test_every_verdict_is_a_whole_sentence() -> None:
    names = [f"{f}-{m}" for f in FUSED for m in ALONE]
    for pairs in itertools.product((WON, LOST, UNSURE), repeat=4):
        text = _verdict(differences(dict(zip(names, pairs, strict=True))), FUSED, ALONE)
        assert text.endswith(".")
        assert "  " not in text
    assert _verdict({}, [], ["image"]) == "Only one modality was given, so nothing was fused."


@pytest.mark.parametrize(
    ("value", "p", "gain"),
    [(0.1, 0.049, True), (0.1, 0.05, False), (0.0, 0.0, False), (-0.1, 0.0, False), (0.1, float("nan"), False)],
)
def test_a_gain_is_positive_and_sure(value: float, p: float, gain: bool) -> None:
    assert _is_gain(test_of(value, p)) is gain


def run_of(truth: np.ndarray, arms: dict[str, np.ndarray], priors: np.ndarray, **changes: Any) -> FusionRun:
    values: dict[str, Any] = {
        "classes": tuple("abc"[: priors.shape[1]]), "truth": truth, "groups": tuple(f"p{i}" for i in range(len(truth))),
        "probabilities": arms, "priors": priors, "dropped": {}, "present": {"image": 1.0}, "weights": {}, "folds": 2,
        "repeats": 1,
    }  # fmt: skip
    return FusionRun(**{**values, **changes})


def drawn(seed: int, classes: int = 2, n: int = 40) -> FusionRun:
    random = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(classes), random.integers(0, classes, n - classes)])
    arms = {a: random.dirichlet(np.ones(classes), n) for a in ("image", "text", "early fusion")}
    return run_of(truth, arms, np.tile(np.bincount(truth) / n, (n, 1)))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from([2, 3]))
def test_scores_ignore_the_order_of_rows(seed: int, classes: int) -> None:
    run = drawn(seed, classes)
    order = np.random.default_rng(seed).permutation(len(run.truth))
    turned = run_of(
        run.truth[order], {a: p[order] for a, p in run.probabilities.items()}, run.priors[order],
        groups=tuple(run.groups[i] for i in order),
    )  # fmt: skip
    one, other = (score_fusion(r, n_resamples=10) for r in (run, turned))
    for arm, s in one.arms.items():
        for name in ("auroc", "balanced_accuracy", "log_loss"):
            assert getattr(s, name).value == pytest.approx(getattr(other.arms[arm], name).value)
    assert one.counts == other.counts
    assert one.majority_accuracy == pytest.approx(other.majority_accuracy)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000))
def test_three_classes_are_the_mean_of_one_against_the_rest(seed: int) -> None:
    run = drawn(seed, 3)
    found = score_fusion(run, n_resamples=10)
    for arm, p in run.probabilities.items():
        expected = roc_auc_score(run.truth, p, multi_class="ovr", average="macro")
        assert found.arms[arm].auroc.value == pytest.approx(expected)
        assert found.arms[arm].balanced_accuracy.chance == pytest.approx(1 / 3)


def test_the_class_shares_alone_score_chance() -> None:
    truth = np.array([0] * 30 + [1] * 10)
    priors = np.tile([0.75, 0.25], (40, 1))
    found = score_fusion(run_of(truth, {"image": priors}, priors), n_resamples=20)
    arm = found.arms["image"]
    assert (arm.auroc.value, arm.balanced_accuracy.value) == (0.5, 0.5)
    assert arm.log_loss.value == pytest.approx(arm.log_loss.chance)
    assert arm.log_loss.value == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert found.majority_accuracy == 0.75
    assert found.verdict.startswith("Only one modality")


def test_a_class_is_decided_beside_its_share() -> None:
    """One of four rows is of class b: a probability of 0.3 speaks for it, though 0.7 is the larger number."""
    truth = np.array([0, 0, 0, 1])
    said = np.array([[0.8, 0.2], [0.8, 0.2], [0.7, 0.3], [0.7, 0.3]])
    found = score_fusion(run_of(truth, {"image": said}, np.tile([0.75, 0.25], (4, 1))), n_resamples=5)
    assert found.arms["image"].balanced_accuracy.value == pytest.approx((2 / 3 + 1) / 2)
    assert found.arms["image"].auroc.value == pytest.approx((1 + 1 + 0.5) / 3)


def test_numbers_are_the_same_at_the_same_seed_only() -> None:
    run = drawn(5)
    one, again, other = (score_fusion(run, n_resamples=30, seed=s).to_dict() for s in (1, 1, 2))
    assert one == again
    assert one["arms"]["image"]["auroc"]["value"] == other["arms"]["image"]["auroc"]["value"]
    assert one["arms"]["image"]["auroc"]["low"] != other["arms"]["image"]["auroc"]["low"]


def test_gains_are_corrected_over_all_comparisons() -> None:
    found = score_fusion(drawn(8), n_resamples=50)
    raw = sorted(d.p_raw for d in found.differences.values())
    assert list(found.differences) == ["early fusion-image", "early fusion-text"]
    holm = [min(1, 2 * raw[0])]
    holm.append(min(1, max(holm[0], raw[1])))
    assert sorted(d.p for d in found.differences.values()) == pytest.approx(holm)
