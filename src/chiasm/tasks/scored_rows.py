"""Scores with their truth and their origin: what calibration is fitted to and judged by.

In: a zero-shot result, or scores from anywhere, with the truth and the patient of each row. Out: :class:`ScoredRows`
that know which classifier they come from (:class:`Origin`), parts of patients that never overlap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, LeakageError, SpaceMismatch
from chiasm.metrics.bootstrap import Clusters, Floats
from chiasm.tasks.prompts import PromptSet
from chiasm.tasks.zero_shot import Mode, ZeroShotResult, sigmoid, softmax
from chiasm.types import Space, digest_of

#: Names of parts that are taken for validation and test when nothing else is said.
FIT_PARTS = ("val", "valid", "validation", "calibration")
TEST_PARTS = ("test",)
#: Names of parts that a model may have learned from: they are not dealt out where other rows are there.
TRAIN_PARTS = ("train", "training")


@dataclass(frozen=True)
class Origin:
    """Which classifier the scores come from: a calibration of one says nothing about another.

    Attributes:
        mode: ``single``: classes that exclude each other; ``multi``: any number of labels can be true.
        labels: In the order of the columns.
        space: Of the embeddings; None for scores from a table.
        prompts: Digest of the prompts; None for scores from a table.
        activation: ``softmax``, ``pair``, ``sigmoid``; for a table ``logits`` or ``probabilities``.
        logit_scale: The multiplier of cosines; None for scores from a table.
        protocol: Published protocol and variant, where one was followed.
    """

    mode: Mode
    labels: tuple[str, ...]
    space: Space | None = None
    prompts: str | None = None
    activation: str = "logits"
    logit_scale: float | None = None
    protocol: str | None = None

    @classmethod
    def of(cls, result: ZeroShotResult) -> Self:
        """Return the origin of a zero-shot result."""
        protocol = None if result.protocol is None else f"{result.protocol} ({result.variant})"
        return cls(result.mode, result.labels, result.space, prompts_digest(result.prompts), result.activation,
                   float(result.logit_scale), protocol)  # fmt: skip

    def check(self, other: Origin) -> None:
        """Raise unless ``other`` is the same classifier.

        Raises:
            SpaceMismatch: For another model, weights or preprocessing.
            InputError: For other labels, prompts, another mode or another way of scoring.
        """
        if self.space != other.space:
            raise SpaceMismatch(
                f"the calibration was fitted in `{self.space or 'a table of scores'}`, these scores come from "
                f"`{other.space or 'a table of scores'}`",
                hint="fit a calibration of this model: `chiasm calibrate`",
            )
        hint = "use the labels and prompts that the calibration was fitted with, or fit it anew"
        if self.labels != other.labels or self.mode != other.mode:
            raise InputError(
                f"the calibration is of {len(self.labels)} labels ({self.mode}: {', '.join(self.labels)}), the scores are "
                f"of {len(other.labels)} ({other.mode}: {', '.join(other.labels)})",
                hint=hint,
            )
        if self.prompts != other.prompts:
            raise InputError("the calibration was fitted with other prompts than these", hint=hint)
        same_scale = (self.logit_scale is None) == (other.logit_scale is None) and (
            self.logit_scale is None or math.isclose(self.logit_scale, other.logit_scale or 0.0, rel_tol=1e-6)
        )
        if (self.activation, self.protocol) != (other.activation, other.protocol) or not same_scale:
            raise InputError(
                f"the calibration was fitted on scores made another way ({self.activation}, scale {self.logit_scale}, "
                f"protocol {self.protocol}) than these ({other.activation}, scale {other.logit_scale}, protocol "
                f"{other.protocol})",
                hint=hint,
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**dataclasses.asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`."""
        given = dict(values)
        space = given.pop("space", None)
        return cls(**{**given, "labels": tuple(given["labels"]), "space": Space.from_dict(space) if space else None})


def prompts_digest(prompts: PromptSet) -> str:
    """Return a short hash that changes with any prompt, way or label, and with their order."""
    labels = prompts.to_dict()["labels"]
    return digest_of([[name, labels[name]] for name in prompts.names])


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """What a classifier said about rows, and what is true of them.

    Attributes:
        scores: float64 (rows, labels), finite: log-odds of each label, or logits of classes that exclude each other.
        truth: float64, same shape: 1, 0 or NaN (not labelled); a labelled row of classes has exactly one 1.
        groups: Patient of each row.
        ids: One per row.
        origin: The classifier.
    """

    scores: Floats
    truth: Floats
    groups: tuple[str, ...]
    ids: tuple[str, ...]
    origin: Origin

    def __post_init__(self) -> None:
        scores, truth = np.asarray(self.scores, dtype=np.float64), np.asarray(self.truth, dtype=np.float64)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "truth", truth)
        wanted = (len(self.ids), len(self.origin.labels))
        if scores.shape != wanted or truth.shape != wanted or len(self.groups) != wanted[0]:
            raise InputError(
                f"scores have shape {scores.shape}, truth {truth.shape}, with {len(self.groups)} groups; expected {wanted}"
            )
        bad = int((~np.isfinite(scores)).sum())
        if bad:
            raise InputError(f"{bad} of {scores.size} scores are not finite", hint="leave out rows without a score")
        if self.origin.mode == "single":
            known = ~np.isnan(truth).any(axis=1)
            if (truth[known].sum(axis=1) != 1).any() or (
                np.isnan(truth).any(axis=1) != np.isnan(truth).all(axis=1)
            ).any():
                raise InputError("each labelled row of classes that exclude each other needs exactly one true class")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> NDArray[np.int64]:
        """(rows,) column of the true class, -1 where not labelled; for ``single`` mode."""
        known = ~np.isnan(self.truth).any(axis=1)
        return np.where(known, np.nan_to_num(self.truth).argmax(axis=1), -1).astype(np.int64)

    @property
    def uncalibrated(self) -> Floats:
        """(rows, labels) probabilities as the classifier states them."""
        return softmax(self.scores) if self.origin.mode == "single" else sigmoid(self.scores)

    def select(self, rows: NDArray[np.intp]) -> ScoredRows:
        """Return these rows."""
        return ScoredRows(
            self.scores[rows],
            self.truth[rows],
            tuple(self.groups[int(i)] for i in rows),
            tuple(self.ids[int(i)] for i in rows),
            self.origin,
        )


def deal_patients(groups: Sequence[str], share: float, *, seed: int = 0) -> NDArray[np.bool_]:
    """Return which rows are of the patients that a share of them was drawn to; no patient is cut.

    Args:
        groups: Patient of each row.
        share: Of the patients, in (0, 1); at least one on each side.
        seed: Of the draw, which does not depend on the order of the rows.

    Raises:
        InputError: For fewer than two patients, or a share outside (0, 1).
    """
    clusters = Clusters(groups)
    if not 0 < share < 1:
        raise InputError(f"a share of patients must lie between 0 and 1, got {share}")
    if clusters.count < 2:
        raise InputError(f"{clusters.count} patient cannot be dealt into two parts", hint="name the column of patients")
    taken = min(max(round(share * clusters.count), 1), clusters.count - 1)
    drawn = np.random.default_rng([seed, 7]).permutation(clusters.count)[:taken]
    return np.asarray(np.isin(clusters.of_row, drawn), dtype=bool)


def choose_parts(
    parts: Sequence[str | None],
    groups: Sequence[str],
    *,
    fit: str | None = None,
    test: str | None = None,
    share: float = 0.5,
    seed: int = 0,
) -> tuple[NDArray[np.intp], NDArray[np.intp], str]:
    """Return the rows to fit on, the rows to judge on, and in words how they were told apart.

    Args:
        parts: The split of each row, None where unknown.
        groups: Patient of each row.
        fit: Name of the part to fit on; None: ``val`` or the like, where there is such a part.
        test: Name of the part to judge on; None: ``test``.
        share: Of the patients, to fit on, where the rows have no such parts. Rows of ``train`` are left out of that draw
            where other patients remain: the classifier may have learned from them.
        seed: Of that draw.

    Raises:
        InputError: For one name without the other, or a part that no row has.
        LeakageError: When a patient is in both parts.
    """
    if (fit is None) != (test is None):
        raise InputError("name both the part to fit on and the part to judge on, or none of them",
                         hint="--fit-split val --test-split test")  # fmt: skip
    known = {p for p in parts if p is not None}
    fit = fit or next((p for p in FIT_PARTS if p in known), None)
    test = test or next((p for p in TEST_PARTS if p in known), None)
    if fit is None or test is None:
        return _deal(parts, groups, share, seed)
    for name in (fit, test):
        if name not in known:
            raise InputError(f"no row has split `{name}`", hint=f"splits: {', '.join(sorted(known)) or 'none'}")
    place = np.array([p or "" for p in parts])
    fitting, judging = np.flatnonzero(place == fit), np.flatnonzero(place == test)
    check_disjoint([groups[int(i)] for i in fitting], [groups[int(i)] for i in judging])
    return fitting, judging, f"fitted on `{fit}`, judged on `{test}`"


def _deal(
    parts: Sequence[str | None], groups: Sequence[str], share: float, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], str]:
    """Return the parts of a random draw of patients, those that a model may have learned from left out."""
    learned = {group for part, group in zip(parts, groups, strict=True) if part in TRAIN_PARTS}
    kept = np.array([group not in learned for group in groups], dtype=bool)
    said = f"{share:.0%} of the patients drawn at random, seed {seed}"
    if learned and len(set(groups) - learned) >= 2:
        said += f"; {len(learned)} patients of the training split left out"
    else:
        kept[:] = True
    rows = np.flatnonzero(kept)
    chosen = deal_patients([groups[int(i)] for i in rows], share, seed=seed)
    return rows[chosen], rows[~chosen], said


def check_disjoint(fitted: Sequence[str], tested: Sequence[str]) -> None:
    """Raise when a patient is on both sides.

    Raises:
        LeakageError: The message counts them and names none.
    """
    both = set(fitted) & set(tested)
    if both:
        raise LeakageError(
            f"{len(both)} patients are in the validation rows and in the test rows; what is fitted on a patient cannot be "
            "judged on that patient",
            hint="split by patient",
        )


def rows_of(result: ZeroShotResult, truth: Floats) -> ScoredRows:
    """Return the scores of a zero-shot result with their truth.

    Args:
        result: Its logits are taken.
        truth: (images, labels) 1, 0 or NaN (not labelled).
    """
    return ScoredRows(result.logits, truth, result.groups, result.ids, Origin.of(result))
