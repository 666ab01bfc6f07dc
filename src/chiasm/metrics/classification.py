"""How well scores and predicted classes match the truth: AUROC, AUPRC, accuracies, and what guessing would reach.

Comes in: truth with gaps (None or NaN means "not labelled", never "negative") and scores or predicted classes.
Goes out: plain floats, or intervals clustered by patient. Rows without a label are left out; ``Interval.n`` counts the
rest. One-class and empty truths have no AUROC: the result is NaN, never 0.5.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import WeightStatistic, weighted_interval
from chiasm.metrics.labels import as_binary, as_class_numbers, as_classes, as_probabilities, as_scores, is_labelled
from chiasm.metrics.weighted import (
    accuracy_statistic,
    auprc_statistic,
    auroc_statistic,
    balanced_accuracy_statistic,
    macro_auroc_statistic,
    macro_f1_statistic,
    multiclass_auroc_statistic,
)
from chiasm.types import Interval

Classes = Sequence[Any] | NDArray[Any]
Groups = Sequence[Hashable] | NDArray[np.generic]
Metric = Literal["auroc", "auprc", "accuracy", "balanced_accuracy", "macro_auroc"]


class MissingClassWarning(UserWarning):
    """A class has no row in the truth, so its AUROC, and the mean over classes, does not exist."""


@dataclass(frozen=True)
class MacroScore:
    """A mean over labels.

    Attributes:
        value: Mean over the labels that have both classes; NaN when there is none.
        per_label: One value a label; NaN for the skipped ones.
        skipped: Number of labels with one class only (or none labelled).
    """

    value: float
    per_label: tuple[float, ...]
    skipped: int


def auroc(truth: ArrayLike, score: ArrayLike) -> float:
    """Return the chance that a random positive scores above a random negative, ties counting one half.

    Args:
        truth: (n,) 0, 1, or NaN/None for rows that are left out.
        score: (n,) numbers of any range; NaN is refused, infinities have their rank.

    Returns:
        A number in [0, 1], 0.5 for scores without information; NaN when a class is absent or nothing is labelled.

    Raises:
        InputError: For labels other than 0 and 1, NaN scores, or shapes that differ.

    References:
        Hanley and McNeil, 1982, https://doi.org/10.1148/radiology.143.1.7063747. Equal to scikit-learn's
        ``roc_auc_score``, which raises for one class.
    """
    return _of_all(auroc_statistic(truth, score), score)


def auprc(truth: ArrayLike, score: ArrayLike) -> float:
    """Return average precision: the precision at each positive, averaged; rows with equal scores enter together.

    Args:
        truth: (n,) 0, 1, or NaN/None for rows that are left out.
        score: (n,) numbers of any range; NaN is refused.

    Returns:
        A number in (0, 1], near the share of positives for scores without information; NaN without a positive.

    Raises:
        InputError: As :func:`auroc`.

    References:
        Equal to scikit-learn's ``average_precision_score`` (no interpolation), which returns 0 without a positive.
    """
    return _of_all(auprc_statistic(truth, score), score)


def macro_auroc(truth: ArrayLike, score: ArrayLike) -> MacroScore:
    """Return the mean AUROC over labels, leaving out labels with one class and saying how many.

    Args:
        truth: (n, labels) 0, 1, or NaN/None for cells that are left out.
        score: (n, labels).

    Raises:
        InputError: As :func:`auroc`.
    """
    labels = as_binary(truth)
    if labels.ndim != 2:
        raise InputError(f"labels must have shape (rows, labels), got {labels.shape}")
    scores = as_scores(score, labels.shape)
    values = np.array([auroc(labels[:, i], scores[:, i]) for i in range(labels.shape[1])])
    defined = np.isfinite(values)
    mean = float(values[defined].mean()) if defined.any() else math.nan
    return MacroScore(mean, tuple(float(v) for v in values), int((~defined).sum()))


def multiclass_auroc(truth: Classes, probabilities: ArrayLike) -> float:
    """Return the AUROC of class probabilities: of class 1 of two, else the mean of each class against the rest.

    Args:
        truth: (n,) column of the true class; None and NaN are left out.
        probabilities: (n, classes), rows that sum to 1; or (n,) as the probability of class 1 of two.

    Returns:
        A number in [0, 1]. NaN, with a :class:`MissingClassWarning`, when a class has no row: a mean over the others
        would not be comparable with that of another test set (:func:`macro_auroc` gives it).

    Raises:
        InputError: For classes without a column, or values that are no probabilities.

    References:
        Equal to scikit-learn's ``roc_auc_score(..., multi_class="ovr", average="macro")``.
    """
    given = as_probabilities(probabilities)
    wanted = as_class_numbers(truth, given.shape[1])
    absent = given.shape[1] - len(np.unique(wanted[wanted >= 0]))
    if absent:
        warnings.warn(
            f"{absent} of {given.shape[1]} classes have no row in the truth: the AUROC is not defined",
            MissingClassWarning,
            stacklevel=2,
        )
        return math.nan
    return _of_all(multiclass_auroc_statistic(truth, given), truth)


def macro_f1(truth: Classes, predicted: Classes) -> float:
    """Return the mean F1 over the classes that are true or predicted somewhere.

    Args:
        truth: (n,) class names or numbers; None and NaN are left out.
        predicted: (n,) of the same kind; a missing prediction is a wrong one.

    Returns:
        A number in [0, 1]; NaN when nothing is labelled.

    Raises:
        InputError: When lengths differ or numbers and text are mixed.

    References:
        Equal to scikit-learn's ``f1_score(..., average="macro")``. The micro F1 of single-label classes is the accuracy.
    """
    return _of_all(macro_f1_statistic(truth, predicted), truth)


def accuracy(truth: Classes, predicted: Classes) -> float:
    """Return the share of right predictions.

    Args:
        truth: (n,) class names or numbers; None and NaN are left out.
        predicted: (n,) of the same kind; a missing prediction is a wrong one.

    Returns:
        A number in [0, 1]; NaN when nothing is labelled.

    Raises:
        InputError: When lengths differ or numbers and text are mixed.
    """
    return _of_all(accuracy_statistic(truth, predicted), truth)


def balanced_accuracy(truth: Classes, predicted: Classes) -> float:
    """Return the mean recall over the true classes: rare classes count as much as common ones.

    Args:
        truth: (n,) class names or numbers; None and NaN are left out.
        predicted: (n,) of the same kind; a missing prediction is a wrong one.

    Returns:
        A number in [0, 1], 1 / classes for a constant prediction; NaN when nothing is labelled.

    Raises:
        InputError: When lengths differ or numbers and text are mixed.

    References:
        Equal to scikit-learn's ``balanced_accuracy_score``: classes that are only predicted do not count.
    """
    return _of_all(balanced_accuracy_statistic(truth, predicted), truth)


def auroc_interval(truth: ArrayLike, score: ArrayLike, groups: Groups, **options: Any) -> Interval:
    """Return :func:`auroc` with its interval, resampling patients; chance is 0.5.

    Args:
        truth: As :func:`auroc`.
        score: As :func:`auroc`.
        groups: Patient of each row.
        **options: ``method``, ``n_resamples``, ``seed``, ``level`` of :func:`chiasm.metrics.bootstrap.weighted_interval`.
    """
    return _with_interval(auroc_statistic, truth, score, groups, 0.5, options)


def auprc_interval(truth: ArrayLike, score: ArrayLike, groups: Groups, **options: Any) -> Interval:
    """Return :func:`auprc` with its interval, resampling patients; chance is the share of positives.

    Args:
        truth: As :func:`auprc`.
        score: As :func:`auprc`.
        groups: Patient of each row.
        **options: As :func:`auroc_interval`.
    """
    return _with_interval(auprc_statistic, truth, score, groups, chance_level(truth, "auprc"), options)


def accuracy_interval(truth: Classes, predicted: Classes, groups: Groups, **options: Any) -> Interval:
    """Return :func:`accuracy` with its interval, resampling patients; chance is 1 / classes.

    Args:
        truth: As :func:`accuracy`.
        predicted: As :func:`accuracy`.
        groups: Patient of each row.
        **options: As :func:`auroc_interval`.
    """
    return _with_interval(accuracy_statistic, truth, predicted, groups, chance_level(truth, "accuracy"), options)


def balanced_accuracy_interval(truth: Classes, predicted: Classes, groups: Groups, **options: Any) -> Interval:
    """Return :func:`balanced_accuracy` with its interval, resampling patients; chance is 1 / classes.

    Args:
        truth: As :func:`balanced_accuracy`.
        predicted: As :func:`balanced_accuracy`.
        groups: Patient of each row.
        **options: As :func:`auroc_interval`.
    """
    chance = chance_level(truth, "balanced_accuracy")
    return _with_interval(balanced_accuracy_statistic, truth, predicted, groups, chance, options)


def macro_auroc_interval(truth: ArrayLike, score: ArrayLike, groups: Groups, **options: Any) -> Interval:
    """Return :func:`macro_auroc` with its interval, resampling patients; chance is 0.5.

    A resample averages the labels that have both classes in it. ``n`` counts rows with at least one label.

    Args:
        truth: As :func:`macro_auroc`.
        score: As :func:`macro_auroc`.
        groups: Patient of each row.
        **options: As :func:`auroc_interval`.
    """
    return _with_interval(macro_auroc_statistic, truth, score, groups, 0.5, options)


def majority_baseline(truth: Classes) -> float:
    """Return the accuracy of always answering with the most common class; NaN when nothing is labelled.

    The balanced accuracy of that answer is 1 / classes and its AUROC is 0.5: see :func:`chance_level`.
    """
    (wanted,) = as_classes(truth)
    known = wanted[wanted >= 0]
    return float(np.bincount(known).max() / len(known)) if len(known) else math.nan


def chance_level(truth: ArrayLike | Classes, metric: Metric) -> float:
    """Return what answers without information reach on average: beside every number, print this one.

    Args:
        truth: Labels as the metric takes them; missing ones are left out.
        metric: 0.5 for ``auroc`` and ``macro_auroc``; the share of positives for ``auprc``; 1 / classes for ``accuracy``
            (guessing evenly; compare with :func:`majority_baseline` too) and ``balanced_accuracy``.

    Returns:
        A number in [0, 1]; NaN when nothing is labelled.

    Raises:
        InputError: For an unknown metric.
    """
    if metric in ("auroc", "macro_auroc"):
        return 0.5
    if metric == "auprc":
        labels = as_binary(truth)
        known = labels[~np.isnan(labels)]
        return float(known.mean()) if len(known) else math.nan
    if metric in ("accuracy", "balanced_accuracy"):
        (wanted,) = as_classes(np.asarray(truth, dtype=object))
        classes = len(np.unique(wanted[wanted >= 0]))
        return 1.0 / classes if classes else math.nan
    raise InputError(f"unknown metric `{metric}`", hint="one of auroc, auprc, accuracy, balanced_accuracy, macro_auroc")


def _of_all(statistic: WeightStatistic, rows: ArrayLike | Classes) -> float:
    return float(statistic(np.ones((1, len(np.asarray(rows, dtype=object)))))[0])


def _with_interval(
    make: Callable[[Any, Any], WeightStatistic],
    truth: ArrayLike | Classes,
    given: ArrayLike | Classes,
    groups: Groups,
    chance: float,
    options: dict[str, Any],
) -> Interval:
    """Leave out the rows without a label, then resample the groups of the others."""
    labels, patients = np.asarray(truth, dtype=object), list(groups)
    answers = given if isinstance(given, np.ndarray) else np.asarray(given, dtype=object)
    if not len(labels) == len(answers) == len(patients):
        raise InputError(
            f"truth, answers and groups have different lengths: {len(labels)}, {len(answers)}, {len(patients)}"
        )
    known = np.asarray(is_labelled(labels).reshape(labels.shape).any(axis=tuple(range(1, labels.ndim))))
    if not known.any():
        return Interval(math.nan, math.nan, math.nan, 0, chance)
    kept = [patients[i] for i in np.flatnonzero(known)]
    return weighted_interval(make(labels[known], answers[known]), kept, chance=chance, **options)
