"""CheXpert: 224,316 chest films of 65,240 patients with fourteen observations: yes, no, perhaps, or not said.

Comes in: the folder of ``train.csv`` and ``valid.csv``, full size or small. Goes out: samples with the observations, the
patient and the study of their path, age, sex and view. A blank cell is None, "not labelled"; -1 is "uncertain" and stays
-1 unless a rule turns it into something else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.layout import (
    Part,
    Uncertain,
    age_in_years,
    check_uncertain,
    find_file,
    finding_value,
    in_words,
    keep_whole,
    read_rows,
    sex_of,
)
from chiasm.errors import FileFormatError
from chiasm.io.manifest import Rejected
from chiasm.types import LabelValue, Sample

OBSERVATIONS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
OBSERVATION_WORDS = in_words(
    OBSERVATIONS, Edema=("pulmonary edema",), Pleural_Other=("other pleural disease",), Fracture=("bone fracture",)
)
FACTS = DatasetFacts(
    name="chexpert",
    title="CheXpert",
    classes=OBSERVATIONS,
    words=OBSERVATION_WORDS,
    tile_px=None,
    magnification=None,
    um_per_px=None,
    sizes={"train": 223_414, "val": 234},
    val="official",
    split_rule="the authors' two tables, which share no patient: `train.csv`, and `valid.csv` (here val), which three "
    "radiologists labelled",
    licence="Stanford University Dataset Research Use Agreement: research only, never to be passed on",
    page="https://stanfordmlgroup.github.io/competitions/chexpert/",
    citation="J. Irvin, P. Rajpurkar, M. Ko et al. 2019, CheXpert: A Large Chest Radiograph Dataset with Uncertainty "
    "Labels and Expert Comparison, AAAI, arXiv:1901.07031",
    layout="ROOT/train.csv, ROOT/valid.csv and ROOT/{train,valid}/patientNNNNN/studyN/viewN_{frontal,lateral}.jpg, in "
    "ROOT itself, ROOT/CheXpert-v1.0-small or ROOT/CheXpert-v1.0",
    tissue=None,
    cautions=(
        "a blank cell means that the report does not mention the observation: None here, neither present nor absent",
        "-1 means uncertain; say with `uncertain` whether it counts as 1, as 0 or as not labelled",
        "the labels of train were read out of reports by a program, those of val were made by radiologists",
        "val has 234 films of 200 patients, and some observations on hardly any of them",
    ),
    sources={
        "sizes": "the two tables",
        "classes": "header of the tables",
        "words": "names of the observations",
        "split_rule": "Irvin et al. 2019",
    },
    kind="findings",
    columns=("age_years", "sex", "view", "projection"),
)
#: Our name of a split -> its table and its folder.
SPLITS = {"train": "train", "val": "valid"}
FOLDERS = ("", "CheXpert-v1.0-small", "CheXpert-v1.0")
_OPTIONAL = {"sex": "Sex", "age": "Age", "view": "Frontal/Lateral", "projection": "AP/PA"}
_PATH = re.compile(r"(?:^|/)((train|valid)/(patient\d+)/(study\d+)/[^/]+)$")


def load_chexpert(
    root: str | Path,
    *,
    uncertain: Uncertain = "keep",
    splits: Sequence[str] = ("train", "val"),
    require: Sequence[Part] = ("image",),
) -> Dataset:
    """Read the tables of observations and where the images lie.

    Args:
        root: Folder of the tables, or the one above it.
        uncertain: What -1 becomes: ``keep`` leaves it, ``ones`` 1, ``zeros`` 0, ``ignore`` None (U-Ones, U-Zeros and
            U-Ignore of the paper).
        splits: Which tables to open; the other may be absent.
        require: ``("image",)`` rejects rows whose image is absent; ``()`` takes the labels alone.

    Returns:
        Samples ``train/patient00001/study1/view1_frontal.jpg`` ..., in the order of the tables. Labels: the observations
        (1, 0, -1, None), ``age_years``, ``sex``, ``view`` (Frontal, Lateral), ``projection`` (AP, PA ...; blank for
        lateral films). ``patient`` is ``patient00001``, ``study`` ``patient00001/study1``.

    Raises:
        InputError: A table is missing, no image was found, or an option has none of its values.
        UnknownName: A table lacks a column.
        FileFormatError: A table is damaged, or an observation is none of 1, 0, -1 and blank.
    """
    check_uncertain("chexpert", uncertain)
    for split in splits:
        check_choice("split of chexpert", split, tuple(SPLITS))
    rows: list[tuple[int, Sample]] = []
    rejected: list[Rejected] = []
    columns = {"path": "Path", **{o: o for o in OBSERVATIONS}}
    for split in splits:
        table = find_file(FACTS, Path(root), (f"{SPLITS[split]}.csv",), FOLDERS)
        for number, cells in read_rows(table, columns, optional=_OPTIONAL):
            path = (cells["path"] or "").replace("\\", "/")
            found = _PATH.search(path)
            if found is None or ".." in PurePosixPath(path).parts or found.group(2) != SPLITS[split]:
                rejected.append(Rejected(number, path, "path does not name patient and study of this split"))
                continue
            image, _, patient, study = found.groups()
            try:
                labels = {o: finding_value(cells[o], uncertain) for o in OBSERVATIONS}
            except FileFormatError as error:
                raise FileFormatError(f"row {number} of `{table.name}`: {error.message}") from error
            rows.append((number, Sample(
                id=image, image=_existing(table.parent / image), patient=patient, study=f"{patient}/{study}",
                labels=labels | _about(cells), split=split,
            )))  # fmt: skip
    return keep_whole(FACTS, rows, rejected, require)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _about(cells: dict[str, str | None]) -> dict[str, LabelValue]:
    return {
        "age_years": age_in_years(cells["age"]),
        "sex": sex_of(cells["sex"]),
        "view": cells["view"],
        "projection": cells["projection"],
    }
