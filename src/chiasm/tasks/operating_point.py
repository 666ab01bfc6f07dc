"""Where to draw the line: thresholds at a stated sensitivity or specificity, and an answer "cannot tell".

In: scores or probabilities of one label (rows,), truth with gaps, patients. Out: an :class:`OperatingPoint` chosen on
validation rows, what it reaches on test rows with intervals of whole patients, and :class:`Decisions`.

Notable choices: a threshold that reaches 95 % sensitivity on validation rows reaches less than that on new ones half of
the time. ``conservative=True`` takes the rank that keeps the *expected* sensitivity of new rows at what was asked.
"Cannot tell" is an answer of its own: between the two thresholds of a :class:`Band`, or where a conformal set
(``tasks.conformal``) does not hold exactly one class.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Floats, weighted_interval
from chiasm.metrics.labels import as_binary, as_scores
from chiasm.metrics.weighted import mean_statistic
from chiasm.types import Interval

Groups = Sequence[Hashable] | NDArray[np.generic]
Aim = Literal["sensitivity", "specificity"]
Answer = Literal["positive", "negative", "cannot tell"]

_ROUNDING = 1e-9


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold: rows with a score of at least that are called positive.

    Attributes:
        threshold: In the units of the scores.
        aim: What was asked for: ``sensitivity`` or ``specificity``.
        wanted: How much of it.
        sensitivity: On the validation rows that chose it.
        specificity: On the same rows.
        positives: Validation rows with the label.
        negatives: Validation rows without.
        conservative: Whether the finite-sample rank was used.
    """

    threshold: float
    aim: Aim
    wanted: float
    sensitivity: float
    specificity: float
    positives: int
    negatives: int
    conservative: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OperatingPoint:
        """Rebuild from :meth:`to_dict`."""
        return cls(**values)


@dataclass(frozen=True)
class Reached:
    """What a rule reaches on rows that took no part in choosing it; NaN where a side has no row.

    Attributes:
        sensitivity: Share of the rows with the label that are called positive, undecided ones left out.
        specificity: Share of the rows without it that are called negative, undecided ones left out.
        ppv: Share of the rows called positive that have the label; it depends on how common the label is here.
        npv: Share of the rows called negative that do not have it; the same.
        undecided: Share of the labelled rows that get "cannot tell".
    """

    sensitivity: Interval
    specificity: Interval
    ppv: Interval
    npv: Interval
    undecided: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {name: value.to_dict() for name, value in vars(self).items()}


@dataclass(frozen=True)
class Band:
    """Below ``low`` negative, from ``high`` on positive, between them "cannot tell"; equal: always an answer."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise InputError(f"a band must go from low to high, got {self.low} to {self.high}")


@dataclass(frozen=True, eq=False)
class Decisions:
    """One answer a row.

    Attributes:
        codes: int8 (rows,): 1 positive, 0 negative, -1 cannot tell.
    """

    codes: NDArray[np.int8]

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The answers in words."""
        words: dict[int, Answer] = {1: "positive", 0: "negative", -1: "cannot tell"}
        return tuple(words[int(c)] for c in self.codes)

    @property
    def undecided(self) -> float:
        """Share of rows without an answer; NaN without rows."""
        return float((self.codes == -1).mean()) if len(self.codes) else math.nan

    def __len__(self) -> int:
        return len(self.codes)


def choose_threshold(
    scores: ArrayLike,
    truth: ArrayLike,
    *,
    sensitivity: float | None = None,
    specificity: float | None = None,
    conservative: bool = False,
    min_rows: int = 10,
) -> OperatingPoint:
    """Return the threshold that reaches a sensitivity (or a specificity) at the least cost of the other.

    Args:
        scores: (rows,) of validation rows, higher means more likely positive.
        truth: (rows,) 0, 1, or NaN/None, left out.
        sensitivity: Share of positives to find, in (0, 1]; the largest threshold that does so is taken.
        specificity: Share of negatives to leave alone, in (0, 1]; the smallest threshold that does so is taken.
        conservative: Let at most floor((1 - wanted) (n + 1)) - 1 of the n rows of that side be missed, so that a new row
            of that side is missed with a chance of at most 1 - wanted, if rows are exchangeable (one a patient).
        min_rows: Rows of that side below which it refuses.

    Raises:
        InputError: Unless exactly one aim is given, in its range; for too few rows, also for a conservative choice that
            they do not allow.
    """
    if (sensitivity is None) == (specificity is None):
        raise InputError("give either a sensitivity or a specificity to reach")
    aim: Aim = "sensitivity" if sensitivity is not None else "specificity"
    wanted = float(sensitivity if sensitivity is not None else specificity or 0.0)
    if not 0 < wanted <= 1:
        raise InputError(f"the {aim} must lie in (0, 1], got {wanted}", hint="write 0.95 for 95 %")
    labels, values = _checked(scores, truth)
    side = np.sort(values[labels == (1 if aim == "sensitivity" else 0)])
    if len(side) < max(min_rows, 1):
        raise InputError(
            f"a threshold for a stated {aim} needs {max(min_rows, 1)} rows of that side, got {len(side)}",
            hint="choose it on more validation rows",
        )
    missed = math.floor((1 - wanted) * (len(side) + conservative) + _ROUNDING) - conservative
    if missed < 0:
        raise InputError(
            f"{len(side)} rows cannot promise a {aim} of {wanted} on new rows",
            hint=f"at least {math.ceil(1 / (1 - wanted) - 1 - _ROUNDING)} are needed" if wanted < 1
            else "only `conservative=False` can ask for 1",
        )  # fmt: skip
    if aim == "sensitivity":
        threshold = float(side[min(missed, len(side) - 1)])
    else:
        # The smallest threshold above all rows that must stay negative.
        highest = side[max(len(side) - 1 - missed, 0)]
        above = values[values > highest]
        threshold = float(above.min()) if len(above) else float(np.nextafter(highest, np.inf))
    called = values >= threshold
    return OperatingPoint(
        threshold,
        aim,
        wanted,
        _share(called[labels == 1]),
        _share(~called[labels == 0]),
        int((labels == 1).sum()),
        int((labels == 0).sum()),
        conservative,
    )


def choose_band(
    scores: ArrayLike, truth: ArrayLike, *, sensitivity: float = 0.95, specificity: float = 0.95, **options: Any
) -> Band:
    """Return the band that rules out at a stated sensitivity and rules in at a stated specificity.

    Args:
        scores: As :func:`choose_threshold`.
        truth: As :func:`choose_threshold`.
        sensitivity: Of "not negative".
        specificity: Of "not positive".
        **options: ``conservative`` and ``min_rows`` of :func:`choose_threshold`.

    Returns:
        The band; without width, in the middle, where one threshold reaches both.

    Raises:
        InputError: As :func:`choose_threshold`.
    """
    low = choose_threshold(scores, truth, sensitivity=sensitivity, **options).threshold
    high = choose_threshold(scores, truth, specificity=specificity, **options).threshold
    return Band(low, high) if low <= high else Band((low + high) / 2, (low + high) / 2)


def decide(scores: ArrayLike, rule: OperatingPoint | Band | float) -> Decisions:
    """Return an answer for each row (rows,); a score that is NaN gets "cannot tell".

    Args:
        scores: (rows,) in the units in which the rule was chosen.
        rule: A threshold never abstains, a :class:`Band` does.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise InputError(f"scores must be one value a row, got shape {values.shape}")
    if isinstance(rule, OperatingPoint):
        rule = rule.threshold
    band = rule if isinstance(rule, Band) else Band(float(rule), float(rule))
    codes = np.where(values >= band.high, 1, np.where(values < band.low, 0, -1))
    return Decisions(codes.astype(np.int8))


def decide_by_sets(members: ArrayLike) -> Decisions:
    """Return an answer for each row from conformal sets of two classes: one class in the set decides, none or both do not.

    Args:
        members: booleans (rows, 2): whether "negative" and "positive" are in the set of each row
            (``members`` of :class:`chiasm.tasks.conformal.PredictionSets`).
    """
    sets = np.asarray(members, dtype=bool)
    if sets.ndim != 2 or sets.shape[1] != 2:
        raise InputError(f"sets of two classes must have shape (rows, 2), got {sets.shape}")
    return Decisions(np.where(sets.sum(axis=1) == 1, sets[:, 1], -1).astype(np.int8))


def reached(decisions: Decisions, truth: ArrayLike, groups: Groups, **options: Any) -> Reached:
    """Return what decisions reach on test rows, with intervals of whole patients.

    Args:
        decisions: Of :func:`decide` or :func:`decide_by_sets`.
        truth: (rows,) 0, 1, or NaN/None, left out.
        groups: Patient of each row.
        **options: ``method``, ``n_resamples``, ``seed``, ``level`` of :func:`chiasm.metrics.bootstrap.weighted_interval`.

    Raises:
        InputError: When lengths differ or nothing is labelled.
    """
    labels = as_binary(truth)
    names = list(groups)
    if not labels.shape == (len(decisions),) or len(names) != len(decisions):
        raise InputError(f"there are {len(decisions)} decisions, truth of shape {labels.shape} and {len(names)} groups")
    known = np.flatnonzero(~np.isnan(labels))
    if len(known) == 0:
        raise InputError("no row is labelled; there is nothing to compare the decisions with")
    labels, codes, patients = labels[known], decisions.codes[known], [names[i] for i in known]

    def share(good: NDArray[np.bool_], among: NDArray[np.bool_]) -> Interval:
        found = weighted_interval(mean_statistic(np.where(among, good, np.nan)), patients, **options)
        return Interval(found.value, found.low, found.high, int(among.sum()))

    decided = codes >= 0
    return Reached(
        share(codes == 1, decided & (labels == 1)),
        share(codes == 0, decided & (labels == 0)),
        share(labels == 1, codes == 1),
        share(labels == 0, codes == 0),
        share(~decided, np.ones(len(codes), dtype=bool)),
    )


def _checked(scores: ArrayLike, truth: ArrayLike) -> tuple[Floats, Floats]:
    labels = as_binary(truth)
    if labels.ndim != 1:
        raise InputError(f"truth must be one value a row, got shape {labels.shape}", hint="choose label by label")
    values = as_scores(scores, labels.shape)
    known = ~np.isnan(labels)
    return labels[known], values[known]


def _share(good: NDArray[np.bool_]) -> float:
    return float(good.mean()) if len(good) else math.nan
