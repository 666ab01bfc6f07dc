"""Results and truth to scores that can be believed: intervals clustered by patient, chance and majority beside each.

In: what the tasks return, and the truth. Out: frozen scores. Every interval is a bootstrap over GROUPS (patients where
they are known), because images of one patient are not independent. None in a truth means "not labelled": such rows are
left out, never counted as negative. Nothing is chosen here, no threshold and no epoch: selection belongs elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.evaluate.map_scores import PointingScores, score_pointing
from chiasm.evaluate.search_scores import RetrievalScores, score_retrieval
from chiasm.metrics.bootstrap import WeightStatistic, weighted_interval
from chiasm.metrics.classification import (
    accuracy_interval,
    auprc_interval,
    auroc_interval,
    balanced_accuracy_interval,
    macro_auroc_interval,
    majority_baseline,
)
from chiasm.metrics.weighted import auprc_statistic
from chiasm.tasks.zero_shot import Mode, ZeroShotResult
from chiasm.types import Interval, LabelValue

__all__ = [
    "InvertedScoreWarning",
    "LabelScores",
    "PointingScores",
    "RetrievalScores",
    "ZeroShotScores",
    "prediction_rows",
    "score_pointing",
    "score_retrieval",
    "score_zero_shot",
]

Truth = Mapping[str, Sequence[LabelValue]] | Sequence[str | None]


class InvertedScoreWarning(UserWarning):
    """The whole interval of a label's AUROC lies below one half: its prompts say the opposite of the label."""


@dataclass(frozen=True)
class LabelScores:
    """How well one label is told apart.

    Attributes:
        label: Its name.
        auroc: Area under the ROC curve; chance is 0.5.
        auprc: Area under the precision–recall curve (average precision); chance is the share of positives.
        balanced_accuracy: Mean of sensitivity and specificity at a probability of 0.5, which nobody tuned; ``multi``
            only.
        positives: Rows labelled 1.
        negatives: Rows labelled 0.
    """

    label: str
    auroc: Interval
    auprc: Interval
    balanced_accuracy: Interval | None
    positives: int
    negatives: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values: dict[str, Any] = {"auroc": self.auroc.to_dict(), "auprc": self.auprc.to_dict()}
        if self.balanced_accuracy is not None:
            values["balanced_accuracy"] = self.balanced_accuracy.to_dict()
        return {**values, "positives": self.positives, "negatives": self.negatives}


@dataclass(frozen=True)
class ZeroShotScores:
    """How good a zero-shot classification is.

    Attributes:
        mode: ``single`` or ``multi``, as in the result.
        per_label: One per label that has a truth, in the result's order.
        macro_auroc: Mean over labels that have both positives and negatives.
        macro_auprc: The same for AUPRC.
        accuracy: Share of right classes (``single`` only); chance is one over the number of classes.
        balanced_accuracy: Mean recall over the classes that occur (``single`` only).
        majority_accuracy: Accuracy of always saying the most frequent class (``single`` only).
        confusion: Rows: true class; columns: predicted class (``single`` only).
        n: Rows with any truth.
        n_groups: Groups among them.
        warnings: What a reader must know; also raised as Python warnings where a score is inverted.
    """

    mode: Mode
    per_label: tuple[LabelScores, ...]
    macro_auroc: Interval
    macro_auprc: Interval
    accuracy: Interval | None
    balanced_accuracy: Interval | None
    majority_accuracy: float | None
    confusion: tuple[tuple[int, ...], ...] | None
    n: int
    n_groups: int
    warnings: tuple[str, ...] = ()

    def label(self, name: str) -> LabelScores:
        """Return the scores of one label; an unknown one raises ``UnknownName``."""
        for found in self.per_label:
            if found.label == name:
                return found
        raise UnknownName("label", name, [s.label for s in self.per_label])

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Return rows of text for print: measure, value with interval, n, chance, majority."""
        rows = [
            _row("macro AUROC", self.macro_auroc, 0.5),
            _row("macro AUPRC", self.macro_auprc, self.macro_auprc.chance),
        ]
        if self.accuracy is not None and self.balanced_accuracy is not None:
            rows.append(_row("accuracy", self.accuracy, self.majority_accuracy))
            rows.append(_row("balanced accuracy", self.balanced_accuracy, self.balanced_accuracy.chance))
        for found in self.per_label:
            rows.append(_row(f"AUROC {found.label}", found.auroc, 0.5))
            rows.append(_row(f"AUPRC {found.label}", found.auprc, found.auprc.chance))
            if found.balanced_accuracy is not None:
                rows.append(_row(f"balanced accuracy {found.label}", found.balanced_accuracy, 0.5))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; every number is ``{"value", "low", "high", "n", "chance"}``."""
        values: dict[str, Any] = {
            "mode": self.mode,
            "macro_auroc": self.macro_auroc.to_dict(),
            "macro_auprc": self.macro_auprc.to_dict(),
            "per_label": {found.label: found.to_dict() for found in self.per_label},
            "n": self.n,
            "n_groups": self.n_groups,
            "warnings": list(self.warnings),
        }
        if self.accuracy is not None and self.balanced_accuracy is not None and self.confusion is not None:
            values |= {
                "accuracy": self.accuracy.to_dict(),
                "balanced_accuracy": self.balanced_accuracy.to_dict(),
                "majority_accuracy": self.majority_accuracy,
                "confusion": [list(row) for row in self.confusion],
            }
        return values


def _row(name: str, value: Interval, majority: float | None = None) -> tuple[str, str, str, str, str]:
    def short(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    return name, str(value), str(value.n), short(value.chance), short(majority)


def score_zero_shot(
    result: ZeroShotResult,
    truth: Truth,
    groups: Sequence[str] | None = None,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> ZeroShotScores:
    """Score a zero-shot classification against the truth.

    Args:
        result: From ``tasks.zero_shot.classify``.
        truth: Label to one value a row (1, 0, or None for "not labelled"); or, for classes that exclude each other, the
            name of each row's class (None for "not labelled").
        groups: Patient of each row; by default the result's own groups.
        n_resamples: Bootstrap samples per interval.
        seed: Of the bootstrap.

    Raises:
        InputError: When lengths differ, a value is no truth value, or nothing is labelled.
        UnknownName: When a class is none of the result's labels.
    """
    targets = truth_matrix(result, truth)
    patients = check_groups(result.groups if groups is None else groups, len(result))
    labelled = ~np.isnan(targets)
    if not labelled.any():
        raise InputError("no row of the truth is labelled, so nothing can be scored")
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    scores = result.scores
    per_label: list[LabelScores] = []
    usable: list[int] = []
    notes: list[str] = []
    for k, label in enumerate(result.labels):
        if not labelled[:, k].any():
            notes.append(f"label `{label}` has no truth and is not scored")
            continue
        decided = (result.probabilities[:, k] >= 0.5).astype(np.float64) if result.mode == "multi" else None
        found = _score_label(label, targets[:, k], scores[:, k], decided, patients, options)
        per_label.append(found)
        if 0 in (found.positives, found.negatives):
            notes.append(f"label `{label}` has only {'positive' if found.positives else 'negative'} rows, so no AUROC")
            continue
        usable.append(k)
        if found.auroc.high < 0.5:
            notes.append(
                f"AUROC of `{label}` is {found.auroc}, below one half with certainty: its prompts say the opposite"
            )
            warnings.warn(notes[-1], InvertedScoreWarning, stacklevel=2)
    rows = np.flatnonzero(labelled.any(axis=1))
    kept = [patients[i] for i in rows.tolist()]
    columns = np.asarray(usable, dtype=np.intp)
    chances = [found.auprc.chance for found in per_label if found.positives and found.negatives]
    return ZeroShotScores(
        result.mode,
        tuple(per_label),
        macro_auroc_interval(targets[rows], scores[rows], kept, **options),
        weighted_interval(
            _macro_auprc(targets[rows][:, columns], scores[rows][:, columns]),
            kept,
            chance=float(np.mean([c for c in chances if c is not None])) if chances else None,
            **options,
        ),
        *(_score_classes(result, targets, patients, options) if result.mode == "single" else _NO_CLASSES),
        len(rows),
        len(set(kept)),
        tuple(notes),
    )


def prediction_rows(
    result: ZeroShotResult, truth: Truth, groups: Sequence[str] | None = None
) -> list[dict[str, str | int | float]]:
    """Return one row per image and label that has a truth: ``patient, label, truth, score``.

    The score is the log-odds of the label's probability: the very number that AUROC and AUPRC were computed on, so
    anyone can recompute them.
    """
    targets = truth_matrix(result, truth)
    names = check_groups(result.groups if groups is None else groups, len(result))
    scores = result.scores
    return [
        {"patient": names[i], "label": label, "truth": int(targets[i, k]), "score": float(scores[i, k])}
        for k, label in enumerate(result.labels)
        for i in range(len(result))
        if not np.isnan(targets[i, k])
    ]


def check_groups(groups: Sequence[str | None], n: int) -> tuple[str, ...]:
    """Return the groups as text; their number must be ``n`` and none may be missing."""
    if len(groups) != n:
        raise InputError(f"{n} rows came with {len(groups)} groups")
    if any(g is None for g in groups):
        raise InputError("a row has no group", hint="give rows without a patient a group of their own")
    return tuple(str(g) for g in groups)


def truth_matrix(result: ZeroShotResult, truth: Truth) -> NDArray[np.float64]:
    """Return the truth as 1, 0 or NaN (not labelled), shape (images, labels)."""
    targets = np.full((len(result), len(result.labels)), np.nan)
    if isinstance(truth, Mapping):
        for label, values in truth.items():
            column = result.column(label)
            if len(values) != len(result):
                raise InputError(f"label `{label}` has {len(values)} truth values for {len(result)} results")
            targets[:, column] = [_truth_value(v, label) for v in values]
        return targets
    if isinstance(truth, str):
        raise InputError("the truth must be a list of class names, got one text")
    if len(truth) != len(result):
        raise InputError(f"the truth has {len(truth)} classes for {len(result)} results")
    folded = {label.strip().casefold(): k for k, label in enumerate(result.labels)}
    for i, name in enumerate(truth):
        if name is None or name == "":
            continue
        if str(name).strip().casefold() not in folded:
            raise UnknownName("class", str(name), result.labels, hint=f"the labels are: {', '.join(result.labels)}")
        targets[i] = 0
        targets[i, folded[str(name).strip().casefold()]] = 1
    return targets


def _truth_value(value: LabelValue, label: str) -> float:
    if value is None or value == "":
        return float("nan")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not (np.isnan(number) or number in (0.0, 1.0)):
        raise InputError(
            f"the truth of label `{label}` must be 0, 1 or blank, got another value",
            hint="decide first what an uncertain label (-1, say) counts as",
        )
    return number


def _score_label(
    label: str,
    target: NDArray[np.float64],
    score: NDArray[np.float64],
    decided: NDArray[np.float64] | None,
    patients: tuple[str, ...],
    options: dict[str, Any],
) -> LabelScores:
    return LabelScores(
        label,
        auroc_interval(target, score, patients, **options),
        auprc_interval(target, score, patients, **options),
        None
        if decided is None
        else replace(balanced_accuracy_interval(target, decided, patients, **options), chance=0.5),
        int((target == 1).sum()),
        int((target == 0).sum()),
    )


def _macro_auprc(targets: NDArray[np.float64], scores: NDArray[np.float64]) -> WeightStatistic:
    """Return the mean over labels; a resample averages the labels that still have a positive."""
    parts = [auprc_statistic(targets[:, k], scores[:, k]) for k in range(targets.shape[1])]

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        if not parts:
            return np.full(len(weights), np.nan)
        values = np.stack([part(weights) for part in parts])
        defined = np.isfinite(values)
        total: NDArray[np.float64] = np.where(defined, values, 0.0).sum(axis=0)
        return np.where(defined.any(axis=0), total / np.maximum(defined.sum(axis=0), 1), np.nan)

    return statistic


_NO_CLASSES = (None, None, None, None)


def _score_classes(
    result: ZeroShotResult, targets: NDArray[np.float64], patients: tuple[str, ...], options: dict[str, Any]
) -> tuple[Interval | None, Interval | None, float | None, tuple[tuple[int, ...], ...] | None]:
    """Return accuracy, balanced accuracy, majority accuracy and confusion over rows with exactly one true class."""
    rows = np.flatnonzero((targets == 1).sum(axis=1) == 1)
    if len(rows) == 0:
        return _NO_CLASSES
    actual, predicted = (targets[rows] == 1).argmax(axis=1), result.logits[rows].argmax(axis=1)
    kept = [patients[i] for i in rows.tolist()]
    confusion = np.zeros((len(result.labels), len(result.labels)), dtype=np.int64)
    np.add.at(confusion, (actual, predicted), 1)
    return (
        accuracy_interval(actual, predicted, kept, **options),
        balanced_accuracy_interval(actual, predicted, kept, **options),
        majority_baseline(actual),
        tuple(tuple(int(v) for v in row) for row in confusion),
    )
