"""Which images belong together, told by a table beside a data set: patients of BACH, source tiles of LC25000.

Comes in: a CSV (or any table), or a folder of such tables. Goes out: file name without its ending -> name of the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from chiasm.datasets.columns import find_column, is_missing, plain_name, show_columns
from chiasm.datasets.parsing import parse_table
from chiasm.errors import FileFormatError, InputError

#: Columns are found by these names, the first that exists; case and punctuation do not count.
IMAGE_COLUMNS = ("stem", "filename", "image", "imagepath", "imgpath", "file", "path", "name")
GROUP_COLUMNS = (
    "groupid", "sourcetilegroup", "clusterlabel", "group", "patientid", "patient", "tile", "case", "caseid",
)  # fmt: skip


def read_groups(path: str | Path, *, image: str | None = None, group: str | None = None) -> dict[str, str]:
    """Return the group of each image, by its file name without folder and ending.

    Args:
        path: A table with one row an image, or a folder of such tables at any depth (the ``annotations`` folder of
            LC25000-clean, which numbers the groups of each class anew: there the table's folder becomes part of the
            group's name).
        image: Column of the image; found by name if absent.
        group: Column of the group; found by name if absent.

    Raises:
        InputError: Nothing is there, no column can be found, or an image is in two groups.
        UnknownName: A named column does not exist.
        FileFormatError: A file is no table, or rows are not whole.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_table(path, image, group, "")
    tables = sorted(p for p in path.rglob("final_clusters.csv")) or sorted(path.rglob("*.csv"))
    if not tables:
        raise InputError(f"folder `{path.name}` holds no table of groups", hint="expected .csv files in it")
    merged: dict[str, str] = {}
    for table in tables:
        prefix = table.parent.relative_to(path).parts[:1]
        for name, value in _read_table(table, image, group, prefix[0] if prefix else "").items():
            _put(merged, name, value, table.name)
    return merged


def _read_table(path: Path, image: str | None, group: str | None, prefix: str) -> dict[str, str]:
    table = parse_table(path)
    if table.bad:
        raise FileFormatError(f"row {table.bad[0][0]} of `{path.name}`: {table.bad[0][1]}")
    images = table.values(_column("image", image, IMAGE_COLUMNS, table.header, path.name))
    groups = table.values(_column("group", group, GROUP_COLUMNS, table.header, path.name))
    found: dict[str, str] = {}
    for name, value in zip(images, groups, strict=True):
        if is_missing(name) or is_missing(value):
            continue
        whole = f"{prefix}/{str(value).strip()}" if prefix else str(value).strip()
        _put(found, stem_of(str(name)), whole, path.name)
    if not found:
        raise InputError(f"`{path.name}` names no image with a group")
    return found


def stem_of(name: str) -> str:
    """Return a file name without folder and ending, in lower case."""
    return PurePosixPath(name.strip().replace("\\", "/")).stem.casefold()


def _put(groups: dict[str, str], name: str, value: str, table: str) -> None:
    if groups.setdefault(name, value) != value:
        raise InputError(f"`{table}` puts an image into two groups", hint="every image belongs to one group")


def _column(what: str, wanted: str | None, known: tuple[str, ...], header: tuple[str, ...], table: str) -> str:
    if wanted is not None:
        return find_column(wanted, header, table)
    named: Mapping[str, str] = {plain_name(h): h for h in reversed(header)}
    found = next((named[k] for k in known if k in named), None)
    if found is None:
        raise InputError(
            f"`{table}` has no column of the {what}; it has {show_columns(header)}", hint=f"name it: `{what}=COLUMN`"
        )
    return found
