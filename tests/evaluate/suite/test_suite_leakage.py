"""What was planted across the parts is found: a patient, a copied picture, a near vector, a training table."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from chiasm.errors import InputError
from chiasm.evaluate.suite.leakage import DataLeakage, find_exposure, find_leakage, near_rows
from chiasm.evaluate.suite.rows import DataRows, read_rows
from chiasm.evaluate.suite.settings import DataEntry, ModelEntry
from chiasm.types import Embeddings, Space


@pytest.fixture(scope="module")
def films(suite_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of films with a split by patient, in which nothing leaks yet."""
    folder = tmp_path_factory.mktemp("leak")
    shutil.copytree(suite_dir / "films", folder, dirs_exist_ok=True)
    table = pd.read_csv(folder / "table.csv")
    last = sorted(table.patient_id.unique())[-30:]
    table["split"] = np.where(table.patient_id.isin(last), "test", "train")
    table["Patient Gender"] = ["M", "F", None] * (len(table) // 3) + ["M"] * (len(table) % 3)
    table["Patient Age"] = [str(a) for a in range(len(table))]
    table.to_csv(folder / "table.csv", index=False)
    return folder


def opened(folder: Path, **changes: object) -> DataRows:
    entry = DataEntry(source=str(folder / "table.csv"), labels=("effusion", "nodule"), truth="*", **changes)  # type: ignore[arg-type]
    return read_rows("films", entry, seed=0)


def test_a_clean_split_is_clean(films: Path) -> None:
    found = find_leakage(opened(films), near_duplicates=True)
    assert found.counts == {}
    assert found.test_rows == 0
    assert found.known_patients
    assert found.parts["test"][1] == 30
    assert found.images == sum(n for n, _ in found.parts.values())
    assert DataLeakage.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_patient_in_two_parts_is_found(films: Path, tmp_path: Path) -> None:
    shutil.copytree(films, tmp_path, dirs_exist_ok=True)
    table = pd.read_csv(tmp_path / "table.csv")
    table.loc[table.index[table.split == "test"][0], "patient_id"] = table.patient_id[table.split == "train"].iloc[0]
    table.to_csv(tmp_path / "table.csv", index=False)
    found = find_leakage(opened(tmp_path), near_duplicates=False)
    assert found.counts == {"patient": 1}
    assert found.test_rows == 1
    assert found.images == 0  # pictures were not opened


@pytest.mark.parametrize("kind", ["image", "near-duplicate image"])
def test_a_copied_picture_is_found(films: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(films, tmp_path, dirs_exist_ok=True)
    table = pd.read_csv(tmp_path / "table.csv")
    source, target = (tmp_path / table.filepath[table.split == part].iloc[0] for part in ("train", "test"))
    picture = Image.open(source)
    (picture if kind == "image" else ImageOps.mirror(picture)).save(target)
    found = find_leakage(opened(tmp_path), near_duplicates=True)
    assert found.counts == {kind: 1}
    assert found.test_rows == 1


def test_near_vectors_of_other_patients_are_counted(films: Path) -> None:
    rows = opened(films)
    n = len(rows)
    vectors = np.random.default_rng(0).normal(size=(n, 16)).astype(np.float32)
    train, test = rows.rows_of("train"), rows.rows_of("test")
    vectors[test[0]] = vectors[train[0]] * 3
    images = Embeddings(vectors, tuple(s.id for s in rows.samples), Space("m", "w", "p", 16), "image",
                        normalized=False, patients=rows.groups)  # fmt: skip
    assert near_rows(rows, images, 0.999) == 1
    same = [rows.groups[train[0]] if i == test[0] else g for i, g in enumerate(rows.groups)]
    assert near_rows(rows, dataclasses.replace(images, patients=tuple(same)), 0.999) == 0
    assert near_rows(opened(films, split={"test": "test"}), images, 0.999) is None


def test_what_is_known_of_training_is_told(films: Path, tmp_path: Path) -> None:
    def said(entry: ModelEntry, rows: DataRows | None = None) -> tuple[str, str]:
        found = find_exposure("m", entry, rows or opened(films), None, near_cosine=0.999)
        return found.level, found.reason

    nih = opened(films, known_as=("nih14",))
    assert said(ModelEntry(floor="random"))[0] == "none known"
    assert said(ModelEntry(source="/x/y"))[0] == "unknown"
    assert said(ModelEntry(source="/x/y", trained_on=("films",)))[0] == "same data"
    assert said(ModelEntry(source="/x/y", catalog="medclip-swin"), opened(films))[0] == "unknown"  # data without a name
    assert said(ModelEntry(source="chexzero"), opened(films, known_as=("mimic-cxr",)))[0].startswith("same data")
    assert said(ModelEntry(source="/x/y", catalog="chexzero"), nih)[0] in ("none known", "unknown")
    assert said(ModelEntry(source="$NOT_SET_HERE/model"))[0] == "unknown"

    def recipe(text: str) -> ModelEntry:
        (tmp_path / "recipe.toml").write_text(text)
        return ModelEntry(source=str(tmp_path))

    table = films / "table.csv"
    assert said(recipe(f'[data]\nsource = "{table}"\n'))[0] == "same data"
    assert said(recipe(f'[data]\nsource = "{table}"\ntrain_splits = ["train"]\n'))[0] == "same data, other split"
    assert said(recipe(f'[data]\nsource = "{table}"\ntrain_splits = ["train", "test"]\n'))[0] == "same data"
    assert said(recipe('[data]\nphantoms = "chest"\n'))[0] == "none known"
    assert said(recipe('[data]\nsource = "/other/table.csv"\n'))[0] == "unknown"


def test_columns_of_people_become_groups(films: Path) -> None:
    rows = opened(films)
    assert set(rows.subgroups) == {"Patient Gender", "Patient Age"}  # found by their names
    assert set(rows.subgroups["Patient Gender"]) == {"M", "F", None}
    ages = dict(zip(range(len(rows)), rows.subgroups["Patient Age"], strict=True))
    assert (ages[17], ages[18], ages[39], ages[40]) == ("under 18", "18 to 40", "18 to 40", "40 to 60")
    banded = opened(films, bands={"Patient Age": (30.0,)}, subgroups=("Patient Age",))
    assert {*banded.subgroups["Patient Age"]} == {"under 30", "30 and over"}
    assert opened(films, subgroups=()).subgroups == {}
    with pytest.raises(InputError, match="no column `race`"):
        opened(films, subgroups=("race",))
    with pytest.raises(InputError, match=r"no row .* has split `validation`"):
        opened(films, split={"test": "validation"})


def test_classes_that_exclude_each_other_are_checked(films: Path) -> None:
    with pytest.raises(InputError, match="several of the labels"):
        opened(films, mode="single")
