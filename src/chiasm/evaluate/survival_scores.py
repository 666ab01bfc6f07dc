"""Survival data to scores: every feature set by the same nested protocol, beside the baselines, on the same patients.

Comes in: one :class:`~chiasm.tasks.survival.SurvivalData` a feature set (image, clinical, both) over the same patients and
a function that makes an estimator. Goes out: :class:`SurvivalScores`, what the page and the JSON say.

Notable choices: the first feature set is the one that is asked about; all others, and the Kaplan–Meier curve for
everybody, are what it must beat. Differences are paired by patient and corrected by Holm. The C-index compares patients
within an outer fold only; the log-rank test of risk groups is stratified by fold for the same reason. Even so, risks of a
fold come from models that share training patients: read its p value as a description, and the interval of the C-index as
the test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Comparison, holm
from chiasm.metrics.concordance import (
    auc_at,
    compare_statistics,
    harrell_c,
    harrell_statistic,
    integrated_brier,
    integrated_brier_statistic,
    mean_auc,
    uno_c,
    usable_tau,
)
from chiasm.metrics.survival import Floats, KaplanMeier, LogRank, kaplan_meier, log_rank, numbers_at_risk
from chiasm.progress import Progress
from chiasm.tasks.survival import OutOfFold, SurvivalData, SurvivalEstimator, cross_validated_risks, few_events
from chiasm.tasks.survival_models import NoFeatures
from chiasm.types import Interval

#: Name of the baseline that looks at nothing.
NOTHING = "no features"
#: Times at which the AUC and the Brier score are computed.
GRID = 8


@dataclass(frozen=True)
class ModelScore:
    """What one feature set reaches, out of fold.

    Attributes:
        columns: Features of a patient.
        harrell: Harrell's C within folds.
        uno: Uno's C within folds, up to tau.
        auc: At each time of the grid; empty for the baseline.
        mean_auc: Their mean, weighted by events.
        brier: Integrated Brier score over the grid; lower is better.
        chosen: What each fold's model chose.
    """

    columns: int
    harrell: Interval
    uno: Interval
    auc: tuple[Interval, ...]
    mean_auc: float
    brier: Interval
    chosen: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "columns": self.columns,
            "harrell": self.harrell.to_dict(),
            "uno": self.uno.to_dict(),
            "auc": [a.to_dict() for a in self.auc],
            "mean_auc": self.mean_auc if math.isfinite(self.mean_auc) else None,
            "integrated_brier": self.brier.to_dict(),
            "chosen": [dict(c) for c in self.chosen],
        }


@dataclass(frozen=True, eq=False)
class RiskGroup:
    """Patients of one risk group, by quantiles of training risks.

    Attributes:
        name: ``low risk`` … ``high risk``.
        curve: Their Kaplan–Meier estimate.
        at_risk: Patients under observation at each tick.
        events: Events among them.
    """

    name: str
    curve: KaplanMeier
    at_risk: tuple[int, ...]
    events: int


@dataclass(frozen=True)
class CalibrationPoint:
    """Patients with alike predictions: the mean predicted probability of the event until the horizon, and what came."""

    predicted: float
    observed: Interval


@dataclass(frozen=True, eq=False)
class SurvivalScores:
    """All numbers of one run.

    Attributes:
        method: Estimator.
        unit: Of all times.
        patients: Patients with an outcome.
        rows: Rows (images, texts) that were aggregated.
        events: Events seen.
        follow_up: Median follow-up by the reverse Kaplan–Meier estimate.
        tau: Where Uno's C is cut off.
        grid: Times of AUC and Brier score.
        models: Feature set -> score; the first is the one asked about, the last is :data:`NOTHING`.
        gains: Other feature set -> first less other, Harrell's C; ``p_value`` corrected by Holm.
        brier_gain: Integrated Brier score of the first less that of :data:`NOTHING`; negative is better.
        ticks: Times of the numbers at risk.
        end: Where drawn curves end: 5 % of the patients are still under observation.
        groups: Risk groups of the first feature set, from low to high.
        separation: Log-rank test between them, stratified by fold; None where there is one group only.
        horizon: Of the calibration.
        calibration: Points from low to high predicted probability.
        warnings: What a reader must know first.
        folds: Outer folds.
        first: The predictions of the first feature set.
    """

    method: str
    unit: str
    patients: int
    rows: int
    events: int
    follow_up: Interval
    tau: float
    grid: tuple[float, ...]
    models: Mapping[str, ModelScore]
    gains: Mapping[str, Comparison]
    brier_gain: Comparison
    ticks: tuple[float, ...]
    end: float
    groups: tuple[RiskGroup, ...]
    separation: LogRank | None
    horizon: float
    calibration: tuple[CalibrationPoint, ...]
    warnings: tuple[str, ...]
    folds: int
    first: OutOfFold

    @property
    def name(self) -> str:
        """The feature set that is asked about."""
        return next(iter(self.models))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but curves and predictions of single patients as plain JSON values."""
        plain = ("method", "unit", "patients", "rows", "events", "tau", "horizon", "folds")
        return {
            **{key: getattr(self, key) for key in plain},
            "follow_up": self.follow_up.to_dict(),
            "grid": list(self.grid),
            "models": {name: score.to_dict() for name, score in self.models.items()},
            "gains": {name: comparison_to_dict(c) for name, c in self.gains.items()},
            "brier_gain": comparison_to_dict(self.brier_gain),
            "risk_groups": [
                {"name": g.name, "patients": g.curve.n, "events": g.events, "median": g.curve.median.to_dict()}
                for g in self.groups
            ],
            "log_rank": None if self.separation is None else self.separation.to_dict(),
            "calibration": [{"predicted": p.predicted, "observed": p.observed.to_dict()} for p in self.calibration],
            "warnings": list(self.warnings),
        }


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """Return a difference and its p value as plain JSON values."""
    p = comparison.p_value
    return {"difference": comparison.difference.to_dict(), "p": p if math.isfinite(p) else None}


def score_survival(
    sets: Mapping[str, SurvivalData],
    make: Callable[[SurvivalData], SurvivalEstimator],
    *,
    method: str,
    unit: str,
    folds: int = 5,
    groups: int = 2,
    horizon: float | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    warnings: Sequence[str] = (),
    progress: Progress | None = None,
) -> SurvivalScores:
    """Run nested cross-validation on every feature set and score it.

    Args:
        sets: Name -> data; the first is the one asked about. Same patients and outcomes in all.
        make: Data -> unfitted estimator (it may look at ``free`` and the number of columns, never at outcomes).
        method: Name of the estimator.
        unit: Of the times: ``days`` or ``months``.
        folds: Outer folds by patient.
        groups: Risk groups.
        horizon: Of the calibration; None: the median time of events.
        n_resamples: Bootstrap resamples.
        seed: Of folds and resamples.
        warnings: Said before those that arise here.
        progress: Told of each fold.

    Raises:
        InputError: The sets are of different patients, or too few events for the folds.
    """
    if not sets:
        raise InputError("there is no feature set to score")
    data = next(iter(sets.values()))
    for other in sets.values():
        same = np.array_equal(other.time, data.time) and np.array_equal(other.event, data.event)
        if other.patients != data.patients or not same:
            raise InputError("feature sets must be of the same patients with the same outcomes")
    tau = usable_tau(data.time, data.event)
    grid = _grid(data, tau)
    at = float(np.median(data.time[data.event])) if horizon is None else horizon
    times = np.append(grid, at)
    settings: dict[str, Any] = {"folds": folds, "times": times, "groups": groups, "seed": seed}
    found: dict[str, OutOfFold] = {
        name: cross_validated_risks(make(one), one, **settings, progress=progress) for name, one in sets.items()
    }
    found[NOTHING] = cross_validated_risks(NoFeatures(), data, **settings)
    models = {
        name: _score(data, sets[name].features.shape[1] if name in sets else 0, o, grid, tau, n_resamples, seed)
        for name, o in found.items()
    }
    main = next(iter(found.values()))
    end = float(np.quantile(data.time, 0.95))
    ticks = _ticks(end)
    return SurvivalScores(
        method=method,
        unit=unit,
        patients=len(data),
        rows=data.rows,
        events=data.events,
        follow_up=kaplan_meier(data.time, ~data.event).median,
        tau=tau,
        grid=tuple(float(t) for t in grid),
        models=models,
        gains=_gains(data, found, n_resamples, seed),
        brier_gain=compare_statistics(
            integrated_brier_statistic(data.time, data.event, main.survival[:, :-1], grid),
            integrated_brier_statistic(data.time, data.event, found[NOTHING].survival[:, :-1], grid),
            len(data),
            n_resamples=n_resamples,
            seed=seed,
        ),
        ticks=ticks,
        end=end,
        groups=_risk_groups(data, main.group, ticks, groups),
        separation=log_rank(data.time, data.event, main.group, strata=main.fold) if np.ptp(main.group) else None,
        horizon=at,
        calibration=_calibration(data, main.survival[:, -1], at),
        warnings=(*warnings, *few_events(data)),
        folds=folds,
        first=main,
    )


def _grid(data: SurvivalData, tau: float) -> Floats:
    """Return times from the first tenth of the events to tau."""
    early = float(np.quantile(data.time[data.event], 0.1))
    late = min(tau, float(np.quantile(data.time, 0.9)))
    if late <= early:
        raise InputError(
            f"events lie too close together to score predictions over time ({data.events} events)",
            hint="a longer follow-up is needed",
        )
    return np.linspace(early, late, GRID)


def _score(
    data: SurvivalData, columns: int, out: OutOfFold, grid: Floats, tau: float, n_resamples: int, seed: int
) -> ModelScore:
    settings: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    t, e = data.time, data.event
    # tau counts events before it; the next number after tau keeps the event at tau.
    until = float(np.nextafter(tau, np.inf))
    auc = tuple(auc_at(t, e, out.risk, float(x), strata=out.fold, **settings) for x in grid)
    return ModelScore(
        columns=columns,
        harrell=harrell_c(t, e, out.risk, strata=out.fold, **settings),
        uno=uno_c(t, e, out.risk, tau=until, strata=out.fold, **settings),
        auc=auc,
        mean_auc=mean_auc(t, e, grid, [a.value for a in auc]),
        brier=integrated_brier(t, e, out.survival[:, :-1], grid, **settings),
        chosen=out.chosen,
    )


def _gains(data: SurvivalData, found: Mapping[str, OutOfFold], n_resamples: int, seed: int) -> dict[str, Comparison]:
    statistics = {name: harrell_statistic(data.time, data.event, o.risk, strata=o.fold) for name, o in found.items()}
    first, *others = statistics
    raw = {
        name: compare_statistics(statistics[first], statistics[name], len(data), n_resamples=n_resamples, seed=seed)
        for name in others
    }
    corrected = holm([c.p_value for c in raw.values()])
    return {name: dataclasses.replace(c, p_value=float(p)) for (name, c), p in zip(raw.items(), corrected, strict=True)}


def _ticks(longest: float) -> tuple[float, ...]:
    """Return five or six round times from 0 to the end."""
    step = 10.0 ** math.floor(math.log10(longest))
    for factor in (0.2, 0.25, 0.5, 1.0, 2.0):
        if longest / (step * factor) <= 6:
            step *= factor
            break
    return tuple(float(step * k) for k in range(int(longest / step) + 1))


def _risk_groups(
    data: SurvivalData, group: NDArray[np.int64], ticks: Sequence[float], groups: int
) -> tuple[RiskGroup, ...]:
    names = {2: ("low risk", "high risk"), 3: ("low risk", "middle risk", "high risk")}.get(
        groups, tuple(f"risk {k + 1} of {groups}" for k in range(groups))
    )
    found = []
    for k, name in enumerate(names):
        rows = group == k
        if rows.any():
            curve = kaplan_meier(data.time[rows], data.event[rows])
            at_risk = tuple(int(c) for c in numbers_at_risk(data.time[rows], ticks))
            found.append(RiskGroup(name, curve, at_risk, int(data.event[rows].sum())))
    return tuple(found)


def _calibration(data: SurvivalData, survival: Floats, horizon: float) -> tuple[CalibrationPoint, ...]:
    """Return predicted and observed probabilities of the event, in up to five groups of alike predictions."""
    predicted = 1 - survival
    parts = int(min(5, max(2, data.events // 20)))
    edges = np.unique(np.quantile(predicted, np.arange(1, parts) / parts))
    place = np.searchsorted(edges, predicted, side="left")
    points = []
    for k in np.unique(place):
        rows = place == k
        curve = kaplan_meier(data.time[rows], data.event[rows])
        seen = curve.interval(horizon)
        observed = Interval(1 - seen.value, 1 - seen.high, 1 - seen.low, int(rows.sum()))
        points.append(CalibrationPoint(float(predicted[rows].mean()), observed))
    return tuple(points)
