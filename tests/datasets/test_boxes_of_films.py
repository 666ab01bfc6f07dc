"""RSNA pneumonia and VinDr-CXR, whose findings have boxes, and the captions of ROCO and MedPix."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from chiasm.datasets import open_sample_image
from chiasm.datasets.miniature import make_miniature
from chiasm.datasets.named import dataset_facts, open_dataset
from chiasm.errors import FileFormatError, InputError


def test_rsna_has_a_film_a_sample_with_all_its_boxes(tmp_path: Path) -> None:
    root = make_miniature("rsna-pneumonia", tmp_path, size_px=8, per_class=5)
    data = open_dataset("rsna-pneumonia", root)
    assert Counter(data.labels("label")) == {"Normal": 5, "No Lung Opacity / Not Normal": 5, "Lung Opacity": 5}
    assert [s.labels["pneumonia"] for s in data] == [0] * 10 + [1] * 5
    assert [len(s.boxes) for s in data] == [0] * 10 + [2] * 5
    box = data[10].boxes[1]
    assert (box.x0_px, box.y0_px, box.x1_px, box.y1_px, box.label) == (562, 152, 818, 605, "Lung Opacity")
    assert data[0].image is not None
    assert data[0].image.suffix == ".dcm"
    assert data[0].patient is None
    Image.new("L", (8, 8)).save(data[0].image.with_suffix(".png"))
    assert open_sample_image(open_dataset("rsna-pneumonia", root)[0]).size == (8, 8)


def test_rsna_says_what_is_wrong_with_a_table(tmp_path: Path) -> None:
    root = make_miniature("rsna-pneumonia", tmp_path, size_px=8, per_class=5)
    labels, classes = root / "stage_2_train_labels.csv", root / "stage_2_detailed_class_info.csv"
    text, named = labels.read_text(), classes.read_text()
    for content, message in (
        (text.replace("213.0", "-3"), r"row 11 of `stage_2_train_labels.csv` holds no box"),
        (text.replace("213.0", "wide"), r"row 11 of `stage_2_train_labels.csv` holds no box"),
        (text.replace(",1\n", ",0\n", 1).replace(",1\r\n", ",0\r\n", 1), "another one than before"),
    ):
        labels.write_text(content)
        with pytest.raises(FileFormatError, match=message):
            open_dataset("rsna-pneumonia", root)
    labels.write_text(text)
    for content, message in (
        (named.replace(",Normal", ",Lung Opacity"), "contradict each other"),
        (named.replace(",Normal", ",Fine"), "a class that is none of the three"),
    ):
        classes.write_text(content)
        with pytest.raises(FileFormatError, match=message):
            open_dataset("rsna-pneumonia", root)
    classes.unlink()
    assert set(open_dataset("rsna-pneumonia", root).labels("label")) == {None}
    shutil.rmtree(root / "stage_2_train_images")
    assert len(open_dataset("rsna-pneumonia", root, require=())) == 15
    with pytest.raises(InputError, match="none of the 15 images"):
        open_dataset("rsna-pneumonia", root)


def test_vindr_makes_one_label_of_three_readers(tmp_path: Path) -> None:
    root = make_miniature("vindr-cxr", tmp_path, size_px=8, per_class=5)
    names = ("Aortic enlargement", "Atelectasis", "readers")
    data = open_dataset("vindr-cxr", root)
    assert (len(data), data.subset("test")[0].labels["readers"]) == (280, 1)
    for rule, labels in (("majority", [1, 0, 3]), ("any", [1, 1, 3]), ("all", [0, 0, 3])):
        first = open_dataset("vindr-cxr", root, agreement=rule)[0]
        assert [first.labels[name] for name in names] == labels
    assert [b.label for b in data[0].boxes] == ["Aortic enlargement", "Aortic enlargement", "Atelectasis"]
    box = data[0].boxes[0]
    assert (box.x0_px, box.y0_px, box.x1_px, box.y1_px) == (691.5, 1375.0, 1653.0, 1831.5)
    assert any(s.labels["Other disease"] for s in data.subset("train"))
    assert not any(s.boxes for s in data if s.labels["No finding"] and s.split == "test")
    with pytest.raises(InputError, match="agreement of vindr-cxr must be"):
        open_dataset("vindr-cxr", root, agreement="most")
    with pytest.raises(InputError, match="split of vindr-cxr must be"):
        open_dataset("vindr-cxr", root, splits=["val"])


def test_vindr_does_with_less_and_says_what_is_wrong(tmp_path: Path) -> None:
    root = make_miniature("vindr-cxr", tmp_path, size_px=8, per_class=5)
    folder = root / "annotations"
    boxes = folder / "annotations_train.csv"
    boxes.write_text(boxes.read_text().replace("1653.0", "12"))
    with pytest.raises(FileFormatError, match=r"row 1 of `annotations_train.csv` holds no box"):
        open_dataset("vindr-cxr", root)
    boxes.unlink()
    assert not any(s.boxes for s in open_dataset("vindr-cxr", root, splits=["train"]))
    labels = folder / "image_labels_train.csv"
    labels.write_text(labels.read_text().replace(",1,", ",2,"))
    with pytest.raises(FileFormatError, match="neither 0 nor 1"):
        open_dataset("vindr-cxr", root)
    labels.unlink()
    assert open_dataset("vindr-cxr", root, splits=["test"]).splits == ("test",)
    with pytest.raises(InputError, match=r"VinDr-CXR: file `image_labels_train.csv` is missing"):
        open_dataset("vindr-cxr", root)


def test_roco_joins_figures_and_captions(tmp_path: Path) -> None:
    root = make_miniature("roco", tmp_path / "data", size_px=8, per_class=5)
    data = open_dataset("roco", root.parent)
    assert Counter(s.split for s in data) == {"train": 5, "val": 5, "test": 5}
    assert (data[6].id, data[6].text) == ("ROCO_10001", "Axial CT of the chest, figure 1.")
    assert open_sample_image(data[6]).size == (8, 8)
    assert open_dataset("roco", root).digest == data.digest
    assert [s.study for s in data][:3] == ["PMC1000000", "PMC1000000", "PMC1000001"]
    first = root / "train" / "radiology" / "images" / "PMC1000000_a-0-g001.jpg"
    links = root / "train" / "radiology" / "dlinks.txt"
    whole = links.read_text()
    links.unlink()
    with pytest.raises(InputError, match="none of the 5 images"):
        open_dataset("roco", root, splits=["train"])
    table = root / "train" / "radiology" / "traindata.csv"
    for place in (table, root / "train" / "radiologytraindata.csv"):
        place.write_text("id,name,caption\n" + "".join(
            f"ROCO_0000{i},PMC{1000000 + i // 2}_a-{i}-g001.jpg,c\n" for i in range(5)
        ))  # fmt: skip
        assert open_dataset("roco", root).digest == data.digest
        place.unlink()
    (first.parent / "ROCO_00000.jpg").write_bytes(first.read_bytes())
    assert len(open_dataset("roco", root, splits=["train"])) == 1
    (first.parent / "ROCO_00000.jpg").unlink()
    links.write_text(whole)
    first.unlink()
    captions = root / "train" / "radiology" / "captions.txt"
    captions.write_text(captions.read_text() + "ROCO_9 no tab\n\nROCO_00001\t again\nROCO_00003x\t\n")
    reasons = Counter(r.reason for r in open_dataset("roco", root, splits=["train"]).rejected)
    assert reasons == {
        "image file is missing": 2, "line has no tab after its name": 1, "an earlier row has the same id": 1,
    }  # fmt: skip
    assert len(open_dataset("roco", root, require=("text",))) == 15
    captions.unlink()
    with pytest.raises(InputError, match=r"file `train/radiology/captions.txt` is missing"):
        open_dataset("roco", root)
    with pytest.raises(InputError, match="split of roco must be"):
        open_dataset("roco", root, splits=["validation"])


def test_rocov2_has_a_table_a_part(tmp_path: Path) -> None:
    root = make_miniature("rocov2", tmp_path, size_px=8, per_class=5)
    data = open_dataset("rocov2", root)
    assert (data[5].id, data[5].split, data[5].text) == (
        "ROCOv2_2023_valid_000000", "val", "Axial CT, with contrast, figure 0.",
    )  # fmt: skip
    (root / "valid").rename(root / "valid_images")
    assert open_dataset("rocov2", root).digest == data.digest


def test_medpix_reads_the_lines_of_the_authors(tmp_path: Path) -> None:
    root = make_miniature("medpix", tmp_path, size_px=8, per_class=5)
    data = open_dataset("medpix", root)
    assert Counter(s.split for s in data) == {"train": 5, "val": 5}
    assert (data[0].id, data[0].patient, data[0].text) == (
        "MPX1000_synpic10000", "MPX1000", "A mass in the lobe, figure 0.",
    )  # fmt: skip
    assert data[0].labels == {
        "modality_type": "CT", "modality": "CT - noncontrast", "plane": "Axial", "location": "Brain and Neuro",
        "location_category": "Head", "age_years": 20, "sex": "F",
    }  # fmt: skip
    lines = root / "splitted_dataset" / "descriptions_train.jsonl"
    rows = lines.read_text().splitlines(keepends=True)
    lines.unlink()
    (lines.parent / "descriptions_train_1.jsonl").write_text("".join(rows[:2]))
    with pytest.raises(InputError, match=r"file `descriptions_train_2.jsonl` is missing"):
        open_dataset("medpix", root)
    second = lines.parent / "descriptions_train_2.jsonl"
    second.write_text("".join(rows[2:]))
    assert open_dataset("medpix", root).digest == data.digest
    for text in ("[1]\n", "{", '{"Description": 3}\n'):
        second.write_text(text)
        with pytest.raises(FileFormatError, match=r"line 1 of `descriptions_train_2.jsonl`"):
            open_dataset("medpix", root)
    assert open_dataset("medpix", root, splits=["val"]).splits == ("val",)
    with pytest.raises(InputError, match=r"file `descriptions_test.jsonl` is missing"):
        open_dataset("medpix", root, splits=["test"])


def test_medpix_reads_the_real_table_and_the_same_as_lines(tmp_path: Path) -> None:
    folder = Path(os.environ.get("CHIASM_DATA", "")) / "medpix2"
    if "CHIASM_DATA" not in os.environ or not (folder / "metadata.csv").is_file():
        pytest.skip("CHIASM_DATA names no folder with medpix2")
    data = open_dataset("medpix", folder)
    assert Counter(s.split for s in data) == dataset_facts("medpix").sizes
    assert (len(set(data.groups)), data.rejected) == (602, ())
    assert Counter(data.labels("modality_type")) == {"CT": 962, "MR": 888}
    (tmp_path / "images").symlink_to(folder / "images")
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for word in ("train", "dev"):
        lines = [
            json.dumps({
                "Type": r["modality_type"], "U_id": r["case_id"], "image": Path(r["image"]).stem,
                "Location": r["location"], "Location Category": r["location_category"], "Description": {
                    "Age": r["age"], "Caption": r["caption"], "Modality": r["modality"], "Plane": r["plane"],
                    "Sex": r["sex"],
                },
            })
            for r in rows if r["split"] == word
        ]  # fmt: skip
        (tmp_path / f"descriptions_{word}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert open_dataset("medpix", tmp_path).digest == data.digest
