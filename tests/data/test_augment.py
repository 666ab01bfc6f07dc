"""Augmentation: reproducible, exact when off, and true to left and right where the text says so."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.config import build
from chiasm.data.augment import PRESETS, Augment, Augmentation, augmentation
from chiasm.data.transforms import image_transform
from chiasm.errors import ConfigError, UnknownName
from chiasm.types import Preprocess

SMALL = Preprocess(size=48)
EVERYTHING = Augment(
    crop_scale=(0.5, 0.9),
    rotate_deg=20,
    translate=0.1,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.1,
    stain=0.3,
    horizontal_flip=True,
    vertical_flip=True,
    quarter_turns=True,
    blur=1.0,
    noise=0.05,
)

seeds = st.integers(0, 2**32 - 1)


def tissue(size: tuple[int, int] = (70, 60), seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    pink = np.array([230, 170, 200]) + draw.integers(-25, 25, (size[1], size[0], 3))
    return Image.fromarray(pink.astype(np.uint8))


def film(size: tuple[int, int] = (80, 80)) -> Image.Image:
    """Bright on the left, dark on the right, with a marker in the upper left corner."""
    pixels = np.full((size[1], size[0]), 40, np.uint8)
    pixels[:, : size[0] // 2] = 160
    pixels[: size[1] // 3, : size[0] // 3] = 250
    return Image.fromarray(pixels)


@given(seeds, st.sampled_from(["L", "RGB", "P", "RGBA", "1"]), st.sampled_from(["shortest", "squash", "longest_pad"]))
@settings(max_examples=40, deadline=None)
def test_with_everything_off_it_is_the_plain_transform(seed: int, mode: str, resize: Any) -> None:
    p = Preprocess(size=40, resize=resize)
    image = tissue(seed=seed).convert(mode)
    result = augmentation(Augment.preset("none"), p)(image, np.random.default_rng(seed))
    assert torch.equal(result, image_transform(p)(image))


@pytest.mark.parametrize("augment", [*PRESETS.values(), EVERYTHING], ids=[*PRESETS, "everything"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_generator_decides_everything(augment: Augment, mode: str) -> None:
    image = tissue().convert(mode)
    vary = augmentation(augment, SMALL)
    results = [vary(image, np.random.default_rng(seed)) for seed in (5, 5, 6)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) == (augment == PRESETS["none"])


@given(seeds, st.sampled_from([*PRESETS.values(), EVERYTHING]), st.sampled_from(["L", "RGB", "P", "LA"]))
@settings(max_examples=60, deadline=None)
def test_the_result_is_an_image_of_the_declared_size(seed: int, augment: Augment, mode: str) -> None:
    image = tissue((75, 52), seed).convert(mode)
    before = image.tobytes()
    generator = np.random.default_rng(seed)
    vary = Augmentation(augment, SMALL)
    picture = vary.picture(image, generator)
    assert picture.size == (48, 48)
    assert picture.mode == ("L" if mode == "L" else "RGB")
    result = vary(image, generator)
    assert result.shape == (3, 48, 48)
    assert torch.isfinite(result).all()
    assert image.tobytes() == before, "the augmentation changed its input"


@given(seeds, st.sampled_from(["chest", "ct-mr"]))
@settings(max_examples=100, deadline=None)
def test_left_stays_left_and_top_stays_top_in_patients_images(seed: int, preset: str) -> None:
    picture = Augmentation(Augment.preset(preset), SMALL).picture(film(), np.random.default_rng(seed))
    seen = np.asarray(picture, dtype=float)
    assert seen[:, :24].mean() > seen[:, 24:].mean() + 40
    corners = {"tl": seen[:12, :12], "tr": seen[:12, 36:], "bl": seen[36:, :12], "br": seen[36:, 36:]}
    assert max(corners, key=lambda k: corners[k].mean()) == "tl"


def test_presets_say_whether_they_keep_sides() -> None:
    assert {name: a.keeps_laterality for name, a in PRESETS.items()} == {
        "none": True,
        "chest": True,
        "ct-mr": True,
        "histology": False,
    }
    assert Augment().keeps_laterality
    for change in ({"horizontal_flip": True}, {"vertical_flip": True}, {"quarter_turns": True}, {"rotate_deg": 90.0}):
        assert not Augment(**change).keeps_laterality  # type: ignore[arg-type]


def test_tissue_is_seen_from_all_eight_sides() -> None:
    augment = Augment(crop_scale=(1, 1), horizontal_flip=True, vertical_flip=True, quarter_turns=True)
    vary = Augmentation(augment, SMALL)
    image = film((48, 48))
    seen = {vary.picture(image, np.random.default_rng(seed)).tobytes() for seed in range(100)}
    sides = {np.ascontiguousarray(m).tobytes() for k in range(4) for r in (np.rot90(np.asarray(image), k),)
             for m in (r, r[:, ::-1])}  # fmt: skip
    assert seen == sides
    assert len(sides) == 8


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_a_crop_keeps_the_declared_share(seed: int) -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 256).astype(np.uint8), (256, 1)))
    vary = Augmentation(Augment(crop_scale=(0.36, 0.64)), Preprocess(size=100))
    row = np.asarray(vary.picture(ramp, np.random.default_rng(seed)), dtype=float)[50]
    kept = (row[-1] - row[0]) / 255
    assert 0.6 - 0.03 <= kept <= 0.8 + 0.03


def test_uncovered_corners_get_the_fill() -> None:
    augment = Augment(crop_scale=(1, 1), translate=0.2)
    for mode, expected in (("L", 9), ("RGB", (9, 9, 9))):
        vary = Augmentation(augment, Preprocess(size=48, fill=9))
        colours = set()
        for seed in range(10):
            picture = vary.picture(Image.new(mode, (60, 60), 200 if mode == "L" else (200, 200, 200)),
                                   np.random.default_rng(seed))  # fmt: skip
            colours |= {picture.getpixel(xy) for xy in ((0, 0), (47, 0), (0, 47), (47, 47))}
        assert expected in colours


def test_brightness_scales_and_contrast_keeps_the_mean() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(80, 160, (60, 60), dtype=np.uint8))
    mean = np.asarray(image).mean()
    brighter = Augmentation(Augment(crop_scale=(1, 1), brightness=0.3), Preprocess(size=60))
    harder = Augmentation(Augment(crop_scale=(1, 1), contrast=0.3), Preprocess(size=60))
    factors = []
    for seed in range(20):
        factors.append(np.asarray(brighter.picture(image, np.random.default_rng(seed))).mean() / mean)
        assert np.asarray(harder.picture(image, np.random.default_rng(seed))).mean() == pytest.approx(mean, abs=1)
    assert 0.69 < min(factors) < 0.85
    assert 1.15 < max(factors) < 1.31


def test_stain_leaves_white_and_moves_tissue() -> None:
    vary = Augmentation(Augment(crop_scale=(1, 1), stain=0.3), SMALL)
    white = Image.new("RGB", (60, 60), (255, 255, 255))
    for seed in range(10):
        assert vary.picture(white, np.random.default_rng(seed)).getextrema() == ((255, 255),) * 3
        moved = np.asarray(vary.picture(tissue(), np.random.default_rng(seed)), dtype=float)
        plain = np.asarray(Augmentation(Augment.preset("none"), SMALL).picture(tissue(), np.random.default_rng()))
        assert 0.5 < np.abs(moved - plain).mean() < 60


def test_stain_by_one_is_the_identity() -> None:
    from chiasm.data.augment import _restained

    pixels = np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3, indexing="ij"), -1).reshape(18, -1, 3).astype(np.uint8)
    assert np.array_equal(np.asarray(_restained(Image.fromarray(pixels), np.ones(3))), pixels)


def test_hue_turns_the_wheel_and_saturation_moves_from_grey() -> None:
    red = Image.new("RGB", (60, 60), (200, 60, 60))
    spread = []
    for seed in range(12):
        turned = Augmentation(Augment(crop_scale=(1, 1), hue=0.5), SMALL).picture(red, np.random.default_rng(seed))
        r, g, b = turned.getpixel((9, 9))  # type: ignore[misc]
        assert max(r, g, b) == pytest.approx(200, abs=3)
        spread.append((r, g, b))
        paler = Augmentation(Augment(crop_scale=(1, 1), saturation=0.5), SMALL)
        r, g, b = paler.picture(red, np.random.default_rng(seed)).getpixel((9, 9))  # type: ignore[misc]
        assert g == b
        assert 60 <= r - g <= 215
    assert len(set(spread)) > 6


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.8)}, "crop_scale"),
        ({"crop_scale": (0.9, 1.2)}, "crop_scale"),
        ({"brightness": -0.1}, "brightness"),
        ({"contrast": 1.5}, "contrast"),
        ({"hue": 0.6}, "hue"),
        ({"rotate_deg": 200.0}, "rotate_deg"),
        ({"noise": float("nan")}, "noise"),
        ({"blur": -1.0}, "blur"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"augment\.{field}"):
        Augment(**values)


def test_presets_by_name_and_from_recipes() -> None:
    with pytest.raises(UnknownName, match="did you mean `chest`"):
        Augment.preset("chst")
    for augment in (*PRESETS.values(), EVERYTHING):
        assert build(Augment, json.loads(json.dumps(augment.to_dict()))) == augment
    assert build(Augment, {"brightness": 0.2, "crop_scale": [0.8, 1.0]}) == Augment((0.8, 1.0), brightness=0.2)
