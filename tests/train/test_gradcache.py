"""GradCache gives the gradient of the whole batch; accumulation does not, and should not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.errors import ConfigError
from chiasm.train.contrastive import ContrastiveTask, Pairs, contrastive_loss
from chiasm.train.recipe import LossConfig, OptimConfig, TrainConfig
from chiasm.types import Preprocess


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(a, b):
    assert a.keys() == b.keys()
    scale = max(float(g.abs().max()) for g in b.values())
    return max(float((a[n] - b[n]).abs().max()) for n in b) / scale


def run(model, batch, chunk, loss, precision="fp32"):
    config = TrainConfig(loss=loss, optim=OptimConfig(grad_cache_chunk=chunk, precision=precision))
    value = ContrastiveTask(model, config=config).backward(batch)
    return value, gradients(model)


LOSSES = [
    LossConfig("infonce"), LossConfig("infonce", tile=3), LossConfig("siglip"), LossConfig("siglip", positives="none"),
    LossConfig("multi_positive"),
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES, ids=lambda c: f"{c.kind}-{c.positives}-{c.tile}")
@pytest.mark.parametrize("chunk", [1, 5, 12, 40])
def test_gradients_equal_the_full_batch(tiny, colour_pairs, loss, chunk):
    bias = -10.0 if loss.kind == "siglip" else None
    batch = colour_pairs(24).batch(np.arange(24), np.random.default_rng(0))
    full_value, full = run(tiny(bias=bias), batch, None, loss)
    value, cached = run(tiny(bias=bias), batch, chunk, loss)
    assert value == pytest.approx(full_value, rel=1e-5)
    assert worst(cached, full) < 1e-5


def test_dropout_is_replayed(tiny, colour_pairs):
    """The reference draws the same masks: chunks forward in the same order, kept in memory, one loss over all."""
    batch = colour_pairs(12).batch(np.arange(12), np.random.default_rng(0))
    torch.manual_seed(3)
    _, cached = run(tiny(dropout=0.5), batch, 4, LossConfig())
    drawn_after = torch.rand(4)
    model = tiny(dropout=0.5)
    torch.manual_seed(3)
    parts = [
        model(batch.pixels[i : i + 4], batch.tokens.ids[i : i + 4], batch.tokens.lengths[i : i + 4]) for i in (0, 4, 8)
    ]
    features = {k: torch.cat([p[k] for p in parts]) if parts[0][k].ndim else parts[0][k] for k in parts[0]}
    contrastive_loss(features, batch.keys, config=LossConfig()).backward()
    assert worst(cached, gradients(model)) < 1e-5
    assert torch.equal(torch.rand(4), drawn_after), "the generator must stand where one forward pass leaves it"
    torch.manual_seed(4)
    _, other = run(tiny(dropout=0.5), batch, 4, LossConfig())
    assert worst(other, gradients(model)) > 1e-3, "dropout must matter for this test to say anything"


def test_accumulation_is_not_gradcache(tiny, colour_pairs):
    batch = colour_pairs(24, kinds=24).batch(np.arange(24), np.random.default_rng(0))
    _, full = run(tiny(), batch, None, LossConfig())
    model = tiny()
    task = ContrastiveTask(model, config=TrainConfig())
    for i in (0, 12):
        ids, lengths = batch.tokens.ids[i : i + 12], batch.tokens.lengths[i : i + 12]
        task.backward(
            Pairs(batch.pixels[i : i + 12], type(batch.tokens)(ids, lengths), batch.keys[i : i + 12]), weight=0.5
        )
    assert worst(gradients(model), full) > 1e-2


def test_weight_scales_gradients(tiny, colour_pairs):
    batch = colour_pairs(8).batch(np.arange(8), np.random.default_rng(0))
    for chunk in (None, 3):
        config = TrainConfig(optim=OptimConfig(grad_cache_chunk=chunk))
        one, quarter = tiny(), tiny()
        ContrastiveTask(one, config=config).backward(batch)
        ContrastiveTask(quarter, config=config).backward(batch, weight=0.25)
        assert worst({n: g * 0.25 for n, g in gradients(one).items()}, gradients(quarter)) < 1e-6


def with_batch_statistics(kind, freeze):
    """A ResNet tower, or a ViT behind a projection that standardises."""
    small = {"image_size": 16, "heads": 2, "freeze": freeze}
    tower = (
        {"kind": "resnet", "width": 8, "layers": (1,)}
        if kind == "resnet"
        else {"patch_size": 8, "width": 16, "layers": 1}
    )
    config = EncoderConfig(
        ImageTowerConfig(**small, **tower), TextTowerConfig(context_length=4, vocab_size=64, width=16, layers=1, heads=2),
        ProjectionConfig(dim=8, standardize=() if kind == "resnet" else ("image",)),
        tokenizer={"kind": "clip", "context_length": 4}, preprocess=Preprocess(size=16),
    )  # fmt: skip
    return build_encoder_model(config, seed=0)


@pytest.mark.parametrize("kind", ["resnet", "standardize"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_batch_statistics_of_a_chunk_are_refused(colour_pairs, kind, chunk):
    """They are not those of the batch, and those of a chunk of one do not exist."""
    batch = colour_pairs(8).batch(np.arange(8), np.random.default_rng(0))
    model = with_batch_statistics(kind, freeze=kind == "standardize")
    with pytest.raises(ConfigError, match=f"`optim.grad_cache_chunk` is {chunk}, but `visual") as caught:
        run(model, batch, chunk, LossConfig())
    assert "hint: leave `grad_cache_chunk` out" in str(caught.value)
    assert not gradients(model)
    run(model, batch, 8, LossConfig())  # a chunk that is the batch changes nothing
    assert gradients(model)


def test_locked_batch_statistics_stand_still_and_may_be_chunked(colour_pairs):
    batch = colour_pairs(8).batch(np.arange(8), np.random.default_rng(0))
    _, full = run(with_batch_statistics("resnet", freeze=True), batch, None, LossConfig())
    _, cached = run(with_batch_statistics("resnet", freeze=True), batch, 3, LossConfig())
    assert worst(cached, full) < 1e-5


def test_bf16_stays_near_and_returns_float32(tiny, colour_pairs):
    batch = colour_pairs(24).batch(np.arange(24), np.random.default_rng(0))
    value, full = run(tiny(), batch, None, LossConfig())
    half_value, half = run(tiny(), batch, None, LossConfig(), precision="bf16")
    assert half_value == pytest.approx(value, rel=2e-2)
    assert 0 < worst(half, full) < 0.1
    assert all(g.dtype == torch.float32 for g in half.values())
    _, cached = run(tiny(), batch, 7, LossConfig(), precision="bf16")
    assert worst(cached, half) < 2e-2


def test_the_scale_is_clamped(tiny):
    model = tiny()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    task = ContrastiveTask(model, config=TrainConfig())
    task.after_step()
    assert task.metrics()["logit_scale"] == pytest.approx(100.0)


def test_features_that_are_not_finite_give_nan_and_no_gradient(tiny, colour_pairs):
    batch = colour_pairs(8).batch(np.arange(8), np.random.default_rng(0))
    batch.pixels[3] = torch.inf
    for chunk in (None, 3):
        value, found = run(tiny(), batch, chunk, LossConfig())
        assert np.isnan(value)
        assert not found
