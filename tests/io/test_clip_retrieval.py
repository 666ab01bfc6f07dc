from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chiasm.errors import FileFormatError, InputError, SpaceMismatch
from chiasm.io.clip_retrieval import is_clip_retrieval, read_clip_retrieval, write_clip_retrieval
from chiasm.io.store import open_store, save_embeddings
from chiasm.types import Embeddings, Modality, Space

SPACE = Space("tiny", "abc", "def", 8)


def make(n: int, modality: Modality, *, first: int = 0) -> Embeddings:
    vectors = np.random.default_rng(first + (modality == "text")).normal(size=(n, 8)).astype(np.float32)
    rows = range(first, first + n)
    return Embeddings(
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        tuple(f"id{i}" for i in rows),
        SPACE,
        modality,
        logit_scale=10.0,
        texts=tuple(f"caption {i}" for i in rows),
        paths=tuple(f"{i}.png" for i in rows),
        patients=tuple(f"p{i // 2}" for i in rows),
        labels={"age": tuple(rows), "edema": (None,) * n},
    )


def test_layout_is_that_of_clip_retrieval(tmp_path: Path) -> None:
    images, texts = make(5, "image"), make(5, "text")
    assert write_clip_retrieval([images, texts], tmp_path) == 5
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["chiasm.json", "img_emb/img_emb_0.npy", "metadata/metadata_0.parquet", "text_emb/text_emb_0.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "img_emb" / "img_emb_0.npy"), images.vectors)
    table = pq.read_table(tmp_path / "metadata" / "metadata_0.parquet")
    assert table["image_path"].to_pylist() == list(images.paths or ())
    assert table["caption"].to_pylist() == list(texts.texts or ())


def test_round_trip_over_parts_and_through_a_store(tmp_path: Path) -> None:
    images, texts = make(12, "image"), make(12, "text")
    for part in range(12):  # part 10 comes after part 9, not after part 1
        write_clip_retrieval([images.select([part]), texts.select([part])], tmp_path / "a", partition=part)
    read = read_clip_retrieval(tmp_path / "a")
    save_embeddings(tmp_path / "store", images, texts)
    assert write_clip_retrieval(open_store(tmp_path / "store"), tmp_path / "b") == 12
    again = read_clip_retrieval(tmp_path / "b", space=SPACE)
    for found, expected in zip((*read, *again), (images, texts, images, texts), strict=True):
        assert found is not None
        np.testing.assert_array_equal(found.vectors, expected.vectors)
        assert replace(found, vectors=expected.vectors).ids == expected.ids
        assert (found.texts, found.paths, found.patients) == (expected.texts, expected.paths, expected.patients)
        assert dict(found.labels) == dict(expected.labels)
        assert (found.space, found.normalized, found.logit_scale) == (SPACE, True, 10.0)
    with pytest.raises(SpaceMismatch):
        read_clip_retrieval(tmp_path / "b", space=replace(SPACE, weights="x"))


def test_rows_are_aligned_and_lone_ones_are_told(tmp_path: Path) -> None:
    images, texts = make(5, "image"), make(5, "text", first=2).select([4, 3, 2, 1, 0])
    with pytest.warns(UserWarning, match="4 rows have only an image or only a text"):
        assert write_clip_retrieval([images, texts], tmp_path) == 3
    read = read_clip_retrieval(tmp_path)
    assert read.images is not None
    assert read.texts is not None
    assert read.images.ids == read.texts.ids == ("id2", "id3", "id4")
    np.testing.assert_array_equal(read.texts.vectors[0], texts.vectors[4])
    with pytest.raises(InputError, match="no id has both"):
        write_clip_retrieval([images, make(2, "text", first=50)], tmp_path)
    for wrong in ([], [images, images], [make(0, "image")]):
        with pytest.raises(InputError, match="expected embeddings"):
            write_clip_retrieval(wrong, tmp_path)
    with pytest.raises(SpaceMismatch):
        write_clip_retrieval([images, replace(texts, space=replace(SPACE, weights="x"))], tmp_path)


def foreign(tmp_path: Path, vectors: np.ndarray) -> Path:
    """A folder as clip-retrieval itself writes it: float16, zero-padded parts, its own metadata columns."""
    for k, part in enumerate(np.array_split(vectors, 2)):
        (tmp_path / "img_emb").mkdir(parents=True, exist_ok=True)
        (tmp_path / "metadata").mkdir(exist_ok=True)
        np.save(tmp_path / "img_emb" / f"img_emb_{k:02d}.npy", part)
        rows = [{"image_path": f"{k}/{i}.jpg", "caption": None, "width": i} for i in range(len(part))]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata" / f"metadata_{k:02d}.parquet")
    return tmp_path


def test_foreign_folders_need_a_space(tmp_path: Path) -> None:
    vectors = make(5, "image").vectors
    folder = foreign(tmp_path / "f", vectors.astype(np.float16))
    with pytest.raises(InputError, match="does not say which encoder"):
        read_clip_retrieval(folder)
    assert is_clip_retrieval(folder)
    assert not is_clip_retrieval(tmp_path)
    read = read_clip_retrieval(folder, space=SPACE)
    assert read.texts is None
    assert read.images is not None
    assert read.images.normalized
    np.testing.assert_allclose(np.linalg.norm(read.images.vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(read.images.vectors, vectors, atol=1e-3)
    assert read.images.ids == ("0/0.jpg", "0/1.jpg", "0/2.jpg", "1/0.jpg", "1/1.jpg")
    assert read.images.labels == {"width": (0, 1, 2, 0, 1)}
    raw = read_clip_retrieval(foreign(tmp_path / "g", vectors * 7), space=SPACE).images
    assert raw is not None
    assert not raw.normalized


def test_damaged_folders_get_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder of clip-retrieval"):
        read_clip_retrieval(tmp_path / "none")
    folder = tmp_path / "f"
    write_clip_retrieval([make(4, "image")], folder)
    array = folder / "img_emb" / "img_emb_0.npy"
    good = array.read_bytes()
    np.save(array, make(3, "image").vectors)
    with pytest.raises(FileFormatError, match="different numbers of rows"):
        read_clip_retrieval(folder)
    np.save(array, np.zeros((4, 9), np.float32))
    with pytest.raises(FileFormatError, match="expected floats"):
        read_clip_retrieval(folder)
    for content in (b"", good[:60], good[:-3]):
        array.write_bytes(content)
        with pytest.raises(FileFormatError, match="not an array of vectors"):
            read_clip_retrieval(folder)
    np.save(array, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FileFormatError, match="not an array of vectors"):
        read_clip_retrieval(folder)  # a pickle is never opened
    array.write_bytes(good)
    (folder / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileFormatError, match="Parquet"):
        read_clip_retrieval(folder)
    (folder / "metadata" / "metadata_0.parquet").unlink()
    assert read_clip_retrieval(folder).images is not None
    (folder / "chiasm.json").write_text(json.dumps({"space": {"x": 1}}))
    with pytest.raises(FileFormatError, match="is damaged"):
        read_clip_retrieval(folder)


def test_the_precision_survives_the_round_trip(tmp_path: Path) -> None:
    save_embeddings(tmp_path / "store", replace(make(3, "image"), precision="bf16"))
    write_clip_retrieval(open_store(tmp_path / "store"), tmp_path / "out")
    read = read_clip_retrieval(tmp_path / "out")
    assert read.images is not None
    assert read.images.precision == "bf16"
