"""BACH (ICIAR 2018): 400 microscopy images of the breast in four folders, with the index split that the field uses.

Comes in: the folder that holds ``ICIAR2018_BACH_Challenge``. Goes out: samples with the split of kaiko's eva, which keeps
patients on one side; CLIP-IT tests on its validation part, so here that part is called ``test``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.grouping import read_groups, stem_of
from chiasm.errors import InputError
from chiasm.io.manifest import Rejected
from chiasm.types import Sample

FACTS = DatasetFacts(
    name="bach",
    title="BACH",
    classes=("Benign", "InSitu", "Invasive", "Normal"),
    words={
        "Benign": ("benign breast tissue",),
        "InSitu": ("breast in situ carcinoma",),
        "Invasive": ("breast invasive carcinoma",),
        "Normal": ("normal breast tissue",),
    },
    tile_px=(2048, 1536),
    magnification="20x",
    um_per_px=0.42,
    sizes={"train": 268, "test": 132},
    val="none",
    split_rule="fixed ranges of the sorted files, chosen by kaiko's eva so that no patient is on both sides",
    licence="CC BY-NC-ND 4.0",
    page="https://zenodo.org/records/3632035",
    citation="A. Polónia, C. Eloy, P. Aguiar 2020, BACH Dataset, doi 10.5281/zenodo.3632035; G. Aresta et al. 2019, "
    "Medical Image Analysis 56, doi 10.1016/j.media.2019.05.010",
    layout="ROOT/ICIAR2018_BACH_Challenge/Photos/{Benign,InSitu,Invasive,Normal}/*.tif, 100 files in each",
    tissue="breast",
    cautions=(
        "the folder names no patient: images held out of train may share a patient with the rest of it, unless a table "
        "of patients is given",
        "the test part has 132 images, so an accuracy of 0.85 is known to about ± 0.06 (95 %)",
        "the square in the middle, which encoders crop, leaves out a quarter of the width",
    ),
    sources={
        "um_per_px": "kaiko-ai/eva docs/datasets/bach.md; the data set's card",
        "split_rule": "kaiko-ai/eva, class BACH",
        "licence": "the data set's record on Zenodo",
        "words": "names of the classes on the data set's page, with the organ",
        "tissue": "CLIP-IT, BanafshehKarimian/ModalityPairing",
    },
)
REFERENCE_FACTS = replace(
    FACTS,
    name="bach-clip-it",
    sizes={"train": 254, "val": 14, "test": 132},
    val="reference",
    split_rule=f"{FACTS.split_rule}; then every 20th image of train is val, as CLIP-IT's reference code has it",
    cautions=(
        "val has 14 images: whatever is chosen by it is chosen by chance, and it may share patients with train",
        *FACTS.cautions,
    ),
)
#: Half-open ranges of the files sorted by class and name; every other file is in the other part.
TRAIN_RANGES = ((0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400))
TEST_RANGES = ((41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368))
#: CLIP-IT's reference code takes every 20th index of train, beginning with the first.
REFERENCE_STEP = 20
PER_CLASS = 100
_FOLDERS = ("ICIAR2018_BACH_Challenge/Photos", "Photos", ".")
_SUFFIXES = (".tif", ".tiff")

Val = Literal["none", "reference"]


def load_bach(
    root: str | Path, *, val: Val = "none", patients: str | Path | None = None, partial: bool = False
) -> Dataset:
    """Read the images of BACH with their classes and the fixed split.

    Args:
        root: Folder that holds ``ICIAR2018_BACH_Challenge`` (or ``Photos``, or the four folders).
        val: ``reference`` makes every 20th image of train the split ``val``, as CLIP-IT's code does: 14 images.
        patients: Table of patients, one row an image; see `chiasm.datasets.grouping.read_groups`. With it hold-outs can
            keep patients whole; without it they cannot, because the folder does not name them.
        partial: Take fewer than 400 files. Their place in the split is then told by the number in their name
            (``b001.tif``); files without one are rejected.

    Returns:
        Samples ``Benign/b001.tif`` ..., sorted by class and name, with the label ``label`` and the split.

    Raises:
        InputError: A folder is missing, the number of files is wrong, or an image has no patient in the table.
    """
    check_choice("val of bach", val, ("none", "reference"))
    photos = _photos(Path(root))
    groups = None if patients is None else read_groups(patients)
    placed, rejected = _place(photos, partial)
    split_of = split_indices(val)
    samples = []
    for index, label, path in placed:
        patient = None if groups is None else groups.get(stem_of(path.name))
        if groups is not None and patient is None:
            raise InputError(
                f"the table of patients lacks `{path.name}`", hint="give a table that names every image of BACH"
            )
        samples.append(
            Sample(
                id=f"{label}/{path.name}", image=path, labels={"label": label}, patient=patient, split=split_of[index]
            )
        )
    name = REFERENCE_FACTS.name if val == "reference" else FACTS.name
    return Dataset(tuple(samples), tuple(rejected), name)


def split_indices(val: Val = "none") -> tuple[str, ...]:
    """Return the split of each of the 400 files, in the order of class and name."""
    test = set(_numbers(TEST_RANGES))
    train = list(_numbers(TRAIN_RANGES))
    held = set(train[::REFERENCE_STEP]) if val == "reference" else set()
    return tuple(
        "test" if i in test else "val" if i in held else "train" for i in range(PER_CLASS * len(FACTS.classes))
    )


def _numbers(ranges: Iterable[tuple[int, int]]) -> Iterable[int]:
    return (i for start, stop in ranges for i in range(start, stop))


def _photos(root: Path) -> Path:
    """Return the folder that holds the four classes, or say which folder is missing."""
    if not root.is_dir():
        raise FACTS.missing(f"folder `{root.name}` does not exist")
    found = next((root / f for f in _FOLDERS if any((root / f / c).is_dir() for c in FACTS.classes)), None)
    if found is None:
        raise FACTS.missing("folder `ICIAR2018_BACH_Challenge/Photos` is missing")
    for label in FACTS.classes:
        if not (found / label).is_dir():
            raise FACTS.missing(f"folder `{label}` is missing")
    return found


def _place(photos: Path, partial: bool) -> tuple[list[tuple[int, str, Path]], list[Rejected]]:
    """Return index, class and path of every file, and the files that have no place."""
    placed: list[tuple[int, str, Path]] = []
    rejected: list[Rejected] = []
    for number, label in enumerate(FACTS.classes):
        inside = (p for p in (photos / label).iterdir() if not p.name.startswith("."))
        files = sorted((p for p in inside if p.suffix.casefold() in _SUFFIXES and p.is_file()), key=lambda p: p.name)
        if not partial and len(files) != PER_CLASS:
            raise FACTS.missing(
                f"folder `{label}` holds {len(files)} .tif files, expected {PER_CLASS}, and the split goes by their places",
                hint=f"unpack it again from {FACTS.page}, or open it with partial=True",
            )
        for place, path in enumerate(files):
            found = re.fullmatch(r"[a-z]+0*(\d+)", path.stem.casefold())
            own = int(found.group(1)) - 1 if found else -1
            if not partial:
                placed.append((number * PER_CLASS + place, label, path))
            elif 0 <= own < PER_CLASS:
                placed.append((number * PER_CLASS + own, label, path))
            else:
                rejected.append(
                    Rejected(len(placed) + len(rejected) + 1, f"{label}/{path.name}", "no number in its name")
                )
    if not placed:
        raise FACTS.missing("no .tif file was found")
    return placed, rejected
