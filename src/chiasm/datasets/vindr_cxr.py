"""VinDr-CXR: 18,000 chest films with 22 findings in boxes and 6 diagnoses, each given by radiologists who saw the film.

Comes in: the folder of ``annotations`` and of the films. Goes out: one sample a film; of the three readers of a training film
a rule makes one label, of a test film the consensus of five is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.layout import (
    Part,
    find_file,
    find_optional,
    in_words,
    index_films,
    keep_whole,
    read_box,
    read_rows,
)
from chiasm.errors import FileFormatError
from chiasm.types import Box, LabelValue, Sample

FINDINGS = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift",
    "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture",
    "Other lesion",
)  # fmt: skip
DIAGNOSES = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other disease", "No finding")
FACTS = DatasetFacts(
    name="vindr-cxr",
    title="VinDr-CXR",
    classes=(*FINDINGS, *DIAGNOSES),
    words={
        **in_words((*FINDINGS, *DIAGNOSES), Edema=("pulmonary edema",)),
        "COPD": ("chronic obstructive pulmonary disease",),
        "Enlarged PA": ("enlarged pulmonary artery",),
        "ILD": ("interstitial lung disease",),
        "Nodule/Mass": ("nodule or mass",),
    },
    tile_px=None,
    magnification=None,
    um_per_px=None,
    sizes={"train": 15_000, "test": 3_000},
    val="none",
    split_rule="the authors' two parts: three readers for each film of train, the consensus of five for test",
    licence="PhysioNet Credentialed Health Data License: credentialed users only, never to be passed on",
    page="https://physionet.org/content/vindr-cxr/",
    citation="H. Q. Nguyen, K. Lam, L. T. Le et al. 2022, VinDr-CXR: An open dataset of chest X-rays with radiologist's "
    "annotations, Scientific Data 9, 429",
    layout="ROOT/annotations/{image_labels,annotations}_{train,test}.csv and ROOT/{train,test}/*.dicom",
    tissue=None,
    cautions=(
        "of train the three readers often disagree; say with `agreement` how many make a finding",
        "a box of train is one reader's: the same finding may have three boxes",
        "no patient is named: films held out of train may share a patient with the rest of it",
        "the images are DICOM files; convert them to PNG or JPEG of the same size and name beside them to open them",
    ),
    sources={"sizes": "Nguyen et al. 2022", "classes": "header of the tables", "words": "names of the findings"},
    kind="findings",
    columns=("readers",),
)
SPLITS = ("train", "test")
_FOLDERS = ("annotations", "")
_CORNERS = ("x_min", "y_min", "x_max", "y_max")

Agreement = Literal["any", "majority", "all"]


def load_vindr_cxr(
    root: str | Path,
    *,
    agreement: Agreement = "majority",
    splits: Sequence[str] = SPLITS,
    require: Sequence[Part] = ("image",),
) -> Dataset:
    """Read the labels and boxes of the readers and where the films lie.

    A film is looked for as ``.png`` or ``.jpg`` first, because DICOM files cannot be opened here: their path is given as it is.

    Args:
        root: Folder of the download.
        agreement: How many readers of a film make a finding 1: ``any``, ``majority`` (more than half) or ``all``.
        splits: Which parts to open; the files of the other may be absent.
        require: ``("image",)`` rejects films whose file is absent; ``()`` takes the labels alone.

    Returns:
        Samples named by ``image_id``, in the order of the tables, with 28 labels (1 or 0), ``readers`` (how many rows speak
        of the film: 3 in train; 1, the consensus, in test), and boxes in pixels of the original film. Without the
        table of boxes of a part none of its films has one.

    Raises:
        InputError: A table of labels is missing, no film was found, or an option has none of its values.
        UnknownName: A table lacks a column.
        FileFormatError: A table is damaged.
    """
    root = Path(root)
    check_choice("agreement of vindr-cxr", agreement, ("any", "majority", "all"))
    rows: list[tuple[int, Sample]] = []
    for split in splits:
        check_choice("split of vindr-cxr", split, SPLITS)
        table = find_file(FACTS, root, (f"image_labels_{split}.csv",), _FOLDERS)
        boxes, images = _read_boxes(root, split), index_films(root, (split,))
        for name, (number, votes) in _read_votes(table).items():
            readers = len(votes)
            needed = {"any": 1, "majority": readers // 2 + 1, "all": readers}[agreement]
            labels: dict[str, LabelValue] = {
                finding: int(sum(cast) >= needed)
                for finding, cast in zip(FACTS.classes, zip(*votes, strict=True), strict=True)
            }
            rows.append((number, Sample(
                id=name, image=images.get(name), labels=labels | {"readers": readers}, split=split,
                boxes=tuple(boxes.get(name, ())),
            )))  # fmt: skip
    return keep_whole(FACTS, rows, (), require)


def _read_votes(table: Path) -> dict[str, tuple[int, list[tuple[int, ...]]]]:
    """Return film -> its first row, and of every reader 28 votes."""
    columns = {c: c for c in FACTS.classes if c != "Other disease"}
    # The two tables spell this one differently.
    others = {"Other disease": "Other disease", "plural": "Other diseases"}
    found: dict[str, tuple[int, list[tuple[int, ...]]]] = {}
    for number, cells in read_rows(table, {"id": "image_id", **columns}, optional=others):
        cells["Other disease"] = cells["Other disease"] or cells["plural"]
        votes = [cells[c] for c in FACTS.classes]
        if cells["id"] is None or not all(v in ("0", "1", "0.0", "1.0") for v in votes):
            raise FileFormatError(f"row {number} of `{table.name}` has no film, or a label that is neither 0 nor 1")
        found.setdefault(cells["id"], (number, []))[1].append(tuple(int(str(v)[0]) for v in votes))
    return found


def _read_boxes(root: Path, split: str) -> dict[str, list[Box]]:
    """Return film -> boxes of all readers; nothing where the table is absent. Films without a finding have no corners."""
    path = find_optional(root, (f"annotations_{split}.csv",), _FOLDERS)
    found: dict[str, list[Box]] = {}
    if path is None:
        return found
    columns = {"id": "image_id", "label": "class_name", **{c: c for c in _CORNERS}}
    for number, cells in read_rows(path, columns):
        corners = [cells[c] for c in _CORNERS]
        if cells["id"] is not None and any(c is not None for c in corners):
            found.setdefault(cells["id"], []).append(read_box(corners, cells["label"] or "", number, path))
    return found
