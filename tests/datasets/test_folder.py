from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from chiasm.datasets import Columns, load_folder, open_dataset
from chiasm.errors import InputError


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (10, 20, 30)).save(path)
    return path


def test_classes_splits_and_captions(tmp_path: Path) -> None:
    for name in ("train/tumor/b.png", "train/tumor/a.JPG", "Test/normal/c.tif", "train/stroma/deep/d.png"):
        picture(tmp_path / name)
    (tmp_path / "train" / "tumor" / "b.txt").write_text("  a tumor patch \n")
    (tmp_path / "train" / ".hidden").mkdir()
    picture(tmp_path / "train" / ".hidden" / "e.png")
    picture(tmp_path / "train" / "tumor" / "._f.png")
    (tmp_path / "train" / "tumor" / "notes.md").write_text("no image")
    data = load_folder(tmp_path, labels_from="folder")
    assert [(s.id, s.split, s.labels["label"], s.text) for s in data] == [
        ("Test/normal/c.tif", "test", "normal", None),
        ("train/stroma/deep/d.png", "train", "stroma", None),
        ("train/tumor/a.JPG", "train", "tumor", None),
        ("train/tumor/b.png", "train", "tumor", "a tumor patch"),
    ]
    assert load_folder(tmp_path)[0].labels == {}
    assert open_dataset(tmp_path).samples == data.samples


def test_without_splits_the_first_folder_is_the_class(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a.png")
    picture(tmp_path / "b.png")
    data = load_folder(tmp_path, labels_from="folder")
    assert [(s.id, s.split, s.labels["label"]) for s in data] == [("b.png", None, None), ("train/a.png", None, "train")]


def test_bad_files_are_listed(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "e.png").write_bytes(b"no image")
    data = load_folder(tmp_path)
    assert [s.id for s in data] == ["a.png", "d.png", "e.png"]
    assert [r.reason for r in data.rejected] == ["text is empty", "caption file is not readable UTF-8 text"]
    data = load_folder(tmp_path, require=("image", "text"), check_images=True)
    assert [s.id for s in data] == ["a.png"]
    assert [r.row for r in data.rejected] == [2, 3, 4, 5]
    checked = load_folder(tmp_path, check_images=True)
    assert [s.id for s in checked] == ["a.png", "d.png"]
    with pytest.raises(InputError, match="row 2 of"):
        load_folder(tmp_path, on_bad_row="fail")


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no image"):
        load_folder(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_folder(tmp_path / "none")


def test_open_dataset_picks_the_table_of_a_folder(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "table.csv").write_text("image,caption\nimages/a.png,one\n")
    assert [s.text for s in open_dataset(tmp_path)] == ["one"]
    (tmp_path / "other.csv").write_text("image,caption\nimages/a.png,two\n")
    assert [s.text for s in open_dataset(tmp_path)] == ["one"]
    assert [s.text for s in open_dataset(tmp_path / "other.csv")] == ["two"]
    assert [s.text for s in open_dataset(tmp_path, columns=Columns(text=""))] == [None]
    (tmp_path / "table.csv").rename(tmp_path / "first.csv")
    with pytest.raises(InputError, match="holds 2 tables"):
        open_dataset(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        open_dataset(tmp_path / "none")
    with pytest.raises(InputError, match="are for tables"):
        open_dataset(tmp_path / "images", root=tmp_path)
