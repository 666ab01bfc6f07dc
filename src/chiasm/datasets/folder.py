"""A folder of images to samples: classes from subfolders, captions from text files beside the images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.images import keep_decodable
from chiasm.datasets.table import Part, check_rejected
from chiasm.errors import InputError
from chiasm.io.manifest import Rejected
from chiasm.types import LabelValue, Sample

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".jp2", ".pgm", ".ppm", ".pnm", ".avif")
)
_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def load_folder(
    path: str | Path,
    *,
    labels_from: Literal["folder"] | None = None,
    require: Sequence[Part] = ("image",),
    on_bad_row: Literal["skip", "fail"] = "skip",
    check_images: bool = False,
) -> Dataset:
    """Read every image below a folder, in the order of their paths.

    An ``image.txt`` beside ``image.png`` is its caption. When every image lies below folders called train, val or test,
    these are its split. Hidden files and linked folders are passed over.

    Args:
        path: The folder.
        labels_from: ``folder`` makes the label ``label`` of the first folder (under the split) that an image lies in;
            images outside such a folder are not labelled.
        require: Add ``text`` to reject images without a caption.
        on_bad_row: ``skip`` lists bad rows in ``Dataset.rejected``; ``fail`` raises at the first.
        check_images: Also decode every image.

    Raises:
        InputError: No such folder, no image in it, or a bad row when these are fatal.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"folder `{path.name}` does not exist")
    files = list(_walk(path))
    if not files:
        raise InputError(f"folder `{path.name}` holds no image", hint=f"endings: {' '.join(sorted(IMAGE_SUFFIXES))}")
    relative = [f.relative_to(path) for f in files]
    has_splits = all(len(r.parts) > 1 and r.parts[0].casefold() in _SPLITS for r in relative)
    samples: list[tuple[int, Sample]] = []
    rejected: list[Rejected] = []
    for row, (file, rel) in enumerate(zip(files, relative, strict=True), start=1):
        text, problem = _read_caption(file.with_suffix(".txt"))
        if text is None and problem is None and "text" in require:
            problem = "image has no caption file"
        if problem is not None:
            rejected.append(Rejected(row, rel.as_posix(), problem))
            continue
        inner = rel.parts[1:] if has_splits else rel.parts
        labels: dict[str, LabelValue] = {}
        if labels_from == "folder":
            labels["label"] = inner[0] if len(inner) > 1 else None
        split = _SPLITS[rel.parts[0].casefold()] if has_splits else None
        samples.append((row, Sample(id=rel.as_posix(), image=file, text=text, labels=labels, split=split)))
    if check_images:
        samples, undecodable = keep_decodable(samples)
        rejected = sorted(rejected + undecodable, key=lambda r: r.row)
    check_rejected(rejected, kept=len(samples), name=path.name, on_bad_row=on_bad_row)
    return Dataset(tuple(s for _, s in samples), tuple(rejected), path.name)


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].casefold() in IMAGE_SUFFIXES:
                yield Path(folder) / name


def _read_caption(path: Path) -> tuple[str | None, str | None]:
    """Return the caption, or why it cannot be used; both None when there is no file."""
    if not path.is_file():
        return None, None
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return None, "caption file is not readable UTF-8 text"
    return (text, None) if text else (None, "text is empty")
