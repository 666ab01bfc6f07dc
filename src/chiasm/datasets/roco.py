"""ROCO and ROCOv2: radiology figures of open articles with their captions.

Comes in: ROCO's ``captions.txt`` beside a folder ``images`` for each split, or ROCOv2's ``train_captions.csv`` ... Goes out:
samples with image and caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.layout import Part, find_file, find_optional, index_films, keep_whole, read_rows
from chiasm.datasets.parsing import read_text
from chiasm.io.manifest import Rejected
from chiasm.types import Sample

FACTS = DatasetFacts(
    name="roco",
    title="ROCO",
    classes=(),
    words={},
    tile_px=None,
    magnification=None,
    um_per_px=None,
    sizes={"train": 65_460, "val": 8_183, "test": 8_182},
    val="official",
    split_rule="the authors' three parts; `validation` is here val",
    licence="each figure has the licence of its article; look there before you pass it on",
    page="https://github.com/razorx89/roco-dataset",
    citation="O. Pelka, S. Koitka, J. Rückert, F. Nensa, C. M. Friedrich 2018, Radiology Objects in COntext (ROCO): A "
    "Multimodal Image Dataset, LABELS workshop at MICCAI, doi 10.1007/978-3-030-01364-6_20",
    layout="ROOT/{train,validation,test}/radiology/captions.txt and ROOT/{train,validation,test}/radiology/images/*.jpg, in "
    "ROOT itself, ROOT/data or ROOT/all_data; the names of the images are in dlinks.txt or traindata.csv",
    tissue=None,
    cautions=(
        "no patient is named; without the links (`dlinks.txt`) no article either, and figures of one article may lie in two "
        "parts",
        "a caption speaks of its article: it may say what the figure does not show, or nothing of it",
        "models trained on PubMed Central (BiomedCLIP, PMC-CLIP) may have seen these figures and captions",
    ),
    sources={"sizes": "the lists of captions"},
    kind="findings",
    texts=True,
)
V2_FACTS = replace(
    FACTS,
    name="rocov2",
    title="ROCOv2",
    sizes={"train": 59_958, "val": 9_904, "test": 9_927},
    split_rule="the authors' three parts; `valid` is here val",
    page="https://zenodo.org/records/10821435",
    citation="J. Rückert, L. Bloch, R. Brüngel et al. 2024, ROCOv2: Radiology Objects in COntext Version 2, an Updated "
    "Multimodal Image Dataset, Scientific Data 11, 688",
    layout="ROOT/{train,valid,test}_captions.csv and ROOT/{train,valid,test}/*.jpg",
)
#: Our name of a split -> theirs.
SPLITS = {"train": "train", "val": "validation", "test": "test"}
V2_SPLITS = {"train": "train", "val": "valid", "test": "test"}

Version = Literal[1, 2]


def load_roco(
    root: str | Path,
    *,
    version: Version = 1,
    splits: Sequence[str] = ("train", "val", "test"),
    require: Sequence[Part] = ("image", "text"),
) -> Dataset:
    """Read the captions and where the figures lie.

    Args:
        root: Folder of the download.
        version: 1 for ROCO, 2 for ROCOv2.
        splits: Which parts to open; files of others may be absent.
        require: What a sample must have, of ``image`` and ``text``. Many figures of ROCO could not be downloaded any more.

    Returns:
        Samples ``ROCO_00002`` ..., by part, in the order of the captions; no labels. ``study`` is the article
        (``PMC4083729``) where `dlinks.txt` or the names of the images tell it.

    Raises:
        InputError: A list of captions is missing, nothing required was found, or a split is unknown.
        UnknownName: A table lacks a column.
        FileFormatError: A list is damaged.
    """
    root = Path(root)
    facts, names = (FACTS, SPLITS) if version == 1 else (V2_FACTS, V2_SPLITS)
    rows: list[tuple[int, Sample]] = []
    rejected: list[Rejected] = []
    for split in splits:
        check_choice(f"split of {facts.name}", split, tuple(names))
        word = names[split]
        if version == 1:
            path = find_file(facts, root, (f"{word}/radiology/captions.txt",), ("", "data", "all_data"))
            captions, images = _read_lines(path, rejected), index_films(path.parent, ("images",))
            files = _read_names(path.parent, word)
        else:
            path = find_file(facts, root, (f"{word}_captions.csv",))
            files = {}
            captions, images = _read_table(path), index_films(root, (word, f"{word}_images", f"{word}_images/{word}"))
        for number, name, caption in captions:
            file = files.get(name, "")
            article = re.match(r"PMC\d+(?=_)", file)
            rows.append((number, Sample(
                id=name, image=images.get(name) or images.get(file.rpartition(".")[0]), text=caption, split=split,
                study=article.group() if article else None,
            )))  # fmt: skip
    return keep_whole(facts, rows, rejected, require)


def _read_lines(path: Path, rejected: list[Rejected]) -> Iterator[tuple[int, str, str | None]]:
    """Yield number, name and caption of lines ``ROCO_00002<tab> caption``."""
    for number, line in enumerate(read_text(path)[0].splitlines(), start=1):
        name, tab, caption = line.partition("\t")
        if tab and name.strip():
            yield number, name.strip(), caption.strip() or None
        elif line.strip():
            rejected.append(Rejected(number, "", "line has no tab after its name"))


def _read_names(folder: Path, word: str) -> dict[str, str]:
    """Return id -> file name, ``PMC4083729_AMHSR-4-14-g002.jpg``, which the authors' script gives the images."""
    short = "val" if word == "validation" else word
    table = find_optional(folder, (f"{short}data.csv", f"../radiology{short}data.csv"))
    if table is not None:
        return {str(c["id"]): c["name"] or "" for _, c in read_rows(table, {"id": "id", "name": "name"})}
    found: dict[str, str] = {}
    for path in sorted(folder.glob("dlinks*.txt")):
        for line in read_text(path)[0].splitlines():
            cells = line.split("\t")
            article = re.search(r"(PMC\d+)\.tar\.gz", line)
            if len(cells) > 2 and article is not None:
                found[cells[0].strip()] = f"{article.group(1)}_{cells[-1].strip()}"
    return found


def _read_table(path: Path) -> Iterator[tuple[int, str, str | None]]:
    for number, cells in read_rows(path, {"id": "ID", "caption": "Caption"}):
        if cells["id"] is not None:
            yield number, cells["id"], cells["caption"]
