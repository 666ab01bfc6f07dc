"""Tensors fitted as Pillow images are: near the reference for every declaration, with right gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from chiasm.data.tensor_transforms import fit_tensor
from chiasm.data.transforms import image_transform
from chiasm.errors import InputError
from chiasm.types import Preprocess

SPECS = {
    "clip": Preprocess(size=32),
    "bilinear": Preprocess(size=32, interpolation="bilinear"),
    "squash": Preprocess(size=32, resize="squash", crop="none"),
    "pad": Preprocess(size=32, resize="longest_pad", crop="none", fill=40),
    "pad_square": Preprocess(size=32, resize="pad_square", crop="none"),
    "siglip": Preprocess(size=32, resize="squash", crop="none", mean=(0.5,) * 3, std=(0.5,) * 3),
    "grey": Preprocess(size=32, grey=True),
    "cut": Preprocess(size=32, cut_bottom=0.2),
    "biovil": Preprocess(size=32, resize_size=40, stretch="min_max", grey=True, interpolation="bilinear"),
    "chexzero": Preprocess(
        size=32,
        resize="longest_pad",
        crop="none",
        resize_size=48,
        second_resize="bicubic_tensor",
        side_rounding="both_down",
    ),
}


def smooth(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("sides", [(64, 64), (90, 61), (57, 80)])
def test_it_is_near_the_reference(name: str, sides: tuple[int, int]) -> None:
    spec, image = SPECS[name], smooth(*sides)
    expected = image_transform(spec)(image)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    found = fit_tensor(pixels, spec)[0]
    assert found.shape == expected.shape
    grey_values = (found - expected) * torch.tensor(spec.std)[:, None, None] * 255
    # a stretched image takes the rounding of its range along
    assert float(grey_values.abs().max()) < (6.0 if spec.stretch else 2.0), name


def test_gradients_are_right() -> None:
    spec = Preprocess(size=4, grey=True)
    pixels = torch.rand(1, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    assert torch.autograd.gradcheck(lambda x: fit_tensor(x, spec), (pixels.requires_grad_(),))


def test_refusals() -> None:
    with pytest.raises(InputError, match="batch, 3"):
        fit_tensor(torch.zeros(3, 8, 8), Preprocess())
    with pytest.raises(InputError, match="divide bytes"):
        fit_tensor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), Preprocess())
