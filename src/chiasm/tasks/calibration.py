"""Scores that can be believed: temperature, Platt and isotonic calibration, label by label, fitted on validation rows.

In: scores or logits (rows,) or (rows, labels), or (rows, classes) of classes that exclude each other; truth with gaps.
Out: estimators in the manner of scikit-learn (``fit``, ``transform``, ``get_params``) that turn them into
probabilities and go to and from plain JSON values. Of a ``ZeroShotResult`` take ``scores`` (log-odds) label by label, or
``logits`` for classes that exclude each other.

Notable choices: calibration never turns the order of two rows round (isotonic may make neighbours equal), so no AUROC
rises or falls by it. Where a score falls as its label rises, or too few patients have the finding, fitting is refused
rather than done badly. Fit on validation rows, judge on test rows of other patients; :func:`cross_calibrate` makes that
split by patient where there is one set only. How good the result is: ``metrics.calibration``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.metrics.bootstrap import Clusters
from chiasm.metrics.labels import as_binary, as_class_numbers
from chiasm.tasks.zero_shot import sigmoid, softmax

Floats = NDArray[np.float64]
Groups = Sequence[Hashable] | NDArray[np.generic]
MethodName = Literal["temperature", "platt", "isotonic"]

MIN_POSITIVES = 10
"""Patients with a finding, and without it, below which no calibration of it is fitted."""

_STEPS = 100
_LARGEST = 1e4  # a slope beyond this times 1 / spread of the scores means that nothing holds it back


class Calibrator(ABC):
    """What the calibrators share; use one of the subclasses.

    Args:
        min_positives: Patients with each label, and patients without, below which ``fit`` refuses; at least 1.
        labels: Names of the columns, for messages and for reading a saved calibrator.

    Attributes:
        fitted_: One dictionary of plain numbers a column; absent before ``fit``.
    """

    method: ClassVar[str] = ""
    fitted_: list[dict[str, Any]]

    def __init__(self, *, min_positives: int = MIN_POSITIVES, labels: Sequence[str] | None = None) -> None:
        self.min_positives = min_positives
        self.labels = labels

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments of the constructor, as scikit-learn's ``clone`` wants them."""
        return {"min_positives": self.min_positives, "labels": self.labels}

    def set_params(self, **params: Any) -> Self:
        """Set arguments of the constructor; an unknown one raises ``UnknownName``."""
        for name, value in params.items():
            if name not in self.get_params():
                raise UnknownName("parameter", name, self.get_params())
            setattr(self, name, value)
        return self

    def fit(self, scores: ArrayLike, truth: ArrayLike, groups: Groups | None = None) -> Self:
        """Fit on validation rows.

        Args:
            scores: float (rows,) or (rows, labels), finite.
            truth: 0, 1, or NaN/None for "not labelled", of the same shape.
            groups: Patient of each row. They decide whether there are enough patients; each labelled row counts alike.

        Raises:
            InputError: For shapes that do not fit, too few patients with or without a label, scores that fall as a label
                rises, or scores that separate the label without an error where the method then has no optimum.
        """
        values, wanted = _finite(_columns(scores)), _columns(as_binary(truth))
        if values.shape != wanted.shape:
            raise InputError(f"scores have shape {values.shape}, truth {wanted.shape}; they must be equal")
        self._check_names(values.shape[1])
        fitted = []
        for k in range(values.shape[1]):
            known = ~np.isnan(wanted[:, k])
            self._check_counts(wanted[:, k], groups, self._name(k))
            fitted.append(self._fit_column(values[known, k], wanted[known, k], self._name(k)))
        self.fitted_ = fitted
        return self

    def transform(self, scores: ArrayLike) -> Floats:
        """Return calibrated probabilities in [0, 1] of the same shape as the scores.

        Raises:
            InputError: Before ``fit``, for another number of columns, or scores that are not finite.
        """
        fitted = self._fitted()
        values = _finite(_columns(scores))
        if values.shape[1] != len(fitted):
            raise InputError(f"fitted on {len(fitted)} columns of scores, got {values.shape[1]}")
        found = np.stack([self._transform_column(values[:, k], f) for k, f in enumerate(fitted)], axis=1)
        return found.reshape(np.shape(scores))

    def fit_transform(self, scores: ArrayLike, truth: ArrayLike, groups: Groups | None = None) -> Floats:
        """Return the fitted rows' own probabilities: too good to judge by; :func:`cross_calibrate` is the honest form."""
        return self.fit(scores, truth, groups).transform(scores)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values; raises ``InputError`` before ``fit``."""
        params = self.get_params()
        params["labels"] = None if self.labels is None else list(self.labels)
        return {"method": self.method, **params, "fitted": [dict(f) for f in self._fitted()]}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Calibrator:
        """Rebuild any calibrator from :meth:`to_dict`; an unknown method raises ``UnknownName``."""
        given = dict(values)
        method, fitted = given.pop("method", None), given.pop("fitted", None)
        if method not in METHODS:
            raise UnknownName("calibration", str(method), METHODS)
        if not isinstance(fitted, list) or not all(isinstance(f, Mapping) for f in fitted):
            raise InputError("a saved calibrator needs a list `fitted` with one entry a column")
        wrong = set(given) - set(METHODS[method]().get_params())
        if wrong:
            raise InputError(f"a saved calibrator has the unknown field `{min(wrong)}`")
        made = METHODS[method](**given)
        made.fitted_ = [dict(f) for f in fitted]
        return made

    @abstractmethod
    def _fit_column(self, scores: Floats, truth: Floats, name: str) -> dict[str, Any]:
        """Return the parameters of one column (rows,) with truth 0 or 1."""

    @abstractmethod
    def _transform_column(self, scores: Floats, fitted: Mapping[str, Any]) -> Floats:
        """Return the probabilities of one column."""

    def _fitted(self) -> list[dict[str, Any]]:
        if not hasattr(self, "fitted_"):
            raise InputError(f"the {self.method} calibration is not fitted", hint="call `fit` on validation rows first")
        return self.fitted_

    def _name(self, column: int) -> str:
        return f"label `{self.labels[column]}`" if self.labels else f"column {column}"

    def _check_names(self, columns: int) -> None:
        if self.labels is not None and len(self.labels) != columns:
            raise InputError(f"there are {len(self.labels)} names for {columns} columns of scores")
        if self.min_positives < 1:
            raise InputError(f"min_positives must be at least 1, got {self.min_positives}")

    def _check_counts(self, truth: Floats, groups: Groups | None, name: str) -> None:
        rows = np.arange(len(truth)) if groups is None else np.array([str(g) for g in groups])
        if len(rows) != len(truth):
            raise InputError(f"there are {len(rows)} groups for {len(truth)} rows")
        counts = [len(np.unique(rows[truth == side])) for side in (1, 0)]
        if min(counts) < self.min_positives:
            raise InputError(
                f"{name} has {counts[0]} patients with it and {counts[1]} without it; a calibration needs "
                f"{self.min_positives} of each",
                hint="leave this label uncalibrated, or validate on more patients",
            )


class TemperatureScaling(Calibrator):
    """sigmoid(logit / T) a label; with ``classes=True`` softmax(logits / T) with one T for all classes.

    Args:
        classes: Columns are classes that exclude each other: ``fit`` takes the column of the true class, (rows,), and
            ``transform`` gives rows that sum to 1. Every class needs ``min_positives`` patients with it and without it.
        min_positives: As :class:`Calibrator`.
        labels: As :class:`Calibrator`.

    References:
        Guo et al., 2017, https://arxiv.org/abs/1706.04599, section 4.2: T minimises the log loss. It keeps 0.5 where it
        is; scores that are far from balanced need Platt's offset.
    """

    method = "temperature"

    def __init__(
        self, *, classes: bool = False, min_positives: int = MIN_POSITIVES, labels: Sequence[str] | None = None
    ) -> None:
        super().__init__(min_positives=min_positives, labels=labels)
        self.classes = classes

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """As :meth:`Calibrator.get_params`."""
        return {**super().get_params(deep), "classes": self.classes}

    def fit(self, scores: ArrayLike, truth: ArrayLike, groups: Groups | None = None) -> Self:
        """As :meth:`Calibrator.fit`; with ``classes=True`` truth is (rows,), the column of the true class."""
        if not self.classes:
            return super().fit(scores, truth, groups)
        logits = _finite(_columns(scores))
        wanted = as_class_numbers(truth, logits.shape[1])
        if logits.shape[1] < 2 or len(wanted) != len(logits):
            raise InputError(f"logits of shape {logits.shape} do not fit {len(wanted)} true classes")
        self._check_names(logits.shape[1])
        for k in range(logits.shape[1]):
            self._check_counts(np.where(wanted < 0, np.nan, wanted == k), groups, self._name(k))
        known = wanted >= 0
        temperature = _temperature(logits[known], wanted[known], "the classes")
        self.fitted_ = [{"temperature": temperature, "columns": logits.shape[1]}]
        return self

    def transform(self, scores: ArrayLike) -> Floats:
        """As :meth:`Calibrator.transform`; with ``classes=True`` rows sum to 1."""
        if not self.classes:
            return super().transform(scores)
        fitted, logits = self._fitted()[0], _finite(_columns(scores))
        if logits.shape[1] != fitted["columns"]:
            raise InputError(f"fitted on {fitted['columns']} columns of scores, got {logits.shape[1]}")
        return softmax(logits / float(fitted["temperature"]))

    @property
    def temperatures_(self) -> tuple[float, ...]:
        """T of each label, or the one T of all classes; above 1 where the model was too sure."""
        return tuple(float(f["temperature"]) for f in self._fitted())

    def _fit_column(self, scores: Floats, truth: Floats, name: str) -> dict[str, Any]:
        logits = np.stack([np.zeros_like(scores), scores], axis=1)
        return {"temperature": _temperature(logits, truth.astype(np.int64), name)}

    def _transform_column(self, scores: Floats, fitted: Mapping[str, Any]) -> Floats:
        return sigmoid(scores / float(fitted["temperature"]))


class PlattScaling(Calibrator):
    """sigmoid(slope × score + intercept) a label.

    Args:
        smooth: Platt's targets (positives + 1) / (positives + 2) and 1 / (negatives + 2) in place of 1 and 0, which
            hold the fit back on few rows; equal to scikit-learn's ``CalibratedClassifierCV(method="sigmoid")``. False:
            plain logistic regression, equal to scikit-learn's without penalty.
        min_positives: As :class:`Calibrator`.
        labels: As :class:`Calibrator`.

    References:
        Platt, 1999, Probabilistic outputs for support vector machines; Lin, Lin and Weng, 2007,
        https://doi.org/10.1007/s10994-007-5018-6 (Newton steps with halving).
    """

    method = "platt"

    def __init__(
        self, *, smooth: bool = True, min_positives: int = MIN_POSITIVES, labels: Sequence[str] | None = None
    ) -> None:
        super().__init__(min_positives=min_positives, labels=labels)
        self.smooth = smooth

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """As :meth:`Calibrator.get_params`."""
        return {**super().get_params(deep), "smooth": self.smooth}

    def _fit_column(self, scores: Floats, truth: Floats, name: str) -> dict[str, Any]:
        centre, spread = float(scores.mean()), float(scores.std())
        if spread <= 1e-12 * max(1.0, abs(centre)):
            raise InputError(f"all scores of {name} are equal; there is nothing to calibrate")
        ones = float(truth.sum())
        above, below = (ones + 1) / (ones + 2), 1 / (len(truth) - ones + 2)
        targets = np.where(truth == 1, above, below) if self.smooth else truth
        slope, intercept = _logistic((scores - centre) / spread, targets, name)
        if slope <= 0:
            raise _falling(name)
        return {"slope": slope / spread, "intercept": intercept - slope * centre / spread}

    def _transform_column(self, scores: Floats, fitted: Mapping[str, Any]) -> Floats:
        return sigmoid(float(fitted["slope"]) * scores + float(fitted["intercept"]))


class IsotonicCalibration(Calibrator):
    """The rising step function that is nearest to the truth, with straight lines between its steps, a label.

    Beyond the fitted scores the outermost value holds. It needs no shape, but more rows than the others (hundreds of
    positives), makes neighbours equal and can give exactly 0 and 1.

    References:
        Zadrozny and Elkan, 2002, https://doi.org/10.1145/775047.775151; equal to scikit-learn's
        ``IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")``, which does the fit.
    """

    method = "isotonic"

    def _fit_column(self, scores: Floats, truth: Floats, name: str) -> dict[str, Any]:
        from sklearn.isotonic import IsotonicRegression

        found = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, truth)
        if len(np.unique(found.y_thresholds_)) < 2:
            raise _falling(name)
        return {"scores": found.X_thresholds_.tolist(), "probabilities": found.y_thresholds_.tolist()}

    def _transform_column(self, scores: Floats, fitted: Mapping[str, Any]) -> Floats:
        found: Floats = np.interp(scores, fitted["scores"], fitted["probabilities"])
        return found


METHODS: dict[str, type[Calibrator]] = {
    "temperature": TemperatureScaling,
    "platt": PlattScaling,
    "isotonic": IsotonicCalibration,
}


def cross_calibrate(
    calibrator: Calibrator, scores: ArrayLike, truth: ArrayLike, groups: Groups, *, folds: int = 5, seed: int = 0
) -> Floats:
    """Return probabilities of rows whose patients took no part in fitting them: for one data set without a split.

    Args:
        calibrator: Its parameters are used; it is not fitted itself.
        scores: As :meth:`Calibrator.fit`.
        truth: As :meth:`Calibrator.fit`.
        groups: Patient of each row; all rows of a patient are in one fold.
        folds: Number of folds, 2 to the number of patients.
        seed: Of the folds. They do not depend on the order of rows.

    Raises:
        InputError: As :meth:`Calibrator.fit` in any fold; for a number of folds that does not fit.
    """
    clusters = Clusters(groups)
    if not 2 <= folds <= clusters.count:
        raise InputError(f"the number of folds must be 2 to the number of patients, {clusters.count}; got {folds}")
    values, wanted = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=object)
    if len(values) != clusters.n or len(wanted) != clusters.n:
        raise InputError(f"there are {len(values)} rows of scores, {len(wanted)} of truth and {clusters.n} groups")
    order = np.random.default_rng(seed).permutation(clusters.count)
    fold = (np.argsort(order) % folds)[clusters.of_row]
    found = np.empty(values.shape)
    for k in range(folds):
        inside, outside = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        fresh = type(calibrator)(**calibrator.get_params())
        found[inside] = fresh.fit(values[outside], wanted[outside], clusters.of_row[outside]).transform(values[inside])
    return found


def _columns(values: ArrayLike) -> Floats:
    """Return (rows, columns) float64."""
    given = np.asarray(values, dtype=np.float64)
    if given.ndim not in (1, 2):
        raise InputError(f"scores must have shape (rows,) or (rows, labels), got {given.shape}")
    return given[:, None] if given.ndim == 1 else given


def _finite(scores: Floats) -> Floats:
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise InputError(f"{bad} of {scores.size} scores are not finite", hint="leave out the rows that have no score")
    return scores


def _falling(name: str) -> InputError:
    return InputError(
        f"the scores of {name} do not rise with it; a calibration that keeps their order cannot help",
        hint="check its prompts: an AUROC below 0.5 on validation rows means that they are turned round",
    )


def _temperature(logits: Floats, truth: NDArray[np.int64], name: str) -> float:
    """Return T that minimises the log loss: the loss is convex in 1 / T, so the slope's zero is found by halving."""
    rows = np.arange(len(logits))
    spread = float((logits - logits.mean(axis=1, keepdims=True)).std())
    if spread == 0:
        raise InputError(f"all scores of {name} are equal; there is nothing to calibrate")
    scaled = (logits - logits.max(axis=1, keepdims=True)) / spread

    def slope(inverse: float) -> float:
        return float(((softmax(inverse * scaled) * scaled).sum(axis=1) - scaled[rows, truth]).mean())

    low, high = 0.0, _LARGEST
    if slope(low) >= 0:
        raise _falling(name)
    if slope(high) <= 0:
        raise _separated(name)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return spread / ((low + high) / 2)


def _logistic(scores: Floats, targets: Floats, name: str) -> tuple[float, float]:
    """Return slope and intercept of a logistic regression without penalty, by Newton steps that are halved at need."""
    design = np.stack([scores, np.ones_like(scores)], axis=1)
    share = float(targets.mean())
    weights = np.array([0.0, math.log(share / (1 - share))])

    def loss(at: Floats) -> float:
        logits = design @ at
        return float((np.logaddexp(0.0, logits) - targets * logits).mean())

    current = loss(weights)
    for _ in range(_STEPS):
        p = sigmoid(design @ weights)
        gradient = design.T @ (p - targets) / len(targets)
        if float(np.abs(gradient).max()) < 1e-12:
            break
        curvature = (design * (p * (1 - p))[:, None]).T @ design / len(targets) + 1e-14 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-8 and loss(weights - size * step) > current:
            size /= 2
        weights = weights - size * step
        if size <= 1e-8:
            break
        current = loss(weights)
        if float(np.abs(weights).max()) > _LARGEST or current < 1e-9:
            raise _separated(name)
    return float(weights[0]), float(weights[1])


def _separated(name: str) -> InputError:
    return InputError(
        f"the scores separate {name} without an error, so that no finite calibration is best",
        hint="validate on more patients, or use `PlattScaling(smooth=True)`",
    )
