"""Whatever the user points at, opened by the reader that fits: a table, a folder, tar shards, or a data set by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from chiasm.datasets import named
from chiasm.datasets.columns import Columns
from chiasm.datasets.dataset import Dataset
from chiasm.datasets.folder import load_folder
from chiasm.datasets.parsing import TABLE_SUFFIXES
from chiasm.datasets.table import Part, load_table
from chiasm.datasets.webdataset import is_shard, load_webdataset
from chiasm.errors import InputError

#: Names of the one table that describes a folder, in order of preference.
TABLE_NAMES = ("metadata", "table", "captions", "data", "labels")


def open_dataset(
    source: str | Path,
    *,
    columns: Columns | None = None,
    root: str | Path | None = None,
    require: Sequence[Part] | None = None,
    on_bad_row: Literal["skip", "fail"] = "skip",
    check_images: bool = False,
) -> Dataset:
    """Read a data set by what it is.

    ``pcam:/data`` is the public data set of that name below ``/data``; see `chiasm.datasets.named`.
    ``x.tar`` or ``x.tar.gz``, a pattern with braces or ``::``, and a folder of tar files are webdataset shards. A folder
    with a table (``metadata.csv``, ``table.csv`` ..., or a single table of any name) is that table. Any other folder is
    a folder of images with classes from its subfolders. A file is a table.

    Args:
        source: What to read.
        columns: For tables.
        root: For tables: folder of relative image paths.
        require: What a row must have; see the readers.
        on_bad_row: ``skip`` lists bad rows in ``Dataset.rejected``; ``fail`` raises at the first.
        check_images: Also decode every image.

    Raises:
        InputError: There is nothing at ``source``, or it could be several things.
    """
    by_name = named.split_source(source)
    if by_name is not None:
        if columns is not None or root is not None:
            raise InputError(f"columns and root are for tables; `{by_name[0]}` is a data set of its own")
        return named.open_dataset(*by_name, require=require, on_bad_row=on_bad_row, check_images=check_images)
    text, path = str(source), Path(source)
    if path.is_file() and not is_shard(path):
        return load_table(
            path, columns=columns, root=root, require=require, on_bad_row=on_bad_row, check_images=check_images
        )
    if path.is_dir():
        table = find_table(path)
        if table is not None:
            return load_table(
                table, columns=columns, root=root, require=require, on_bad_row=on_bad_row, check_images=check_images
            )
    if columns is not None or root is not None:
        raise InputError(f"columns and root are for tables; `{path.name}` is no table")
    if path.is_dir() and not any(is_shard(p) for p in path.iterdir()):
        return load_folder(
            path, labels_from="folder", require=require or ("image",), on_bad_row=on_bad_row, check_images=check_images
        )
    if path.is_dir() or is_shard(path) or "{" in text or "::" in text:
        return load_webdataset(text, require=require, on_bad_row=on_bad_row, check_images=check_images)
    raise InputError(f"`{path.name}` does not exist", hint="give a table, a folder of images or tar shards")


def find_table(folder: Path) -> Path | None:
    """Return the table that describes a folder, or None.

    Raises:
        InputError: Several tables lie there and none has a name that says which.
    """
    tables = sorted(p for p in folder.iterdir() if p.suffix.casefold() in TABLE_SUFFIXES and p.is_file())
    tables = [t for t in tables if t.suffix.casefold() not in (".txt", ".json") and not t.name.startswith(".")]
    for name in TABLE_NAMES:
        named = [t for t in tables if t.stem.casefold() == name]
        if len(named) == 1:
            return named[0]
    tables = [t for t in tables if t.stem not in ("rejected", "results")]
    if len(tables) > 1:
        shown = ", ".join(f"`{t.name}`" for t in tables[:5])
        raise InputError(f"folder `{folder.name}` holds {len(tables)} tables: {shown}", hint="name one of them")
    return tables[0] if tables else None
