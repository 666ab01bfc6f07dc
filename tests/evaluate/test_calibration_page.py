"""The page of a calibration: every number of its JSON, the reasons, names that are code elsewhere, and no patient."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from typing import Any

import numpy as np
import pytest

from chiasm.errors import InputError
from chiasm.evaluate.calibration_figures import abstention_bars, reliability_plots
from chiasm.evaluate.calibration_page import MANY_EMPTY, calibration_page, summary_rows
from chiasm.evaluate.calibration_scores import CalibrationScores, DomainScores, score_calibration
from chiasm.evaluate.page import render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.metrics.calibration import reliability_curve
from chiasm.tasks.calibrated import Calibration, CalibrationPlan, fit_calibration
from chiasm.tasks.scored_rows import Origin, ScoredRows
from chiasm.types import Interval, Space

CARD = RunCard("chiasm calibrate", {"scores": "abc"}, {"scores": 3}, "a table", 0)
HOSTILE = ("<script>alert(1)</script>", r"$\frac & “é” _{")


def shown(page: Any) -> str:
    """What a reader sees as text: the page without drawings, with its entities read."""
    return html.unescape(re.sub(r"<svg.*?</svg>", "", render_page(page), flags=re.DOTALL))


def intervals(value: Any, place: str = "") -> dict[str, Interval]:
    """Every interval of a document, by its place."""
    if isinstance(value, dict):
        if {"value", "low", "high"} <= set(value):
            first, low, high = (math.nan if value[k] is None else value[k] for k in ("value", "low", "high"))
            return {place: Interval(first, low, high, value["n"], value["chance"])}
        return {k: v for name, inner in value.items() for k, v in intervals(inner, f"{place}/{name}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in intervals(inner, f"{place}/{i}").items()}
    return {}


def rows_of(seed: int, labels: tuple[str, ...] = ("a", "b"), mode: Any = "multi", patients: int = 200) -> ScoredRows:
    random = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), 2)
    width = len(labels)
    z = random.normal(size=(len(patient), width)) + random.normal(size=(patients, width))[patient] * 0.5
    if mode == "single":
        truth = np.eye(width)[(z + random.normal(size=z.shape)).argmax(axis=1)]
    else:
        truth = (random.random(z.shape) < 1 / (1 + np.exp(-z))).astype(float)
    names = tuple(f"secret{seed}-{p}" for p in patient)
    ids = tuple(f"file{seed}-{i}" for i in range(len(patient)))
    return ScoredRows(2.5 * z + 1, truth, names, ids, Origin(mode, labels))


def made(
    labels: tuple[str, ...] = ("a", "b"), mode: Any = "multi", **plan: Any
) -> tuple[Calibration, CalibrationScores]:
    calibration = fit_calibration(rows_of(1, labels, mode), CalibrationPlan(**plan))
    return calibration, score_calibration(calibration, rows_of(2, labels, mode), n_resamples=40)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawings cost half a second each, and their text is not what most tests read."""
    if "drawn" not in request.fixturenames:
        for name in ("reliability_plots", "abstention_bars", "distributions"):
            monkeypatch.setattr(f"chiasm.evaluate.calibration_page.{name}", lambda *_, **__: "<svg></svg>")


@pytest.fixture
def drawn() -> None:
    """Ask for the drawings."""


@pytest.fixture(scope="module")
def several() -> tuple[Calibration, CalibrationScores]:
    return made()


@pytest.fixture(scope="module")
def classes() -> tuple[Calibration, CalibrationScores]:
    return made(("x", "y", "z"), "single", coverage=0.8)


@pytest.mark.parametrize("kind", ["several", "classes"])
def test_every_number_of_the_document_stands_on_the_page(kind: str, request: pytest.FixtureRequest) -> None:
    calibration, scores = request.getfixturevalue(kind)
    text = shown(calibration_page(calibration, scores, CARD))
    found = intervals(json.loads(json.dumps(scores.to_dict(), allow_nan=False)))
    assert len(found) > 30
    # The page leaves out, to be short: what sets and bands do to predictive values.
    left_out = re.compile(r"/(by_sets|band)/reached/(ppv|npv|undecided)$|/reached/undecided$")
    absent = [place for place, number in found.items() if not left_out.search(place) and str(number) not in text]
    assert absent == []


@pytest.mark.parametrize("kind", ["several", "classes"])
def test_no_patient_and_no_image_is_named(kind: str, request: pytest.FixtureRequest) -> None:
    calibration, scores = request.getfixturevalue(kind)
    everything = render_page(calibration_page(calibration, scores, CARD)) + json.dumps(scores.to_dict())
    assert "secret" not in everything
    assert "file2-" not in everything


def test_thresholds_and_counts_are_those_of_the_calibration(several: tuple[Calibration, CalibrationScores]) -> None:
    calibration, scores = several
    text = shown(calibration_page(calibration, scores, CARD))
    for label, point in calibration.points.items():
        assert f"{point.threshold:.4f}" in text, label
        assert f"{point.sensitivity:.3f}" in text, label
    assert "Fitted on 100 validation patients (prediction sets on 100 others), judged on 400 images of 200" in text
    assert "Thresholds at a sensitivity of 0.95" in text
    assert "not a medical device" in text
    assert text.index("Errors before and after") < text.index("Run card")


@pytest.mark.usefixtures("drawn")
def test_names_of_labels_are_text_on_the_page() -> None:
    calibration, scores = made(HOSTILE)
    page = render_page(calibration_page(calibration, scores, CARD, file="c.json"))
    assert "<script" not in page
    assert html.escape(HOSTILE[0]) in page
    assert HOSTILE[1] in html.unescape(page)


@pytest.mark.parametrize("file", ["c.json", "a b <i>.json"])
def test_the_next_command_fits_the_origin(file: str, several: tuple[Calibration, CalibrationScores]) -> None:
    calibration, scores = several
    assert f"--apply {file} --scores" in shown(calibration_page(calibration, scores, CARD, file=file))
    assert "Go on" not in shown(calibration_page(calibration, scores, CARD))
    space = Space("tiny", "w", "p", 4)
    of_a_model = dataclasses.replace(calibration, origin=dataclasses.replace(calibration.origin, space=space))
    text = shown(calibration_page(of_a_model, scores, CARD, file=file))
    assert f"--calibration {file} --model" in text
    assert "--multi" in text
    single = dataclasses.replace(of_a_model, origin=dataclasses.replace(of_a_model.origin, mode="single"))
    assert "--multi" not in shown(calibration_page(single, scores, CARD, file=file))


@pytest.mark.parametrize(
    ("change", "said", "unsaid"),
    [
        ({}, "Sets and", "What was left out"),
        ({"refused": {"c<d": "too <few>"}}, "too <few>", "no column of patients"),
        ({"notes": ("there is no column of patients",)}, "no column of patients", "too few"),
        ({"labels": ()}, "No label has enough rows for a threshold", "AUROC, foreign"),
    ],
)
def test_reasons_are_told(
    change: dict[str, Any], said: str, unsaid: str, several: tuple[Calibration, CalibrationScores]
) -> None:
    calibration, scores = several
    page = calibration_page(calibration, dataclasses.replace(scores, **change), CARD)
    assert said in shown(page)
    assert unsaid not in shown(page)
    assert "<few>" not in render_page(page)


@pytest.mark.parametrize(("share", "told"), [(0.0, False), (MANY_EMPTY, False), (0.03, True), (0.5, True)])
def test_empty_sets_are_explained_from_a_share_on(
    share: float, told: bool, several: tuple[Calibration, CalibrationScores]
) -> None:
    calibration, scores = several
    first = scores.labels[0]
    assert first.sets is not None
    empty = dataclasses.replace(first.sets, empty=Interval(share, math.nan, math.nan, 10))
    labels = (dataclasses.replace(first, sets=empty), *scores.labels[1:])
    text = shown(calibration_page(calibration, dataclasses.replace(scores, labels=labels), CARD))
    assert ("Some sets are empty" in text) == told


@pytest.mark.parametrize(
    ("conservative", "said"), [(True, "so that the expected sensitivity"), (False, "half of the time")]
)
def test_a_threshold_says_what_it_promises(conservative: bool, said: str) -> None:
    calibration, scores = made(conservative=conservative, sensitivity=0.9)
    text = shown(calibration_page(calibration, scores, CARD))
    assert "Thresholds at a sensitivity of 0.90" in text
    assert said in text


def foreign_scores(threshold: float = 2.5, *, foreign: bool = True) -> DomainScores:
    auroc, caught = Interval(0.987, 0.911, 0.999, 70, 0.5), Interval(0.654, 0.6, 0.7, 40)
    alarms = Interval(0.043, 0.01, 0.09, 30, 0.05)
    others = np.linspace(2, 6, 40) if foreign else np.zeros(0)
    return DomainScores(auroc if foreign else None, caught if foreign else None, alarms, "knn", threshold,
                        np.linspace(1, 3, 30), others)  # fmt: skip


@pytest.mark.parametrize("threshold", [2.5, math.inf])
@pytest.mark.parametrize("foreign", [True, False])
def test_the_domain_has_its_section(
    threshold: float, foreign: bool, several: tuple[Calibration, CalibrationScores]
) -> None:
    calibration, scores = several
    domain = foreign_scores(threshold, foreign=foreign)
    text = shown(calibration_page(calibration, dataclasses.replace(scores, domain=domain), CARD))
    assert "0.043 [0.010, 0.090]" in text
    assert "0.05 promised" in text
    assert ("0.654 [0.600, 0.700]" in text) == foreign
    assert ("0.987 [0.911, 0.999]" in text) == foreign
    assert "reference images (knn)" in text
    plain = json.loads(json.dumps(domain.to_dict(), allow_nan=False))
    assert plain["threshold"] == (None if math.isinf(threshold) else threshold)


def test_the_terminal_shows_the_same_numbers(classes: tuple[Calibration, CalibrationScores]) -> None:
    _, scores = classes
    pooled, *labels = summary_rows(scores)
    assert scores.sets is not None
    assert scores.by_sets is not None
    assert pooled[2:5] == (
        f"{scores.pooled.before['ece'].value:.3f}",
        scores.pooled.after["ece"],
        scores.pooled.after["brier"],
    )
    assert pooled[-2:] == (f"{scores.sets.coverage.value:.3f}", f"{scores.by_sets.undecided.value:.3f}")
    assert [row[0] for row in labels] == ["x", "y", "z"]
    for row, found in zip(labels, scores.labels, strict=True):
        errors = found.errors
        assert row[1:5] == (f"{found.auroc.value:.3f}", f"{errors.before['ece'].value:.3f}", errors.after["ece"],
                            errors.after["brier"])  # fmt: skip
        assert found.reached is not None
        assert row[5] == found.reached.sensitivity
        assert row[-2:] == ("", "")  # classes share one set


def test_classes_have_the_constant_beside_them(classes: tuple[Calibration, CalibrationScores]) -> None:
    """Always saying the shares: Brier 1 - Σ share², log loss the entropy."""
    _, scores = classes
    truth = rows_of(2, ("x", "y", "z"), "single").truth
    share = truth.mean(axis=0)
    for side in (scores.pooled.before, scores.pooled.after):
        assert side["brier"].chance == pytest.approx(1 - (share**2).sum())
        assert side["log_loss"].chance == pytest.approx(-(share * np.log(share)).sum())
        assert side["ece"].chance is None
    assert scores.pooled.after["brier"].value < scores.pooled.after["brier"].chance  # type: ignore[operator]


def test_the_order_of_rows_changes_no_value(several: tuple[Calibration, CalibrationScores]) -> None:
    calibration, scores = several
    rows = rows_of(2)
    order = np.random.default_rng(3).permutation(len(rows))
    again = intervals(score_calibration(calibration, rows.select(order), n_resamples=40).to_dict())
    for place, number in intervals(scores.to_dict()).items():
        # The patients of the bootstrap are numbered by name, so that the draws are the same too.
        wanted = [number.value, number.low, number.high]
        np.testing.assert_allclose([again[place].value, again[place].low, again[place].high], wanted, atol=1e-9,
                                   err_msg=place)  # fmt: skip


def test_copies_of_all_rows_change_no_value_and_no_interval(several: tuple[Calibration, CalibrationScores]) -> None:
    calibration, scores = several
    rows = rows_of(2)
    twice = ScoredRows(np.repeat(rows.scores, 2, axis=0), np.repeat(rows.truth, 2, axis=0),
                       tuple(np.repeat(rows.groups, 2)), tuple(f"{i}" for i in range(2 * len(rows))), rows.origin)  # fmt: skip
    again = score_calibration(calibration, twice, n_resamples=40)
    for a, b in zip(scores.labels, again.labels, strict=True):
        assert b.errors.after["brier"].value == pytest.approx(a.errors.after["brier"].value)
        assert b.errors.after["brier"].high == pytest.approx(a.errors.after["brier"].high)
        assert b.auroc.low == pytest.approx(a.auroc.low)
    assert again.patients == scores.patients
    assert again.n == 2 * scores.n


@pytest.mark.parametrize("patients", [1, 2])
def test_few_test_patients_are_judged_without_nan_in_the_document(
    patients: int, several: tuple[Calibration, CalibrationScores]
) -> None:
    calibration, _ = several
    rows = rows_of(2).select(np.arange(2 * patients))
    scores = score_calibration(calibration, rows, n_resamples=20)
    json.dumps(scores.to_dict(), allow_nan=False)
    assert scores.patients == patients
    assert "Calibration" in render_page(calibration_page(calibration, scores, CARD))


def test_a_test_set_of_one_class_says_so(several: tuple[Calibration, CalibrationScores]) -> None:
    calibration, _ = several
    rows = rows_of(2)
    ones = score_calibration(calibration, dataclasses.replace(rows, truth=np.ones_like(rows.truth)), n_resamples=20)
    assert sum("no test row on one side" in note for note in ones.notes) == 2
    assert ones.labels[0].auroc.to_dict()["value"] is None
    assert ones.labels[0].negatives == 0
    json.dumps(ones.to_dict(), allow_nan=False)
    assert "no test row on one side" in shown(calibration_page(calibration, ones, CARD))


def test_rows_of_another_classifier_are_not_judged(several: tuple[Calibration, CalibrationScores]) -> None:
    calibration, _ = several
    with pytest.raises(InputError, match="of 2 labels"):
        score_calibration(calibration, rows_of(2, ("b", "a")))


@pytest.mark.parametrize("count", [1, 5])
def test_one_square_a_label(count: int) -> None:
    truth, given = [0, 1, 1, 0, 1, 0], [0.1, 0.4, 0.9, 0.2, 0.7, 0.6]
    curve = reliability_curve(truth, given, bins=2, of="positive", n_resamples=20, groups=list("abcdef"))
    drawn = reliability_plots({f"label {i}": (curve, curve) for i in range(count)})
    assert drawn.startswith("<svg")
    assert drawn.count('id="axes_') == count
    assert drawn == reliability_plots({f"label {i}": (curve, curve) for i in range(count)})


def test_bars_without_an_interval_are_drawn() -> None:
    alone, whole = Interval(0.5, math.nan, math.nan, 1), Interval(0.5, 0.4, 0.6, 9)
    assert len(abstention_bars({"a": (alone, alone, alone)})) < len(abstention_bars({"a": (whole, whole, whole)}))
