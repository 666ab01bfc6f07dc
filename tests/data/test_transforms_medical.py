"""The steps that the medical models add: greyscale, stretching, squares, two sizes, and resizing by area."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from chiasm.data.augment import Augment, augmentation
from chiasm.data.resize import area_resize
from chiasm.data.transforms import image_transform, resize_and_crop
from chiasm.explain.heatmap import model_view
from chiasm.types import Preprocess

GREY_MEAN, GREY_STD = 0.5862785803043838, 0.27950088968644304
MEDCLIP = Preprocess(resize="pad_square", crop="none", grey=True, mean=(GREY_MEAN,) * 3, std=(GREY_STD,) * 3)
GLORIA = Preprocess(
    resize="longest_pad", resize_size=256, side_rounding="shorter_down", interpolation="area", grey=True,
    mean=(0.5,) * 3, std=(0.5,) * 3,
)  # fmt: skip
BIOVIL = Preprocess(
    size=480, resize_size=512, interpolation="bilinear", stretch="min_max", grey=True, mean=(0.0,) * 3, std=(1.0,) * 3
)
CHEXZERO = Preprocess(
    resize="longest_pad", resize_size=320, side_rounding="both_down", interpolation="lanczos", grey=True,
    second_resize="bicubic_tensor", mean=(101.48761 / 255,) * 3, std=(83.43944 / 255,) * 3,
)  # fmt: skip
ALL = {"medclip": MEDCLIP, "gloria": GLORIA, "biovil": BIOVIL, "chexzero": CHEXZERO}
SIZES = ((320, 400), (400, 320), (97, 641), (100, 60), (224, 224), (253, 253), (319, 319), (1000, 773))


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    waves = 110 + 80 * np.sin(9 * x) * np.cos(7 * y) + draw.integers(-20, 20, (size[1], size[0]))
    return Image.fromarray(np.clip(waves, 12, 231).astype(np.uint8))


def slow_area(pixels: NDArray[np.uint8], width: int, height: int) -> list[list[Fraction]]:
    """The exact mean of what each pixel covers, in fractions."""
    rows, columns = pixels.shape

    def cover(length: int, size: int, place: int) -> list[tuple[int, Fraction]]:
        start, stop = Fraction(place * length, size), Fraction((place + 1) * length, size)
        shares = []
        for i in range(length):
            share = min(stop, Fraction(i + 1)) - max(start, Fraction(i))
            if share > 0:
                shares.append((i, share / (stop - start)))
        return shares

    across = [cover(columns, width, x) for x in range(width)]
    result = []
    for y in range(height):
        down = cover(rows, height, y)
        line = []
        for places in across:
            line.append(sum((a * b * int(pixels[i, j]) for i, a in down for j, b in places), Fraction(0)))
        result.append(line)
    return result


@given(st.tuples(st.integers(1, 14), st.integers(1, 14)), st.tuples(st.integers(1, 14), st.integers(1, 14)), st.data())
@settings(max_examples=60, deadline=None)
def test_area_is_the_mean_of_what_a_pixel_covers(shape: tuple[int, int], target: tuple[int, int], data: Any) -> None:
    height, width = min(target[0], shape[0]), min(target[1], shape[1])
    pixels = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, shape).astype(np.uint8)
    ours = area_resize(pixels, width, height)
    exact = slow_area(pixels, width, height)
    assert (ours.shape, ours.dtype) == ((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            assert abs(int(ours[y, x]) - exact[y][x]) <= Fraction(1, 2) + Fraction(1, 10**9)


def test_area_of_colours_is_that_of_each_channel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 61, 3)).astype(np.uint8)
    together = area_resize(pixels, 20, 13)
    for c in range(3):
        assert (together[..., c] == area_resize(pixels[..., c], 20, 13)).all()


def test_area_enlarges_by_whole_factors_without_blur() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.uint8)
    assert (area_resize(pixels, 21, 15) == pixels.repeat(3, 0).repeat(3, 1)).all()
    assert (area_resize(np.array([[0, 200]], np.uint8), 3, 1) == [[0, 100, 200]]).all()
    assert area_resize(pixels, 7, 5) is pixels


def test_medclip_pads_to_a_square_before_it_resizes() -> None:
    for size in SIZES:
        image = picture(size)
        side = max(224, *size)
        square = Image.new("L", (side, side), 0)
        square.paste(image, (int((side - size[0]) / 2), int((side - size[1]) / 2)))
        seen = np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))
        assert (np.asarray(resize_and_crop(image, MEDCLIP)) == seen[..., None]).all(), size
        values = (seen.astype(np.float64) / 255 - GREY_MEAN) / GREY_STD
        np.testing.assert_allclose(image_transform(MEDCLIP)(image)[1].numpy(), values, atol=3e-7)


def test_a_small_image_is_not_enlarged_by_medclip() -> None:
    seen = np.asarray(resize_and_crop(Image.new("L", (100, 60), 200), MEDCLIP))[..., 0]
    assert (seen[82:142, 62:162] == 200).all()
    assert int((seen > 0).sum()) == 60 * 100


def test_gloria_pads_to_256_and_crops() -> None:
    for size in SIZES:
        image = picture(size)
        width, height = size
        factor = 256 / max(size)
        new = (int(width * factor), 256) if height >= width else (256, int(height * factor))
        pixels = area_resize(np.asarray(image), *new)
        left, top = (256 - new[0]) // 2, (256 - new[1]) // 2
        square = np.zeros((256, 256), np.uint8)
        square[top : top + new[1], left : left + new[0]] = pixels
        assert (np.asarray(resize_and_crop(image, GLORIA))[..., 2] == square[16:240, 16:240]).all(), size


def test_biovil_stretches_resizes_and_crops() -> None:
    for size in SIZES:
        values = np.asarray(picture(size)).astype(float)
        stretched = ((values - values.min()) / (values - values.min()).max() * 255).astype(np.uint8)
        width, height = size
        new = (512, int(512 * height / width)) if width <= height else (int(512 * width / height), 512)
        resized = Image.fromarray(stretched).resize(new, Image.Resampling.BILINEAR)
        left, top = round((new[0] - 480) / 2), round((new[1] - 480) / 2)
        seen = np.asarray(resized.crop((left, top, left + 480, top + 480)))
        assert (np.asarray(resize_and_crop(picture(size), BIOVIL))[..., 0] == seen).all(), size
        assert np.array_equal(image_transform(BIOVIL)(picture(size))[0].numpy(), seen.astype(np.float32) / 255)
    black = image_transform(BIOVIL)(Image.new("L", (600, 500), 77))
    assert not black.any()


def test_chexzero_resizes_twice() -> None:
    for size in SIZES:
        image = picture(size)
        ratio = 320.0 / max(size)
        new = (int(size[0] * ratio), int(size[1] * ratio))
        square = Image.new("L", (320, 320))
        square.paste(image.resize(new, Image.Resampling.LANCZOS), ((320 - new[0]) // 2, (320 - new[1]) // 2))
        assert (np.asarray(resize_and_crop(image, CHEXZERO))[..., 0] == np.asarray(square)).all(), size
        values = (torch.from_numpy(np.array(square)).float() - 101.48761) / 83.43944
        wanted = torch.nn.functional.interpolate(values.expand(1, 3, -1, -1), (224, 224), mode="bicubic")[0]
        assert torch.allclose(image_transform(CHEXZERO)(image), wanted, atol=2e-6)
    assert Preprocess.scaled_sides(CHEXZERO, 319, 319) == (319, 319), "the reference loses a pixel to rounding"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("medclip", {"resize": "squash"}),
        ("medclip", {"resize": "longest_pad"}),
        ("medclip", {"interpolation": "bilinear"}),
        ("gloria", {"interpolation": "bilinear"}),
        ("gloria", {"resize_size": None}),
        ("gloria", {"fill": 255}),
        ("biovil", {"stretch": None}),
        ("biovil", {"resize_size": None}),
        ("biovil", {"interpolation": "bicubic"}),
        ("chexzero", {"second_resize": None}),
        ("chexzero", {"interpolation": "bicubic"}),
        ("chexzero", {"side_rounding": None}),
    ],
)
def test_a_wrong_declaration_shows(name: str, change: dict[str, Any]) -> None:
    right = ALL[name]
    image = picture((773, 400), seed=4)
    wrong = dataclasses.replace(right, **change)
    difference = (image_transform(right)(image) - image_transform(wrong)(image)).abs().max()
    assert float(difference) > 0.02  # the right one is within 2e-6


def test_an_image_of_one_grey_is_stretched_to_black() -> None:
    """BioViL's reference divides by zero there."""
    even = Image.fromarray(np.full((40, 50), 77, dtype=np.uint8))
    assert float(image_transform(ALL["biovil"])(even).abs().max()) == 0


def test_antialiasing_in_the_second_resize_would_show() -> None:
    image = picture((500, 400))
    planes = image_transform(dataclasses.replace(CHEXZERO, size=320, second_resize=None))(image)
    smooth = torch.nn.functional.interpolate(planes[None], (224, 224), mode="bicubic", antialias=True)[0]
    assert float((image_transform(CHEXZERO)(image) - smooth).abs().max()) > 0.1


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_becomes_equal_channels_of_the_declared_size(name: str, mode: str) -> None:
    p = ALL[name]
    image = picture((150, 130)).convert("RGB").convert(mode) if mode != "LA" else picture((150, 130)).convert("LA")
    result = image_transform(p)(image)
    assert result.shape == (3, p.size, p.size)
    assert torch.equal(result[0], result[1]) and torch.equal(result[0], result[2])  # noqa: PT018
    seen = resize_and_crop(image, p)
    assert seen.size == (p.picture_size, p.picture_size)
    assert torch.equal(image_transform(p).normalize(seen), result)


def test_area_without_grey_converts_first() -> None:
    p = dataclasses.replace(GLORIA, grey=None)
    image = picture((150, 130)).convert("P")
    assert torch.equal(image_transform(p)(image), image_transform(p)(image.convert("RGB")))


@pytest.mark.parametrize("name", list(ALL))
def test_augmentation_with_every_knob_off_is_the_transform(name: str) -> None:
    p, image = ALL[name], picture((180, 150))
    varied = augmentation(Augment(crop_scale=(1.0, 1.0)), p)(image, np.random.default_rng(0))
    assert torch.equal(varied, image_transform(p)(image))
    cut = augmentation(Augment(crop_scale=(0.5, 0.8)), p)(image, np.random.default_rng(0))
    assert cut.shape == (3, p.size, p.size)


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("shape", [(300, 200), (150, 400), (96, 96), (333, 97)])
def test_the_view_finds_a_spot_on_the_original(name: str, shape: tuple[int, int]) -> None:
    width, height = shape
    x, y = width // 2 + min(shape) // 6, height // 2 - min(shape) // 6
    pixels = np.zeros((height, width), np.uint8)
    pixels[y - 4 : y + 4, x - 4 : x + 4] = 255
    seen = image_transform(ALL[name])(Image.fromarray(pixels))[0].numpy()
    rows, columns = np.nonzero(seen > seen.min() + 0.5 * (seen.max() - seen.min()))
    left, top, right, bottom = model_view(ALL[name], shape)
    found_x = left + (columns.mean() + 0.5) / ALL[name].size * (right - left)
    found_y = top + (rows.mean() + 0.5) / ALL[name].size * (bottom - top)
    assert abs(found_x - x) < 1.6
    assert abs(found_y - y) < 1.6


def test_new_fields_leave_old_digests_alone() -> None:
    old = {"size", "resize", "crop", "interpolation", "rgb", "mean", "std", "fill", "cut_bottom"}
    assert set(Preprocess().to_dict()) == old
    for p in ALL.values():
        assert Preprocess.from_dict(p.to_dict()) == p
