"""How well predictions order and date events when some times are censored: C-index, AUC at a time, Brier score.

Comes in: time and event flag of each patient, a risk (higher is worse) or survival probabilities. Goes out: numbers with
bootstrap intervals over patients. Conventions: :mod:`chiasm.metrics.survival`.

Choices that change numbers:

* **Pairs** are comparable when the earlier of the two times is an event; at equal times only an event with a censoring.
  Risks within 1e-8 of each other count one half (as in scikit-survival).
* **Strata**: pairs are formed only within a stratum. Risks of cross-validation come from one model a fold, and their
  levels differ by more than their order: comparing across folds pulls a worthless model below 0.5.
* **Weights** of Uno's C, of the AUC and of the Brier score are inverse probabilities of staying uncensored. The
  censoring curve G is estimated on the patients that are scored, in every resample anew, unless ``reference`` gives
  others (the training patients, as scikit-survival does).
* **Truncation**: with ``tau`` only events before tau begin a pair. Late times have weights without bound, so
  :func:`usable_tau` proposes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Comparison, WeightStatistic, paired_difference, weighted_interval
from chiasm.metrics.survival import Booleans, Floats, as_survival, check_within, kaplan_meier
from chiasm.types import Interval

Strata = Sequence[Hashable] | NDArray[Any] | None
Reference = tuple[ArrayLike, ArrayLike] | None

#: Risks nearer than this are tied.
TIED = 1e-8
#: Share of patients that must still be under observation at the default tau.
LEAST_AT_RISK = 0.1


def usable_tau(time: ArrayLike, event: ArrayLike) -> float:
    """Return the latest event time at which a tenth of the patients is still under observation.

    Raises:
        InputError: No event.
    """
    times, events = as_survival(time, event)
    if not events.any():
        raise InputError("all times are censored: there is nothing to order", hint="is the event flag turned round?")
    limit = np.quantile(times, 1 - LEAST_AT_RISK)
    early = times[events & (times <= limit)]
    return float(early.max()) if len(early) else float(times[events].min())


def harrell_statistic(time: ArrayLike, event: ArrayLike, risk: ArrayLike, *, strata: Strata = None) -> WeightStatistic:
    """Return Harrell's C as a function of row weights; see :func:`harrell_c`."""
    times, events, risks, parts = _prepared(time, event, risk, strata)
    return _pair_statistic(times, events, events, risks, parts)


def uno_statistic(
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    *,
    tau: float | None = None,
    strata: Strata = None,
    reference: Reference = None,
) -> WeightStatistic:
    """Return Uno's C as a function of row weights; see :func:`uno_c`."""
    times, events, risks, parts = _prepared(time, event, risk, strata)
    counted = events if tau is None else events & (times < tau)
    if not counted.any():
        raise InputError(f"no event lies before tau = {tau}", hint="give a later tau, in the unit of the times")
    censoring = _censoring(times, events, reference)
    first = np.flatnonzero(counted)

    def squared(weights: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            factor: Floats = 1 / censoring(weights, times[first]) ** 2
        return factor

    return _pair_statistic(times, events, counted, risks, parts, squared)


def auc_statistic(
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    at: float,
    *,
    strata: Strata = None,
    reference: Reference = None,
) -> WeightStatistic:
    """Return the cumulative/dynamic AUC at one time as a function of row weights; see :func:`auc_at`."""
    times, events, risks, parts = _prepared(time, event, risk, strata)
    cases = np.flatnonzero(events & (times <= at))
    controls = np.flatnonzero(times > at)
    censoring = _censoring(times, events, reference)
    same = (parts[cases, None] == parts[None, controls]).astype(np.float64)
    right = same * _better(risks[cases, None], risks[None, controls])

    def statistic(weights: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            heavy = np.where(weights[:, cases] == 0, 0.0, weights[:, cases] / censoring(weights, times[cases]))
        rest = weights[:, controls]
        return _ratio((heavy * (rest @ right.T)).sum(1), (heavy * (rest @ same.T)).sum(1))

    return statistic


def brier_statistic(
    time: ArrayLike, event: ArrayLike, survival: ArrayLike, at: ArrayLike, *, reference: Reference = None
) -> Callable[[Floats], Floats]:
    """Return the Brier score at several times as a function of weights: (resamples, n) -> (resamples, times)."""
    times, events = as_survival(time, event)
    wanted = np.atleast_1d(np.asarray(at, dtype=np.float64))
    predicted = np.asarray(survival, dtype=np.float64)
    if predicted.shape != (len(times), len(wanted)):
        raise InputError(
            f"survival must have shape (patients, times) = {(len(times), len(wanted))}, got {predicted.shape}"
        )
    if not np.isfinite(predicted).all() or (predicted < 0).any() or (predicted > 1).any():
        raise InputError("survival must be probabilities in [0, 1]", hint="a risk is no probability")
    check_within(wanted, float(times.max()))
    censoring = _censoring(times, events, reference)

    def statistic(weights: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            own = 1 / censoring(weights, times)
            here = 1 / censoring(weights, wanted)
        own, here = (np.where(np.isfinite(v), v, 0.0) for v in (own, here))
        total = weights.sum(1)
        found = []
        for k, t in enumerate(wanted):
            case = (events & (times <= t)) * predicted[:, k] ** 2
            control = (times > t) * (1 - predicted[:, k]) ** 2
            summed = (weights * own * case).sum(1) + (weights * control).sum(1) * here[:, k]
            found.append(_ratio(summed, total))
        return np.stack(found, axis=1)

    return statistic


def integrated_brier_statistic(
    time: ArrayLike, event: ArrayLike, survival: ArrayLike, at: ArrayLike, *, reference: Reference = None
) -> WeightStatistic:
    """Return the integrated Brier score as a function of row weights; see :func:`integrated_brier`."""
    wanted = np.asarray(at, dtype=np.float64)
    if wanted.ndim != 1 or len(wanted) < 2 or (np.diff(wanted) <= 0).any():
        raise InputError("an integrated Brier score needs two ascending times at least")
    at_times = brier_statistic(time, event, survival, wanted, reference=reference)

    def statistic(weights: Floats) -> Floats:
        result: Floats = np.trapezoid(at_times(weights), wanted, axis=1) / (wanted[-1] - wanted[0])
        return result

    return statistic


def harrell_c(
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    *,
    groups: Sequence[Hashable] | NDArray[Any] | None = None,
    strata: Strata = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return Harrell's concordance index with its interval over patients.

    Args:
        time: (n,) positive.
        event: (n,) 1: seen, 0: censored.
        risk: (n,) higher is worse. A predicted survival time must be negated first.
        groups: (n,) the patient of each row; None: one patient a row.
        strata: (n,) pairs are formed within these only (folds).
        n_resamples: Bootstrap resamples of patients; with repeats, two copies of a patient form no pair.
        seed: Of the draws.

    Returns:
        The share of comparable pairs in which the patient with the earlier event has the higher risk; chance 0.5. It
        depends on the censoring of this study (late pairs are missing); Uno's C less so.

    Raises:
        InputError: No comparable pair, risks that are not finite, or other shapes.

    References:
        Harrell et al., 1996, https://doi.org/10.1002/(SICI)1097-0258(19960229)15:4<361::AID-SIM168>3.0.CO;2-4. Equal to
        ``sksurv.metrics.concordance_index_censored`` (one stratum). Memory grows with events × patients.
    """
    statistic = harrell_statistic(time, event, risk, strata=strata)
    return _with_interval(statistic, np.size(time), groups, n_resamples, seed, 0.5, "no two patients can be compared")


def uno_c(
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    *,
    tau: float | None = None,
    groups: Sequence[Hashable] | NDArray[Any] | None = None,
    strata: Strata = None,
    reference: Reference = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return Uno's concordance index, weighted against the censoring of this study.

    Args:
        time: (n,) positive.
        event: (n,) 1: seen, 0: censored.
        risk: (n,) higher is worse.
        tau: Only events before it begin a pair; None: all of them (:func:`usable_tau` is steadier).
        groups: As :func:`harrell_c`.
        strata: As :func:`harrell_c`.
        reference: Time and event flag of other patients for the censoring curve; None: these, in each resample anew.
        n_resamples: As :func:`harrell_c`.
        seed: As :func:`harrell_c`.

    Raises:
        InputError: As :func:`harrell_c`; an event at a time at which nobody stays uncensored, or beyond the follow-up
            of ``reference``.

    References:
        Uno et al., 2011, https://doi.org/10.1002/sim.4154. Equal to ``sksurv.metrics.concordance_index_ipcw``.
        Deviation from the paper, as there: the weight is 1/G(t)², not 1/G(t−)².
    """
    statistic = uno_statistic(time, event, risk, tau=tau, strata=strata, reference=reference)
    return _with_interval(
        statistic,
        np.size(time),
        groups,
        n_resamples,
        seed,
        0.5,
        "nobody stays uncensored until the last event, so its weight has no bound",
        "give tau, see `usable_tau`",
    )


def auc_at(
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    at: float,
    *,
    groups: Sequence[Hashable] | NDArray[Any] | None = None,
    strata: Strata = None,
    reference: Reference = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return the AUC of telling those with an event up to a time from those without one until then.

    Args:
        time: (n,) positive.
        event: (n,) 1: seen, 0: censored.
        risk: (n,) higher is worse.
        at: The time; patients censored before it are neither case nor control, cases are weighted by 1/G.
        groups: As :func:`harrell_c`.
        strata: As :func:`harrell_c`.
        reference: As :func:`uno_c`.
        n_resamples: As :func:`harrell_c`.
        seed: As :func:`harrell_c`.

    Raises:
        InputError: No case or no control at this time.

    References:
        Uno et al., 2007; Hung and Chiang, 2010. Equal to ``sksurv.metrics.cumulative_dynamic_auc``.
    """
    statistic = auc_statistic(time, event, risk, at, strata=strata, reference=reference)
    return _with_interval(
        statistic,
        np.size(time),
        groups,
        n_resamples,
        seed,
        0.5,
        f"at time {at:g} there are not both patients with an event before and patients under observation after",
        "ask for a time within the follow-up, in the unit of the times",
    )


def integrated_brier(
    time: ArrayLike,
    event: ArrayLike,
    survival: ArrayLike,
    at: ArrayLike,
    *,
    groups: Sequence[Hashable] | NDArray[Any] | None = None,
    reference: Reference = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return the integrated Brier score with its interval; lower is better, 0.25 is what "one half" always reaches.

    Args:
        time: (n,) positive.
        event: (n,) 1: seen, 0: censored.
        survival: (n, times) probability of no event until each of ``at``.
        at: Two ascending times at least, within the follow-up; the integral is divided by their range.
        groups: As :func:`harrell_c`.
        reference: As :func:`uno_c`.
        n_resamples: As :func:`harrell_c`.
        seed: As :func:`harrell_c`.

    Raises:
        InputError: Other shapes, values that are no probabilities, times beyond the follow-up.

    References:
        Graf et al., 1999. Equal to ``sksurv.metrics.integrated_brier_score``.
    """
    statistic = integrated_brier_statistic(time, event, survival, at, reference=reference)
    return _with_interval(statistic, np.size(time), groups, n_resamples, seed, None, "the score is not defined")


def compare_statistics(
    first: WeightStatistic, second: WeightStatistic, n: int, *, n_resamples: int = 1000, seed: int = 0
) -> Comparison:
    """Return the difference of two statistics on the same patients, one row a patient, with interval and p value."""
    return paired_difference(first, second, np.arange(n), n_resamples=n_resamples, seed=seed)


def mean_auc(time: ArrayLike, event: ArrayLike, at: ArrayLike, auc: ArrayLike) -> float:
    """Return the mean of AUCs at several times, weighted by the share of events between them.

    References:
        ``sksurv.metrics.cumulative_dynamic_auc``: sum of AUC × drop of the Kaplan–Meier curve, over its whole drop.
    """
    drop = -np.diff(np.concatenate([[1.0], kaplan_meier(time, event).at(at)]))
    return float((np.asarray(auc, dtype=np.float64) * drop).sum() / drop.sum()) if drop.sum() > 0 else math.nan


def _with_interval(
    statistic: WeightStatistic,
    n: int,
    groups: Sequence[Hashable] | NDArray[Any] | None,
    n_resamples: int,
    seed: int,
    chance: float | None,
    undefined: str,
    hint: str | None = None,
) -> Interval:
    if not math.isfinite(float(statistic(np.ones((1, n)))[0])):
        raise InputError(undefined, hint=hint or "are there events, and is the event flag the right way round?")
    of_row = np.arange(n) if groups is None else groups
    return weighted_interval(statistic, of_row, n_resamples=n_resamples, seed=seed, chance=chance)


def _prepared(
    time: ArrayLike, event: ArrayLike, risk: ArrayLike, strata: Strata
) -> tuple[Floats, Booleans, Floats, NDArray[np.intp]]:
    times, events = as_survival(time, event)
    risks = np.asarray(risk, dtype=np.float64)
    if risks.shape != times.shape or not np.isfinite(risks).all():
        raise InputError(f"risks must be {len(times)} finite numbers, got shape {risks.shape}")
    parts = np.zeros(len(times), dtype=np.intp)
    if strata is not None:
        parts = np.unique(np.asarray([str(s) for s in strata]), return_inverse=True)[1]
        if len(parts) != len(times):
            raise InputError(f"there are {len(parts)} strata for {len(times)} times")
    return times, events, risks, parts


def _better(first: Floats, second: Floats) -> Floats:
    """Return 1 where the first risk is higher, one half where they are tied, else 0."""
    result: Floats = np.where(np.abs(first - second) <= TIED, 0.5, (first > second).astype(np.float64))
    return result


def _pair_statistic(
    times: Floats,
    events: Booleans,
    counted: Booleans,
    risks: Floats,
    parts: NDArray[np.intp],
    factor: Callable[[Floats], Floats] | None = None,
) -> WeightStatistic:
    """Return concordance over the pairs that begin with a counted event, each event weighted by ``factor``."""
    first = np.flatnonzero(counted)
    later = (times[None, :] > times[first, None]) | ((times[None, :] == times[first, None]) & ~events[None, :])
    pairs = (later & (parts[None, :] == parts[first, None])).astype(np.float64)
    right = pairs * _better(risks[first, None], risks[None, :])

    def statistic(weights: Floats) -> Floats:
        heavy = weights[:, first]
        if factor is not None:
            with np.errstate(invalid="ignore"):  # a weight of 0 times one without bound
                heavy = np.where(heavy == 0, 0.0, heavy * factor(weights))
        return _ratio((heavy * (weights @ right.T)).sum(1), (heavy * (weights @ pairs.T)).sum(1))

    return statistic


def _ratio(above: Floats, below: Floats) -> Floats:
    """Return the quotient, NaN where the divisor is 0 or something is not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = above / below
    result: Floats = np.where((below > 0) & np.isfinite(found), found, np.nan)
    return result


def _censoring(times: Floats, events: Booleans, reference: Reference) -> Callable[[Floats, Floats], Floats]:
    """Return G(t), the probability of staying uncensored: a function of weights (resamples, n) and times (k,)."""
    if reference is not None:
        fixed_times, fixed_events = as_survival(*reference)
        curve = _CensoringCurve(fixed_times, fixed_events)
        ones = np.ones((1, len(fixed_times)))

        def fixed(_: Floats, at: Floats) -> Floats:
            if len(at) and at.max() > fixed_times.max():
                raise InputError(
                    f"times up to {at.max():g} are to be scored, but the reference was followed up to {fixed_times.max():g}",
                    hint="give tau or earlier times, in the unit of the reference",
                )
            return curve(ones, at)

        return fixed
    return _CensoringCurve(times, events)


class _CensoringCurve:
    """Kaplan–Meier of the censoring, for many weightings at once; events come before censorings of the same time."""

    def __init__(self, times: Floats, events: Booleans) -> None:
        self.order = np.argsort(times, kind="stable")
        self.unique, self.starts = np.unique(times[self.order], return_index=True)
        self.events = events[self.order].astype(np.float64)

    def __call__(self, weights: Floats, at: Floats) -> Floats:
        ordered = weights[:, self.order]
        all_here = np.add.reduceat(ordered, self.starts, axis=1)
        died = np.add.reduceat(ordered * self.events, self.starts, axis=1)
        at_risk = all_here[:, ::-1].cumsum(1)[:, ::-1] - died
        censored = all_here - died
        stay = 1 - np.divide(censored, at_risk, out=np.zeros_like(censored), where=at_risk > 0)
        survival = np.concatenate([np.ones((len(weights), 1)), np.cumprod(stay, axis=1)], axis=1)
        found: Floats = survival[:, np.searchsorted(self.unique, at, side="right")]
        return found
