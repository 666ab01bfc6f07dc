"""MedMNIST's arrays in npz files, and MHIST's table of votes."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from chiasm.datasets import npz, open_sample_image
from chiasm.datasets.arrays import array_shape, has_row, read_array
from chiasm.datasets.images import hash_image, image_exists, open_image_path
from chiasm.datasets.miniature import make_miniature
from chiasm.datasets.named import open_dataset
from chiasm.errors import FileFormatError, InputError, UnknownName


def test_a_row_of_an_npz_is_the_image_of_that_row(tmp_path: Path) -> None:
    root = make_miniature("bloodmnist", tmp_path, size_px=8, per_class=5)
    data = open_dataset("bloodmnist", root)
    assert Counter(s.split for s in data) == {"train": 40, "val": 40, "test": 40}
    with np.load(root / "bloodmnist.npz") as file:
        pixels, truth = file["val_images"], file["val_labels"]
    valid = data.subset("val")
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(open_sample_image, valid))
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), pixels)
    assert valid[4].labels["label"] == "lymphocyte"
    assert truth[4, 0] == 4
    path = root / "bloodmnist.npz"
    assert array_shape(path, "val_images") == (40, 8, 8, 3)
    assert has_row(path, "val_images/39")
    assert not image_exists(path / "val_images" / "40")
    assert not image_exists(path / "none" / "0")
    assert len({hash_image(path / "val_images" / str(row)) for row in range(40)}) == 40
    assert open_dataset("bloodmnist", path).samples == data.samples


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork among threads, which is what is tried here
def test_a_forked_worker_reads_the_rows(tmp_path: Path) -> None:
    data = open_dataset("pneumoniamnist", make_miniature("pneumoniamnist", tmp_path, size_px=8))
    with np.load(tmp_path / "pneumoniamnist.npz") as file:
        pixels = {split: file[f"{split}_images"] for split in ("train", "val", "test")}
    open_sample_image(data.subset("test")[0])  # unpacked before the fork, the others in the workers

    def child(*splits: str) -> int:
        worker = os.fork()
        if worker == 0:
            pictures = {split: [np.asarray(open_sample_image(s)) for s in data.subset(split)] for split in splits}
            os._exit(0 if all(np.array_equal(pictures[split], pixels[split]) for split in splits) else 1)
        return worker

    workers = [child("train", "val", "test"), child("val", "train", "test")]
    assert [os.waitpid(worker, 0)[1] for worker in workers] == [0, 0]


def test_chestmnist_has_findings_and_grey_images(tmp_path: Path) -> None:
    data = open_dataset("chestmnist", make_miniature("chestmnist", tmp_path, size_px=8, per_class=5))
    assert [data[1].labels[c] for c in ("atelectasis", "cardiomegaly")] == [0, 1]
    assert open_sample_image(data[0]).mode == "L"


def test_medmnist_says_what_is_wrong_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_miniature("breastmnist", tmp_path, size_px=8, per_class=5)
    path = root / "breastmnist.npz"
    with np.load(path) as file:
        arrays = dict(file)
    with pytest.raises(InputError, match="side_px of breastmnist must be one of"):
        open_dataset("breastmnist", root, side_px=32)
    with pytest.raises(InputError, match=r"file `breastmnist_64.npz` is missing"):
        open_dataset("breastmnist", root, side_px=64)
    shutil.copy(path, root / "breastmnist_64.npz")
    assert len(open_dataset("breastmnist", root, side_px=64)) == 30
    for key, value, message in (
        ("val_labels", np.zeros((9, 1), np.uint8), "holds 10 images of val and labels of shape"),
        ("val_labels", np.full((10, 1), 2, np.uint8), "labels of val that `breastmnist` has not"),
        ("val_labels", np.array([[None]] * 10), "is not a plain array of numbers"),
        ("val_images", np.asfortranarray(arrays["val_images"]), "is not a plain array of numbers"),
        ("val_images", np.zeros((100, 600, 600), np.uint8), "grows more than 200-fold"),
    ):
        np.savez_compressed(path, **{**arrays, key: value})
        with pytest.raises(FileFormatError, match=message):
            open_dataset("breastmnist", root)
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if k != "test_labels"})
    with pytest.raises(FileFormatError, match=r"has no array `test_labels`; it holds `test_images`"):
        open_dataset("breastmnist", root)
    path.write_bytes(b"no zip")
    with pytest.raises(FileFormatError, match="not a whole npz file"):
        open_dataset("breastmnist", root)
    with pytest.raises(InputError, match=r"`x.npz` does not exist"):
        npz.open_npz(tmp_path / "x.npz", "a")


def test_an_array_shorter_than_its_header_is_damaged(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((10, 4, 4), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", (tmp_path / "a.npy").read_bytes()[:-20])
    assert array_shape(tmp_path / "a.npz", "a") == (10, 4, 4)
    with pytest.raises(FileFormatError, match=r"`a.npz` is damaged at row 0"):
        open_image_path(tmp_path / "a.npz" / "a" / "0")
    with pytest.raises(FileFormatError, match=r"array `a` of `a.npz` is damaged"):
        read_array(tmp_path / "a.npz", "a")


def test_mhist_has_votes_and_the_official_split(tmp_path: Path) -> None:
    root = make_miniature("mhist", tmp_path, size_px=8, per_class=5)
    data = open_dataset("mhist", root)
    assert Counter(s.split for s in data) == {"train": 8, "test": 2}
    assert [s.labels["votes_ssa"] for s in data] == [0, 1, 2, 3, 0, 5, 6, 7, 4, 5]
    table = root / "annotations.csv"
    text = table.read_text()
    table.write_text(text.replace("HP,3", "HP,4").replace("HP,1", "HP,8"))
    assert Counter(r.reason for r in open_dataset("mhist", root).rejected) == {
        "class is not that of the votes": 1, "image, votes or split is none": 1,
    }  # fmt: skip
    table.write_text(text.replace("Partition", "Side"))
    with pytest.raises(UnknownName, match="Partition"):
        open_dataset("mhist", root)
    table.write_text(text)
    shutil.rmtree(root / "images")
    assert len(open_dataset("mhist", root, require=())) == 10
    with pytest.raises(InputError, match="none of the 10 images"):
        open_dataset("mhist", root)
