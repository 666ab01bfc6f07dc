"""The medical models' preprocessing against torchvision and OpenCV, which they call. Runs in .venv-peers only."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.data.resize import area_resize
from chiasm.data.transforms import image_transform
from chiasm.types import Preprocess

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("default"),  # the peers warn about their own dependencies
]
pytest.importorskip("torchvision", reason="needs the environment made by `make peers`")

SIZES = ((320, 400), (400, 320), (97, 641), (100, 60), (224, 224), (253, 253), (319, 319), (1000, 773), (1024, 1024))
BIOVIL = Preprocess(
    size=480, resize_size=512, interpolation="bilinear", stretch="min_max", grey=True, mean=(0.0,) * 3, std=(1.0,) * 3
)
GLORIA = Preprocess(
    resize="longest_pad", resize_size=256, side_rounding="shorter_down", interpolation="area", grey=True,
    mean=(0.5,) * 3, std=(0.5,) * 3,
)  # fmt: skip
CHEXZERO = Preprocess(
    resize="longest_pad", resize_size=320, side_rounding="both_down", interpolation="lanczos", grey=True,
    second_resize="bicubic_tensor", mean=(101.48761 / 255,) * 3, std=(83.43944 / 255,) * 3,
)  # fmt: skip


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    waves = 110 + 80 * np.sin(9 * x) * np.cos(7 * y) + draw.integers(-20, 20, (size[1], size[0]))
    return Image.fromarray(np.clip(waves, 12, 231).astype(np.uint8))


@pytest.mark.parametrize("crop", [480, 448])
def test_biovil_is_bit_equal_to_torchvision(crop: int) -> None:
    from torchvision import transforms as tv

    theirs = tv.Compose([tv.Resize(512), tv.CenterCrop(crop), tv.ToTensor()])
    for size in SIZES:
        values = np.asarray(picture(size)).astype(float)
        values -= values.min()
        stretched = Image.fromarray((values / values.max() * 255).astype(np.uint8))
        ours = image_transform(dataclasses.replace(BIOVIL, size=crop))(picture(size))
        assert torch.equal(ours, theirs(stretched).expand(3, -1, -1)), size


def test_chexzero_is_that_of_torchvision_without_antialiasing() -> None:
    from torchvision import transforms as tv

    def theirs(image: Image.Image, antialias: bool) -> torch.Tensor:
        ratio = 320.0 / max(image.size)
        width, height = (int(side * ratio) for side in image.size)
        square = Image.new("L", (320, 320))
        small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        square.paste(small, ((320 - width) // 2, (320 - height) // 2))
        stored = torch.from_numpy(np.array(square, np.float32)).repeat(3, 1, 1)
        normalise = tv.Normalize((101.48761,) * 3, (83.43944,) * 3)
        bicubic = tv.InterpolationMode.BICUBIC
        again: torch.Tensor = tv.Resize(224, interpolation=bicubic, antialias=antialias)(normalise(stored))
        return again

    for size in SIZES:
        ours = image_transform(CHEXZERO)(picture(size))
        assert float((ours - theirs(picture(size), False)).abs().max()) < 2e-6, size
    wrong = (image_transform(CHEXZERO)(picture(SIZES[0])) - theirs(picture(SIZES[0]), True)).abs().max()
    assert float(wrong) > 0.1


def test_gloria_is_that_of_opencv() -> None:
    cv2: Any = pytest.importorskip("cv2", reason="needs opencv-python-headless")

    worst = 0
    for size in SIZES:
        pixels = np.asarray(picture(size))
        height, width = pixels.shape
        if height >= width:
            wanted = (int(float(width) * (256 / float(height))), 256)
        else:
            wanted = (256, int(float(height) * (256 / float(width))))
        small = cv2.resize(pixels, wanted, interpolation=cv2.INTER_AREA)
        spare = 256 - np.array(small.shape)
        square = np.pad(small, [(n // 2, (n + 1) // 2) for n in spare])
        values = torch.from_numpy((square[16:240, 16:240].astype(np.float32) / 255 - 0.5) / 0.5)
        ours = image_transform(GLORIA)(picture(size))[0]
        worst = max(worst, round(float((ours - values).abs().max()) * 255 / 2))
    assert worst <= 1


@pytest.mark.parametrize("seed", range(12))
def test_area_is_opencvs_up_to_rounding(seed: int) -> None:
    cv2: Any = pytest.importorskip("cv2", reason="needs opencv-python-headless")

    draw = np.random.default_rng(seed)
    shape = (int(draw.integers(2, 300)), int(draw.integers(2, 300)))
    pixels = draw.integers(0, 256, shape).astype(np.uint8)
    factor = float(draw.uniform(0.1, 3.0))
    width, height = max(1, int(shape[1] * factor)), max(1, int(shape[0] * factor))
    theirs = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    difference = np.abs(area_resize(pixels, width, height).astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < (0.01 if factor < 1 else 0.2)


def test_opencv_and_pillow_weigh_colours_alike_up_to_rounding() -> None:
    """GLoRIA's reference reads every file as grey by OpenCV, ours by Pillow."""
    cv2: Any = pytest.importorskip("cv2", reason="needs opencv-python-headless")

    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8)
    ours = np.asarray(Image.fromarray(pixels).convert("L")).astype(int)
    difference = np.abs(ours - cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    assert (cv2.cvtColor(grey, cv2.COLOR_RGB2GRAY) == grey[..., 0]).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_medclip_is_bit_equal_to_torchvision(interpolation: str) -> None:
    """Its evaluation is torchvision's bilinear resize of the padded picture, its processor Pillow's bicubic one."""
    from torchvision import transforms as tv

    from chiasm.encoders.catalog import CATALOG

    p = CATALOG.get("medclip-swin" if interpolation == "bicubic" else "medclip-swin-bilinear").config.preprocess
    steps = [tv.Resize((224, 224), tv.InterpolationMode(interpolation)), tv.ToTensor()]
    theirs = tv.Compose([*steps, tv.Normalize([0.5862785803043838], [0.27950088968644304])])
    for size in SIZES:
        side = max(224, *size)
        square = Image.new("L", (side, side), 0)
        square.paste(picture(size), (int((side - size[0]) / 2), int((side - size[1]) / 2)))
        assert torch.equal(image_transform(p)(picture(size)), theirs(square).expand(3, -1, -1)), size
