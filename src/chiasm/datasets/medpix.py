"""MedPix 2.0: CT and MR images of teaching cases with radiologists' captions.

Comes in: the folder of the JSON lines of the authors (``splitted_dataset/descriptions_*.jsonl``) and of ``images``, or a folder
with the same in one ``metadata.csv``. Goes out: samples with image and caption; a case is one patient.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from chiasm.datasets.columns import cell_text
from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.layout import (
    Part,
    age_in_years,
    find_file,
    find_optional,
    index_films,
    keep_whole,
    read_rows,
    sex_of,
)
from chiasm.datasets.parsing import read_text
from chiasm.errors import FileFormatError
from chiasm.io.manifest import Rejected
from chiasm.types import LabelValue, Sample

FACTS = DatasetFacts(
    name="medpix",
    title="MedPix 2.0",
    classes=(),
    words={},
    tile_px=None,
    magnification=None,
    um_per_px=None,
    sizes={"train": 1_653, "val": 197},
    val="official",
    split_rule="the authors' parts, which share no case; their `dev` is here val, and there is a `test` beside these",
    licence="none stated by the authors; read the terms of MedPix (National Library of Medicine) before you pass it on",
    page="https://github.com/CHILab1/MedPix-2.0",
    citation="I. Siragusa, S. Contino, M. La Ciura, R. Alicata, R. Pirrone 2025, MedPix 2.0: A Comprehensive Multimodal "
    "Biomedical Data set for Advanced AI Applications, Data Science and Engineering, doi 10.1007/s41019-025-00297-8",
    layout="ROOT/splitted_dataset/descriptions_{train,dev}.jsonl and ROOT/images/*.png, in ROOT itself or in "
    "ROOT/MedPix-2-0; or ROOT/metadata.csv and ROOT/images",
    tissue=None,
    cautions=(
        "images of a case often share a caption: in retrieval each of them is a right answer",
        "some captions are placeholders (`replace this ...`); `Dataset.filter_texts` leaves them out",
        "a mark `MedPix`, and on some images an address, is burned in below: crop it before you believe a score",
    ),
    sources={"sizes": "the authors' lists"},
    kind="findings",
    columns=("modality_type", "modality", "plane", "location", "location_category", "age_years", "sex"),
    texts=True,
)
#: Our name of a split -> theirs.
SPLITS = {"train": "train", "val": "dev", "test": "test"}
_FOLDERS = ("splitted_dataset", "MedPix-2-0/splitted_dataset", "")
_IMAGE_FOLDERS = ("images", "MedPix-2-0/images", "")
#: Key of a row here -> place in an object of the JSON lines.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "image": ("image",), "case_id": ("U_id",), "caption": ("Description", "Caption"), "modality_type": ("Type",),
    "modality": ("Description", "Modality"), "plane": ("Description", "Plane"), "location": ("Location",),
    "location_category": ("Location Category",), "age": ("Description", "Age"), "sex": ("Description", "Sex"),
}  # fmt: skip


def load_medpix(
    root: str | Path,
    *,
    splits: Sequence[str] = ("train", "val"),
    require: Sequence[Part] = ("image", "text"),
) -> Dataset:
    """Read the captions and where the images lie.

    Args:
        root: Folder of the download, or of a ``metadata.csv`` with the columns ``image``, ``split``, ``case_id``,
            ``caption`` and those named like the labels.
        splits: Which parts to open; the files of others may be absent.
        require: What a sample must have, of ``image`` and ``text``.

    Returns:
        Samples named by the image without its ending (``MPX1009_synpic46283``), by part, in the order of the file.
        ``patient`` is the case. Labels: ``modality_type`` (CT, MR), ``modality``, ``plane``, ``location``,
        ``location_category``, ``age_years`` and ``sex``.

    Raises:
        InputError: A file is missing, nothing required was found, or a split is unknown.
        UnknownName: The table lacks a column.
        FileFormatError: A file is damaged.
    """
    root = Path(root)
    for split in splits:
        check_choice("split of medpix", split, tuple(SPLITS))
    table = find_optional(root, ("metadata.csv",))
    parts = _from_table(table) if table is not None else _from_lines(root, splits)
    images = index_films(root, _IMAGE_FOLDERS)
    theirs = {SPLITS[split]: split for split in splits}
    rows: list[tuple[int, Sample]] = []
    rejected: list[Rejected] = []
    for number, part, cells in parts:
        name, case = PurePosixPath(cells["image"] or "").name, cells["case_id"]
        stem = name.rpartition(".")[0] if name.casefold().endswith((".png", ".jpg", ".jpeg")) else name
        if part not in theirs:
            continue
        if not stem or case is None:
            rejected.append(Rejected(number, stem, "image or case is blank"))
            continue
        labels: dict[str, LabelValue] = {name: cells[name] for name in FACTS.columns[:5]}
        labels |= {"age_years": age_in_years(cells["age"]), "sex": sex_of(cells["sex"])}
        rows.append((number, Sample(stem, images.get(stem), cells["caption"], case, labels=labels, split=theirs[part])))
    rows.sort(key=lambda row: tuple(splits).index(str(row[1].split)))
    return keep_whole(FACTS, rows, rejected, require)


_Row = tuple[int, str | None, Mapping[str, str | None]]


def _from_table(table: Path) -> Iterator[_Row]:
    for number, cells in read_rows(table, {name: name for name in ("split", *_KEYS)}):
        yield number, cells["split"], cells


def _from_lines(root: Path, splits: Sequence[str]) -> Iterator[_Row]:
    for split in splits:
        word = SPLITS[split]
        names = [f"descriptions_{word}.jsonl"]
        if split == "train" and find_optional(root, names, _FOLDERS) is None:
            names = [f"descriptions_{word}_{half}.jsonl" for half in (1, 2)]
        for name in names:
            for number, cells in _read_lines(find_file(FACTS, root, (name,), _FOLDERS)):
                yield number, word, cells


def _read_lines(path: Path) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    for number, line in enumerate((x for x in read_text(path)[0].split("\n") if x.strip()), start=1):
        try:
            record = json.loads(line)
            yield number, {key: _cell(record, place) for key, place in _KEYS.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise FileFormatError(f"line {number} of `{path.name}` is no description of an image") from error


def _cell(record: Mapping[str, object], place: tuple[str, ...]) -> str | None:
    value: object = record
    for key in place:
        if not isinstance(value, Mapping):
            raise TypeError
        value = value.get(key)
    return cell_text(value)
