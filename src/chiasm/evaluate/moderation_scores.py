"""What a policy is worth on labelled images: each category alone, and the decisions together, with intervals over patients.

In: a :class:`~chiasm.tasks.moderation.ModerationResult` and the truth. Out: frozen scores. "Found" means that something
happened (the action or a review), "acted" that the action was taken without a person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Floats, weighted_intervals
from chiasm.metrics.classification import auroc_interval
from chiasm.metrics.labels import as_binary
from chiasm.metrics.weighted import mean_statistic
from chiasm.tasks.moderation import ACTIONS, ModerationResult
from chiasm.types import Interval


@dataclass(frozen=True)
class CategoryScores:
    """One category.

    Attributes:
        category: Its name.
        positives: Images of it.
        negatives: Images not of it.
        auroc: Of its score; chance is 0.5.
        found: Sensitivity of "something happened": share of its images that are acted on or reviewed.
        left_alone: Specificity of the same: share of the others that are left alone.
        acted: Share of its images on which its action is taken.
        wrongly_acted: Share of the others on which its action is taken.
    """

    category: str
    positives: int
    negatives: int
    auroc: Interval
    found: Interval
    left_alone: Interval
    acted: Interval
    wrongly_acted: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {k: v.to_dict() if isinstance(v, Interval) else v for k, v in vars(self).items()}


@dataclass(frozen=True)
class ModerationScores:
    """A policy on labelled images.

    Attributes:
        categories: One per category that has a truth.
        wanted: Share of the labelled images whose decision is the one that their true categories ask for (a review
            counts as neither right nor wrong and is left out); ``chance`` is what always giving the commonest one would
            score on the same images.
        reviewed: Share of the labelled images that a person must look at.
        confusion: Wanted decision -> given decision -> images.
        skipped: Categories without a truth.
        n: Labelled images: all truths that could change the wanted decision are known.
        patients: Of those.
    """

    categories: tuple[CategoryScores, ...]
    wanted: Interval
    reviewed: Interval
    confusion: Mapping[str, Mapping[str, int]]
    skipped: tuple[str, ...]
    n: int
    patients: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "categories": {c.category: c.to_dict() for c in self.categories},
            "wanted": self.wanted.to_dict(),
            "reviewed": self.reviewed.to_dict(),
            "confusion": {k: dict(v) for k, v in self.confusion.items()},
            "skipped": list(self.skipped),
            "n": self.n,
            "patients": self.patients,
        }


def score_moderation(
    result: ModerationResult, truth: Mapping[str, ArrayLike], *, n_resamples: int = 1000, seed: int = 0
) -> ModerationScores:
    """Return what a policy is worth.

    Args:
        result: Of the images.
        truth: Category -> (images,) 0, 1, or NaN/None for "not labelled"; others are skipped.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        InputError: When nothing is labelled, or lengths differ.
    """
    columns = {name: as_binary(np.asarray(values, dtype=object)) for name, values in truth.items()}
    for name, column in columns.items():
        if column.shape != (len(result),):
            raise InputError(f"category `{name}` has {len(column)} truth values for {len(result)} images")
    columns = {name: column for name, column in columns.items() if not np.isnan(column).all()}
    if not columns:
        raise InputError("no image is labelled, so nothing can be judged", hint="name a column that holds the truth")
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    found = [
        _category(result, k, columns[name], options) for k, name in enumerate(result.policy.names) if name in columns
    ]
    wanted, known = _wanted(result, columns)
    rows = np.flatnonzero(known)
    if not len(rows):
        raise InputError("no image has a truth of every category that could decide", hint="label whole images")
    given = np.array(result.decisions)
    reviewed = (given == "review").astype(np.float64)
    right = np.where((given == "review") & (wanted != "review"), np.nan, given == wanted)
    groups = np.asarray(result.groups)[rows]
    numbers = weighted_intervals(
        {"right": mean_statistic(right[rows]), "reviewed": mean_statistic(reviewed[rows])}, groups, **options
    )
    counts = {a: int((wanted[rows] == a).sum()) for a in ACTIONS}
    judged = rows[~np.isnan(right[rows])]
    commonest = max(int((wanted[judged] == a).sum()) for a in ACTIONS) / len(judged) if len(judged) else None
    right_number = numbers["right"]
    return ModerationScores(
        tuple(found),
        Interval(right_number.value, right_number.low, right_number.high, len(judged), commonest),
        numbers["reviewed"],
        {w: {g: int(((wanted == w) & (given == g))[rows].sum()) for g in ACTIONS} for w in ACTIONS if counts[w]},
        tuple(name for name in result.policy.names if name not in columns),
        len(rows),
        len(set(groups.tolist())),
    )  # fmt: skip


def _wanted(result: ModerationResult, columns: Mapping[str, Floats]) -> tuple[Any, Any]:
    """Return the decision that the true categories of each image ask for, the strictest, and whether it is known.

    An unlabelled category leaves the decision open, unless one as strict is known to be there.
    """
    wanted = np.full(len(result), result.policy.default, dtype=object)
    known = np.ones(len(result), dtype=bool)
    for action in reversed(ACTIONS):
        own = [columns[c.name] for c in result.policy.categories if c.action == action and c.name in columns]
        if own:
            there = (np.stack(own) == 1).any(axis=0)
            known = np.where(there, True, known & ~np.isnan(np.stack(own)).any(axis=0))
            wanted[there] = action
    return wanted, known


def _category(result: ModerationResult, k: int, truth: Floats, options: Mapping[str, Any]) -> CategoryScores:
    category, scores = result.policy.categories[k], result.scores[:, k]
    rows = np.flatnonzero(~np.isnan(truth))
    labels, scores, groups = truth[rows], scores[rows], np.asarray(result.groups)[rows]
    happened, acted = scores >= category.lower, scores >= category.threshold

    def among(side: int, values: Any) -> Any:
        return mean_statistic(np.where(labels == side, values, np.nan))

    numbers = weighted_intervals(
        {
            "found": among(1, happened),
            "left": among(0, ~happened),
            "acted": among(1, acted),
            "wrongly": among(0, acted),
        },
        groups,
        **options,
    )
    sides = {"found": 1, "left": 0, "acted": 1, "wrongly": 0}
    made = {name: Interval(i.value, i.low, i.high, int((labels == sides[name]).sum())) for name, i in numbers.items()}
    return CategoryScores(
        category.name,
        int((labels == 1).sum()),
        int((labels == 0).sum()),
        auroc_interval(labels, scores, groups, **options),
        made["found"],
        made["left"],
        made["acted"],
        made["wrongly"],
    )


def truth_of(columns: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
    """Return some rows of a truth by category."""
    return {name: [values[i] for i in rows] for name, values in columns.items()}
