"""Guidance: the loss is the product's own cosine, its gradient is right, following it works, and only for its text."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.encoders.face import Encoder
from chiasm.errors import InputError, UnknownName
from chiasm.testing import TinyEncoder, make_test_images
from chiasm.train.guidance import WHOLE, ClipGuidance, Cut, guidance_loss, optimise_pixels, variation_of


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return TinyEncoder(3)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None].float() / 255


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_whole_image_gives_one_less_the_products_cosine(kind: str) -> None:
    encoder = TinyEncoder(3, kind=kind)
    for image in make_test_images(3):
        guidance = ClipGuidance(encoder, "a chest film", cutouts=1)
        both = encoder.encode([image, "a chest film"], normalize_embeddings=True)
        # 2e-3: Pillow rounds to 8 bits between its steps; a wrong filter or crop misses by more than ten times that
        assert float(guidance(as_tensor(image))) == pytest.approx(1 - float(both[0] @ both[1]), abs=2e-3)
        assert float(guidance_loss(encoder, as_tensor(image), "a chest film", cutouts=1)) == pytest.approx(
            float(guidance(as_tensor(image))), abs=1e-6
        )


def test_at_the_models_own_size_the_parity_is_tight(encoder: Encoder) -> None:
    image = make_test_images(1)[0].resize((32, 32))
    both = encoder.encode([image, "x"], normalize_embeddings=True)
    found = float(ClipGuidance(encoder, "x", cutouts=1)(as_tensor(image)))
    assert found == pytest.approx(1 - float(both[0] @ both[1]), abs=2e-6)


def test_texts_weights_opposites_and_cutouts_by_hand(encoder: Encoder) -> None:
    pixels = random_pixels(2, 3, 40, 50)
    guidance = ClipGuidance(encoder, ["a", "b"], weights=[3, 1], against=["c", "d"], cutouts=4, noise=0.0)
    texts = encoder.encode_text(["a", "b", "c", "d"], normalize=True)
    cuts = [WHOLE, Cut(3, 5, 30)]
    expected = []
    for view in (pixels, pixels[:, :, 5:35, 3:33]):
        from chiasm.data.tensor_transforms import fit_tensor

        image = encoder.encode_image(fit_tensor(view, encoder.preprocess_spec), normalize=True)
        far = 1 - image @ texts.T
        expected.append(0.75 * far[:, 0] + 0.25 * far[:, 1] - far[:, 2:].mean(1))
    np.testing.assert_allclose(guidance.per_image(pixels, cuts=cuts), torch.stack(expected).mean(0), atol=1e-5)
    assert float(guidance(pixels, cuts=cuts)) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)
    spherical = ClipGuidance(encoder, "a", cutouts=1, distance="spherical")
    cosine = spherical.cosines(pixels)[:, 0]
    np.testing.assert_allclose(spherical.per_image(pixels), 0.5 * torch.arccos(cosine) ** 2, atol=1e-3)


@pytest.mark.parametrize("distance", ["cosine", "spherical"])
def test_the_gradient_is_that_of_finite_differences(distance: str) -> None:
    encoder = TinyEncoder(1)
    encoder.model.double()
    guidance = ClipGuidance(encoder, ["a", "b"], against=["c"], noise=0.0, distance=distance)  # type: ignore[arg-type]
    pixels = (random_pixels(1, 3, 5, 4).double() * 0.6 + 0.2).requires_grad_()
    cuts = [WHOLE, Cut(0, 1, 3)]
    assert torch.autograd.gradcheck(lambda x: guidance(x, cuts=cuts), (pixels,), eps=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 90), st.integers(4, 90), st.floats(0.05, 1.0))
def test_cutouts_lie_in_the_image(height: int, width: int, smallest: float) -> None:
    guidance = CUTTER
    guidance.smallest = smallest
    cuts = guidance.draw(height, width)
    assert cuts[0] == WHOLE
    for cut in cuts[1:]:
        assert cut.side_px >= smallest * min(height, width) - 1e-9
        assert 0 <= cut.x_px <= width - cut.side_px
        assert 0 <= cut.y_px <= height - cut.side_px


CUTTER = ClipGuidance(TinyEncoder(), "x", cutouts=6)


def test_the_encoder_is_left_alone_and_seeds_hold(encoder: Encoder) -> None:
    space = encoder.space
    pixels = random_pixels(1, 3, 48, 48).requires_grad_()
    losses = []
    for seed in (0, 0, 1):
        loss = ClipGuidance(encoder, "x", cutouts=5, seed=seed)(pixels)
        loss.backward()  # the careless way
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1] != losses[2]
    assert pixels.grad is not None
    assert float(pixels.grad.abs().max()) > 0
    assert all(p.grad is None for p in encoder.model.parameters())
    assert all(p.requires_grad for p in encoder.model.image_side().parameters())
    assert encoder.space == space
    with torch.inference_mode():
        assert float(ClipGuidance(encoder, "x", cutouts=1)(pixels.detach())) > 0


def test_following_works_and_for_its_own_text_only(encoder: Encoder) -> None:
    """Each of two images is nearer to the text that guided it than the other image is, and than it was."""
    texts = ["large left pleural effusion", "normal heart"]
    start = random_pixels(1, 3, 32, 32, seed=5) * 0.2 + 0.4
    made = {}
    for text, other in (texts, texts[::-1]):
        guidance = ClipGuidance(encoder, text, cutouts=3, seed=1)
        made[text] = optimise_pixels(
            guidance, start, steps=40, lr=0.03, total_variation=0.1, controls=[other], frames=4
        )
    for text, other in (texts, texts[::-1]):
        found = made[text]
        assert found.losses[-1] < found.losses[0]
        assert found.gain(text) > 0.1
        assert found.cosines[-1][0] > made[other].cosines[-1][1] + 0.05  # the same text, the other image
        assert [step for step, _ in found.frames] == [0, 10, 20, 30, 40]
        assert 0 <= float(found.pixels.min()) <= float(found.pixels.max()) <= 1
    json.dumps(found.to_dict(), allow_nan=False)


def test_staying_near_and_grey(encoder: Encoder) -> None:
    start = random_pixels(1, 3, 32, 32)
    guidance = ClipGuidance(encoder, "x", cutouts=2)
    free = optimise_pixels(guidance, start, steps=15, frames=1, total_variation=0)
    near = optimise_pixels(guidance, start, steps=15, frames=1, total_variation=0, stay=50)
    assert float((near.pixels - start).square().mean()) < 0.5 * float((free.pixels - start).square().mean())
    grey = optimise_pixels(guidance, start, steps=3, frames=1, grey=True)
    assert torch.equal(grey.pixels[:, 0], grey.pixels[:, 2])
    assert float(variation_of(torch.full((1, 3, 4, 4), 0.3))) == 0


def test_refusals(encoder: Encoder) -> None:
    for options in ({"weights": [1, 2]}, {"weights": [0.0]}, {"cutouts": 0}, {"smallest": 0}, {"noise": -1}):
        with pytest.raises(InputError):
            ClipGuidance(encoder, "x", **options)  # type: ignore[arg-type]
    for texts in ([], " ", ["a", ""]):
        with pytest.raises(InputError, match="empty"):
            ClipGuidance(encoder, texts)
    with pytest.raises(UnknownName):
        ClipGuidance(encoder, "x", distance="euclid")  # type: ignore[arg-type]
    guidance = ClipGuidance(encoder, "x", cutouts=1)
    with pytest.raises(InputError, match="batch, 3"):
        guidance(torch.zeros(3, 9, 9))
    with pytest.raises(InputError, match="at least one cutout"):
        guidance(torch.zeros(1, 3, 9, 9), cuts=[])
    with pytest.raises(InputError, match="in \\[0, 1\\]"):
        optimise_pixels(guidance, torch.full((1, 3, 9, 9), 2.0))
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}, {"stay": -1.0}, {"frames": 0}):
        with pytest.raises(InputError, match="steps"):
            optimise_pixels(guidance, torch.zeros(1, 3, 9, 9), **wrong)  # type: ignore[arg-type]
