"""Whether one model beats another on the same samples: DeLong's test for AUROC, swaps of the models for any metric.

Comes in: truth, what two models answered for the same rows, the patient of each row. Goes out: a :class:`PairedTest`.
``paired.py`` asks another question: whether one way of *training* beats another, over seeds.

Which test is used (:func:`compare_auroc`, :func:`compare_metric`):

====================================================  ====================  ======================
case                                                  p value               interval
====================================================  ====================  ======================
AUROC, each patient has one row                       DeLong                DeLong
AUROC, patients have several rows                     DeLong, clustered     DeLong, clustered
AUROC, fewer than 10 patients with (or without) the   permutation           bootstrap of patients
finding, or no spread to test against
any other metric                                      permutation           bootstrap of patients
====================================================  ====================  ======================

The clustered form (Obuchowski 1997) is DeLong's own where each patient has one row. A permutation swaps the two models'
answers for whole patients: if the models are alike, it changes nothing. Several findings: :func:`compare_findings`, or
:func:`chiasm.metrics.paired.correct` on a dictionary of tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import CELLS_AT_ONCE, Clusters, Floats, WeightStatistic, paired_difference
from chiasm.metrics.labels import as_binary, as_scores, is_labelled
from chiasm.metrics.paired import correct
from chiasm.metrics.weighted import auroc_statistic
from chiasm.types import Interval

Groups = Sequence[Hashable] | NDArray[np.generic]
Test = Literal["delong", "delong_clustered", "permutation"]
Choice = Literal["auto", "delong", "permutation"]
MakeStatistic = Callable[[Any, Any], WeightStatistic]
"""(truth, answers) -> a statistic of row weights, such as :func:`chiasm.metrics.weighted.auprc_statistic`."""

SMALLEST_SIDE = 10
"""Patients with the finding, and patients without, below which DeLong's normal law is not trusted. With 10 of 110, one or
three rows each, and an AUROC of 0.67 or 0.90, 4 to 6.5 % of equal models were called different at 5 % (1500 simulations)."""

ROUNDING = 1e-12


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same samples.

    Attributes:
        first: The metric of the first model.
        second: The metric of the second.
        difference: First less second with its interval; ``n`` counts labelled rows, ``chance`` is 0.
        p: Two-sided p value, corrected by Holm for the family it was asked in; NaN until
            :func:`chiasm.metrics.paired.correct` has run.
        p_raw: Two-sided p value of "no difference", uncorrected; NaN where it is not defined.
        test: Where ``p_raw`` comes from: ``delong``, ``delong_clustered`` or ``permutation``.
        interval: Where the interval comes from: ``delong``, ``delong_clustered`` or ``bootstrap``.
        patients: Number of patients among the labelled rows.
    """

    first: float
    second: float
    difference: Interval
    p: float
    p_raw: float
    test: Test
    interval: Literal["delong", "delong_clustered", "bootstrap"]
    patients: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; NaN becomes None."""
        plain = {k: _plain(getattr(self, k)) for k in ("first", "second", "p", "p_raw")}
        return plain | {"difference": self.difference.to_dict(), "test": self.test, "interval": self.interval,
                        "patients": self.patients}  # fmt: skip


@dataclass(frozen=True, eq=False)
class AurocCovariance:
    """AUROCs of several models on the same rows and how they vary together.

    Attributes:
        auroc: (models,) in [0, 1].
        covariance: (models, models) of the estimates.
        patients: Patients among the labelled rows.
        with_finding: Patients that have a row of class 1.
        without: Patients that have a row of class 0.
        clustered: Whether a patient has several labelled rows.
    """

    auroc: Floats
    covariance: Floats
    patients: int
    with_finding: int
    without: int
    clustered: bool


def midranks(values: ArrayLike) -> Floats:
    """Return the rank of each value of a column (n,), from 1; equal values share the mean of their ranks."""
    _, run, count = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(count) - (count - 1) / 2)[run.ravel()]
    return ranks


def delong_covariance(truth: ArrayLike, scores: ArrayLike, groups: Groups | None = None) -> AurocCovariance:
    """Return the AUROC of several models on the same rows with the covariance of the estimates.

    Args:
        truth: (n,) 0, 1, or NaN/None for rows that are left out.
        scores: (n, models), higher means more likely 1; ties count one half.
        groups: Patient of each row; None: each row is a patient.

    Returns:
        AUROC and covariance; all NaN without a row of either class, the covariance NaN with one patient on a side.

    Raises:
        InputError: For shapes that do not fit, other labels, or scores that are NaN.

    References:
        DeLong, DeLong and Clarke-Pearson, 1988, https://doi.org/10.2307/2531595; Sun and Xu, 2014,
        https://doi.org/10.1109/LSP.2014.2337313 (midranks, n log n); Obuchowski, 1997,
        https://doi.org/10.2307/2533958 (several rows a patient, which may have both classes).
    """
    labels = as_binary(truth)
    given = np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or given.ndim != 2 or given.shape[1] == 0:
        raise InputError(f"labels must be (rows,) and scores (rows, models), got {labels.shape} and {given.shape}")
    given = as_scores(given, (len(labels), given.shape[1]))
    known = np.flatnonzero(~np.isnan(labels))
    models = given.shape[1]
    no_value, no_covariance = np.full(models, np.nan), np.full((models, models), np.nan)
    if len(known) == 0:
        return AurocCovariance(no_value, no_covariance, 0, 0, 0, False)
    clusters = _clusters(groups, len(labels), known)
    is_one = labels[known] == 1
    sides = np.flatnonzero(is_one), np.flatnonzero(~is_one)
    patients = [len(np.unique(clusters.of_row[side])) for side in sides]
    facts = (clusters.count, patients[0], patients[1], clusters.count < clusters.n)
    if not (len(sides[0]) and len(sides[1])):
        return AurocCovariance(no_value, no_covariance, *facts)
    ones, zeros = _components(given[known], *sides)
    auroc = ones.mean(0)
    if min(patients) < 2:
        return AurocCovariance(auroc, no_covariance, *facts)
    # What each patient's rows of a class lie above the mean, summed: Obuchowski's V(X_i.) - m_i θ.
    pulls = [np.zeros((clusters.count, models)) for _ in sides]
    for pull, component, side in zip(pulls, (ones, zeros), sides, strict=True):
        np.add.at(pull, clusters.of_row[side], component - auroc)
    covariance = np.zeros((models, models))
    for pull, side, count in zip(pulls, sides, patients, strict=True):
        covariance += count / (count - 1) * (pull.T @ pull) / len(side) ** 2
    crossed = pulls[0].T @ pulls[1] / (len(sides[0]) * len(sides[1]))
    covariance += clusters.count / (clusters.count - 1) * (crossed + crossed.T)
    return AurocCovariance(auroc, covariance, *facts)


def delong_test(
    truth: ArrayLike, first: ArrayLike, second: ArrayLike, groups: Groups | None = None, *, level: float = 0.95
) -> PairedTest:
    """Test whether two models have the same AUROC on the same rows.

    Args:
        truth: (n,) 0, 1, or NaN/None for rows that are left out.
        first: (n,) scores of the first model; only their order counts.
        second: (n,) scores of the second.
        groups: Patient of each row; None: each row is a patient. Several rows a patient: the clustered form.
        level: Coverage of the interval.

    Returns:
        The test. Models that order the rows alike: difference 0, p 1, an interval without width. A difference without
        any spread to test it against: NaN for p and bounds.

    Raises:
        InputError: As :func:`delong_covariance`, or for a level outside (0, 1).

    References:
        As :func:`delong_covariance`. The normal law holds for many patients of both classes (see :data:`SMALLEST_SIDE`).
    """
    _check_level(level)
    shape = as_binary(truth).shape
    scores = np.stack([as_scores(first, shape), as_scores(second, shape)], axis=-1)
    found = delong_covariance(truth, scores, groups)
    c = found.covariance
    value, variance = float(found.auroc[0] - found.auroc[1]), float(c[0, 0] + c[1, 1] - 2 * c[0, 1])
    n = int((~np.isnan(as_binary(truth))).sum())
    low = high = p = math.nan
    if variance > ROUNDING**1.5:
        error = math.sqrt(variance)
        half = NormalDist().inv_cdf((1 + level) / 2) * error
        low, high, p = value - half, value + half, math.erfc(abs(value) / error / math.sqrt(2))
    elif math.isfinite(variance) and abs(value) <= ROUNDING:
        low, high, p = value, value, 1.0
    name: Literal["delong", "delong_clustered"] = "delong_clustered" if found.clustered else "delong"
    return PairedTest(
        float(found.auroc[0]),
        float(found.auroc[1]),
        Interval(value, low, high, n, 0.0),
        math.nan,
        p,
        name,
        name,
        found.patients,
    )


def permutation_p(
    make: MakeStatistic,
    truth: ArrayLike | Sequence[Any],
    first: ArrayLike,
    second: ArrayLike,
    groups: Groups,
    *,
    n_permutations: int = 2000,
    seed: int = 0,
    ranks: bool = False,
) -> float:
    """Return the two-sided p value of "the models are alike", swapping their answers for whole patients at random.

    Args:
        make: (truth, answers) -> statistic of row weights.
        truth: One value a row, as ``make`` takes it.
        first: (n, ...) answers of the first model.
        second: The same of the second.
        groups: Patient of each row.
        n_permutations: Random swaps. Where the patients allow no more than that many (2^patients), all are counted
            and p is exact.
        seed: Of the swaps.
        ranks: Replace the answers of each model, column by column, by their midranks: for metrics that depend on the
            order alone, so that two scales of scores do not matter.

    Returns:
        Share of swaps whose difference is at least as far from 0 as the one seen, which counts as one of them:
        in (0, 1]; an undefined difference counts as far. NaN where the difference itself is undefined.

    Raises:
        InputError: When lengths differ or a parameter is out of its range.

    References:
        Pitman, 1937; Venkatraman and Begg, 1996, https://doi.org/10.1093/biomet/83.4.835 (ranks, swaps).
    """
    if n_permutations < 1:
        raise InputError(f"the number of permutations must be at least 1, got {n_permutations}")
    one, other = np.asarray(first), np.asarray(second)
    given = truth if isinstance(truth, np.ndarray) else np.asarray(truth, dtype=object)
    clusters = Clusters(groups)
    if one.shape != other.shape or len(one) != len(given) or len(one) != clusters.n:
        raise InputError(f"answers of shape {one.shape} and {other.shape} for {len(given)} rows of truth and "
                         f"{clusters.n} groups")  # fmt: skip
    if ranks:
        one, other = (_ranked(answers) for answers in (one, other))
    # Both models' rows below each other: a swap is a choice of weights, and all swaps are one product.
    statistic = make(np.concatenate([given, given]), np.concatenate([one, other]))
    exact = clusters.count <= 30 and 2**clusters.count <= n_permutations
    random = np.random.default_rng(seed)
    total = 2**clusters.count if exact else n_permutations
    seen = _swapped(statistic, np.zeros((1, clusters.n), dtype=bool))[0]
    if not math.isfinite(seen):
        return math.nan
    far, block = 0, max(1, CELLS_AT_ONCE // (2 * clusters.n))
    for start in range(0, total, block):
        size = min(block, total - start)
        if exact:
            swaps = (np.arange(start, start + size)[:, None] >> np.arange(clusters.count)) & 1 == 1
        else:
            swaps = random.random((size, clusters.count)) < 0.5
        found = _swapped(statistic, swaps[:, clusters.of_row])
        far += int((~(np.abs(found) < abs(seen) - ROUNDING)).sum())
    return far / total if exact else (1 + far) / (1 + total)


def compare_metric(
    make: MakeStatistic,
    truth: ArrayLike | Sequence[Any],
    first: ArrayLike,
    second: ArrayLike,
    groups: Groups,
    *,
    ranks: bool = False,
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedTest:
    """Compare two models by any metric: permutation test, and the interval of a bootstrap, both of whole patients.

    Args:
        make: As :func:`permutation_p`: a maker of ``chiasm.metrics.weighted`` or ``chiasm.metrics.calibration``.
        truth: As :func:`permutation_p`.
        first: As :func:`permutation_p`.
        second: As :func:`permutation_p`.
        groups: Patient of each row.
        ranks: As :func:`permutation_p`; the interval is made of the answers as they are.
        n_resamples: Permutations, and resamples of the bootstrap.
        seed: Of both.
        level: Coverage of the interval.

    Raises:
        InputError: As :func:`permutation_p` and :func:`chiasm.metrics.bootstrap.paired_difference`.
    """
    p = permutation_p(make, truth, first, second, groups, n_permutations=n_resamples, seed=seed, ranks=ranks)
    statistics = make(truth, np.asarray(first)), make(truth, np.asarray(second))
    found = paired_difference(*statistics, groups, n_resamples=n_resamples, seed=seed, level=level).difference
    given = np.asarray(truth, dtype=object)
    known = is_labelled(given).reshape(given.shape)
    labelled = np.flatnonzero(known if known.ndim == 1 else known.any(axis=tuple(range(1, known.ndim))))
    values = [float(s(np.ones((1, len(given))))[0]) for s in statistics]
    difference = Interval(found.value, found.low, found.high, len(labelled), 0.0)
    names = list(groups)
    patients = len({str(names[i]) for i in labelled})
    return PairedTest(values[0], values[1], difference, math.nan, p, "permutation", "bootstrap", patients)


def compare_auroc(
    truth: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    groups: Groups,
    *,
    test: Choice = "auto",
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedTest:
    """Compare the AUROC of two models on the same rows by the rule at the head of this module.

    Args:
        truth: (n,) 0, 1, or NaN/None for rows that are left out.
        first: (n,) scores of the first model; only their order counts.
        second: (n,) scores of the second.
        groups: Patient of each row.
        test: ``auto``: the rule; ``delong`` or ``permutation``: always this one.
        n_resamples: Permutations and resamples, where they are used.
        seed: Of both.
        level: Coverage of the interval.

    Raises:
        InputError: As :func:`delong_test` and :func:`compare_metric`; for an unknown ``test``.
    """
    if test not in ("auto", "delong", "permutation"):
        raise InputError(f"unknown test `{test}`", hint="one of auto, delong, permutation")
    if test != "permutation":
        found = delong_test(truth, first, second, groups, level=level)
        if test == "delong" or (math.isfinite(found.p_raw) and _enough(truth, groups)):
            return found
    labels = as_binary(truth)
    known = np.flatnonzero(~np.isnan(labels))
    if len(known) == 0:
        nothing = Interval(math.nan, math.nan, math.nan, 0, 0.0)
        return PairedTest(math.nan, math.nan, nothing, math.nan, math.nan, "permutation", "bootstrap", 0)
    names = list(groups)
    one, other = (as_scores(s, labels.shape)[known] for s in (first, second))
    patients = [names[i] for i in known]
    options = {"n_resamples": n_resamples, "seed": seed}
    return compare_metric(auroc_statistic, labels[known], one, other, patients, ranks=True, level=level, **options)


def compare_findings(
    truth: Mapping[str, ArrayLike],
    first: Mapping[str, ArrayLike],
    second: Mapping[str, ArrayLike],
    groups: Groups,
    **options: Any,
) -> dict[str, PairedTest]:
    """Compare the AUROC of two models finding by finding, with p corrected by Holm over the findings.

    Args:
        truth: Finding -> (n,) 0, 1, or NaN/None.
        first: Finding -> (n,) scores of the first model.
        second: Finding -> (n,) scores of the second.
        groups: Patient of each row.
        **options: Of :func:`compare_auroc`.

    Returns:
        Finding -> test, in the order of ``truth``. A finding without both classes has NaN p and does not count.

    Raises:
        InputError: When a model lacks a finding, and as :func:`compare_auroc`.
    """
    for name, side in (("first", first), ("second", second)):
        lacking = [f for f in truth if f not in side]
        if lacking:
            raise InputError(f"the {name} model has no scores of {len(lacking)} of {len(truth)} findings, "
                             f"such as `{lacking[0]}`", hint="compare the findings that both have")  # fmt: skip
    return correct({f: compare_auroc(truth[f], first[f], second[f], groups, **options) for f in truth})


def _components(scores: Floats, ones: NDArray[np.intp], zeros: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Return DeLong's structural components: (ones, models) shares of zeros below, (zeros, models) of ones above."""
    of_ones, of_zeros = [], []
    for column in scores.T:
        together = midranks(column)
        of_ones.append((together[ones] - midranks(column[ones])) / len(zeros))
        of_zeros.append(1 - (together[zeros] - midranks(column[zeros])) / len(ones))
    return np.stack(of_ones, axis=1), np.stack(of_zeros, axis=1)


def _clusters(groups: Groups | None, n: int, rows: NDArray[np.intp]) -> Clusters:
    names = list(range(n)) if groups is None else list(groups)
    if len(names) != n:
        raise InputError(f"there are {len(names)} groups for {n} rows")
    return Clusters([names[i] for i in rows])


def _enough(truth: ArrayLike, groups: Groups) -> bool:
    labels, names = as_binary(truth), np.array([str(g) for g in groups])
    return min(len(np.unique(names[labels == side])) for side in (0, 1)) >= SMALLEST_SIDE


def _ranked(answers: NDArray[Any]) -> Floats:
    if answers.ndim == 1:
        return midranks(answers)
    columns = answers.reshape(len(answers), -1)
    return np.stack([midranks(c) for c in columns.T], axis=1).reshape(answers.shape)


def _swapped(statistic: WeightStatistic, swaps: NDArray[np.bool_]) -> Floats:
    """Return first less second after each row of swaps, (swaps, n)."""
    kept, moved = (~swaps).astype(np.float64), swaps.astype(np.float64)
    first = statistic(np.concatenate([kept, moved], axis=1))
    return np.asarray(first - statistic(np.concatenate([moved, kept], axis=1)), dtype=np.float64)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"the level must lie between 0 and 1, got {level}", hint="write 0.95 for 95 %")


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
