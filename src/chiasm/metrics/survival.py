"""Times to an event, some of them censored: survival curves, their comparison, the baseline hazard of a Cox model.

Comes in: the time and the event flag of each patient (one row a patient). Goes out: curves with intervals, tests,
counts at risk. How well a risk orders the patients is in :mod:`chiasm.metrics.concordance`.

Conventions, the same in every function of this file and of its neighbours:

* ``event`` is True (1) where the event was SEEN, False (0) where the time is censored. Tables that store the opposite
  (``censorship`` of TCGA) must be turned round first: :func:`as_survival` cannot know.
* ``time`` is positive and in one unit throughout.
* A **risk** is higher for patients who do worse. A predicted time is the opposite of a risk.
* Events come before censorings at the same time: a patient censored at t was still at risk at t.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.types import Interval

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


def as_survival(time: ArrayLike, event: ArrayLike) -> tuple[Floats, Booleans]:
    """Return times and event flags as arrays of equal length.

    Args:
        time: (n,) positive.
        event: (n,) 1 or True where the event was seen, 0 or False where the time is censored.

    Raises:
        InputError: Other shapes or values; a flag that is neither 0 nor 1; nobody there.
    """
    times = np.asarray(time, dtype=np.float64)
    if times.ndim != 1 or not len(times):
        raise InputError(f"times must be a list of numbers, got shape {times.shape}")
    if not np.isfinite(times).all() or (times <= 0).any():
        wrong = int((~(np.isfinite(times) & (times > 0))).sum())
        raise InputError(
            f"{wrong} of {len(times)} times are missing, zero or negative; a follow-up must be longer than 0",
            hint="leave out patients without follow-up, or give half a day to those who died on day 0",
        )
    flags = np.asarray(event)
    if flags.shape != times.shape:
        raise InputError(f"there are event flags of shape {flags.shape} for times of shape {times.shape}")
    values = flags.astype(np.float64)
    if not ((values == 0) | (values == 1)).all():
        raise InputError(
            "event flags must be 0 (censored) or 1 (event seen)", hint="name the value that means the event"
        )
    return times, values == 1


def survival_target(time: ArrayLike, event: ArrayLike) -> NDArray[np.void]:
    """Return times and flags as the structured array that survival estimators take: fields ``event``, ``time``.

    It is what ``sksurv.util.Surv.from_arrays`` makes.

    Raises:
        InputError: As :func:`as_survival`.
    """
    times, events = as_survival(time, event)
    target = np.empty(len(times), dtype=[("event", np.bool_), ("time", np.float64)])
    target["event"], target["time"] = events, times
    return target


def from_target(target: NDArray[np.void]) -> tuple[Floats, Booleans]:
    """Return times and flags of a structured array: a field of booleans and one of numbers, whatever their names.

    Raises:
        InputError: Another array, or as :func:`as_survival`.
    """
    names = getattr(getattr(target, "dtype", None), "names", None)
    if names is None or len(names) != 2:
        raise InputError(
            "the target of a survival estimator is a structured array of an event flag and a time",
            hint="make it with `survival_target(time, event)`",
        )
    flag = names[0] if target.dtype[names[0]] == np.bool_ else names[1]
    time = target[names[1] if flag == names[0] else names[0]]
    return as_survival(np.ascontiguousarray(time), np.ascontiguousarray(target[flag]))


@dataclass(frozen=True, eq=False)
class KaplanMeier:
    """An estimated survival curve: a step function, right-continuous, 1 before the first event.

    Attributes:
        time: (k,) distinct times, ascending.
        survival: (k,) estimate S(t) from that time on.
        low: (k,) lower bound of the 95 % interval at each time alone (no band); NaN where it is not defined.
        high: (k,) upper bound.
        at_risk: (k,) patients whose time is this or later.
        events: (k,) events at this time.
        n: Patients.
    """

    time: Floats
    survival: Floats
    low: Floats
    high: Floats
    at_risk: NDArray[np.int64]
    events: NDArray[np.int64]
    n: int

    def at(self, times: ArrayLike) -> Floats:
        """Return S at the given times; beyond the last time the curve is not known: NaN, unless it has reached 0."""
        return self._step(self.survival, times, 1.0)

    def interval(self, time: float) -> Interval:
        """Return S at one time with its interval."""
        value, low, high = (float(self._step(v, [time], 1.0)[0]) for v in (self.survival, self.low, self.high))
        return Interval(value, low, high, self.n)

    @property
    def median(self) -> Interval:
        """The first time with S(t) ≤ 1/2, NaN where the curve does not get there; bounds by inverting the interval."""
        found = []
        for curve in (self.survival, self.low, self.high):
            known = np.nan_to_num(curve, nan=1.0)
            below = np.flatnonzero(known <= 0.5)
            found.append(float(self.time[below[0]]) if len(below) else math.nan)
        return Interval(found[0], found[1], found[2], self.n)

    def _step(self, values: Floats, times: ArrayLike, before: float) -> Floats:
        wanted = np.asarray(times, dtype=np.float64)
        place = np.searchsorted(self.time, wanted, side="right") - 1
        found = np.where(place < 0, before, values[np.maximum(place, 0)])
        ended = (wanted > self.time[-1]) & (self.survival[-1] > 0)
        result: Floats = np.where(ended, np.nan, found)
        return result


def kaplan_meier(time: ArrayLike, event: ArrayLike, *, level: float = 0.95) -> KaplanMeier:
    """Return the product-limit estimate with Greenwood's variance and log-log intervals.

    Args:
        time: (n,) positive.
        event: (n,) 1: seen, 0: censored.
        level: Coverage of the intervals, which hold for each time alone.

    Returns:
        The curve. Where S is 0 or 1 Greenwood's variance says nothing: bounds are 1 and 1 before the first event, NaN at 0.

    Raises:
        InputError: As :func:`as_survival`.

    References:
        Kaplan and Meier, 1958; log(−log S) interval: Kalbfleisch and Prentice, 1980. Equal to
        ``sksurv.nonparametric.kaplan_meier_estimator(conf_type="log-log")`` where S lies between 0 and 1.
    """
    times, events = as_survival(time, event)
    unique, died, at_risk = event_counts(times, events)
    survival = np.asarray(np.cumprod(1 - died / at_risk), dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.cumsum(died / (at_risk * np.maximum(at_risk - died, 0)))
        log = np.log(survival)
        width = NormalDist().inv_cdf((1 + level) / 2) * np.sqrt(variance) / np.abs(log)
        low, high = survival ** np.exp(width), survival ** np.exp(-width)
    low, high = (np.where(survival == 1, 1.0, np.where(survival == 0, np.nan, bound)) for bound in (low, high))
    return KaplanMeier(unique, survival, low, high, at_risk, died, len(times))


def event_counts(time: Floats, event: Booleans) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct times, the events at each and the patients at risk at each (time this or later)."""
    unique, place = np.unique(time, return_inverse=True)
    died = np.bincount(place, weights=event, minlength=len(unique)).astype(np.int64)
    left = np.bincount(place, minlength=len(unique))
    at_risk = (len(time) - np.concatenate([[0], np.cumsum(left)[:-1]])).astype(np.int64)
    return unique, died, at_risk


def numbers_at_risk(time: ArrayLike, at: ArrayLike) -> NDArray[np.int64]:
    """Return how many patients have a time of at least each of ``at``."""
    ordered = np.sort(np.asarray(time, dtype=np.float64))
    count: NDArray[np.int64] = len(ordered) - np.searchsorted(ordered, np.asarray(at, dtype=np.float64), side="left")
    return count


@dataclass(frozen=True)
class LogRank:
    """A log-rank test of equal hazards.

    Attributes:
        chi2: The statistic.
        df: Groups less 1.
        p_value: From the chi-squared law.
        observed: Group -> events.
        expected: Group -> events that equal hazards would give.
        strata: In how many parts expectations were formed.
    """

    chi2: float
    df: int
    p_value: float
    observed: dict[str, float]
    expected: dict[str, float]
    strata: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; NaN becomes None."""
        plain = {k: getattr(self, k) if math.isfinite(getattr(self, k)) else None for k in ("chi2", "p_value")}
        return {**plain, "df": self.df, "observed": self.observed, "expected": self.expected, "strata": self.strata}


def log_rank(
    time: ArrayLike,
    event: ArrayLike,
    group: Sequence[Hashable] | NDArray[Any],
    *,
    strata: Sequence[Hashable] | NDArray[Any] | None = None,
) -> LogRank:
    """Test whether groups have the same hazard.

    Args:
        time: (n,) positive.
        event: (n,) 1: seen, 0: censored.
        group: (n,) two groups or more; groups by a risk must come from out-of-fold risks, or the test is worthless.
        strata: (n,) Expectations are formed within each of these (folds, sites) and summed; None: one.

    Returns:
        The test; NaN where no time has an event with more than one group at risk.

    Raises:
        InputError: One group only, or lengths that differ.

    References:
        Mantel, 1966; with ties the hypergeometric variance. Equal to ``sksurv.compare.compare_survival``.
    """
    times, events = as_survival(time, event)
    names, place = np.unique(np.asarray([str(g) for g in group]), return_inverse=True)
    parts = np.zeros(len(times), dtype=np.intp)
    if strata is not None:
        parts = np.unique(np.asarray([str(s) for s in strata]), return_inverse=True)[1]
    if len(place) != len(times) or len(parts) != len(times):
        raise InputError(f"there are {len(place)} groups and {len(parts)} strata for {len(times)} times")
    if len(names) < 2:
        raise InputError("a log-rank test needs two groups, got one", hint="are all risks equal?")
    observed, expected = np.zeros(len(names)), np.zeros(len(names))
    covariance = np.zeros((len(names), len(names)))
    for part in np.unique(parts):
        rows = parts == part
        o, e, v = _log_rank_parts(times[rows], events[rows], place[rows], len(names))
        observed, expected, covariance = observed + o, expected + e, covariance + v
    excess, inner = (observed - expected)[:-1], covariance[:-1, :-1]
    chi2 = p_value = math.nan
    if np.trace(inner) > 0:
        from scipy.special import gammaincc

        chi2 = float(excess @ np.linalg.pinv(inner, hermitian=True) @ excess)
        p_value = float(gammaincc((len(names) - 1) / 2, chi2 / 2))
    return LogRank(
        chi2,
        len(names) - 1,
        p_value,
        {str(n): float(o) for n, o in zip(names, observed, strict=True)},
        {str(n): float(e) for n, e in zip(names, expected, strict=True)},
        int(parts.max()) + 1,
    )


def _log_rank_parts(
    time: Floats, event: Booleans, place: NDArray[np.intp], groups: int
) -> tuple[Floats, Floats, Floats]:
    unique = np.unique(time[event])
    observed, expected = np.zeros(groups), np.zeros(groups)
    covariance = np.zeros((groups, groups))
    if not len(unique):
        return observed, expected, covariance
    member = place[:, None] == np.arange(groups)
    at_risk = np.stack([numbers_at_risk(time[m], unique) for m in member.T], axis=1).astype(np.float64)
    died = np.zeros_like(at_risk)
    np.add.at(died, (np.searchsorted(unique, time[event]), place[event]), 1.0)
    n, d = at_risk.sum(1), died.sum(1)
    share = at_risk / n[:, None]
    factor = np.where(n > 1, d * (n - d) / np.maximum(n - 1, 1), 0.0)
    observed, expected = died.sum(0), (share * d[:, None]).sum(0)
    covariance = np.diag((factor[:, None] * share).sum(0)) - (share * factor[:, None]).T @ share
    return observed, expected, covariance


@dataclass(frozen=True, eq=False)
class BaselineHazard:
    """The cumulative baseline hazard of a proportional-hazards model.

    Attributes:
        time: (k,) distinct event times, ascending.
        cumulative: (k,) H0 from that time on; 0 before the first.
        longest: Longest follow-up of the patients it was estimated on: no prediction beyond.
    """

    time: Floats
    cumulative: Floats
    longest: float

    def survival(self, log_risk: ArrayLike, times: ArrayLike) -> Floats:
        """Return S(t | risk) = exp(−H0(t) exp(risk)), shape (patients, times).

        Raises:
            InputError: A time beyond the follow-up of training.
        """
        wanted = np.atleast_1d(np.asarray(times, dtype=np.float64))
        check_within(wanted, self.longest)
        place = np.searchsorted(self.time, wanted, side="right")
        hazard = np.concatenate([[0.0], self.cumulative])[place]
        with np.errstate(over="ignore"):
            survival: Floats = np.exp(-hazard[None, :] * np.exp(np.asarray(log_risk, dtype=np.float64))[:, None])
        return np.where(hazard[None, :] == 0, 1.0, survival)


def breslow_baseline(time: ArrayLike, event: ArrayLike, log_risk: ArrayLike) -> BaselineHazard:
    """Return Breslow's estimate of the cumulative baseline hazard of a Cox model.

    Args:
        time: (n,) positive.
        event: (n,) 1: seen, 0: censored.
        log_risk: (n,) linear predictor of the fitted model.

    Raises:
        InputError: No event, or risks that are not finite.

    References:
        Breslow, 1972 (discussion of Cox): H0(t) = sum over events up to t of 1 / sum of exp(risk) at risk.
    """
    times, events = as_survival(time, event)
    risk = np.asarray(log_risk, dtype=np.float64)
    if risk.shape != times.shape or not np.isfinite(risk).all():
        raise InputError(f"risks must be {len(times)} finite numbers, got shape {risk.shape}")
    if not events.any():
        raise InputError("a baseline hazard needs an event, and all times are censored")
    shift = float(risk.max())
    order = np.argsort(-times, kind="stable")
    summed = np.cumsum(np.exp(risk[order] - shift))
    unique = np.unique(times[events])
    at_risk = summed[np.searchsorted(-times[order], -unique, side="right") - 1]
    died = np.bincount(np.searchsorted(unique, times[events]), minlength=len(unique))
    return BaselineHazard(unique, np.cumsum(died / at_risk) * math.exp(-shift), float(times.max()))


def check_within(times: Floats, longest: float) -> None:
    """Raise ``InputError`` where a time lies beyond the follow-up that a prediction can rest on."""
    if (times > longest).any() or not np.isfinite(times).all():
        raise InputError(
            f"survival at {float(np.max(times)):g} was asked for, but training saw no patient beyond {longest:g}",
            hint="ask for earlier times, in the unit of the training times",
        )
