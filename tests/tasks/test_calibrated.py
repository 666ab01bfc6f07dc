"""A whole calibration: fitted on validation patients, saved and loaded, applied to the same classifier only."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from chiasm.errors import FileFormatError, InputError, LeakageError, SpaceMismatch, UnknownName
from chiasm.tasks.calibrated import Calibration, CalibrationPlan, fit_calibration
from chiasm.tasks.calibration_file import load_calibration, save_calibration
from chiasm.tasks.domain import fit_domain
from chiasm.tasks.prompts import PromptSet
from chiasm.tasks.scored_rows import Origin, ScoredRows, check_disjoint, deal_patients, prompts_digest
from chiasm.tasks.zero_shot import sigmoid
from chiasm.types import Embeddings, Space

SPACE = Space("tiny", "w1", "p1", 4)
LABELS = ("effusion", "nodule", "never")


def labels_rows(seed, patients=600, images=2):
    """Scores three times too sure and shifted; the third label hardly occurs."""
    random = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), images)
    z = random.normal(size=(len(patient), 3)) * 1.2 + random.normal(size=(patients, 3))[patient] * 0.5 - 1
    truth = (random.random(z.shape) < sigmoid(z)).astype(float)
    truth[:, 2] = 0
    truth[:4, 2] = 1
    truth[random.random(z.shape) < 0.05] = np.nan
    origin = Origin("multi", LABELS, SPACE, "abc", "pair", 30.0)
    return ScoredRows(3 * z + 4, truth, tuple(f"p{seed}-{p}" for p in patient),
                      tuple(f"i{seed}-{i}" for i in range(len(patient))), origin)  # fmt: skip


def classes_rows(seed, patients=900):
    random = np.random.default_rng(seed)
    true = random.integers(0, 3, patients)
    z = random.normal(size=(patients, 3))
    z[np.arange(patients), true] += 1.5
    names = tuple(f"p{seed}-{i}" for i in range(patients))
    return ScoredRows(3 * z, np.eye(3)[true], names, names, Origin("single", ("a", "b", "c")))


@pytest.fixture(scope="module")
def fitted():
    return fit_calibration(labels_rows(1))


def test_labels_are_fitted_and_the_rare_one_is_refused(fitted):
    assert fitted.labels == ("effusion", "nodule")
    assert "patients with it" in fitted.refused["never"]
    assert sum(fitted.patients.values()) == 600
    rows = labels_rows(2)
    answers = fitted.apply(rows)
    assert np.isnan(answers.probabilities[:, 2]).all()
    assert (answers.answers[:, 2] == -1).all()
    for k in range(2):
        known = ~np.isnan(rows.truth[:, k])
        gap = answers.probabilities[known, k].mean() - rows.truth[known, k].mean()
        assert abs(gap) < 0.04
        assert abs(rows.uncalibrated[known, k].mean() - rows.truth[known, k].mean()) > 0.1
        # The threshold, the band and the sets are those of the parts.
        assert (answers.called[:, k] == (answers.probabilities[:, k] >= fitted.points[LABELS[k]].threshold)).all()
        band = fitted.bands[LABELS[k]]
        undecided = (answers.probabilities[:, k] >= band.low) & (answers.probabilities[:, k] < band.high)
        assert ((answers.banded[:, k] == -1) == undecided).all()


def test_probabilities_and_sets_see_different_patients():
    rows = labels_rows(3)
    held = deal_patients(rows.groups, 0.5, seed=0)
    other = rows.truth.copy()
    other[held, 0] = 1 - other[held, 0]  # the truth of the sets' patients, turned round
    a, b = fit_calibration(rows), fit_calibration(dataclasses.replace(rows, truth=other))
    assert a.calibrators["effusion"].to_dict() == b.calibrators["effusion"].to_dict()
    assert a.points["effusion"] == b.points["effusion"]
    assert a.sets["effusion"].to_dict() != b.sets["effusion"].to_dict()
    other = rows.truth.copy()
    other[~held, 1] = np.where(rows.scores[~held, 1] > 0, 1.0, 0.0)
    c = fit_calibration(dataclasses.replace(rows, truth=other))
    assert c.points["nodule"] != a.points["nodule"]


def test_coverage_is_kept_over_five_seeds_of_3000_patients_each():
    """Mean coverage within 2 points of what was promised, of classes and, class by class, of labels."""
    found, by_class = [], []
    for seed in range(5):
        calibration = fit_calibration(classes_rows(seed, 6000), CalibrationPlan(coverage=0.9))
        assert calibration.patients == {"probabilities": 3000, "sets": 3000}
        test = classes_rows(100 + seed, 3000)
        members = calibration.apply(test).members
        found.append(members[np.arange(3000), test.classes].mean())
        labels = fit_calibration(labels_rows(seed, 6000, 1), CalibrationPlan(coverage=0.9, seed=seed))
        test = labels_rows(200 + seed, 3000, 1)
        inside, truth = labels.apply(test).members[:, 0], test.truth[:, 0]
        by_class.append([inside[truth == side, side].mean() for side in (0, 1)])
    assert abs(np.mean(found) - 0.9) < 0.02
    assert (abs(np.mean(by_class, axis=0) - 0.9) < 0.02).all()


def test_classes_exclude_each_other():
    calibration = fit_calibration(classes_rows(0))
    answers = calibration.apply(classes_rows(1))
    np.testing.assert_allclose(answers.probabilities.sum(axis=1), 1)
    assert calibration.calibrators[""].temperatures_[0] > 1.5
    records = answers.to_records()
    assert set(records[0]) == {"id", "probability a", "probability b", "probability c", "answer", "set"}
    unsure = [r for r in records if r["answer"] == "cannot tell"]
    assert unsure
    assert all(r["set"].count("|") != 0 or r["set"] == "" for r in unsure)
    with pytest.raises(InputError, match="exclude each other"):
        fit_calibration(classes_rows(0), CalibrationPlan(method="platt"))


def test_it_is_saved_and_loaded_exactly(fitted, tmp_path):
    files = save_calibration(tmp_path / "c.json", fitted)
    assert files == [tmp_path / "c.json"]
    again = load_calibration(tmp_path / "c.json").calibration
    assert again.to_dict() == fitted.to_dict()
    rows = labels_rows(4)
    np.testing.assert_array_equal(again.apply(rows).probabilities, fitted.apply(rows).probabilities)
    content = (tmp_path / "c.json").read_text()
    assert "p1-" not in content
    assert "i1-" not in content  # no patient and no image in the file


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"space": Space("tiny", "w2", "p1", 4)}, SpaceMismatch),
        ({"space": None}, SpaceMismatch),
        ({"prompts": "other"}, InputError),
        ({"logit_scale": 31.0}, InputError),
        ({"activation": "sigmoid"}, InputError),
        ({"protocol": "chexzero (published)"}, InputError),
        ({"labels": ("nodule", "effusion", "never")}, InputError),
    ],
)
def test_another_classifier_is_refused(fitted, change, error):
    rows = labels_rows(5, 20)
    other = dataclasses.replace(rows, origin=dataclasses.replace(rows.origin, **change))
    with pytest.raises(error) as raised:
        fitted.apply(other)
    assert raised.value.hint


def embeddings(seed, n, *, shift=0.0, space=SPACE):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(n, 4)).astype(np.float32) * 0.2 + [1, shift, 0, 0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embeddings(vectors, tuple(f"i{seed}-{i}" for i in range(n)), space, "image")


@pytest.mark.parametrize("method", ["mahalanobis", "knn"])
def test_a_foreign_image_gets_no_answer(fitted, tmp_path, method):
    domain = fit_domain(embeddings(10, 300), embeddings(11, 200), method=method)
    save_calibration(tmp_path / "c.json", fitted, domain)
    saved = load_calibration(tmp_path / "c.json")
    rows = labels_rows(6, 20)
    images = dataclasses.replace(embeddings(6, 40, shift=4.0), ids=rows.ids)
    records = saved.records(rows, images)
    assert sum(r["out of domain"] for r in records) > 30
    for record in records:
        if record["out of domain"]:
            assert record["answer effusion"] == record["answer nodule"] == "out of domain"
    fresh = embeddings(12, 50)
    np.testing.assert_allclose(saved.domain.score(fresh).scores, domain.score(fresh).scores, rtol=1e-4)
    assert "out of domain" not in saved.records(rows)[0]
    with pytest.raises(InputError, match="not those of the scores"):
        saved.records(rows, embeddings(99, 40))
    (tmp_path / "c.domain.npz").write_bytes(b"PK" + bytes(40))
    with pytest.raises(FileFormatError, match="does not belong"):
        load_calibration(tmp_path / "c.json")
    (tmp_path / "c.domain.npz").unlink()
    with pytest.raises(FileFormatError, match="missing"):
        load_calibration(tmp_path / "c.json")


def test_damaged_files_are_told(fitted, tmp_path):
    path = tmp_path / "c.json"
    good = fitted.to_dict()
    for content, error in (("{", FileFormatError), ("[]", InputError), ("{}", InputError),
                           (json.dumps({"chiasm_calibration": 99}), InputError),
                           (json.dumps({**good, "origin": {"mode": "multi"}}), InputError),
                           (json.dumps({**good, "points": {"effusion": {"x": 1}}}), InputError),
                           (json.dumps({**good, "plan": 3}), InputError)):  # fmt: skip
        path.write_text(content)
        with pytest.raises(error):
            load_calibration(path)
    with pytest.raises(InputError, match="does not exist"):
        load_calibration(tmp_path / "absent.json")


def test_patients_are_never_cut():
    groups = [f"p{i % 7}" for i in range(50)]
    taken = deal_patients(groups, 0.4, seed=3)
    assert not {g for g, t in zip(groups, taken, strict=True) if t} & {
        g for g, t in zip(groups, taken, strict=True) if not t
    }
    order = np.random.default_rng(0).permutation(50)
    assert (deal_patients([groups[i] for i in order], 0.4, seed=3) == taken[order]).all()
    with pytest.raises(InputError, match="two parts"):
        deal_patients(["a", "a"], 0.5)
    with pytest.raises(LeakageError, match="1 patients"):
        check_disjoint(["a", "b"], ["b", "c"])


def test_hostile_plans_and_rows():
    with pytest.raises(UnknownName, match="platt"):
        CalibrationPlan(method="plat")
    for name in ("sensitivity", "specificity", "coverage", "sets_share"):
        with pytest.raises(InputError, match="between 0 and 1"):
            CalibrationPlan(**{name: 95})
    rows = labels_rows(7, 30)
    with pytest.raises(InputError, match="none of 3 labels"):
        fit_calibration(dataclasses.replace(rows, scores=-rows.scores))
    with pytest.raises(InputError, match="not finite"):
        dataclasses.replace(rows, scores=rows.scores * np.nan)
    with pytest.raises(InputError, match="expected"):
        dataclasses.replace(rows, truth=rows.truth[:5])
    with pytest.raises(InputError, match="exactly one"):
        dataclasses.replace(classes_rows(0, 5), truth=np.ones((5, 3)))


def test_the_digest_of_prompts_sees_everything():
    base = PromptSet.from_pairs(["effusion", "nodule"])
    other = PromptSet.from_pairs(["nodule", "effusion"])
    assert prompts_digest(base) != prompts_digest(other)
    assert prompts_digest(base) == prompts_digest(PromptSet.from_pairs(["effusion", "nodule"]))


def test_it_is_a_value(fitted):
    assert isinstance(fitted, Calibration)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fitted.origin = None
