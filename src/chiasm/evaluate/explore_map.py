"""A projection to one self-contained HTML file: a map to move in, to colour, to search and to select from.

Comes in: places, ids, columns of classes; texts and thumbnails only where the caller hands them over. Goes out: HTML text
that asks nobody for anything: its one script is allowed by its hash, all else is forbidden, so a label or a report can
never run. Up to about 50,000 points move smoothly.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import ChiasmError
from chiasm.evaluate.page import TEMPLATES, Note
from chiasm.metrics.labels import is_missing
from chiasm.progress import Progress, SilentProgress
from chiasm.types import LabelValue, Modality

#: More different values are no classes: numbers are cut into bands, other columns are left out.
MOST_CLASSES = 40
BANDS = 6
#: Side of a thumbnail and thumbnails across a sheet.
THUMBNAIL_PX = 72
ACROSS = 16


@dataclass(frozen=True)
class MapColumn:
    """Classes that the map can be coloured by.

    Attributes:
        name: As shown.
        categories: Names of the classes.
        codes: int16, shape (n,): the class of each row, -1 where it has none.
        ordered: Whether classes are bands of a number; they get colours of one scale.
        missing: What a row without a class is called.
    """

    name: str
    categories: tuple[str, ...]
    codes: NDArray[np.int16]
    ordered: bool = False
    missing: str = "not labelled"


@dataclass(frozen=True)
class Thumbnails:
    """Small pictures in sheets.

    Attributes:
        sheets: ``data:`` URLs (JPEG) of squares of :data:`ACROSS` by :data:`ACROSS` pictures.
        cells: int32, shape (n,): place of each row over all sheets, -1 where it has none.
        size_px: Side of one.
        shown: Rows that have one.
        of: Rows that have an image.
    """

    sheets: tuple[str, ...]
    cells: NDArray[np.int32]
    size_px: int
    shown: int
    of: int

    @property
    def note(self) -> str:
        """One sentence where not all rows have one."""
        return "" if self.shown == self.of else f"Thumbnails of {self.shown:,} of {self.of:,} images, chosen at random."


def map_column(name: str, values: Sequence[LabelValue]) -> MapColumn | None:
    """Return the classes of a column of labels, or None when it has none to colour by.

    Text of more than :data:`MOST_CLASSES` different values is left out; so is text that nearly every row has another of.
    Numbers with more than that are cut into bands with about equally many rows.
    """
    plain = [None if is_missing(v) else v for v in values]
    known = sorted({v for v in plain if v is not None}, key=lambda v: (isinstance(v, str), v))
    rows = sum(v is not None for v in plain)
    numbers = [v for v in known if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(known) and len(known) > 12:
        return _bands(name, plain)
    if not known or len(known) > MOST_CLASSES or (len(known) > 12 and len(known) > rows / 3):
        return None
    number = {v: i for i, v in enumerate(known)}
    codes = np.asarray([-1 if v is None else number[v] for v in plain], dtype=np.int16)
    return MapColumn(name, tuple(_text(v) for v in known), codes)


def _bands(name: str, values: Sequence[LabelValue]) -> MapColumn:
    array = np.asarray([math.nan if v is None else float(v) for v in values])
    edges = np.unique(np.nanquantile(array, np.linspace(0, 1, BANDS + 1)))
    codes = np.clip(np.searchsorted(edges, array, side="right") - 1, 0, max(len(edges) - 2, 0))
    names = tuple(f"{_text(float(a))} to {_text(float(b))}" for a, b in pairwise(edges))
    return MapColumn(name, names, np.where(np.isnan(array), -1, codes).astype(np.int16), ordered=True)


def _text(value: LabelValue) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def make_thumbnails(
    paths: Sequence[str | None],
    *,
    budget_mb: float = 12.0,
    size_px: int = THUMBNAIL_PX,
    seed: int = 0,
    progress: Progress | None = None,
) -> Thumbnails:
    """Return small pictures of images, of a random part of them when the budget does not hold all.

    Args:
        paths: One per row, None where there is no image. A file that cannot be read has no thumbnail.
        budget_mb: Of the sheets in the page.
        size_px: Side of one; the image is fitted inside, on black.
        seed: Of the choice.
        progress: Is told of every image.
    """
    from PIL import Image

    from chiasm.datasets.images import open_image_path

    progress = progress or SilentProgress()
    rows = [i for i, p in enumerate(paths) if p]
    order = np.random.default_rng(seed).permutation(rows).tolist() if rows else []
    cells = np.full(len(paths), -1, dtype=np.int32)
    sheets: list[str] = []
    used, place, per_sheet = 0, 0, ACROSS * ACROSS
    progress.start(len(order), "thumbnails")
    while order and used < budget_mb * 1e6:
        sheet = Image.new("RGB", (ACROSS * size_px, ACROSS * size_px))
        filled: list[int] = []
        while order and len(filled) < per_sheet:
            row = order.pop()
            progress.advance()
            try:
                picture = open_image_path(Path(str(paths[row]))).convert("RGB")
            except (ChiasmError, OSError):
                continue
            picture.thumbnail((size_px, size_px))
            left, top = (len(filled) % ACROSS) * size_px, (len(filled) // ACROSS) * size_px
            sheet.paste(picture, (left + (size_px - picture.width) // 2, top + (size_px - picture.height) // 2))
            filled.append(row)
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=72, optimize=True)
        source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        if not filled or used + len(source) > budget_mb * 1e6:
            break
        cells[filled] = np.arange(place, place + len(filled))
        place, used = place + per_sheet, used + len(source)
        sheets.append(source)
    progress.finish()
    return Thumbnails(tuple(sheets), cells, size_px, int((cells >= 0).sum()), len(rows))


def render_map(
    xy: NDArray[np.float32],
    ids: Sequence[str],
    columns: Sequence[MapColumn],
    *,
    title: str,
    subtitle: str,
    notes: Sequence[Note],
    modalities: Sequence[Modality] | None = None,
    texts: Sequence[str | None] | None = None,
    thumbnails: Thumbnails | None = None,
) -> str:
    """Return the map as HTML text.

    Args:
        xy: (n, 2) places.
        ids: One per row; shown, searched and written to the CSV.
        columns: At least one; the first colours the map at the start.
        title: Heading.
        subtitle: One line under it.
        notes: How to read the map.
        modalities: One per row; texts get pointed marks where there are both.
        texts: Shown beside the pointer and searched; only where the user asked.
        thumbnails: Shown beside the pointer; only where the user asked.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    places = np.ascontiguousarray(xy, dtype="<f4")
    data: dict[str, Any] = {
        "n": len(ids),
        "x": _packed(places[:, 0]),
        "y": _packed(places[:, 1]),
        "ids": list(ids),
        "columns": [
            {
                "name": c.name,
                "categories": list(c.categories),
                "ordered": c.ordered,
                "missing": c.missing,
                "codes": _packed(c.codes),
            }
            for c in columns
        ],
        "modality": _packed(np.asarray([m == "text" for m in modalities], dtype=np.uint8)) if modalities else None,
        "texts": list(texts) if texts is not None else None,
        "thumbnails": None
        if thumbnails is None or not thumbnails.sheets
        else {
            "sheets": list(thumbnails.sheets),
            "cells": _packed(thumbnails.cells),
            "size": thumbnails.size_px,
            "across": ACROSS,
        },
    }
    script = (TEMPLATES / "map.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("map.html").render(
        title=title,
        subtitle=subtitle,
        notes=[n for n in notes if n.text],
        count=f"{len(ids):,}",
        search_label="Search ids and texts" if texts is not None else "Search ids",
        style=(TEMPLATES / "map.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        data=_inside_script(data),
    )


def _packed(values: NDArray[Any]) -> str:
    """Return the little-endian bytes of an array as base64."""
    array = np.ascontiguousarray(values)
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def _inside_script(value: Any) -> str:
    """Return JSON that cannot end the element it stands in, whatever its texts hold; ASCII, so half characters survive."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
