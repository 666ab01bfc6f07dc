"""RSNA pneumonia detection challenge: 26,684 frontal chest films of NIH ChestX-ray14 with boxes drawn by radiologists.

Comes in: the folder of ``stage_2_train_labels.csv``, ``stage_2_detailed_class_info.csv`` and ``stage_2_train_images``. Goes
out: one sample a film with its class, whether pneumonia was suspected, and the boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts
from chiasm.datasets.layout import Part, find_file, find_optional, index_films, keep_whole, read_box, read_rows
from chiasm.errors import FileFormatError
from chiasm.types import Box, Sample

FACTS = DatasetFacts(
    name="rsna-pneumonia",
    title="RSNA Pneumonia Detection Challenge",
    classes=("Normal", "No Lung Opacity / Not Normal", "Lung Opacity"),
    words={
        "Normal": ("normal chest x-ray",),
        "No Lung Opacity / Not Normal": ("abnormal chest x-ray without lung opacity",),
        "Lung Opacity": ("lung opacity suspicious of pneumonia", "pneumonia"),
    },
    tile_px=(1024, 1024),
    magnification=None,
    um_per_px=None,
    sizes={"all": 26_684},
    val="none",
    split_rule="none is given: the labels of the challenge's test images are not in the download",
    licence="not stated here; read the rules on the download page before you pass images on",
    page="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge",
    citation="G. Shih, C. C. Wu, S. S. Halabi et al. 2019, Augmenting the National Institutes of Health Chest Radiograph "
    "Dataset with Expert Annotations of Possible Pneumonia, Radiology: Artificial Intelligence 1(1), e180041",
    layout="ROOT/stage_2_train_labels.csv, ROOT/stage_2_detailed_class_info.csv and ROOT/stage_2_train_images/*.dcm",
    tissue=None,
    cautions=(
        "the column `patientId` names a film; the patient is unknown here, and some have several films, so a split by "
        "film leaks",
        "the films are of NIH ChestX-ray14: a model that was trained on it has seen them",
        "the images are DICOM files; convert them to PNG or JPEG of the same size and name beside them to open them",
        "boxes mark what may be pneumonia on the film alone, without the course of the illness",
    ),
    sources={"sizes": "stage_2_train_labels.csv", "words": "names of the classes", "citation": "Shih et al. 2019"},
    columns=("pneumonia",),
    needs_groups=True,
)
_LABELS = {
    "id": "patientId", "x": "x", "y": "y", "width": "width", "height": "height", "target": "Target",
}  # fmt: skip


def load_rsna(root: str | Path, *, require: Sequence[Part] = ("image",)) -> Dataset:
    """Read the tables and where the films lie.

    A film is looked for as ``.png`` or ``.jpg`` first, because DICOM files cannot be opened here: their path is given as it is.

    Args:
        root: Folder of the download.
        require: ``("image",)`` rejects films whose file is absent; ``()`` takes the labels alone.

    Returns:
        Samples named by the column ``patientId``, in the order of the table, with the labels ``label`` (one of the three
        classes; None without the table of them) and ``pneumonia`` (1 or 0), and boxes in pixels of the 1024 x 1024
        film. ``patient`` is None.

    Raises:
        InputError: The table of labels is missing, or no film was found.
        UnknownName: A table lacks a column.
        FileFormatError: A table is damaged, contradicts itself or the other one.
    """
    root = Path(root)
    table = find_file(FACTS, root, ("stage_2_train_labels.csv",))
    classes = _read_classes(root)
    images = index_films(root, ("stage_2_train_images", "train_images", "images"))
    found: dict[str, tuple[int, int]] = {}
    boxes: dict[str, list[Box]] = {}
    for number, cells in read_rows(table, _LABELS):
        name, target = cells["id"], cells["target"]
        if name is None or target not in ("0", "1") or found.setdefault(name, (number, int(target)))[1] != int(target):
            raise FileFormatError(f"row {number} of `{table.name}` has no film, no target, or another one than before")
        if target == "1":
            corners = [cells[key] for key in ("x", "y", "width", "height")]
            boxes.setdefault(name, []).append(read_box(corners, "Lung Opacity", number, table, sides=True))
    if classes and any((classes.get(name) == "Lung Opacity") != bool(target) for name, (_, target) in found.items()):
        raise FileFormatError("the tables of targets and of classes contradict each other", hint="download both again")
    rows = [
        (number, Sample(
            id=name, image=images.get(name), labels={"label": classes.get(name), "pneumonia": target},
            boxes=tuple(boxes.get(name, ())),
        ))
        for name, (number, target) in found.items()
    ]  # fmt: skip
    return keep_whole(FACTS, rows, (), require)


def _read_classes(root: Path) -> dict[str, str]:
    """Return film -> class; nothing where the table is absent."""
    path = find_optional(root, ("stage_2_detailed_class_info.csv",))
    if path is None:
        return {}
    found: dict[str, str] = {}
    for number, cells in read_rows(path, {"id": "patientId", "class": "class"}):
        if cells["id"] is None or cells["class"] not in FACTS.classes:
            raise FileFormatError(f"row {number} of `{path.name}` has no film, or a class that is none of the three")
        found[cells["id"]] = cells["class"]
    return found
