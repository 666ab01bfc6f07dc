"""How far probabilities can be believed: expected calibration error, Brier score, log loss, reliability curve.

Comes in: the column of each row's true class (None or NaN: not labelled, left out) and class probabilities (n, classes).
Goes out: plain floats, functions of row weights for the bootstrap, intervals clustered by patient, a curve.

Notable choices: several classes are judged by the *top label*: the largest probability is the confidence, and it should
be the share of right answers among rows of that confidence (Guo et al. 2017). Ties take the lowest class. Two classes can be judged by the probability of class
1 instead (``of="positive"``), which is what a rare finding needs: its top label is almost always "absent". A class
without a row in the truth does no harm here (unlike the AUROC): the numbers are means over rows. No labelled row: NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Clusters, Floats, WeightStatistic, weighted_interval
from chiasm.metrics.labels import as_class_numbers, as_probabilities
from chiasm.metrics.weighted import mean_statistic
from chiasm.types import Interval

Truth = ArrayLike | Sequence[Any]
Groups = Sequence[Hashable] | NDArray[np.generic]
Binning = Literal["width", "mass"]
Of = Literal["top", "positive"]

BINS = 15
"""Bins of the calibration error, as Guo et al. 2017."""


@dataclass(frozen=True)
class ReliabilityCurve:
    """Confidence against the share of right answers, bin by bin; empty bins are left out.

    Attributes:
        confidence: Mean top probability in each bin.
        accuracy: Share of right answers in each bin.
        low: Lower bound of ``accuracy``, resampling patients; NaN without groups.
        high: Upper bound.
        count: Rows in each bin.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    count: tuple[int, ...]


def expected_calibration_error(
    truth: Truth,
    probabilities: ArrayLike,
    *,
    bins: int = BINS,
    binning: Binning = "width",
    debiased: bool = False,
    of: Of = "top",
) -> float:
    """Return the mean gap between confidence and share of right answers, over bins of confidence.

    Args:
        truth: (n,) column of the true class; None and NaN are left out.
        probabilities: (n, classes), or (n,) as the probability of class 1 of two.
        bins: Number of bins.
        binning: ``width``: equal parts of [0, 1], closed on the right; ``mass``: equal numbers of rows, equal
            confidences staying together, so that there may be fewer bins.
        debiased: Take off what chance alone adds to the gap of a bin: even perfect probabilities have gaps above 0 in
            finite data. Each gap d with standard error s counts as 2 d - E|N(d, s²)|; the sum is not below 0. This first-order correction removes about
            two fifths of the excess where calibration is perfect, and all of it where gaps are large.
        of: ``top``: the largest probability against the share of right answers; ``positive``: the probability of class 1
            of two against the share of class 1.

    Returns:
        A number in [0, 1], 0 for perfect calibration; NaN when nothing is labelled.

    Raises:
        InputError: For classes without a column, values that are no probabilities, or no bins.

    References:
        Guo et al., 2017, On Calibration of Modern Neural Networks, eq. 3, https://arxiv.org/abs/1706.04599 (equal
        width); Kumar, Liang and Ma, 2019, Verified Uncertainty Calibration, https://arxiv.org/abs/1909.10155
        (equal mass, debiasing).

    Deviations:
        Kumar et al. debias the l1 error by simulation; its limit, the mean of a folded normal, is used instead, with the
        gap's own s² = a (1 - a) / n. A bin with all answers right or all wrong has s = 0 and is not corrected.
    """
    return _of_all(ece_statistic(truth, probabilities, bins=bins, binning=binning, debiased=debiased, of=of), truth)


def brier_score(truth: Truth, probabilities: ArrayLike) -> float:
    """Return the mean squared distance between probabilities and truth.

    Args:
        truth: As :func:`expected_calibration_error`.
        probabilities: As :func:`expected_calibration_error`.

    Returns:
        Two classes: mean of (p1 - y)², in [0, 1]. More: the sum over classes, in [0, 2]. NaN when nothing is labelled.

    Raises:
        InputError: As :func:`expected_calibration_error`.

    References:
        Brier, 1950. Equal to scikit-learn's ``brier_score_loss`` with its default ``scale_by_half="auto"``.
    """
    return _of_all(brier_statistic(truth, probabilities), truth)


def log_loss(truth: Truth, probabilities: ArrayLike) -> float:
    """Return the mean of -log of the true class's probability, in nats.

    Args:
        truth: As :func:`expected_calibration_error`.
        probabilities: As :func:`expected_calibration_error`.

    Returns:
        A number above 0; a probability of 0 counts as 2.2e-16, so one such row adds 36 / n. NaN when nothing is labelled.

    Raises:
        InputError: As :func:`expected_calibration_error`.

    References:
        Equal to scikit-learn's ``log_loss`` of float64 probabilities.
    """
    return _of_all(log_loss_statistic(truth, probabilities), truth)


def expected_calibration_error_interval(
    truth: Truth,
    probabilities: ArrayLike,
    groups: Groups,
    *,
    bins: int = BINS,
    binning: Binning = "width",
    debiased: bool = False,
    of: Of = "top",
    **options: Any,
) -> Interval:
    """Return :func:`expected_calibration_error` with its interval, resampling patients; the bins stay those of all rows.

    Resamples are noisier than the rows themselves, which pushes the plain error up: its interval can lie above the value.
    ``debiased`` lessens that.

    Args:
        truth: As :func:`expected_calibration_error`.
        probabilities: As :func:`expected_calibration_error`.
        groups: Patient of each row.
        bins: As :func:`expected_calibration_error`.
        binning: As :func:`expected_calibration_error`.
        debiased: As :func:`expected_calibration_error`.
        of: As :func:`expected_calibration_error`.
        **options: ``method``, ``n_resamples``, ``seed``, ``level`` of :func:`chiasm.metrics.bootstrap.weighted_interval`.
    """

    def make(kept: Any, given: Floats) -> WeightStatistic:
        return ece_statistic(kept, given, bins=bins, binning=binning, debiased=debiased, of=of)

    return _with_interval(make, truth, probabilities, groups, options)


def brier_score_interval(truth: Truth, probabilities: ArrayLike, groups: Groups, **options: Any) -> Interval:
    """Return :func:`brier_score` with its interval, resampling patients.

    Args:
        truth: As :func:`brier_score`.
        probabilities: As :func:`brier_score`.
        groups: Patient of each row.
        **options: As :func:`expected_calibration_error_interval`.
    """
    return _with_interval(brier_statistic, truth, probabilities, groups, options)


def log_loss_interval(truth: Truth, probabilities: ArrayLike, groups: Groups, **options: Any) -> Interval:
    """Return :func:`log_loss` with its interval, resampling patients.

    Args:
        truth: As :func:`log_loss`.
        probabilities: As :func:`log_loss`.
        groups: Patient of each row.
        **options: As :func:`expected_calibration_error_interval`.
    """
    return _with_interval(log_loss_statistic, truth, probabilities, groups, options)


def ece_statistic(
    truth: Truth,
    probabilities: ArrayLike,
    *,
    bins: int = BINS,
    binning: Binning = "width",
    debiased: bool = False,
    of: Of = "top",
) -> WeightStatistic:
    """Return :func:`expected_calibration_error` as a function of weights; the bins are those of all rows."""
    confidence, right = _confidence(truth, probabilities, of)
    known = ~np.isnan(right)
    member = np.zeros((len(right), 1))
    _check_bins(bins, binning)
    if known.any():
        number = _bins(confidence[known], bins, binning)
        member = np.zeros((len(right), int(number.max()) + 1))
        member[np.flatnonzero(known), number] = 1.0
    hits = member * np.nan_to_num(right)[:, None]
    sure = member * confidence[:, None]

    def statistic(weights: Floats) -> Floats:
        rows = weights @ member
        total = rows.sum(1)
        safe = np.where(rows > 0, rows, 1.0)
        share = (weights @ hits) / safe
        gap = np.abs(share - (weights @ sure) / safe)
        if debiased:
            gap = 2 * gap - _folded_mean(gap, np.sqrt(share * (1 - share) / safe))
        found: Floats = (rows * gap).sum(1) / np.where(total > 0, total, np.nan)
        return np.maximum(found, 0.0)

    return statistic


def brier_statistic(truth: Truth, probabilities: ArrayLike) -> WeightStatistic:
    """Return :func:`brier_score` as a function of weights."""
    given, wanted = _checked(truth, probabilities)
    if given.shape[1] == 2:
        distance = (given[:, 1] - (wanted == 1)) ** 2
    else:
        distance = ((given - (wanted[:, None] == np.arange(given.shape[1]))) ** 2).sum(1)
    return mean_statistic(np.where(wanted < 0, np.nan, distance))


def log_loss_statistic(truth: Truth, probabilities: ArrayLike) -> WeightStatistic:
    """Return :func:`log_loss` as a function of weights."""
    given, wanted = _checked(truth, probabilities)
    smallest = float(np.finfo(np.float64).eps)
    of_truth = np.clip(given[np.arange(len(given)), wanted], smallest, 1 - smallest)
    return mean_statistic(np.where(wanted < 0, np.nan, -np.log(of_truth)))


def reliability_curve(
    truth: Truth,
    probabilities: ArrayLike,
    *,
    groups: Groups | None = None,
    bins: int = 10,
    binning: Binning = "mass",
    n_resamples: int = 500,
    seed: int = 0,
    level: float = 0.95,
    of: Of = "top",
) -> ReliabilityCurve:
    """Return confidence against the share of right answers, bin by bin.

    Args:
        truth: As :func:`expected_calibration_error`.
        probabilities: As :func:`expected_calibration_error`.
        groups: Patient of each row, for the intervals; None: without intervals.
        bins: Number of bins.
        binning: As :func:`expected_calibration_error`.
        n_resamples: Resamples of patients; each bin is resampled as it lies.
        seed: Of the draws.
        level: Coverage of the intervals, each bin for itself.
        of: As :func:`expected_calibration_error`.

    Returns:
        Bins in rising order of confidence, without empty ones.

    Raises:
        InputError: As :func:`expected_calibration_error`.
    """
    confidence, right = _confidence(truth, probabilities, of)
    _check_bins(bins, binning)
    known = np.flatnonzero(~np.isnan(right))
    if len(known) == 0:
        return ReliabilityCurve((), (), (), (), ())
    number = _bins(confidence[known], bins, binning)
    filled, number = np.unique(number, return_inverse=True)
    member = np.zeros((len(known), len(filled)))
    member[np.arange(len(known)), number] = 1.0
    hits = member * right[known][:, None]
    rows = member.sum(0)
    low = high = np.full(len(filled), np.nan)
    if groups is not None:
        patients = list(groups)
        if len(patients) != len(right):
            raise InputError(f"there are {len(patients)} groups for {len(right)} rows")
        clusters = Clusters([patients[i] for i in known])
        if clusters.count > 1:
            shares = [
                np.divide(w @ hits, w @ member, out=np.full((len(w), len(filled)), np.nan), where=w @ member > 0)
                for w in clusters.weights(n_resamples, seed)
            ]
            low, high = _columns_quantiles(np.concatenate(shares), level)
    return ReliabilityCurve(
        _floats(confidence[known] @ member / rows),
        _floats(hits.sum(0) / rows),
        _floats(low),
        _floats(high),
        tuple(int(n) for n in rows),
    )


def _columns_quantiles(shares: Floats, level: float) -> tuple[Floats, Floats]:
    """Return the bounds of each column, over its defined values (a bin may be empty in a resample)."""
    bounds = [np.quantile(c[~np.isnan(c)], [(1 - level) / 2, (1 + level) / 2]) for c in shares.T]
    return np.array([b[0] for b in bounds]), np.array([b[1] for b in bounds])


def _floats(values: Floats) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _checked(truth: Truth, probabilities: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    given = as_probabilities(probabilities)
    wanted = as_class_numbers(truth, given.shape[1])
    if len(wanted) != len(given):
        raise InputError(f"there are probabilities of {len(given)} rows for {len(wanted)} true classes")
    return given, wanted


def _confidence(truth: Truth, probabilities: ArrayLike, of: Of) -> tuple[Floats, Floats]:
    """Return the largest probability of each row, and whether its class is right (1, 0; NaN where not labelled).

    With ``of="positive"`` the probability of class 1, and whether class 1 is true.
    """
    given, wanted = _checked(truth, probabilities)
    if of not in ("top", "positive"):
        raise InputError(f"unknown kind of confidence `{of}`", hint="one of top, positive")
    if of == "positive":
        if given.shape[1] != 2:
            raise InputError(f"the probability of class 1 needs two classes, got {given.shape[1]}", hint="use of=top")
        return given[:, 1], np.where(wanted < 0, np.nan, wanted == 1)
    right = (given.argmax(1) == wanted).astype(np.float64)
    return given.max(1), np.where(wanted < 0, np.nan, right)


def _check_bins(bins: int, binning: str) -> None:
    if bins < 1:
        raise InputError(f"the number of bins must be at least 1, got {bins}")
    if binning not in ("width", "mass"):
        raise InputError(f"unknown binning `{binning}`", hint="one of width, mass")


def _bins(confidence: Floats, bins: int, binning: Binning) -> NDArray[np.intp]:
    """Return the bin of each confidence."""
    if binning == "width":
        edges = np.arange(1, bins + 1) / bins
    else:
        ordered = np.sort(confidence)
        last = np.ceil(np.arange(1, bins + 1) * len(ordered) / bins).astype(int) - 1
        edges = np.unique(ordered[last])
    return np.minimum(np.searchsorted(edges, confidence, side="left"), len(edges) - 1)


def _folded_mean(mean: Floats, deviation: Floats) -> Floats:
    """Return E|X| of a normal X with this mean and standard deviation."""
    ratio = mean / np.where(deviation > 0, deviation, 1.0)
    error_function = np.vectorize(math.erf, otypes=[np.float64])(ratio / math.sqrt(2))
    folded = deviation * math.sqrt(2 / math.pi) * np.exp(-(ratio**2) / 2) + mean * error_function
    return np.where(deviation > 0, folded, mean)


def _of_all(statistic: WeightStatistic, rows: Truth) -> float:
    return float(statistic(np.ones((1, len(np.asarray(rows, dtype=object)))))[0])


def _with_interval(
    make: Callable[[Any, Floats], WeightStatistic],
    truth: Truth,
    probabilities: ArrayLike,
    groups: Groups,
    options: dict[str, Any],
) -> Interval:
    """Leave out the rows without a label, then resample the groups of the others."""
    given, wanted = _checked(truth, probabilities)
    patients = list(groups)
    if len(patients) != len(wanted):
        raise InputError(f"there are {len(patients)} groups for {len(wanted)} rows")
    known = np.flatnonzero(wanted >= 0)
    if len(known) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    return weighted_interval(make(wanted[known], given[known]), [patients[i] for i in known], **options)
