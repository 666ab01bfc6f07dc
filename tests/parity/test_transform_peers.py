"""Our transforms against open_clip's and transformers' own, bit for bit, on every mode. Runs in .venv-peers only."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.data.transforms import image_transform
from chiasm.io.image import open_image
from chiasm.types import Preprocess

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("default"),  # the peers warn about their own dependencies
]
open_clip = pytest.importorskip("open_clip", reason="needs the environment made by `make peers`")

MODES = ("L", "RGB", "RGBA", "P", "1", "CMYK", "LA", "PA", "YCbCr", "HSV")
SIZES = (
    (64, 64),
    (224, 224),
    (225, 224),
    (227, 224),
    (229, 224),
    (231, 300),
    (37, 61),
    (480, 640),
    (641, 97),
    (1024, 768),
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def picture(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A smooth picture with noise and a hole of transparency, in any mode."""
    draw = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    planes = [127 + 120 * np.sin(7 * x + 5 * c) * np.cos(5 * y + c) for c in range(3)]
    noise = draw.integers(-20, 20, (height, width, 3))
    rgb = np.clip(np.stack(planes, -1) + noise, 0, 255).astype(np.uint8)
    alpha = (255 * (np.hypot(x - 0.3, y - 0.3) > 0.2)).astype(np.uint8)
    image = Image.fromarray(np.dstack([rgb, alpha]))
    if mode == "P":
        return image.convert("RGB").quantize(60)
    if mode == "PA":
        return image.convert("RGB").quantize(60).convert("PA")
    return image.convert(mode) if mode in ("RGBA", "LA") else image.convert("RGB").convert(mode)


def peer(p: Preprocess) -> object:
    from open_clip.transform import image_transform as theirs

    mode = {"longest_pad": "longest"}.get(p.resize, p.resize)
    options = {"mean": p.mean, "std": p.std, "interpolation": p.interpolation, "fill_color": p.fill}
    return theirs(p.size, is_train=False, resize_mode=mode, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest_pad"])
def test_bit_equal_to_open_clip(mode: str, resize: str) -> None:
    for size in SIZES:
        for fill in (0, 40) if resize == "longest_pad" else (0,):
            p = Preprocess(resize=resize, fill=fill)  # type: ignore[arg-type]
            image = picture(mode, size)
            assert torch.equal(image_transform(p)(image), peer(p)(image)), (size, fill)  # type: ignore[operator]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, 63, 336])
def test_bit_equal_to_open_clip_with_other_filters_sizes_and_means(interpolation: str, size: int) -> None:
    p = Preprocess(size=size, interpolation=interpolation, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))  # type: ignore[arg-type]
    for shape in SIZES:
        image = picture("RGB", shape, seed=size)
        assert torch.equal(image_transform(p)(image), peer(p)(image)), shape  # type: ignore[operator]


def test_bit_equal_on_random_shapes() -> None:
    draw = np.random.default_rng(3)
    for i in range(40):
        shape = (int(draw.integers(1, 500)), int(draw.integers(1, 500)))
        if max(shape) > 40 * min(shape):
            continue
        for p in (Preprocess(size=96), Preprocess(size=97)):
            image = picture("L" if i % 2 else "RGB", shape, seed=i)
            assert torch.equal(image_transform(p)(image), peer(p)(image)), shape  # type: ignore[operator]


@pytest.mark.parametrize("mode", MODES)
def test_bit_equal_to_transformers(mode: str) -> None:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil()
    ours = image_transform(Preprocess(rgb="before_resize"))
    for size in SIZES:
        image = picture(mode, size)
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(ours(image), theirs), size


def test_bit_equal_to_transformers_with_transparency_in_a_palette_and_in_grey() -> None:
    from transformers import CLIPImageProcessorPil

    for mode in ("P", "L"):
        image = picture(mode, (300, 260))
        stream = io.BytesIO()
        image.save(stream, "PNG", transparency=7 if mode == "P" else 128)
        image = open_image(stream.getvalue())
        assert image.info["transparency"] is not None
        theirs = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(image_transform(Preprocess(rgb="before_resize"))(image), theirs)
        plain = Preprocess()
        assert torch.equal(image_transform(plain)(image), peer(plain)(image))  # type: ignore[operator]


def test_squash_is_bit_equal_to_the_vit_processor_of_transformers() -> None:
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 224, "width": 224})
    half = (0.5, 0.5, 0.5)
    p = Preprocess(resize="squash", interpolation="bilinear", rgb="before_resize", mean=half, std=half)
    for size in SIZES:
        image = picture("RGB", size)
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(image_transform(p)(image), theirs)


@pytest.mark.parametrize(
    ("change", "mode", "size"),
    [
        ({"rgb": "before_resize"}, "P", (480, 640)),
        ({"rgb": "before_resize"}, "1", (480, 640)),
        ({"rgb": "before_resize"}, "RGBA", (480, 640)),
        ({"rgb": "before_resize"}, "RGB", (227, 224)),  # the one-pixel difference of the crops
        ({"interpolation": "bilinear"}, "L", (480, 640)),
        ({"resize": "squash"}, "L", (480, 640)),
        ({"resize": "longest_pad"}, "L", (480, 640)),
        ({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, "L", (480, 640)),
    ],
)
def test_a_wrong_declaration_shows(change: dict[str, object], mode: str, size: tuple[int, int]) -> None:
    image = picture(mode, size)
    theirs = peer(Preprocess())(image)  # type: ignore[operator]
    wrong = image_transform(Preprocess(**change))(image)  # type: ignore[arg-type]
    assert float((wrong - theirs).abs().max()) > 0.02


def test_real_files_are_bit_equal(request: pytest.FixtureRequest) -> None:
    import os
    from pathlib import Path

    root = Path(os.environ.get("CHIASM_DATA", ""))
    if not os.environ.get("CHIASM_DATA") or not root.is_dir():
        pytest.skip("CHIASM_DATA names no folder of real images")
    for name in ("medpix2", "covid_chestxray", "pneumonia_cxr", "pcam_subset"):
        for path in sorted((root / name / "images").rglob("*.*"))[:15]:
            image = open_image(path)
            assert torch.equal(image_transform(Preprocess())(image), peer(Preprocess())(Image.open(path))), name  # type: ignore[operator]
