"""Hostile image files: every one becomes a clear error of ours, cheaply, and no message names a folder."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.data.transforms import image_transform
from chiasm.errors import ChiasmError, FileFormatError, InputError
from chiasm.io.image import open_image
from chiasm.types import Preprocess

# Pillow warns about damaged metadata of images that it can read all the same.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def packed(kind: str, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


FILES = {kind: packed(kind) for kind in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")}


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, body: bytes = b"\0" * 10) -> bytes:
    """A PNG whose header may promise anything."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def refused(path: Path | bytes, error: type[ChiasmError], message: str, **options: object) -> None:
    with pytest.raises(error, match=message) as caught:
        open_image(path, **options)  # type: ignore[arg-type]
    assert caught.value.__cause__ is None or "patient-4711" not in str(caught.value.__cause__)
    assert "patient-4711" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "patient-4711"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", FileFormatError, "image `x.png` is empty"),
        (b"not an image at all, but a text", FileFormatError, "`x.png` is not an image"),
        (b"\0" * 5000, FileFormatError, "`x.png` is not an image"),
        (b"\x89PNG\r\n\x1a\n", FileFormatError, "`x.png`"),
        (b"%PDF-1.7\n" + b"x" * 100, FileFormatError, "`x.png` is not an image"),
        (FILES["PNG"][:-200], FileFormatError, "`x.png` is damaged"),
        (FILES["JPEG"][:-200], FileFormatError, "`x.png` is damaged: image file is truncated"),
        (FILES["JPEG"][:60], FileFormatError, "`x.png`"),
        (FILES["TIFF"][:300], FileFormatError, "`x.png`"),
        (png(50, 50), FileFormatError, "`x.png` is damaged"),
        (png(0, 50), FileFormatError, "`x.png`"),
        (png(50, 50, bits=3), FileFormatError, "`x.png`"),
        (png(100_000, 100_000), InputError, "`x.png` is too large"),
        (png(2**31 - 1, 2**31 - 1), InputError, "`x.png` is too large"),
    ],
)
def test_damaged_and_foreign_files(folder: Path, content: bytes, error: type[ChiasmError], message: str) -> None:
    path = folder / "x.png"
    path.write_bytes(content)
    refused(path, error, message)


@pytest.mark.parametrize("kind", FILES)
def test_truncation_anywhere_is_noticed_or_harmless(kind: str, folder: Path) -> None:
    whole = FILES[kind]
    path = folder / f"x.{kind.lower()}"
    messages: list[str] = []
    for end in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        path.write_bytes(whole[:end])
        try:
            size = open_image(path).size
        except ChiasmError as error:
            messages.append(f"{error} {error.__cause__}")
        else:
            assert size == (32, 24)
    assert messages
    assert not any("patient-4711" in message for message in messages)


def test_what_is_not_a_file(folder: Path) -> None:
    refused(folder / "absent.png", InputError, "image `absent.png` does not exist")
    refused(folder / "a" / "b" / "absent.png", InputError, "does not exist")
    (folder / "sub.png").mkdir()
    refused(folder / "sub.png", InputError, "image `sub.png` is a folder")
    os.mkfifo(folder / "pipe.png")
    refused(folder / "pipe.png", InputError, "image `pipe.png` is not a regular file")
    refused(folder / "file.png" / "x", InputError, "does not exist")
    refused(Path("a\0b"), InputError, "cannot be opened: ValueError")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(folder: Path) -> None:
    path = folder / "x.png"
    path.write_bytes(FILES["PNG"])
    path.chmod(0)
    refused(path, InputError, "permission denied")


def test_a_refused_permission_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "x.png"
    path.write_bytes(FILES["PNG"])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    refused(path, InputError, "image `x.png` cannot be read: permission denied")


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = png(9_000, 9_000, body=b"\0" * (9_001 * 9_000))  # 80 kB that would become 81 MB
    assert len(bomb) < 100_000
    tracemalloc.start()
    refused(bomb, InputError, r"9000 × 9000 pixels, more than the 1,000,000 allowed", max_pixels=1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    refused(png(20_000, 20_000), InputError, "too large")


def test_nothing_is_handed_to_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", refuse)
    refused(packed("EPS"), FileFormatError, r"is a drawing \(EPS\), expected pixels")


def test_a_text_chunk_bomb_is_refused() -> None:
    inflated = zlib.compress(b"a" * 80_000_000, 9)
    data = b"note\0\0" + inflated
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = FILES["PNG"]
    refused(whole[:33] + chunk + whole[33:], FileFormatError, r"image `\(bytes\)`")


@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=12))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_flipped_bytes_give_an_image_or_our_error(kind: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(FILES[kind])
    for position, value in flips:
        data[position % len(data)] = value
    try:
        image = open_image(bytes(data), max_pixels=4_000_000)
    except ChiasmError:
        return
    assert image.width * image.height <= 4_000_000


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_an_image_or_our_error(data: bytes) -> None:
    for start in (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"II*\0", b"BM", b"RIFF", b"P6 "):
        try:
            open_image(start + data, max_pixels=1_000_000)
        except ChiasmError:
            continue


@pytest.mark.parametrize(
    "data",
    [
        packed("JPEG", "CMYK"),
        packed("PNG", "P", transparency=3),
        packed("PNG", "1"),
        packed("PNG", "LA"),
        packed("PNG", "RGBA"),
        packed("PNG", "I;16"),
        packed("TIFF", "F"),
        packed("TIFF", "LAB"),
        packed("GIF", "P"),
    ],
    ids=["cmyk", "palette-transparency", "1-bit", "grey-alpha", "rgba", "16-bit", "float", "lab", "gif"],
)
@pytest.mark.parametrize("rgb", ["after_resize", "before_resize"])
def test_unusual_files_go_all_the_way(data: bytes, rgb: str) -> None:
    result = image_transform(Preprocess(size=16, rgb=rgb))(open_image(data))  # type: ignore[arg-type]
    assert result.shape == (3, 16, 16)
    assert float(result.std()) > 0.01
