"""Which column of a table means what: the names that medical and open_clip tables use, and an explicit override.

Comes in: a header and some values. Goes out: a `Columns` value with nothing left to guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chiasm.errors import InputError, UnknownName

#: Spellings that mean "no value here". The word "none" is not among them: it is a class name in many tables.
MISSING = frozenset({"", "nan", "null", "na", "n/a", "<na>", "#n/a"})
#: A header's cell beyond this is text.
MAX_NAME_CHARS = 40
#: Figures with or without marks between them: a number, a date, a time.
_NUMBER = re.compile(r"\W*\d[\d\W]*")
_SENTENCE = re.compile(r"[.:;,!?]\s")

#: Names are compared without case, spaces and punctuation: `Patient ID`, `patient_id` and `patientid` are one.
IMAGE_NAMES = (
    "filepath", "image", "imagepath", "imagefile", "img", "imgpath", "path", "file", "filename", "imageindex",
    "imagename",
)  # fmt: skip
TEXT_NAMES = ("caption", "text", "title", "report", "reporttext", "description", "sentence", "note", "notes")
SECTION_NAMES = ("findings", "impression")
ID_NAMES = ("id", "sampleid", "uid", "imageid", "dicomid", "rowid")
GROUP_NAMES: Mapping[str, tuple[str, ...]] = {
    "patient": ("patientid", "patient", "subjectid", "subject", "personid", "caseid", "case", "sourcetilegroup"),
    "study": ("studyid", "study", "studyinstanceuid", "examid", "exam", "uid"),
    "slide": ("slideid", "slide", "slidename", "wsi"),
    "split": ("split", "subset", "partition"),
}
SUFFIXES = frozenset((
    "png", "jpg", "jpeg", "jpe", "jp2", "j2k", "bmp", "gif", "tif", "tiff", "webp", "avif", "pgm", "ppm", "pnm",
    "dcm", "dicom", "svs", "ndpi", "mrxs", "scn", "bif", "nii", "gz", "h5", "npy", "npz",
))  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """What the columns of a table mean. None is detected; an empty string says that there is no such column.

    Attributes:
        image: Path of the image, relative to the table's folder (or ``root``) or absolute.
        text: Caption or report; several columns are joined by a space, blanks left out.
        id: Unique name of the row. Without one: the image path, else a unique slide, study or patient, else the row.
        patient: Group that must stay on one side of a split.
        study: Group of images taken together.
        slide: Group of tiles of one slide.
        split: ``train``, ``val``, ``test`` ...
        labels: Columns kept as labels; None keeps all columns without another meaning.
        template: Makes the text of other columns: ``a histology patch of {label_name}``.
        separator: Of a text table: comma, tab, semicolon or bar.
        encoding: Of a text table.
    """

    image: str | None = None
    text: str | tuple[str, ...] | None = None
    id: str | None = None
    patient: str | None = None
    study: str | None = None
    slide: str | None = None
    split: str | None = None
    labels: tuple[str, ...] | None = None
    template: str | None = None
    separator: str | None = None
    encoding: str | None = None


def plain_name(name: str) -> str:
    """Return a column name without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold())


def is_missing(value: object) -> bool:
    """Return whether a cell means "no value": blank, NaN, ``N/A`` ..."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().casefold() in MISSING)


def cell_text(value: object) -> str | None:
    """Return a cell as stripped text, or None when it is missing."""
    if is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns integer ids into floats where one is missing
    return str(value).strip()


def resolve_columns(
    wanted: Columns, header: Sequence[str], values: Callable[[str], list[object]], table: str
) -> Columns:
    """Return ``wanted`` with every None filled from the header, or set to "" where the table has nothing of the kind.

    Args:
        wanted: What the user said.
        header: Names of the columns.
        values: Returns the cells of a column; used to tell a column of paths from one of words.
        table: File name for messages.

    Raises:
        UnknownName: A column that the user named does not exist.
    """
    named = {plain_name(h): h for h in reversed(header)}
    roles: dict[str, Any] = {
        kind: find_column(name, header, table) if (name := getattr(wanted, kind)) else name
        for kind in ("image", "id", *GROUP_NAMES)
    }
    texts = wanted.text if isinstance(wanted.text, tuple) else (wanted.text,) if wanted.text else ()
    sought = tuple(find_column(t, header, table) for t in texts)
    roles["text"] = sought if isinstance(wanted.text, tuple) else sought[0] if sought else wanted.text
    taken = {*filter(None, (roles[k] for k in ("image", "id", *GROUP_NAMES))), *sought}

    def detect(kind: str, candidates: Iterable[str]) -> None:
        if roles[kind] is None:
            roles[kind] = next((named[c] for c in candidates if c in named and named[c] not in taken), "")
            taken.add(roles[kind])

    detect("image", (c for c in IMAGE_NAMES if c in named and _looks_like_paths(values(named[c]))))
    if roles["text"] is None:
        sections = tuple(named[s] for s in SECTION_NAMES if s in named)
        # open_clip's pair of names, filepath and title, belongs together.
        with_title = ("title", *TEXT_NAMES) if plain_name(roles["image"]) == "filepath" else TEXT_NAMES
        detect("text", with_title)
        if not roles["text"] and sections:
            roles["text"] = sections if len(sections) > 1 else sections[0]
            taken.update(sections)
    detect("id", (c for c in ID_NAMES if c in named and is_unique(values(named[c]))))
    for kind, names in GROUP_NAMES.items():
        detect(kind, names)
    if wanted.labels is None:
        roles["labels"] = tuple(h for h in header if h not in taken)
    else:
        roles["labels"] = tuple(find_column(c, header, table) for c in wanted.labels)
    return replace(wanted, **roles)


def find_column(name: str, header: Sequence[str], table: str) -> str:
    """Return the header's spelling of a column name.

    Raises:
        UnknownName: When the table has no such column.
    """
    if name in header:
        return name
    same = [h for h in header if plain_name(h) == plain_name(name)]
    if len(same) == 1:
        return same[0]
    known = header if looks_like_names(header) else ()
    raise UnknownName("column", name, known, hint=f"`{table}` has {show_columns(header)}")


def looks_like_names(header: Sequence[str]) -> bool:
    """Return whether no cell of a header is too long for a name, a sentence, or a mere number or date.

    Else the table may lack a header, and what stands in its place is the first patient.
    """
    return not any(len(h) > MAX_NAME_CHARS or _NUMBER.fullmatch(h) or _SENTENCE.search(h) for h in header)


def show_columns(header: Sequence[str], *, most: int = 12) -> str:
    """Return the names of a table's columns for a message; not those of a row that may be a patient's."""
    if not looks_like_names(header):
        return f"{len(header)} columns, and a first row that does not look like their names: does it lack a header?"
    return "the columns " + ", ".join(f"`{h}`" for h in header[:most]) + (" ..." if len(header) > most else "")


def is_unique(values: Sequence[object]) -> bool:
    """Return whether no cell is missing and none occurs twice."""
    return bool(values) and not any(is_missing(v) for v in values) and len({str(v) for v in values}) == len(values)


def _looks_like_paths(values: Sequence[object]) -> bool:
    if any(isinstance(v, Path) for v in values[:10]):
        return True  # images inside a Parquet file
    shown = [str(v) for v in values if not is_missing(v)][:200]
    ends = sum(v.rpartition(".")[2].casefold() in SUFFIXES for v in shown)
    return bool(shown) and 2 * ends >= len(shown)


def label_column(values: Sequence[object]) -> list[str | int | float | None]:
    """Return one column of labels: blanks as None, a column of numbers as numbers, anything else as text.

    A column of digits with leading zeros is a column of codes and stays text. Whole columns are converted or none of
    it, so that one label does not change its type between rows.
    """
    cells = [None if is_missing(v) else v for v in values]
    texts = [c for c in cells if isinstance(c, str)]
    convert: Callable[[str], str | int | float] = str.strip
    if texts and all(re.fullmatch(r"\s*[+-]?(0|[1-9]\d{0,17})\s*", t) for t in texts):
        convert = int
    elif texts and all(re.fullmatch(r"\s*[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?\s*", t) for t in texts):
        convert = float
    return [convert(c) if isinstance(c, str) else _plain_label(c) for c in cells]


def _plain_label(cell: object) -> str | int | float | None:
    if cell is None:
        return None
    if isinstance(cell, bool):
        return int(cell)
    if isinstance(cell, (int, float)):
        return cell
    raise InputError(f"a label of type {type(cell).__name__} cannot be used")
