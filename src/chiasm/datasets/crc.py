"""NCT-CRC-HE: patches of colorectal tissue in nine folders, 100,000 to train with and 7,180 of other patients to test.

Comes in: the folder that holds ``NCT-CRC-HE-100K`` and ``CRC-VAL-HE-7K``. Goes out: samples with a validation split made as
CLIP-IT's reference code makes it: a stratified fifth of the 100,000.

Deviation: the reference numbers files as a file of labels says that it does not ship; here they are sorted by class and
name. The split is the reference's if its order was this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.errors import InputError
from chiasm.types import Sample

FACTS = DatasetFacts(
    name="crc",
    title="NCT-CRC-HE-100K",
    classes=("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"),
    words={
        "ADI": ("adipose",),
        "BACK": ("background",),
        "DEB": ("debris",),
        "LYM": ("lymphocytes",),
        "MUC": ("mucus",),
        "MUS": ("smooth muscle",),
        "NORM": ("normal colon mucosa",),
        "STR": ("cancer-associated stroma",),
        "TUM": ("colorectal adenocarcinoma epithelium",),
    },
    tile_px=(224, 224),
    magnification="20x",
    um_per_px=0.5,
    sizes={"train": 80_000, "val": 20_000, "test": 7_180},
    val="reference",
    split_rule="test is CRC-VAL-HE-7K, of other patients; val is a stratified fifth of NCT-CRC-HE-100K, seed 42",
    licence="CC BY 4.0",
    page="https://zenodo.org/records/1214456",
    citation="J. N. Kather, N. Halama, A. Marx 2018, 100,000 histological images of human colorectal cancer and healthy "
    "tissue, doi 10.5281/zenodo.1214456",
    layout="ROOT/NCT-CRC-HE-100K/{ADI,BACK,DEB,LYM,MUC,MUS,NORM,STR,TUM}/*.tif and the same in ROOT/CRC-VAL-HE-7K",
    tissue="colo",
    cautions=(
        "val is optimistic: the patient of a training patch is unknown, so train and val share patients",
        "the training patches are colour-normalised (Macenko)",
    ),
    sources={
        "sizes": "the data set's record on Zenodo; kaiko-ai/eva docs/datasets/crc.md",
        "um_per_px": "the data set's record on Zenodo",
        "licence": "the data set's record on Zenodo",
        "words": "names of the tissues on the data set's record",
        "split_rule": "CLIP-IT, BanafshehKarimian/ModalityPairing: train_test_split(test_size=0.2, random_state=42)",
        "tissue": "CLIP-IT, BanafshehKarimian/ModalityPairing",
    },
)
NONORM_FACTS = replace(
    FACTS,
    name="crc-nonorm",
    title="NCT-CRC-HE-100K-NONORM",
    split_rule=FACTS.split_rule.replace("NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM"),
    layout=FACTS.layout.replace("NCT-CRC-HE-100K/", "NCT-CRC-HE-100K-NONORM/"),
    cautions=(FACTS.cautions[0], "the training patches are not colour-normalised"),
)
TEST_FOLDER = "CRC-VAL-HE-7K"
VAL_SHARE, VAL_SEED = 0.2, 42
_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")

Colours = Literal["normalised", "original"]


def load_crc(root: str | Path, *, colours: Colours = "normalised") -> Dataset:
    """Read the patches with their tissue and split.

    Args:
        root: Folder that holds the two folders of the download.
        colours: ``original`` reads ``NCT-CRC-HE-100K-NONORM`` to train with, in place of ``NCT-CRC-HE-100K``.

    Returns:
        Samples ``NCT-CRC-HE-100K/ADI/ADI-AAAFLCLY.tif`` ..., sorted by folder, class and name, with the label ``label``.

    Raises:
        InputError: A folder is missing or empty.
    """
    check_choice("colours of crc", colours, ("normalised", "original"))
    facts = FACTS if colours == "normalised" else NONORM_FACTS
    root = Path(root)
    if not root.is_dir():
        raise facts.missing(f"folder `{root.name}` does not exist")
    train = list(_samples(root, facts.title, facts))
    test = list(_samples(root, TEST_FOLDER, facts))
    held = set(held_out([facts.class_number(str(s.labels["label"])) for s in train]))
    split = [replace(s, split="val" if i in held else "train") for i, s in enumerate(train)]
    return Dataset((*split, *(replace(s, split="test") for s in test)), (), facts.name)


def held_out(classes: Sequence[int]) -> list[int]:
    """Return the rows of the validation split, sorted: a stratified fifth, with the reference's function and seed.

    Raises:
        InputError: There are too few patches to hold out a fifth with every class in it.
    """
    from sklearn.model_selection import train_test_split

    try:
        _, held = train_test_split(
            range(len(classes)), test_size=VAL_SHARE, random_state=VAL_SEED, shuffle=True, stratify=classes
        )
    except ValueError as error:
        raise InputError(
            f"{len(classes)} patches are too few to hold out a fifth with all {len(set(classes))} classes in it",
            hint="every class needs at least 5 patches",
        ) from error
    return sorted(held)


def _samples(root: Path, folder: str, facts: DatasetFacts) -> Iterator[Sample]:
    if not (root / folder).is_dir():
        raise facts.missing(f"folder `{folder}` is missing")
    for label in facts.classes:
        place = root / folder / label
        if not place.is_dir():
            raise facts.missing(f"folder `{folder}/{label}` is missing")
        names = sorted(
            p.name for p in place.iterdir() if p.suffix.casefold() in _SUFFIXES and not p.name.startswith(".")
        )
        if not names:
            raise facts.missing(f"folder `{folder}/{label}` holds no image")
        for name in names:
            yield Sample(id=f"{folder}/{label}/{name}", image=place / name, labels={"label": label})
