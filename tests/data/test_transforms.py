"""The declared preprocessing against a plain rewriting of the peers' rules, and against transformers itself."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.data.transforms import image_transform, resize_and_crop
from chiasm.errors import ConfigError, InputError
from chiasm.types import Preprocess

MODES = ("L", "RGB", "RGBA", "P", "1", "CMYK", "LA")
SHAPES = ((224, 224), (227, 224), (229, 231), (37, 61), (320, 240), (300, 96))


def picture(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    waves = np.stack([127 + 100 * np.sin(9 * x + 5 * c) * np.cos(7 * y + c) for c in range(3)], -1)
    rgb = np.clip(waves + draw.integers(-20, 20, (height, width, 3)), 0, 255).astype(np.uint8)
    alpha = (255 * (np.hypot(x - 0.3, y - 0.3) > 0.2)).astype(np.uint8)
    if mode in ("RGBA", "LA"):
        return Image.fromarray(np.dstack([rgb, alpha])).convert(mode)
    return Image.fromarray(rgb).quantize(40) if mode == "P" else Image.fromarray(rgb).convert(mode)


def as_open_clip(image: Image.Image, p: Preprocess) -> torch.Tensor:
    """What torchvision's Resize, CenterCrop, ToTensor and Normalize do with a Pillow image, written out."""
    width, height = image.size
    if width <= height:
        image = image.resize((p.size, int(p.size * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(p.size * width / height), p.size), Image.Resampling.BICUBIC)
    left, top = round((image.width - p.size) / 2.0), round((image.height - p.size) / 2.0)
    pixels = np.array(image.crop((left, top, left + p.size, top + p.size)).convert("RGB"))
    unit = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255)
    return unit.sub(torch.tensor(p.mean).view(3, 1, 1)).div(torch.tensor(p.std).view(3, 1, 1))


@pytest.mark.parametrize("mode", MODES)
def test_bit_equal_to_the_rules_of_open_clip(mode: str) -> None:
    p = Preprocess(size=112)
    for size in SHAPES:
        image = picture(mode, size)
        result = image_transform(p)(image)
        assert result.dtype == torch.float32
        assert torch.equal(result, as_open_clip(image, p)), size


@pytest.mark.parametrize("mode", MODES)
def test_bit_equal_to_transformers(mode: str) -> None:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    transform = image_transform(Preprocess(size=112, rgb="before_resize"))
    for size in SHAPES:
        image = picture(mode, size)
        assert torch.equal(transform(image), processor(image, return_tensors="pt")["pixel_values"][0]), size


@pytest.mark.parametrize(
    ("rgb", "offsets"),
    [("after_resize", {224: 0, 225: 0, 226: 1, 227: 2, 229: 2, 231: 4}), ("before_resize", {225: 0, 227: 1, 231: 3})],
)
def test_the_centre_crop_starts_where_the_peer_starts_it(rgb: Any, offsets: dict[int, int]) -> None:
    for width, offset in offsets.items():
        columns = Image.fromarray(np.tile(np.arange(width, dtype=np.uint8), (224, 1)))
        cropped = np.asarray(resize_and_crop(columns, Preprocess(rgb=rgb)))
        assert cropped[0, 0, 0] == offset, width
        assert cropped[0, -1, 0] == offset + 223, width


def test_the_rounding_of_crops_can_be_stated_apart() -> None:
    """A processor of transformers that does not convert to RGB still rounds as transformers does."""
    from transformers import CLIPImageProcessorPil

    sides = {"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}}
    processor = CLIPImageProcessorPil(do_convert_rgb=False, **sides)
    down, even = Preprocess(size=112, crop_rounding="down"), Preprocess(size=112)
    image = picture("RGB", (115, 112))
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(image_transform(down)(image), theirs)
    assert not torch.equal(image_transform(even)(image), theirs)
    for stated, rgb in (("down", "before_resize"), ("even", "after_resize")):
        natural, apart = Preprocess(rgb=rgb), Preprocess(rgb=rgb, crop_rounding=stated)  # type: ignore[arg-type]
        assert [natural.crop_offset(m) for m in range(9)] == [apart.crop_offset(m) for m in range(9)]


@pytest.mark.parametrize("mode", ["P", "1", "RGBA"])
def test_the_order_of_conversion_matters(mode: str) -> None:
    image = picture(mode, (320, 240))
    after = image_transform(Preprocess())(image)
    before = image_transform(Preprocess(rgb="before_resize"))(image)
    assert float((after - before).abs().max()) > 0.02


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.integers(1, 40),
    st.sampled_from(MODES),
    st.sampled_from(["shortest", "squash", "longest_pad"]),
    st.sampled_from(["after_resize", "before_resize"]),
)
@settings(max_examples=120, deadline=None)
def test_every_image_becomes_a_square_of_the_declared_size(
    shape: tuple[int, int], size: int, mode: str, resize: Any, rgb: Any
) -> None:
    p = Preprocess(size=size, resize=resize, rgb=rgb)
    image = picture(mode, shape)
    before = image.tobytes()
    result = image_transform(p)(image)
    assert result.shape == (3, size, size)
    assert torch.isfinite(result).all()
    assert image.tobytes() == before, "the transform changed its input"
    seen = resize_and_crop(image, p)
    assert (seen.mode, seen.size) == ("RGB", (size, size))
    assert torch.equal(image_transform(p).normalize(seen), result)


@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), st.sampled_from(["shortest", "squash", "longest_pad"]))
@settings(max_examples=40, deadline=None)
def test_grey_is_the_same_in_one_channel_and_in_three(shape: tuple[int, int], resize: Any) -> None:
    p = Preprocess(size=24, resize=resize)
    grey = picture("L", shape)
    assert torch.equal(image_transform(p)(grey), image_transform(p)(grey.convert("RGB")))


def test_values_follow_mean_and_std() -> None:
    p = Preprocess(size=2, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    result = image_transform(p)(Image.new("RGB", (5, 5), (255, 0, 51)))
    assert torch.allclose(result[:, 0, 0], torch.tensor([1.0, -1.0, 0.2]))


def test_padding_is_centred_and_has_the_declared_grey() -> None:
    p = Preprocess(size=10, resize="longest_pad", fill=77)
    seen = np.asarray(resize_and_crop(Image.new("L", (100, 50), 200), p))[..., 0]
    assert (seen[:2] == 77).all()
    assert (seen[2:7] == 200).all()
    assert (seen[7:] == 77).all()
    palette = Image.new("P", (100, 50), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    assert resize_and_crop(palette, Preprocess(size=10, resize="longest_pad")).getpixel((0, 0)) == (9, 9, 9)
    assert resize_and_crop(palette, Preprocess(size=10, resize="longest_pad")).getpixel((5, 5)) == (200, 100, 50)


def test_transparency_of_a_palette_raises_no_warning() -> None:
    image = picture("P", (50, 40))
    image.info["transparency"] = bytes(range(40))
    image_transform(Preprocess(size=32))(image)
    assert "transparency" in image.info
    on_white = image_transform(Preprocess(size=32, rgb="before_resize"))(image)
    assert not torch.equal(on_white, image_transform(Preprocess(size=32))(image))


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_deep_greyscale_is_refused_because_it_would_be_clipped(mode: str) -> None:
    with pytest.raises(InputError, match="more than 8 bits") as caught:
        image_transform(Preprocess())(Image.new(mode, (8, 8)))
    assert "open_image" in str(caught.value.hint)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(InputError, match="expected a Pillow image, got ndarray"):
        image_transform(Preprocess())(np.zeros((8, 8), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="mode La cannot be converted"):
        image_transform(Preprocess(size=8))(Image.new("La", (8, 8)))


def test_a_thin_strip_does_not_eat_the_memory() -> None:
    strip = Image.new("L", (1, 60_000))
    with pytest.raises(InputError, match="a strip of 1 × 60000 pixels would become"):
        image_transform(Preprocess())(strip)
    assert image_transform(Preprocess(resize="longest_pad"))(strip).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": "stretch"}, "preprocess.resize"),
        ({"interpolation": "cubic"}, "preprocess.interpolation"),
        ({"rgb": "never"}, "preprocess.rgb"),
        ({"crop_rounding": "up"}, "preprocess.crop_rounding"),
        ({"crop": "none"}, "not square"),
        ({"size": 0}, "preprocess.size"),
        ({"std": (0.2, 0.0, 0.2)}, "preprocess.std"),
        ({"mean": (0.5,)}, "preprocess.mean"),
        ({"fill": 300}, "preprocess.fill"),
        ({"cut_bottom": 1.0}, "preprocess.cut_bottom"),
        ({"cut_bottom": -0.1}, "preprocess.cut_bottom"),
        ({"resize_size": 200}, "preprocess.resize_size"),
        ({"resize_size": 256, "resize": "squash", "crop": "none"}, "leaves 256 pixels where 224 are wanted"),
        ({"second_resize": "bicubic_tensor"}, "needs the side to resize from"),
        ({"second_resize": "bicubic", "resize_size": 320}, "preprocess.second_resize"),
        ({"side_rounding": "both_down"}, "goes with resize"),
        ({"side_rounding": "down"}, "preprocess.side_rounding"),
        ({"stretch": "percentiles"}, "preprocess.stretch"),
    ],
)
def test_contradictory_declarations_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        image_transform(Preprocess(**values))


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest_pad"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_cut_off_below_cannot_be_seen(resize: Any, mode: str) -> None:
    crop: Any = "center" if resize == "shortest" else "none"
    plain = Preprocess(size=32, resize=resize, crop=crop)
    cutting = Preprocess(size=32, resize=resize, crop=crop, cut_bottom=0.1)
    image = picture(mode, (90, 100))
    marked = image.copy()
    marked.paste(0, (0, 90, 90, 100)) if mode in ("L", "P", "1") else marked.paste((9,) * len(mode), (0, 90, 90, 100))
    result = image_transform(cutting)(image)
    assert torch.equal(result, image_transform(cutting)(marked))
    assert torch.equal(result, image_transform(plain)(image.crop((0, 0, 90, 90))))
    assert not torch.equal(result, image_transform(plain)(image))
    assert image.size == (90, 100), "the caller's image stays whole"
    assert Preprocess(cut_bottom=0.999).kept_height(3) == 1
    assert cutting.digest != plain.digest


def test_threads_share_one_transform() -> None:
    transform = image_transform(Preprocess(size=64))
    images = [picture("RGB", (90, 70 + i), seed=i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(transform, images))
    assert all(torch.equal(a, transform(image)) for a, image in zip(together, images, strict=True))


def test_modules_are_light() -> None:
    code = "import sys, chiasm.data.transforms, chiasm.data.augment, chiasm.io.image; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
