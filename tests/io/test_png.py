"""PNG by the compiled prediction: Pillow's pixels, refusals and metadata, and Pillow itself for all that is not plain."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from chiasm.data.transforms import image_transform
from chiasm.errors import ChiasmError, FileFormatError, InputError
from chiasm.io import png
from chiasm.io.decoded import DecodedImage, pixels_of
from chiasm.io.image import open_image
from chiasm.types import Preprocess

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
needs_compiled = pytest.mark.skipif(png._library() is None, reason="the prediction was not compiled here")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header(width: int, height: int, *, bits: int = 8, colour: int = 0, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace))


def file_of(raw: bytes, width: int, height: int, *, colour: int = 0, pieces: int = 1, **parts: bytes) -> bytes:
    """A whole file; ``parts``: chunks ``before`` and ``behind`` the pixels, other ``packed`` pixels or another ``head``."""
    packed = parts.get("packed", zlib.compress(raw, 1))
    step = max(1, -(-len(packed) // pieces))
    data = b"".join(chunk(b"IDAT", packed[i : i + step]) for i in range(0, len(packed), step))
    head = parts.get("head", header(width, height, colour=colour))
    return (
        b"\x89PNG\r\n\x1a\n" + head + parts.get("before", b"") + data + parts.get("behind", b"") + chunk(b"IEND", b"")
    )


def rows(shape: tuple[int, ...], filters: NDArray[np.uint8] | None = None, seed: int = 0) -> bytes:
    """Rows as a file holds them: any filters, any bytes; every such thing is an image."""
    draw = np.random.default_rng(seed)
    height, bytes_a_row = shape[0], int(np.prod(shape[1:]))
    raw = draw.integers(0, 256, (height, 1 + bytes_a_row), dtype=np.uint8)
    raw[:, 0] = draw.integers(0, 5, height) if filters is None else filters
    return raw.tobytes()


def packed(mode: str, size: tuple[int, int] = (47, 31), **options: Any) -> bytes:
    draw = np.random.default_rng(1)
    pixels = draw.normal(128, 9, (size[1], size[0], 3)).cumsum(1) % 256
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(stream, "PNG", **options)
    return stream.getvalue()


def by_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def without(call: Callable[[], Any]) -> Any:
    found, png._library = png._library, lambda: None  # type: ignore[assignment]
    try:
        return call()
    finally:
        png._library = found


def outcome(data: bytes) -> tuple[object, ...]:
    try:
        image = open_image(data)
    except ChiasmError as error:
        return type(error).__name__, str(error)
    pixels = image.tobytes()
    return image.mode, image.size, pixels, image.format, {k: v for k, v in image.info.items() if k != "window"}


@needs_compiled
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("channels", [1, 3])
def test_each_filter_has_the_pixels_of_pillow(which: int, channels: int) -> None:
    for height, width in ((1, 1), (7, 16), (8, 9), (9, 48), (16, 47), (17, 49), (31, 100), (64, 1), (1, 64)):
        shape = (height, width, 3)[: 2 if channels == 1 else 3]
        data = file_of(rows(shape, np.full(height, which, np.uint8)), width, height, colour=0 if channels == 1 else 2)
        image = open_image(data)
        assert isinstance(image, DecodedImage)
        assert np.array_equal(pixels_of(image), np.asarray(by_pillow(data))), shape


@needs_compiled
@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=250, deadline=None)
def test_law_any_filters_and_any_bytes_have_the_pixels_of_pillow(
    height: int, width: int, grey: bool, pieces: int, seed: int
) -> None:
    shape = (height, width) if grey else (height, width, 3)
    data = file_of(rows(shape, seed=seed), width, height, colour=0 if grey else 2, pieces=pieces)
    image = open_image(data)
    assert isinstance(image, DecodedImage)
    assert np.array_equal(pixels_of(image), np.asarray(by_pillow(data)))


@needs_compiled
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_files_as_pillow_writes_them(mode: str) -> None:
    for options in ({}, {"optimize": True}, {"compress_level": 0}, {"compress_level": 9}, {"dpi": (300, 300)}):
        data = packed(mode, **options)
        image = open_image(data)
        assert isinstance(image, DecodedImage)
        assert (image.format, image.info) == ("PNG", by_pillow(data).info)
        assert image.tobytes() == by_pillow(data).tobytes()


@needs_compiled
def test_metadata_before_the_pixels_is_kept_and_behind_them_is_pillows_work() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("View", "PA")
    text.add_text("Long", "x" * 999, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = packed("L", pnginfo=text, exif=exif, transparency=7, icc_profile=b"profile")
    image = open_image(data)
    assert image.info == by_pillow(data).info
    assert image.info["View"] == "PA"
    assert open_image(data, exif=True).size == (31, 47)
    raw = rows((9, 8))
    late = file_of(raw, 8, 9, behind=chunk(b"tEXt", b"View\0AP"))
    assert not isinstance(open_image(late), DecodedImage)
    assert open_image(late).info == {"View": "AP"}


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "I;16"])
def test_other_kinds_of_pixels_are_pillows_work(mode: str) -> None:
    stream = io.BytesIO()
    (Image.new(mode, (9, 8)) if mode == "I;16" else Image.new("RGB", (9, 8), (1, 2, 3)).convert(mode)).save(
        stream, "PNG"
    )
    image = open_image(stream.getvalue())
    assert not isinstance(image, DecodedImage)
    assert outcome(stream.getvalue()) == without(lambda: outcome(stream.getvalue()))


def test_odd_files_end_as_with_pillow() -> None:
    raw = rows((9, 8))
    deflated = zlib.compress(raw)
    frames = io.BytesIO()
    Image.new("L", (8, 9)).save(frames, "PNG", save_all=True, append_images=[Image.new("L", (8, 9), 5)])
    bad_crc = bytearray(file_of(raw, 8, 9))
    bad_crc[-14] ^= 1
    wrong_filter = bytearray(raw)
    wrong_filter[9] = 5
    for data in (
        file_of(raw, 8, 9, head=header(8, 9, interlace=1)),
        file_of(raw, 8, 9, head=header(8, 9, bits=16)),
        file_of(raw, 8, 9, head=header(8, 9, bits=4)),
        file_of(raw, 8, 9, head=header(8, 9) + header(4, 4)),
        file_of(raw, 8, 9, head=header(80, 90)),
        file_of(raw, 8, 9, head=header(8, 8)),
        file_of(raw, 8, 9, packed=deflated[:-4]),
        file_of(raw, 8, 9, packed=deflated[:-4] + b"\0\0\0\0"),
        file_of(raw, 8, 9, packed=deflated + b"more"),
        file_of(raw, 8, 9, packed=zlib.compress(raw + b"more")),
        file_of(raw, 8, 9, packed=zlib.compress(raw[:-1])),
        file_of(raw, 8, 9, packed=b""),
        file_of(raw, 8, 9, packed=b"no deflate stream"),
        file_of(bytes(wrong_filter), 8, 9),
        file_of(raw, 8, 9, before=chunk(b"XxXx", b"unknown and critical")),
        file_of(raw, 8, 9)[:-12],
        file_of(raw, 8, 9) + b"behind the end",
        bytes(bad_crc),
        frames.getvalue(),
    ):
        assert outcome(data) == without(lambda data=data: outcome(data))


WHOLE = {"L": packed("L", (37, 29)), "RGB": packed("RGB", (37, 29))}


@given(
    st.sampled_from(list(WHOLE.values())),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, 4000)),
    st.binary(max_size=6),
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_law_damage_has_the_same_outcome_as_with_pillow(
    data: bytes, flips: list[tuple[int, int]], cut: int | None, tail: bytes
) -> None:
    damaged = bytearray(data)
    for place, value in flips:
        damaged[place % len(damaged)] = value
    whole = bytes(damaged[: None if cut is None else cut % len(damaged)]) + tail
    assert outcome(whole) == without(lambda: outcome(whole))


@needs_compiled
def test_no_more_is_inflated_than_the_header_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = file_of(b"", 8, 9, packed=zlib.compress(b"\0" * 50_000_000, 9))
    got: list[int] = []

    class Counting:
        error = zlib.error

        class decompressobj:
            unused_data = b""

            def __init__(self) -> None:
                self._stream = zlib.decompressobj()

            @property
            def eof(self) -> bool:
                return self._stream.eof

            def decompress(self, data: bytes, limit: int) -> bytes:
                got.append(len(result := self._stream.decompress(data, limit)))
                return result

    monkeypatch.setattr(png, "_inflater", lambda: Counting)
    assert outcome(bomb) == without(lambda: outcome(bomb))
    assert got == [9 * 9 + 1]


def test_sizes_are_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "bytes_of", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(InputError, match="too large"):
        open_image(file_of(b"", 65_000, 65_000))
    with pytest.raises(InputError, match="more than the 1,000 allowed"):
        open_image(WHOLE["L"], max_pixels=1000)


@needs_compiled
def test_a_file_far_longer_than_its_pixels_is_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "_SLACK_BYTES", 100)
    data = file_of(rows((9, 8)), 8, 9, before=chunk(b"tEXt", b"Note\0" + b"x" * 5000))
    assert not isinstance(open_image(data), DecodedImage)
    assert outcome(data) == without(lambda: outcome(data))


@needs_compiled
def test_huge_images_are_decoded_row_by_row_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_image(WHOLE["RGB"]), DecodedImage)
    monkeypatch.setattr(png, "_MAX_PIXELS", 37 * 29 - 1)
    assert not isinstance(open_image(WHOLE["RGB"]), DecodedImage)
    assert outcome(WHOLE["RGB"]) == without(lambda: outcome(WHOLE["RGB"]))


@pytest.mark.parametrize("missing", ["isal", "compiled"])
def test_without_its_parts_the_pixels_are_the_same(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [by_pillow(data).tobytes() for data in WHOLE.values()]
    png._inflater.cache_clear()
    if missing == "isal":
        monkeypatch.setitem(sys.modules, "isal", None)
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
        assert png._inflater() is zlib
    else:
        monkeypatch.setattr(png, "_library", lambda: None)
    try:
        images = [open_image(data) for data in WHOLE.values()]
        assert [image.tobytes() for image in images] == expected
        if missing == "compiled":
            assert not any(isinstance(image, DecodedImage) for image in images)
    finally:
        png._inflater.cache_clear()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_from_file_to_tensor_no_bit_changes(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "film.png"
    path.write_bytes(packed(mode, (150, 120)))
    transform = image_transform(Preprocess(size=64))
    ours = transform(open_image(path))
    assert np.array_equal(ours.numpy(), transform(by_pillow(path.read_bytes())).numpy())
    path.write_bytes(packed(mode, (150, 120))[:900])
    with pytest.raises(FileFormatError, match=r"image `film\.png` is damaged"):
        open_image(path)


@pytest.mark.parametrize("inflater", ["isal.isal_zlib", "zlib"])
def test_only_a_whole_stream_of_the_expected_length_is_unpacked(monkeypatch: pytest.MonkeyPatch, inflater: str) -> None:
    module = pytest.importorskip(inflater)
    monkeypatch.setattr(png, "_inflater", lambda: module)
    raw = bytes(range(256)) * 9
    packed = zlib.compress(raw)
    assert png._inflate(packed, len(raw)) == raw
    wrong = packed[:-1] + bytes([packed[-1] ^ 1])
    for damaged in (packed[:-1], packed[:-4], packed + b"x", wrong, b""):
        assert png._inflate(damaged, len(raw)) is None
    assert png._inflate(packed, len(raw) - 1) is None
    assert png._inflate(packed, len(raw) + 1) is None
