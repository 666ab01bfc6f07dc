"""Prediction sets that hold the truth as often as promised: split-conformal prediction with patients in mind.

In: class probabilities of calibration rows (rows, classes), or (rows,) of class 1 of two, which took no part in training
or tuning; the column of the true class; patients. Out: for each new row the set of classes that cannot be excluded.

What is promised, if patients of calibration and use are drawn alike (one hospital, one time, one way of choosing), and
whatever the probabilities are worth: over such draws, a set holds the true class with probability at least 1 - α. What
"a set" is of depends on ``per_patient``:

=============  =============================================================================================
``weights``    of a row drawn at random from a new patient (every patient counts alike, all rows are used)
``one``        the same, from one row drawn at random of each calibration patient
``worst``      of *all* rows of a new patient at once; larger sets
``rows``       of a new row, only if no patient has two: with several, nothing is promised
=============  =============================================================================================

What is not promised: coverage for each class (unless ``class_conditional``, then for each class by itself), sex, age or
scanner; for one particular patient; for one particular calibration set (with n patients the coverage of that one varies
by about √(α (1 - α) / n)); under another prevalence, hospital or device. A set of *all* classes keeps the promise too,
and says nothing: read the mean size beside the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.metrics.bootstrap import Clusters, Floats, weighted_interval
from chiasm.metrics.labels import as_class_numbers, as_probabilities
from chiasm.types import Interval

Groups = Sequence[Hashable] | NDArray[np.generic]
Method = Literal["lac", "aps"]
PerPatient = Literal["weights", "one", "worst", "rows"]
Empty = Literal["keep", "most_probable"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("lac", "aps"),
    "per_patient": ("weights", "one", "worst", "rows"),
    "empty": ("keep", "most_probable"),
}
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class PredictionSets:
    """For each row the classes that cannot be excluded.

    Attributes:
        members: bool (rows, classes).
        alpha: The promised share of sets without the true class.
        was_empty: bool (rows,): rows in which no class fitted, before the policy for empty sets.
    """

    members: NDArray[np.bool_]
    alpha: float
    was_empty: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Classes in each set."""
        return np.asarray(self.members.sum(axis=1), dtype=np.int64)

    @property
    def codes(self) -> NDArray[np.int64]:
        """The class of each set that holds one alone, -1 ("cannot tell") elsewhere."""
        return np.where(self.sizes == 1, self.members.argmax(axis=1), -1).astype(np.int64)


@dataclass(frozen=True)
class SetReport:
    """What prediction sets reach on test rows; every patient counts alike, rows without a label are left out.

    Attributes:
        coverage: Share of sets that hold the true class; ``chance`` is what was promised, 1 - α.
        size: Mean number of classes.
        single: Share of sets of exactly one class.
        empty: Share of rows in which no class fitted, whatever was done about it.
        per_class: Coverage among rows of each true class.
    """

    coverage: Interval
    size: Interval
    single: Interval
    empty: Interval
    per_class: tuple[Interval, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        found: dict[str, Any] = {k: getattr(self, k).to_dict() for k in ("coverage", "size", "single", "empty")}
        return found | {"per_class": [c.to_dict() for c in self.per_class]}


class SplitConformal:
    """Split-conformal prediction sets in the manner of scikit-learn.

    Args:
        alpha: Share of sets that may miss the true class, in (0, 1).
        method: ``lac``: classes of probability at least a threshold, the smallest sets on average (Sadinle et al. 2019).
            ``aps``: classes by falling probability up to a total, more even between easy and hard rows (Romano et al.
            2020).
        class_conditional: A threshold for each class: the promise holds among rows of each class.
        per_patient: See the head of this module.
        empty: What becomes of a row in which no class fits. ``keep``: the set stays empty, "cannot tell" (such a row is
            unlike the calibration rows). ``most_probable``: it gets its most probable class; coverage can only rise.
            Sets grow as alpha falls, except where ``most_probable`` meets ``class_conditional``: there another class may
            be the first to fit.
        randomize: For ``aps``: count the class itself by a random part, as published. Without it each set is the same
            in every run and the promise holds, but with few classes coverage lies far above it: the last class has the
            score 1 in all rows, so where it is right in a share of α or more, every set holds every class.
        seed: Of ``one`` and ``randomize``; both depend on the order of rows.

    Attributes:
        thresholds_: (1,) or (classes,) largest score that is let in; infinite where the patients are too few for α, so
            that the class is in every set. At least 1 / α - 1 patients are needed (of each class).
        patients_: Patients behind each threshold.
        n_classes_: Number of classes.

    References:
        Vovk, Gammerman and Shafer, 2005; Sadinle, Lei and Wasserman, 2019, https://arxiv.org/abs/1609.00451; Romano,
        Sesia and Candès, 2020, https://arxiv.org/abs/2006.02544; Lee, Barber and Willett, 2023,
        https://arxiv.org/abs/2306.06342 (``weights``: rows of one patient share its weight).
    """

    thresholds_: Floats
    patients_: tuple[int, ...]
    n_classes_: int

    def __init__(
        self,
        alpha: float = 0.1,
        *,
        method: Method = "lac",
        class_conditional: bool = False,
        per_patient: PerPatient = "weights",
        empty: Empty = "keep",
        randomize: bool = True,
        seed: int = 0,
    ) -> None:
        self.alpha = alpha
        self.method = method
        self.class_conditional = class_conditional
        self.per_patient = per_patient
        self.empty = empty
        self.randomize = randomize
        self.seed = seed

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments of the constructor, as scikit-learn's ``clone`` wants them."""
        names = ("alpha", "method", "class_conditional", "per_patient", "empty", "randomize", "seed")
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> Self:
        """Set arguments of the constructor; an unknown one raises ``UnknownName``."""
        for name, value in params.items():
            if name not in self.get_params():
                raise UnknownName("parameter", name, self.get_params())
            setattr(self, name, value)
        return self

    def fit(self, probabilities: ArrayLike, truth: ArrayLike, groups: Groups | None = None) -> Self:
        """Find the thresholds on calibration rows.

        Args:
            probabilities: (rows, classes) that sum to 1, or (rows,) of class 1 of two.
            truth: (rows,) column of the true class; None and NaN are left out.
            groups: Patient of each row; None: each row is a patient.

        Raises:
            InputError: For values that are no probabilities, lengths that differ, an unknown option, or no labelled row.
        """
        self._check()
        given = as_probabilities(probabilities)
        wanted = as_class_numbers(truth, given.shape[1])
        names = list(range(len(given))) if groups is None else list(groups)
        if not len(given) == len(wanted) == len(names):
            raise InputError(f"there are {len(given)} rows of probabilities, {len(wanted)} true classes and "
                             f"{len(names)} groups")  # fmt: skip
        known = np.flatnonzero(wanted >= 0)
        if len(known) == 0:
            raise InputError("no row is labelled; there is nothing to calibrate with")
        scores = self._scores(given, 0)[known, wanted[known]]
        patient = Clusters([names[i] for i in known]).of_row
        sides = [np.arange(len(known))]
        if self.class_conditional:
            sides = [np.flatnonzero(wanted[known] == k) for k in range(given.shape[1])]
        found = [
            patient_quantile(scores[s], patient[s], self.alpha, per_patient=self.per_patient, seed=self.seed)
            for s in sides
        ]
        counted = [len(s) if self.per_patient == "rows" else len(np.unique(patient[s])) for s in sides]
        self.thresholds_, self.patients_ = np.array(found), tuple(counted)
        self.n_classes_ = given.shape[1]
        return self

    def predict(self, probabilities: ArrayLike) -> PredictionSets:
        """Return the set of each row.

        Raises:
            InputError: Before ``fit``, or for another number of classes.
        """
        self._check()
        if not hasattr(self, "thresholds_"):
            raise InputError("the prediction sets are not calibrated", hint="call `fit` on calibration rows first")
        given = as_probabilities(probabilities)
        if given.shape[1] != self.n_classes_:
            raise InputError(f"calibrated on {self.n_classes_} classes, got {given.shape[1]}")
        members = np.asarray(self._scores(given, 1) <= self.thresholds_ + _ROUNDING, dtype=bool)
        was_empty = np.asarray(~members.any(axis=1), dtype=bool)
        if self.empty == "most_probable":
            members[was_empty, given[was_empty].argmax(axis=1)] = True
        return PredictionSets(members, self.alpha, was_empty)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values (an infinite threshold as None); raises ``InputError`` before ``fit``."""
        if not hasattr(self, "thresholds_"):
            raise InputError("the prediction sets are not calibrated", hint="call `fit` on calibration rows first")
        thresholds = [float(t) if math.isfinite(t) else None for t in self.thresholds_]
        return {**self.get_params(), "thresholds": thresholds, "patients": list(self.patients_),
                "classes": self.n_classes_}  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`; missing and unknown fields raise ``InputError``."""
        given = dict(values)
        wanted = set(cls().get_params()) | {"thresholds", "patients", "classes"}
        if set(given) != wanted:
            raise InputError(f"saved prediction sets have the wrong fields: `{min(set(given) ^ wanted)}`")
        thresholds = [math.inf if t is None else float(t) for t in given.pop("thresholds")]
        patients, classes = tuple(given.pop("patients")), int(given.pop("classes"))
        made = cls(**given)
        made._check()
        made.thresholds_, made.patients_, made.n_classes_ = np.array(thresholds), patients, classes
        return made

    def _check(self) -> None:
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha must lie between 0 and 1, got {self.alpha}", hint="0.1 promises 90 % coverage")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UnknownName(name, str(getattr(self, name)), known, hint=f"one of {', '.join(known)}")

    def _scores(self, probabilities: Floats, stream: int) -> Floats:
        """Return how strange each class would be for each row, (rows, classes), in [0, 1]."""
        if self.method == "lac":
            return 1 - probabilities
        order = np.argsort(-probabilities, axis=1, kind="stable")
        ordered = np.take_along_axis(probabilities, order, axis=1)
        reached = np.cumsum(ordered, axis=1)
        if self.randomize:
            reached -= np.random.default_rng([self.seed, stream]).random((len(ordered), 1)) * ordered
        scores = np.empty_like(reached)
        np.put_along_axis(scores, order, reached, axis=1)
        return scores


def patient_quantile(
    scores: ArrayLike, groups: Groups, alpha: float, *, per_patient: PerPatient = "weights", seed: int = 0
) -> float:
    """Return the score that a new row exceeds with a chance of at most α, counting patients.

    Args:
        scores: (rows,) of calibration rows, no NaN.
        groups: Patient of each row.
        alpha: In (0, 1).
        per_patient: What "a new row" is of: see the head of this module.
        seed: Of ``one``.

    Returns:
        The smallest score s so that K patients hold at least a share 1 - α of K + 1 at or below s: for one row a patient
        the ⌈(K + 1) (1 - α)⌉-th smallest. Infinite where K < 1 / α - 1, or without rows.

    Raises:
        InputError: When lengths differ or a score is NaN.
    """
    values, names = np.asarray(scores, dtype=np.float64).ravel(), np.asarray(groups)
    if len(values) != len(names) or np.isnan(values).any():
        raise InputError(f"there are {len(values)} scores, {int(np.isnan(values).sum())} of them NaN, for {len(names)} "
                         "groups")  # fmt: skip
    if len(values) == 0:
        return math.inf
    unique, patient, size = np.unique(names, return_inverse=True, return_counts=True)
    count, weights = len(unique), 1.0 / size[patient]
    if per_patient == "rows":
        count, weights = len(values), np.ones(len(values))
    elif per_patient == "worst":
        worst = np.full(count, -np.inf)
        np.maximum.at(worst, patient, values)
        values, weights = worst, np.ones(count)
    elif per_patient == "one":
        shuffled = np.random.default_rng(seed).permutation(len(values))
        _, first = np.unique(patient[shuffled], return_index=True)
        values, weights = values[shuffled[first]], np.ones(count)
    order = np.argsort(values, kind="stable")
    enough = np.cumsum(weights[order]) >= (1 - alpha) * (count + 1) - 1e-9
    return float(values[order[int(enough.argmax())]]) if enough.any() else math.inf


def score_sets(sets: PredictionSets, truth: ArrayLike, groups: Groups | None = None, **options: Any) -> SetReport:
    """Return what prediction sets reach on test rows, every patient counting alike, with intervals of whole patients.

    Args:
        sets: Of test rows.
        truth: (rows,) column of the true class; None and NaN are left out.
        groups: Patient of each row; None: each row is a patient.
        **options: ``method``, ``n_resamples``, ``seed``, ``level`` of :func:`chiasm.metrics.bootstrap.weighted_interval`.

    Raises:
        InputError: When lengths differ or nothing is labelled.
    """
    wanted = as_class_numbers(truth, sets.members.shape[1])
    names = list(range(len(sets))) if groups is None else list(groups)
    if not len(sets) == len(wanted) == len(names):
        raise InputError(f"there are {len(sets)} sets, {len(wanted)} true classes and {len(names)} groups")
    known = np.flatnonzero(wanted >= 0)
    if len(known) == 0:
        raise InputError("no row is labelled; there is nothing to compare the sets with")
    patients = [names[i] for i in known]
    patient = Clusters(patients).of_row
    members, true = sets.members[known], wanted[known]
    hit = members[np.arange(len(known)), true].astype(np.float64)

    def mean(values: Floats, among: NDArray[np.bool_], chance: float | None = None) -> Interval:
        counted = np.bincount(patient, weights=among)[patient]
        share = np.where(among, 1.0 / np.maximum(counted, 1), 0.0)

        def statistic(weights: Floats) -> Floats:
            total = weights @ share
            found: Floats = (weights @ (share * values)) / np.where(total > 0, total, np.nan)
            return found

        found = weighted_interval(statistic, patients, chance=chance, **options)
        return Interval(found.value, found.low, found.high, int(among.sum()), chance)

    everyone = np.ones(len(known), dtype=bool)
    size = members.sum(axis=1).astype(np.float64)
    promised = 1 - sets.alpha
    return SetReport(
        mean(hit, everyone, promised),
        mean(size, everyone),
        mean((size == 1).astype(np.float64), everyone),
        mean(sets.was_empty[known].astype(np.float64), everyone),
        tuple(mean(hit, true == k, promised) for k in range(members.shape[1])),
    )
