"""A table file to samples: CSV, TSV, JSON lines, JSON or Parquet with whatever column names the field uses.

Comes in: a path and, where detection is not enough, `Columns`. Goes out: a `Dataset` whose ``rejected`` lists every row
that could not be used. A blank label is None, "not labelled", never "negative"; CheXpert's -1 stays -1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

from chiasm.datasets.boxes import BOXES_NAME, read_boxes
from chiasm.datasets.columns import Columns, cell_text, is_unique, label_column, resolve_columns
from chiasm.datasets.dataset import Dataset, parse_template
from chiasm.datasets.images import image_exists, keep_decodable
from chiasm.datasets.parsing import RawTable, parse_table
from chiasm.errors import InputError
from chiasm.io.manifest import Rejected, summarize_rejected
from chiasm.types import Box, LabelValue, Sample

Part = Literal["image", "text"]


class _BadRow(Exception):
    """A row that becomes a `Rejected`."""


def load_table(
    path: str | Path,
    *,
    columns: Columns | None = None,
    root: str | Path | None = None,
    require: Sequence[Part] | None = None,
    on_bad_row: Literal["skip", "fail"] = "skip",
    check_images: bool = False,
) -> Dataset:
    """Read a table of images, texts and labels.

    Args:
        path: ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet``; separator and encoding are detected. A Parquet
            file may hold the bytes of its images.
        columns: What the columns mean, where detection is wrong or not wanted.
        root: Folder of relative image paths; the table's own by default.
        require: What a row must have to be used: an ``image`` whose file exists, a ``text`` that is not empty. None
            requires what the table has columns for; an empty tuple takes label tables without their images.
        on_bad_row: ``skip`` lists bad rows in ``Dataset.rejected``; ``fail`` raises at the first.
        check_images: Also decode every image, in threads.

    Returns:
        Samples in the order of the table, with the boxes of a ``boxes.json`` beside it. ``Dataset.columns`` tells what
        was detected. Ids are, in this order, the id column, the image path (``#2`` is added to a repeated one), a
        slide, study or patient that is unique, the row.

    Raises:
        InputError: The table is absent or empty, no row can be used, or a row is bad and ``on_bad_row`` is ``fail``.
        UnknownName: ``columns`` names a column that the table lacks.
        FileFormatError: The file is no such table.
    """
    path = Path(path)
    wanted = columns or Columns()
    table = parse_table(path, separator=wanted.separator, encoding=wanted.encoding)
    found = resolve_columns(wanted, table.header, table.values, path.name)
    found = replace(found, separator=table.separator, encoding=table.encoding)
    has: dict[Part, bool] = {"image": bool(found.image), "text": bool(found.text or found.template)}
    needed = [part for part in has if has[part]] if require is None else list(require)
    for part in needed:
        if not has[part]:
            raise InputError(
                f"table `{path.name}` has no {part} column",
                hint=f"name it: `--column {part}=NAME`, in Python `Columns({part}=...)`; or require less",
            )
    rows = _Rows(table, found, Path(root) if root is not None else path.parent, frozenset(needed))
    if (path.parent / BOXES_NAME).is_file() and found.image:
        rows.boxes = read_boxes(path.parent / BOXES_NAME)
    samples: list[tuple[int, Sample]] = []
    rejected = [Rejected(number, "", reason) for number, reason in table.bad]
    for place, (number, _) in enumerate(table.rows):
        try:
            samples.append((number, rows.sample(place)))
        except _BadRow as bad:
            rejected.append(Rejected(number, rows.ids[place], str(bad)))
    if check_images:
        samples, undecodable = keep_decodable(samples)
        rejected += undecodable
    rejected.sort(key=lambda r: r.row)
    check_rejected(rejected, kept=len(samples), name=path.name, on_bad_row=on_bad_row)
    return Dataset(tuple(s for _, s in samples), tuple(rejected), path.name, found)


def check_rejected(
    rejected: Sequence[Rejected], *, kept: int, name: str, on_bad_row: Literal["skip", "fail"] = "skip"
) -> None:
    """Raise when bad rows may not be skipped, or when nothing is left.

    Raises:
        InputError: A row is bad and ``on_bad_row`` is ``fail``, or ``kept`` is 0.
    """
    if on_bad_row not in ("skip", "fail"):
        raise InputError(f"on_bad_row must be `skip` or `fail`, got `{on_bad_row}`")
    if rejected and on_bad_row == "fail":
        raise InputError(
            f"row {rejected[0].row} of `{name}` cannot be used: {rejected[0].reason} ({len(rejected)} bad in all)",
            hint="repair the rows, or skip them: `--on-bad skip`, in Python `on_bad_row='skip'`",
        )
    if kept == 0:
        detail = f": {summarize_rejected(rejected)}" if rejected else ""
        missing = any(r.reason == "image file is missing" for r in rejected)
        hint = "say with `--root` (in Python `root=`) which folder the image paths start from, or read labels alone with require=()"
        hint = hint if missing else "name the columns: `--column image=NAME`, in Python `Columns(image=...)`"
        raise InputError(f"`{name}` has no usable row{detail}", hint=hint)


class _Rows:
    """Turns rows into samples once the meaning of the columns is known."""

    def __init__(self, table: RawTable, columns: Columns, root: Path, require: frozenset[Part]) -> None:
        self.columns = columns
        self.root = root
        self.require = require
        self.place = {h: i for i, h in enumerate(table.header)}
        self.cells = [cells for _, cells in table.rows]
        self.numbers = [number for number, _ in table.rows]
        self.labels: Mapping[str, list[LabelValue]] = {
            name: label_column(table.values(name)) for name in columns.labels or () if not _holds_images(table, name)
        }
        self.holds_images = _holds_images(table, columns.image) if columns.image else False
        self.fill = parse_template(columns.template, (*table.header, "caption", "text")) if columns.template else None
        self.ids = self._ids(table)
        self.boxes: Mapping[str, tuple[Box, ...]] = {}

    def cell(self, place: int, column: str | None) -> str | None:
        """Return one cell as stripped text, or None when it is missing."""
        return cell_text(self.cells[place][self.place[column]]) if column else None

    def _ids(self, table: RawTable) -> list[str]:
        c = self.columns
        n = range(len(self.cells))
        if c.id:
            ids = [self.cell(p, c.id) for p in n]
            if not is_unique(ids):
                missing = sum(i is None for i in ids)
                raise InputError(
                    f"id column `{c.id}` is not unique: {missing} blank, "
                    f"{len(ids) - missing - len({i for i in ids if i})} repeated",
                    hint="name another column: `--column id=NAME`, in Python `Columns(id=...)`; an empty name means none",
                )
            return [i or "" for i in ids]
        if c.image:
            return _number_repeats([self._image_id(p) for p in n])
        for column in (c.slide, c.study, c.patient):
            if column and is_unique(table.values(column)):
                return [self.cell(p, column) or "" for p in n]
        return [f"row-{number}" for number in self.numbers]

    def _image_id(self, place: int) -> str:
        value = self.cell(place, self.columns.image)
        if value is None:
            return f"row-{self.numbers[place]}"
        path = self._path(value)
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.as_posix()

    def _path(self, value: str) -> Path:
        if self.holds_images:
            return Path(value)  # already leads through the table
        if "\\" in value and "/" not in value:
            value = value.replace("\\", "/")  # tables made on Windows
        return self.root / value

    def sample(self, place: int) -> Sample:
        """Return the sample of a row.

        Raises:
            _BadRow: It lacks something that is required.
        """
        c = self.columns
        patient, study = self.cell(place, c.patient), self.cell(place, c.study)
        image = self._image(place)
        if image is not None and not c.patient:
            patient, in_path = _groups_of_path(PurePosixPath(self._image_id(place)))
            study = study or in_path
        return Sample(
            id=self.ids[place],
            image=image,
            text=self._text(place),
            patient=patient,
            study=study,
            slide=self.cell(place, c.slide),
            labels={name: column[place] for name, column in self.labels.items()},
            split=self.cell(place, c.split),
            boxes=self.boxes.get(self.cell(place, c.image) or "", ()),
        )

    def _image(self, place: int) -> Path | None:
        value = self.cell(place, self.columns.image)
        required = "image" in self.require
        if value is None:
            if required:
                raise _BadRow("image path is blank")
            return None
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", value):
            raise _BadRow("image is a web address; download it first")
        path = self._path(value)
        if required and ("\0" in value or not image_exists(path)):
            raise _BadRow("image file is missing")
        return path

    def _text(self, place: int) -> str | None:
        c = self.columns
        names = (c.text,) if isinstance(c.text, str) else c.text or ()
        text = " ".join(t for t in (self.cell(place, n) for n in names) if t) or None
        if self.fill is not None:
            own = text

            def value_of(hole: str) -> object:
                return self.cell(place, hole) if hole in self.place else own

            text = self.fill(value_of)
        if text is None and "text" in self.require:
            raise _BadRow("a hole of the text template is blank" if self.fill is not None else "text is empty")
        return text


def _holds_images(table: RawTable, column: str) -> bool:
    """Return whether a column holds bytes, which a table shows as paths through its own file."""
    return any(isinstance(v, Path) for v in table.values(column)[:1])


def _number_repeats(ids: Sequence[str]) -> list[str]:
    taken = set(ids)
    seen: dict[str, int] = {}
    result = []
    for id in ids:
        count = seen.get(id, 0) + 1
        new = id if count == 1 else f"{id}#{count}"
        while count > 1 and new in taken:
            count += 1
            new = f"{id}#{count}"
        seen[id] = count
        taken.add(new)
        result.append(new)
    return result


def _groups_of_path(path: PurePosixPath) -> tuple[str | None, str | None]:
    """Return patient and study as CheXpert's paths name them: ``.../patient00001/study1/view1_frontal.jpg``."""
    patient = next((p for p in path.parts if re.fullmatch(r"patient\d+", p)), None)
    study = next((p for p in path.parts if re.fullmatch(r"study\d+", p)), None)
    return patient, f"{patient}/{study}" if patient and study else None
