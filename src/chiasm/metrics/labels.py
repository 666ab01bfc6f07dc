"""Truth as people store it, with gaps, to arrays: what is labelled, what is not, and what cannot be a label.

Comes in: lists or arrays of labels in which None or NaN stands for "not labelled" (never for "negative").
Goes out: clean arrays and the mask of the labelled rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


def as_binary(truth: ArrayLike | Sequence[object]) -> Floats:
    """Return labels as 0, 1 or NaN (not labelled), keeping the shape.

    Args:
        truth: 0/1, booleans, or None/NaN.

    Raises:
        InputError: For any other value; the message names how many, not which.
    """
    given = truth if isinstance(truth, np.ndarray) else np.asarray(truth, dtype=object)
    try:
        if given.dtype == object:
            plain = [np.nan if is_missing(v) else float(v) for v in given.ravel()]
            values = np.array(plain, dtype=np.float64).reshape(given.shape)
        else:
            values = given.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            "labels must be 0, 1 or missing; got text", hint="map the names of labels to 0 and 1"
        ) from error
    wrong = ~(np.isnan(values) | (values == 0) | (values == 1))
    if wrong.any():
        raise InputError(
            f"labels must be 0, 1 or missing (NaN); {int(wrong.sum())} of {wrong.size} are something else",
            hint="decide what an uncertain label such as -1 means before scoring",
        )
    return values


def as_scores(scores: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """Return scores as float64 of the given shape.

    Raises:
        InputError: When the shape differs, or a score is NaN (infinite scores have a rank and are kept).
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != shape:
        raise InputError(f"there are scores of shape {values.shape} for labels of shape {shape}")
    missing = int(np.isnan(values).sum())
    if missing:
        raise InputError(f"{missing} of {values.size} scores are NaN", hint="leave out the rows that have no score")
    return values


def as_classes(*columns: Sequence[Any] | NDArray[Any]) -> tuple[NDArray[np.int64], ...]:
    """Number the values of columns of class names or numbers together: equal values get equal numbers, missing ones −1.

    Args:
        columns: Of equal length; None and NaN are missing.

    Returns:
        One array of integers a column, numbered in sorted order over all columns.

    Raises:
        InputError: When lengths differ, or numbers and text are mixed.
    """
    lengths = {len(c) for c in columns}
    if len(lengths) != 1:
        raise InputError(f"columns of labels have different lengths: {', '.join(str(len(c)) for c in columns)}")
    plain = [[None if is_missing(v) else _plain(v) for v in c] for c in columns]
    try:
        known = sorted({v for c in plain for v in c if v is not None})
    except TypeError as error:
        raise InputError("labels mix numbers and text", hint="use one kind for truth and prediction") from error
    number = {v: i for i, v in enumerate(known)}
    return tuple(np.array([-1 if v is None else number[v] for v in c], dtype=np.int64) for c in plain)


def as_probabilities(probabilities: ArrayLike) -> Floats:
    """Return class probabilities as float64 of shape (n, classes).

    Args:
        probabilities: (n, classes), or (n,) as the probability of class 1 of two. Rounding of
            float32 (1e-6 beyond 0 or 1) is cut off; nothing is rescaled.

    Raises:
        InputError: For another shape, fewer than two classes, values outside [0, 1] or NaN, or rows whose sum is
            more than 0.001 off 1.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if values.ndim == 1:
        values = np.stack([1 - values, values], axis=1)
    if values.ndim != 2 or values.shape[1] < 2:
        raise InputError(f"probabilities must have shape (rows, classes) with two classes or more, got {values.shape}")
    outside = int((~((values >= -1e-6) & (values <= 1 + 1e-6))).any(axis=1).sum())
    if outside:
        raise InputError(
            f"{outside} of {len(values)} rows of probabilities have a value outside [0, 1] or NaN",
            hint="give the softmax of the logits, not the logits",
        )
    off = int((np.abs(values.sum(axis=1) - 1) > 1e-3).sum())
    if off:
        raise InputError(
            f"{off} of {len(values)} rows of probabilities do not sum to 1",
            hint="give one probability for each class of a single-label task",
        )
    return np.clip(values, 0.0, 1.0)


def as_class_numbers(truth: ArrayLike | Sequence[object], n_classes: int) -> NDArray[np.int64]:
    """Return true classes as numbers of probability columns, 0 to ``n_classes`` - 1; None and NaN become -1.

    Raises:
        InputError: For text, fractions and numbers that are no column; the message says how many, not which.
    """
    plain = [np.nan if is_missing(v) else v for v in np.asarray(truth, dtype=object).ravel()]
    try:
        values = np.array(plain, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            "true classes must be numbers of columns; got text", hint="number the classes 0, 1, …"
        ) from error
    missing = np.isnan(values)
    wrong = ~missing & ~((values >= 0) & (values < n_classes) & (values == np.floor(values)))
    if wrong.any():
        raise InputError(
            f"true classes must be 0 to {n_classes - 1}, one for each column of probabilities; "
            f"{int(wrong.sum())} of {values.size} are something else"
        )
    return np.where(missing, -1, values).astype(np.int64)


def is_labelled(truth: ArrayLike | Sequence[object]) -> Booleans:
    """Return which rows of a column have a label (are neither None nor NaN)."""
    return np.array([not is_missing(v) for v in np.asarray(truth, dtype=object).ravel()], dtype=bool)


def is_missing(value: Any) -> bool:
    """Return whether a value stands for "not labelled": None or NaN."""
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _plain(value: Any) -> Any:
    """Return a label as a plain Python value."""
    return value.item() if isinstance(value, np.generic) else value
