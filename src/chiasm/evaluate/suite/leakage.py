"""What a suite's numbers may owe to having been seen before: across parts, in other data sets, in a model's training.

In: rows, vectors and what is known about models. Out: a frozen :class:`DataLeakage` a data set and :class:`Exposure` a
model and data set. Counts only: no id leaves this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.config import read_toml
from chiasm.data.splits import check_leakage
from chiasm.encoders.advice import find_overlap
from chiasm.encoders.facts import find_original, load_facts
from chiasm.errors import ConfigError
from chiasm.evaluate.suite.rows import DataRows
from chiasm.evaluate.suite.settings import ModelEntry, expanded
from chiasm.types import Embeddings


@dataclass(frozen=True)
class DataLeakage:
    """What crosses the parts of one data set.

    Attributes:
        data: Its key.
        parts: Part -> (rows, patients).
        counts: Kind (patient, image, near-duplicate image ...) -> how many are in several parts.
        test_rows: Test rows that are part of such a leak.
        images: Images that were compared; 0: images were not opened.
        known_patients: Whether rows name a patient, slide or study; otherwise each row counts as a patient.
    """

    data: str
    parts: Mapping[str, tuple[int, int]]
    counts: Mapping[str, int]
    test_rows: int
    images: int
    known_patients: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataLeakage:
        """Rebuild from :meth:`to_dict`."""
        return cls(**{**values, "parts": {k: (int(a), int(b)) for k, (a, b) in values["parts"].items()}})


@dataclass(frozen=True)
class Exposure:
    """What a model may have seen of a data set.

    Attributes:
        model: Its key.
        data: Key of the data set.
        level: ``same data``, ``same hospital``, ``none known`` or ``unknown``.
        reason: In words.
        near: Test rows whose vector lies nearer than the stated cosine to a training row of another patient; None where
            there are no training rows or the model was not run.
        cosine: That cosine.
    """

    model: str
    data: str
    level: str
    reason: str
    near: int | None
    cosine: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def find_leakage(rows: DataRows, *, near_duplicates: bool) -> DataLeakage:
    """Look for ids, patients, studies, slides and pictures that lie in several parts of a data set."""
    parts = {p: rows.rows_of(p) for p in ("train", "val", "test")}
    parts = {p: found for p, found in parts.items() if len(found)}
    by_part = {p: [rows.samples[int(i)] for i in found] for p, found in parts.items()}
    report = check_leakage(by_part, near_duplicates=near_duplicates, refuse=False)
    return DataLeakage(
        rows.name,
        {p: (len(found), len({s.group for s in by_part[p]})) for p, found in parts.items()},
        {str(kind): n for kind, n in report.counts().items()},
        len(report.rows("test")),
        report.images,
        any(s.patient or s.slide or s.study for s in rows.samples),
    )


def find_exposure(
    name: str, entry: ModelEntry, rows: DataRows, images: Embeddings | None, *, near_cosine: float
) -> Exposure:
    """Say what a model may have seen of a data set.

    The owner's word (``trained_on``) and the recipe beside a model that chiasm trained come first, then the facts on
    published models (``chiasm models``), compared with ``known_as`` of the data.
    """
    level, reason = _history(entry, rows)
    near = None if images is None else near_rows(rows, images, near_cosine)
    return Exposure(name, rows.name, level, reason, near, near_cosine)


def near_rows(rows: DataRows, images: Embeddings, cosine: float) -> int | None:
    """Return how many test rows have a training or validation row of another patient at this cosine or nearer."""
    place = {s.id: i for i, s in enumerate(rows.samples)}
    parts = np.asarray([rows.parts[place[i]] or "" for i in images.ids])
    test, other = np.flatnonzero(parts == "test"), np.flatnonzero(np.isin(parts, ("train", "val")))
    if not len(test) or not len(other):
        return None
    unit = images.normalize().vectors
    groups = np.asarray(images.groups)
    found = 0
    for start in range(0, len(test), 512):
        block = test[start : start + 512]
        near: NDArray[np.bool_] = unit[block] @ unit[other].T >= cosine
        near &= groups[block][:, None] != groups[other][None]
        found += int(near.any(axis=1).sum())
    return found


def _history(entry: ModelEntry, rows: DataRows) -> tuple[str, str]:
    if entry.floor is not None:
        return "none known", "It was trained on nothing."
    if rows.name in entry.trained_on:
        return "same data", "Its owner says that it was trained on this data set."
    try:
        source = expanded(entry.source or "", "models.source")
    except ConfigError:  # a variable that is not set: its cells say so
        source = entry.source or ""
    if (told := _recipe_says(Path(source), rows)) is not None:
        return told
    name = entry.catalog or source
    name = find_original(name) or name
    if name not in load_facts():
        return "unknown", "Nobody has said what it was trained on (`trained_on`, or `catalog` for known weights)."
    if not rows.entry.known_as:
        return "unknown", "The data set has no public name (`known_as`), so training data cannot be compared with it."
    overlap = find_overlap(name, rows.entry.known_as)
    return overlap.short, overlap.reason


def _recipe_says(model: Path, rows: DataRows) -> tuple[str, str] | None:
    """Return what the recipe in a model folder of chiasm tells of its training data, if there is one."""
    recipe = model / "recipe.toml"
    if not recipe.is_file():
        return None
    try:
        data = read_toml(recipe).get("data", {})
        trained = Path(expanded(str(data.get("source", "")), "data.source"))
        tested = Path(expanded(rows.entry.source, "data.source"))
    except ConfigError:
        return None
    if data.get("phantoms"):
        return "none known", f"Its recipe names synthetic images alone (phantoms of {data['phantoms']})."
    if not data.get("source"):
        return None
    if trained.resolve() != tested.resolve():
        return "unknown", "It was trained by chiasm on another table; whether patients are shared is not known."
    seen = {*data.get("train_splits", ()), *data.get("validation_splits", ())}
    tested_splits = {s.split for s, part in zip(rows.samples, rows.parts, strict=True) if part == "test"}
    if seen and None not in tested_splits and not seen & tested_splits:
        return "same data, other split", "Its recipe names this table, but not the split that is tested here."
    return "same data", "The recipe in its folder names this very table, and does not leave out the tested rows."
