"""What a calibration is worth on test patients: numbers of the parts, errors that fall, a page that says so."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from chiasm.errors import InputError
from chiasm.evaluate.calibration_page import calibration_page, summary_rows
from chiasm.evaluate.calibration_scores import score_calibration, score_domain
from chiasm.evaluate.page import render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.metrics.bootstrap import weighted_interval, weighted_intervals
from chiasm.metrics.calibration import expected_calibration_error, reliability_curve
from chiasm.metrics.weighted import auroc_statistic, mean_statistic
from chiasm.tasks.calibrated import CalibrationPlan, fit_calibration
from chiasm.tasks.domain import fit_domain
from chiasm.tasks.scored_rows import Origin, ScoredRows
from chiasm.tasks.zero_shot import sigmoid
from chiasm.types import Embeddings, Space

CARD = RunCard("chiasm calibrate", {"scores": "abc"}, {"scores": 3}, "a table", 0)


def labels_rows(seed, patients=500):
    random = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), 2)
    z = random.normal(size=(len(patient), 2)) * 1.3 + random.normal(size=(patients, 2))[patient] * 0.5 - [0.5, 1.5]
    truth = (random.random(z.shape) < sigmoid(z)).astype(float)
    truth[random.random(z.shape) < 0.1] = np.nan
    ids = tuple(f"i{seed}-{i}" for i in range(len(patient)))
    return ScoredRows(3 * z + 2, truth, tuple(f"p{seed}-{p}" for p in patient), ids, Origin("multi", ("a", "b")))


def classes_rows(seed, patients=600):
    random = np.random.default_rng(seed)
    true = random.integers(0, 3, patients)
    z = random.normal(size=(patients, 3))
    z[np.arange(patients), true] += 1.5
    names = tuple(f"p{seed}-{i}" for i in range(patients))
    return ScoredRows(3 * z, np.eye(3)[true], names, names, Origin("single", ("x", "y", "z")))


def positive_ece(truth, p, bins=15):
    """The calibration error of the positive class by a loop over bins closed on the right."""
    total = 0.0
    for k in range(bins):
        inside = (p > k / bins) & (p <= (k + 1) / bins)
        inside |= (p == 0) if k == 0 else False
        if inside.any():
            total += inside.mean() * abs(truth[inside].mean() - p[inside].mean())
    return total


@pytest.fixture(scope="module")
def labels():
    calibration = fit_calibration(labels_rows(1))
    rows = labels_rows(2)
    return calibration, rows, score_calibration(calibration, rows, n_resamples=200)


def test_numbers_are_a_direct_rederivation_and_scikit_learns(labels):
    calibration, rows, scores = labels
    given = calibration.probabilities(rows.scores)
    for k, found in enumerate(scores.labels):
        known = ~np.isnan(rows.truth[:, k])
        truth, p, raw = rows.truth[known, k], given[known, k], sigmoid(rows.scores[known, k])
        assert found.errors.after["ece"].value == pytest.approx(positive_ece(truth, p), abs=1e-12)
        assert found.errors.before["ece"].value == pytest.approx(positive_ece(truth, raw), abs=1e-12)
        assert found.errors.after["brier"].value == pytest.approx(brier_score_loss(truth, p), abs=1e-12)
        assert found.errors.after["log_loss"].value == pytest.approx(log_loss(truth, p), abs=1e-12)
        share = truth.mean()
        assert found.errors.after["brier"].chance == pytest.approx(share * (1 - share), abs=1e-12)
        gain = found.errors.gain["brier"]
        assert gain.value == pytest.approx(found.errors.before["brier"].value - found.errors.after["brier"].value)
        assert gain.low > 0  # the calibration is an improvement that patients agree on
        assert found.errors.after["brier"].value < found.errors.after["brier"].chance
    both = ~np.isnan(rows.truth)
    assert scores.pooled.after["ece"].value == pytest.approx(positive_ece(rows.truth[both], given[both]), abs=1e-12)
    assert scores.pooled.after["ece"].value < 0.3 * scores.pooled.before["ece"].value


def test_positive_curve_is_scikit_learns():
    random = np.random.default_rng(0)
    p = random.random(800)
    truth = (random.random(800) < p**2).astype(float)
    found = reliability_curve(truth, p, bins=10, binning="width", of="positive")
    share, stated = calibration_curve(truth, p, n_bins=10)
    np.testing.assert_allclose(found.accuracy, share)
    np.testing.assert_allclose(found.confidence, stated)
    assert expected_calibration_error(truth, p, of="positive") > 0.1
    with pytest.raises(InputError, match="two classes"):
        expected_calibration_error([0, 1, 2], np.full((3, 3), 1 / 3), of="positive")
    with pytest.raises(InputError, match="kind of confidence"):
        expected_calibration_error([0, 1], [0.5, 0.5], of="other")


def test_one_pass_gives_the_same_intervals():
    random = np.random.default_rng(0)
    truth, score = random.integers(0, 2, 60), random.normal(size=60)
    groups = random.integers(0, 20, 60)
    made = {"auroc": auroc_statistic(truth, score), "mean": mean_statistic(score)}
    together = weighted_intervals(made, groups, n_resamples=50, seed=3)
    for name, statistic in made.items():
        assert together[name] == weighted_interval(statistic, groups, n_resamples=50, seed=3)
    alone = weighted_intervals({"mean": mean_statistic(score)}, ["one"] * 60)["mean"]
    assert math.isnan(alone.low)


def test_thresholds_bands_and_sets_are_judged_on_test_rows(labels):
    calibration, rows, scores = labels
    answers = calibration.apply(rows)
    for k, found in enumerate(scores.labels):
        positives = rows.truth[:, k] == 1
        assert found.reached.sensitivity.value == pytest.approx((answers.called[positives, k] == 1).mean())
        assert 0.88 < found.reached.sensitivity.value <= 1
        undecided = answers.answers[~np.isnan(rows.truth[:, k]), k] == -1
        assert found.by_sets.undecided.value == pytest.approx(undecided.mean())
        assert found.by_sets.accuracy.n == int((~undecided).sum())
        assert 0.85 < found.sets.coverage.value < 0.96
        majority = np.nanmean(rows.truth[:, k])
        assert found.by_sets.forced.chance == pytest.approx(max(majority, 1 - majority))
    # A is balanced enough that leaving out what is unclear buys accuracy.
    assert scores.labels[0].by_sets.accuracy.value > scores.labels[0].by_sets.forced.value + 0.03


def test_classes_have_one_set_a_row():
    calibration = fit_calibration(classes_rows(1), CalibrationPlan(coverage=0.8))
    scores = score_calibration(calibration, classes_rows(2), n_resamples=50)
    assert [f.label for f in scores.labels] == ["x", "y", "z"]
    assert scores.pooled.after["ece"].value < scores.pooled.before["ece"].value
    assert 0.74 < scores.sets.coverage.value < 0.87
    assert scores.by_sets.accuracy.value > scores.by_sets.forced.value
    html = render_page(calibration_page(calibration, scores, CARD, file="c.json"))
    assert "true class x" in html
    assert "--apply c.json" in html


def test_the_page_shows_numbers_and_no_patient(labels):
    calibration, _, scores = labels
    html = render_page(calibration_page(calibration, scores, CARD))
    for text in ("Errors before and after", "Sets and", "not a medical device", "Run card"):
        assert text in html
    assert "p2-" not in html
    assert "i2-" not in html
    assert len(summary_rows(scores)) == 3
    json.dumps(scores.to_dict(), allow_nan=False)


def test_what_was_calibrated_already_is_said():
    rows = labels_rows(1)
    honest = ScoredRows((rows.scores - 2) / 3, rows.truth, rows.groups, rows.ids, rows.origin)
    calibration = fit_calibration(honest.select(np.arange(100)))  # 50 patients spoil what was nearly right
    scores = score_calibration(calibration, honest.select(np.arange(100, 1000)), n_resamples=20)
    assert any("did not improve" in note for note in scores.notes)
    assert "did not help" in render_page(calibration_page(calibration, scores, CARD))
    assert "did not improve" not in " ".join(score_calibration(fit_calibration(rows), rows, n_resamples=20).notes)


def test_sets_that_are_empty_are_explained():
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, (800, 1)).astype(float)
    names = tuple(f"p{i}" for i in range(800))
    rows = ScoredRows(6 * truth - 3 + random.normal(size=truth.shape), truth, names, names, Origin("multi", ("a",)))
    calibration = fit_calibration(rows.select(np.arange(500)))
    scores = score_calibration(calibration, rows.select(np.arange(500, 800)), n_resamples=20)
    assert scores.labels[0].sets.empty.value > 0.04
    assert "Ask for a higher --coverage" in render_page(calibration_page(calibration, scores, CARD))


def test_labels_without_truth_are_said():
    calibration = fit_calibration(labels_rows(1))
    rows = labels_rows(3, 100)
    truth = rows.truth.copy()
    truth[:, 1] = np.nan
    scores = score_calibration(calibration, ScoredRows(rows.scores, truth, rows.groups, rows.ids, rows.origin),
                               n_resamples=20)  # fmt: skip
    assert [f.label for f in scores.labels] == ["a"]
    assert "`b` has no truth" in scores.notes[0]
    with pytest.raises(InputError, match="no test row is labelled"):
        score_calibration(calibration, ScoredRows(rows.scores, truth * np.nan, rows.groups, rows.ids, rows.origin))


def test_foreign_images_are_counted():
    def cloud(seed, n, shift=0.0):
        random = np.random.default_rng(seed)
        vectors = random.normal(size=(n, 6)) * 0.2 + np.array([1, shift, 0, 0, 0, 0])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Embeddings(vectors, tuple(f"{seed}-{i}" for i in range(n)), Space("t", "w", "p", 6), "image")

    domain = fit_domain(cloud(0, 400), cloud(1, 300), false_alarms=0.1)
    found = score_domain(domain, cloud(2, 300), cloud(3, 200, 2.0), n_resamples=50)
    assert found.false_alarms.low - 0.02 <= 0.1 <= found.false_alarms.high + 0.02
    assert found.auroc.value > 0.99
    assert found.caught.value > 0.95
    alone = score_domain(domain, cloud(2, 300), None, n_resamples=20)
    assert alone.auroc is None
    assert alone.to_dict()["caught"] is None
