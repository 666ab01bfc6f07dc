"""Intervals and comparisons by resampling patients: rows of one patient are never counted as independent.

Comes in: a statistic and the group (patient) of each row. Goes out: an :class:`~chiasm.types.Interval`, or a
:class:`Comparison` of two statistics on the same rows.

Notable choices: whole groups are drawn with replacement, so ten images of one patient carry the weight of one patient.
A statistic may be a function of row indices (anything) or of row weights (a matrix of resamples at once, hundreds of
times faster); both see the same draws. Draws depend on the seed and on the groups' names, not on the order of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.labels import is_missing
from chiasm.types import Interval

Floats = NDArray[np.float64]
IndexStatistic = Callable[[NDArray[np.intp]], float]
"""Row indices (with repeats) -> number; NaN where undefined."""

WeightStatistic = Callable[[Floats], Floats]
"""Weights of rows, shape (resamples, n) -> (resamples,) numbers; NaN where undefined."""

Method = Literal["percentile", "bca"]

CELLS_AT_ONCE = 1_000_000
"""Resamples × rows that are worked on at a time: 8 MB of weights."""

SMALLEST_DEFINED = 0.5
"""Below this share of resamples with a defined statistic no interval is given."""


@dataclass(frozen=True)
class Comparison:
    """The difference of two statistics on the same rows.

    Attributes:
        difference: First less second, with its interval; ``chance`` is 0.
        p_value: Two-sided, in (0, 1]: how often resampled differences lie on the other side of zero. At least
            2 / (resamples + 1). NaN where no interval could be computed.
    """

    difference: Interval
    p_value: float


def bootstrap_interval(
    statistic: IndexStatistic,
    groups: Sequence[Hashable] | NDArray[np.generic],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    chance: float | None = None,
) -> Interval:
    """Return a statistic of row indices with its percentile interval, resampling whole groups.

    Args:
        statistic: Gets row indices, with repeats, and returns a number; NaN where it is undefined.
        groups: One group (patient) a row.
        n_resamples: Number of resamples.
        seed: Of the draws.
        level: Coverage of the interval.
        chance: What chance would give; passed on.

    Returns:
        The value on all rows with its interval; ``n`` is the number of rows. Resamples with an undefined statistic are
        left out; with fewer than two groups, or more than half of the resamples undefined, the bounds are NaN.

    Raises:
        InputError: When there are no rows, or a parameter is out of its range.

    References:
        Efron and Tibshirani, 1993, An Introduction to the Bootstrap, chapter 13; Field and Welsh, 2007, for clusters.
    """
    clusters = Clusters(groups)
    _check_parameters(n_resamples, level)
    value = float(statistic(np.arange(clusters.n, dtype=np.intp)))
    draws: Floats = np.full(0, np.nan)
    if clusters.count > 1:
        members = clusters.members()
        draws = np.array([
            float(statistic(np.concatenate([members[g] for g in drawn])))
            for block in clusters.draws(n_resamples, seed, clusters.n)
            for drawn in block
        ])  # fmt: skip
    return _interval(value, draws, _tails(level), clusters.n, chance)


def weighted_interval(
    statistic: WeightStatistic,
    groups: Sequence[Hashable] | NDArray[np.generic],
    *,
    method: Method = "percentile",
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    chance: float | None = None,
) -> Interval:
    """Return a statistic of row weights with its interval, resampling whole groups: the fast :func:`bootstrap_interval`.

    Args:
        statistic: Gets weights of shape (resamples, n) and returns one number a resample; NaN where undefined.
        groups: One group (patient) a row.
        method: ``percentile``, or ``bca``, which corrects for bias and skewness (better for few patients and for
            values near 0 or 1; needs one more evaluation a group).
        n_resamples: Number of resamples.
        seed: Of the draws; the same as :func:`bootstrap_interval` would use.
        level: Coverage of the interval.
        chance: What chance would give; passed on.

    Returns:
        As :func:`bootstrap_interval`.

    Raises:
        InputError: When there are no rows, or a parameter is out of its range.

    References:
        Efron, 1987, Better bootstrap confidence intervals, https://doi.org/10.1080/01621459.1987.10478410.
    """
    clusters = Clusters(groups)
    _check_parameters(n_resamples, level)
    value = float(statistic(np.ones((1, clusters.n)))[0])
    draws = _resampled(statistic, clusters, n_resamples, seed)
    tails = _tails(level)
    if method == "bca" and math.isfinite(value) and len(draws):
        tails = _bca_tails(value, draws, _jackknife(statistic, clusters), tails)
    return _interval(value, draws, tails, clusters.n, chance)


def weighted_intervals(
    statistics: Mapping[str, WeightStatistic],
    groups: Sequence[Hashable] | NDArray[np.generic],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Return several statistics of the same rows with their percentile intervals; all see every draw together.

    Args:
        statistics: Name -> statistic, as in :func:`weighted_interval`.
        groups: One group (patient) a row.
        n_resamples: Number of resamples.
        seed: Of the draws.
        level: Coverage of each interval by itself.

    Returns:
        Name -> what :func:`weighted_interval` gives for that statistic alone, in one pass over the draws.

    Raises:
        InputError: When there are no rows, or a parameter is out of its range.
    """
    clusters = Clusters(groups)
    _check_parameters(n_resamples, level)
    drawn: dict[str, list[Floats]] = {name: [] for name in statistics}
    if clusters.count > 1:
        for weights in clusters.weights(n_resamples, seed):
            for name, statistic in statistics.items():
                drawn[name].append(np.asarray(statistic(weights), dtype=np.float64))
    whole = np.ones((1, clusters.n))
    found = {}
    for name, statistic in statistics.items():
        draws = np.concatenate(drawn[name]) if drawn[name] else np.full(0, np.nan)
        found[name] = _interval(float(statistic(whole)[0]), draws, _tails(level), clusters.n, None)
    return found


def paired_difference(
    first: WeightStatistic,
    second: WeightStatistic,
    groups: Sequence[Hashable] | NDArray[np.generic],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Compare two statistics on the same rows, resampling whole groups: both see every draw together.

    Args:
        first: As in :func:`weighted_interval`.
        second: As ``first``, over the same rows.
        groups: One group (patient) a row.
        n_resamples: Number of resamples.
        seed: Of the draws.
        level: Coverage of the interval.

    Returns:
        First less second with its percentile interval, and the p value of "no difference". Adjust the p values of
        several comparisons with :func:`holm`.

    Raises:
        InputError: When there are no rows, or a parameter is out of its range.
    """
    clusters = Clusters(groups)
    _check_parameters(n_resamples, level)

    def difference(weights: Floats) -> Floats:
        return first(weights) - second(weights)

    value = float(difference(np.ones((1, clusters.n)))[0])
    draws = _resampled(difference, clusters, n_resamples, seed)
    interval = _interval(value, draws, _tails(level), clusters.n, 0.0)
    if not math.isfinite(interval.low):
        return Comparison(interval, math.nan)
    draws = draws[np.isfinite(draws)]
    tail = 1 + min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return Comparison(interval, min(1.0, 2 * tail / (len(draws) + 1)))


def holm(p_values: ArrayLike) -> Floats:
    """Return p values adjusted for their number, in the given order (Holm's step-down method).

    Args:
        p_values: In [0, 1]; NaN is left out of the count and stays NaN.

    Returns:
        Adjusted p values, never below the given ones; comparing them with α keeps the chance of any false claim ≤ α.

    Raises:
        InputError: When a value lies outside [0, 1].

    References:
        Holm, 1979, A simple sequentially rejective multiple test procedure, https://www.jstor.org/stable/4615733.
    """
    given = np.atleast_1d(np.asarray(p_values, dtype=np.float64))
    if given.ndim != 1 or ((given < 0) | (given > 1)).any():
        raise InputError("p values must be a list of numbers in [0, 1]")
    adjusted = np.full_like(given, np.nan)
    known = np.flatnonzero(np.isfinite(given))
    order = known[np.argsort(given[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1.0)
    return adjusted


class Clusters:
    """The groups of the rows, numbered in the order of their sorted names, and draws of them.

    Args:
        groups: One group a row.
    """

    def __init__(self, groups: Sequence[Hashable] | NDArray[np.generic]) -> None:
        names = [str(g) for g in groups]
        if not names:
            raise InputError("there are no rows to resample")
        missing = sum(is_missing(g) for g in groups)
        if missing:
            raise InputError(
                f"{missing} of {len(names)} rows have no group",
                hint="give a row without a patient a group of its own, such as its id",
            )
        unique, self.of_row = np.unique(np.asarray(names), return_inverse=True)
        self.count = len(unique)
        self.n = len(names)

    def members(self) -> list[NDArray[np.intp]]:
        """Return the rows of each group."""
        order = np.argsort(self.of_row, kind="stable")
        sizes = np.bincount(self.of_row, minlength=self.count)
        return np.split(order, np.cumsum(sizes)[:-1])

    def draws(self, n_resamples: int, seed: int, width: int) -> Iterator[NDArray[np.int64]]:
        """Yield blocks of resamples, shape (block, groups): the groups drawn with replacement.

        Args:
            n_resamples: Resamples in all blocks together.
            seed: Of the draws.
            width: Numbers that the caller holds for each resample; it limits the block, not the draws.
        """
        random = np.random.default_rng(seed)
        block = max(1, CELLS_AT_ONCE // max(width, self.count))
        for start in range(0, n_resamples, block):
            yield random.integers(self.count, size=(min(block, n_resamples - start), self.count))

    def weights(self, n_resamples: int, seed: int) -> Iterator[Floats]:
        """Yield blocks of row weights, shape (block, n): how often the group of each row was drawn."""
        for drawn in self.draws(n_resamples, seed, self.n):
            shifted = drawn + np.arange(len(drawn))[:, None] * self.count
            counts = np.bincount(shifted.ravel(), minlength=len(drawn) * self.count)
            yield counts.reshape(len(drawn), self.count)[:, self.of_row].astype(np.float64)


def _resampled(statistic: WeightStatistic, clusters: Clusters, n_resamples: int, seed: int) -> Floats:
    if clusters.count < 2:
        return np.full(0, np.nan)
    return np.concatenate([np.asarray(statistic(w), dtype=np.float64) for w in clusters.weights(n_resamples, seed)])


def _tails(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2


def _interval(value: float, draws: Floats, tails: tuple[float, float], n: int, chance: float | None) -> Interval:
    defined = draws[np.isfinite(draws)]
    if not math.isfinite(value) or len(defined) == 0 or len(defined) < SMALLEST_DEFINED * len(draws):
        return Interval(value, math.nan, math.nan, n, chance)
    low, high = np.quantile(defined, tails)
    return Interval(value, float(low), float(high), n, chance)


def _jackknife(statistic: WeightStatistic, clusters: Clusters) -> Floats:
    """Return the statistic without each group in turn."""
    block = max(1, CELLS_AT_ONCE // clusters.n)
    found = []
    for start in range(0, clusters.count, block):
        left_out = np.arange(start, min(start + block, clusters.count))
        found.append(statistic((clusters.of_row[None, :] != left_out[:, None]).astype(np.float64)))
    return np.concatenate(found)


def _bca_tails(value: float, draws: Floats, jackknife: Floats, tails: tuple[float, float]) -> tuple[float, float]:
    """Shift the tails of the percentile interval by bias and acceleration; keep them where either is undefined."""
    normal = NormalDist()
    defined = draws[np.isfinite(draws)]
    # Half of the ties count as below, or a statistic with few values would look biased.
    below = float(((defined < value) + 0.5 * (defined == value)).mean()) if len(defined) else 0.0
    if not 0 < below < 1:
        return tails
    bias = normal.inv_cdf(below)
    jackknife = jackknife[np.isfinite(jackknife)]
    pulls = jackknife.mean() - jackknife if len(jackknife) else jackknife
    spread = float((pulls**2).sum()) ** 1.5
    acceleration = float((pulls**3).sum()) / (6 * spread) if spread > 0 else 0.0
    shifted = []
    for tail in tails:
        z = bias + normal.inv_cdf(tail)
        if 1 - acceleration * z <= 0:
            return tails
        shifted.append(normal.cdf(bias + z / (1 - acceleration * z)))
    return shifted[0], shifted[1]


def _check_parameters(n_resamples: int, level: float) -> None:
    if n_resamples < 1:
        raise InputError(f"the number of resamples must be at least 1, got {n_resamples}")
    if not 0 < level < 1:
        raise InputError(f"the level must lie between 0 and 1, got {level}", hint="write 0.95 for 95 %")
