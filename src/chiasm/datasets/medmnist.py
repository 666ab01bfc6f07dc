"""MedMNIST, its twelve sets of flat images: small pictures of known data sets, each set one ``.npz`` file.

Comes in: the folder of the file, or the file. Goes out: samples whose image paths lead into the arrays (see
`chiasm.datasets.npz`), with the official split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from chiasm.datasets.arrays import array_shape, read_array
from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts
from chiasm.errors import FileFormatError, InputError
from chiasm.types import LabelValue, Sample

_ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right",
    "pancreas", "spleen",
)  # fmt: skip
#: Name -> title, images of train, val and test, classes in the order of their numbers.
_SETS: dict[str, tuple[str, tuple[int, int, int], tuple[str, ...]]] = {
    "pathmnist": ("PathMNIST", (89_996, 10_004, 7_180), (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
        "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
    )),
    "chestmnist": ("ChestMNIST", (78_468, 11_219, 22_433), (
        "atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
        "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia",
    )),
    "dermamnist": ("DermaMNIST", (7_007, 1_003, 2_005), (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
        "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions",
    )),
    "octmnist": ("OCTMNIST", (97_477, 10_832, 1_000), (
        "choroidal neovascularization", "diabetic macular edema", "drusen", "normal",
    )),
    "pneumoniamnist": ("PneumoniaMNIST", (4_708, 524, 624), ("normal", "pneumonia")),
    "retinamnist": ("RetinaMNIST", (1_080, 120, 400), ("0", "1", "2", "3", "4")),
    "breastmnist": ("BreastMNIST", (546, 78, 156), ("malignant", "normal, benign")),
    "bloodmnist": ("BloodMNIST", (11_959, 1_712, 3_421), (
        "basophil", "eosinophil", "erythroblast",
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte", "neutrophil",
        "platelet",
    )),
    "tissuemnist": ("TissueMNIST", (165_466, 23_640, 47_280), (
        "Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
        "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments", "Thick Ascending Limb",
    )),
    "organamnist": ("OrganAMNIST", (34_581, 6_491, 17_778), _ORGANS),
    "organcmnist": ("OrganCMNIST", (13_000, 2_392, 8_268), _ORGANS),
    "organsmnist": ("OrganSMNIST", (13_940, 2_452, 8_829), _ORGANS),
}  # fmt: skip
#: Class -> words where its name is none to show a model.
_WORDS = {
    **{str(grade): (f"diabetic retinopathy of grade {grade}",) for grade in range(5)},
    "normal, benign": ("normal or benign breast tissue",),
    "effusion": ("pleural effusion",),
    "pleural": ("pleural thickening",),
    "edema": ("pulmonary edema",),
    "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)": ("immature granulocyte",),
}
SPLITS = ("train", "val", "test")
#: Sides of the pictures; MedMNIST+ has the larger ones.
SIDES_PX = (28, 64, 128, 224)


def _facts(name: str) -> DatasetFacts:
    title, sizes, classes = _SETS[name]
    return DatasetFacts(
        name=name,
        title=title,
        classes=classes,
        words={
            c: _WORDS.get(c, (c.casefold().replace("-left", ", left").replace("-right", ", right"),)) for c in classes
        },
        tile_px=(28, 28),
        magnification=None,
        um_per_px=None,
        sizes=dict(zip(SPLITS, sizes, strict=True)),
        val="official",
        split_rule="the authors' three splits",
        licence="CC BY-NC 4.0" if name == "dermamnist" else "CC BY 4.0",
        page="https://medmnist.com",
        citation="J. Yang, R. Shi, D. Wei et al. 2023, MedMNIST v2 - A large-scale lightweight benchmark for 2D and 3D "
        "biomedical image classification, Scientific Data 10, 41",
        layout=f"ROOT/{name}.npz, or ROOT/{name}_{{64,128,224}}.npz with `side_px`",
        tissue="colo" if name == "pathmnist" else None,
        cautions=(
            "28 px show little of what a physician looks at: a score here says nothing of full images",
            "the files name no patient: who is on both sides of the splits is not known here",
        ),
        sources={"sizes": "MedMNIST/MedMNIST medmnist/info.py", "words": "MedMNIST/MedMNIST medmnist/info.py"},
        kind="findings" if name == "chestmnist" else "classes",
    )


FACTS = {name: _facts(name) for name in _SETS}


def load_medmnist(root: str | Path, *, name: str = "pathmnist", side_px: Literal[28, 64, 128, 224] = 28) -> Dataset:
    """Read the labels of a set and where its images lie.

    Args:
        root: Folder of the ``.npz`` file, or the file.
        name: Which set, ``pathmnist`` say.
        side_px: Side of the pictures; other than 28 it is part of the file's name.

    Returns:
        Samples ``train/0`` ..., in the order of the arrays, with the label ``label``; of ``chestmnist`` with fourteen
        findings, 1 or 0.

    Raises:
        InputError: The file is missing, or ``side_px`` is none of the sides.
        FileFormatError: The file is damaged, or images and labels do not fit each other.
    """
    facts, root = FACTS[name], Path(root)
    if side_px not in SIDES_PX:
        raise InputError(f"side_px of {name} must be one of {', '.join(map(str, SIDES_PX))}, got {side_px}")
    file = f"{name}.npz" if side_px == SIDES_PX[0] else f"{name}_{side_px}.npz"
    path = root if root.is_file() else root / file
    if not path.is_file():
        raise facts.missing(f"file `{file}` is missing")
    samples: list[Sample] = []
    for split in SPLITS:
        samples += _read_split(path, split, facts)
    return Dataset(tuple(samples), (), name)


def _read_split(path: Path, split: str, facts: DatasetFacts) -> list[Sample]:
    count = array_shape(path, f"{split}_images")[0]
    truth = read_array(path, f"{split}_labels")
    several, highest = facts.kind == "findings", len(facts.classes)
    if truth.shape != (count, highest if several else 1):
        raise FileFormatError(
            f"`{path.name}` holds {count} images of {split} and labels of shape {truth.shape}", hint="download it again"
        )
    if not np.isin(truth, np.arange(2 if several else highest)).all():
        raise FileFormatError(f"`{path.name}` holds labels of {split} that `{facts.name}` has not")
    base = path / f"{split}_images"
    shared: list[dict[str, LabelValue]] = [{"label": c} for c in facts.classes]
    return [
        Sample(
            id=f"{split}/{row}",
            image=base / str(row),
            labels=dict(zip(facts.classes, values, strict=True)) if several else shared[values[0]],
            split=split,
        )
        for row, values in enumerate(truth.astype(int).tolist())
    ]
