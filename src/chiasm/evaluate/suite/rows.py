"""One data set of a suite, read and cut into parts: who is tested, on what truth, in which groups.

In: a :class:`DataEntry`. Out: a frozen :class:`DataRows` with digests of images, identity, truth and parts, which the
keys of cells are made of. Nothing here knows a model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.data.splits import split_by_group
from chiasm.datasets import Columns, open_dataset
from chiasm.datasets.columns import plain_name
from chiasm.datasets.named import cautions_of
from chiasm.errors import InputError
from chiasm.evaluate.suite.settings import DataEntry, expanded
from chiasm.evaluate.truth import truth_columns
from chiasm.io.manifest import Rejected
from chiasm.metrics.labels import as_binary
from chiasm.types import LabelValue, Sample, digest_of

Floats = NDArray[np.float64]
#: Columns that are compared without being named.
SUBGROUP_NAMES = {
    "sex": ("sex", "gender", "patientgender", "patientsex"),
    "age": ("age", "patientage", "ageyears"),
    "view": ("view", "viewposition", "projection"),
    "site": ("site", "hospital", "institution", "center", "centre", "scanner", "manufacturer"),
}
#: Where ages are cut unless the suite says otherwise, in years.
AGE_BANDS = (18.0, 40.0, 60.0, 75.0)


@dataclass(frozen=True, eq=False)
class DataRows:
    """The rows of a data set.

    Attributes:
        name: Its key in the suite.
        entry: What the suite says of it.
        samples: One a row.
        rejected: Rows of the table that could not be used.
        parts: ``train``, ``val``, ``test`` or None (in no part) of each row.
        truth: (n, labels) 1, 0 or NaN (not labelled).
        mode: ``single`` or ``multi``.
        subgroups: Column -> group of each row, None where unknown.
        digests: Of ``images``, ``rows`` (ids and groups), ``truth`` and ``parts``.
        cautions: What a reader of a result on this data must know.
    """

    name: str
    entry: DataEntry
    samples: tuple[Sample, ...]
    rejected: tuple[Rejected, ...]
    parts: tuple[str | None, ...]
    truth: Floats
    mode: str
    subgroups: dict[str, tuple[str | None, ...]]
    digests: dict[str, str]
    cautions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns of the truth."""
        return self.entry.labels

    @property
    def groups(self) -> tuple[str, ...]:
        """The patient (or slide, study, id) of each row."""
        return tuple(s.group for s in self.samples)

    @property
    def has_text(self) -> bool:
        """Whether some row has a text."""
        return any(s.text for s in self.samples)

    def rows_of(self, part: str) -> NDArray[np.int64]:
        """Return the rows of a part."""
        return np.flatnonzero(np.asarray([p == part for p in self.parts], dtype=bool)).astype(np.int64)


def read_rows(name: str, entry: DataEntry, *, seed: int) -> DataRows:
    """Open a data set and cut it into parts.

    Args:
        name: Key in the suite.
        entry: What the suite says of it.
        seed: Of ``fractions``.

    Raises:
        ChiasmError: The data cannot be read, a column or a label is absent, or a part is empty.
    """
    where = f"data.{name}"
    source = expanded(entry.source, f"{where}.source")
    root = None if entry.root is None else expanded(entry.root, f"{where}.root")
    named: dict[str, Any] = dict(entry.columns)
    columns = Columns(**named) if named else None
    data = open_dataset(source, columns=columns, root=root, require=("image",))
    samples = _without_texts(data.samples, entry.drop_texts, where)
    if len({s.id for s in samples}) < len(samples):
        raise InputError(f"ids of data set `{name}` are repeated", hint="name a column of unique ids: columns.id")
    truth = np.zeros((len(samples), 0))
    if entry.truth is not None:
        found = truth_columns(samples, entry.truth, entry.labels)
        truth = np.stack([as_binary(list(found[label])) for label in entry.labels], axis=1)
    mode = entry.resolved_mode
    if mode == "single" and truth.shape[1]:
        several = int((np.nansum(truth, axis=1) > 1).sum())
        if several:
            raise InputError(
                f"{several} rows of data set `{name}` have several of the labels, which exclude each other",
                hint='mode = "multi" lets any number be true',
            )
        truth[np.nansum(truth, axis=1) != 1] = np.nan  # of none of the classes: not labelled
    parts = _parts(entry, samples, truth, seed, name)
    subgroups = _subgroups(entry, samples, name)
    alone = [column for column in (*(entry.subgroups or ()), *entry.bands) if column not in subgroups]
    cautions = (*cautions_of(source), *(f"Column `{c}` has one group only: nothing is compared by it." for c in alone))
    return DataRows(
        name, entry, samples, data.rejected, parts, truth, mode, subgroups,
        _digests(samples, truth, parts, mode, entry.labels), cautions,
    )  # fmt: skip


def _without_texts(samples: tuple[Sample, ...], patterns: Sequence[str], where: str) -> tuple[Sample, ...]:
    """Return the samples, those whose text matches a pattern without a text."""
    if not patterns:
        return samples
    try:
        found = [re.compile(p, re.IGNORECASE) for p in patterns]
    except re.error as error:
        raise InputError(f"`{where}.drop_texts` holds no regular expression: {error}") from error
    return tuple(replace(s, text=None) if s.text and any(f.search(s.text) for f in found) else s for s in samples)


def _parts(entry: DataEntry, samples: Sequence[Sample], truth: Floats, seed: int, name: str) -> tuple[str | None, ...]:
    if entry.fractions:
        stratify: list[LabelValue] | None = None
        if truth.shape[1]:
            # By the first label that is true; -1: none is.
            stratify = [None if np.isnan(r).all() else int((r == 1).argmax()) if (r == 1).any() else -1 for r in truth]
        return tuple(split_by_group([s.group for s in samples], entry.fractions, seed=seed, stratify=stratify))
    if entry.split:
        names = {value: part for part, value in entry.split.items()}
        parts = tuple(names.get(s.split or "") for s in samples)
        for value, part in names.items():
            if part not in parts:
                known = ", ".join(sorted({s.split for s in samples if s.split})) or "none"
                raise InputError(f"no row of data set `{name}` has split `{value}`", hint=f"splits: {known}")
        return parts
    known_parts = {"train": "train", "val": "val", "valid": "val", "dev": "val", "test": "test"}
    given = tuple(known_parts.get((s.split or "").casefold()) for s in samples)
    return given if "test" in given else tuple("test" for _ in samples)


def _subgroups(entry: DataEntry, samples: Sequence[Sample], name: str) -> dict[str, tuple[str | None, ...]]:
    known = list(dict.fromkeys(k for s in samples for k in s.labels))
    kinds = {column: kind for kind, names in SUBGROUP_NAMES.items() for column in known if plain_name(column) in names}
    wanted = list(entry.subgroups) if entry.subgroups is not None else [*kinds]
    wanted += [column for column in entry.bands if column not in wanted]
    found: dict[str, tuple[str | None, ...]] = {}
    for column in wanted:
        if column not in known:
            raise InputError(
                f"data set `{name}` has no column `{column}` to compare groups by",
                hint=f"columns: {', '.join(sorted(known)) or 'none'}",
            )
        values = [s.labels.get(column) for s in samples]
        cuts = entry.bands.get(column) or (AGE_BANDS if kinds.get(column) == "age" else ())
        if cuts and not any(_band(v, cuts) for v in values):
            if column in entry.bands:
                raise InputError(f"column `{column}` of data set `{name}` holds no numbers to cut into bands")
            cuts = ()  # ages that are bands already
        groups = tuple(_band(v, cuts) if cuts else _plain(v) for v in values)
        if len({g for g in groups if g is not None}) > 1:
            found[column] = groups
    return found


def _plain(value: LabelValue) -> str | None:
    text = "" if value is None else str(value).strip()
    return text or None


def _band(value: LabelValue, cuts: Sequence[float]) -> str | None:
    """Return the band of a number, such as ``40 to 60``: at least the first, below the second."""
    try:
        number = float(str(value).strip().rstrip("Yy"))
    except ValueError:
        return None
    if not np.isfinite(number):
        return None
    place = int(np.searchsorted(np.asarray(cuts), number, side="right"))
    if place == 0:
        return f"under {cuts[0]:g}"
    return f"{cuts[-1]:g} and over" if place == len(cuts) else f"{cuts[place - 1]:g} to {cuts[place]:g}"


def _digests(
    samples: Sequence[Sample], truth: Floats, parts: Sequence[str | None], mode: str, labels: Sequence[str]
) -> dict[str, str]:
    images = hashlib.sha256()
    for sample in samples:
        images.update(sample.id.encode() + b"\0" + _content(sample.image))
    texts = hashlib.sha256("\0".join(s.text or "" for s in samples).encode()).hexdigest()
    rows = [[s.id, s.group] for s in samples]
    return {
        "images": images.hexdigest()[:24],
        "texts": texts[:24],
        "rows": digest_of(rows, 24),
        "truth": digest_of([mode, list(labels), hashlib.sha256(truth.astype("<f8").tobytes()).hexdigest()], 24),
        "parts": digest_of(list(parts), 24),
    }


def _content(path: Path | None) -> bytes:
    """Return a hash of a file's bytes; of an image inside a package, of its name, the package's size and its time."""
    if path is None:
        return b""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    package = next((p for p in path.parents if p.is_file()), None)
    stated = (str(path), *(package.stat()[6:9:2] if package is not None else ()))
    return hashlib.sha256(repr(stated).encode()).digest()
