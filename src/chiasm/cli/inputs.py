"""What several commands read in the same way: images on the command line, tables, folders, labels and truth columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chiasm.errors import InputError
from chiasm.types import LabelValue, Sample

if TYPE_CHECKING:
    from chiasm.datasets.dataset import Dataset
    from chiasm.encoders.base import Encoder
    from chiasm.tasks.prompts import PromptSet

TableOption = Annotated[
    Path | None, typer.Option("--table", "-t", help="CSV, TSV, JSONL or Parquet; columns are recognised by name.")
]
ImagesArgument = Annotated[list[Path] | None, typer.Argument(help="Image files or folders of images.")]
GroupOption = Annotated[
    str | None, typer.Option("--group", help="Column of the patient (or slide) for intervals; found by name if absent.")
]
DropTextOption = Annotated[
    str | None, typer.Option("--drop-text", help="Leave out rows whose text matches this regular expression.")
]
SplitOption = Annotated[str | None, typer.Option("--split", help="Use only rows whose split column says this.")]


@dataclass(frozen=True)
class Rows:
    """Samples of one command with the rows that could not be used."""

    samples: tuple[Sample, ...]
    rejected: int
    name: str


def read_rows(
    images: Sequence[Path] | None, table: Path | None, *, group: str | None = None, split: str | None = None
) -> Rows:
    """Return the samples of image arguments or of a table, restricted to one split.

    Raises:
        InputError: When neither or both were given, or nothing is left.
    """
    if bool(images) == bool(table):
        raise InputError(
            "give images or a table, one of the two", hint="`chiasm zero-shot a.png b.png ...` or `--table t.csv`"
        )
    if table is not None:
        dataset = open_table(table, group=group)
        rows = Rows(dataset.samples, len(dataset.rejected), dataset.name)
    else:
        rows = Rows(tuple(_image_samples(images or ())), 0, "images")
    if split is not None:
        known = sorted({s.split for s in rows.samples if s.split})
        kept = tuple(s for s in rows.samples if s.split == split)
        if not kept:
            raise InputError(f"no row has split `{split}`", hint=f"splits in the table: {', '.join(known) or 'none'}")
        rows = Rows(kept, rows.rejected, rows.name)
    if not rows.samples:
        raise InputError(f"no usable rows ({rows.rejected} rejected)", hint="`--debug` shows more")
    return rows


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


def open_table(path: Path, *, group: str | None = None) -> Dataset:
    """Open a table, taking ``group`` as the patient column when it is named."""
    from chiasm.datasets.columns import Columns
    from chiasm.datasets.table import load_table

    return load_table(path, columns=Columns(patient=group) if group else None)


def _image_samples(paths: Sequence[Path]) -> list[Sample]:
    from chiasm.datasets.folder import IMAGE_SUFFIXES

    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found.extend(sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES))
        elif not path.exists():
            raise InputError(f"image `{path.name}` does not exist")
        else:
            found.append(path)
    return [Sample(id=str(p), image=p) for p in found]


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


def truth_columns(samples: Sequence[Sample], column: str, labels: Sequence[str]) -> dict[str, tuple[LabelValue, ...]]:
    """Return the truth of each label as 0/1/None.

    ``column`` names a column of class names (``label``), one of several joined by ``|`` (``Finding Labels``), or is
    ``*``: then each label has a 0/1 column of its own name.

    Raises:
        InputError: When the column or a label's column is absent.
    """
    known = sorted({k for s in samples for k in s.labels})
    wanted = list(labels) if column == "*" else [column]
    for name in wanted:
        if name not in known:
            raise InputError(f"the table has no label column `{name}`", hint=f"columns: {', '.join(known) or 'none'}")
    if column == "*":
        return {label: tuple(s.labels.get(label) for s in samples) for label in labels}
    folded = {label: label.strip().lower() for label in labels}
    truth: dict[str, tuple[LabelValue, ...]] = {}
    rows = [None if s.labels.get(column) is None else str(s.labels[column]).lower().split("|") for s in samples]
    stated = {part.strip() for parts in rows if parts for part in parts}
    for label, name in folded.items():
        if name not in stated:
            raise InputError(
                f"label `{label}` does not occur in column `{column}`",
                hint=f"values there: {', '.join(sorted(stated)[:12])}; map names with --labels-file",
            )
        truth[label] = tuple(None if parts is None else int(name in [p.strip() for p in parts]) for parts in rows)
    return truth


def load_encoder(model: str, *, device: str, family: str | None, allow_code: bool) -> Encoder:
    """Load the encoder that ``--model`` names."""
    from chiasm.load import load

    if not model:
        raise InputError("no model was named", hint="--model NAME or --model FOLDER; `chiasm models` lists names")
    return load(model, device=device, family=family, allow_code=allow_code)
