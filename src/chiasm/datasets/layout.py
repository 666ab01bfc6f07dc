"""What the readers of public tables share: finding their files, reading their columns, keeping the rows that are whole.

Comes in: the folder of a download and the facts of the data set. Goes out: paths, rows of stripped cells, a `Dataset`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from chiasm.datasets.columns import cell_text, find_column, plain_name
from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.parsing import parse_table
from chiasm.errors import FileFormatError
from chiasm.io.manifest import Rejected
from chiasm.types import Box, LabelValue, Sample

Part = Literal["image", "text"]
Uncertain = Literal["keep", "ones", "zeros", "ignore"]
UNCERTAIN_RULES: tuple[Uncertain, ...] = ("keep", "ones", "zeros", "ignore")
#: What CheXpert's labellers write for "perhaps".
UNCERTAIN = -1
#: Older people than this are slips of the pen: the first table of ChestX-ray14 has some of 400 years.
MAX_AGE_YEARS = 120
_YEARS_IN = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


def find_optional(root: Path, names: Sequence[str], folders: Sequence[str] = ("",)) -> Path | None:
    """Return the first file of these names, or of these names with ``.gz``, in these folders below ``root``."""
    places = (root / folder / f"{name}{ending}" for name in names for folder in folders for ending in ("", ".gz"))
    return next((p for p in places if p.is_file()), None)


def find_file(facts: DatasetFacts, root: Path, names: Sequence[str], folders: Sequence[str] = ("",)) -> Path:
    """Return the same as `find_optional`.

    Raises:
        InputError: The folder or the file is missing; the message says from where to get it.
    """
    if not root.is_dir():
        raise facts.missing(f"folder `{root.name}` does not exist")
    found = find_optional(root, names, folders)
    if found is None:
        raise facts.missing(f"file `{names[0]}` is missing")
    return found


def read_rows(
    path: Path, columns: Mapping[str, str], *, optional: Mapping[str, str] | None = None
) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yield row number (1 is the first under the header) and the cells of the columns asked for, blanks as None.

    Args:
        path: A table.
        columns: Key of the result -> name of the column; case and punctuation do not count.
        optional: The same for columns that may be absent: None then.

    Raises:
        UnknownName: A column is absent.
        FileFormatError: The file is no table, or a row is not whole.
    """
    table = parse_table(path)
    if table.bad:
        raise FileFormatError(f"row {table.bad[0][0]} of `{path.name}`: {table.bad[0][1]}", hint="download it again")
    place = {key: table.header.index(find_column(name, table.header, path.name)) for key, name in columns.items()}
    header = {plain_name(h): i for i, h in reversed(list(enumerate(table.header)))}
    absent = []
    for key, name in (optional or {}).items():
        if plain_name(name) in header:
            place[key] = header[plain_name(name)]
        else:
            absent.append(key)
    nothing: dict[str, str | None] = dict.fromkeys(absent)
    for number, cells in table.rows:
        yield number, {**nothing, **{key: cell_text(cells[i]) for key, i in place.items()}}


def index_images(root: Path, folders: Iterable[str], suffixes: Sequence[str] = (".png",)) -> dict[str, Path]:
    """Return file name -> path of every image in the folders, which may hold wildcards: ``images_*/images``."""
    found: dict[str, Path] = {}
    for pattern in folders:
        for folder in sorted(root.glob(pattern)) if pattern else [root]:
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.casefold().endswith(tuple(suffixes)) and not entry.name.startswith("."):
                            found.setdefault(entry.name, folder / entry.name)
    return found


def index_films(root: Path, folders: Iterable[str]) -> dict[str, Path]:
    """Return file name without its ending -> path; a PNG or JPEG before a DICOM file of the same name."""
    found: dict[str, Path] = {}
    for suffixes in ((".png",), (".jpg", ".jpeg"), (".dcm", ".dicom")):
        for name, path in index_images(root, folders, suffixes).items():
            found.setdefault(name.rpartition(".")[0], path)
    return found


def read_box(cells: Sequence[str | None], label: str, number: int, table: Path, *, sides: bool = False) -> Box:
    """Return the box of four cells, in pixels: left, top, right and bottom, or, with ``sides``, left, top, width and height.

    Raises:
        FileFormatError: They are no box with an area.
    """
    try:
        x0, y0, x1, y1 = (float(cell or "nan") for cell in cells)
    except ValueError:
        x0 = y0 = x1 = y1 = float("nan")
    if sides:
        x1, y1 = x0 + x1, y0 + y1
    if not (x0 < x1 and y0 < y1):
        raise FileFormatError(f"row {number} of `{table.name}` holds no box", hint="download it again")
    return Box(x0, y0, x1, y1, label)


def keep_whole(
    facts: DatasetFacts, rows: Iterable[tuple[int, Sample]], rejected: Sequence[Rejected], require: Sequence[Part]
) -> Dataset:
    """Return the samples that have what is required, each id once; the others are rejected.

    Raises:
        InputError: Images are required and not one of them lies there.
    """
    kept: dict[str, Sample] = {}
    lost = list(rejected)
    total = absent = 0
    for row, sample in rows:
        total += 1
        if "image" in require and sample.image is None:
            lost.append(Rejected(row, sample.id, "image file is missing"))
            absent += 1
        elif "text" in require and not sample.text:
            lost.append(Rejected(row, sample.id, "text is empty"))
        elif sample.id in kept:
            lost.append(Rejected(row, sample.id, "an earlier row has the same id"))
        else:
            kept[sample.id] = sample
    if absent and absent == total:
        raise facts.missing(
            f"none of the {total} images of the table was found",
            hint=f"get the images from {facts.page}, or read the labels alone with require=()",
        )
    return Dataset(tuple(kept.values()), tuple(sorted(lost, key=lambda r: r.row)), facts.name)


def age_in_years(cell: str | None) -> int | float | None:
    """Return an age written ``57``, ``057Y``, ``45yrs``, ``011M`` or ``005D`` in years; None for none, or beyond 120."""
    found = re.fullmatch(r"(\d{1,4})(?:\.0*)?\s*([YMWD]?)[A-Z]*\.?", (cell or "").strip().upper())
    if found is None:
        return None
    unit = found.group(2) or "Y"
    age = int(found.group(1)) if unit == "Y" else round(int(found.group(1)) * _YEARS_IN[unit], 3)
    return age if age <= MAX_AGE_YEARS else None


def sex_of(cell: str | None) -> str | None:
    """Return ``F`` or ``M`` by the first letter of a cell, None for anything else."""
    found = re.fullmatch(r"(F|M)|(FE?)?MALE", (cell or "").strip().upper())
    return None if found is None else found.group(0)[0]


def finding_value(cell: str | None, uncertain: Uncertain) -> LabelValue:
    """Return 1, 0, -1 or None of a cell of CheXpert's labeller, after the rule for the uncertain.

    Raises:
        FileFormatError: The cell is none of ``1.0``, ``0.0``, ``-1.0`` and blank.
    """
    if cell is None:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if value not in (1, 0, UNCERTAIN):
        raise FileFormatError("a label is none of 1, 0, -1 and blank")
    if value == UNCERTAIN and uncertain != "keep":
        return {"ones": 1, "zeros": 0}.get(uncertain)
    return int(value)


def check_uncertain(name: str, rule: str) -> None:
    """Raise when the rule for uncertain labels is none of ``keep``, ``ones``, ``zeros`` and ``ignore``.

    Raises:
        InputError: With the rules that there are.
    """
    check_choice(f"uncertain of {name}", rule, UNCERTAIN_RULES)


def in_words(classes: Iterable[str], **others: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return class -> its name in lower case with spaces, or the words given; keywords write spaces as ``_``."""
    return {c: others.get(c.replace(" ", "_"), (c.replace("_", " ").casefold(),)) for c in classes}
