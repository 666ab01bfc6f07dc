"""Scores of arms: the JSON that the issue asks for, equal to the metrics themselves; seeds, patients and gaps."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as sk

from chiasm.errors import InputError
from chiasm.evaluate.distill_scores import COMPARISONS, STATISTICS, score_arms
from chiasm.metrics.bootstrap import holm
from chiasm.metrics.calibration import reliability_curve
from chiasm.metrics.classification import MissingClassWarning
from chiasm.metrics.paired import ArmPredictions, mcnemar_exact

GAINS = {
    "unimodal": 0.0,
    "unimodal_lora": 0.1,
    "lambda0": 0.0,
    "clip_it": 1.5,
    "shuffled": -0.4,
    "random_text": 0.0,
    "prompt_text": 0.6,
    "paired": 2.0,
}


def make_arms(gains=GAINS, *, seeds=5, n=120, classes=3, shared=True, patients=40) -> list[ArmPredictions]:
    """Answers whose logits carry the truth with a strength that depends on the arm."""
    made = []
    for s in range(seeds):
        random = np.random.default_rng(0 if shared else s)
        truth = np.concatenate([np.arange(classes), random.integers(0, classes, n - classes)])
        owner = random.integers(0, patients, n)
        shape = random.normal(size=(n, classes)) + 0.5 * random.normal(size=(patients, classes))[owner]
        for k, (arm, gain) in enumerate(gains.items()):
            own = np.random.default_rng([s, k])
            logits = shape + (1 + gain) * np.eye(classes)[truth] + 0.3 * own.normal(size=shape.shape)
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            ids = tuple(f"{0 if shared else s}-{i}" for i in range(n))
            made.append(ArmPredictions(arm, s, ids, tuple(f"patient-{o}" for o in owner), truth, p))
    return made


@pytest.fixture(scope="module")
def scores():
    return score_arms(make_arms(), n_resamples=60)


def test_json_has_what_the_issue_asks_for(scores):
    found = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert set(found["arms"]) == set(GAINS)
    for arm in found["arms"].values():
        for metric in STATISTICS:
            assert {"value", "low", "high", "per_seed", "patients", "chance"} == set(arm[metric])
            assert arm[metric]["low"] <= arm[metric]["value"] <= arm[metric]["high"]
        for rate in ("balanced_accuracy", "auroc", "ece"):
            assert 0 <= arm[rate]["low"] <= arm[rate]["high"] <= 1
    for name in ("clip_it-unimodal", "clip_it-lambda0", "shuffled-lambda0"):
        assert {"value", "low", "high", "p", "p_raw", "patients", "n_seeds"} <= set(found["differences"][name])
    assert set(found["differences"]) == {f"{a}-{b}" for a, b in COMPARISONS if a in GAINS and b in GAINS}
    assert len(found["differences"]["clip_it-lambda0"]["p_mcnemar"]) == 5
    assert isinstance(found["verdict"], str)
    assert found["outcome"] == "helped"
    assert found["verdict"].startswith("Text helped")
    assert (found["n_seeds"], found["n_test"], found["chance"]) == (5, [120, 120], pytest.approx(1 / 3))
    assert set(found["computed_from"]) == {"test_sets", "predictions"}
    assert "patient-" not in json.dumps(found)


def test_more_seeds_on_the_same_patients_do_not_narrow_the_curve():
    """The trap: a patient counted once a seed looks like so many patients."""
    (one,) = make_arms({"clip_it": 0.5}, seeds=1, n=90, patients=9)
    copies = [replace(one, seed=s) for s in range(8)]
    once, often = (score_arms(a, n_resamples=2).arms["clip_it"].reliability for a in ([one], copies))
    assert often.accuracy == pytest.approx(once.accuracy)
    widths = [np.subtract(c.high, c.low).mean() for c in (once, often)]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


def test_numbers_are_those_of_scikit_learn(scores):
    for given in make_arms()[:8]:
        numbers = scores.arms[given.arm].numbers
        expected = {
            "balanced_accuracy": sk.balanced_accuracy_score(given.truth, given.predicted),
            "auroc": sk.roc_auc_score(given.truth, given.probabilities, multi_class="ovr"),
            "accuracy": sk.accuracy_score(given.truth, given.predicted),
            "macro_f1": sk.f1_score(given.truth, given.predicted, average="macro"),
            "brier": sk.brier_score_loss(given.truth, given.probabilities, labels=[0, 1, 2]),
            "log_loss": sk.log_loss(given.truth, given.probabilities),
        }
        for name, value in expected.items():
            assert numbers[name].per_seed[0] == pytest.approx(value), name


def test_differences_are_paired_over_seeds_and_corrected_in_two_families(scores):
    found = scores.differences["balanced_accuracy"]
    one = found["clip_it-lambda0"]
    expected = np.subtract(*(scores.arms[a].numbers["balanced_accuracy"].per_seed for a in ("clip_it", "lambda0")))
    assert one.per_seed == pytest.approx(tuple(expected))
    main = [n for n, d in scores.to_dict()["differences"].items() if d["family"] == "verdict"]
    assert len(main) == 5
    assert [found[n].p for n in main] == pytest.approx(holm([found[n].p_raw for n in main]).tolist())
    others = [n for n in found if n not in main]
    assert [found[n].p for n in others] == pytest.approx(holm([found[n].p_raw for n in others]).tolist())
    assert one.patients is not None
    assert one.patients.low < one.value < one.patients.high
    assert one.patients.high - one.patients.low > one.high - one.low  # 40 patients are less sure than 5 seeds
    arms = {(a.arm, a.seed): a for a in make_arms()}
    a, b = arms["clip_it", 2], arms["lambda0", 2]
    assert scores.mcnemar["clip_it-lambda0"][2] == mcnemar_exact(a.predicted == a.truth, b.predicted == b.truth).p


def test_intervals_of_rates_end_at_their_range():
    made = []
    for s, right in enumerate((1.0, 1.0, 0.6)):
        truth = np.arange(20) % 2
        hit = np.where(np.arange(20) < 20 * right, truth, 1 - truth)
        p = np.eye(2)[hit] * 0.98 + 0.01
        made.append(ArmPredictions("unimodal", s, tuple(map(str, range(20))), tuple("abcdefghij" * 2), truth, p))
    numbers = score_arms(made, n_resamples=5).arms["unimodal"].numbers
    assert numbers["balanced_accuracy"].high == 1.0
    assert numbers["balanced_accuracy"].low < 0.6
    assert (numbers["ece"].low, numbers["brier"].low, numbers["log_loss"].low) == (0.0, 0.0, 0.0)
    assert numbers["log_loss"].high > 1.0
    wrong = [
        ArmPredictions(m.arm, m.seed, m.ids, m.groups, 1 - m.truth if m.seed < 2 else m.truth, m.probabilities)
        for m in made
    ]
    assert score_arms(wrong, n_resamples=5).arms["unimodal"].numbers["brier"].high == 1.0


def test_order_of_predictions_does_not_matter(scores):
    made = make_arms()
    again = score_arms([m for arm in GAINS for m in reversed(made) if m.arm == arm], n_resamples=60)
    assert again.to_dict() == scores.to_dict()


def test_baselines_without_information(scores):
    given = make_arms()[0]
    shares = np.bincount(given.truth) / given.n
    flat = np.tile(shares, (given.n, 1))
    numbers = scores.arms["unimodal"].numbers
    assert numbers["log_loss"].chance == pytest.approx(sk.log_loss(given.truth, flat))
    assert numbers["brier"].chance == pytest.approx(sk.brier_score_loss(given.truth, flat, labels=[0, 1, 2]))
    assert numbers["auroc"].chance == 0.5
    assert scores.majority == pytest.approx(shares.max())
    assert numbers["ece"].chance is None


def test_test_sets_of_their_own(scores):
    found = score_arms(make_arms(shared=False, seeds=4), n_resamples=20)
    assert not found.same_test_set
    assert found.differences["auroc"]["clip_it-lambda0"].patients is None
    assert found.arms["clip_it"].numbers["auroc"].patients is None
    assert any("test set of its own" in note for note in found.notes)
    assert found.to_dict()["n_resamples"] == 0
    assert found.digests != scores.digests
    # "patient-3" of one seed is not "patient-3" of another.
    made = [m for m in make_arms(shared=False, seeds=4) if m.arm == "clip_it"]
    expected = reliability_curve(
        np.concatenate([m.truth for m in made]),
        np.concatenate([m.probabilities for m in made]),
        groups=[(m.seed, g) for m in made for g in m.groups],
        n_resamples=200,
    )
    assert found.arms["clip_it"].reliability.accuracy == expected.accuracy
    assert found.arms["clip_it"].reliability.low == expected.low


class Heard:
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def start(self, total, description):
        self.told.append(total)

    def advance(self, n=1, **fields):
        self.told.append("+")

    def finish(self):
        self.told.append("done")


def test_resampling_tells_its_progress():
    heard = Heard()
    score_arms(make_arms({"unimodal": 0}, seeds=2, n=20), n_resamples=5, progress=heard)
    assert heard.told == [len(STATISTICS), *"+" * len(STATISTICS), "done"]


def test_one_seed(scores):
    found = score_arms(make_arms(seeds=1), n_resamples=20)
    values = found.to_dict()
    assert found.verdict.outcome == "cannot_say"
    assert values["arms"]["clip_it"]["auroc"]["low"] is None
    assert values["differences"]["clip_it-lambda0"]["p"] is None
    assert values["arms"]["clip_it"]["auroc"]["patients"]["low"] is not None
    assert scores.table()[0][0] == "unimodal"


def test_missing_seeds_arms_and_duplicates():
    made = make_arms(seeds=3, n=40)
    kept = [m for m in made if not (m.arm == "lambda0" and m.seed == 1) and m.arm != "random_text"]
    found = score_arms(kept, n_resamples=10)
    assert found.differences["balanced_accuracy"]["clip_it-lambda0"].seeds == (0, 2)
    assert "clip_it-random_text" not in found.differences["balanced_accuracy"]
    assert any(note.startswith("lambda0: 2 of 3 seeds") for note in found.notes)
    with pytest.raises(InputError, match="two sets of predictions with seed 0"):
        score_arms([made[0], made[0]])
    with pytest.raises(InputError, match="no predictions"):
        score_arms([])
    alone = score_arms([m for m in made if m.arm == "clip_it"], n_resamples=10)
    assert alone.verdict.outcome == "cannot_say"
    assert alone.to_dict()["differences"] == {}


def test_arms_must_be_tested_on_the_same_samples():
    """The trap: two arms of one seed with other samples would be paired as if they were the same."""
    made = make_arms(seeds=1, n=30)
    other = make_arms(seeds=2, n=30, shared=False)[-1]
    swapped = ArmPredictions(other.arm, 0, other.ids, other.groups, other.truth, other.probabilities)
    with pytest.raises(InputError, match="different samples with seed 0") as caught:
        score_arms([made[0], swapped])
    assert "patient-" not in str(caught.value)
    fewer = ArmPredictions("clip_it", 0, *_first_classes(made[0]))
    with pytest.raises(InputError, match="2 classes"):
        score_arms([made[0], fewer])


def _first_classes(given):
    p = given.probabilities[:, :2] / given.probabilities[:, :2].sum(1, keepdims=True)
    return given.ids, given.groups, np.minimum(given.truth, 1), p


def test_a_class_without_test_samples_gives_no_auroc_and_no_crash():
    made = [
        ArmPredictions(m.arm, m.seed, m.ids, m.groups, np.minimum(m.truth, 1), m.probabilities)
        for m in make_arms({"unimodal": 0, "lambda0": 0, "clip_it": 1}, seeds=2, n=30)
    ]
    with pytest.warns(MissingClassWarning, match="1 of 3 classes"):
        found = score_arms(made, n_resamples=10)
    assert math.isnan(found.arms["clip_it"].numbers["auroc"].value)
    assert found.to_dict()["arms"]["clip_it"]["auroc"]["value"] is None
    assert math.isfinite(found.arms["clip_it"].numbers["balanced_accuracy"].value)
    assert found.arms["clip_it"].numbers["balanced_accuracy"].chance == 0.5


def test_seeds_that_change_nothing_and_few_patients_are_noted():
    (one,) = make_arms({"unimodal": 0}, seeds=1, n=30, patients=3)
    same = [ArmPredictions("unimodal", s, one.ids, one.groups, one.truth, one.probabilities) for s in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score_arms(same, n_resamples=10)
    assert any("seed changes nothing in unimodal" in note for note in found.notes)
    assert any("only 3 patients" in note for note in found.notes)
    number = found.arms["unimodal"].numbers["balanced_accuracy"]
    assert number.low == number.high == pytest.approx(number.value)
