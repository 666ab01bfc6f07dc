from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from chiasm.data.tokenizers import ClipTokenizer
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, LoraConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.errors import TrainingError
from chiasm.train.contrastive import ContrastiveTask
from chiasm.train.features import (
    CachedImages,
    LockedSides,
    _digest,
    bare_image_tower,
    bare_text_tower,
    cache_image_features,
    cache_text_features,
    locked_sides,
    project_image,
    project_text,
)
from chiasm.train.loop import Loop
from chiasm.train.recipe import OptimConfig, TrainConfig
from chiasm.train.sources import PairRows
from chiasm.train.texts import TokenTable
from chiasm.types import Preprocess

TEXTS = [
    [f"a lung with {w}", f"{w} of the lung"] for w in ("a mass", "effusion", "oedema", "scars", "air", "nothing")
] * 3


def model(*, image="linear", text="linear", freeze=(True, True), pool="cls", dropout=0.0, lora=None):
    config = EncoderConfig(
        ImageTowerConfig(
            image_size=16, patch_size=8, width=16, layers=1, heads=2, pool=pool, freeze=freeze[0], lora=lora
        ),
        TextTowerConfig(context_length=12, width=16, layers=1, heads=2, freeze=freeze[1], vocab_size=49408),
        ProjectionConfig(dim=8, image=image, text=text, dropout=dropout),
        tokenizer={"kind": "clip", "context_length": 12}, preprocess=Preprocess(size=16),
    )  # fmt: skip
    return build_encoder_model(config, seed=0)


class Pixels:
    """Images that remember how often they were made."""

    def __init__(self, n=18):
        self.values = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.calls = 0

    def __call__(self, rows, rng):
        self.calls += 1
        pixels = self.values[torch.from_numpy(rows)]
        if rng is not None:
            pixels = pixels + torch.from_numpy(rng.normal(size=pixels.shape).astype(np.float32)) * 0.1
        return pixels, np.arange(len(rows))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_tower_then_projection_is_the_encoder(kind, pool):
    dual = model(image=kind, text=kind, pool=pool).eval()
    assert locked_sides(dual) == (True, True)
    pixels = Pixels().values
    tokens = TokenTable(TEXTS, ClipTokenizer(12)).tokens(np.arange(12))
    with torch.no_grad():
        assert torch.equal(project_image(dual, bare_image_tower(dual)(pixels)), dual.encode_image(pixels))
        text = bare_text_tower(dual)(tokens.ids, tokens.lengths)
        assert torch.allclose(project_text(dual, text), dual.encode_text(tokens.ids, tokens.lengths), atol=1e-6)


def test_what_trains_is_not_cached():
    assert locked_sides(model(freeze=(True, False))) == (True, False)
    assert locked_sides(model(freeze=(False, True))) == (False, True)
    assert locked_sides(model(freeze=(True, True), lora=LoraConfig())) == (False, True)
    assert locked_sides(torch.nn.Linear(2, 2)) == (False, False)


def test_the_cache_is_found_again_and_keyed_by_everything(tmp_path):
    dual, pixels = model(), Pixels()
    first = cache_image_features(dual, pixels, 18, folder=tmp_path, describes=["a"], views=3)
    assert first.shape == (3, 18, 16)
    assert not np.allclose(first[0], first[1])
    calls = pixels.calls
    again = cache_image_features(dual, pixels, 18, folder=tmp_path, describes=["a"], views=3)
    assert pixels.calls == calls
    assert np.array_equal(first, again)
    assert isinstance(again, np.memmap)
    cache_image_features(dual, pixels, 18, folder=tmp_path, describes=["b"], views=3)
    cache_image_features(dual, pixels, 18, folder=tmp_path, describes=["a"], views=2)
    with torch.no_grad():
        dual.visual.conv1.weight.add_(1e-3)
    cache_image_features(dual, pixels, 18, folder=tmp_path, describes=["a"], views=3)
    assert len(list(tmp_path.glob("image-*.npy"))) == 4
    with torch.no_grad():
        dual.visual.proj.add_(1.0)
    calls = pixels.calls
    cache_image_features(dual, pixels, 18, folder=tmp_path, describes=["a"], views=3)
    assert pixels.calls == calls, "the projection is no part of the locked tower"
    assert not list(tmp_path.glob(".*")), "no unfinished file is left"


def test_the_key_holds_what_the_declaration_states_and_no_defaults(tmp_path):
    """So a field that is added later leaves the names alone, and two towers with the same weights stay apart."""
    dual, pixels = model(), Pixels()
    assert "ln_eps" not in json.dumps(_digest(bare_image_tower(dual), dual.config.image))
    for eps in (1e-5, 1e-5, 1e-3):
        image = dataclasses.replace(dual.config.image, ln_eps=eps)
        dual.config = dataclasses.replace(dual.config, image=image)
        cache_image_features(dual, pixels, 18, folder=tmp_path, describes=0)
    assert len(list(tmp_path.glob("image-*.npy"))) == 2


def test_view_zero_is_what_validation_sees(tmp_path):
    dual, pixels = model().eval(), Pixels()
    cached = CachedImages(cache_image_features(dual, pixels, 18, folder=tmp_path, describes=0, views=2))
    rows = np.array([5, 3])
    with torch.no_grad():
        expected = bare_image_tower(dual)(pixels.values[[5, 3]])
    assert torch.allclose(cached(rows, None)[0], expected, atol=1e-6)
    drawn = [cached(rows, np.random.default_rng(s))[0] for s in range(8)]
    assert any(not torch.allclose(d, expected, atol=1e-4) for d in drawn)
    assert any(torch.allclose(d[0], expected[0], atol=1e-5) for d in drawn)


def test_training_on_features_equals_training_on_inputs(tmp_path):
    table = TokenTable(TEXTS, ClipTokenizer(12))
    keys = [str(i) for i in range(18)]
    settings = TrainConfig(optim=OptimConfig(lr=1e-2, steps=6, batch_size=6))
    weights = []
    for cached in (False, True):
        dual, images = model(), Pixels()
        rows = PairRows(images, table, keys, train=False)
        called = dual
        if cached:
            features = CachedImages(cache_image_features(dual, images, 18, folder=tmp_path, describes=0))
            text = cache_text_features(dual, table, folder=tmp_path)
            rows = PairRows(features, table, keys, train=False, text_features=text)
            called = LockedSides(dual, image=True, text=True)
        task = ContrastiveTask(dual, config=settings, called=called)
        Loop(task, rows, config=settings, out=tmp_path / str(cached)).run()
        weights.append({n: p.detach().clone() for n, p in dual.named_parameters() if p.requires_grad})
    assert set(weights[0]) == {"visual.proj", "text_projection", "logit_scale"}
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=2e-5), name


def test_a_bias_passes_through(tmp_path):
    config = EncoderConfig(
        ImageTowerConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, freeze=True),
        TextTowerConfig(context_length=12, width=16, layers=1, heads=2), ProjectionConfig(dim=8), logit_bias_init=-3.0,
        tokenizer={"kind": "clip", "context_length": 12}, preprocess=Preprocess(size=16),
    )  # fmt: skip
    dual = build_encoder_model(config, seed=0)
    tokens = TokenTable(TEXTS, ClipTokenizer(12)).tokens(np.arange(2))
    out = LockedSides(dual, image=True, text=False)(torch.randn(2, 16), tokens.ids, tokens.lengths)
    assert out["logit_bias"].item() == -3.0
    assert torch.allclose(out["image_features"].norm(dim=1), torch.ones(2))


def test_a_disk_that_is_full_is_said_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cache of features cannot be written"):
        cache_image_features(model(), Pixels(), 18, folder=tmp_path / "file", describes=0)


def test_an_unreadable_image_stops_the_cache(tmp_path):
    def pixels(rows, rng):
        return torch.zeros(len(rows) - 1, 3, 16, 16), np.arange(len(rows) - 1)

    with pytest.raises(TrainingError, match="could not be read"):
        cache_image_features(model(), pixels, 18, folder=tmp_path, describes=0)
    assert not list(tmp_path.iterdir())


class Trunk(torch.nn.Module):
    """A foreign tower with batch statistics, which must stand still, and dropout, which must be off."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, pixels):
        return self.dropout(self.norm(pixels)).mean(3).flatten(1)


def test_a_foreign_tower_stands_still_while_its_features_are_made(tmp_path):
    config = EncoderConfig(
        ImageTowerConfig(kind="python", source=f"{__name__}:Trunk", image_size=16, freeze=True),
        TextTowerConfig(context_length=12, width=16, layers=1, heads=2, freeze=True), ProjectionConfig(dim=8),
        tokenizer={"kind": "clip", "context_length": 12}, preprocess=Preprocess(size=16),
    )  # fmt: skip
    dual = build_encoder_model(config, allow_code=True, seed=0)
    assert locked_sides(dual) == (True, True)
    before = {n: b.clone() for n, b in dual.visual.named_buffers()}
    pixels = Pixels()
    first = cache_image_features(dual, pixels, 18, folder=tmp_path, describes=0)
    assert first.shape == (1, 18, 48)
    assert all(torch.equal(b, before[n]) for n, b in dual.visual.named_buffers())
    with torch.no_grad():
        expected = dual.eval().encode_image(pixels.values)
        assert torch.allclose(project_image(dual, torch.from_numpy(np.array(first[0]))), expected, atol=1e-5)
