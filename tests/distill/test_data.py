"""Labelled images and their division: test images fixed, patients whole, labels of the test never touched."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chiasm.distill.data import data_notes, divide, open_images
from chiasm.distill.recipe import DistillData
from chiasm.errors import ConfigError, InputError, LeakageError, UnknownName


def write_table(folder: Path, rows: list[dict[str, object]], *, noise: int = 0) -> str:
    """Write a table with an image file for each row; the same ``picture`` gives the same pixels."""
    names = list(dict.fromkeys(k for row in rows for k in row if k != "picture"))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", *names])
        writer.writeheader()
        for i, row in enumerate(rows):
            pixels = np.random.default_rng([noise, int(str(row.get("picture", i)))]).integers(0, 255, (12, 12, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
            writer.writerow({"image": f"{i}.png", **{k: v for k, v in row.items() if k != "picture"}})
    return str(folder / "table.csv")


def patients(n: int = 60, **columns: object) -> list[dict[str, object]]:
    return [{"patient": f"p{i // 2}", "label": "abc"[(i // 2) % 3], **columns} for i in range(n)]


def opened(folder: Path, rows: list[dict[str, object]], **fields: object):
    data = DistillData(**{"source": write_table(folder, rows), "label": "label", "validation": 0.2, **fields})
    return open_images(data), data


def test_patients_stay_whole_and_the_test_is_the_same_for_all_seeds(tmp_path):
    images, data = opened(tmp_path, patients(), validation=0.2)
    assert images.classes == ("a", "b", "c")
    divisions = [divide(images, data, seed=s) for s in range(4)]
    assert len({d.test.tobytes() for d in divisions}) == 1
    assert len({d.validation.tobytes() for d in divisions}) > 1
    assert divide(images, data, seed=2).digest == divisions[2].digest
    for d in divisions:
        groups = [{images.table.samples[r].group for r in rows} for rows in (d.train, d.validation, d.test)]
        assert sum(map(len, groups)) == len(set().union(*groups))
        assert sorted(np.concatenate([d.train, d.validation, d.test])) == list(range(60))
        assert set(images.labels[d.test]) == set(images.labels[d.validation]) == {0, 1, 2}
    other, _ = opened(tmp_path, patients(), validation=0.2, test_seed=5)
    assert (
        divide(other, DistillData(source="-", validation=0.2, test_seed=5), seed=0).test.tobytes()
        != divisions[0].test.tobytes()
    )


def test_split_seed_fixes_the_validation_images(tmp_path):
    images, data = opened(tmp_path, patients(), split_seed=3)
    assert divide(images, data, seed=0).digest == divide(images, data, seed=1).digest


def test_official_splits_are_used(tmp_path):
    rows = [{**row, "split": ("train", "val", "test", "extra")[i // 2 % 4]} for i, row in enumerate(patients(96))]
    images, data = opened(tmp_path, rows)
    division = divide(images, data, seed=0)
    split = np.array([s.split for s in images.table.samples])
    assert set(split[division.train]) == {"train"}
    assert set(split[division.validation]) == {"val"}
    assert set(split[division.test]) == {"test"}
    assert division.facts["unused"] == 24
    assert division.facts["validation"]["split"] == "given by the data: val"
    held = divide(images, DistillData(source="-", validation=0.4, test_splits=("val",)), seed=0)
    assert set(split[held.test]) == {"val"}, "a split called val may be the test"
    assert set(split[held.validation]) == {"train"}
    made = divide(
        images, DistillData(source="-", validation=0.2, test_splits=(), train_splits=("train", "val")), seed=0
    )
    assert set(split[made.test]) <= {"train", "val"}
    with pytest.raises(InputError, match=r"test_splits.*final") as caught:
        divide(images, DistillData(source="-", validation=0.2, test_splits=("final",)), seed=0)
    assert "extra, test, train, val" in str(caught.value)


def test_rows_without_a_class_are_left_out_and_counted(tmp_path):
    rows = patients()
    rows[0]["label"], rows[1]["label"], rows[2]["label"] = "", "NaN", "d"
    images, data = opened(tmp_path, rows, classes=("c", "b", "a"))
    assert len(images) == 57
    assert images.classes == ("c", "b", "a")
    assert images.labels[0] == 1
    assert images.left_out == {"not labelled": 2, "of another class": 1}
    notes = data_notes(images, divide(images, data, seed=0), data)
    assert any(n.startswith("2 images were left out: not labelled") for n in notes)


def test_label_noise_never_touches_the_test(tmp_path):
    images, data = opened(tmp_path, patients(300), label_noise=0.6, validation=0.2)
    division = divide(images, data, seed=0)
    same = division.labels == images.labels
    assert same[division.test].all()
    assert 0.45 < same[division.train].mean() < 0.75  # 60 % redrawn, a third of them to what they were
    assert not same[division.validation].all()
    assert (division.labels != divide(images, data, seed=1).labels).any()
    assert any("EXPERIMENT: 60% of the labels" in n for n in data_notes(images, division, data))
    clean = divide(images, DistillData(source="-", validation=0.2), seed=0)
    assert clean.test.tobytes() == division.test.tobytes()


def test_a_limit_takes_of_each_class_its_share(tmp_path):
    rows = [{"patient": i, "label": "rare" if i % 10 == 0 else "common"} for i in range(200)]
    images, data = opened(tmp_path, rows, train_limit=20)
    division, whole = divide(images, data, seed=0), divide(images, DistillData(source="-", validation=0.2), seed=0)
    assert np.bincount(images.labels[division.train]).tolist() == [18, 2]
    assert set(division.train) < set(whole.train)
    assert division.test.tobytes() == whole.test.tobytes()
    assert division.validation.tobytes() == whole.validation.tobytes()
    assert np.bincount(
        images.labels[divide(images, DistillData(source="-", validation=0.2, train_limit=2), seed=0).train]
    ).tolist() == [1, 1]
    opened_three, _ = opened(tmp_path, patients())
    with pytest.raises(InputError, match="train_limit"):
        divide(opened_three, DistillData(source="-", validation=0.2, train_limit=2), seed=0)


def test_leaks_between_official_splits_are_refused_or_dropped(tmp_path):
    rows = [{**row, "split": "test" if i % 4 == 3 else "train"} for i, row in enumerate(patients(120))]
    images, data = opened(tmp_path, rows)
    with pytest.raises(LeakageError, match="patient") as caught:
        divide(images, data, seed=0)
    assert "p1" not in str(caught.value), "no id in a message"
    division = divide(images, DistillData(source="-", validation=0.2, leakage="drop"), seed=0)
    train = {images.table.samples[r].group for r in division.train}
    test = {images.table.samples[r].group for r in division.test}
    assert not train & test
    assert len(division.test) == 30
    assert division.facts["dropped"]
    with pytest.warns(UserWarning, match="patients are in"):
        kept = divide(images, DistillData(source="-", validation=0.2, leakage="warn"), seed=0)
    assert len(kept.train) + len(kept.validation) == 90


def test_the_same_picture_under_two_ids_is_found(tmp_path):
    rows = [{**row, "picture": 5 if i == 40 else i} for i, row in enumerate(patients(60))]
    rows = [{**row, "split": "test" if i >= 40 else "train"} for i, row in enumerate(rows)]
    images, _ = opened(tmp_path, rows)
    with pytest.raises(LeakageError, match="image"):
        divide(images, DistillData(source="-", validation=0.2, near_duplicates=True), seed=0)
    assert len(divide(images, DistillData(source="-", validation=0.2), seed=0).test) == 20


def test_unreadable_images_are_rejected_once_and_for_all(tmp_path):
    source = write_table(tmp_path, patients())
    (tmp_path / "7.png").write_bytes(b"no image")
    (tmp_path / "8.png").unlink()
    data = DistillData(source=source, label="label")
    for _ in range(2):
        images = open_images(data, cache=tmp_path / "cache")
        assert len(images) == len(images.labels) == 58
        assert len(images.rejected) == 2
        assert [images.classes[k] for k in images.labels] == [s.labels["label"] for s in images.table.samples]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"label": "labl"}, UnknownName, "label"),
        ({"label": None}, ConfigError, "which of 2 columns"),
        ({"label": "site"}, InputError, "one class"),
        ({"classes": ("a", "bb")}, UnknownName, "class `bb`"),
        ({"classes": ("a",)}, InputError, "one class"),
        ({"source": "absent.csv"}, InputError, "absent.csv"),
    ],
)
def test_what_cannot_be_told_apart_is_an_error(tmp_path, change, kind, words):
    source = write_table(tmp_path, patients(site="here"))
    with pytest.raises(kind, match=words):
        open_images(DistillData(**{"source": source, "label": "label", **change}))


def test_a_column_of_names_is_no_class_and_is_not_shown(tmp_path):
    source = write_table(tmp_path, [{"name": f"Smith {i}", "label": i % 2} for i in range(60)])
    with pytest.raises(InputError, match="60 different values") as caught:
        open_images(DistillData(source=source, label="name"))
    assert "Smith" not in str(caught.value)
    images = open_images(DistillData(source=source, label="label"))
    assert images.classes == ("0", "1")
    assert any("name no patient" in n for n in data_notes(images, divide(images, DistillData(source="-", validation=0.2), seed=0),
                                                        DistillData(source="-", validation=0.2)))  # fmt: skip


def test_empty_sides_and_missing_classes_are_errors(tmp_path):
    rows = [{**row, "split": "train" if i < 12 else "test"} for i, row in enumerate(patients(60))]
    for row in rows[:12]:
        row["label"] = "a" if row["label"] == "c" else row["label"]
    images, data = opened(tmp_path, rows)
    with pytest.raises(InputError, match="1 of 3 classes have no training image"):
        divide(images, data, seed=0)
    with pytest.raises(InputError, match="train_splits"):
        divide(images, DistillData(source="-", validation=0.2, train_splits=("learn",)), seed=0)
    plain, _ = opened(tmp_path, patients())
    with pytest.raises(InputError, match="test on"):
        divide(plain, DistillData(source="-", validation=0.2, test=0.0), seed=0)
    with pytest.raises(InputError, match="no splits"):
        divide(plain, DistillData(source="-", validation=0.2, validation_splits=("val",)), seed=0)
    one, _ = opened(tmp_path, [{"patient": "p", "label": "ab"[i % 2]} for i in range(20)])
    with pytest.raises(InputError, match="1 group"):
        divide(one, DistillData(source="-", validation=0.2), seed=0)


def test_phantoms_bring_their_prompts(tmp_path):
    data = DistillData(phantoms="tissue", patients=40, phantom_size=32, label="tumour")
    images = open_images(data)
    assert images.classes == ("0", "1")
    assert images.prompts_are_sentences
    assert set(images.prompts) == {"0", "1"}
    assert all(images.own_texts)
    division = divide(images, data, seed=0)
    assert len(division.test) > 5
    folder = tmp_path / "images"
    for name in ("b", "a"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}.png")
    assert open_images(DistillData(source=str(folder))).classes == ("a", "b")
