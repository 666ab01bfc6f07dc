"""Rows of HDF5 arrays as images: one row at a time, many threads and processes, nothing outside the file."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from chiasm.datasets.arrays import MAX_ARRAY_BYTES, array_shape, has_row, read_array, read_array_image
from chiasm.datasets.images import image_exists, open_image_path, split_member
from chiasm.errors import FileFormatError, InputError, MissingExtra


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path, pixels: NDArray[np.uint8]) -> Path:
    with h5py.File(tmp_path / "set_x.h5", "w") as file:
        file.create_dataset("x", data=pixels, chunks=(7, 6, 5, 3), compression="gzip")
        file["grey"] = pixels[..., 0]
        file["deep/y"] = np.arange(50)
    return tmp_path / "set_x.h5"


def test_a_row_is_the_image_of_that_row(path: Path, pixels: NDArray[np.uint8]) -> None:
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda i: np.asarray(open_image_path(path / "x" / str(i))), [*range(50)] * 4))
    np.testing.assert_array_equal(rows, np.concatenate([pixels] * 4))
    assert open_image_path(path / "grey" / "3").mode == "L"
    np.testing.assert_array_equal(read_array(path, "deep/y"), np.arange(50))
    assert array_shape(path, "x") == (50, 6, 5, 3)
    assert split_member(path / "x" / "3") == (path, "x/3")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork among threads, which is what is tried here
def test_a_forked_worker_opens_the_file_anew(path: Path, pixels: NDArray[np.uint8]) -> None:
    open_image_path(path / "x" / "0")
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(np.asarray(open_image_path(path / "x" / str(i))), pixels[i]) for i in range(50))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(np.asarray(open_image_path(path / "x" / "49")), pixels[49])


def test_rows_that_are_not_there(path: Path) -> None:
    assert has_row(path, "x/49")
    for member in ("x/50", "x/-1", "x/1e3", "x/٣", "x/", "x"):
        assert not image_exists(path / member), member
    with pytest.raises(InputError, match=r"has no such row; it has 50, counted from 0"):
        read_array_image(path, "x/50")
    with pytest.raises(FileFormatError, match=r"has no array `z`; it holds `deep`, `grey`, `x`"):
        read_array_image(path, "z/0")
    with pytest.raises(FileFormatError, match=r"holds no images: shape \(50,\), type int64"):
        read_array_image(path, "deep/y/0")
    with pytest.raises(InputError, match="5 × 6 pixels, more than 20"):
        read_array_image(path, "x/0", max_pixels=20)
    with pytest.raises(InputError, match=r"`none\.h5` does not exist"):
        array_shape(path.parent / "none.h5", "x")


def test_hostile_and_damaged_files(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(300))
    bad = tmp_path / "bad.h5"
    with h5py.File(bad, "w") as file:
        file["link"] = h5py.ExternalLink(str(path), "/x")
        file["soft"] = h5py.SoftLink("/link")
        file.create_dataset("outside", (1, 10, 10, 3), np.uint8, external=[(str(secret), 0, 300)])
        layout = h5py.VirtualLayout((50, 6, 5, 3), np.uint8)
        layout[:] = h5py.VirtualSource(str(path), "x", (50, 6, 5, 3))
        file.create_virtual_dataset("virtual", layout)
        file.create_group("group")
        file["scalar"] = 3
        file.create_dataset("huge", (MAX_ARRAY_BYTES + 1,), np.uint8, chunks=(1 << 20,))
    for key in ("link", "soft", "outside", "virtual", "group", "scalar"):
        with pytest.raises(FileFormatError, match=f"has no array `{key}`"):
            read_array_image(bad, f"{key}/0")
    with pytest.raises(FileFormatError, match="larger than 1 GB"):
        read_array(bad, "huge")
    torn = bytearray(path.read_bytes())
    torn[len(torn) // 2 :] = np.random.default_rng(1).bytes(len(torn) - len(torn) // 2)
    (tmp_path / "torn.h5").write_bytes(torn)
    with pytest.raises(FileFormatError, match=r"`torn\.h5` is"):
        deque(read_array_image(tmp_path / "torn.h5", f"x/{row}") for row in range(50))
    for content in (b"", b"no HDF5", bytes(torn[:100])):
        (tmp_path / "no.h5").write_bytes(content)
        with pytest.raises(FileFormatError, match=r"`no\.h5` is not a whole HDF5 file"):
            array_shape(tmp_path / "no.h5", "x")
        assert not image_exists(tmp_path / "no.h5" / "x" / "0")


def test_without_h5py_the_extra_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(MissingExtra, match="h5py") as caught:
        image_exists(path / "x" / "0")
    assert caught.value.hint == "pip install 'chiasm[data]'"
