"""PatchCamelyon: lymph-node patches in HDF5 files, one file of images and one of labels for each official split.

Comes in: the folder of the files, or the folder above a ``pcam/``. Goes out: samples whose image paths lead into the
arrays (see `chiasm.datasets.arrays`): nothing is unpacked and no image is read before it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chiasm.datasets.arrays import array_shape, read_array
from chiasm.datasets.columns import find_column, is_missing
from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.parsing import parse_table
from chiasm.errors import FileFormatError
from chiasm.types import LabelValue, Sample

_README = "basveeling/pcam README.md"
FACTS = DatasetFacts(
    name="pcam",
    title="PatchCamelyon",
    classes=("normal", "tumor"),
    words={"normal": ("normal lymph node", "healthy tissue"), "tumor": ("lymph node metastasis", "tumor tissue")},
    tile_px=(96, 96),
    magnification="10x",
    um_per_px=0.972,
    sizes={"train": 262_144, "val": 32_768, "test": 32_768},
    val="official",
    split_rule="the authors' three splits, which share no slide",
    licence="CC0 1.0",
    page="https://zenodo.org/records/2546921 (or https://github.com/basveeling/pcam)",
    citation="B. S. Veeling, J. Linmans, J. Winkens, T. Cohen, M. Welling 2018, Rotation Equivariant CNNs for Digital "
    "Pathology, arXiv:1806.03962; slides: B. Ehteshami Bejnordi et al. 2017, JAMA 318(22), 2199-2210",
    layout="ROOT/camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, in ROOT itself or in ROOT/pcam",
    tissue="breast",
    cautions=(
        "a patch is a tumor when its central 32 × 32 pixels hold tumor; the rest of the patch does not count",
        "the patches are lymph nodes, the reports that CLIP-IT pairs them with are of the breast",
    ),
    sources={
        "sizes": _README,
        "um_per_px": f"{_README}: 0.243 µm at 40x, brought to 10x",
        "licence": _README,
        "words": "the prompts of BiomedCLIP (NEJM AI supplement, table 10) and of CLIP-IT's repository",
        "tissue": "CLIP-IT, BanafshehKarimian/ModalityPairing",
    },
)
#: Our name of a split -> the word in its files' names.
SPLITS = {"train": "train", "val": "valid", "test": "test"}
_KEYS = {"x": "x", "y": "y"}


def load_pcam(root: str | Path, *, splits: Sequence[str] = ("train", "val", "test")) -> Dataset:
    """Read PatchCamelyon's labels and where its images lie.

    The files may lie in ``root`` (as eva has them) or in ``root/pcam`` (as torchvision has them). A table
    ``camelyonpatch_level_2_split_train_meta.csv`` of the original download, when it lies beside them, tells the slide of
    each patch, so that hold-outs can keep slides whole.

    Args:
        root: Folder.
        splits: Which splits to open; files of others may be absent.

    Returns:
        Samples ``train/0`` ..., in the order of the files, with the label ``label``.

    Raises:
        InputError: A file is absent (or still compressed), or a split unknown.
        FileFormatError: A file is damaged, or images and labels do not fit each other.
        MissingExtra: h5py is not installed.
    """
    root = Path(root)
    for split in splits:
        check_choice("split of pcam", split, tuple(SPLITS))
    folder = _folder(root, splits)
    samples: list[Sample] = []
    for split in splits:
        samples += _read_split(folder, split)
    return Dataset(tuple(samples), (), FACTS.name)


def _name(split: str, kind: str, ending: str = "h5") -> str:
    return f"camelyonpatch_level_2_split_{SPLITS[split]}_{kind}.{ending}"


def _folder(root: Path, splits: Sequence[str]) -> Path:
    """Return the folder that holds every file, or say which file is missing."""
    if not root.is_dir():
        raise FACTS.missing(f"folder `{root.name}` does not exist")
    names = [_name(split, kind) for split in splits for kind in _KEYS]

    def absent(folder: Path) -> list[str]:
        return [name for name in names if not (folder / name).is_file()]

    folders = [f for f in (root / "pcam", root) if f.is_dir()]
    folder = min(folders, key=lambda f: len(absent(f)))
    lost = absent(folder)
    packed = [name for name in lost if (folder / f"{name}.gz").is_file()]
    if packed:
        raise FACTS.missing(f"file `{packed[0]}` is still compressed", hint=f"gunzip {packed[0]}.gz")
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise FACTS.missing(f"file `{lost[0]}` is missing{more}")
    return folder


def _read_split(folder: Path, split: str) -> list[Sample]:
    images, labels = folder / _name(split, "x"), folder / _name(split, "y")
    shape = array_shape(images, _KEYS["x"])
    truth = read_array(labels, _KEYS["y"]).reshape(-1)
    if len(shape) != 4 or shape[3] != 3:
        raise FileFormatError(f"`{images.name}` holds no colour images: shape {shape}, expected (N, 96, 96, 3)")
    if len(truth) != shape[0]:
        raise FileFormatError(
            f"`{images.name}` holds {shape[0]} images, `{labels.name}` {len(truth)} labels",
            hint="download both again; one of them is not whole",
        )
    if not np.isin(truth, (0, 1)).all():
        raise FileFormatError(f"`{labels.name}` holds labels that are neither 0 nor 1")
    slides = _read_slides(folder / _name(split, "meta", "csv"), len(truth))
    shared: list[dict[str, LabelValue]] = [{"label": name} for name in FACTS.classes]
    base = images / _KEYS["x"]
    return [
        Sample(
            id=f"{split}/{row}",
            image=base / str(row),
            labels=shared[int(value)],
            slide=None if slides is None else slides[row],
            split=split,
        )
        for row, value in enumerate(truth.tolist())
    ]


def _read_slides(path: Path, rows: int) -> list[str | None] | None:
    """Return the slide of every row of a split, or None where there is no table of them."""
    if not path.is_file():
        return None
    table = parse_table(path)
    if len(table.rows) != rows or table.bad:
        raise FileFormatError(f"`{path.name}` describes {len(table.rows)} patches, the split has {rows}")
    column = find_column("wsi", table.header, path.name)
    return [None if is_missing(value) else str(value).strip() for value in table.values(column)]
