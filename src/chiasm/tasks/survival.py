"""Survival of patients from their embeddings: rows to patients, nested cross-validation, risks that saw no outcome.

Comes in: vectors of images, texts or both, clinical columns, and a time with an event flag of each row. Goes out: one row
a patient (:class:`SurvivalData`), and out-of-fold risks and survival probabilities (:class:`OutOfFold`).

The protocol: outer folds by patient, stratified by event; each fold's model is fitted, and everything about it chosen,
on the other folds' patients alone (inner cross-validation inside the estimator); risks of different folds are compared
within a fold only. Several rows of a patient are one observation: their vectors are averaged and their outcome must agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.metrics.labels import is_missing
from chiasm.metrics.survival import Booleans, Floats, as_survival, check_within, survival_target
from chiasm.progress import Progress, SilentProgress
from chiasm.tasks.survival_models import stratified_folds

Pooling = Literal["mean", "max"]
#: Days in a year and in a month, for units.
DAYS = {"days": 1.0, "months": 365.25 / 12, "years": 365.25}
#: Nobody is followed longer than this; a longest time beyond it means a wrong unit.
LONGEST_YEARS = 90.0
#: Words of a column's name that mean 1 = censored.
CENSORING_WORDS = ("censor",)


class SurvivalEstimator(Protocol):
    """What nested cross-validation needs of a model."""

    def fit(self, features: ArrayLike, target: NDArray[np.void]) -> Self:
        """Fit on training patients, choosing whatever is to be chosen."""

    def predict(self, features: ArrayLike) -> Floats:
        """Return a risk for each patient, higher is worse."""

    def predict_survival(self, features: ArrayLike, times: ArrayLike) -> Floats:
        """Return the probability of no event until each time, (patients, times)."""


@dataclass(frozen=True, eq=False)
class SurvivalData:
    """One row a patient, sorted by patient.

    Attributes:
        features: (n, p) float64; NaN is missing.
        time: (n,) positive, in one unit.
        event: (n,) True where the event was seen.
        patients: (n,) names.
        names: (p,) of the columns, or empty.
        free: Columns that a model must not rotate or penalise: clinical ones.
        rows: Rows before the aggregation.
    """

    features: Floats
    time: Floats
    event: Booleans
    patients: tuple[str, ...]
    names: tuple[str, ...] = ()
    free: tuple[int, ...] = ()
    rows: int = 0

    def __len__(self) -> int:
        return len(self.time)

    @property
    def events(self) -> int:
        """Patients whose event was seen."""
        return int(self.event.sum())

    def select(self, columns: Sequence[int]) -> SurvivalData:
        """Return the same patients with some of the columns."""
        kept = list(columns)
        return dataclasses.replace(
            self,
            features=self.features[:, kept],
            names=tuple(self.names[c] for c in kept) if self.names else (),
            free=tuple(k for k, c in enumerate(kept) if c in self.free),
        )


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """Predictions for patients that the model had not seen.

    Attributes:
        risk: (n,) higher is worse; comparable within a fold only.
        fold: (n,) which model made it.
        times: (k,) where survival was predicted.
        survival: (n, k) probability of no event until each time.
        group: (n,) 0 … groups − 1 by quantiles of the risks of that model's training patients; 0: lowest risk.
        chosen: What each fold's model chose inside.
    """

    risk: Floats
    fold: NDArray[np.int64]
    times: Floats
    survival: Floats
    group: NDArray[np.int64]
    chosen: tuple[Mapping[str, Any], ...] = field(default_factory=tuple)


def event_flags(values: Sequence[object], *, event_is: object = 1, censored: bool = False) -> list[float]:
    """Return 1 where the event was seen, 0 where not, NaN where the value is missing.

    Args:
        values: A column as the table has it: 0/1, true/false, words.
        event_is: The value that means the event (``censored``: the value that means censoring), compared as text
            without case, numbers as numbers.
        censored: The column says the opposite: that the time is censored.

    Raises:
        InputError: More than two different values, or the named value does not occur.
    """
    wanted = _word(event_is)
    words = [None if is_missing(v) else _word(v) for v in values]
    known = sorted({w for w in words if w is not None})
    if len(known) > 2:
        raise InputError(
            f"the event column has {len(known)} different values, expected two",
            hint="merge them into event and no event",
        )
    if wanted not in known:
        raise InputError(
            f"the value `{event_is}` does not occur in the {'censoring' if censored else 'event'} column, which has "
            f"{len(known)} different values",
            hint="name the value that means the event with --event-is",
        )
    return [math.nan if w is None else float((w == wanted) != censored) for w in words]


def check_event_name(name: str) -> None:
    """Refuse a column as event flag whose name says that it flags censoring.

    Raises:
        InputError: The name holds "censor".
    """
    if any(word in name.lower() for word in CENSORING_WORDS):
        raise InputError(
            f"column `{name}` sounds as if 1 meant censored, the opposite of an event",
            hint=f"--censored {name}, or --event-is with the value that means the event",
        )


def check_unit(time: ArrayLike, unit: str) -> str | None:
    """Return a warning where the follow-up is strangely short for the unit.

    Raises:
        InputError: The longest follow-up exceeds a life.
        UnknownName: Another unit.
    """
    if unit not in DAYS:
        raise UnknownName("unit of time", unit, DAYS, hint=f"one of {', '.join(DAYS)}")
    years = float(np.max(np.asarray(time, dtype=np.float64))) * DAYS[unit] / DAYS["years"]
    if years > LONGEST_YEARS:
        raise InputError(
            f"the longest follow-up would be {years:,.0f} years: the times are not in {unit}",
            hint={"years": "--unit months or --unit days", "months": "--unit days"}.get(unit, "check the time column"),
        )
    if years < 1:
        return f"the longest follow-up is {years * 12:.1f} months if times are in {unit}: is the unit right?"
    return None


def survival_data(
    features: ArrayLike,
    patients: Sequence[Hashable],
    time: Sequence[object] | ArrayLike,
    event: Sequence[object] | ArrayLike,
    *,
    pooling: Pooling = "mean",
    names: Sequence[str] = (),
    free: Sequence[int] = (),
) -> SurvivalData:
    """Aggregate rows to patients.

    Args:
        features: (rows, p); NaN is missing.
        patients: The patient of each row.
        time: (rows,) positive; None or NaN: the row's patient must have it in another row, or is left out.
        event: (rows,) 1: seen, 0: censored; missing as in ``time``.
        pooling: How vectors of a patient become one: ``mean`` or ``max`` of every column; missing values are passed over.
        names: Of the columns.
        free: Columns that a model must not rotate or penalise (clinical ones).

    Returns:
        One row a patient that has an outcome, sorted by name.

    Raises:
        InputError: Lengths that differ; a patient whose rows contradict each other in time or event (counted, not
            named); nobody with an outcome.
    """
    x = np.asarray(features, dtype=np.float64)
    if pooling not in ("mean", "max"):
        raise UnknownName("pooling", pooling, ("mean", "max"))
    groups = np.asarray([str(p) for p in patients])
    if x.ndim != 2 or len(x) != len(groups):
        raise InputError(f"features must have shape ({len(groups)} rows, columns), got {x.shape}")
    if any(is_missing(p) for p in patients):
        raise InputError("some rows have no patient", hint="name the column of the patient with --group")
    unique, place = np.unique(groups, return_inverse=True)
    times = _one_each(time, place, len(unique), "time")
    flags = _one_each(event, place, len(unique), "event flag")
    kept = np.flatnonzero(np.isfinite(times) & np.isfinite(flags))
    if not len(kept):
        raise InputError("no patient has both a time and an event flag")
    pooled = _pooled(x, place, len(unique), pooling)
    t, e = as_survival(times[kept], flags[kept])
    return SurvivalData(pooled[kept], t, e, tuple(str(u) for u in unique[kept]), tuple(names), tuple(free), rows=len(x))


def cross_validated_risks(
    estimator: SurvivalEstimator | Callable[[], SurvivalEstimator],
    data: SurvivalData,
    *,
    folds: int = 5,
    times: ArrayLike = (),
    groups: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> OutOfFold:
    """Predict every patient by a model that was fitted, and chosen, on other patients.

    Args:
        estimator: Unfitted (copied for each fold), or a function that makes one.
        data: One row a patient.
        folds: Outer folds, stratified by event; the same for every estimator at the same seed.
        times: Where to predict survival; within the follow-up.
        groups: Number of risk groups, by quantiles of training risks.
        seed: Of the folds.
        progress: Told of each fold.

    Raises:
        InputError: Fewer than two events a fold, or a time that some fold's training never saw.
    """
    from sklearn.base import clone

    place = stratified_folds(data.event, folds, seed)
    wanted = np.atleast_1d(np.asarray(times, dtype=np.float64))
    if len(wanted):
        check_within(wanted, min(float(data.time[place != fold].max()) for fold in range(folds)))
    risk, survival = np.zeros(len(data)), np.ones((len(data), len(wanted)))
    group = np.zeros(len(data), dtype=np.int64)
    chosen: list[Mapping[str, Any]] = []
    bar = progress or SilentProgress()
    bar.start(folds, "folds")
    for fold in range(folds):
        train, test = place != fold, place == fold
        model: Any = clone(estimator) if hasattr(estimator, "get_params") else estimator()  # type: ignore[operator]
        model.fit(data.features[train], survival_target(data.time[train], data.event[train]))
        risk[test] = model.predict(data.features[test])
        edges = np.quantile(model.predict(data.features[train]), np.arange(1, groups) / groups)
        group[test] = np.searchsorted(edges, risk[test], side="left")
        if len(wanted):
            survival[test] = model.predict_survival(data.features[test], wanted)
        chosen.append(dict(getattr(model, "chosen_", {})))
        bar.advance()
    bar.finish()
    return OutOfFold(risk, place, wanted, survival, group, tuple(chosen))


def few_events(data: SurvivalData, penalised: bool = True) -> tuple[str, ...]:
    """Return warnings about how little can be learned from so few events."""
    found = []
    columns = data.features.shape[1]
    if data.events < 50:
        found.append(f"{data.events} events: intervals will be wide, and a gain of less than about 0.1 cannot be seen.")
    if data.events < 10 * columns:
        how = "the penalty has to do the rest" if penalised else "expect overfitting"
        found.append(
            f"{data.events / columns:.1f} events for each of {columns:,} columns (10 are the usual least): {how}."
        )
    return tuple(found)


def _word(value: object) -> str:
    text = str(value).strip().lower()
    if text in ("true", "false"):
        return "1" if text == "true" else "0"
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def _one_each(values: Sequence[object] | ArrayLike, place: NDArray[np.intp], patients: int, what: str) -> Floats:
    """Return one value a patient, NaN where no row has one."""
    try:
        plain = np.array(
            [math.nan if is_missing(v) else float(v) for v in np.asarray(values, dtype=object)], dtype=float
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"some values of the {what} are no numbers") from error
    if len(plain) != len(place):
        raise InputError(f"there are {len(plain)} values of the {what} for {len(place)} rows")
    found = np.full(patients, math.nan)
    known = np.isfinite(plain)
    found[place[known]] = plain[known]
    wrong = known & (np.abs(plain - found[place]) > 1e-9 * np.maximum(np.abs(plain), 1.0))
    if wrong.any():
        count = len(np.unique(place[wrong]))
        raise InputError(
            f"{count} of {patients} patients have rows that contradict each other in the {what}",
            hint="a patient has one time and one event: from the first image, say, or one row a patient",
        )
    return found


def _pooled(x: Floats, place: NDArray[np.intp], patients: int, pooling: Pooling) -> Floats:
    known = np.isfinite(x)
    count = np.zeros((patients, x.shape[1]))
    np.add.at(count, place, known)
    if pooling == "mean":
        total = np.zeros((patients, x.shape[1]))
        np.add.at(total, place, np.where(known, x, 0.0))
        pooled: Floats = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        return pooled
    highest = np.full((patients, x.shape[1]), -np.inf)
    np.maximum.at(highest, place, np.where(known, x, -np.inf))
    return np.where(count > 0, highest, np.nan)
