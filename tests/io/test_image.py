"""Image files of every mode and depth: what comes out is what is in the file."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from PIL import Image

from chiasm.errors import InputError
from chiasm.io.image import average_hash, image_digest, open_image


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).quantize(30) if mode == "P" else Image.fromarray(pixels).convert(mode)


def packed(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("CMYK", "TIFF"),
     ("P", "GIF"), ("L", "BMP"), ("RGB", "TIFF"), ("RGB", "WEBP"), ("CMYK", "JPEG"), ("L", "JPEG")],
)  # fmt: skip
def test_the_files_own_mode_and_pixels_are_kept(mode: str, kind: str, tmp_path: Path) -> None:
    image = picture(mode)
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(packed(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    opened = open_image(path)
    assert (opened.mode, opened.size) == (mode, image.size)
    if kind != "JPEG":
        assert np.array_equal(np.asarray(opened.convert("RGB")), np.asarray(image.convert("RGB")))


def test_paths_bytes_and_streams_give_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(packed(picture()))
    with path.open("rb") as stream:
        images = [open_image(path), open_image(str(path)), open_image(path.read_bytes()), open_image(stream)]
    assert len({image_digest(image) for image in images}) == 1


def test_the_file_is_closed_and_may_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(packed(picture("P"), "GIF", save_all=True, append_images=[picture("P", seed=1)]))
    image = open_image(path, frame=1)
    path.unlink()
    image.rotate(3)
    assert not any(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))


# --- more than 8 bits -----------------------------------------------------------------------------------------------


@given(arrays(np.uint16, (5, 7)))
@settings(max_examples=60, deadline=None)
def test_16_bits_are_windowed_and_never_clipped(values: np.ndarray) -> None:
    image = open_image(packed(Image.fromarray(values)))
    assert image.mode == "L"
    seen = np.asarray(image).astype(int)
    low, high = int(values.min()), int(values.max())
    assert image.info["window"] == (low, high)
    if low == high:
        assert not seen.any()
        return
    assert (seen.min(), seen.max()) == (0, 255)
    assert np.abs(seen - (values - low) * 255.0 / (high - low)).max() <= 0.5 + 1e-9
    order = np.argsort(values, axis=None, kind="stable")
    assert (np.diff(seen.ravel()[order]) >= 0).all(), "windowing is monotone"


def test_a_16_bit_film_is_not_turned_white() -> None:
    values = np.linspace(0, 51_000, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = open_image(packed(Image.fromarray(values)))
    assert 120 < np.asarray(image).mean() < 135  # Pillow's own conversion gives 254


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_window_overrides_the_range(dtype: type) -> None:
    values = np.array([[0, 100, 200, 300, 400]], dtype=dtype)
    image = open_image(packed(Image.fromarray(values), "TIFF"), window=(100, 300))
    assert np.asarray(image).tolist() == [[0, 0, 128, 255, 255]]
    with pytest.raises(InputError, match="must be below"):
        open_image(packed(Image.fromarray(values), "TIFF"), window=(3, 3))


def test_numbers_that_are_none_become_black_and_do_not_spoil_the_window() -> None:
    values = np.array([[np.nan, 1.0, 2.0, 3.0, np.inf, -np.inf]], dtype=np.float32)
    image = open_image(packed(Image.fromarray(values), "TIFF"))
    assert np.asarray(image).tolist() == [[0, 0, 128, 255, 255, 0]]
    for columns in ([0], [0, 5], [0, 1, 5]):
        assert not np.asarray(open_image(packed(Image.fromarray(values[:, columns]), "TIFF"))).any()
    assert np.asarray(open_image(packed(Image.fromarray(values[:, [1, 4]]), "TIFF"))).tolist() == [[0, 0]]


def test_8_bits_are_left_alone() -> None:
    dim = Image.fromarray(np.array([[10, 20]], np.uint8))
    assert np.asarray(open_image(packed(dim), window=(0, 5))).tolist() == [[10, 20]]


# --- frames and orientation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_several_frames_need_a_choice(kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), (c, 0, 0)) for c in (250, 130, 10)]
    data = packed(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="has 3 frames, expected one"):
        open_image(data)
    for i, red in enumerate((250, 130, 10)):
        opened = open_image(data, frame=i)
        assert opened.convert("RGB").getpixel((5, 5))[0] == pytest.approx(red, abs=4)  # type: ignore[index]
    for bad in (3, -1):
        with pytest.raises(InputError, match=f"has no frame {bad}; it has 3"):
            open_image(data, frame=bad)


def test_a_single_image_is_its_own_frame_0() -> None:
    assert open_image(packed(picture()), frame=0).size == (40, 30)
    with pytest.raises(InputError, match="has no frame 1; it has 1"):
        open_image(packed(picture()), frame=1)


def test_a_telephones_jpeg_with_extra_pictures_is_its_first_picture() -> None:
    data = packed(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    assert open_image(data).size == (40, 30)


def test_orientation_is_left_as_is_unless_asked() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = packed(picture(), "JPEG", exif=exif)
    assert open_image(data).size == (40, 30)
    assert open_image(data, exif=True).size == (30, 40)


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_digest_tells_apart_what_differs() -> None:
    image = picture()
    other = image.copy()
    other.putpixel((3, 3), (1, 2, 3))
    grey = image.convert("L")
    palettes = [Image.new("P", (4, 4)) for _ in range(2)]
    palettes[0].putpalette([0, 0, 0])
    palettes[1].putpalette([9, 9, 9])
    images = [image, other, grey, grey.convert("RGB"), image.resize((30, 40)), grey.rotate(180), *palettes]
    assert len({image_digest(i) for i in images}) == len(images)
    assert image_digest(image) == image_digest(open_image(packed(image)))


def test_hash_survives_scaling_recompression_and_brightness_but_not_mirroring() -> None:
    y, x = np.mgrid[0:256, 0:200]
    smooth = 127 + 60 * np.sin(x / 23 + y / 61) + 50 * np.cos(y / 31 - x / 47)
    image = Image.fromarray(np.clip(smooth, 0, 255).astype(np.uint8))
    original = average_hash(image)
    assert 0 <= original < 2**64
    variants = [
        image.resize((100, 128)),
        image.convert("RGB"),
        open_image(packed(image, "JPEG", quality=40)),
        image.point([min(255, int(v * 1.1)) for v in range(256)]),
        image.convert("P"),
        Image.fromarray(np.asarray(image).astype(np.uint16) * 200),
    ]
    for variant in variants:
        assert (average_hash(variant) ^ original).bit_count() <= 4, variant.mode
    assert (average_hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) ^ original).bit_count() > 16


def test_real_images_open() -> None:
    root = Path(os.environ.get("CHIASM_DATA", ""))
    if not os.environ.get("CHIASM_DATA") or not root.is_dir():
        pytest.skip("CHIASM_DATA names no folder of real images")
    opened = 0
    for name in ("medpix2", "covid_chestxray", "pneumonia_cxr", "pcam_subset", "lc25000_lung", "nih_cxr14_sample"):
        for path in sorted((root / name / "images").rglob("*.*"))[:8]:
            image = open_image(path)
            assert image.mode in ("L", "RGB", "RGBA", "P", "LA"), name
            opened += 1
    assert opened, "the data folder holds no images"
