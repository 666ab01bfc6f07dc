from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.data.augment import Augment
from chiasm.data.transforms import image_transform
from chiasm.train.augmentation import BatchTransform, _grid, augment_batch
from chiasm.types import Preprocess

STILL = Augment.preset("none")


def pictures(n, size=32, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, size, size, 3) if channels == 3 else (n, size, size)
    return rng.integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_augmentation_it_equals_the_reference_bit_for_bit(channels):
    preprocess = Preprocess(size=32)
    images = pictures(4, channels=channels)
    reference = torch.stack([image_transform(preprocess)(Image.fromarray(i)) for i in images])
    rng = np.random.default_rng(0)
    for augment in (None, STILL, Augment.preset("chest")):
        assert torch.equal(BatchTransform(preprocess, augment)(images), reference)
    assert torch.equal(BatchTransform(preprocess, STILL)(images, rng), reference)
    assert not torch.equal(BatchTransform(preprocess, Augment.preset("chest"))(images, rng), reference)


def test_a_second_resize_is_done_after_the_normalisation():
    preprocess = Preprocess(
        size=32, resize="longest_pad", resize_size=48, second_resize="bicubic_tensor", rgb="before_resize"
    )
    images = pictures(3, size=48)
    reference = torch.stack([image_transform(preprocess)(Image.fromarray(i)) for i in images])
    assert torch.equal(BatchTransform(preprocess)(images), reference)
    assert reference.shape == (3, 3, 32, 32)


fields = st.fixed_dictionaries(
    {
        "crop_scale": st.tuples(st.floats(0.2, 1), st.just(1.0)), "rotate_deg": st.floats(0, 180),
        "translate": st.floats(0, 0.5), "brightness": st.floats(0, 1), "contrast": st.floats(0, 1),
        "saturation": st.floats(0, 1), "hue": st.floats(0, 0.5), "stain": st.floats(0, 1),
        "horizontal_flip": st.booleans(), "vertical_flip": st.booleans(), "quarter_turns": st.booleans(),
        "blur": st.floats(0, 3), "noise": st.floats(0, 0.5),
    }
)  # fmt: skip


@given(values=fields, seed=st.integers(0, 99), channels=st.sampled_from([1, 3]), n=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_any_strength_gives_finite_images_decided_by_the_generator(values, seed, channels, n):
    images = torch.from_numpy(pictures(n, 16, channels)).float() / 255
    images = images.unsqueeze(1) if channels == 1 else images.permute(0, 3, 1, 2)
    augment = Augment(**values)
    first = augment_batch(images, augment, np.random.default_rng(seed))
    assert first.shape == images.shape
    assert torch.isfinite(first).all()
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, augment_batch(images, augment, np.random.default_rng(seed)))


def corner(size=16):
    image = torch.zeros(1, 1, size, size)
    image[..., 2:5, 2:5] = 1
    return image


def quadrant(image):
    where = image[0, 0].nonzero().float().mean(0)
    return tuple(bool(v > 8) for v in where)


def test_flips_and_turns_move_what_they_should():
    flips = Augment(crop_scale=(1.0, 1.0), horizontal_flip=True)
    seen = {quadrant(augment_batch(corner(), flips, np.random.default_rng(s))) for s in range(20)}
    assert seen == {(False, False), (False, True)}
    flips = Augment(crop_scale=(1.0, 1.0), vertical_flip=True)
    assert {quadrant(augment_batch(corner(), flips, np.random.default_rng(s))) for s in range(20)} == {
        (False, False),
        (True, False),
    }
    turns = Augment(crop_scale=(1.0, 1.0), quarter_turns=True)
    turned = [augment_batch(corner(), turns, np.random.default_rng(s)) for s in range(30)]
    assert {quadrant(t) for t in turned} == {(a, b) for a in (False, True) for b in (False, True)}
    assert all(abs(float(t.sum()) - 9) < 1e-3 for t in turned), "a quarter turn moves pixels, it does not blend them"


@pytest.mark.parametrize("name", ["chest", "ct-mr"])
def test_presets_of_bodies_never_swap_sides(name):
    image = torch.zeros(1, 1, 64, 64)
    image[..., 24:40, 8:20] = 1
    for seed in range(30):
        changed = augment_batch(image, Augment.preset(name), np.random.default_rng(seed))
        assert changed[..., :32].sum() > 5 * changed[..., 32:].sum()


def test_white_stays_white_under_stain_and_grey_under_colour():
    white = torch.ones(2, 3, 8, 8)
    stain = Augment(crop_scale=(1.0, 1.0), stain=0.5)
    assert torch.allclose(augment_batch(white, stain, np.random.default_rng(0)), white, atol=1e-5)
    grey = torch.full((2, 3, 8, 8), 0.4)
    colour = Augment(crop_scale=(1.0, 1.0), saturation=0.8, hue=0.5)
    assert torch.allclose(augment_batch(grey, colour, np.random.default_rng(0)), grey, atol=1e-5)
    pink = torch.tensor([0.9, 0.5, 0.7]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    for augment in (stain, colour):
        changed = augment_batch(pink, augment, np.random.default_rng(0))
        assert (changed - pink).abs().max() > 0.02
        assert (changed[0] - changed[1]).abs().max() > 0.01, "each image draws its own"


def test_uncovered_corners_get_the_fill():
    image = torch.ones(4, 1, 32, 32)
    turned = augment_batch(image, Augment(crop_scale=(1.0, 1.0), rotate_deg=45.0), np.random.default_rng(1), fill=0.25)
    assert torch.allclose(turned.min(), torch.tensor(0.25), atol=1e-4)
    assert torch.allclose(turned[..., 12:20, 12:20], torch.ones(4, 1, 8, 8), atol=1e-5)


def test_the_grid_is_torchs_own():
    affine = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.affine_grid(affine, [3, 1, 9, 9], align_corners=False)
    assert torch.allclose(_grid(affine, 9), expected, atol=1e-5)
