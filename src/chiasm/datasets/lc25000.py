"""LC25000: lung and colon tiles, 25,000 images made of 1,250 tiles by turning and mirroring them.

Comes in: the folder of the download, and the table of LC25000-clean that tells which images are one tile. Goes out:
samples whose ``patient`` is the tile, so that every split by group keeps a tile whole. Without the table the tiles are
unknown: the samples have no group and no split, and a random split of them would put about every image's twin on the
other side.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.grouping import read_groups, stem_of
from chiasm.io.manifest import Rejected
from chiasm.types import Sample

_CLEAN = "https://github.com/GeorgeBatch/LC25000-clean"
FACTS = DatasetFacts(
    name="lc25000",
    title="LC25000",
    classes=("colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc"),
    words={
        "colon_aca": ("colon adenocarcinomas",),
        "colon_n": ("normal colonic tissue",),
        "lung_aca": ("lung adenocarcinomas",),
        "lung_n": ("normal lung tissue",),
        "lung_scc": ("lung squamous cell carcinomas",),
    },
    tile_px=(768, 768),
    magnification=None,
    um_per_px=None,
    sizes={"all": 25_000},
    val="none",
    split_rule="none is given; split by source tile, never by image",
    licence="not stated on the data set's page; ask its authors before you pass it on",
    page="https://github.com/tampapath/lung_colon_image_set",
    citation="A. A. Borkowski, M. M. Bui, L. B. Thomas, C. P. Wilson, L. A. DeLand, S. M. Mastorides 2019, "
    "arXiv:1912.12142; tiles: G. Batchkala, B. Li, J. Rittscher 2024, DEMI workshop at MICCAI",
    layout="ROOT/lung_image_sets/{lung_aca,lung_n,lung_scc}/*.jpeg and ROOT/colon_image_sets/{colon_aca,colon_n}/*.jpeg",
    tissue=None,
    cautions=(
        "about 20 images are one tile, turned and mirrored: a split by image leaks; most published accuracies do",
        "lung tissue without tumor is redder than the rest, so colour alone tells it",
        "magnification and patients are unknown",
    ),
    sources={
        "sizes": "tampapath/lung_colon_image_set README.md",
        "cautions": "GeorgeBatch/LC25000-clean README.md",
        "words": "the prompts of BiomedCLIP (NEJM AI supplement, table 10)",
    },
    needs_groups=True,
)
LUNG_FACTS = replace(
    FACTS,
    name="lc25000-lung",
    classes=FACTS.classes[2:],
    words={k: v for k, v in FACTS.words.items() if k.startswith("lung")},
    sizes={"all": 15_000},
    layout="ROOT/lung_image_sets/{lung_aca,lung_n,lung_scc}/*.jpeg",
    tissue="lung",
)
COLON_FACTS = replace(
    FACTS,
    name="lc25000-colon",
    classes=FACTS.classes[:2],
    words={k: v for k, v in FACTS.words.items() if k.startswith("colon")},
    sizes={"all": 10_000},
    layout="ROOT/colon_image_sets/{colon_aca,colon_n}/*.jpeg",
    cautions=(FACTS.cautions[0], FACTS.cautions[2]),
    tissue="colo",
)
_BY_ORGAN = {"both": FACTS, "lung": LUNG_FACTS, "colon": COLON_FACTS}
#: Where the tables of LC25000-clean are looked for in the data set's folder.
GROUP_FILES = ("lc25000_image_groups.csv", "annotations")
_PREFIXES = ("", "lung_colon_image_set/", "LC25000/")
_SUFFIXES = (".jpeg", ".jpg", ".png")

Organ = Literal["both", "lung", "colon"]


def load_lc25000(root: str | Path, *, organ: Organ = "both", groups: str | Path | None = None) -> Dataset:
    """Read the images with their class and, where it is known, the tile that each was made of.

    Args:
        root: Folder that holds ``lung_image_sets`` and ``colon_image_sets`` (or the folders of the classes themselves).
        organ: Only ``lung`` or only ``colon``; the other one's folders may be absent.
        groups: Table of tiles, or a folder of such tables: ``kaggle/lc25000_image_groups.csv`` or ``annotations`` of
            LC25000-clean; one of these in ``root`` is found by itself. See `chiasm.datasets.grouping.read_groups`.

    Returns:
        Samples ``lung_aca/lungaca1.jpeg`` ..., sorted by class and name, with the label ``label``; no split. With
        tiles, an image without one is rejected: it could not be put on one side of a split. Without tiles no sample has
        a patient; group them before you split, with `chiasm.data.splits.merge_groups_by_duplicates` for example.

    Raises:
        InputError: A folder is missing or empty, or the table of tiles names none of the images.
    """
    check_choice("organ of lc25000", organ, tuple(_BY_ORGAN))
    facts = _BY_ORGAN[organ]
    root = Path(root)
    if not root.is_dir():
        raise facts.missing(f"folder `{root.name}` does not exist")
    table = Path(groups) if groups is not None else next((root / f for f in GROUP_FILES if (root / f).exists()), None)
    tiles = None if table is None else read_groups(table)
    samples: list[Sample] = []
    rejected: list[Rejected] = []
    row = 0
    for label in facts.classes:
        for path in _files(root, label, facts):
            row += 1
            tile = None if tiles is None else tiles.get(stem_of(path.name))
            sample = Sample(id=f"{label}/{path.name}", image=path, labels={"label": label})
            if tiles is None:
                samples.append(sample)
            elif tile is None:
                rejected.append(Rejected(row, sample.id, "image has no source tile in the table of groups"))
            else:
                samples.append(replace(sample, patient=f"{label}/{tile.rpartition('/')[2]}"))
    if not samples:
        raise facts.missing(f"the table of tiles names none of the {row} images", hint=f"take it from {_CLEAN}")
    return Dataset(tuple(samples), tuple(rejected), facts.name)


def _files(root: Path, label: str, facts: DatasetFacts) -> list[Path]:
    sets = f"{label.partition('_')[0]}_image_sets"
    places = [root / f"{prefix}{inner}{label}" for prefix in _PREFIXES for inner in (f"{sets}/", "")]
    place = next((p for p in places if p.is_dir()), None)
    if place is None:
        raise facts.missing(f"folder `{sets}/{label}` is missing")
    files = [p for p in place.iterdir() if p.suffix.casefold() in _SUFFIXES and not p.name.startswith(".")]
    if not files:
        raise facts.missing(f"folder `{sets}/{label}` holds no image")
    return sorted(files, key=lambda p: p.name)
