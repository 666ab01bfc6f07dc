"""The native towers against open_clip and OpenAI's own package: same weights, same output, and one trap each."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.dual import DualEncoder
from chiasm.types import Preprocess

pytestmark = pytest.mark.peer

TIGHT = 1e-5
#: Thirty batch norms with random statistics amplify the order of additions.
WITH_BATCH_NORM = 1e-4

TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 500, "width": 128, "layers": 4, "heads": 2}
VIT: dict[str, Any] = {"image_size": 96, "patch_size": 16, "width": 128, "layers": 4, "heads": 2}
RESNET: dict[str, Any] = {"kind": "resnet", "image_size": 96, "width": 32, "layers": (2, 1, 3, 1)}


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("logit_scale") or not tensor.is_floating_point() or "mask" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            elif name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.2 * noise)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def config_of(image: dict[str, Any], text: dict[str, Any] | None = None, dim: int = 64) -> EncoderConfig:
    words = {**TEXT, **(text or {})}
    return EncoderConfig(
        image=ImageTowerConfig(**image),
        text=TextTowerConfig(**words),
        projection=ProjectionConfig(dim=dim),
        tokenizer={"kind": "clip", "context_length": words["context_length"]},
        preprocess=Preprocess(size=image["image_size"]),
    )


def open_clip_of(config: EncoderConfig, **vision: Any) -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    image, text = config.image, config.text
    shape: dict[str, Any] = {"image_size": image.image_size, "width": image.width}
    if image.kind == "resnet":
        assert isinstance(image.layers, tuple)
        # open_clip counts the attention pool's heads as width * 32 // head_width
        shape |= {"layers": image.layers, "head_width": image.final_channels // image.pool_heads}
    else:
        shape |= {
            "layers": image.layers,
            "patch_size": image.patch_size,
            "mlp_ratio": image.mlp_ratio,
            "head_width": image.width // image.pool_heads,
            "no_ln_pre": not image.pre_norm,
            "pool_type": {"mean": "avg"}.get(image.pool, "tok"),
        }
    words = CLIPTextCfg(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.attention_heads,
        layers=text.layers,
        mlp_ratio=text.mlp_ratio,
        no_causal_mask=not text.causal,
        pool_type={"eot": "argmax", "last": "last", "cls": "first"}[text.pool],
    )
    assert image.activation == text.activation
    quick = image.activation == "quick_gelu"
    model = CLIP(config.projection.dim, CLIPVisionCfg(**{**shape, **vision}), words, quick_gelu=quick)
    randomise(model)
    return model.eval()


def ours_with(config: EncoderConfig, theirs: nn.Module) -> DualEncoder:
    model = build_encoder_model(config, seed=1)
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model.eval()


def inputs(config: EncoderConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    size, context, end = config.image.image_size, config.text.context_length, config.text.vocab_size - 1
    pixels = torch.randn(3, 3, size, size, generator=generator)
    ids = torch.zeros(5, context, dtype=torch.long)
    for row, length in enumerate((3, 9, 20, 31, 14)):
        ids[row, :length] = torch.randint(1, end, (length,), generator=generator)
        ids[row, length - 1] = end
    return pixels, ids


def errors(ours: DualEncoder, theirs: Any, config: EncoderConfig) -> tuple[float, float]:
    pixels, ids = inputs(config)
    with torch.inference_mode():
        return (
            error(ours.encode_image(pixels), theirs.encode_image(pixels)),
            error(ours.encode_text(ids), theirs.encode_text(ids)),
        )


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(
    "image",
    [VIT, {**VIT, "pre_norm": False}, {**VIT, "pool": "mean"}, {**VIT, "mlp_ratio": 2.0, "heads": 8, "layers": 1}],
    ids=["cls", "no-ln-pre", "mean", "one-block"],
)
def test_vit_and_text_match_open_clip(image: dict[str, Any], activation: str) -> None:
    config = config_of({**image, "activation": activation}, {"activation": activation})
    theirs = open_clip_of(config)
    image_error, text_error = errors(ours_with(config, theirs), theirs, config)
    assert image_error <= TIGHT
    assert text_error <= TIGHT


@pytest.mark.parametrize("dim", [64, 128])
def test_attention_pooled_vit_matches_open_clip(dim: int) -> None:
    config = config_of({**VIT, "pool": "attention"}, dim=dim)
    theirs = open_clip_of(config, attentional_pool=True, attn_pooler_queries=1)
    assert errors(ours_with(config, theirs), theirs, config)[0] <= TIGHT


def test_resnet_matches_open_clip() -> None:
    config = config_of(RESNET)
    theirs = open_clip_of(config)
    assert errors(ours_with(config, theirs), theirs, config)[0] <= WITH_BATCH_NORM


@pytest.mark.parametrize(
    "text", [{"causal": False, "pool": "last"}, {"pool": "last"}, {"causal": False, "pool": "cls"}]
)
def test_untrimmable_text_matches_open_clip(text: dict[str, Any]) -> None:
    config = config_of(VIT, text)
    theirs = open_clip_of(config)
    assert errors(ours_with(config, theirs), theirs, config)[1] <= TIGHT


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-32", "RN50-quickgelu"])
def test_an_official_architecture_matches_open_clip_in_full_size(name: str) -> None:
    import open_clip

    theirs: Any = open_clip.create_model(name, pretrained=None)
    randomise(theirs)
    theirs.eval()
    activation = "quick_gelu" if "quick" in name else "gelu"
    if name.startswith("ViT"):
        image = ImageTowerConfig(activation=activation)  # type: ignore[arg-type]
        dim = 512
    else:
        image = ImageTowerConfig(kind="resnet", width=64, layers=(3, 4, 6, 3))
        dim = 1024
    config = EncoderConfig(
        image=image,
        text=TextTowerConfig(activation=activation),  # type: ignore[arg-type]
        projection=ProjectionConfig(dim=dim),
    )
    image_error, text_error = errors(ours_with(config, theirs), theirs, config)
    assert image_error <= (TIGHT if name.startswith("ViT") else WITH_BATCH_NORM)
    assert text_error <= TIGHT


def test_forward_and_loss_gradients_match_open_clip() -> None:
    config = config_of(VIT)
    theirs: Any = open_clip_of(config)
    ours = ours_with(config, theirs)
    pixels, ids = inputs(config)
    gradients = []
    for model in (ours, theirs):
        model.train()
        if model is ours:
            out = model(pixels, ids[:3])
            image, text, scale = out["image_features"], out["text_features"], out["logit_scale"]
        else:
            image, text, scale = model(pixels, ids[:3])[:3]
        logits = scale * image @ text.T
        target = torch.arange(3)
        loss = nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    total = max(float(g.abs().max()) for g in gradients[1].values() if g is not None)
    for name, theirs_grad in gradients[1].items():
        ours_grad = gradients[0][name]
        assert ours_grad is not None
        assert theirs_grad is not None
        assert float((ours_grad - theirs_grad).abs().max()) <= 1e-5 * total, name


@pytest.mark.parametrize(
    ("wrong", "side"),
    [
        ({"image": {"activation": "gelu"}}, 0),
        ({"image": {"pre_norm": False}}, 0),
        ({"image": {"pool": "mean"}}, 0),
        ({"image": {"heads": 4}}, 0),
        ({"image": {"ln_eps": 1e-3}}, 0),
        ({"text": {"activation": "gelu"}}, 1),
        ({"text": {"causal": False}}, 1),
        ({"text": {"pool": "mean"}}, 1),
        ({"text": {"pool": "last"}}, 1),
        ({"text": {"heads": 4}}, 1),
    ],
)
def test_each_wrong_setting_fails_the_tolerance(wrong: dict[str, dict[str, Any]], side: int) -> None:
    config = config_of(VIT)
    theirs = open_clip_of(config)
    changed = dataclasses.replace(
        config,
        image=dataclasses.replace(config.image, **wrong.get("image", {})),
        text=dataclasses.replace(config.text, **wrong.get("text", {})),
    )
    ours = build_encoder_model(changed, seed=1)
    ours.load_state_dict(theirs.state_dict(), strict="pre_norm" not in wrong.get("image", {}))
    assert errors(ours.eval(), theirs, config)[side] > 10 * TIGHT


def test_trimming_a_text_that_sees_its_padding_fails_the_tolerance() -> None:
    config = config_of(VIT, {"causal": False})
    theirs: Any = open_clip_of(config)
    _, ids = inputs(config)
    end = config.text.vocab_size - 1
    trimmed = ids[:, : int((ids == end).int().argmax(1).max()) + 1]
    ours = ours_with(config, theirs)
    ours.text_plan = dataclasses.replace(ours.text_plan, context_length=trimmed.shape[1])
    with torch.inference_mode():
        assert error(ours.encode_text(trimmed), theirs.encode_text(ids)) > 10 * TIGHT


def openai_model(config: EncoderConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = pytest.importorskip("clip.model", reason="OpenAI's package is not installed")
    image, text = config.image, config.text
    model: nn.Module = clip.CLIP(
        config.projection.dim,
        image.image_size,
        image.layers,
        image.width,
        image.patch_size if image.kind == "vit" else None,
        text.context_length,
        text.vocab_size,
        text.width,
        text.attention_heads,
        text.layers,
    )
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("image", [VIT, {**RESNET, "width": 64}], ids=["vit", "resnet"])
def test_towers_match_openai(image: dict[str, Any]) -> None:
    config = config_of(image)
    theirs = openai_model(config)
    image_error, text_error = errors(ours_with(config, theirs), theirs, config)
    assert image_error <= (TIGHT if config.image.kind == "vit" else WITH_BATCH_NORM)
    assert text_error <= TIGHT


def test_gradient_weighted_attention_sees_the_peers_weights() -> None:
    config = config_of(VIT)
    theirs: Any = open_clip_of(config)
    ours: Any = ours_with(config, theirs)
    pixels, _ = inputs(config)
    with torch.inference_mode():
        features = ours.visual.forward_features(pixels, return_attention=True)
        block = theirs.visual.transformer.resblocks[0]
        x = theirs.visual._embeds(pixels)
        hidden = block.ln_1(x)
        _, expected = block.attn(hidden, hidden, hidden, need_weights=True, average_attn_weights=False)
    np.testing.assert_allclose(features.attentions[0].numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
