"""Saved calibrations that were changed by hand or by a fault, parts of patients, and origins: what is refused, and what not."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import ChiasmError, InputError, LeakageError, SpaceMismatch
from chiasm.tasks.calibrated import Calibration, CalibrationPlan, fit_calibration
from chiasm.tasks.calibration_file import load_calibration, save_calibration
from chiasm.tasks.domain import DomainReference, fit_domain
from chiasm.tasks.scored_rows import Origin, ScoredRows, choose_parts, deal_patients
from chiasm.types import Embeddings, Space

SPACE = Space("tiny", "w1", "p1", 4)
CLASSES, LABELS = Origin("single", ("x", "y", "z")), Origin("multi", ("a", "b"))


def rows_of(origin: Origin, patients: int = 160, seed: int = 0) -> ScoredRows:
    random = np.random.default_rng(seed)
    width = len(origin.labels)
    scores = random.normal(size=(patients, width))
    if origin.mode == "single":
        truth = np.eye(width)[random.integers(0, width, patients)]
    else:
        truth = (random.random((patients, width)) < 0.5).astype(float)
    scores = scores + 1.5 * truth
    names = tuple(f"secret{i}" for i in range(patients))
    return ScoredRows(scores, truth, names, names, origin)


def saved(kind: str) -> dict[str, Any]:
    origin = CLASSES if kind == "classes" else LABELS
    method: Any = "isotonic" if kind == "isotonic" else "auto"
    return dict(json.loads(json.dumps(fit_calibration(rows_of(origin), CalibrationPlan(method=method)).to_dict())))


SAVED = {kind: saved(kind) for kind in ("labels", "isotonic", "classes")}
GONE = object()


def changed(kind: str, place: str, value: Any) -> dict[str, Any]:
    """A saved calibration with one value replaced; ``place`` is a path of keys joined by ``/``."""
    made = copy.deepcopy(SAVED[kind])
    *path, last = place.split("/")
    here: Any = made
    for key in path:
        here = here[int(key)] if isinstance(here, list) else here[key]
    end: Any = int(last) if isinstance(here, list) else last
    if value is GONE:
        del here[end]
    else:
        assert isinstance(here, list) or end in here
        here[end] = value
    return made


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("labels", "chiasm_calibration", 2),
        ("labels", "chiasm_calibration", GONE),
        ("labels", "origin", GONE),
        ("labels", "origin", 3),
        ("labels", "origin/labels", []),
        ("labels", "origin/labels/0", 3),
        ("labels", "origin/labels/0", None),
        ("labels", "origin/mode", "both"),
        ("labels", "plan/method", "best"),
        ("labels", "plan/coverage", 90),
        ("labels", "plan/coverage", "much"),
        ("labels", "calibrators", []),
        ("labels", "calibrators/a", None),
        ("labels", "calibrators/a/method", "magic"),
        ("labels", "calibrators/a/fitted", None),
        ("labels", "calibrators/a/fitted", []),
        ("labels", "calibrators/a/fitted/0", {}),
        ("labels", "calibrators/a/fitted/0/slope", GONE),
        ("labels", "calibrators/a/fitted/0/slope", None),
        ("labels", "calibrators/a/fitted/0/slope", "steep"),
        ("labels", "calibrators/a/fitted/0/slope", math.nan),
        ("labels", "calibrators/a/fitted/0/slope", math.inf),
        ("labels", "calibrators/a/fitted/0/intercept", []),
        ("labels", "calibrators/a/fitted/0/intercept", math.nan),
        ("labels", "points/a/threshold", None),
        ("labels", "points/a/threshold", "high"),
        ("labels", "points/a/threshold", math.nan),
        ("labels", "points/a/threshold", math.inf),
        ("labels", "bands/a/low", math.nan),
        ("labels", "bands/a/low", 2.0),
        ("labels", "bands/a/high", "high"),
        ("labels", "sets/a", GONE),
        ("labels", "sets/a/thresholds", []),
        ("labels", "sets/a/thresholds", {}),
        ("labels", "sets/a/alpha", 0),
        ("labels", "sets/a/classes", 3),
        ("labels", "sets/a/classes", math.inf),
        ("labels", "sets/a/method", "magic"),
        ("isotonic", "calibrators/a/fitted/0/scores", []),
        ("isotonic", "calibrators/a/fitted/0/scores", GONE),
        ("isotonic", "calibrators/a/fitted/0/probabilities", None),
        ("isotonic", "calibrators/a/fitted/0/probabilities", [0.1]),
        ("isotonic", "calibrators/a/fitted/0/probabilities/0", -3.0),
        ("isotonic", "calibrators/a/fitted/0/probabilities/0", math.nan),
        ("isotonic", "calibrators/a/fitted/0/probabilities/0", "low"),
        ("classes", "calibrators", {}),
        ("classes", "calibrators/", GONE),
        ("classes", "calibrators//fitted", []),
        ("classes", "calibrators//fitted/0/temperature", 0),
        ("classes", "calibrators//fitted/0/temperature", "warm"),
        ("classes", "calibrators//fitted/0/columns", 2),
        ("classes", "sets", {}),
        ("classes", "sets/", GONE),
        ("classes", "sets//thresholds", []),
    ],
)
def test_a_damaged_calibration_is_refused_when_it_is_read(kind: str, place: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(changed(kind, place, value)))
    with pytest.raises(ChiasmError) as raised:
        load_calibration(path)
    assert str(tmp_path) not in str(raised.value)
    assert len(str(raised.value)) < 400
    if isinstance(value, float) and place.split("/", maxsplit=1)[0] in ("calibrators", "points"):
        assert "the calibration is damaged: it gives no probabilities" in str(raised.value)


@pytest.mark.parametrize("kind", list(SAVED))
def test_a_whole_one_is_read_and_answers_the_same(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(SAVED[kind]))
    rows = rows_of(CLASSES if kind == "classes" else LABELS, seed=5)
    read = load_calibration(path)
    assert read.domain is None
    assert read.calibration.to_dict() == SAVED[kind]
    again = tmp_path / "again.json"
    save_calibration(again, read.calibration)
    assert load_calibration(again).records(rows) == read.records(rows)
    assert "secret" not in path.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "not valid JSON"), ("{", "not valid JSON"), ("[]", "is no calibration"), ("3", "is no calibration"),
     ("null", "is no calibration"), ("{}", "no calibration of form"), ("[" * 100_000, "not valid JSON"),
     ('{"domain": 3, "chiasm_calibration": 9}', "no calibration of form")],
)  # fmt: skip
def test_what_is_no_calibration(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(ChiasmError, match=message):
        load_calibration(path)


@pytest.mark.parametrize("domain", [3, "x", [], True])
def test_a_domain_that_is_no_table(domain: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**SAVED["labels"], "domain": domain}))
    with pytest.raises(ChiasmError, match="is damaged"):
        load_calibration(path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": ("b", "a")}, InputError, "of 2 labels"),
        ({"labels": ("a",)}, InputError, "of 1"),
        ({"mode": "single"}, InputError, "single"),
        ({"prompts": "other"}, InputError, "other prompts"),
        ({"activation": "sigmoid"}, InputError, "another way"),
        ({"logit_scale": 31.0}, InputError, "another way"),
        ({"logit_scale": None}, InputError, "another way"),
        ({"protocol": "chexzero (published)"}, InputError, "another way"),
        ({"space": None}, SpaceMismatch, "a table of scores"),
        ({"space": Space("tiny", "w2", "p1", 4)}, SpaceMismatch, "these scores come from"),
        ({"space": Space("tiny", "w1", "p2", 4)}, SpaceMismatch, "these scores come from"),
    ],
)
def test_another_classifier_is_told_by_what_differs(
    change: dict[str, Any], error: type[ChiasmError], message: str
) -> None:
    own = Origin("multi", ("a", "b"), SPACE, "abc", "pair", 30.0)
    own.check(dataclasses.replace(own, logit_scale=30.000001))  # rounding of a file
    with pytest.raises(error, match=message) as raised:
        own.check(dataclasses.replace(own, **change))
    assert raised.value.hint
    assert Origin.from_dict(own.to_dict()) == own


@pytest.mark.parametrize(
    ("scores", "truth", "names", "message"),
    [
        ([[1, 2]], [[1, 0], [1, 0]], "p", "expected"),
        ([[1, 2]], [[1, 0]], "pq", "expected"),
        ([[1, math.nan]], [[1, 0]], "p", "1 of 2 scores are not finite"),
        ([[1, math.inf], [math.nan, 1]], [[1, 0], [0, 1]], "pq", "2 of 4 scores"),
        ([[1, 2]], [[1, 1]], "p", "exactly one true class"),
        ([[1, 2]], [[0, 0]], "p", "exactly one true class"),
        ([[1, 2]], [[1, math.nan]], "p", "exactly one true class"),
    ],
)
def test_rows_that_are_no_rows(scores: list[Any], truth: list[Any], names: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScoredRows(np.array(scores), np.array(truth), tuple(names), tuple(names), Origin("single", ("x", "y")))


PARTS = ["train", "train", "val", "val", "test", "test", None]
GROUPS = ["a", "b", "c", "d", "e", "f", "g"]


@pytest.mark.parametrize(
    ("options", "fitting", "judging"),
    [
        ({}, [2, 3], [4, 5]),
        ({"fit": "val", "test": "test"}, [2, 3], [4, 5]),
        ({"fit": "test", "test": "val"}, [4, 5], [2, 3]),
        ({"fit": "train", "test": "val"}, [0, 1], [2, 3]),
    ],
)
def test_parts_that_are_named(options: dict[str, Any], fitting: list[int], judging: list[int]) -> None:
    found = choose_parts(PARTS, GROUPS, **options)
    assert (found[0].tolist(), found[1].tolist()) == (fitting, judging)
    assert "fitted on" in found[2]


@pytest.mark.parametrize(
    ("parts", "dealt", "said"),
    [
        (["train", "train", "test", "test", "test", "test", "test"], {2, 3, 4, 5, 6}, "2 patients of the training"),
        (["training"] * 3 + ["val"] * 4, {3, 4, 5, 6}, "3 patients of the training"),
        (["train"] * 3 + [None] * 4, {3, 4, 5, 6}, "3 patients of the training"),
        (["train"] * 7, set(range(7)), "seed 0"),  # nothing else is there
        (["train"] * 6 + ["test"], set(range(7)), "seed 0"),  # one patient cannot be dealt
        ([None] * 7, set(range(7)), "seed 0"),
        (["fold1"] * 7, set(range(7)), "seed 0"),
    ],
)
def test_what_a_model_may_have_learned_from_is_not_dealt(parts: list[str | None], dealt: set[int], said: str) -> None:
    fitting, judging, words = choose_parts(parts, GROUPS)
    assert set(fitting.tolist()) | set(judging.tolist()) == dealt
    assert set(fitting.tolist()).isdisjoint(judging.tolist())
    assert min(len(fitting), len(judging)) > 0
    assert said in words


def test_a_patient_who_also_has_training_rows_is_not_judged() -> None:
    fitting, judging, _ = choose_parts(["train", "test", "test", "test"], ["a", "a", "b", "c"])
    assert sorted([*fitting, *judging]) == [2, 3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fit": "val"}, InputError, "name both"),
        ({"test": "val"}, InputError, "name both"),
        ({"fit": "valid", "test": "test"}, InputError, "no row has split `valid`"),
        ({"fit": "val", "test": "Test"}, InputError, "no row has split `Test`"),
        ({"fit": "val", "test": "val"}, LeakageError, "2 patients"),
    ],
)
def test_parts_that_cannot_be(options: dict[str, str], error: type[ChiasmError], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        choose_parts(PARTS, GROUPS, **options)  # type: ignore[arg-type]
    assert raised.value.hint


@settings(max_examples=40)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30).filter(lambda g: len(set(g)) > 1),
       st.floats(0.05, 0.95), st.integers(0, 5))  # fmt: skip
def test_no_patient_is_cut_and_the_order_of_rows_is_no_matter(groups: list[str], share: float, seed: int) -> None:
    taken = deal_patients(groups, share, seed=seed)
    inside = {g for g, t in zip(groups, taken, strict=True) if t}
    outside = {g for g, t in zip(groups, taken, strict=True) if not t}
    assert inside
    assert outside
    assert inside.isdisjoint(outside)
    assert len(inside) == min(max(round(share * len(set(groups))), 1), len(set(groups)) - 1)
    again = deal_patients(groups[::-1], share, seed=seed)
    assert again[::-1].tolist() == taken.tolist()


@pytest.mark.parametrize(
    ("groups", "share", "message"),
    [(["a", "a"], 0.5, "1 patient"), (["a", "b"], 0.0, "between 0 and 1"), (["a", "b"], 1.0, "between 0 and 1"),
     (["a", "b"], math.nan, "between 0 and 1")],
)  # fmt: skip
def test_patients_that_cannot_be_dealt(groups: list[str], share: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        deal_patients(groups, share)


@pytest.mark.parametrize(
    ("field", "value"),
    [("method", "plat"), ("sensitivity", 0), ("sensitivity", 1), ("specificity", 95), ("coverage", -0.1),
     ("coverage", math.nan), ("sets_share", 1.0)],
)  # fmt: skip
def test_plans_that_cannot_be(field: str, value: Any) -> None:
    with pytest.raises(ChiasmError) as raised:
        CalibrationPlan(**{field: value})
    assert raised.value.hint


def test_order_of_rows_does_not_change_a_calibration() -> None:
    rows = rows_of(LABELS)
    order = np.random.default_rng(0).permutation(len(rows))
    a, b = fit_calibration(rows), fit_calibration(rows.select(order))
    test = rows_of(LABELS, seed=7)
    np.testing.assert_allclose(a.probabilities(test.scores), b.probabilities(test.scores), atol=1e-9)
    for label in a.labels:
        assert a.points[label].threshold == pytest.approx(b.points[label].threshold)
        np.testing.assert_allclose(a.sets[label].thresholds_, b.sets[label].thresholds_, atol=1e-9)


def test_renaming_patients_and_labels_changes_no_number() -> None:
    rows = rows_of(LABELS)
    other = ScoredRows(rows.scores, rows.truth, rows.groups, tuple(f"é<{i}>" for i in range(len(rows))),
                       Origin("multi", ("β & γ", "<b>")))  # fmt: skip
    a, b = fit_calibration(rows), fit_calibration(other)
    assert [c.to_dict()["fitted"] for c in a.calibrators.values()] == [
        c.to_dict()["fitted"] for c in b.calibrators.values()
    ]
    assert Calibration.from_dict(json.loads(json.dumps(b.to_dict()))).labels == ("β & γ", "<b>")
    assert b.apply(other).to_records()[0]["id"] == "é<0>"


def cloud(seed: int, patients: int = 40) -> Embeddings:
    vectors = (np.random.default_rng(seed).normal(size=(patients, 4)) + 3 * np.eye(4)[0]).astype(np.float32)
    names = tuple(f"secret{seed}-{i}" for i in range(patients))
    return Embeddings(vectors, names, SPACE, "image", normalized=False)


@pytest.fixture(scope="module", params=["mahalanobis", "knn"])
def domain(request: pytest.FixtureRequest) -> DomainReference:
    return fit_domain(cloud(0), cloud(1), method=request.param, neighbours=5)


def test_a_domain_is_read_back_and_judges_alike(domain: DomainReference, tmp_path: Path) -> None:
    files = save_calibration(tmp_path / "c.json", Calibration.from_dict(SAVED["labels"]), domain)
    assert [f.name for f in files] == ["c.json", "c.domain.npz"]
    read = load_calibration(tmp_path / "c.json").domain
    assert read is not None
    new = cloud(2)
    np.testing.assert_allclose(read.score(new).scores, domain.score(new).scores, rtol=1e-4)
    assert read.to_dict() == domain.to_dict()
    assert b"secret" not in files[0].read_bytes() + files[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", "magic"), ("method", None), ("threshold", "far"), ("threshold", math.nan), ("space", None),
     ("space", {}), ("patients", []), ("patients", 3), ("false_alarms", "few"), ("neighbours", None),
     ("neighbours", math.inf), ("shrinkage", GONE), ("modality", GONE), ("sha256", "0" * 64), ("sha256", GONE)],
)  # fmt: skip
def test_a_damaged_domain_is_refused(domain: DomainReference, name: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    save_calibration(path, Calibration.from_dict(SAVED["labels"]), domain)
    made = json.loads(path.read_text())
    if value is GONE:
        del made["domain"][name]
    else:
        made["domain"][name] = value
    path.write_text(json.dumps(made))
    with pytest.raises(ChiasmError) as raised:
        load_calibration(path)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": np.zeros(3)}, "do not fit 4 dimensions"),
        ({"mean": np.full(4, np.nan)}, "numbers are none"),
        ({"basis": np.zeros(4)}, "do not fit 4 dimensions"),
        ({"validation_scores": np.array([2.0, 1.0]), "validation_weights": np.ones(2)}, "do not rise"),
        ({"validation_weights": np.ones(3)}, "do not rise"),
        ({"validation_scores": np.full(40, np.inf)}, "numbers are none"),
    ],
)
def test_arrays_of_a_domain_fit_each_other(domain: DomainReference, change: dict[str, Any], message: str) -> None:
    arrays = {n: getattr(domain, n) for n in ("mean", "basis", "validation_scores", "validation_weights")}
    assert DomainReference.from_dict(domain.to_dict(), arrays).threshold == domain.threshold
    with pytest.raises(InputError, match=message):
        DomainReference.from_dict(domain.to_dict(), {**arrays, **change})


@pytest.mark.parametrize("neighbours", [0, -1, 41])
def test_neighbours_that_are_not_there(neighbours: int) -> None:
    made = fit_domain(cloud(0), cloud(1), method="knn", neighbours=40)
    arrays = {n: getattr(made, n) for n in ("mean", "basis", "validation_scores", "validation_weights")}
    with pytest.raises(InputError, match="no neighbour"):
        DomainReference.from_dict({**made.to_dict(), "neighbours": neighbours}, arrays)
    with pytest.raises(InputError, match="neighbours must be 1 to the 40"):
        fit_domain(cloud(0), cloud(1), method="knn", neighbours=neighbours)


def test_files_of_two_calibrations_are_not_mixed_up(domain: DomainReference, tmp_path: Path) -> None:
    calibration = Calibration.from_dict(SAVED["labels"])
    save_calibration(tmp_path / "a.json", calibration, domain)
    save_calibration(tmp_path / "b.json", calibration, fit_domain(cloud(7), cloud(8)))
    (tmp_path / "b.domain.npz").replace(tmp_path / "a.domain.npz")
    with pytest.raises(ChiasmError, match="does not belong"):
        load_calibration(tmp_path / "a.json")
    with pytest.raises(ChiasmError, match="is missing beside"):
        load_calibration(tmp_path / "b.json")
