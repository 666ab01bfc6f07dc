"""MHIST: 3,152 patches of colorectal polyps, each judged by seven pathologists.

Comes in: the folder of ``annotations.csv`` and ``images``. Goes out: samples with the majority's class, how many of the seven
chose it, and the official split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts
from chiasm.datasets.layout import Part, find_file, index_images, keep_whole, read_rows
from chiasm.io.manifest import Rejected
from chiasm.types import LabelValue, Sample

FACTS = DatasetFacts(
    name="mhist",
    title="MHIST",
    classes=("HP", "SSA"),
    words={"HP": ("hyperplastic polyp",), "SSA": ("sessile serrated adenoma",)},
    tile_px=(224, 224),
    magnification=None,
    um_per_px=None,
    sizes={"train": 2_175, "test": 977},
    val="none",
    split_rule="the authors' column `Partition`",
    licence="Dataset Research Use Agreement of the authors, signed before the download",
    page="https://bmirds.github.io/MHIST/",
    citation="J. Wei, A. Suriawinata, B. Ren et al. 2021, A Petri Dish for Histopathology Image Analysis, AIME, "
    "arXiv:2101.12355",
    layout="ROOT/annotations.csv and ROOT/images/MHIST_*.png",
    tissue="colo",
    cautions=(
        "seven pathologists often disagreed: an image with 3 or 4 votes of 7 has hardly a truth",
        "the table names no patient: images held out of train may share a patient with the rest of it",
    ),
    sources={"sizes": "annotations.csv", "words": "names of the classes on the data set's page", "tissue": "the paper"},
    columns=("votes_ssa",),
)
VOTERS = 7
#: Votes of the majority.
MAJORITY = 4
_COLUMNS = {
    "image": "Image Name",
    "label": "Majority Vote Label",
    "votes": "Number of Annotators who Selected SSA (Out of 7)",
    "split": "Partition",
}


def load_mhist(root: str | Path, *, require: Sequence[Part] = ("image",)) -> Dataset:
    """Read the table and where the images lie.

    Args:
        root: Folder of the download.
        require: ``("image",)`` rejects rows whose image is absent; ``()`` takes the labels alone.

    Returns:
        Samples ``MHIST_aaa.png`` ..., in the order of the table, with the labels ``label`` (HP or SSA) and ``votes_ssa``
        (0 to 7). A row whose class is not that of its votes is rejected.

    Raises:
        InputError: The table is missing, or no image was found.
        UnknownName: The table lacks a column.
        FileFormatError: The table is damaged.
    """
    root = Path(root)
    table = find_file(FACTS, root, ("annotations.csv",))
    images = index_images(root, ("images", ""))
    rows: list[tuple[int, Sample]] = []
    rejected: list[Rejected] = []
    for number, cells in read_rows(table, _COLUMNS):
        name, label, split, votes = cells["image"] or "", cells["label"], cells["split"], cells["votes"] or ""
        if votes not in map(str, range(VOTERS + 1)) or split not in FACTS.sizes or not name:
            rejected.append(Rejected(number, name, "image, votes or split is none"))
        elif label != FACTS.classes[int(votes) >= MAJORITY]:
            rejected.append(Rejected(number, name, "class is not that of the votes"))
        else:
            labels: dict[str, LabelValue] = {"label": label, "votes_ssa": int(votes)}
            rows.append((number, Sample(id=name, image=images.get(name), labels=labels, split=split)))
    return keep_whole(FACTS, rows, rejected, require)
