from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from chiasm.encoders.base import ImageTowerConfig
from chiasm.errors import ConfigError, InputError, LeakageError
from chiasm.train.pairs import open_pairs
from chiasm.train.recipe import DataConfig, Recipe


def recipe(source, **data):
    return Recipe("r", data=DataConfig(source=str(source), **{"near_duplicates": False, **data}))


def write(folder, rows, header=("image", "caption", "patient_id", "split", "tissue")):
    rng = np.random.default_rng(0)
    for row in rows:
        path = folder / row[0]
        if not path.exists():
            Image.fromarray(rng.integers(0, 256, (24, 24), np.uint8)).save(path)
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / "table.csv"


def plain(n=30, splits=("train",)):
    return [(f"{i}.png", f"caption number {i}", f"p{i // 3}", splits[(i // 3) % len(splits)], i % 2) for i in range(n)]


def test_patients_are_held_out_whole_and_test_rows_are_never_read(tmp_path):
    source = write(tmp_path, plain(60, ("train", "train", "test")))
    opened = open_pairs(recipe(source, validation=0.25))
    train, held = ({s.patient for s in t.samples} for t in (opened.train, opened.validation))
    assert train
    assert held
    assert not train & held
    assert {s.split for t in (opened.train, opened.validation) for s in t.samples} == {"train"}
    assert opened.unused == 18
    assert opened.summary()["train"]["groups"] == len(train)
    again = open_pairs(recipe(source, validation=0.25))
    assert again.train.digest == opened.train.digest
    other = open_pairs(recipe(source, validation=0.25, split_seed=1))
    assert other.summary()["digest"] != opened.summary()["digest"]


def test_named_validation_splits_are_used(tmp_path):
    source = write(tmp_path, plain(30, ("train", "val")))
    opened = open_pairs(recipe(source, validation_splits=("val",)))
    assert len(opened.train) == len(opened.validation) == 15
    with pytest.raises(InputError, match=r"no row is in the splits of `data\.validation_splits`"):
        open_pairs(recipe(source, validation_splits=("dev",)))
    with pytest.raises(InputError, match=r"no row is in the splits of `data\.train_splits`"):
        open_pairs(recipe(source, train_splits=("fit",)))


def test_nothing_held_out_on_request(tmp_path):
    opened = open_pairs(recipe(write(tmp_path, plain()), validation=0.0))
    assert (len(opened.train), len(opened.validation)) == (30, 0)


def test_a_patient_on_both_sides_is_refused_dropped_or_warned_of(tmp_path):
    rows = plain(30, ("train", "val"))
    rows[0] = ("0.png", "caption number 0", "p1", "train", 0)
    source = write(tmp_path, rows)
    kw = {"validation_splits": ("val",)}
    with pytest.raises(LeakageError, match="1 patient is in both"):
        open_pairs(recipe(source, **kw))
    opened = open_pairs(recipe(source, leakage="drop", **kw))
    assert (len(opened.train), len(opened.validation)) == (14, 15)
    assert [(r.id, r.reason) for r in opened.rejected] == [("0.png", "train row also lies in another split")]
    with pytest.warns(UserWarning, match="1 patient"):
        assert len(open_pairs(recipe(source, leakage="warn", **kw)).train) == 15
    assert len(open_pairs(recipe(source, leakage="off", **kw)).train) == 15


def test_one_person_under_two_ids_is_merged(tmp_path):
    source = write(tmp_path, plain(30))
    opened = open_pairs(recipe(source, same_group=(("p1", "p2"), ("p3", "p4", "p5"))))
    groups = {s.patient for t in (opened.train, opened.validation) for s in t.samples}
    assert groups == {"p0", "p1", "p3", "p6", "p7", "p8", "p9"}


def test_the_same_picture_in_an_unused_split_counts_and_is_remembered_when_clean(tmp_path):
    rows = plain(30, ("train", "train", "test"))
    source = write(tmp_path, rows)
    cache = tmp_path / "cache"
    data = {"near_duplicates": True, "validation": 0.0}
    open_pairs(recipe(source, **data), cache=cache)
    assert [p.name.split("-")[0] for p in cache.iterdir()] == ["leakage"]
    open_pairs(recipe(source, **data), cache=cache)
    Image.open(tmp_path / "0.png").save(tmp_path / "6.png")
    with pytest.raises(LeakageError, match="image"):
        open_pairs(recipe(source, **data), cache=cache)
    opened = open_pairs(recipe(source, leakage="drop", **data), cache=cache)
    assert [r.id for r in opened.rejected] == ["0.png"]


def test_bad_rows_are_counted_or_fatal(tmp_path):
    rows = plain(12)
    rows[1] = ("1.png", "", *rows[1][2:])
    rows[2] = ("2.png", "replace this - description", *rows[2][2:])
    rows[3] = ("3.png", "short", *rows[3][2:])
    source = write(tmp_path, rows)
    (tmp_path / "4.png").unlink()
    data = {"drop_texts": ("^replace this",), "min_words": 2}
    opened = open_pairs(recipe(source, **data))
    assert {r.id: r.reason for r in opened.rejected} == {
        "1.png": "text is empty", "2.png": "text matches `data.drop_texts`", "3.png": "text has fewer than 2 words",
        "4.png": "image file is missing",
    }  # fmt: skip
    assert opened.summary()["rejected"] == 4
    with pytest.raises(InputError, match="cannot be used"):
        open_pairs(recipe(source, on_bad_row="fail", **data))
    with pytest.raises(InputError, match=r"no pair of `table\.csv` can be used"):
        open_pairs(recipe(source, min_words=50))


def test_templates_need_no_captions(tmp_path):
    rows = [(r[0], "", *r[2:]) for r in plain(12)]
    rows[5] = (*rows[5][:4], "")
    source = write(tmp_path, rows)
    data = {"texts": ("a patch of {tissue}",), "words": {"tissue": {"0": ("stroma",), "1": ("tumour",)}}}
    opened = open_pairs(recipe(source, **data))
    texts = {t.variants for table in (opened.train, opened.validation) for t in table.texts}
    assert texts == {("a patch of stroma",), ("a patch of tumour",)}
    assert [r.id for r in opened.rejected] == ["5.png"]


def test_columns_and_typos(tmp_path):
    source = write(tmp_path, plain(12), header=("file", "words", "who", "part", "tissue"))
    with pytest.raises(ConfigError, match=r"unknown field `data.columns.txt`; did you mean `data.columns.text`"):
        open_pairs(recipe(source, columns={"txt": "words"}))
    opened = open_pairs(recipe(source, columns={"text": "words", "patient": "who", "split": "part"}))
    assert opened.train.samples[0].patient.startswith("p")
    with pytest.raises(InputError, match="does not exist"):
        open_pairs(recipe(tmp_path / "nothing.csv"))


def test_phantoms_come_as_arrays_with_patients_apart():
    small = Recipe(
        "r", data=DataConfig(phantoms="tissue", patients=60, validation=0.2),
        image=ImageTowerConfig(image_size=32, patch_size=8, width=64),
    )  # fmt: skip
    opened = open_pairs(small)
    assert opened.train.arrays.shape[1:] == (32, 32, 3)
    assert len(opened.train.arrays) == len(opened.train)
    assert not {s.patient for s in opened.train.samples} & {s.patient for s in opened.validation.samples}
    assert "synthetic" in opened.name
    assert opened.train.open(0).size == (32, 32)
    assert opened.rejected == ()
