"""What a calibration is worth on test patients: errors before and after, thresholds, sets, "cannot tell", foreign images.

In: a fitted :class:`~chiasm.tasks.calibrated.Calibration` and rows of patients that took no part in it. Out: frozen
scores, every number with its interval over patients. Beside Brier score and log loss stands what always saying the share
of the label among these rows would give: a calibration that is not below it has said nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Floats, WeightStatistic, weighted_interval, weighted_intervals
from chiasm.metrics.calibration import (
    ReliabilityCurve,
    brier_statistic,
    ece_statistic,
    expected_calibration_error,
    log_loss_statistic,
    reliability_curve,
)
from chiasm.metrics.classification import auroc_interval
from chiasm.metrics.weighted import auroc_statistic, mean_statistic
from chiasm.tasks.calibrated import CalibratedAnswers, Calibration
from chiasm.tasks.conformal import SetReport, score_sets
from chiasm.tasks.domain import DomainReference
from chiasm.tasks.operating_point import Decisions, OperatingPoint, Reached, reached
from chiasm.tasks.scored_rows import ScoredRows
from chiasm.types import Embeddings, Interval

ERRORS = ("ece", "brier", "log_loss")
MAX_POINTS = 8
"""Bins of a reliability plot, each of as many rows."""


@dataclass(frozen=True)
class Errors:
    """How far probabilities are from the truth, before and after; ``gain`` is before less after, above 0 is better.

    Attributes:
        before: ``ece``, ``brier``, ``log_loss`` of what the classifier states.
        after: Of the calibrated probabilities.
        gain: Of the pair, on the same draws.
        ece_debiased: Calibration error less what chance alone adds: before, after.
    """

    before: Mapping[str, Interval]
    after: Mapping[str, Interval]
    gain: Mapping[str, Interval]
    ece_debiased: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        sides = {n: {k: v.to_dict() for k, v in getattr(self, n).items()} for n in ("before", "after", "gain")}
        return {**sides, "ece_debiased": [_plain(v) for v in self.ece_debiased]}


@dataclass(frozen=True)
class Abstention:
    """What an answer that may be "cannot tell" is worth.

    Attributes:
        undecided: Share of the labelled rows without an answer.
        accuracy: Share of right answers among the others.
        forced: Share of right answers if every row must be answered (the more probable side); ``chance`` is what always
            saying the most frequent side gives.
        reached: Sensitivity, specificity and predictive values of the answers; None for classes.
    """

    undecided: Interval
    accuracy: Interval
    forced: Interval
    reached: Reached | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        found: dict[str, Any] = {k: getattr(self, k).to_dict() for k in ("undecided", "accuracy", "forced")}
        return {**found, "reached": None if self.reached is None else self.reached.to_dict()}


@dataclass(frozen=True)
class LabelCalibration:
    """One label on test patients.

    Attributes:
        label: Its name.
        positives: Test rows with it.
        negatives: Test rows without.
        auroc: Of the scores; calibration does not change it (isotonic may tie neighbours).
        errors: Of its probability.
        curves: Reliability before and after.
        point: The threshold, as chosen on validation patients; None where none could be.
        reached: What it reaches here.
        band: "Cannot tell" between two thresholds; None for classes and where none could be chosen.
        sets: Prediction sets of absent/present; None for classes.
        by_sets: "Cannot tell" where a set holds not exactly one.
    """

    label: str
    positives: int
    negatives: int
    auroc: Interval
    errors: Errors
    curves: tuple[ReliabilityCurve, ReliabilityCurve]
    point: OperatingPoint | None = None
    reached: Reached | None = None
    band: Abstention | None = None
    sets: SetReport | None = None
    by_sets: Abstention | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        optional = {k: getattr(self, k) for k in ("point", "reached", "band", "sets", "by_sets")}
        return {
            "positives": self.positives,
            "negatives": self.negatives,
            "auroc": self.auroc.to_dict(),
            "errors": self.errors.to_dict(),
            **{k: None if v is None else v.to_dict() for k, v in optional.items()},
        }


@dataclass(frozen=True)
class DomainScores:
    """How well foreign images are told from those of the kind.

    Attributes:
        auroc: Of the score, foreign against held-out images of the kind; None without foreign images.
        caught: Share of the foreign images that are turned away.
        false_alarms: Share of held-out images of the kind that are turned away; ``chance`` is what was promised.
        method: ``mahalanobis`` or ``knn``.
        threshold: Of the score.
        inside: Scores of the held-out images of the kind.
        foreign: Scores of the foreign images.
    """

    auroc: Interval | None
    caught: Interval | None
    false_alarms: Interval
    method: str
    threshold: float
    inside: Floats
    foreign: Floats

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON values."""
        return {
            "auroc": None if self.auroc is None else self.auroc.to_dict(),
            "caught": None if self.caught is None else self.caught.to_dict(),
            "false_alarms": self.false_alarms.to_dict(),
            "method": self.method,
            "threshold": _plain(self.threshold),
        }


@dataclass(frozen=True)
class CalibrationScores:
    """A calibration on test patients.

    Attributes:
        mode: ``single`` or ``multi``.
        coverage: That was asked for.
        pooled: Errors over all labels together (each row of each label counts), or of the classes' top label.
        pooled_curves: Reliability before and after.
        labels: One per calibrated label.
        sets: Of classes that exclude each other; else None.
        by_sets: The same as answers.
        refused: Label -> why it is missing, or lacks a threshold.
        n: Test rows with any truth.
        patients: Of those rows.
        domain: Of the out-of-domain score, where there is one.
    """

    mode: str
    coverage: float
    pooled: Errors
    pooled_curves: tuple[ReliabilityCurve, ReliabilityCurve]
    labels: tuple[LabelCalibration, ...]
    sets: SetReport | None
    by_sets: Abstention | None
    refused: Mapping[str, str]
    n: int
    patients: int
    domain: DomainScores | None = None
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "mode": self.mode,
            "coverage": self.coverage,
            "pooled": self.pooled.to_dict(),
            "labels": {found.label: found.to_dict() for found in self.labels},
            "sets": None if self.sets is None else self.sets.to_dict(),
            "by_sets": None if self.by_sets is None else self.by_sets.to_dict(),
            "refused": dict(self.refused),
            "n": self.n,
            "patients": self.patients,
            "domain": None if self.domain is None else self.domain.to_dict(),
            "notes": list(self.notes),
        }


def score_calibration(
    calibration: Calibration, rows: ScoredRows, *, n_resamples: int = 1000, seed: int = 0
) -> CalibrationScores:
    """Return what a calibration is worth on test rows.

    Args:
        calibration: Fitted on other patients.
        rows: Of test patients, scored by the same classifier.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        InputError: When nothing is labelled, or the rows are of another classifier.
    """
    labelled = np.flatnonzero(~np.isnan(rows.truth).all(axis=1))
    if len(labelled) == 0:
        raise InputError("no test row is labelled, so nothing can be judged")
    rows = rows.select(labelled)
    answers = calibration.apply(rows)
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    single = rows.origin.mode == "single"
    columns = [k for k, label in enumerate(rows.origin.labels) if label in calibration.labels]
    columns = [k for k in columns if not np.isnan(rows.truth[:, k]).all()]
    if not columns:
        raise InputError("no test row has a truth of a calibrated label, so nothing can be judged")
    found = [_label(calibration, rows, answers, k, options) for k in columns]
    judged = {f.label for f in found}
    notes = tuple(
        f"label `{label}` has no truth among the test rows" for label in calibration.labels if label not in judged
    )
    notes += tuple(f"label `{f.label}` has no test row on one side" for f in found if 0 in (f.positives, f.negatives))
    notes += tuple(
        f"calibrating `{f.label}` did not improve its Brier score here (gain {f.errors.gain['brier']}): the classifier's own "
        "probabilities serve as well"
        for f in found
        if f.errors.gain["brier"].value <= 0
    )
    if single:
        classes = np.where(rows.classes < 0, np.nan, rows.classes.astype(np.float64))
        pooled = _errors(classes, rows.uncalibrated, answers.probabilities, rows.groups, "top", options)
        constant = np.bincount(rows.classes, minlength=len(rows.origin.labels)) / len(rows)
        pooled = _with_chance(pooled, classes, np.tile(constant, (len(rows), 1)))
        curves = _curves(classes, (rows.uncalibrated, answers.probabilities), rows.groups, "top", seed)
        sets = score_sets(calibration.sets[""].predict(answers.probabilities), classes, rows.groups, **options)
        by_sets = _of_classes(answers, rows, options)
    else:
        # Every row of every label is a case of its own; a patient's cases are drawn together.
        truth, before, after = (m[:, columns].ravel() for m in (rows.truth, rows.uncalibrated, answers.probabilities))
        groups = np.repeat(np.asarray(rows.groups), len(columns))
        pooled = _errors(truth, before, after, groups, "positive", options)
        shares = np.nanmean(rows.truth[:, columns], axis=0)
        pooled = _with_chance(pooled, truth, np.broadcast_to(shares, (len(rows), len(columns))).ravel())
        curves = _curves(truth, (before, after), groups, "positive", seed)
        sets, by_sets = None, None
    return CalibrationScores(rows.origin.mode, calibration.plan.coverage, pooled, curves, tuple(found), sets, by_sets,
                             calibration.refused, len(rows), len(set(rows.groups)), notes=notes)  # fmt: skip


def _label(
    calibration: Calibration, rows: ScoredRows, answers: CalibratedAnswers, k: int, options: dict[str, Any]
) -> LabelCalibration:
    label, truth, groups = rows.origin.labels[k], rows.truth[:, k], rows.groups
    before, after = rows.uncalibrated[:, k], answers.probabilities[:, k]
    errors = _errors(truth, before, after, groups, "positive", options)
    errors = _with_chance(errors, truth, np.full(len(truth), np.nanmean(truth)))
    point = calibration.points.get(label)
    band: Abstention | None = None
    sets: SetReport | None = None
    by_sets: Abstention | None = None
    if label in calibration.bands:
        band = _of_label(answers.banded[:, k], after, truth, groups, options)
    if rows.origin.mode == "multi":
        found = calibration.sets[label].predict(after)
        sets = score_sets(found, truth, groups, **options)
        by_sets = _of_label(answers.answers[:, k].astype(np.int8), after, truth, groups, options)
    return LabelCalibration(
        label,
        int((truth == 1).sum()),
        int((truth == 0).sum()),
        auroc_interval(truth, rows.scores[:, k] if rows.origin.mode == "multi" else before, groups, **options),
        errors,
        _curves(truth, (before, after), groups, "positive", options["seed"]),
        point,
        None if point is None else reached(Decisions(answers.called[:, k]), truth, groups, **options),
        band,
        sets,
        by_sets,
    )


def _errors(
    truth: Floats, before: Floats, after: Floats, groups: Sequence[str] | NDArray[Any], of: Any, options: dict[str, Any]
) -> Errors:
    known = np.flatnonzero(~np.isnan(truth))
    truth, before, after, names = truth[known], before[known], after[known], np.asarray(groups)[known]
    statistics: dict[str, WeightStatistic] = {}
    for side, given in (("before", before), ("after", after)):
        statistics[f"ece {side}"] = ece_statistic(truth, given, of=of)
        statistics[f"brier {side}"] = brier_statistic(truth, given)
        statistics[f"log_loss {side}"] = log_loss_statistic(truth, given)
    for name in ERRORS:
        statistics[f"{name} gain"] = _difference(statistics[f"{name} before"], statistics[f"{name} after"])
    found = weighted_intervals(statistics, names, **options)
    sides = [{name: found[f"{name} {side}"] for name in ERRORS} for side in ("before", "after", "gain")]
    debiased = [expected_calibration_error(truth, given, of=of, debiased=True) for given in (before, after)]
    return Errors(sides[0], sides[1], sides[2], (debiased[0], debiased[1]))


def _difference(first: WeightStatistic, second: WeightStatistic) -> WeightStatistic:
    return lambda weights: first(weights) - second(weights)


def _with_chance(errors: Errors, truth: Floats, constant: Floats) -> Errors:
    """Put what a constant probability would give beside Brier score and log loss."""
    whole = np.ones((1, len(truth)))
    chance = {"brier": brier_statistic(truth, constant), "log_loss": log_loss_statistic(truth, constant)}
    values = {name: float(statistic(whole)[0]) for name, statistic in chance.items()}

    def mark(side: Mapping[str, Interval]) -> dict[str, Interval]:
        return {name: replace(number, chance=values.get(name)) for name, number in side.items()}

    return replace(errors, before=mark(errors.before), after=mark(errors.after))


def _curves(
    truth: Floats, sides: Sequence[Floats], groups: Sequence[str] | NDArray[Any], of: Any, seed: int
) -> tuple[ReliabilityCurve, ReliabilityCurve]:
    made = [
        reliability_curve(truth, given, groups=groups, bins=MAX_POINTS, of=of, seed=seed, n_resamples=300)
        for given in sides
    ]
    return made[0], made[1]


def _of_label(
    codes: NDArray[np.int8], given: Floats, truth: Floats, groups: Sequence[str], options: dict[str, Any]
) -> Abstention:
    right = np.where(codes < 0, np.nan, codes == truth)
    share = float(np.nanmean(truth))
    forced = ((given >= 0.5) == truth).astype(np.float64)
    return _abstention(codes < 0, right, forced, ~np.isnan(truth), groups, options, max(share, 1 - share),
                       reached(Decisions(codes), truth, groups, **options))  # fmt: skip


def _of_classes(answers: CalibratedAnswers, rows: ScoredRows, options: dict[str, Any]) -> Abstention:
    right = np.where(answers.answers < 0, np.nan, answers.answers == rows.classes)
    forced = (answers.probabilities.argmax(axis=1) == rows.classes).astype(np.float64)
    majority = float(np.nanmax(np.nanmean(rows.truth, axis=0)))
    return _abstention(answers.answers < 0, right, forced, rows.classes >= 0, rows.groups, options, majority, None)


def _abstention(
    undecided: NDArray[np.bool_],
    right: Floats,
    forced: Floats,
    known: NDArray[np.bool_],
    groups: Sequence[str],
    options: dict[str, Any],
    majority: float,
    found: Reached | None,
) -> Abstention:
    kept = np.flatnonzero(known)
    columns = {"undecided": undecided.astype(np.float64), "accuracy": right, "forced": forced}
    names = np.asarray(groups)[kept]
    statistics = {name: mean_statistic(values[kept]) for name, values in columns.items()}
    numbers = weighted_intervals(statistics, names, **options)
    decided = int((~undecided[kept]).sum())
    return Abstention(numbers["undecided"], replace(numbers["accuracy"], n=decided),
                      replace(numbers["forced"], chance=majority), found)  # fmt: skip


def score_domain(
    domain: DomainReference, inside: Embeddings, foreign: Embeddings | None, *, n_resamples: int = 1000, seed: int = 0
) -> DomainScores:
    """Return how well foreign images are told from images of the kind that took no part in the reference.

    Args:
        domain: From :func:`chiasm.tasks.domain.fit_domain`.
        inside: Held-out images of the kind, of other patients.
        foreign: Images of other kinds, or None.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        SpaceMismatch: For embeddings of another space.
    """
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    own = domain.score(inside)
    alarms = weighted_interval(
        mean_statistic(own.outside.astype(float)), own.groups, chance=domain.false_alarms, **options
    )
    if foreign is None:
        return DomainScores(None, None, alarms, domain.method, domain.threshold, own.scores, np.zeros(0))
    other = domain.score(foreign)
    caught = weighted_interval(mean_statistic(other.outside.astype(float)), other.groups, **options)
    scores = np.concatenate([own.scores, other.scores])
    truth = np.concatenate([np.zeros(len(own)), np.ones(len(other))])
    names = [f"i {g}" for g in own.groups] + [f"f {g}" for g in other.groups]
    auroc = weighted_interval(auroc_statistic(truth, scores), names, chance=0.5, **options)
    return DomainScores(auroc, caught, alarms, domain.method, domain.threshold, own.scores, other.scores)


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
