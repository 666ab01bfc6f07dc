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


def is_labelled(truth: ArrayLike | Sequence[object]) -> Booleans:
    """Return which rows of a column have a label (are neither None nor NaN)."""
    return np.array([not is_missing(v) for v in np.asarray(truth, dtype=object).ravel()], dtype=bool)


def is_missing(value: Any) -> bool:
    """Return whether a value stands for "not labelled": None or NaN."""
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _plain(value: Any) -> Any:
    """Return a label as a plain Python value."""
    return value.item() if isinstance(value, np.generic) else value
