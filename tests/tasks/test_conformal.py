"""Prediction sets keep their promise: coverage over seeds, patients with several images, sets that grow as α falls."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from chiasm.errors import InputError, UnknownName
from chiasm.tasks.conformal import SplitConformal, patient_quantile, score_sets
from chiasm.tasks.zero_shot import softmax

laws = settings(max_examples=25, deadline=None)
KINDS = {
    "lac": {"method": "lac"},
    "aps": {"method": "aps"},
    "lac_by_class": {"method": "lac", "class_conditional": True},
    "aps_by_class": {"method": "aps", "class_conditional": True},
}


def draw(seed, patients=3000, classes=3, *, images=False):
    """Probabilities that are too sure by a factor of 3, so that they cannot be believed; hard patients have more images."""
    random = np.random.default_rng(seed)
    size = 1 + 9 * (random.random(patients) < 0.3) if images else np.ones(patients, dtype=int)
    patient = np.repeat(np.arange(patients), size)
    z = random.normal(size=(len(patient), classes)) * np.where(size > 1, 0.2, 1.5)[patient, None]
    truth = (z - 0.5 * np.arange(classes) + random.gumbel(size=z.shape)).argmax(1)
    return softmax(3 * z), truth, patient


def by_patient(hit, patient):
    return float(np.mean(np.bincount(patient, weights=hit) / np.bincount(patient)))


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_coverage_is_nominal_over_five_seeds_of_3000_patients(kind, alpha):
    coverage, per_class = [], []
    for seed in range(5):
        fitted = SplitConformal(alpha, **KINDS[kind]).fit(*draw(2 * seed))
        probabilities, truth, _ = draw(2 * seed + 1)
        hit = fitted.predict(probabilities).members[np.arange(len(truth)), truth]
        coverage.append(hit.mean())
        per_class.append([hit[truth == k].mean() for k in range(3)])
    assert np.mean(coverage) == pytest.approx(1 - alpha, abs=0.02)
    if "by_class" in kind:
        np.testing.assert_allclose(np.mean(per_class, axis=0), 1 - alpha, atol=0.03)


def test_aps_without_chance_holds_too_much():
    """The promise is kept from above: the last of three classes is right too often to be left out."""
    calibration, (probabilities, truth, _) = draw(0), draw(1)
    sets = [SplitConformal(0.05, method="aps", randomize=r).fit(*calibration).predict(probabilities) for r in (0, 1)]
    coverage = [s.members[np.arange(len(truth)), truth].mean() for s in sets]
    assert coverage[0] > 0.97 > coverage[1]
    again = SplitConformal(0.05, method="aps").fit(*calibration).predict(probabilities)
    assert (again.members == sets[1].members).all()


@pytest.mark.parametrize("per_patient", ["weights", "one"])
def test_coverage_of_a_patients_random_image_is_nominal(per_patient):
    found, rows = [], []
    for seed in range(5):
        calibration, test = draw(2 * seed, images=True), draw(2 * seed + 1, images=True)
        for given_as, kept in ((per_patient, found), ("rows", rows)):
            sets = SplitConformal(0.1, method="aps", per_patient=given_as).fit(*calibration).predict(test[0])
            kept.append(by_patient(sets.members[np.arange(len(test[1])), test[1]], test[2]))
    assert np.mean(found) == pytest.approx(0.9, abs=0.02)
    assert abs(np.mean(rows) - 0.9) > 0.02  # rows are no patients: the promise does not hold


def test_the_worst_image_covers_all_images_of_a_patient():
    found = []
    for seed in range(5):
        calibration, test = draw(2 * seed, images=True), draw(2 * seed + 1, images=True)
        sets = SplitConformal(0.1, method="lac", per_patient="worst").fit(*calibration).predict(test[0])
        missed = ~sets.members[np.arange(len(test[1])), test[1]]
        found.append(1 - np.mean(np.bincount(test[2], weights=missed) > 0))
    assert np.mean(found) == pytest.approx(0.9, abs=0.02)


@laws
@given(st.integers(0, 2**31), st.sampled_from(sorted(KINDS)), st.sampled_from(["keep", "most_probable"]))
def test_sets_grow_as_alpha_falls_and_nothing_is_nan(seed, kind, empty):
    calibration, test = draw(seed, 60, images=True), draw(seed + 1, 40)[0]
    last = np.zeros((40, 3), dtype=bool)
    for alpha in (0.9, 0.5, 0.2, 0.1, 0.01, 0.001):
        fitted = SplitConformal(alpha, empty=empty, **KINDS[kind]).fit(*calibration)
        sets = fitted.predict(test)
        assert not np.isnan(fitted.thresholds_).any()
        assert (last <= sets.members).all() or (empty == "most_probable" and "by_class" in kind)
        assert empty == "keep" or sets.sizes.min() >= 1
        assert sets.was_empty.sum() == (sets.sizes == 0).sum() or empty == "most_probable"
        last = sets.members
    assert last.all()  # 60 patients cannot promise 99.9 %: every class stays in


@laws
@given(st.integers(1, 200), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_the_quantile_is_that_of_a_finite_sample(count, alpha, seed):
    scores = np.random.default_rng(seed).normal(size=count)
    rank = math.ceil((count + 1) * (1 - alpha) - 1e-9)
    expected = np.sort(scores)[rank - 1] if rank <= count else math.inf
    for how in ("weights", "one", "worst", "rows"):
        assert patient_quantile(scores, np.arange(count), alpha, per_patient=how) == expected


def test_copies_of_a_patients_images_change_nothing():
    probabilities, truth, patient = draw(1, 100)
    copies = np.random.default_rng(0).integers(1, 6, 100)
    once = SplitConformal(0.1).fit(probabilities, truth, patient)
    again = SplitConformal(0.1).fit(*(np.repeat(x, copies, axis=0) for x in (probabilities, truth, patient)))
    assert again.thresholds_.tolist() == once.thresholds_.tolist()
    assert again.patients_ == once.patients_ == (100,)


def test_two_classes_gaps_and_a_saved_form():
    random = np.random.default_rng(2)
    p = random.random(500)
    truth = (random.random(500) < p).astype(float)
    truth[:50] = np.nan
    fitted = SplitConformal(0.1, class_conditional=True).fit(p, truth)
    alone = SplitConformal(0.1, class_conditional=True).fit(p[50:], truth[50:])
    again = SplitConformal.from_dict(json.loads(json.dumps(fitted.to_dict())))
    sets = fitted.predict(p)
    assert sets.members.tolist() == alone.predict(p).members.tolist() == again.predict(p).members.tolist()
    assert set(sets.codes.tolist()) == {-1, 0, 1}
    few = SplitConformal(0.01).fit(p[50:60], truth[50:60])
    assert few.to_dict()["thresholds"] == [None]
    assert SplitConformal.from_dict(few.to_dict()).predict(p).members.all()
    assert clone(fitted).get_params() == fitted.get_params()


def test_a_report_counts_patients_alike():
    calibration, (probabilities, truth, patient) = draw(3, images=True), draw(4, 1000, images=True)
    sets = SplitConformal(0.1, empty="most_probable").fit(*calibration).predict(probabilities)
    truth = truth.astype(float)
    truth[patient < 10] = np.nan
    found = score_sets(sets, truth, patient, n_resamples=200)
    known = patient >= 10
    hit = sets.members[np.arange(len(truth)), np.nan_to_num(truth).astype(int)]
    assert found.coverage.value == pytest.approx(
        by_patient(hit[known], np.unique(patient[known], return_inverse=True)[1])
    )
    assert found.coverage.low < 0.9 < found.coverage.high
    assert found.coverage.chance == 0.9
    assert 1 <= found.size.value <= 3
    assert sum(c.n for c in found.per_class) == found.coverage.n == known.sum()
    assert set(found.to_dict()) == {"coverage", "size", "single", "empty", "per_class"}


def test_a_row_that_fits_no_class_is_empty_or_gets_its_best():
    probabilities = np.repeat([[0.98, 0.01, 0.01]], 50, axis=0)
    flat = [[0.4, 0.35, 0.25]]
    kept = SplitConformal(0.1).fit(probabilities, np.zeros(50)).predict(flat)
    assert kept.members.tolist() == [[False] * 3]
    assert kept.codes.tolist() == [-1]
    best = SplitConformal(0.1, empty="most_probable").fit(probabilities, np.zeros(50)).predict(flat)
    assert best.members.tolist() == [[True, False, False]]
    assert best.was_empty.tolist() == [True]


def test_what_cannot_be_promised():
    probabilities, truth, patient = draw(5, 30)
    fitted = SplitConformal().fit(probabilities, truth, patient)
    with pytest.raises(InputError, match="not calibrated"):
        SplitConformal().predict(probabilities)
    with pytest.raises(InputError, match="not calibrated"):
        SplitConformal().to_dict()
    with pytest.raises(InputError, match="calibrated on 3 classes"):
        fitted.predict(probabilities[:, 0])
    with pytest.raises(InputError, match="alpha"):
        SplitConformal(90).fit(probabilities, truth)
    with pytest.raises(InputError, match="nothing to calibrate"):
        SplitConformal().fit(probabilities, np.full(30, np.nan))
    with pytest.raises(InputError, match="groups"):
        SplitConformal().fit(probabilities, truth, patient[:-1])
    with pytest.raises(InputError, match="wrong fields"):
        SplitConformal.from_dict({"alpha": 0.1})
    with pytest.raises(InputError, match="NaN"):
        patient_quantile([math.nan], ["a"], 0.1)
    with pytest.raises(InputError, match="nothing to compare"):
        score_sets(fitted.predict(probabilities), np.full(30, np.nan))
    with pytest.raises(InputError, match="groups"):
        score_sets(fitted.predict(probabilities), truth, patient[:-1])
    for wrong in ({"method": "raps"}, {"per_patient": "mean"}, {"empty": "drop"}):
        with pytest.raises(UnknownName):
            SplitConformal().set_params(**wrong).fit(probabilities, truth)
    with pytest.raises(UnknownName):
        SplitConformal().set_params(level=0.9)
    assert patient_quantile([], [], 0.1) == math.inf
