"""Miniatures of the public data sets: their files and folders with drawn pictures, to try a command before a download.

Comes in: a name of the table and a folder. Goes out: the layout of the real download, a few kilobytes in size. A class is
a colour and a stripe, with noise: enough to see a pipeline learn, and of no other meaning.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chiasm.datasets import bach, crc, lc25000, pcam
from chiasm.datasets.miniature_tables import WRITERS
from chiasm.datasets.named import dataset_facts
from chiasm.errors import InputError, MissingExtra

_Draw = Callable[[int], NDArray[np.uint8]]
#: Images made of one tile of LC25000; the real one has about 20.
COPIES = 4


def make_miniature(
    name: str, folder: str | Path, *, per_class: int = 10, size_px: int = 24, seed: int = 0, noise: float = 25.0
) -> Path:
    """Write a small data set in the layout of a public one and return its root.

    Args:
        name: A name of the table, ``pcam`` or ``nih14`` say.
        folder: Is made if absent.
        per_class: Images of each class and split; BACH always has 100 of each class.
        size_px: Side of an image.
        seed: Of the noise.
        noise: Its standard deviation, in grey values.

    Raises:
        UnknownName: No such data set.
        InputError: A number is too small.
        MissingExtra: h5py is not installed, for PatchCamelyon.
    """
    facts = dataset_facts(name)
    if per_class < 5 or size_px < 4:
        raise InputError(f"a miniature needs 5 images of a class and 4 px, got {per_class} and {size_px}")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    family = facts.name.partition("-")[0]
    classes = max(1, len(facts.classes))

    def draw(number: int) -> NDArray[np.uint8]:
        return draw_class(number, classes, size_px, rng, noise)

    if facts.name in WRITERS:
        WRITERS[facts.name](root, per_class, draw)
        return root
    if family == "pcam":
        _write_pcam(root, per_class, draw)
        return root
    if family == "bach":
        photos = root / "ICIAR2018_BACH_Challenge" / "Photos"
        for number, (label, letter) in enumerate(zip(facts.classes, ("b", "is", "iv", "n"), strict=True)):
            for i in range(bach.PER_CLASS):
                _save(photos / label / f"{letter}{i + 1:03d}.tif", draw(number))
    elif family == "crc":
        for part in (facts.title, crc.TEST_FOLDER):
            for number, label in enumerate(facts.classes):
                for i in range(per_class):
                    _save(root / part / label / f"{label}-{i:04d}.tif", draw(number))
    else:
        _write_lc25000(root, facts.classes, per_class, draw)
    return root


def draw_class(
    number: int, classes: int, size_px: int, rng: np.random.Generator, noise: float = 25.0
) -> NDArray[np.uint8]:
    """Return a picture of a class: its hue, a stripe at its place, noise. Shape (size_px, size_px, 3)."""
    angle = 2 * np.pi * number / classes
    colour = 150 + 60 * np.cos(angle + np.array([0.0, 2.1, 4.2]))
    picture = np.tile(colour, (size_px, size_px, 1))
    width = max(1, size_px // (classes + 1))
    picture[:, number * width : (number + 1) * width] -= 80
    picture += rng.normal(0, noise, picture.shape)
    pixels: NDArray[np.uint8] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return pixels


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _write_pcam(root: Path, per_class: int, draw: _Draw) -> None:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("h5py", "data") from error
    folder = root / "pcam"
    folder.mkdir(exist_ok=True)
    for word in pcam.SPLITS.values():
        labels = np.arange(2 * per_class) % 2
        stem = f"camelyonpatch_level_2_split_{word}"
        with h5py.File(folder / f"{stem}_x.h5", "w") as file:
            file["x"] = np.stack([draw(int(label)) for label in labels])
        with h5py.File(folder / f"{stem}_y.h5", "w") as file:
            file["y"] = labels.astype(np.uint8).reshape(-1, 1, 1, 1)
        with (folder / f"{stem}_meta.csv").open("w", newline="") as table:
            csv.writer(table).writerows([("", "wsi"), *((i, f"{word}_slide_{i // 4}") for i in range(len(labels)))])


def _write_lc25000(root: Path, classes: tuple[str, ...], per_class: int, draw: _Draw) -> None:
    rows: list[tuple[object, ...]] = [("stem", "filename", "label", "tissue", "local_cluster_label", "group_id")]
    for number, label in enumerate(classes):
        tissue = label.partition("_")[0]
        for i in range(per_class):
            tile = i // COPIES
            if i % COPIES == 0:
                original = draw(number)
            stem = f"{label.replace('_', '')}{i + 1}"
            _save(root / f"{tissue}_image_sets" / label / f"{stem}.jpeg", np.rot90(original, i % COPIES).copy())
            rows.append((stem, f"{stem}.jpeg", label, tissue, tile, number * per_class + tile))
    with (root / lc25000.GROUP_FILES[0]).open("w", newline="") as table:
        csv.writer(table).writerows(rows)
