"""Miniatures of the public data sets that are told by tables: chest films with findings, reports, boxes, splits.

Comes in: a folder, a number of images of each class, and a function that draws a picture of a class. Goes out: the layout
of the real download. The values are made up; ids have the real form and are of nobody.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chiasm.datasets import nih14

Draw = Callable[[int], NDArray[np.uint8]]


def save_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a picture, and the folders above it."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write a table, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_nih14(root: Path, per_class: int, draw: Draw) -> None:
    """Write ChestX-ray14: two films a patient, every second film with two findings, a fifth of the patients to test."""
    header = (
        "Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position",
        "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]",
    )  # fmt: skip
    rows: list[tuple[object, ...]] = [header]
    boxes: list[tuple[object, ...]] = [("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]", "", "", "")]
    lists: dict[str, list[str]] = {split: [] for split in nih14.LISTS}
    count = per_class * len(nih14.FACTS.classes)
    for i in range(count):
        number, patient = i // per_class, i // 2 + 1
        finding = nih14.FACTS.classes[number]
        second = nih14.FINDINGS[(number + 1) % len(nih14.FINDINGS)]
        name = f"{patient:08d}_{i % 2:03d}.png"
        found = f"{finding}|{second}" if i % 2 and finding != nih14.NO_FINDING else finding
        rows.append((name, found, i % 2, patient, 20 + i % 60, "MF"[patient % 2], ("PA", "AP")[i % 2], 2500, 2048, 0.1, 0.1))  # fmt: skip
        lists["test" if patient % 5 == 0 else "train"].append(name)
        save_picture(root / f"images_{1 + i % 2:03d}" / "images" / name, draw(number))
        if i % per_class == 0 and finding != nih14.NO_FINDING:
            box_name = "Infiltrate" if finding == "Infiltration" else finding
            boxes.append((name, box_name, 225.5, 547.0, 86.5, 79.0))
    write_csv(root / nih14.TABLES[0], rows)
    write_csv(root / nih14.BOXES, boxes)
    for split, names in lists.items():
        (root / nih14.LISTS[split]).write_text("\n".join(names) + "\n", encoding="utf-8")


#: Name of a data set, without what follows a dash -> what writes its miniature.
WRITERS: Mapping[str, Callable[[Path, int, Draw], None]] = {"nih14": write_nih14}
