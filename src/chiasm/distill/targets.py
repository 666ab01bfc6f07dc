"""The text embeddings that each arm's images learn to predict: given ones, and the two controls made from them.

Comes in: vectors of the paired reports (and of prompts, own reports, labels, where there are). Goes out:
:class:`Targets` of an arm. Controls are drawn with a seed; nothing here sees a label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.distill.arms import TargetKind
from chiasm.distill.problem import Targets
from chiasm.errors import InputError


@dataclass(frozen=True)
class ReportIds:
    """Which reports make up each row's target.

    Attributes:
        ids: (n, k), report ids or rows of the corpus; -1 or the empty string where there is none.
        weights: (n, k), their weights; None: equal.
    """

    ids: NDArray[np.generic]
    weights: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class TextSources:
    """All text that a problem has.

    Attributes:
        given: Targets by kind: ``pairs``, and where there are, ``own``, ``prompts``, ``label``.
        train_reports: Of ``pairs``; None: no ``random``.
        validation_reports: The same for validation.
    """

    given: Mapping[str, Targets] = field(default_factory=dict)
    train_reports: ReportIds | None = None
    validation_reports: ReportIds | None = None


def make_targets(
    train: ArrayLike,
    validation: ArrayLike,
    train_mask: ArrayLike | None = None,
    validation_mask: ArrayLike | None = None,
) -> Targets:
    """Return targets of given vectors, brought to unit length.

    Args:
        train: (n, dim).
        validation: (m, dim).
        train_mask: (n,), False where an image has no text; None: all have one.
        validation_mask: (m,).

    Raises:
        InputError: Shapes that do not fit, or a vector that stands for a text and is zero or not a number.
    """
    rows, masks = [], []
    for name, vectors, mask in (("train", train, train_mask), ("validation", validation, validation_mask)):
        values = np.array(vectors, dtype=np.float32)
        if values.ndim != 2:
            raise InputError(f"text vectors of {name} must have shape (rows, dim), got {values.shape}")
        has = np.ones(len(values), dtype=bool) if mask is None else np.array(mask, dtype=bool)
        if has.shape != (len(values),):
            raise InputError(f"the mask of {name} must have shape ({len(values)},), got {has.shape}")
        length = np.linalg.norm(values.astype(np.float64), axis=1)
        if not (np.isfinite(length[has]) & (length[has] > 0)).all():
            raise InputError(f"text vectors of {name} contain zeros or what is not a number")
        values[~has] = 0
        length[~has] = 1
        rows.append((values / length[:, None]).astype(np.float32))
        masks.append(has)
    if rows[0].shape[1] != rows[1].shape[1]:
        raise InputError(f"text vectors have {rows[0].shape[1]} dimensions in train, {rows[1].shape[1]} in validation")
    return Targets(rows[0], rows[1], masks[0], masks[1], _digest(*rows, *masks))


def shuffled(targets: Targets, *, seed: int) -> Targets:
    """Return the same texts dealt out at random, within training and within validation images; masks move along.

    Validation is dealt out, too: the right texts there would help to choose weights.
    """
    train = np.random.default_rng([seed, 11]).permutation(len(targets.train))
    held_out = np.random.default_rng([seed, 12]).permutation(len(targets.validation))
    rows = targets.train[train], targets.validation[held_out]
    masks = targets.train_mask[train], targets.validation_mask[held_out]
    return Targets(*rows, *masks, _digest(*rows, *masks))


def random_text(targets: Targets, train: ReportIds, validation: ReportIds, *, seed: int) -> Targets:
    """Return targets in which every report's embedding is one random unit vector of its own; who has which stays.

    A report's vector depends on ``seed`` and its id alone. Several reports of a row are averaged by their weights.

    Raises:
        InputError: Ids that do not fit the targets.
    """
    vectors: dict[str, NDArray[np.float64]] = {}

    def vector(name: str) -> NDArray[np.float64]:
        if name not in vectors:
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            drawn = np.random.default_rng([seed, 13, number]).standard_normal(targets.dim)
            vectors[name] = drawn / np.linalg.norm(drawn)
        return vectors[name]

    def of_rows(reports: ReportIds, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        ids = np.asarray(reports.ids)
        ids = ids[:, None] if ids.ndim == 1 else ids
        weights = np.ones(ids.shape) if reports.weights is None else np.asarray(reports.weights).reshape(ids.shape)
        if len(ids) != len(mask):
            raise InputError(f"{len(ids)} rows of report ids do not fit {len(mask)} targets")
        found = np.zeros((len(ids), targets.dim))
        for row, column in np.argwhere(weights != 0):
            name = str(ids[row, column])
            if mask[row] and name not in ("-1", ""):
                found[row] += weights[row, column] * vector(name)
        return found

    return make_targets(
        of_rows(train, targets.train_mask),
        of_rows(validation, targets.validation_mask),
        targets.train_mask,
        targets.validation_mask,
    )


def targets_of(kind: TargetKind, sources: TextSources, *, seed: int) -> Targets | None:
    """Return the targets of an arm's kind; None for ``none``.

    Raises:
        InputError: The problem has no such text.
    """
    if kind == "none":
        return None
    found = sources.given.get("pairs" if kind in ("shuffled", "random") else kind)
    if found is None:
        raise InputError(f"there are no text vectors of the kind `{kind}`")
    if kind == "shuffled":
        return shuffled(found, seed=seed)
    if kind == "random":
        if sources.train_reports is None or sources.validation_reports is None:
            raise InputError("random text needs to know which report is paired with which image")
        return random_text(found, sources.train_reports, sources.validation_reports, seed=seed)
    return found


def _digest(*arrays: NDArray[np.generic]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(str((array.dtype.str, array.shape)).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:12]
