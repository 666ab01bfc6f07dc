"""How two labellings of the same rows agree: precision, recall, F1 and Cohen's kappa, with intervals by patient.

Comes in: what one labelling says and what the other (taken for the truth) says, 0, 1 or missing. Goes out:
:class:`Agreement`. Rows that either leaves out are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Floats, WeightStatistic, weighted_interval
from chiasm.metrics.labels import as_binary
from chiasm.types import Interval


@dataclass(frozen=True)
class Agreement:
    """Agreement on one finding.

    Attributes:
        precision: Share of given positives that are true. Chance is the share of true ones (also what "always 1" gets).
        recall: Share of true ones that are given.
        f1: Harmonic mean of both; chance is that of labels drawn with the same share, ``always`` that of all ones.
        kappa: Cohen's kappa; 0 is chance, 1 complete agreement.
        always: F1 of calling every row positive.
        positives: True ones.
        given: Rows called positive.
        n: Rows compared.
    """

    precision: Interval
    recall: Interval
    f1: Interval
    kappa: Interval
    always: float
    positives: int
    given: int
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **{name: getattr(self, name).to_dict() for name in ("precision", "recall", "f1", "kappa")},
            "always": self.always if math.isfinite(self.always) else None,
            "positives": self.positives,
            "given": self.given,
            "n": self.n,
        }


def agreement(
    truth: ArrayLike | Sequence[object],
    given: ArrayLike | Sequence[object],
    groups: Sequence[Hashable] | NDArray[np.generic],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Compare two labellings.

    Args:
        truth: (n,) 0, 1 or missing.
        given: (n,) the same.
        groups: Patient of each row.
        n_resamples: Bootstrap samples per interval.
        seed: Of the bootstrap.

    Raises:
        InputError: Lengths differ, values are not 0 or 1, or no row has both labels.

    References:
        J. Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    a, b = as_binary(truth), as_binary(given)
    if a.shape != b.shape or len(groups) != len(a):
        raise InputError(f"there are {len(a)} true labels, {len(b)} given ones and {len(groups)} groups")
    rows = np.flatnonzero(~np.isnan(a) & ~np.isnan(b))
    if not len(rows):
        raise InputError("no row has both labels, so there is nothing to compare")
    a, b = a[rows], b[rows]
    kept = [groups[int(i)] for i in rows]
    share, called = float(a.mean()), float(b.mean())

    def interval(make: Callable[[Floats, Floats], WeightStatistic], chance: float) -> Interval:
        return weighted_interval(make(a, b), kept, n_resamples=n_resamples, seed=seed, chance=chance)

    by_chance = 2 * share * called / (share + called) if share + called else math.nan
    return Agreement(
        interval(precision_statistic, share),
        interval(recall_statistic, called),
        interval(f1_statistic, by_chance),
        interval(kappa_statistic, 0.0),
        2 * share / (1 + share) if share else math.nan,
        int(a.sum()),
        int(b.sum()),
        len(rows),
    )


def precision_statistic(truth: Floats, given: Floats) -> WeightStatistic:
    """Return precision as a function of row weights; NaN where nothing is called positive."""

    def statistic(weights: Floats) -> Floats:
        return _divide(weights @ (truth * given), weights @ given)

    return statistic


def recall_statistic(truth: Floats, given: Floats) -> WeightStatistic:
    """Return recall (sensitivity) as a function of row weights; NaN where nothing is truly positive."""

    def statistic(weights: Floats) -> Floats:
        return _divide(weights @ (truth * given), weights @ truth)

    return statistic


def f1_statistic(truth: Floats, given: Floats) -> WeightStatistic:
    """Return F1 as a function of row weights; NaN where neither labelling has a positive."""

    def statistic(weights: Floats) -> Floats:
        return _divide(2 * (weights @ (truth * given)), weights @ (truth + given))

    return statistic


def kappa_statistic(truth: Floats, given: Floats) -> WeightStatistic:
    """Return Cohen's kappa as a function of row weights; NaN where both labellings are constant and equal."""

    def statistic(weights: Floats) -> Floats:
        total = weights.sum(1)
        p, q = weights @ truth / total, weights @ given / total
        observed = weights @ np.where(truth == given, 1.0, 0.0) / total
        expected = p * q + (1 - p) * (1 - q)
        return _divide(observed - expected, 1 - expected)

    return statistic


def _divide(above: Floats, below: Floats) -> Floats:
    found: Floats = np.full(np.shape(above), math.nan)
    np.divide(above, below, out=found, where=below > 1e-12)
    return found
