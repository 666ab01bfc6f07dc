"""Gradients against float64, at the logit scales where training lives: the numbers of the performance page, 3.5."""

from __future__ import annotations

import math

import pytest
import torch

from chiasm.losses.contrastive import info_nce, multi_positive_info_nce, siglip

SCALES = (14.28, 30.0, 50.0, 100.0)
TILES = (64, None, "auto")


def relative(gradient, truth):
    return ((gradient - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dim", [128, 512])
def test_random_pairs(plain, make_pairs, differentiate, scale, tile, dim):
    image, text = make_pairs(512, dim)
    truth = differentiate(plain.info_nce, image.double(), text.double(), scale)
    peer = differentiate(plain.info_nce, image, text, scale)
    ours = differentiate(lambda i, t, s: info_nce(i, t, s, tile=tile), image, text, scale)
    error = relative(ours.features, truth.features)
    assert error <= 1e-6
    # Both round the same logits, so at 100 they agree within a tenth; below, ours is several times closer.
    assert error <= 1.1 * relative(peer.features, truth.features)
    assert ours.loss == pytest.approx(truth.loss, rel=2e-7)
    assert ours.scale == pytest.approx(truth.scale, rel=1e-6)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_nearly_solved_batches(plain, make_pairs, differentiate, scale, noise, tile):
    """The true gradient vanishes; cross-entropy on float32 logits returns noise, or nothing."""
    image, text = make_pairs(512, 128, noise=noise)
    # Float64 cross-entropy fails here as well (1 − p below 1e-16), so the truth is the log-space form in float64.
    truth = differentiate(lambda i, t, s: info_nce(i, t, s, tile=None), image.double(), text.double(), scale)
    peer = differentiate(plain.info_nce, image, text, scale)
    ours = differentiate(lambda i, t, s: info_nce(i, t, s, tile=tile), image, text, scale)
    error = relative(ours.features, truth.features)
    assert error <= (1e-5 if scale <= 50 else 1e-3)
    assert error <= relative(peer.features, truth.features)
    assert ours.loss == pytest.approx(truth.loss, rel=1e-4)
    assert ours.scale == pytest.approx(truth.scale, rel=1e-4)


def test_log_space_form_is_the_plain_one_in_float64(plain, make_pairs, differentiate):
    """Ties the truth of the test above to the plain formula, where float64 still carries it."""
    image, text = make_pairs(256, 64, noise=0.5, dtype=torch.float64)
    truth = differentiate(plain.info_nce, image, text, 14.28)
    ours = differentiate(info_nce, image, text, 14.28)
    assert 1e-4 < truth.loss < 1e-1
    assert ours.loss == pytest.approx(truth.loss, rel=1e-12)
    assert relative(ours.features, truth.features) < 1e-11


def test_loss_of_a_solved_batch_is_not_rounded_to_zero(plain, make_pairs, differentiate):
    image, text = make_pairs(512, 128, noise=0.5)
    assert differentiate(plain.info_nce, image, text, 100.0).loss == 0.0
    ours = differentiate(info_nce, image, text, 100.0)
    assert 0.0 < ours.loss < 1e-20


def test_worst_case_at_the_clamp_is_finite(make_pairs, differentiate):
    """Every pair opposite, every other text aligned: the logits of a row span 200."""
    image, _ = make_pairs(64, 16)
    ours = differentiate(lambda i, t, s: info_nce(i, t, s, tile=16), image, -image, 100.0)
    assert torch.isfinite(ours.features).all()
    assert 100 < ours.loss <= 205
    same = image[:1].expand(64, -1).contiguous()
    assert differentiate(info_nce, same, same, 100.0).loss == pytest.approx(math.log(64), rel=1e-5)


def test_fixed_shift_would_fail():
    """Negative test: one exponential with the upper bound of the logits as its shift underflows at the clamp."""
    image = torch.eye(2)
    text = torch.tensor([[-0.6, -0.8], [-0.8, -0.6]])
    others = (100 * image @ text.T).fill_diagonal_(-torch.inf)
    shifted = torch.exp(others - 100).sum(1).log() + 100
    assert not torch.isfinite(shifted).all()
    # The pair has cosine -0.6, the other -0.8: softplus(-20) in both directions.
    assert info_nce(image, text, 100.0).item() == pytest.approx(2.0611536e-9, rel=1e-5)


@pytest.mark.parametrize("tile", [64, None])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -10.0), (100.0, -50.0)])
@pytest.mark.parametrize("noise", [None, 0.3])
def test_siglip(plain, make_pairs, differentiate, scale, bias, noise, tile):
    image, text = make_pairs(384, 128, noise=noise)

    def peer(i, t, s):
        return plain.siglip(i, t, s, torch.tensor(bias, dtype=i.dtype))

    truth = differentiate(peer, image.double(), text.double(), scale)
    theirs = differentiate(peer, image, text, scale)
    ours = differentiate(lambda i, t, s: siglip(i, t, s, bias, tile=tile), image, text, scale)
    error = relative(ours.features, truth.features)
    assert error <= 1e-5
    # 1.2e-7 is one rounding of float32, which decides where hardly any logit matters.
    assert error <= max(1.1 * relative(theirs.features, truth.features), 1.2e-7)
    assert ours.loss == pytest.approx(truth.loss, rel=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_duplicate_captions_keep_their_digits(plain, make_pairs, differentiate, scale):
    """Pairs with identical texts: at the optimum softmax − target is a difference of equal numbers."""
    image, text = make_pairs(256, 128, noise=0.3)
    image, text = image.repeat(2, 1), text.repeat(2, 1)
    keys = torch.arange(256).repeat(2)

    def ours(tile):
        return lambda i, t, s: multi_positive_info_nce(i, t, s, keys, tile=tile)

    def peer(i, t, s):
        return plain.soft(i, t, s, (keys.unsqueeze(1) == keys).to(i.dtype))

    truth = differentiate(ours(None), image.double(), text.double(), scale)
    error = relative(differentiate(ours(100), image, text, scale).features, truth.features)
    assert error <= 1e-4
    assert error <= relative(differentiate(peer, image, text, scale).features, truth.features)
