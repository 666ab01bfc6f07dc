from __future__ import annotations

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from chiasm.datasets import load_table, load_webdataset, open_dataset, open_sample_image
from chiasm.datasets.images import image_exists, split_member
from chiasm.datasets.webdataset import expand_shards
from chiasm.errors import FileFormatError, InputError
from chiasm.types import Sample


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (5, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def make_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@given(st.integers(0, 40), st.integers(0, 20), st.integers(1, 5))
def test_ranges_keep_their_zeros(first: int, extra: int, width: int) -> None:
    low, high = str(first).zfill(width), str(first + extra).zfill(width)
    names = expand_shards(f"s/train-{{{low}..{high}}}.tar")
    assert len(names) == extra + 1
    assert names[0] == f"s/train-{low}.tar"
    assert names[-1] == f"s/train-{str(first + extra).zfill(width)}.tar"
    assert len(set(names)) == len(names)


def test_patterns_join_and_alternate() -> None:
    assert expand_shards("a{x,y}{0..1}.tar::b.tar") == ["ax0.tar", "ax1.tar", "ay0.tar", "ay1.tar", "b.tar"]
    for pattern in ("a{.tar", "a}.tar", "a{3..1}.tar", "a{x}.tar", "a{0..999999999}.tar", "a{0..999}{0..999}.tar"):
        with pytest.raises(InputError):
            expand_shards(pattern)


def test_samples_of_shards(tmp_path: Path) -> None:
    members = {
        "0001.png": png(10),
        "0001.txt": b"first caption\n",
        "0001.json": json.dumps({"patient_id": 12, "edema": None, "age": 50, "tags": ["a", "b"]}).encode(),
        "sub/0002.jpg": png(20),
        "sub/0002.json": json.dumps({"caption": "second", "split": "val"}).encode(),
    }
    make_shard(tmp_path / "s-00.tar", members)
    make_shard(tmp_path / "s-01.tar", {"0001.seg.png": png(30), "0001.txt": b"third"})
    data = load_webdataset(str(tmp_path / "s-{00..01}.tar"))
    assert [(s.id, s.text, s.patient, s.split) for s in data] == [
        ("s-00/0001", "first caption", "12", None),
        ("s-00/sub/0002", "second", None, "val"),
        ("s-01/0001", "third", None, None),
    ]
    assert data[0].labels == {"edema": None, "age": 50, "tags": "a|b"}
    assert [np.asarray(open_sample_image(s))[0, 0] for s in data] == [10, 20, 30]
    assert data[1].image == tmp_path / "s-00.tar" / "sub" / "0002.jpg"
    assert open_dataset(tmp_path).samples == data.samples
    assert open_dataset(tmp_path / "s-01.tar").samples == data.samples[2:]
    assert len(open_dataset(f"{tmp_path / 's-00.tar'}::{tmp_path / 's-01.tar'}")) == 3
    assert not list(tmp_path.glob("**/*.png"))


def test_threads_read_one_shard(tmp_path: Path) -> None:
    make_shard(tmp_path / "s.tar", {f"{i:03d}.png": png(i) for i in range(60)})
    data = load_webdataset(tmp_path / "s.tar")
    with ThreadPoolExecutor(4) as pool:
        levels = [int(np.asarray(i)[0, 0]) for i in pool.map(open_sample_image, data)]
    assert levels == list(range(60))


def test_shards_of_one_name_in_two_folders_keep_their_samples_apart(tmp_path: Path) -> None:
    for name in "ab":
        make_shard(tmp_path / name / "0.tar", {"x.png": png(1)})
    data = load_webdataset(f"{tmp_path}/{{a,b}}/0.tar")
    assert [s.id for s in data] == ["a/0/x", "b/0/x"]
    with pytest.raises(InputError, match="named twice"):
        load_webdataset(f"{tmp_path}/a/0.tar::{tmp_path}/a/0.tar")


def test_names_that_lead_out_of_the_shard_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(99))
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../secret.png", "/etc/x.png", "a/../../x.png", "..\\x.png", "good.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png(5))
            archive.addfile(info, io.BytesIO(png(5)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.png")
            info.type = kind
            info.linkname = str(tmp_path / "secret.png")
            archive.addfile(info)
        info = tarfile.TarInfo("folder.png")
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
    data = load_webdataset(path)
    assert [s.id for s in data] == ["s/good"]
    assert len(data.rejected) == 8
    assert {r.reason for r in data.rejected} == {"member is not a plain file of the shard"}
    for name in ("../secret.png", "a/../../secret.png", "link2.png"):
        with pytest.raises(InputError, match="no such member"):
            open_sample_image(Sample(id="x", image=path / name))
    with pytest.raises(InputError, match=r"row 2 of `s\.tar`"):
        load_webdataset(path, on_bad_row="fail")


def test_truncated_and_foreign_shards(tmp_path: Path) -> None:
    whole = make_shard(tmp_path / "s.tar", {f"{i}.png": png(i) for i in range(9)}).read_bytes()
    for size in (512 * 9 + 100, 512 * 9, 512 * 8 + 20):
        (tmp_path / "s.tar").write_bytes(whole[:size])
        data = load_webdataset(tmp_path / "s.tar")
        assert 0 < len(data) < 9
        assert [np.asarray(open_sample_image(s))[0, 0] for s in data] == list(range(len(data)))
    (tmp_path / "s.tar").write_bytes(whole[: 512 * 8 + 20])
    assert [r.reason for r in load_webdataset(tmp_path / "s.tar").rejected] == [
        "shard is truncated; its last samples are lost"
    ]
    (tmp_path / "s.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(FileFormatError, match="not a tar file"):
        load_webdataset(tmp_path / "s.tar")
    make_shard(tmp_path / "s.tar", {"a.png": png(1)}, "w:gz")
    with pytest.raises(FileFormatError, match=r"the ending \.tar\.gz"):
        load_webdataset(tmp_path / "s.tar")
    (tmp_path / "s.tar").unlink()
    with pytest.raises(InputError, match="1 of 1 shards do not exist"):
        load_webdataset(tmp_path / "s.tar")


def test_a_shard_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": png(1)})
    assert len(load_webdataset(shard)) == 1
    make_shard(tmp_path / "s.tar", {f"{i:04d}.png": png(i) for i in range(30)})
    assert len(load_webdataset(shard)) == 30


def test_bad_samples_are_listed(tmp_path: Path) -> None:
    members = {
        "a.png": png(1), "a.txt": b"fine",
        "b.png": png(2),
        "c.txt": b"no image",
        "d.png": png(3), "d.txt": b"\xff\xfe",
        "e.png": png(4), "e.jpg": png(5), "e.txt": b"two images",
        "f.png": png(6), "f.json": b"{broken",
        "g.png": png(6), "g.json": b"[1]",
        "h.png": b"not an image", "h.txt": b"broken image",
        "i.png": png(7), "i.txt": b"x" * (1 << 20) + b"y",
    }  # fmt: skip
    data = load_webdataset(make_shard(tmp_path / "s.tar", members))
    assert [s.id for s in data] == ["s/a", "s/h"]
    assert {r.id: r.reason for r in data.rejected} == {
        "s/b": "text is empty",
        "s/c": "sample has no image",
        "s/d": "text of the sample is not UTF-8",
        "s/e": "sample has several images",
        "s/f": "JSON of the sample is damaged",
        "s/g": "JSON of the sample is not an object",
        "s/i": "text of the sample is larger than 1 MB",
    }
    checked = load_webdataset(tmp_path / "s.tar", check_images=True)
    assert [s.id for s in checked] == ["s/a"]
    assert len(load_webdataset(tmp_path / "s.tar", require=())) == 4
    with pytest.raises(FileFormatError, match=r"h\.png"):
        open_sample_image(data[1])


def test_images_of_tables_may_lie_in_shards(tmp_path: Path) -> None:
    make_shard(tmp_path / "s.tar", {"a.png": png(42)})
    (tmp_path / "t.csv").write_text("image,caption\ns.tar/a.png,one\ns.tar/b.png,two\n")
    data = load_table(tmp_path / "t.csv")
    assert [r.reason for r in data.rejected] == ["image file is missing"]
    assert np.asarray(open_sample_image(data[0]))[0, 0] == 42
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "a.png").write_bytes(png(7))
    assert split_member(tmp_path / "x.tar" / "a.png") is None
    assert image_exists(tmp_path / "x.tar" / "a.png")
    assert not image_exists(Path("a\0b.png"))
    with pytest.raises(InputError, match="has no image"):
        open_sample_image(Sample(id="x"))
