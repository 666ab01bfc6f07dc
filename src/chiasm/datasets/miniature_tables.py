"""Miniatures of the public data sets that are told by tables: chest films with findings, reports, boxes, splits.

Comes in: a folder, a number of images of each class, and a function that draws a picture of a class. Goes out: the layout
of the real download. The values are made up; ids have the real form and are of nobody.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.datasets import chexpert, medmnist, mhist, mimic_cxr, nih14, roco, rsna, vindr_cxr

Draw = Callable[[int], NDArray[np.uint8]]


def save_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a picture, and the folders above it."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write a table, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_nih14(root: Path, per_class: int, draw: Draw) -> None:
    """Write ChestX-ray14: two films a patient, every second film with two findings, a fifth of the patients to test."""
    header = (
        "Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position",
        "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]",
    )  # fmt: skip
    rows: list[tuple[object, ...]] = [header]
    boxes: list[tuple[object, ...]] = [("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]", "", "", "")]
    lists: dict[str, list[str]] = {split: [] for split in nih14.LISTS}
    count = per_class * len(nih14.FACTS.classes)
    for i in range(count):
        number, patient = i // per_class, i // 2 + 1
        finding = nih14.FACTS.classes[number]
        second = nih14.FINDINGS[(number + 1) % len(nih14.FINDINGS)]
        name = f"{patient:08d}_{i % 2:03d}.png"
        found = f"{finding}|{second}" if i % 2 and finding != nih14.NO_FINDING else finding
        rows.append((name, found, i % 2, patient, 20 + i % 60, "MF"[patient % 2], ("PA", "AP")[i % 2], 2500, 2048, 0.1, 0.1))  # fmt: skip
        lists["test" if patient % 5 == 0 else "train"].append(name)
        save_picture(root / f"images_{1 + i % 2:03d}" / "images" / name, draw(number))
        if i % per_class == 0 and finding != nih14.NO_FINDING:
            box_name = "Infiltrate" if finding == "Infiltration" else finding
            boxes.append((name, box_name, 225.5, 547.0, 86.5, 79.0))
    write_csv(root / nih14.TABLES[0], rows)
    write_csv(root / nih14.BOXES, boxes)
    for split, names in lists.items():
        (root / nih14.LISTS[split]).write_text("\n".join(names) + "\n", encoding="utf-8")


def _observed(number: int, i: int) -> list[object]:
    """Return fourteen cells: one observation present, the next absent, then one uncertain, the others blank."""
    cells: list[object] = [""] * len(chexpert.OBSERVATIONS)
    cells[number], cells[number - 1] = "1.0", "0.0"
    if i % 2:
        cells[number - 2] = "-1.0"
    return cells


def write_chexpert(root: Path, per_class: int, draw: Draw) -> None:
    """Write CheXpert, small: two films a study, a fifth of the patients in ``valid.csv``."""
    header = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *chexpert.OBSERVATIONS)
    tables: dict[str, list[tuple[object, ...]]] = {split: [header] for split in chexpert.SPLITS.values()}
    base = root / "CheXpert-v1.0-small"
    for i in range(per_class * len(chexpert.OBSERVATIONS)):
        number, patient = i // per_class, i // 4 + 1
        split = "valid" if patient % 5 == 0 else "train"
        view = ("frontal", "lateral")[i % 2]
        path = f"{split}/patient{patient:05d}/study{i // 2 % 2 + 1}/view{i % 2 + 1}_{view}.jpg"
        side = ("AP", "PA")[patient % 2] if view == "frontal" else ""
        sex = ("Male", "Female", "Unknown")[patient % 3]
        row = (f"{base.name}/{path}", sex, 20 + patient % 60, view.capitalize(), side)
        tables[split].append((*row, *_observed(number, i)))
        save_picture(base / path, draw(number))
    for split, rows in tables.items():
        write_csv(base / f"{split}.csv", rows)


def write_mimic_cxr(root: Path, per_class: int, draw: Draw) -> None:
    """Write MIMIC-CXR-JPG with reports, tables compressed: two films a study, two studies a patient."""
    ids = ("subject_id", "study_id")
    metadata: list[tuple[object, ...]] = [
        ("dicom_id", *ids, "PerformedProcedureStepDescription", "ViewPosition", "Rows")
    ]
    splits: list[tuple[object, ...]] = [("dicom_id", "study_id", "subject_id", "split")]
    observed = sorted(chexpert.OBSERVATIONS)
    labels: list[tuple[object, ...]] = [(*ids, *observed)]
    for i in range(per_class * len(chexpert.OBSERVATIONS)):
        number, patient, study = i // per_class, 10_000_001 + i // 4, 50_000_001 + i // 2
        place = root / "files" / f"p{patient}"[:3] / f"p{patient}" / f"s{study}"
        dicom = f"{i:08x}-00000000-00000000-00000000-00000000"
        metadata.append((dicom, patient, study, "CHEST (PA AND LAT)", ("PA", "LATERAL")[i % 2], 2544))
        splits.append((dicom, study, patient, tuple(mimic_cxr.SPLITS)[patient % 3]))
        save_picture(place / f"{dicom}.jpg", draw(number))
        if i % 2 == 0:
            cells = dict(zip(chexpert.OBSERVATIONS, _observed(number, study), strict=True))
            labels.append((patient, study, *(cells[o] for o in observed)))
            words = chexpert.OBSERVATION_WORDS[chexpert.OBSERVATIONS[number]][0]
            place.with_suffix(".txt").write_text(
                f"                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n FINDINGS: \n \n"
                f" There is {words},\n as before: unchanged.\n \n IMPRESSION:  {words.capitalize()}.\n"
            )
    for name, rows in (("metadata", metadata), ("split", splits), ("chexpert", labels), ("negbio", labels)):
        path = root / f"{mimic_cxr.RELEASE}-{name}.csv"
        write_csv(path, rows)
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()


def write_openi(root: Path, per_class: int, draw: Draw) -> None:
    """Write Open-i as XML: a frontal and a lateral film a report; normal, with a finding, not indexed in turn."""
    for i in range(3 * per_class):
        kind = i % 3
        names = [f"CXR{i + 1}_IM-{i + 1:04d}-{view}001" for view in (1, 2)]
        mesh = ("normal", "Cardiomegaly/mild", "No Indexing")[kind]
        findings = ("The lungs are clear.", "The heart is large &amp; round.", "")[kind]
        impression = ("Normal chest.", "Cardiomegaly.", "Film not read.")[kind]
        images = "".join(f'<parentImage id="{name}"><caption>Xray</caption></parentImage>' for name in names)
        path = root / "ecgen-radiology" / f"{i + 1}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><uId id="CXR{i + 1}"/>'
            "<MedlineCitation><Article><Abstract>"
            f'<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION"/>'
            f'<AbstractText Label="FINDINGS">{findings}</AbstractText>'
            f'<AbstractText Label="IMPRESSION">{impression}</AbstractText>'
            f"</Abstract></Article></MedlineCitation><MeSH><major>{mesh}</major><automatic>heart</automatic></MeSH>"
            f"{images}</eCitation>\n",
            encoding="utf-8",
        )
        for name in names:
            save_picture(root / f"{name}.png", draw(0))


def write_shenzhen(root: Path, per_class: int, draw: Draw) -> None:
    """Write the Shenzhen set: age and sex in the first line of a text."""
    _write_tuberculosis(root / "ChinaSet_AllFiles", "CHNCXR", "{} {}yrs\n{}\n", ("male", "female"), per_class, draw)


def write_montgomery(root: Path, per_class: int, draw: Draw) -> None:
    """Write the Montgomery set: age and sex in titled lines."""
    form = "Patient's Sex: {}\nPatient's Age: {:03d}Y\n{}\n"
    _write_tuberculosis(root / "MontgomerySet", "MCUCXR", form, ("M", "F"), per_class, draw)


def _write_tuberculosis(base: Path, word: str, form: str, sexes: tuple[str, str], per_class: int, draw: Draw) -> None:
    (base / "ClinicalReadings").mkdir(parents=True, exist_ok=True)
    for i in range(2 * per_class):
        number = i // per_class
        stem = f"{word}_{i + 1:04d}_{number}"
        save_picture(base / "CXR_png" / f"{stem}.png", draw(number))
        text = form.format(sexes[i % 2], 20 + i, ("normal", "secondary PTB in the left upper field")[number])
        (base / "ClinicalReadings" / f"{stem}.txt").write_text(text, encoding="utf-8")


def write_mhist(root: Path, per_class: int, draw: Draw) -> None:
    """Write MHIST: every fifth image to test."""
    columns = ("Image Name", "Majority Vote Label", "Number of Annotators who Selected SSA (Out of 7)", "Partition")
    rows: list[tuple[object, ...]] = [columns]
    for i in range(2 * per_class):
        number = i // per_class
        name = f"MHIST_{i:03d}.png"
        rows.append((name, mhist.FACTS.classes[number], 4 * number + i % 4, "test" if i % 5 == 0 else "train"))
        save_picture(root / "images" / name, draw(number))
    write_csv(root / "annotations.csv", rows)


def _write_medmnist(name: str, root: Path, per_class: int, draw: Draw) -> None:
    """Write a set of MedMNIST: colour where the class has one, grey for chest films."""
    facts = medmnist.FACTS[name]
    count = len(facts.classes)
    arrays: dict[str, Any] = {}
    for split in medmnist.SPLITS:
        numbers = np.arange(count * per_class) % count
        pictures = np.stack([draw(int(number)) for number in numbers])
        arrays[f"{split}_images"] = pictures[..., 0] if facts.kind == "findings" else pictures
        one_hot = np.eye(count, dtype=np.uint8)[numbers]
        arrays[f"{split}_labels"] = one_hot if facts.kind == "findings" else numbers.astype(np.uint8)[:, None]
    np.savez_compressed(root / f"{name}.npz", **arrays)


def _save_dicom(path: Path) -> None:
    """Write the beginning of a DICOM file, without a picture: enough to be found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM")


def write_rsna(root: Path, per_class: int, draw: Draw) -> None:
    """Write the RSNA challenge: two boxes on every film with pneumonia; the DICOM files hold no picture."""
    labels: list[tuple[object, ...]] = [("patientId", "x", "y", "width", "height", "Target")]
    classes: list[tuple[object, ...]] = [("patientId", "class")]
    for i in range(3 * per_class):
        number, name = i // per_class, f"{i:08x}-0000-4000-8000-000000000000"
        found = [(name, 264.0, 152.0, 213.0, 379.0, 1), (name, 562.0, 152.0, 256.0, 453.0, 1)]
        rows = found if number == 2 else [(name, "", "", "", "", 0)]
        labels += rows
        classes += [(name, rsna.FACTS.classes[number])] * len(rows)
        _save_dicom(root / "stage_2_train_images" / f"{name}.dcm")
    write_csv(root / "stage_2_train_labels.csv", labels)
    write_csv(root / "stage_2_detailed_class_info.csv", classes)


def write_vindr_cxr(root: Path, per_class: int, draw: Draw) -> None:
    """Write VinDr-CXR: two of three readers see the finding, one another; the DICOM files hold no picture."""
    classes = vindr_cxr.FACTS.classes
    for split in vindr_cxr.SPLITS:
        readers = ("R8", "R9", "R10") if split == "train" else ("",)
        named = [c if split == "test" else c.replace("Other disease", "Other diseases") for c in classes]
        whose = ("rad_id",) if split == "train" else ()
        labels: list[tuple[object, ...]] = [("image_id", *whose, *named)]
        boxes: list[tuple[object, ...]] = [("image_id", *whose, "class_name", "x_min", "y_min", "x_max", "y_max")]
        for i in range(per_class * len(classes)):
            number, name = i // per_class, f"{split[:2].encode().hex()}{i:028x}"
            for place, reader in enumerate(readers):
                seen = (number + (place == 2)) % len(classes)
                who = (reader,) if split == "train" else ()
                labels.append((name, *who, *(int(c == seen) for c in range(len(classes)))))
                corners = (691.5, 1375.0, 1653.0, 1831.5) if seen < len(vindr_cxr.FINDINGS) else ("",) * 4
                boxes.append((name, *who, classes[seen], *corners))
            _save_dicom(root / split / f"{name}.dicom")
        write_csv(root / "annotations" / f"image_labels_{split}.csv", labels)
        write_csv(root / "annotations" / f"annotations_{split}.csv", boxes)


def write_roco(root: Path, per_class: int, draw: Draw) -> None:
    """Write ROCO: a list of captions beside the images of each part."""
    for part, word in enumerate(roco.SPLITS.values()):
        folder = root / word / "radiology"
        names = [f"ROCO_{part}{i:04d}" for i in range(per_class)]
        links = []
        for i, name in enumerate(names):
            article, figure = f"PMC{1_000_000 + 100 * part + i // 2}", f"a-{i}-g001.jpg"
            save_picture(folder / "images" / f"{article}_{figure}", draw(0))
            links.append(f"{name}\twget -r ftp://host/pub/pmc/oa_package/{article}.tar.gz -P /path/to/Dir\t{figure}\n")
        (folder / "dlinks.txt").write_text("".join(links), encoding="utf-8")
        lines = [f"{name}\t Axial CT of the chest, figure {i}.\n" for i, name in enumerate(names)]
        (folder / "captions.txt").write_text("".join(lines), encoding="utf-8")


def write_rocov2(root: Path, per_class: int, draw: Draw) -> None:
    """Write ROCOv2: a table of captions for each part."""
    for word in roco.V2_SPLITS.values():
        names = [f"ROCOv2_2023_{word}_{i:06d}" for i in range(per_class)]
        for name in names:
            save_picture(root / word / f"{name}.jpg", draw(0))
        rows = [(name, f"Axial CT, with contrast, figure {i}.") for i, name in enumerate(names)]
        write_csv(root / f"{word}_captions.csv", [("ID", "Caption"), *rows])


def write_medpix(root: Path, per_class: int, draw: Draw) -> None:
    """Write MedPix 2.0: two images a case, train and dev."""
    for part, word in enumerate(("train", "dev")):
        lines = []
        for i in range(per_class):
            case, scan = f"MPX{1000 + 100 * part + i // 2}", ("CT", "MR")[i % 2]
            name = f"{case}_synpic{10_000 + i}"
            save_picture(root / "images" / f"{name}.png", draw(0))
            about = {
                "ACR Codes": "1.3", "Age": str(20 + i), "Caption": f"A mass in the lobe, figure {i}.", "Figure Part": None,
                "Modality": f"{scan} - noncontrast", "Plane": "Axial", "Sex": ("female", "male")[i % 2],
            }  # fmt: skip
            where = {"Location": "Brain and Neuro", "Location Category": "Head"}
            lines.append(json.dumps({"Type": scan, "U_id": case, "image": name, "Description": about, **where}) + "\n")
        path = root / "splitted_dataset" / f"descriptions_{word}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")


#: Name of a data set, without what follows a dash -> what writes its miniature.
WRITERS: Mapping[str, Callable[[Path, int, Draw], None]] = {
    "nih14": write_nih14, "chexpert": write_chexpert, "mimic-cxr": write_mimic_cxr, "openi": write_openi,
    "tb-shenzhen": write_shenzhen, "tb-montgomery": write_montgomery, "mhist": write_mhist,
    "rsna-pneumonia": write_rsna, "vindr-cxr": write_vindr_cxr, "roco": write_roco, "rocov2": write_rocov2,
    "medpix": write_medpix,
    **{name: partial(_write_medmnist, name) for name in medmnist.FACTS},
}  # fmt: skip
