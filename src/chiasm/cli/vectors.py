"""Rows of a store, or of a table that a model embeds now: what every command on embeddings starts from.

``--store`` names what ``chiasm embed`` wrote; ``--table`` with ``--model`` embeds the table's rows. Either way the labels
of a row hold its ``split``, ``study`` and ``slide`` where these are known.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer

from chiasm.cli.output import check_output, make_progress
from chiasm.errors import FileFormatError, InputError, missing_column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.encoders.base import Encoder
    from chiasm.types import Embeddings, LabelValue

StoreOption = Annotated[
    Path | None, typer.Option("--store", help="What `chiasm embed` or clip-retrieval wrote; in place of --table.")
]
#: Values (rows × dimensions) from which vectors are mapped: 64 MiB.
MAPPED_VALUES = 2**24
LabelOption = Annotated[str, typer.Option("--label", help="Column of the labels.")]
PageOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Page (HTML) to write, with its figures inside.", callback=check_output),
]


def open_vectors(
    *,
    store: Path | None,
    table: Path | None,
    model: str = "",
    side: Literal["image", "text"] = "image",
    split: str | None = None,
    group: str | None = None,
    column: Sequence[str] | None = None,
    root: Path | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    precision: str = "auto",
    family: str | None = None,
    allow_code: bool = False,
    as_json: bool = False,
    encoder: Encoder | None = None,
    mapped: bool = False,
) -> Embeddings:
    """Return the embeddings that a command works on, with labels and patients.

    Args:
        store: Folder of embeddings; no model is loaded.
        table: Table to embed with ``model``.
        model: Needed for a table.
        side: Which rows.
        split: Keep only rows of this part.
        group: Column of the patient; in a store one of its label columns.
        column: ``ROLE=NAME`` of the table's columns.
        root: Folder of relative image paths.
        batch_size: Rows per forward pass.
        device: Of the model.
        precision: Of the model, see ``encoders.precision``.
        family: Whose weights a file holds.
        allow_code: As ``--allow-code``.
        as_json: No progress bar.
        encoder: Loaded already, in place of ``model``.
        mapped: Vectors of a large store are mapped from a file in it, for searching.

    Raises:
        InputError: Neither or both of table and store, options that do not fit, or nothing left.
    """
    if bool(table) == bool(store):
        raise InputError("give --table or --store, one of the two", hint="`chiasm embed` makes a store of a table")
    if table is not None:
        return _embedded(
            table,
            model,
            side,
            split,
            group,
            column,
            root,
            batch_size,
            device,
            precision,
            family,
            allow_code,
            as_json,
            encoder,
        )
    assert store is not None
    if column or root:
        raise InputError(
            "--column and --root are for tables, not for a store",
            hint="give them to `chiasm embed`, which made the store",
        )
    return _stored(store, side, split, group, encoder, mapped=mapped)


def _embedded(
    table: Path,
    model: str,
    side: Literal["image", "text"],
    split: str | None,
    group: str | None,
    column: Sequence[str] | None,
    root: Path | None,
    batch_size: int,
    device: str,
    precision: str,
    family: str | None,
    allow_code: bool,
    as_json: bool,
    encoder: Encoder | None,
) -> Embeddings:
    from chiasm.cli.inputs import load_encoder, open_table, say_rejected, select_rows
    from chiasm.io.manifest import RejectLog

    encoder = encoder or load_encoder(model, device=device, precision=precision, family=family, allow_code=allow_code)
    from chiasm.embed import embed_images, embed_texts

    dataset = open_table(table, group=group, columns=column, root=root, require=(side,))
    rejects = RejectLog(dataset.rejected)
    samples = select_rows(dataset.samples, split)
    embed = embed_images if side == "image" else embed_texts
    found = embed(
        encoder, samples, batch_size=batch_size, rejects=rejects, progress=make_progress(as_json, unit="rows")
    )
    say_rejected(rejects)
    return found


def _stored(
    store: Path,
    side: Literal["image", "text"],
    split: str | None,
    group: str | None,
    encoder: Encoder | None,
    *,
    mapped: bool,
) -> Embeddings:
    from chiasm.io.clip_retrieval import is_clip_retrieval, read_clip_retrieval
    from chiasm.io.store import open_store

    found: Embeddings | None
    if is_clip_retrieval(store):
        folder = read_clip_retrieval(store, space=None if encoder is None else encoder.space)
        found = folder.images if side == "image" else folder.texts
    else:
        with open_store(store) as opened:
            found = None
            if mapped and opened.count(side) * opened.space.dim >= MAPPED_VALUES:
                with suppress(
                    InputError, FileFormatError, OSError
                ):  # no room, a store of somebody else, or fought over
                    found = opened.read(side, mapped=True)
            found = opened.read(side) if found is None else found
    if found is None or not len(found):
        raise InputError(f"store `{store.name}` holds no {side}s", hint=f"add them: `chiasm embed --modality {side}`")
    if group is not None:
        patients = tuple(None if v is None else str(v) for v in label_column(found, group))
        found = dataclasses.replace(found, patients=patients)
    if split is not None:
        parts = label_column(found, "split")
        rows = [i for i, part in enumerate(parts) if part == split]
        if not rows:
            known = ", ".join(sorted({str(p) for p in parts if p is not None}))
            raise InputError(f"no row has split `{split}`", hint=f"splits in the store: {known or 'none'}")
        found = found.select(np.asarray(rows))
    return found


def label_column(embeddings: Embeddings, name: str) -> tuple[LabelValue, ...]:
    """Return one column of labels.

    Raises:
        InputError: There is no such column; the hint names those that exist.
    """
    if name not in embeddings.labels:
        raise missing_column(name, embeddings.labels, of="there is")
    return embeddings.labels[name]


def labelled_rows(embeddings: Embeddings, name: str) -> Embeddings:
    """Return the rows that have a value in a column of labels.

    Raises:
        InputError: No such column, or no row has a value there.
    """
    from chiasm.metrics.labels import is_labelled

    column = label_column(embeddings, name)
    rows = np.flatnonzero(is_labelled(column))
    if not len(rows):
        raise InputError(f"no row has a label in column `{name}`", hint="all of its cells are blank: name another")
    return embeddings if len(rows) == len(embeddings) else embeddings.select(np.asarray(rows))
