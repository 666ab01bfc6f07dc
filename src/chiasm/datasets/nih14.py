"""NIH ChestX-ray14: 112,120 chest films with fourteen findings read out of reports, and boxes on some of them.

Comes in: the folder of ``Data_Entry_2017_v2020.csv`` (or the older ``Data_Entry_2017.csv``), with the images in
``images_001/images`` ... or in one folder ``images``. Goes out: samples with fifteen labels, patient, official split,
boxes, age, sex and view.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts
from chiasm.datasets.layout import (
    Part,
    age_in_years,
    find_file,
    find_optional,
    in_words,
    index_images,
    keep_whole,
    read_box,
    read_rows,
    sex_of,
)
from chiasm.datasets.parsing import parse_table, read_text
from chiasm.errors import FileFormatError
from chiasm.io.manifest import Rejected
from chiasm.types import Box, LabelValue, Sample

NO_FINDING = "No Finding"
FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
FACTS = DatasetFacts(
    name="nih14",
    title="NIH ChestX-ray14",
    classes=(*FINDINGS, NO_FINDING),
    words=in_words((*FINDINGS, NO_FINDING), Effusion=("pleural effusion",), Edema=("pulmonary edema",)),
    tile_px=(1024, 1024),
    magnification=None,
    um_per_px=None,
    sizes={"train": 86_524, "test": 25_596},
    val="none",
    split_rule="the authors' two lists, `train_val_list.txt` (here train) and `test_list.txt`, which share no patient",
    licence="no restriction on use; the NIH asks to cite the paper and to link to the download page",
    page="https://nihcc.app.box.com/v/ChestXray-NIHCC",
    citation="X. Wang, Y. Peng, L. Lu, Z. Lu, M. Bagheri, R. M. Summers 2017, ChestX-ray8: Hospital-scale Chest X-ray "
    "Database and Benchmarks, CVPR",
    layout="ROOT/Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv), train_val_list.txt, test_list.txt, "
    "BBox_List_2017.csv, and images in ROOT/images_*/images or ROOT/images",
    tissue=None,
    cautions=(
        "the labels were read out of reports by a program; many are wrong, and some findings cannot be seen on the film",
        "many films with pneumothorax show the chest tube that treated it: a model may find the tube",
        "boxes are in pixels of the original 1024 × 1024 images, whatever size the images here have",
    ),
    sources={
        "sizes": "the lists of the download",
        "licence": "README of the download",
        "words": "names of the findings",
        "classes": "header and cells of Data_Entry_2017_v2020.csv",
    },
    kind="findings",
    columns=("age_years", "sex", "view", "follow_up"),
)
TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "sample_labels.csv")
BOXES = "BBox_List_2017.csv"
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
_IMAGE_FOLDERS = ("images_*/images", "images_*", "images/images", "images", "sample/images", "")
#: The table of boxes abbreviates one finding.
_BOX_NAMES = {"Infiltrate": "Infiltration"}
_COLUMNS = {"image": "Image Index", "findings": "Finding Labels", "patient": "Patient ID"}
_OPTIONAL = {"age": "Patient Age", "sex": "Patient Gender", "view": "View Position", "follow_up": "Follow-up #"}


def load_nih14(root: str | Path, *, require: Sequence[Part] = ("image",)) -> Dataset:
    """Read the table of findings, the official split, the boxes, and where the images lie.

    Without the two lists no sample has a split; without the table of boxes none has a box.

    Args:
        root: Folder of the download.
        require: ``("image",)`` rejects rows whose image is absent; ``()`` takes the labels alone.

    Returns:
        Samples ``00000001_000.png`` ..., in the order of the table. Labels: the fourteen findings and ``No Finding``
        (1 or 0; None where the table says nothing), ``age_years`` (ages beyond 120, slips of the first table, are None),
        ``sex``, ``view``, ``follow_up``. ``patient`` has eight digits, as in the names of the images.

    Raises:
        InputError: A file is missing, no image was found, or one of the two lists lies there without the other.
        UnknownName: The table lacks a column.
        FileFormatError: A table is damaged.
    """
    root = Path(root)
    table = find_file(FACTS, root, TABLES)
    splits, boxes = _read_splits(root), _read_boxes(root)
    images = index_images(root, _IMAGE_FOLDERS)
    rows: list[tuple[int, Sample]] = []
    rejected: list[Rejected] = []
    for number, cells in read_rows(table, _COLUMNS, optional=_OPTIONAL):
        name, patient = cells["image"], cells["patient"]
        if name is None or patient is None or not patient.isascii() or not patient.isdigit():
            rejected.append(Rejected(number, name or "", "image or patient is blank or no number"))
            continue
        found = cells["findings"]
        named = None if found is None else {word.strip() for word in found.split("|")}
        if named is not None and not named <= set(FACTS.classes):
            rejected.append(Rejected(number, name, "a finding is none of the fourteen"))
            continue
        labels: dict[str, LabelValue] = {c: None if named is None else int(c in named) for c in FACTS.classes}
        follow_up = cells["follow_up"]
        labels |= {
            "age_years": age_in_years(cells["age"]),
            "sex": sex_of(cells["sex"]),
            "view": cells["view"],
            "follow_up": int(follow_up) if follow_up is not None and follow_up.isdecimal() else None,
        }
        rows.append((number, Sample(
            id=name, image=images.get(name), patient=f"{int(patient):08d}", labels=labels, split=splits.get(name),
            boxes=tuple(boxes.get(name, ())),
        )))  # fmt: skip
    return keep_whole(FACTS, rows, rejected, require)


def _read_splits(root: Path) -> dict[str, str]:
    """Return image -> official split; nothing where neither list lies there."""
    paths = {split: find_optional(root, (name,)) for split, name in LISTS.items()}
    if not any(paths.values()):
        return {}
    found: dict[str, str] = {}
    for split, path in paths.items():
        if path is None:
            raise FACTS.missing(f"file `{LISTS[split]}` is missing, and the other list is not the whole split")
        for name in read_text(path)[0].split():
            if found.setdefault(name, split) != split:
                raise FileFormatError("an image stands in both lists of the official split", hint="download them again")
    return found


def _read_boxes(root: Path) -> dict[str, list[Box]]:
    """Return image -> boxes. The header's `Bbox [x,y,w,h]` breaks at its commas, so the numbers go by their place."""
    path = find_optional(root, (BOXES,))
    found: defaultdict[str, list[Box]] = defaultdict(list)
    if path is None:
        return found
    table = parse_table(path, separator=",")
    for number, cells in table.rows:
        name, label = (str(cell).strip() for cell in (*cells, "", "")[:2])
        found[name].append(read_box(cells[2:6], _BOX_NAMES.get(label, label), number, path, sides=True))
    return found
