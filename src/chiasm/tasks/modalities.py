"""Rows seen by several modalities: image and text embeddings and clinical columns side by side, some of them missing.

Comes in: :class:`~chiasm.types.Embeddings` of images and of texts, and columns of a table, matched by id. Goes out:
:class:`Modalities`, one matrix a modality. A row that a modality lacks is NaN throughout there; a clinical value that is
missing is NaN alone. Nothing is filled in here: that is learned from training rows (``tasks/fusion.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.labels import is_missing
from chiasm.types import Embeddings, LabelValue

Matrix = NDArray[np.float64]

#: A column of words with more different values than this is no category.
MOST_CATEGORIES = 12
#: Words of tables that mean "not stated".
BLANKS = ("", "nan", "n/a", "na", "none", "unknown", "?")


@dataclass(frozen=True, eq=False)
class Modalities:
    """What is known of each row, by modality.

    Attributes:
        blocks: Name -> (n, numbers); NaN is missing.
        ids: One per row.
        columns: Name -> what each number of a block is called, where it has a name.
    """

    blocks: Mapping[str, Matrix]
    ids: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.blocks:
            raise InputError("there is no modality to fuse", hint="give images, texts or clinical columns")
        for name, block in self.blocks.items():
            if block.ndim != 2 or len(block) != len(self.ids):
                raise InputError(f"modality `{name}` has shape {block.shape} for {len(self.ids)} rows")
            if np.isinf(block).any():
                raise InputError(f"modality `{name}` holds infinite numbers")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def names(self) -> tuple[str, ...]:
        """Modalities, in their order."""
        return tuple(self.blocks)

    def present(self, name: str) -> NDArray[np.bool_]:
        """Return which rows have anything of a modality, (n,)."""
        return ~missing_rows(self.blocks[name])

    def select(self, rows: ArrayLike) -> Modalities:
        """Return the rows given by an index array or a boolean mask."""
        index = np.arange(len(self))[np.asarray(rows)]
        blocks = {name: block[index] for name, block in self.blocks.items()}
        return Modalities(blocks, tuple(self.ids[int(i)] for i in index), self.columns)

    def only(self, *names: str) -> Modalities:
        """Return some of the modalities."""
        return Modalities({n: self.blocks[n] for n in names}, self.ids, self.columns)

    def without(self, name: str) -> Modalities:
        """Return the same rows as if one modality had not been taken: NaN throughout."""
        blocks = {n: np.full_like(b, np.nan) if n == name else b for n, b in self.blocks.items()}
        return Modalities(blocks, self.ids, self.columns)


def make_modalities(
    ids: Sequence[str],
    *,
    images: Embeddings | None = None,
    texts: Embeddings | None = None,
    clinical: Mapping[str, Sequence[LabelValue]] | None = None,
) -> Modalities:
    """Return the modalities of some rows, matched by id.

    Args:
        ids: Rows wanted, in order.
        images: Image embeddings; rows that they lack are missing.
        texts: Text embeddings, of the same or of another space: they are never compared with the images.
        clinical: Column -> one value per row of ``ids``; see :func:`encode_clinical`.

    Raises:
        InputError: A side that has none of the rows, a row twice, or a column that cannot be encoded.
    """
    blocks: dict[str, Matrix] = {}
    columns: dict[str, tuple[str, ...]] = {}
    for name, side in (("image", images), ("text", texts)):
        if side is not None:
            blocks[name] = _aligned(ids, side, name)
    if clinical:
        blocks["clinical"], columns["clinical"] = encode_clinical(clinical)
    return Modalities(blocks, tuple(ids), columns)


def encode_clinical(columns: Mapping[str, Sequence[LabelValue]]) -> tuple[Matrix, tuple[str, ...]]:
    """Return clinical columns as numbers: measures as they are, words as one 0/1 number per category.

    A category is named by its word in lower case; the categories are those that occur, in order, so no label enters.
    Blank words and None are missing.

    Args:
        columns: Name -> one value a row.

    Returns:
        (n, numbers) with NaN where nothing is known, and the numbers' names (``age``, ``sex=f``).

    Raises:
        InputError: A column without values, or a column of words with more than ``MOST_CATEGORIES`` of them.
    """
    parts: list[Matrix] = []
    names: list[str] = []
    for name, values in columns.items():
        known = [None if is_blank(v) else v for v in values]
        if all(v is None for v in known):
            raise InputError(f"clinical column `{name}` has no value", hint="leave it out")
        numbers = [_number(v) for v in known]
        if all(v is None or x is not None for v, x in zip(known, numbers, strict=True)):
            parts.append(np.array([[math.nan if x is None else x] for x in numbers]))
            names.append(name)
            continue
        words = [None if v is None else str(v).strip().lower() for v in known]
        categories = sorted({w for w in words if w is not None})
        if len(categories) > MOST_CATEGORIES:
            raise InputError(
                f"clinical column `{name}` has {len(categories)} different words, expected at most {MOST_CATEGORIES}",
                hint="free text belongs to the text side; group the values, or leave the column out",
            )
        one_hot = [[math.nan if w is None else float(w == c) for c in categories] for w in words]
        parts.append(np.array(one_hot))
        names += [f"{name}={c}" for c in categories]
    return np.concatenate(parts, axis=1), tuple(names)


def is_blank(value: LabelValue) -> bool:
    """Return whether a cell says nothing: None, NaN, or a word such as ``?`` or ``unknown``."""
    return is_missing(value) or str(value).strip().lower() in BLANKS


def missing_rows(block: Matrix) -> NDArray[np.bool_]:
    """Return which rows of a block are NaN throughout, (n,)."""
    return np.asarray(np.isnan(block).all(axis=1), dtype=np.bool_)


def _number(value: LabelValue) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _aligned(ids: Sequence[str], side: Embeddings, name: str) -> Matrix:
    place = {row: k for k, row in enumerate(side.ids)}
    if len(place) != len(side):
        raise InputError(f"{len(side) - len(place)} ids of the {name} embeddings occur twice")
    found = np.full((len(ids), side.dim), np.nan)
    rows = [place.get(i) for i in ids]
    here = [k for k, r in enumerate(rows) if r is not None]
    if not here:
        raise InputError(f"the {name} embeddings have none of the {len(ids)} rows", hint="both sides need the same ids")
    found[here] = side.vectors[[r for r in rows if r is not None]]
    return found
