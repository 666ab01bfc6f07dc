"""Compressed shards and images inside Parquet files read as plain ones do, within limits."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chiasm.datasets import load_table, load_webdataset, open_dataset, open_sample_image, packed
from chiasm.datasets.images import image_exists, index_shard
from chiasm.errors import FileFormatError, InputError


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (5, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def make_shard(path: Path, levels: Sequence[int], mode: str) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for level in levels:
            for name, content in ((f"{level:03d}.png", png(level)), (f"{level:03d}.txt", f"level {level}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def levels_of(samples: Any) -> list[int]:
    return [int(np.asarray(open_sample_image(s))[0, 0]) for s in samples]


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "TAR.GZ"])
def test_a_compressed_shard_reads_like_a_plain_one(tmp_path: Path, ending: str) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    plain = load_webdataset(make_shard(tmp_path / "plain" / "s-0.tar", range(40), "w"))
    for i, part in enumerate((range(20), range(20, 40))):
        make_shard(tmp_path / "packed" / f"s-{i}.{ending}", part, "w:gz")
    data = open_dataset(tmp_path / "packed")
    assert [s.text for s in data] == [s.text for s in plain]
    assert data[0].id == plain[0].id == "s-0/000"
    assert levels_of(data) == list(range(40))
    assert open_dataset(tmp_path / "packed" / f"s-1.{ending}")[0].id == "s-1/020"
    assert index_shard(tmp_path / "packed" / f"s-0.{ending}").unpacked
    assert image_exists(tmp_path / "packed" / f"s-0.{ending}" / "003.png")
    assert not image_exists(tmp_path / "packed" / f"s-0.{ending}" / "030.png")
    assert sorted(p.name for p in (tmp_path / "packed").iterdir()) == [f"s-0.{ending}", f"s-1.{ending}"]


def test_threads_unpack_a_shard_once(tmp_path: Path) -> None:
    data = load_webdataset(make_shard(tmp_path / "s.tar.gz", range(60), "w:gz"))
    make_shard(tmp_path / "s.tar.gz", range(100, 160), "w:gz")  # a new file under the old name
    before = packed.spool().size
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(image_exists, [s.image for s in data if s.image is not None]))
    once = packed.spool().size - before
    with gzip.open(tmp_path / "s.tar.gz") as file:
        assert once == len(file.read())
    assert levels_of(load_webdataset(tmp_path / "s.tar.gz")) == list(range(100, 160))
    assert packed.spool().size - before == once


def test_torn_and_foreign_and_huge_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_shard(tmp_path / "s.tar.gz", range(30), "w:gz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    data = load_webdataset(path)
    assert 0 < len(data) < 30
    assert levels_of(data) == list(range(len(data)))
    assert [r.reason for r in data.rejected][-1] == "shard is truncated; its last samples are lost"
    before = packed.spool().size
    path.write_bytes(b"nothing like gzip")
    with pytest.raises(FileFormatError, match="not compressed by gzip"):
        load_webdataset(path)
    path.write_bytes(gzip.compress(b"no tar" * 300))
    with pytest.raises(FileFormatError, match="not a tar file"):
        load_webdataset(path)
    path.write_bytes(gzip.compress(bytes(8 << 20)))
    with pytest.raises(FileFormatError, match="200-fold"):
        load_webdataset(path)
    assert packed.spool().size - before < 4096
    path.write_bytes(whole)
    monkeypatch.setattr(packed, "MAX_UNPACKED_BYTES", packed.spool().size + 1000)
    with pytest.raises(InputError, match=r"`s\.tar\.gz` would take more than"):
        load_webdataset(path)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, block: object) -> int:
            raise OSError(28, "No space left on device")

    path = make_shard(tmp_path / "s.tar.gz", range(3), "w:gz")
    monkeypatch.setattr(packed.spool(), "file", Full())
    monkeypatch.setattr(packed.spool(), "size", 0)
    with pytest.raises(InputError, match=r"the disk is full: the unpacked `s\.tar\.gz`"):
        load_webdataset(path)


def test_images_inside_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": png(i), "path": f"{i}.png"}, "caption": f"level {i}", "patient_id": f"p{i // 2}"}
        for i in range(50)
    ]
    rows[7]["image"] = None
    rows[8]["image"] = {"bytes": b"no image", "path": None}
    path = write_parquet(tmp_path / "t.parquet", rows, row_group_size=20)
    data = load_table(path, check_images=True)
    assert {r.row: r.reason for r in data.rejected} == {
        8: "image file is missing",
        9: "image is not an image in a known format, or its header is damaged",
    }
    kept = [i for i in range(50) if i not in (7, 8)]
    assert levels_of(data) == kept
    assert [s.text for s in data] == [f"level {i}" for i in kept]
    assert [s.patient for s in data] == [f"p{i // 2}" for i in kept]
    assert data[0].id == "t.parquet/image/1"
    assert data[0].image == path / "image" / "1"
    assert all(not s.labels for s in data)
    assert load_table(path, root=tmp_path / "elsewhere").samples[3].image == data[3].image
    assert list(tmp_path.iterdir()) == [path]


def test_plain_bytes_in_parquet_and_columns_of_bytes_that_are_no_labels(tmp_path: Path) -> None:
    rows = [{"img": png(i), "mask": png(0), "text": "a", "grade": i} for i in range(5)]
    data = load_table(write_parquet(tmp_path / "t.parquet", rows))
    assert levels_of(data) == list(range(5))
    assert [dict(s.labels) for s in data] == [{"grade": i} for i in range(5)]
    listed = [
        {"id": f"r{i}", "images": [{"bytes": png(i), "path": "x"}], "text": "a", "tags": ["u", "v"]} for i in range(3)
    ]
    data = load_table(write_parquet(tmp_path / "l.parquet", listed))
    assert [(s.id, s.image, dict(s.labels)) for s in data] == [(f"r{i}", None, {"tags": "u|v"}) for i in range(3)]
    alone = load_table(write_parquet(tmp_path / "u.parquet", [{"image": png(3)}]))
    assert levels_of(alone) == [3]
    assert alone[0].text is None


def test_huge_parquet_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "t.parquet", [{"image": png(i)} for i in range(5)])
    before = packed.spool().size
    monkeypatch.setattr(packed, "MAX_UNPACKED_BYTES", before + 100)
    with pytest.raises(InputError, match=r"`t\.parquet` would take more than"):
        index_shard(path)
    assert packed.spool().size == before
