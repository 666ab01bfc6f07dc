"""Statistics as functions of row weights, for a thousand resamples at once.

Comes in: the data of each row, once. Goes out: a function from weights (resamples, n) to (resamples,) numbers, made for
``bootstrap.weighted_interval`` and ``bootstrap.paired_difference``. A weight of 2 counts a row twice; integer weights
give exactly the value that the repeated rows would give. Sorting and grouping happen once, not for each resample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Floats, WeightStatistic
from chiasm.metrics.labels import as_binary, as_class_numbers, as_classes, as_probabilities, as_scores


def auroc_statistic(truth: ArrayLike, score: ArrayLike) -> WeightStatistic:
    """Return the area under the ROC curve as a function of weights.

    Args:
        truth: (n,) 0, 1, or NaN/None for rows that are left out.
        score: (n,) higher means more likely 1; ties count one half.

    Returns:
        Numbers in [0, 1]; NaN where either class has no weight.
    """
    rows, is_one, starts = _by_score(truth, score)

    def statistic(weights: Floats) -> Floats:
        ones, zeros = _weights_of_groups(weights[:, rows], is_one, starts)
        below = np.cumsum(zeros, axis=1) - zeros / 2
        return _divide((ones * below).sum(1), ones.sum(1) * zeros.sum(1))

    return statistic


def auprc_statistic(truth: ArrayLike, score: ArrayLike) -> WeightStatistic:
    """Return average precision as a function of weights.

    Args:
        truth: (n,) 0, 1, or NaN/None for rows that are left out.
        score: (n,) higher means more likely 1; rows with equal scores enter together.

    Returns:
        Numbers in (0, 1]; NaN where class 1 has no weight.
    """
    rows, is_one, starts = _by_score(truth, score, descending=True)

    def statistic(weights: Floats) -> Floats:
        ones, zeros = _weights_of_groups(weights[:, rows], is_one, starts)
        found = np.cumsum(ones, axis=1)
        precision = _divide(found, found + np.cumsum(zeros, axis=1), empty=0.0)
        return _divide((ones * precision).sum(1), ones.sum(1))

    return statistic


def macro_auroc_statistic(truth: ArrayLike, score: ArrayLike) -> WeightStatistic:
    """Return the mean AUROC over labels as a function of weights.

    Args:
        truth: (n, labels) 0, 1, or NaN/None for cells that are left out.
        score: (n, labels).

    Returns:
        Means over the labels of which both classes have weight; NaN where there is none.
    """
    labels = as_binary(truth)
    if labels.ndim != 2:
        raise InputError(f"labels must have shape (rows, labels), got {labels.shape}")
    scores = as_scores(score, labels.shape)
    single = [auroc_statistic(labels[:, i], scores[:, i]) for i in range(labels.shape[1])]

    def statistic(weights: Floats) -> Floats:
        values = np.stack([one(weights) for one in single], axis=1) if single else np.full((len(weights), 1), np.nan)
        defined = np.isfinite(values)
        return _divide(np.where(defined, values, 0.0).sum(1), defined.sum(1).astype(np.float64))

    return statistic


def accuracy_statistic(truth: Sequence[Any] | NDArray[Any], predicted: Sequence[Any] | NDArray[Any]) -> WeightStatistic:
    """Return the share of right predictions as a function of weights; rows without a true class are left out."""
    wanted, given = as_classes(truth, predicted)
    return mean_statistic(np.where(wanted < 0, np.nan, (wanted == given).astype(np.float64)))


def balanced_accuracy_statistic(
    truth: Sequence[Any] | NDArray[Any], predicted: Sequence[Any] | NDArray[Any]
) -> WeightStatistic:
    """Return the mean recall over the true classes as a function of weights.

    Args:
        truth: (n,) class of each row; None or NaN are left out.
        predicted: (n,) class given to each row; a missing prediction is a wrong one.

    Returns:
        Means over the classes of ``truth`` that have weight; NaN where there is none.
    """
    wanted, given = as_classes(truth, predicted)
    classes = np.unique(wanted[wanted >= 0])
    member = (wanted[:, None] == classes).astype(np.float64)
    right = member * (wanted == given)[:, None]

    def statistic(weights: Floats) -> Floats:
        total = weights @ member
        recall = _divide(weights @ right, total, empty=0.0)
        return _divide(recall.sum(1), (total > 0).sum(1).astype(np.float64))

    return statistic


def macro_f1_statistic(truth: Sequence[Any] | NDArray[Any], predicted: Sequence[Any] | NDArray[Any]) -> WeightStatistic:
    """Return the mean F1 over classes as a function of weights.

    Args:
        truth: (n,) class of each row; None or NaN are left out.
        predicted: (n,) class given to each row; a missing prediction is a wrong one.

    Returns:
        Means over the classes that are true or predicted somewhere with weight; NaN where there is none.
    """
    wanted, given = as_classes(truth, predicted)
    known = (wanted >= 0)[:, None]
    classes = np.unique(np.concatenate([wanted, given]))
    classes = classes[classes >= 0]
    is_true = ((wanted[:, None] == classes) & known).astype(np.float64)
    is_given = ((given[:, None] == classes) & known).astype(np.float64)
    both = is_true * is_given

    def statistic(weights: Floats) -> Floats:
        present = weights @ is_true + weights @ is_given
        f1 = _divide(2 * (weights @ both), present, empty=0.0)
        return _divide(f1.sum(1), (present > 0).sum(1).astype(np.float64))

    return statistic


def multiclass_auroc_statistic(truth: ArrayLike | Sequence[Any], probabilities: ArrayLike) -> WeightStatistic:
    """Return the AUROC of class probabilities as a function of weights.

    Args:
        truth: (n,) column of the true class; None or NaN are left out.
        probabilities: (n, classes), or (n,) for class 1 of two.

    Returns:
        Two classes: the AUROC of class 1. More: the mean over classes, each against the rest; a resample averages the
        classes that it has both sides of. NaN everywhere when a class has no row at all.
    """
    given = as_probabilities(probabilities)
    wanted = as_class_numbers(truth, given.shape[1])
    if len(wanted) != len(given):
        raise InputError(f"there are probabilities of {len(given)} rows for {len(wanted)} true classes")
    classes = np.arange(given.shape[1])
    if len(np.unique(wanted[wanted >= 0])) < len(classes):
        return lambda weights: np.full(len(weights), np.nan)
    if len(classes) == 2:
        return auroc_statistic(np.where(wanted < 0, np.nan, wanted == 1), given[:, 1])
    return macro_auroc_statistic(np.where(wanted[:, None] < 0, np.nan, wanted[:, None] == classes), given)


def mean_statistic(values: ArrayLike) -> WeightStatistic:
    """Return the mean of one number a row as a function of weights; NaN rows are left out."""
    numbers = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(numbers)
    filled, counted = np.where(known, numbers, 0.0), known.astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        return _divide(weights @ filled, weights @ counted)

    return statistic


def median_statistic(values: ArrayLike) -> WeightStatistic:
    """Return the median of one number a row as a function of whole weights; NaN rows are left out.

    An even total takes the mean of the two middle values, as ``numpy.median`` does.
    """
    numbers = np.asarray(values, dtype=np.float64)
    rows = np.flatnonzero(~np.isnan(numbers))
    rows = rows[np.argsort(numbers[rows], kind="stable")]
    ordered = numbers[rows]

    def statistic(weights: Floats) -> Floats:
        if len(rows) == 0:
            return np.full(len(weights), np.nan)
        reached = np.cumsum(weights[:, rows], axis=1)
        total = reached[:, -1]
        middle = [np.floor((total + 1) / 2), np.floor((total + 2) / 2)]
        lower, upper = (ordered[(reached >= m[:, None]).argmax(1)] for m in middle)
        return np.where(total > 0, (lower + upper) / 2, np.nan)

    return statistic


def _by_score(
    truth: ArrayLike, score: ArrayLike, *, descending: bool = False
) -> tuple[NDArray[np.intp], Floats, NDArray[np.intp]]:
    """Return the labelled rows in the order of their scores, their labels, and where each run of equal scores starts."""
    labels = as_binary(truth)
    if labels.ndim != 1:
        raise InputError(f"labels must be one value a row, got shape {labels.shape}")
    scores = as_scores(score, labels.shape)
    rows = np.flatnonzero(~np.isnan(labels))
    rows = rows[np.argsort(-scores[rows] if descending else scores[rows], kind="stable")]
    ordered = scores[rows]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(rows) else rows
    return rows, labels[rows], starts


def _weights_of_groups(weights: Floats, is_one: Floats, starts: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Return the weight of ones and of zeros in each run of equal scores, shape (resamples, runs)."""
    ones = weights * is_one
    zeros = weights - ones
    if len(starts) == len(is_one):
        return ones, zeros
    return np.add.reduceat(ones, starts, axis=1), np.add.reduceat(zeros, starts, axis=1)


def _divide(above: Floats, below: Floats, *, empty: float = np.nan) -> Floats:
    """Divide; ``empty`` where the divisor is 0."""
    found: Floats = np.full(np.broadcast_shapes(above.shape, below.shape), empty)
    np.divide(above, below, out=found, where=below > 0)
    return found
