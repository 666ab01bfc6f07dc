"""Downloads from a server on this machine: cut, stalled, wrong, moved, refused; never half a file under its name."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from chiasm.errors import CheckpointError
from chiasm.io.download import DownloadError, check_reach, download, is_reachable, read_address

DATA = random.Random(0).randbytes(700_000)
SHA = hashlib.sha256(DATA).hexdigest()


def test_a_file_comes_whole_and_nothing_but_the_request_is_sent(site: Any, tmp_path: Path) -> None:
    site.files["/a.pt"] = DATA
    assert download(f"{site.address}/a.pt", tmp_path / "sub" / "a.pt", sha256=SHA) == SHA
    assert (tmp_path / "sub" / "a.pt").read_bytes() == DATA
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["a.pt"]
    ((_, headers),) = site.asked
    assert set(headers) <= {"Host", "User-Agent", "Accept-Encoding", "Connection"}
    assert headers["User-Agent"].startswith("chiasm/")
    assert " " not in headers["User-Agent"]  # no versions of anything else


def test_a_cut_download_goes_on_where_it_broke(site: Any, tmp_path: Path) -> None:
    site.files["/a.pt"] = DATA
    site.cut_at["/a.pt"] = [100_000, 300_000]
    assert download(f"{site.address}/a.pt", tmp_path / "a.pt", sha256=SHA) == SHA
    starts = [int(h.get("Range", "bytes=0-")[6:-1]) for _, h in site.asked]
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] >= 300_000


def test_a_later_call_goes_on_and_broken_downloads_are_kept(site: Any, tmp_path: Path) -> None:
    site.files["/a.pt"] = DATA
    site.cut_at["/a.pt"] = [200_000, 0, 0, 0, 0]
    with pytest.raises(DownloadError, match=r"broke off after 0\.2 MB") as caught:
        download(f"{site.address}/a.pt", tmp_path / "a.pt", sha256=SHA)
    assert "again" in str(caught.value.hint)
    assert not (tmp_path / "a.pt").exists()
    assert (tmp_path / "a.pt.part").stat().st_size == 200_000
    site.cut_at.clear()
    site.asked.clear()
    download(f"{site.address}/a.pt", tmp_path / "a.pt", sha256=SHA)
    assert [h.get("Range") for _, h in site.asked] == ["bytes=200000-"]


def test_a_stalled_server_is_asked_again(site: Any, tmp_path: Path) -> None:
    site.files["/a.pt"] = DATA
    site.stall_at["/a.pt"] = [50_000]
    download(f"{site.address}/a.pt", tmp_path / "a.pt", sha256=SHA, patience_s=0.3)
    assert len(site.asked) == 2


def test_a_server_without_ranges_starts_again(site: Any, tmp_path: Path) -> None:
    site.files["/a.pt"] = DATA
    site.ranges = False
    site.cut_at["/a.pt"] = [100_000]
    assert download(f"{site.address}/a.pt", tmp_path / "a.pt", sha256=SHA) == SHA


@pytest.mark.parametrize("etag", ["", '"one"'])
def test_without_a_hash_a_piece_counts_only_while_the_file_is_the_same(site: Any, tmp_path: Path, etag: str) -> None:
    site.files["/a.pt"], site.etag = DATA, etag
    site.cut_at["/a.pt"] = [200_000, 0, 0, 0, 0]
    with pytest.raises(DownloadError):
        download(f"{site.address}/a.pt", tmp_path / "a.pt")
    site.cut_at.clear()
    site.files["/a.pt"], site.etag = DATA[::-1], etag and '"two"'
    download(f"{site.address}/a.pt", tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == DATA[::-1]


def test_a_wrong_file_is_refused_and_removed(site: Any, tmp_path: Path) -> None:
    site.files["/a.pt"] = DATA + b"!"
    with pytest.raises(DownloadError, match="checksum differs"):
        download(f"{site.address}/a.pt", tmp_path / "a.pt", sha256=SHA)
    assert not list(tmp_path.glob("a.pt*"))


def test_a_wrong_piece_from_before_is_thrown_away(site: Any, tmp_path: Path) -> None:
    site.files["/a.pt"] = DATA
    for piece in (b"x" * 1000, b"x" * len(DATA), b"x" * (len(DATA) + 5), DATA, DATA[:-1]):
        (tmp_path / "a.pt.part").write_bytes(piece)
        assert download(f"{site.address}/a.pt", tmp_path / "a.pt", sha256=SHA) == SHA
        assert (tmp_path / "a.pt").read_bytes() == DATA


def test_what_the_hub_states_of_small_files_is_checked(site: Any, tmp_path: Path) -> None:
    site.files["/config.json"] = b'{"a": 1}\n'
    blob = hashlib.sha1(b"blob 9\0" + b'{"a": 1}\n').hexdigest()
    download(f"{site.address}/config.json", tmp_path / "config.json", git_sha1=blob, size=9)
    with pytest.raises(DownloadError, match="checksum"):
        download(f"{site.address}/config.json", tmp_path / "b.json", git_sha1="0" * 40)


def test_refusals_say_what_the_server_said(site: Any, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="answers 404") as caught:
        download(f"{site.address}/absent.pt", tmp_path / "a.pt", sha256=SHA)
    assert caught.value.status == 404
    assert len(site.asked) == 1
    site.files["/a.pt"] = DATA
    site.statuses["/a.pt"] = [503, 0]
    download(f"{site.address}/a.pt", tmp_path / "a.pt", sha256=SHA)
    site.files["/page"], site.kind = b"<html>log in</html>", "text/html"
    with pytest.raises(DownloadError, match="web page"):
        download(f"{site.address}/page", tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()


def test_redirects_are_followed_without_the_token(site: Any, tmp_path: Path) -> None:
    site.files["/b.pt"] = DATA
    port = site.address.rsplit(":", 1)[1]
    site.redirects["/a.pt"] = f"http://localhost:{port}/b.pt"
    download(f"{site.address}/a.pt", tmp_path / "a.pt", sha256=SHA, headers={"Authorization": "Bearer secret"})
    assert site.asked[0][1]["Authorization"] == "Bearer secret"
    assert "Authorization" not in site.asked[1][1]
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "/a.pt"):
        site.redirects["/a.pt"] = target
        with pytest.raises(DownloadError):
            download(f"{site.address}/a.pt", tmp_path / "c.pt", sha256=SHA)
    assert not (tmp_path / "c.pt").exists()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "/etc/passwd"])
def test_only_the_web_is_asked(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="only https"):
        download(url, tmp_path / "a.pt")
    with pytest.raises(DownloadError, match="only https"):
        read_address(url)


def test_answers_that_are_no_json(site: Any) -> None:
    for content in (b"<html>", b"[" * 100_000, b"\xff"):
        site.files["/api"] = content
        with pytest.raises(DownloadError, match="no usable answer"):
            read_address(f"{site.address}/api")


def test_no_network_is_known_at_once(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_reach(site.address)
    started = time.monotonic()
    for url in ("http://127.0.0.1:9", "https://no-such-host.invalid", "http://192.0.2.1"):  # closed, unknown, silent
        assert not is_reachable(url, within_s=0.4)
    assert time.monotonic() - started < 2.5
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="forbids"):
        check_reach(site.address)
    assert len(site.asked) == 0


@pytest.mark.skipif(not hasattr(os, "statvfs"), reason="needs the free space of a disk")
def test_a_full_disk_is_said_before_the_download(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files["/a.pt"] = DATA
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"needs 1 MB"):
        download(f"{site.address}/a.pt", tmp_path / "a.pt", sha256=SHA)
