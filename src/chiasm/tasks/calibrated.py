"""A whole calibration of a classifier: probabilities, thresholds, sets and "cannot tell", fitted once, applied anywhere.

In: :class:`~chiasm.tasks.scored_rows.ScoredRows`, what a classifier said about rows whose truth is known (of validation patients). Out: a
:class:`Calibration` that turns scores of the *same* classifier into :class:`CalibratedAnswers`; the same classifier means
the same space, prompts, way of scoring and labels (``Origin``), and another one is refused.

Notable choices: the validation patients are dealt out once more, by patient: one part fits probabilities, thresholds and
bands, the other part the prediction sets, which promise nothing on rows that something was fitted to. Labels of which any
number may be true are handled one by one; a label that cannot be calibrated is left out with its reason, never guessed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.metrics.bootstrap import Floats
from chiasm.tasks.calibration import METHODS as CALIBRATORS
from chiasm.tasks.calibration import MIN_POSITIVES, Calibrator, TemperatureScaling
from chiasm.tasks.conformal import SplitConformal
from chiasm.tasks.operating_point import Band, OperatingPoint, choose_band, choose_threshold, decide
from chiasm.tasks.scored_rows import Origin, ScoredRows, deal_patients
from chiasm.tasks.zero_shot import Mode

Method = Literal["auto", "temperature", "platt", "isotonic"]

FORM = 1
"""Version of the saved form."""


@dataclass(frozen=True)
class CalibrationPlan:
    """What is fitted, chosen before the truth is looked at.

    Attributes:
        method: ``platt``, ``temperature`` or ``isotonic``; ``auto``: ``platt`` for labels, ``temperature`` for classes
            that exclude each other (the only one that is defined for those).
        sensitivity: Of the threshold, and of "not negative" in the band.
        specificity: Of "not positive" in the band.
        conservative: Let the *expected* sensitivity on new patients be what was asked; it needs more patients.
        coverage: Of the prediction sets.
        class_conditional: Whether coverage is promised for each class by itself; None: for labels yes, for classes no.
        sets_share: Share of the validation patients that fits the sets and nothing else.
        min_positives: Patients with a label, and without it, below which it is not calibrated.
        seed: Of the deal of the patients.
    """

    method: Method = "auto"
    sensitivity: float = 0.95
    specificity: float = 0.95
    conservative: bool = False
    coverage: float = 0.9
    class_conditional: bool | None = None
    sets_share: float = 0.5
    min_positives: int = MIN_POSITIVES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("auto", *CALIBRATORS):
            raise UnknownName(
                "method", self.method, ("auto", *CALIBRATORS), hint=f"one of auto, {', '.join(CALIBRATORS)}"
            )
        for name in ("sensitivity", "specificity", "coverage", "sets_share"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise InputError(f"the {name.replace('_', ' of the ')} must lie between 0 and 1, got {value}",
                                 hint="write 0.95 for 95 %")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class CalibratedAnswers:
    """What a calibrated classifier says about rows.

    Attributes:
        probabilities: (rows, labels) calibrated; NaN for a label that has no calibration.
        called: int8 (rows, labels): 1 at or above the label's threshold, 0 below, -1 without a threshold.
        banded: int8 (rows, labels): as ``called``, -1 also between the two thresholds of the label's band.
        members: bool (rows, labels, 2): whether "absent" and "present" are in each label's set; for classes that exclude
            each other bool (rows, classes).
        answers: int64 (rows, labels): 1, 0, or -1 ("cannot tell": the set holds not exactly one); for classes (rows,),
            the class or -1.
        ids: One per row.
        labels: One per column.
        mode: ``single`` or ``multi``.
    """

    probabilities: Floats
    called: NDArray[np.int8]
    banded: NDArray[np.int8]
    members: NDArray[np.bool_]
    answers: NDArray[np.int64]
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    mode: Mode

    def words(self, row: int) -> dict[str, str] | str:
        """Return the answer of a row: a word a label, or the name of the class; "cannot tell" where it is not sure."""
        if self.mode == "single":
            code = int(self.answers[row])
            return "cannot tell" if code < 0 else self.labels[code]
        words = {1: "present", 0: "absent", -1: "cannot tell"}
        return {label: words[int(c)] for label, c in zip(self.labels, self.answers[row], strict=True)}

    def to_records(self) -> list[dict[str, Any]]:
        """Return one flat record a row: id, probability and answer of each label (or of the classes)."""
        found = []
        for i, name in enumerate(self.ids):
            record: dict[str, Any] = {"id": name}
            for k, label in enumerate(self.labels):
                p = float(self.probabilities[i, k])
                record[f"probability {label}"] = p if math.isfinite(p) else None
            words = self.words(i)
            if isinstance(words, str):
                record["answer"] = words
                record["set"] = "|".join(x for x, m in zip(self.labels, self.members[i], strict=True) if m)
            else:
                record |= {f"answer {label}": word for label, word in words.items()}
            found.append(record)
        return found


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fitted calibration; made by :func:`fit_calibration`, saved by ``tasks.calibration_file``.

    Attributes:
        origin: The classifier it belongs to.
        plan: What was asked for.
        calibrators: Label -> calibrator of its column; for classes that exclude each other one, under ``""``.
        points: Label -> threshold on its calibrated probability.
        bands: Label -> band on its calibrated probability.
        sets: Label -> prediction sets of absent/present; for classes one, under ``""``.
        refused: Label -> why it has no calibration, or no threshold.
        patients: What fitted it: ``probabilities`` and ``sets`` -> number of patients.
    """

    origin: Origin
    plan: CalibrationPlan
    calibrators: Mapping[str, Calibrator]
    points: Mapping[str, OperatingPoint]
    bands: Mapping[str, Band]
    sets: Mapping[str, SplitConformal]
    refused: Mapping[str, str] = field(default_factory=dict)
    patients: Mapping[str, int] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that have a calibration."""
        if self.origin.mode == "single":
            return self.origin.labels
        return tuple(label for label in self.origin.labels if label in self.calibrators)

    def probabilities(self, scores: Floats) -> Floats:
        """Return calibrated probabilities (rows, labels); NaN for labels without a calibration."""
        if self.origin.mode == "single":
            return self.calibrators[""].transform(scores)
        found = np.full(np.shape(scores), np.nan)
        for k, label in enumerate(self.origin.labels):
            if label in self.calibrators:
                found[:, k] = self.calibrators[label].transform(scores[:, k])
        return found

    def apply(self, rows: ScoredRows) -> CalibratedAnswers:
        """Return the calibrated answers of rows of the same classifier; their truth is not looked at.

        Raises:
            SpaceMismatch: As :meth:`chiasm.tasks.scored_rows.Origin.check`.
            InputError: As :meth:`chiasm.tasks.scored_rows.Origin.check`.
        """
        self.origin.check(rows.origin)
        labels, single = self.origin.labels, self.origin.mode == "single"
        given = self.probabilities(rows.scores)
        called = np.full(given.shape, -1, dtype=np.int8)
        banded = np.full(given.shape, -1, dtype=np.int8)
        for k, label in enumerate(labels):
            if label in self.points:
                called[:, k] = decide(given[:, k], self.points[label]).codes
            if label in self.bands:
                banded[:, k] = decide(given[:, k], self.bands[label]).codes
        if single:
            sets = self.sets[""].predict(given)
            return CalibratedAnswers(given, called, banded, sets.members, sets.codes, rows.ids, labels, "single")
        members = np.ones((*given.shape, 2), dtype=bool)
        for k, label in enumerate(labels):
            if label in self.sets:
                members[:, k] = self.sets[label].predict(given[:, k]).members
        alone = members.sum(axis=2) == 1
        answers = np.where(alone, members[:, :, 1], -1).astype(np.int64)
        return CalibratedAnswers(given, called, banded, members, answers, rows.ids, labels, "multi")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "chiasm_calibration": FORM,
            "origin": self.origin.to_dict(),
            "plan": self.plan.to_dict(),
            "calibrators": {k: c.to_dict() for k, c in self.calibrators.items()},
            "points": {k: p.to_dict() for k, p in self.points.items()},
            "bands": {k: dataclasses.asdict(b) for k, b in self.bands.items()},
            "sets": {k: s.to_dict() for k, s in self.sets.items()},
            "refused": dict(self.refused),
            "patients": dict(self.patients),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises:
            InputError: When it is no calibration, or one of a later form.
        """
        if values.get("chiasm_calibration") != FORM:
            raise InputError(f"this is no calibration of form {FORM}", hint="`chiasm calibrate --save FILE` writes one")
        try:
            made = cls(
                Origin.from_dict(values["origin"]),
                CalibrationPlan(**values["plan"]),
                {k: Calibrator.from_dict(c) for k, c in values["calibrators"].items()},
                {k: OperatingPoint.from_dict(p) for k, p in values["points"].items()},
                {k: Band(**b) for k, b in values["bands"].items()},
                {k: SplitConformal.from_dict(s) for k, s in values["sets"].items()},
                dict(values["refused"]),
                dict(values["patients"]),
            )
            made._try()
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the calibration is damaged: {type(error).__name__}", hint="save it anew") from error
        return made

    def _try(self) -> None:
        """Answer made-up rows, so that a damaged file is missed before images are embedded.

        Raises:
            InputError: When an answer is no probability.
        """
        labels = self.origin.labels
        if (
            not labels
            or not all(isinstance(label, str) for label in labels)
            or self.origin.mode not in ("single", "multi")
        ):
            raise InputError("the calibration is damaged: its labels are no names", hint="save it anew")
        if set(self.calibrators) != set(self.sets) or not self.calibrators:
            raise InputError(
                "the calibration is damaged: probabilities and sets are of other labels", hint="save it anew"
            )
        steps = np.array([-1e3, -1.0, 0.0, 1.0, 1e3])
        scores = steps[:, None] * np.linspace(1, 2, len(labels))
        names = tuple(f"row {i}" for i in range(len(steps)))
        rows = ScoredRows(scores, np.full(scores.shape, np.nan), names, names, self.origin)
        with np.errstate(all="ignore"):
            given = self.probabilities(scores)[:, [label in self.labels for label in labels]]
        bounds = [p.threshold for p in self.points.values()] + [b for x in self.bands.values() for b in (x.low, x.high)]
        if not ((given >= 0) & (given <= 1)).all() or not np.isfinite(np.asarray(bounds, dtype=np.float64)).all():
            raise InputError("the calibration is damaged: it gives no probabilities", hint="save it anew")
        self.apply(rows)


def fit_calibration(rows: ScoredRows, plan: CalibrationPlan | None = None) -> Calibration:
    """Fit probabilities, thresholds, bands and sets on validation rows.

    Args:
        rows: Of validation patients; they are judged by rows of others (``check_disjoint``).
        plan: What to fit.

    Raises:
        InputError: When no label can be calibrated (with the first reason), or there are fewer than four patients.
    """
    plan = plan or CalibrationPlan()
    for_sets = deal_patients(rows.groups, plan.sets_share, seed=plan.seed)
    first, second = rows.select(np.flatnonzero(~for_sets)), rows.select(np.flatnonzero(for_sets))
    patients = {"probabilities": len(set(first.groups)), "sets": len(set(second.groups))}
    if rows.origin.mode == "single":
        return _fit_classes(rows.origin, plan, first, second, patients)
    return _fit_labels(rows.origin, plan, first, second, patients)


def _fit_classes(
    origin: Origin, plan: CalibrationPlan, first: ScoredRows, second: ScoredRows, patients: dict[str, int]
) -> Calibration:
    if plan.method not in ("auto", "temperature"):
        raise InputError(
            f"{plan.method} calibration is of one label at a time; these classes exclude each other",
            hint="use --method temperature, or ask for yes and no with --multi",
        )
    calibrator = TemperatureScaling(classes=True, min_positives=plan.min_positives, labels=origin.labels)
    wanted = np.where(first.classes < 0, np.nan, first.classes.astype(np.float64))
    given = calibrator.fit(first.scores, wanted, first.groups).transform(first.scores)
    points: dict[str, OperatingPoint] = {}
    refused: dict[str, str] = {}
    for k, label in enumerate(origin.labels):
        try:
            points[label] = choose_threshold(given[:, k], first.truth[:, k], sensitivity=plan.sensitivity,
                                             conservative=plan.conservative)  # fmt: skip
        except InputError as error:
            refused[label] = f"no threshold: {error.message}"
    sets = SplitConformal(1 - plan.coverage, class_conditional=bool(plan.class_conditional), seed=plan.seed)
    classes = np.where(second.classes < 0, np.nan, second.classes.astype(np.float64))
    sets.fit(calibrator.transform(second.scores), classes, second.groups)
    return Calibration(origin, plan, {"": calibrator}, points, {}, {"": sets}, refused, patients)


def _fit_labels(
    origin: Origin, plan: CalibrationPlan, first: ScoredRows, second: ScoredRows, patients: dict[str, int]
) -> Calibration:
    make = CALIBRATORS["platt" if plan.method == "auto" else plan.method]
    calibrators: dict[str, Calibrator] = {}
    points: dict[str, OperatingPoint] = {}
    bands: dict[str, Band] = {}
    sets: dict[str, SplitConformal] = {}
    refused: dict[str, str] = {}
    by_class = True if plan.class_conditional is None else plan.class_conditional
    for k, label in enumerate(origin.labels):
        calibrator = make(min_positives=plan.min_positives, labels=(label,))
        try:
            calibrator.fit(first.scores[:, k], first.truth[:, k], first.groups)
            found = SplitConformal(1 - plan.coverage, class_conditional=by_class, seed=plan.seed)
            found.fit(calibrator.transform(second.scores[:, k]), second.truth[:, k], second.groups)
        except InputError as error:
            refused[label] = error.message
            continue
        calibrators[label], sets[label] = calibrator, found
        given = calibrator.transform(first.scores[:, k])
        try:
            points[label] = choose_threshold(given, first.truth[:, k], sensitivity=plan.sensitivity,
                                             conservative=plan.conservative)  # fmt: skip
            bands[label] = choose_band(given, first.truth[:, k], sensitivity=plan.sensitivity,
                                       specificity=plan.specificity, conservative=plan.conservative)  # fmt: skip
        except InputError as error:
            refused[label] = f"no threshold or band: {error.message}"
    if not calibrators:
        reason = next(iter(refused.values()))
        raise InputError(f"none of {len(origin.labels)} labels can be calibrated; the first: {reason}",
                         hint="calibrate on more validation patients, or check the prompts")  # fmt: skip
    return Calibration(origin, plan, calibrators, points, bands, sets, refused, patients)
