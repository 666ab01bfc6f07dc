"""What several commands read in the same way: images on the command line, tables, folders, labels and truth columns."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from chiasm.errors import InputError
from chiasm.evaluate.truth import truth_columns as truth_columns  # noqa: PLC0414  (commands read it from here)
from chiasm.types import Sample

if TYPE_CHECKING:
    from chiasm.datasets.columns import Columns
    from chiasm.datasets.dataset import Dataset
    from chiasm.datasets.table import Part
    from chiasm.encoders.base import Encoder
    from chiasm.io.manifest import Rejected, RejectLog
    from chiasm.tasks.prompts import PromptSet

#: What ``--column`` can name.
ROLES = ("image", "text", "id", "patient", "study", "slide", "split")

TableOption = Annotated[
    Path | None,
    typer.Option(
        "--table",
        "-t",
        help="CSV, TSV, JSONL, Parquet, folder, shards, or pcam:FOLDER; columns are recognised by name.",
    ),
]
ImagesArgument = Annotated[list[Path] | None, typer.Argument(help="Image files or folders of images.")]
GroupOption = Annotated[
    str | None, typer.Option("--group", help="Column of the patient (or slide) for intervals; found by name if absent.")
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", help="What a column is, where its name does not say it: image=path, text=report, id=key ..."
    ),
]
RootOption = Annotated[
    Path | None, typer.Option("--root", help="Folder that image paths start from; by default the table's own.")
]
DropTextOption = Annotated[
    str | None, typer.Option("--drop-text", help="Leave out rows whose text matches this regular expression.")
]
SplitOption = Annotated[str | None, typer.Option("--split", help="Use only rows whose split column says this.")]


@dataclass(frozen=True)
class Rows:
    """Samples of one command with the rows that could not be used."""

    samples: tuple[Sample, ...]
    rejected: tuple[Rejected, ...]
    name: str


def read_images(
    images: Sequence[Path] | None,
    table: Path | None,
    *,
    group: str | None = None,
    columns: Sequence[str] | None = None,
    root: Path | None = None,
    split: str | None = None,
) -> Rows:
    """Return the images of image arguments or of a table, restricted to one split; rows may lack a text.

    Raises:
        InputError: When neither or both were given, or nothing is left.
    """
    if bool(images) == bool(table):
        raise InputError("give images or a table, one of the two", hint="name image files, or add `--table t.csv`")
    if table is None:
        return Rows(select_rows(_image_samples(images or ()), split), (), "images")
    dataset = open_table(table, group=group, columns=columns, root=root, require=("image",))
    return Rows(select_rows(dataset.samples, split), dataset.rejected, dataset.name)


def select_rows(samples: Sequence[Sample], split: str | None) -> tuple[Sample, ...]:
    """Return the samples of one split, or all.

    Raises:
        InputError: When no row has this split.
    """
    if split is None:
        return tuple(samples)
    kept = tuple(s for s in samples if s.split == split)
    if not kept:
        known = ", ".join(sorted({s.split for s in samples if s.split}))
        raise InputError(f"no row has split `{split}`", hint=f"splits in the table: {known or 'none'}")
    return kept


def without_texts(samples: Sequence[Sample], pattern: str | None) -> tuple[Sample, ...]:
    """Return the samples whose text does not match a regular expression (placeholders, say); case is ignored.

    Raises:
        InputError: No regular expression, or nothing is left.
    """
    if pattern is None:
        return tuple(samples)
    try:
        found = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise InputError(f"--drop-text `{pattern}` is no regular expression: {error}") from error
    kept = tuple(s for s in samples if s.text is None or not found.search(s.text))
    if not kept:
        raise InputError(f"--drop-text matches the texts of all {len(samples)} rows")
    return kept


def open_table(
    path: str | Path,
    *,
    group: str | None = None,
    columns: Sequence[str] | None = None,
    root: Path | None = None,
    require: Sequence[Part] | None = None,
    on_bad_row: Literal["skip", "fail"] = "skip",
) -> Dataset:
    """Open whatever :func:`chiasm.datasets.open_dataset` opens.

    Args:
        path: Table, folder, shards, or ``NAME:ROOT`` of a public data set, whose cautions go to standard error.
        group: Column of the patient.
        columns: ``role=name`` of other columns; several ``text=`` are joined.
        root: Folder of relative image paths.
        require: What a row must have; None: all that the table has columns for.
        on_bad_row: ``skip`` or ``fail``.
    """
    from chiasm.datasets import open_dataset
    from chiasm.datasets.named import cautions_of

    chosen = _columns(columns or (), group)
    dataset = open_dataset(path, columns=chosen, root=root, require=require, on_bad_row=on_bad_row)
    for caution in cautions_of(path):
        print(f"note: {caution}", file=sys.stderr)
    return dataset


def _columns(words: Sequence[str], group: str | None) -> Columns | None:
    from chiasm.datasets.columns import Columns

    named: dict[str, list[str]] = {"patient": [group]} if group else {}
    for word in words:
        role, separator, name = word.partition("=")
        if role not in ROLES or not separator:
            raise InputError(f"--column must be ROLE=NAME, got `{word}`", hint=f"roles: {', '.join(ROLES)}")
        named.setdefault(role, []).append(name)
    for role, names in named.items():
        if len(names) > 1 and role != "text":
            raise InputError(f"the {role} column is named twice", hint="name one of them")
    values: dict[str, Any] = {role: names[0] if len(names) == 1 else tuple(names) for role, names in named.items()}
    return Columns(**values) if values else None


def _image_samples(paths: Sequence[Path]) -> list[Sample]:
    from chiasm.datasets.folder import IMAGE_SUFFIXES

    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise InputError(
                    f"folder `{path.name}` holds no image", hint=f"endings: {' '.join(sorted(IMAGE_SUFFIXES))}"
                )
            found.extend(inside)
        elif not path.exists():
            raise InputError(f"image `{path.name}` does not exist", hint="check the path")
        else:
            found.append(path)
    return [Sample(id=str(p), image=p) for p in dict.fromkeys(found)]


def say_rejected(log: RejectLog) -> None:
    """Tell on standard error how many rows were left out and why, naming none of them."""
    if len(log):
        print(f"warning: {log.summary()}", file=sys.stderr)


def is_file(text: str) -> bool:
    """Return whether a word of the command line names a file; a long sentence is no file name, not an error."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def read_prompts(labels: str | None, labels_file: Path | None, *, pairs: bool, template: str | None) -> PromptSet:
    """Return the prompts of ``--labels`` or ``--labels-file``.

    Raises:
        InputError: When neither or both were given.
    """
    from chiasm.tasks.prompt_files import load_prompts, parse_prompts

    if bool(labels) == bool(labels_file):
        raise InputError("give --labels or --labels-file, one of the two", hint='--labels "pneumonia, normal"')
    if labels_file is not None:
        return load_prompts(labels_file, templates=template, pairs=pairs)
    return parse_prompts(labels or "", templates=template, pairs=pairs)


def load_encoder(model: str, *, device: str, family: str | None, allow_code: bool, precision: str = "auto") -> Encoder:
    """Load the encoder that ``--model`` names, by default in the precision that this machine runs fast.

    What is absent is missed before torch is imported.
    """
    from chiasm.fetch import prepare

    if not model:
        raise InputError("no model was named", hint="--model NAME or --model FOLDER; `chiasm models` lists names")
    prepare(model)
    from chiasm.load import load

    return load(members_of(model), device=device, family=family, allow_code=allow_code, precision=precision)


def members_of(model: str) -> str | list[Path]:
    """Return the files that a pattern (``best_*.pt``) names, the members of an ensemble; a name or path as it is."""
    if "*" not in model or Path(model).exists():
        return model
    pattern = Path(model).expanduser()
    several = sorted(p for p in pattern.parent.glob(pattern.name) if p.is_file())
    if not several:
        raise InputError(f"no file fits `{pattern.name}`", hint="check the folder, and quote the pattern")
    return several
