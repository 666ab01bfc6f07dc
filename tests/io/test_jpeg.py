"""JPEG by simplejpeg: Pillow's pixels, Pillow's refusals, Pillow's limits, and Pillow itself wherever they could differ."""

from __future__ import annotations

import copy
import io
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.errors import ChiasmError, FileFormatError, InputError
from chiasm.io import jpeg
from chiasm.io.decoded import DecodedImage, pixels_of
from chiasm.io.image import open_image

# Pillow warns about damaged metadata of images that it can read all the same.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
needs_decoder = pytest.mark.skipif(jpeg._decoder() is None, reason="simplejpeg is not installed")
SIZES = ((1, 1), (7, 5), (8, 8), (16, 16), (17, 33), (47, 31), (64, 1), (1, 64), (130, 97))


def picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    draw = np.random.default_rng(seed)
    waves = np.stack([127 + 100 * np.sin(x / 5 + c) * np.cos(y / 7 + 2 * c) for c in range(3)], -1)
    return Image.fromarray(np.clip(waves + draw.normal(0, 25, waves.shape), 0, 255).astype(np.uint8)).convert(mode)


def packed(size: tuple[int, int] = (47, 31), mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture(size, mode).save(stream, "JPEG", **({"quality": 85} | options))
    return stream.getvalue()


def by_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@needs_decoder
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [20, 85, 100])
def test_colour_has_the_bits_of_pillow(subsampling: str, progressive: bool, quality: int) -> None:
    for size in SIZES:
        data = packed(size, subsampling=subsampling, progressive=progressive, quality=quality)
        image = open_image(data)
        assert isinstance(image, DecodedImage)
        assert (image.mode, image.size, image.format) == ("RGB", size, "JPEG")
        assert np.array_equal(pixels_of(image), np.asarray(by_pillow(data))), size


@needs_decoder
def test_grey_plain_rgb_optimised_and_restart_markers_too() -> None:
    for size in SIZES:
        for data, mode in (
            (packed(size, "L"), "L"),
            (packed(size, "L", progressive=True), "L"),
            (packed(size, keep_rgb=True, subsampling=0), "RGB"),
            (packed(size, optimize=True), "RGB"),
            (packed(size, restart_marker_blocks=1), "RGB"),
        ):
            image = open_image(data)
            assert isinstance(image, DecodedImage)
            assert image.mode == mode
            assert np.array_equal(pixels_of(image), np.asarray(by_pillow(data))), size


@needs_decoder
def test_the_fast_settings_that_are_left_off_would_change_pixels() -> None:
    import simplejpeg

    data = packed((130, 97), subsampling="4:2:0")
    exact = np.asarray(by_pillow(data))
    assert np.array_equal(simplejpeg.decode_jpeg(data), exact)
    assert not np.array_equal(simplejpeg.decode_jpeg(data, fastupsample=True), exact)
    assert not np.array_equal(simplejpeg.decode_jpeg(data, fastdct=True), exact)


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_what_is_not_its_work_goes_to_pillow(mode: str) -> None:
    data = packed(mode=mode)
    if mode == "CMYK":
        image = open_image(data)
        assert not isinstance(image, DecodedImage)
        assert image.tobytes() == by_pillow(data).tobytes()
    for kind in ("BMP", "TIFF", "WEBP"):
        stream = io.BytesIO()
        picture((20, 10)).save(stream, kind)
        assert not isinstance(open_image(stream.getvalue()), DecodedImage), kind


def test_two_pictures_in_one_file_are_its_first() -> None:
    stream = io.BytesIO()
    picture((40, 30)).save(stream, "MPO", save_all=True, append_images=[picture((40, 30), seed=1)])
    image = open_image(stream.getvalue())
    assert not isinstance(image, DecodedImage)
    assert image.tobytes() == by_pillow(stream.getvalue()).tobytes()


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_and_metadata_are_as_with_pillow(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = packed((40, 30), exif=exif.tobytes(), dpi=(300, 300), comment=b"film", icc_profile=b"profile")
    plain, turned = open_image(data), open_image(data, exif=True)
    theirs = by_pillow(data)
    assert plain.size == (40, 30)
    assert turned.size == ((30, 40) if turn > 4 else (40, 30))
    assert plain.info == theirs.info
    assert plain.getexif()[0x0112] == turn
    from PIL import ImageOps

    assert turned.tobytes() == ImageOps.exif_transpose(theirs).tobytes()


def outcome(data: bytes) -> tuple[str, object]:
    try:
        image = open_image(data)
    except ChiasmError as error:
        return type(error).__name__, str(error)
    return image.mode, (image.size, image.tobytes())


def without_decoder(call: Callable[[], Any]) -> Any:
    found, jpeg._decoder = jpeg._decoder, lambda: None  # type: ignore[assignment,misc]
    try:
        return call()
    finally:
        jpeg._decoder = found


WHOLE = packed((37, 29), subsampling="4:2:0")
WHOLE_GREY = packed((37, 29), "L", progressive=True)


@given(
    st.sampled_from([WHOLE, WHOLE_GREY]),
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
    assert outcome(whole) == without_decoder(lambda: outcome(whole))


def test_a_cut_file_is_refused_at_every_byte() -> None:
    for end in range(0, len(WHOLE) - 2, 7):
        with pytest.raises(FileFormatError):
            open_image(WHOLE[:end])
    # Only the end marker is missing: Pillow takes it, and so does this.
    assert outcome(WHOLE[:-2]) == without_decoder(lambda: outcome(WHOLE[:-2]))


def _with_size(data: bytes, width: int, height: int, *, which: int = 0) -> bytes:
    """The same file with other sides in its header."""
    place = -1
    for _ in range(which + 1):
        place = data.index(b"\xff\xc0", place + 1)
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


def test_sizes_are_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> object:
            pytest.fail(f"{name} of a refused file")

    monkeypatch.setattr(jpeg, "_decoder", Untouchable)
    with pytest.raises(InputError, match="too large"):
        open_image(_with_size(WHOLE, 65_500, 65_500))
    with pytest.raises(InputError, match="more than the 1,000 allowed"):
        open_image(WHOLE, max_pixels=1000)


@needs_decoder
def test_a_decoder_that_reads_another_size_is_not_let_near_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two headers, say: what was checked must be what is allocated."""

    class Liar:
        decode_jpeg = staticmethod(lambda *_, **__: pytest.fail("decoded"))

        def __init__(self, header: tuple[object, ...]) -> None:
            self.decode_jpeg_header = lambda _: header

    theirs = by_pillow(WHOLE).tobytes()
    for header in ((60_000, 60_000, "YCbCr", "420"), (29, 37, "CMYK", "420"), (37, 29, "YCbCr", "420")):
        monkeypatch.setattr(jpeg, "_decoder", lambda h=header: Liar(h))
        assert open_image(WHOLE).tobytes() == theirs


@needs_decoder
def test_results_of_another_shape_or_kind_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        decode_jpeg_header = staticmethod(lambda _: (29, 37, "YCbCr", "420"))

        def __init__(self, result: object) -> None:
            self.decode_jpeg = lambda *_, **__: result

    for result in (np.zeros((29, 37, 1), np.uint8), np.zeros((37, 29, 3), np.uint8), np.zeros((29, 37, 3))):
        monkeypatch.setattr(jpeg, "_decoder", lambda r=result: Odd(r))
        assert not isinstance(open_image(WHOLE), DecodedImage)


@needs_decoder
def test_a_file_far_longer_than_its_pixels_is_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "_SLACK_BYTES", 1000)
    assert isinstance(open_image(WHOLE), DecodedImage)
    image = open_image(WHOLE + b"\0" * 10_000)
    assert not isinstance(image, DecodedImage)
    assert image.tobytes() == by_pillow(WHOLE).tobytes()


def test_without_the_package_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg._decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    try:
        image = open_image(WHOLE)
        assert not isinstance(image, DecodedImage)
        assert np.array_equal(pixels_of(image), np.asarray(by_pillow(WHOLE)))
    finally:
        jpeg._decoder.cache_clear()


@needs_decoder
def test_it_is_an_ordinary_image_once_pillow_works_on_it(tmp_path: Path) -> None:
    for data in (WHOLE, WHOLE_GREY):
        theirs = by_pillow(data)
        for work in (
            lambda i: i.copy(),
            lambda i: i.convert("RGB"),
            lambda i: i.crop((3, 4, 20, 19)),
            lambda i: i.resize((9, 8)),
            lambda i: pickle.loads(pickle.dumps(i)),
            copy.deepcopy,
            lambda i: i.transpose(Image.Transpose.ROTATE_90),
            lambda i: Image.blend(i, i, 0.5),
        ):
            assert work(open_image(data)).tobytes() == work(theirs).tobytes()
        open_image(data).save(tmp_path / "out.png")
        assert open_image(tmp_path / "out.png").tobytes() == theirs.tobytes()
        assert np.array_equal(np.asarray(open_image(data)), np.asarray(theirs))


@needs_decoder
@pytest.mark.parametrize("data", [WHOLE, WHOLE_GREY])
def test_pixels_are_never_stale(data: bytes) -> None:
    image = open_image(data)
    before = pixels_of(image).copy()
    image.putpixel((2, 3), 7 if image.mode == "L" else (7, 7, 7))
    assert (pixels_of(image)[3, 2] == 7).all()
    image.paste(0 if image.mode == "L" else (0, 0, 0), (0, 0, 5, 5))
    assert (pixels_of(image)[:5, :5] == 0).all()
    assert np.array_equal(pixels_of(open_image(data)), before)


@needs_decoder
def test_streams_are_read_from_their_beginning_and_stay_open() -> None:
    stream = io.BytesIO(WHOLE)
    stream.seek(20)
    image = open_image(stream)
    assert isinstance(image, DecodedImage)
    assert image.tobytes() == by_pillow(WHOLE).tobytes()
    assert not stream.closed


def test_a_draft_is_smaller_and_only_where_it_is_asked_for() -> None:
    data = packed((400, 300))
    assert open_image(data, draft_px=100).size == (200, 150)
    assert min(open_image(data, draft_px=75).size) == 75
    assert open_image(data, draft_px=151).tobytes() == open_image(data).tobytes()
    stream = io.BytesIO()
    picture((400, 300)).save(stream, "PNG")
    assert open_image(stream.getvalue(), draft_px=10).tobytes() == open_image(stream.getvalue()).tobytes()
    with pytest.raises(InputError, match="draft_px must be at least 1, got 0"):
        open_image(data, draft_px=0)
    with pytest.raises(InputError, match="more than the 1,000 allowed"):
        open_image(data, draft_px=10, max_pixels=1000)
