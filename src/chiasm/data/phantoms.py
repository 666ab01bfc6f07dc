"""Synthetic chest radiographs and H&E-like tissue patches with reports, boxes, masks, labels and survival times.

Phantoms serve the demo, the documentation and the tests: no patient, no download, no licence. They are drawn, not
learned: nothing comes from real images or reports, and no number measured on them says anything about real patients.

In the chest films the radiological convention holds: the patient's LEFT is on the image's RIGHT side. Image i of
patient p depends on the seed, p and i only, never on how many are asked for; pixels come out the same at any time, and
the same scene is drawn at any ``size_px`` (mitoses may move: they stand where there is room).
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from chiasm.data.phantom_chest_findings import make_chest_patient
from chiasm.data.phantom_drawing import Finding, Mask, Region
from chiasm.data.phantom_reports import Prompts, chest_prompts, write_chest_report
from chiasm.data.phantom_survival import CHEST_HAZARD, TISSUE_HAZARD, StatedHazard
from chiasm.data.phantom_tissue import make_tissue_patient
from chiasm.data.phantom_tissue_reports import tissue_prompts, write_tissue_report
from chiasm.errors import InputError
from chiasm.types import LabelValue, Sample

CHEST_FINDINGS = (
    "cardiomegaly",
    "effusion",
    "pneumothorax",
    "consolidation",
    "nodule",
    "oedema",
    "device",
    "no_finding",
)
TISSUE_FINDINGS = ("tumour", "high_grade", "glands", "lymphocytes", "necrosis", "mitoses", "fat")
# Findings whose side the labels and the prompts tell apart.
SIDED = ("effusion", "pneumothorax", "consolidation", "nodule", "device")
SMALLEST_PX, LARGEST_PX = 32, 1024
# Separate streams of random numbers: the words of a report never change its picture.
_PATIENT, _FOLLOW_UP, _IMAGE, _REPORT = range(4)

Drawn = tuple[NDArray[np.uint8], tuple[Finding, ...], tuple[Region, ...]]


@dataclass(frozen=True)
class PhantomSet:
    """Synthetic images with everything that is known about them.

    Attributes:
        name: Says that the set is synthetic, which kind and which seed.
        images: uint8, (n, H, W) for chest films, (n, H, W, 3) for tissue.
        samples: One per image: report, patient, labels, boxes. Labels are 0/1 for every name in ``findings`` and
            ``laterality``, ``<finding>_side`` in words (None when absent), ``visit``, ``survival_days`` and ``event``
            (of the patient, counted from the first image), and ``synthetic`` = 1.
        findings: Names that zero-shot classification can be scored on.
        laterality: Names such as ``effusion_left``; empty for tissue.
        prompts: For every name of ``findings`` and ``laterality`` the lists ``positive`` and ``negative``.
        regions: Per image, the true boxes and masks.
        stated_hazard: What the survival times were drawn from.
    """

    name: str
    images: NDArray[np.uint8]
    samples: tuple[Sample, ...]
    findings: tuple[str, ...]
    laterality: tuple[str, ...]
    prompts: Prompts
    regions: tuple[tuple[Region, ...], ...] = field(repr=False)
    stated_hazard: StatedHazard

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def size_px(self) -> int:
        """Side of the images."""
        return int(self.images.shape[1])

    def image(self, row: int) -> Image.Image:
        """Return one image for Pillow, mode L or RGB."""
        return Image.fromarray(self.images[row])

    def masks(self, row: int) -> dict[str, Mask]:
        """Return the mask of each finding of one image, all its regions together, (H, W)."""
        merged: dict[str, Mask] = {}
        for region in self.regions[row]:
            mask = region.mask(self.size_px)
            merged[region.finding] = merged[region.finding] | mask if region.finding in merged else mask
        return merged

    def select(self, rows: ArrayLike) -> PhantomSet:
        """Return the rows given by an index array or a boolean mask, in that order."""
        index = np.asarray(rows)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        return dataclasses.replace(
            self,
            images=self.images[index],
            samples=tuple(self.samples[int(i)] for i in index),
            regions=tuple(self.regions[int(i)] for i in index),
        )

    def join(self, *others: PhantomSet) -> PhantomSet:
        """Return the rows of this set followed by those of others of its kind and size (pieces of one set, say).

        Raises:
            InputError: When kinds or sizes differ, or an image occurs twice.
        """
        sets = (self, *others)
        if any(s.images.shape[1:] != self.images.shape[1:] or s.findings != self.findings for s in sets):
            raise InputError("phantom sets of different kinds or sizes cannot be joined")
        samples = tuple(sample for s in sets for sample in s.samples)
        if len({sample.id for sample in samples}) != len(samples):
            raise InputError("an image occurs in two of the phantom sets", hint="give each its own first_patient")
        return dataclasses.replace(
            self,
            name=self.name if all(s.name == self.name for s in sets) else " + ".join(s.name for s in sets),
            images=np.concatenate([s.images for s in sets]),
            samples=samples,
            regions=tuple(regions for s in sets for regions in s.regions),
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``images/*.png``, ``table.csv`` and ``boxes.json``; the same set gives the same bytes.

        The table has the columns ``filepath, title, patient_id, id``, ``split`` where known, then one per label; a
        label that does not apply is an empty cell. Paths are relative to the folder.

        Returns:
            The path of ``table.csv``.
        """
        root = Path(folder)
        (root / "images").mkdir(parents=True, exist_ok=True)
        with_split = any(s.split is not None for s in self.samples)
        label_names = list(self.samples[0].labels) if self.samples else []
        header = ["filepath", "title", "patient_id", "id", *(["split"] if with_split else []), *label_names]
        boxes: dict[str, list[dict[str, object]]] = {}
        with (root / "table.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for row, sample in enumerate(self.samples):
                path = f"images/{sample.id}.png"
                self.image(row).save(root / path, format="PNG")
                cells: list[LabelValue] = [path, sample.text, sample.patient, sample.id]
                cells += [sample.split] if with_split else []
                cells += [sample.labels.get(name) for name in label_names]
                writer.writerow(["" if c is None else c for c in cells])
                boxes[path] = [_box_record(r) for r in self.regions[row]]
        record = {"name": self.name, "synthetic": True, "size_px": self.size_px, "images": boxes}
        (root / "boxes.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return root / "table.csv"


def _box_record(region: Region) -> dict[str, object]:
    """Return one region as JSON values."""
    box = region.box
    return {
        "label": region.finding,
        "side": region.side,
        "site": region.site,
        "severity": region.severity,
        "box": [int(box.x0_px), int(box.y0_px), int(box.x1_px), int(box.y1_px)],
    }


@dataclass(frozen=True)
class _Kind:
    """What tells chest films and tissue patches apart when a set is made."""

    key: Literal["chest", "tissue"]
    number: int
    findings: tuple[str, ...]
    sided: tuple[str, ...]
    draw: Callable[[np.random.Generator, Sequence[np.random.Generator], int], list[Drawn]]
    write: Callable[[np.random.Generator, Sequence[Finding]], str]
    hazard: StatedHazard


_CHEST = _Kind("chest", 1, CHEST_FINDINGS, SIDED, make_chest_patient, write_chest_report, CHEST_HAZARD)
_TISSUE = _Kind("tissue", 2, TISSUE_FINDINGS, (), make_tissue_patient, write_tissue_report, TISSUE_HAZARD)


def make_chest_phantoms(
    patients: int,
    *,
    seed: int,
    size_px: int = 128,
    images_per_patient: tuple[int, int] = (1, 3),
    first_patient: int = 0,
) -> PhantomSet:
    """Make synthetic frontal chest radiographs with reports.

    The patient's LEFT is on the image's RIGHT side. Each finding is in about 20 % of the images, each side as often
    as the other; up to three occur together; about 18 % of the images show none (``no_finding``).

    Args:
        patients: How many patients.
        seed: Non-negative; the same seed gives the same arrays.
        size_px: Side of the square images, 32 to 1024.
        images_per_patient: Fewest and most images of a patient, drawn uniformly; same anatomy, findings come and go.
        first_patient: Number of the first patient: a set can be made in pieces.

    Raises:
        InputError: For a number out of its range.
    """
    return _make(
        _CHEST,
        patients,
        seed=seed,
        size_px=size_px,
        images_per_patient=images_per_patient,
        first_patient=first_patient,
    )


def make_tissue_phantoms(
    patients: int,
    *,
    seed: int,
    size_px: int = 128,
    images_per_patient: tuple[int, int] = (1, 3),
    first_patient: int = 0,
) -> PhantomSet:
    """Make synthetic H&E-like tissue patches (about 100 um wide) with reports.

    Tumour is in about 40 % of the patches, half of it high grade; the other findings in about 15-28 %. All patches of
    a patient share one stain and one grade.

    Args:
        patients: How many patients.
        seed: Non-negative; the same seed gives the same arrays.
        size_px: Side of the square patches, 32 to 1024.
        images_per_patient: Fewest and most patches of a patient, drawn uniformly.
        first_patient: Number of the first patient: a set can be made in pieces.

    Raises:
        InputError: For a number out of its range.
    """
    return _make(
        _TISSUE,
        patients,
        seed=seed,
        size_px=size_px,
        images_per_patient=images_per_patient,
        first_patient=first_patient,
    )


def _make(
    kind: _Kind,
    patients: int,
    *,
    seed: int,
    size_px: int,
    images_per_patient: tuple[int, int],
    first_patient: int,
) -> PhantomSet:
    """Check the arguments, draw every patient and lay the images side by side."""
    fewest, most = images_per_patient
    checks = {
        "patients": (patients, 1, 10_000_000),
        "seed": (seed, 0, 2**63),
        "size_px": (size_px, SMALLEST_PX, LARGEST_PX),
        "images_per_patient[0]": (fewest, 1, 1000),
        "images_per_patient[1]": (most, fewest, 1000),
        "first_patient": (first_patient, 0, 10_000_000),
    }
    for name, (value, low, high) in checks.items():
        if not low <= value <= high:
            raise InputError(f"{name} is {value}, expected {low} to {high}")
    rows = [
        row
        for patient in range(first_patient, first_patient + patients)
        for row in _make_patient(kind, patient, seed=seed, size_px=size_px, images_per_patient=(fewest, most))
    ]
    sides = tuple(f"{name}_{side}" for name in kind.sided for side in ("left", "right"))
    return PhantomSet(
        name=f"synthetic {kind.key} phantoms (seed {seed})",
        images=np.stack([image for image, _, _ in rows]),
        samples=tuple(sample for _, sample, _ in rows),
        findings=kind.findings,
        laterality=sides,
        prompts=chest_prompts() if kind.key == "chest" else tissue_prompts(),
        regions=tuple(regions for _, _, regions in rows),
        stated_hazard=kind.hazard,
    )


def _make_patient(
    kind: _Kind, patient: int, *, seed: int, size_px: int, images_per_patient: tuple[int, int]
) -> Iterator[tuple[NDArray[np.uint8], Sample, tuple[Region, ...]]]:
    """Yield image, sample and regions of every visit of one patient."""

    def stream(*key: int) -> np.random.Generator:
        return np.random.default_rng([seed, kind.number, patient, *key])

    fate = stream(_FOLLOW_UP)
    visits = int(fate.integers(images_per_patient[0], images_per_patient[1] + 1))
    drawn = kind.draw(stream(_PATIENT), [stream(_IMAGE, v) for v in range(visits)], size_px)
    days, event = kind.hazard.observe(fate, _label(kind, drawn[0][1]))
    for visit, (image, findings, regions) in enumerate(drawn):
        labels: dict[str, LabelValue] = {
            **_label(kind, findings),
            "visit": visit,
            "survival_days": days,
            "event": event,
            "synthetic": 1,
        }
        name = f"{kind.key}-{patient:06d}"
        sample = Sample(
            id=f"{name}-{visit}",
            text=kind.write(stream(_REPORT, visit), findings),
            patient=name,
            study=f"{name}-{visit}",
            slide=name if kind.key == "tissue" else None,
            labels=labels,
            boxes=tuple(r.box for r in regions),
        )
        yield image, sample, regions


def _label(kind: _Kind, findings: Sequence[Finding]) -> dict[str, LabelValue]:
    """Return the label columns that follow from the findings of one image."""
    present: Mapping[str, Finding] = {f.name: f for f in findings}
    labels: dict[str, LabelValue] = {name: int(name in present) for name in kind.findings}
    if "no_finding" in labels:
        labels["no_finding"] = int(not present)
    for name in kind.sided:
        sides = present[name].sides if name in present else ()
        labels[f"{name}_left"], labels[f"{name}_right"] = int("left" in sides), int("right" in sides)
    for name in kind.sided:
        labels[f"{name}_side"] = present[name].side if name in present else None
    return labels
