"""What a task of a suite returns: numbers with baselines, and the answers row by row, so that models can be compared.

In: truth and answers of the test rows. Out: :class:`TaskResult`, written as one JSON and one ``.npz`` file, and read back.
:data:`MEASURES` says how each kind of answer becomes a number, once for the number itself, for the tests between models
and for subgroups.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from chiasm.metrics.bootstrap import WeightStatistic, weighted_interval
from chiasm.metrics.calibration import ece_statistic
from chiasm.metrics.classification import chance_level, majority_baseline
from chiasm.metrics.concordance import harrell_statistic
from chiasm.metrics.labels import is_labelled
from chiasm.metrics.weighted import (
    accuracy_statistic,
    auprc_statistic,
    auroc_statistic,
    balanced_accuracy_statistic,
    macro_auroc_statistic,
    mean_statistic,
)
from chiasm.types import Interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """How answers become one number.

    Attributes:
        title: For people.
        make: (truth (n, labels), answers (n, ...)) -> statistic of row weights.
        ranks: Whether only the order of the answers counts.
        better: Whether more or less is better.
        chance: What answers without information reach; None: see the result.
    """

    title: str
    make: Callable[[Any, Any], WeightStatistic]
    ranks: bool = False
    better: Literal["higher", "lower"] = "higher"
    chance: float | None = None


def mean_auroc_statistic(truth: Any, answers: Any) -> WeightStatistic:
    """Return the AUROC, mean over labels and, where answers have a third axis, over runs, as a function of weights.

    Args:
        truth: (n, labels) 1, 0 or NaN.
        answers: (n, labels) or (n, labels, runs).
    """
    given = np.asarray(answers, dtype=np.float64)
    wanted = np.asarray(truth, dtype=np.float64)
    runs = given[:, :, None] if given.ndim == 2 else given
    parts = [macro_auroc_statistic(wanted, runs[:, :, k]) for k in range(runs.shape[2])]

    def statistic(weights: Floats) -> Floats:
        found: Floats = np.stack([part(weights) for part in parts]).mean(axis=0)
        return found

    return statistic


def mean_ece_statistic(truth: Any, answers: Any) -> WeightStatistic:
    """Return the calibration error of probabilities (n, labels) as a function of weights.

    One label, or several of which any number may be true: the mean over labels of each label's own error, by the
    probability of the label. Classes that exclude each other (rows of ``answers`` sum to 1): the error of the most probable class.
    """
    given, wanted = np.asarray(answers, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if given.shape[1] > 1 and np.allclose(given.sum(1), 1.0, atol=1e-6):
        classes = [None if np.isnan(t).any() else int(t.argmax()) for t in wanted]
        return ece_statistic(classes, given)
    labels = [k for k in range(given.shape[1]) if not np.isnan(wanted[:, k]).all()]
    parts = [
        ece_statistic(
            [None if np.isnan(t) else int(t) for t in wanted[:, k]], np.clip(given[:, k], 0, 1), of="positive"
        )
        for k in labels
    ]

    def statistic(weights: Floats) -> Floats:
        found: Floats = np.nanmean(np.stack([part(weights) for part in parts]), axis=0)
        return found

    return statistic


def concordance_statistic(truth: Any, answers: Any) -> WeightStatistic:
    """Return Harrell's C of risks (n, 1), given time and event (n, 2), as a function of weights."""
    given = np.asarray(truth, dtype=np.float64)
    return harrell_statistic(given[:, 0], given[:, 1], np.asarray(answers, dtype=np.float64)[:, 0])


MEASURES: dict[str, Measure] = {
    "auroc": Measure("AUROC", mean_auroc_statistic, ranks=True, chance=0.5),
    "ece": Measure("calibration error", mean_ece_statistic, better="lower"),
    "cindex": Measure("concordance", concordance_statistic, ranks=True, chance=0.5),
    "hit": Measure("hits", lambda truth, answers: mean_statistic(np.asarray(answers, dtype=np.float64)[:, 0])),
}


@dataclass(frozen=True)
class Number:
    """One number of a cell.

    Attributes:
        value: With interval, n and chance.
        majority: What a constant answer reaches (always the commonest class); None where it has no meaning.
        better: Whether more or less is better.
    """

    value: Interval
    majority: float | None = None
    better: Literal["higher", "lower"] = "higher"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        majority = self.majority if self.majority is not None and np.isfinite(self.majority) else None
        return {**self.value.to_dict(), "majority": majority, "better": self.better}


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What a task found for one model on one data set.

    Attributes:
        numbers: Name -> number, the most important first.
        primary: Name of the one that models are compared by.
        measure: Key of :data:`MEASURES`: how ``answers`` become ``primary``.
        rows: (n,) rows of the data set that were tested.
        truth: (n, labels) 1, 0 or NaN.
        answers: (n, labels) or (n, labels, runs); what is compared.
        findings: Names of the columns that are compared one by one; empty: none.
        notes: What a reader must know.
        chosen: What was chosen on validation patients.
    """

    numbers: Mapping[str, Number]
    primary: str
    measure: str
    rows: NDArray[np.int64]
    truth: Floats
    answers: Floats
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    chosen: Mapping[str, Any] | None = None

    @property
    def main(self) -> Number:
        """The number that models are compared by."""
        return self.numbers[self.primary]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON values, without the rows."""
        return {
            "numbers": {name: number.to_dict() for name, number in self.numbers.items()},
            "primary": self.primary,
            "measure": self.measure,
            "findings": list(self.findings),
            "notes": list(self.notes),
            "chosen": dict(self.chosen or {}),
            "tested": len(self.rows),
        }

    def arrays(self) -> bytes:
        """Return rows, truth and answers as the bytes of an ``.npz`` file."""
        buffer = io.BytesIO()
        np.savez(buffer, rows=self.rows, truth=self.truth, answers=self.answers)
        return buffer.getvalue()

    @classmethod
    def read(cls, values: Mapping[str, Any], arrays: Mapping[str, Any]) -> TaskResult:
        """Rebuild from :meth:`to_dict` and :meth:`arrays`."""

        def number(v: Mapping[str, Any]) -> Number:
            return Number(interval_of(v), v["majority"], v["better"])

        return cls(
            {name: number(v) for name, v in values["numbers"].items()}, values["primary"], values["measure"],
            arrays["rows"], arrays["truth"], arrays["answers"], tuple(values["findings"]), tuple(values["notes"]),
            values["chosen"],
        )  # fmt: skip


def interval_of(values: Mapping[str, Any]) -> Interval:
    """Rebuild an interval from its plain JSON values; None is NaN again."""
    value, low, high = (number_of(values[k]) for k in ("value", "low", "high"))
    return Interval(value, low, high, int(values["n"]), values["chance"])


def number_of(value: float | None) -> float:
    """Return a plain JSON number, NaN for None."""
    return float("nan") if value is None else float(value)


def score_answers(
    rows: NDArray[np.int64],
    truth: Floats,
    scores: Floats,
    groups: Sequence[str],
    labels: Sequence[str],
    *,
    mode: str,
    n_resamples: int,
    seed: int,
    notes: Sequence[str] = (),
    chosen: Mapping[str, Any] | None = None,
) -> TaskResult:
    """Return the numbers of a classification.

    Args:
        rows: (n,) rows of the data set.
        truth: (n, labels) 1, 0 or NaN.
        scores: (n, labels) or (n, labels, runs), comparable within a column and, in ``single`` mode, within a row.
        groups: Patient of each row.
        labels: Names of the columns.
        mode: ``single``: of two classes the first is the finding that AUROC and AUPRC speak of, and accuracies are
            computed; ``multi``: every label by itself.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.
        notes: Passed on.
        chosen: Passed on.
    """
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    kept = [0] if mode == "single" and len(labels) == 2 else list(range(len(labels)))
    findings, wanted, given = [labels[k] for k in kept], truth[:, kept], scores[:, kept]
    numbers = {"auroc": Number(of_measure("auroc", wanted, given, groups, **options), 0.5)}
    runs = given[:, :, None] if given.ndim == 2 else given
    if mode == "single":
        numbers |= _of_classes(truth, scores, groups, options)
    for k, name in enumerate(findings):
        of_name = f" {name}" if len(findings) > 1 else ""
        for short, make in (("auroc", auroc_statistic), ("auprc", auprc_statistic)):
            if short == "auroc" and not of_name:
                continue
            chance = chance_level(wanted[:, k], cast(Any, short))
            found = _over_runs(make, wanted[:, k], runs[:, k], groups, chance, options)
            numbers[short + of_name] = Number(found, chance)
    return TaskResult(numbers, "auroc", "auroc", rows, wanted, given, tuple(findings), tuple(notes), chosen)


def _of_classes(truth: Floats, scores: Floats, groups: Sequence[str], options: dict[str, Any]) -> dict[str, Number]:
    known = np.flatnonzero(~np.isnan(truth).any(axis=1))
    if not len(known):
        return {}
    runs = scores[:, :, None] if scores.ndim == 2 else scores
    predicted, actual = runs[known].argmax(axis=1), truth[known].argmax(axis=1)
    patients, classes = [groups[i] for i in known.tolist()], truth.shape[1]
    share = _over_runs(accuracy_statistic, actual, predicted, patients, 1 / classes, options)
    occurring = 1 / len(np.unique(actual))
    balanced = _over_runs(balanced_accuracy_statistic, actual, predicted, patients, occurring, options)
    return {"balanced accuracy": Number(balanced, occurring), "accuracy": Number(share, majority_baseline(actual))}


def _over_runs(
    make: Callable[[Any, Any], WeightStatistic], truth: NDArray[Any], answers: NDArray[Any], groups: Sequence[str],
    chance: float, options: dict[str, Any],
) -> Interval:  # fmt: skip
    """Return the mean over runs, the last axis of ``answers``, of a statistic of labelled rows."""
    known = np.flatnonzero(is_labelled(truth))
    if not len(known):
        return Interval(float("nan"), float("nan"), float("nan"), 0, chance)
    parts = [make(truth[known], answers[known, run]) for run in range(answers.shape[1])]

    def statistic(weights: Floats) -> Floats:
        found: Floats = np.stack([part(weights) for part in parts]).mean(axis=0)
        return found

    return weighted_interval(statistic, [groups[i] for i in known.tolist()], chance=chance, **options)


def of_measure(
    measure: str, truth: Floats, answers: Floats, groups: Sequence[str], *, n_resamples: int, seed: int
) -> Interval:
    """Return a measure of :data:`MEASURES` with its interval, resampling patients; ``n`` counts labelled rows."""
    kind = MEASURES[measure]
    labelled = np.flatnonzero(~np.isnan(truth).all(axis=1)) if truth.shape[1] else np.arange(len(answers))
    if not len(labelled):
        return Interval(float("nan"), float("nan"), float("nan"), 0, kind.chance)
    statistic = kind.make(truth[labelled], answers[labelled])
    kept = [groups[i] for i in labelled.tolist()]
    return weighted_interval(statistic, kept, n_resamples=n_resamples, seed=seed, chance=kind.chance)
