"""A remembered digest is that of the file as it is now, or it is not used."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch

from chiasm.checkpoints import proven
from chiasm.checkpoints.native import read_model_dir, save_model_dir
from chiasm.checkpoints.proven import file_sha256
from chiasm.errors import CheckpointError


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read; every size counts as large, and every file as settled."""
    found: list[Path] = []
    plain = proven._read
    monkeypatch.setattr(proven, "_read", lambda path: found.append(path) or plain(path))
    monkeypatch.setattr(proven, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(proven, "SETTLED_S", -1.0)
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path / "home"))
    return found


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_second_time_nothing_is_read(reads: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert [file_sha256(path) for _ in range(3)] == [sha(b"one")] * 3
    assert reads == [path]
    (tmp_path / "link").symlink_to(path)
    assert file_sha256(tmp_path / "link") == sha(b"one")
    assert len(reads) == 1


def test_any_change_is_read_again_also_with_the_old_date_and_size(reads: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    file_sha256(path)
    dates = path.stat()
    time.sleep(0.02)
    with path.open("r+b") as file:  # in place: the same inode and size
        file.write(b"two")
    os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert path.stat().st_mtime_ns == dates.st_mtime_ns
    assert file_sha256(path) == sha(b"two")
    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    other.replace(path)  # another file under the name
    assert file_sha256(path) == sha(b"six")
    path.write_bytes(b"longer")
    assert file_sha256(path) == sha(b"longer")
    assert len(reads) == 4


def test_what_was_just_written_is_not_remembered(
    reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    monkeypatch.setattr(proven, "SETTLED_S", 5.0)
    file_sha256(path)
    file_sha256(path)
    assert len(reads) == 2
    assert not (tmp_path / "home").exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    plain = proven._read

    def slowly(file: Path) -> str:
        found = plain(file)
        path.write_bytes(b"three")
        return found

    monkeypatch.setattr(proven, "_read", slowly)
    assert file_sha256(path) == sha(b"one")
    monkeypatch.setattr(proven, "_read", plain)
    assert file_sha256(path) == sha(b"three")


@pytest.mark.parametrize(
    "note", [b"", b"{", b"[]", b"null", b'{"state": 1}', b'{"sha256": "x"}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_note_is_not_believed(reads: list[Path], tmp_path: Path, note: bytes) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    file_sha256(path)
    (kept,) = (tmp_path / "home" / "digests").iterdir()
    kept.write_bytes(note)
    assert file_sha256(path) == sha(b"one")
    assert len(reads) == 2
    state = json.loads(kept.read_text())["state"]
    for digest in (None, 3, "short", ["a"] * 64):
        kept.write_text(json.dumps({"state": state, "sha256": digest}))
        assert file_sha256(path) == sha(b"one")


def test_homes_that_cannot_be_written(reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path / "file" / "home"))
    assert [file_sha256(path) for _ in range(2)] == [sha(b"one")] * 2
    monkeypatch.delenv("CHIASM_HOME")

    def homeless(path: Path) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert file_sha256(path) == sha(b"one")
    assert len(reads) == 3
    monkeypatch.setattr(proven.os, "name", "nt")
    assert proven._state(path) is None


def test_the_note_names_no_path(reads: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "Jane Doe 1950"
    folder.mkdir()
    (folder / "weights").write_bytes(b"one")
    file_sha256(folder / "weights")
    (kept,) = (tmp_path / "home" / "digests").iterdir()
    assert "Jane" not in kept.name + kept.read_text()
    assert set(json.loads(kept.read_text())) == {"state", "sha256"}
    assert len(reads) == 1


def test_small_files_are_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path / "home"))
    (tmp_path / "weights").write_bytes(b"one")
    assert file_sha256(tmp_path / "weights") == sha(b"one")
    assert not (tmp_path / "home").exists()
    with pytest.raises(OSError):
        file_sha256(tmp_path / "absent")


def test_damage_is_noticed_after_a_remembered_digest(reads: list[Path], tmp_path: Path) -> None:
    folder = save_model_dir(tmp_path / "model", {"a": torch.ones(100)}, name="one", config={})
    for _ in range(2):
        read_model_dir(folder)
    weights = folder / "model.safetensors"
    assert reads == [weights]
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    time.sleep(0.02)
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or belongs to another model"):
        read_model_dir(folder)
    save_model_dir(folder, {"a": torch.zeros(100)}, name="two", config={})
    assert read_model_dir(folder).name == "two"
