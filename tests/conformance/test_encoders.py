"""Every model of the catalog, and every kind of tower, keeps the laws of ``chiasm.testing.check_encoder``.

The catalog's models run with random weights at reduced depth and width; everything else is theirs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from chiasm.encoders.base import Encoder, EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.encoders.inference.engine import Engine
from chiasm.testing import TEXTS, TinyEncoder, check_encoder
from chiasm.types import Preprocess

#: Towers of ``encoders.named`` at reduced depth and width: (side of the image, options).
SMALL_IMAGE_TOWERS: dict[str, tuple[int, dict[str, Any]]] = {
    "biovil": (64, {"width": 8, "layers": [1, 1, 1, 1], "output_dim": 128, "temporal_dim": 16, "temporal_heads": 4}),
    "classic_resnet": (64, {"width": 8, "layers": [1, 1, 1, 1]}),
    "gloria": (64, {"width": 8, "layers": [1, 1, 1, 1], "output_dim": 32, "upsample": 75}),
    "conch": (32, {"width": 32, "layers": 2, "heads": 4, "patch_size": 8, "output_dim": 16, "pool_heads": 4}),
}
SMALL_BERT: dict[str, Any] = {
    "width": 32,
    "layers": 3,
    "heads": 2,
    "mlp_width": 48,
    "vocab_size": 300,
    "positions": 100,
}
SMALL_TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "cxr_bert": {**SMALL_BERT, "positions": 512},
    "gloria": SMALL_BERT,
    "medclip": SMALL_BERT,
}

#: Models of transformers at reduced size, by their ``model_type``.
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 64},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2},
}


def byte_tokenizer(config: EncoderConfig) -> dict[str, Any]:
    """A tokenizer of single bytes, as a stored one, in the place of one that the user brings: pad 0, start 1, end 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pad = config.tokenizer.get("pad_token", "[PAD]")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([pad, "[CLS]", "[SEP]", *letters])}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    content = json.loads(engine.to_str())
    context = config.text.context_length
    return {"kind": "huggingface", "context_length": context, "tokenizer": content, "pad_token": pad}


def reduced(config: EncoderConfig) -> EncoderConfig:
    """The same model with one or two blocks, an eighth of the width and a smaller image."""
    image, text = config.image, config.text
    projection = config.projection
    if image.kind == "named":
        size, options = SMALL_IMAGE_TOWERS[image.source or ""]
        image = replace(image, image_size=size, options={**image.options, **options})
        if projection.image == "none":
            projection = replace(projection, dim=options.get("output_dim", 256))
    elif image.kind == "huggingface":
        size = 64
        stated = image.options["config"]
        image = replace(image, image_size=size, options={"config": {**stated, **SMALL_MODELS[stated["model_type"]]}})
        if projection.image == "none":
            projection = replace(projection, dim=16)
    elif image.kind == "vit":
        size = 2 * image.patch_size
        image = replace(image, width=image.width // 8, layers=2, heads=4, image_size=size)
    else:
        size = 64
        image = replace(image, width=8, layers=(1,) * len(image.layers), heads=4, image_size=size)  # type: ignore[arg-type]
    if text.kind == "named":
        text = replace(text, options={**text.options, **SMALL_TEXT_TOWERS[text.source or ""]})
    elif text.kind == "huggingface":
        stated = text.options["config"]
        small = SMALL_MODELS.get(stated["model_type"], SMALL)
        text = replace(text, options={**text.options, "config": {**stated, **small, "vocab_size": 300}})
        if projection.text == "none":
            projection = replace(projection, dim=32)
    else:
        text = replace(text, width=text.width // 8, layers=2, heads=4)
    if config.sides == "image" and image.kind == "vit":  # a backbone: its width is the dimension
        projection = replace(projection, dim=image.width)
    tokenizer = byte_tokenizer(config) if config.tokenizer.get("kind") == "huggingface" else config.tokenizer
    return replace(
        config,
        image=image,
        text=text,
        projection=projection,
        tokenizer=tokenizer,
        preprocess=replace(config.preprocess, size=size),
    )


@pytest.mark.parametrize("name", CATALOG.names())
def test_catalog(name: str) -> None:
    config = reduced(CATALOG.get(name).config)
    check_encoder(Encoder(build_encoder_model(config, seed=0), config, name=name))


def _text_towers() -> list[str]:
    """One name of the catalog for every kind of text tower."""
    found: dict[str, str] = {}
    for name in CATALOG.names():
        config = CATALOG.get(name).config
        if config.has_text and config.members is None:
            text = config.text
            model = text.options.get("config", {}).get("model_type", text.source if text.kind == "named" else None)
            kind = (text.kind, model, text.pool, text.activation, text.causal, text.cls_mask, text.options.keys())
            found.setdefault(f"{kind} {config.projection.text} {config.projection.biased}", name)
    return list(found.values())


@pytest.mark.parametrize("name", _text_towers())
def test_the_fast_form_of_a_text_tower_gives_its_vectors(name: str) -> None:
    """In float32 to the last few bits, in mixed bfloat16 the same direction; only what has no fast form says so."""
    config = replace(reduced(CATALOG.get(name).config), sides="text")
    model = build_encoder_model(config, seed=0).eval()
    tokens = Encoder(model, config, name=name).tokenizer.encode(list(TEXTS))
    with torch.inference_mode():
        expected = model.encode_text(tokens.ids, tokens.lengths)
        engine = Engine(model, "fp32")
        assert engine.plain == {} or name in ("biomegatron", "t5-base")
        found = engine.encode_text(tokens.ids, tokens.lengths)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
        mixed = Engine(model, "bf16").encode_text(tokens.ids, tokens.lengths)
        assert float(torch.cosine_similarity(mixed.double(), expected.double()).min()) > 1 - 2e-4


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_tiny_encoder(kind: str) -> None:
    check_encoder(TinyEncoder(1, kind=kind))


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ({"pool": "mean"}, {"pool": "mean"}),
        ({"pool": "attention", "pre_norm": False}, {"pool": "last", "causal": False}),
        ({"activation": "gelu"}, {"pool": "cls", "causal": False, "activation": "gelu"}),
        ({"patch_bias": True, "layer_scale": True, "registers": 3, "pre_norm": False}, {}),
        ({"registers": 2, "pool": "mean"}, {}),
        ({"pool": "map", "class_token": False, "activation": "gelu_tanh"}, {"pool": "appended"}),
        (
            {"pool": "mean", "class_token": False, "image_size": 35},
            {"pool": "last", "causal": False, "ln_eps": 1e-6, "activation": "gelu_tanh"},
        ),
        ({"pool": "attention"}, {"pool": "appended", "cls_mask": "correct"}),
        ({"activation": "swiglu", "mlp_ratio": 5.33334}, {}),
    ],
)
def test_native_options(image: dict[str, Any], text: dict[str, Any]) -> None:
    tiny = TinyEncoder(0)
    image_config = replace(tiny.config.image, **image)
    preprocess = replace(tiny.config.preprocess, size=image_config.image_size)
    config = replace(tiny.config, image=image_config, text=replace(tiny.config.text, **text), preprocess=preprocess)
    check_encoder(Encoder(build_encoder_model(config, seed=0), config, name="options"))


@pytest.mark.parametrize("side", ["image", "text"])
def test_backbones_of_one_side(side: Any) -> None:
    tiny = TinyEncoder(0)
    projection = ProjectionConfig(dim=32, image="none", text="none")
    config = replace(tiny.config, sides=side, projection=projection)
    model = build_encoder_model(config, seed=0)
    other = "visual." if side == "text" else "transformer."
    assert not any(name.startswith(other) for name in model.state_dict())
    assert "logit_scale" not in model.state_dict()
    check_encoder(Encoder(model, config, name="one side"))


def test_a_model_without_a_scale() -> None:
    config = replace(TinyEncoder(0).config, scale="none")
    encoder = Encoder(build_encoder_model(config, seed=0), config, name="no scale")
    assert encoder.logit_scale is None
    check_encoder(encoder)


SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES: dict[str, Any] = SMALL | {"image_size": 32, "patch_size": 8}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "patch_size": 4}


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ({"model_type": "dinov2", **PATCHES}, {"model_type": "bert", **SMALL}),
        ({"model_type": "swin", "window_size": 4, **SWIN}, {"model_type": "roberta", **SMALL}),
        ({"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
         {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}),
    ],
    ids=lambda c: c["model_type"],
)  # fmt: skip
def test_towers_of_transformers(image: dict[str, Any], text: dict[str, Any]) -> None:
    tokenizer = TinyEncoder(0).tokenizer.to_dict()
    size = 598  # of that tokenizer's vocabulary
    config = EncoderConfig(
        image=ImageTowerConfig(kind="huggingface", source="x", image_size=32, pool="mean", options={"config": image}),
        text=TextTowerConfig(
            kind="huggingface", source="x", context_length=32, options={"config": text | {"vocab_size": size}}
        ),
        projection=ProjectionConfig(dim=12, image="mlp", text="linear"),
        tokenizer=tokenizer,
        preprocess=Preprocess(32),
    )
    check_encoder(Encoder(build_encoder_model(config, seed=0), config, name="foreign"))


def test_the_checks_notice_what_they_should() -> None:
    """An encoder that breaks a law does not pass."""

    class Forgetful(torch.nn.Module):
        """Adds the mean of the batch, so that a row depends on its neighbours."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return y + y.mean(0) if len(y) else y

    encoder = TinyEncoder(0)
    encoder.model.visual = Forgetful(encoder.model.visual)
    with pytest.raises(AssertionError, match=r"changes by .* with the other rows of its batch"):
        check_encoder(encoder)
    encoder = TinyEncoder(0)
    with torch.no_grad():
        encoder.model.text_projection.zero_()
    with pytest.raises(AssertionError, match="two inputs give one embedding"):
        check_encoder(encoder)
    encoder = TinyEncoder(0)
    with torch.no_grad():
        encoder.model.logit_scale.fill_(100.0)  # a multiplier where its logarithm belongs
    with pytest.raises(AssertionError, match="a multiplier lies in"):
        check_encoder(encoder)
    encoder = TinyEncoder(0)
    with torch.no_grad():
        encoder.model.visual.proj[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="not all numbers are finite"):
        check_encoder(encoder)


def test_a_text_may_depend_on_the_length_of_its_batch_and_on_nothing_else() -> None:
    """MedCLIP's mean over padding is let through where the tower says so; anything more is not."""
    config = reduced(CATALOG.get("medclip-resnet").config)

    class Silent(torch.nn.Module):
        """The same tower without its word of warning, or with one that hides a second fault."""

        def __init__(self, inner: Any, *, says_so: bool) -> None:
            super().__init__()
            self.inner, self.output_dim, self.pad_id = inner, inner.output_dim, 0
            self.padding_counts = self.adds_mean = says_so

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            y = self.inner(ids, mask)
            return y + y.mean(0) if self.adds_mean else y

    for says_so in (False, True):
        encoder = Encoder(build_encoder_model(config, seed=0), config, name="silent")
        encoder.model.text.transformer = Silent(encoder.model.text.transformer, says_so=says_so)  # type: ignore[union-attr]
        with pytest.raises(AssertionError, match=r"texts: row . changes by"):
            check_encoder(encoder)
