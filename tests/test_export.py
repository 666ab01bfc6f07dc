"""Models written in other libraries' forms and read back: the same tensors bit by bit, the same vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from chiasm.cli.main import app
from chiasm.data.huggingface_tokenizer import HuggingFaceTokenizer
from chiasm.encoders.base import Encoder, EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.errors import CheckpointError, InputError
from chiasm.export import export_encoder
from chiasm.load import load
from chiasm.testing import TinyEncoder, make_test_images
from chiasm.types import Preprocess

TEXTS = ["a mass", "no, one", "x"]
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "heads": 2}
TIMM: dict[str, Any] = {
    "patch_size": 16, "width": 192, "layers": 12, "heads": 3, "activation": "gelu", "pre_norm": False, "ln_eps": 1e-6,
    "patch_bias": True,
}  # fmt: skip
TEXT: dict[str, Any] = {"context_length": 12, "width": 32, "layers": 2, "heads": 2}
BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
HF_VIT: dict[str, Any] = {
    "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip
THEIRS = Preprocess(32, rgb="before_resize")  # transformers' order and crop


def byte_tokenizer(context: int, clean: str | None) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["[PAD]", "[CLS]", "[SEP]", *letters])}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return HuggingFaceTokenizer(json.loads(engine.to_str()), context, pad_token="[PAD]", clean=clean).to_dict()


def make(
    image: dict[str, Any], text: dict[str, Any], *, dim: int = 32, preprocess: Preprocess | None = None, **more: Any
) -> Encoder:
    image_config, text_config = ImageTowerConfig(**image), TextTowerConfig(**{**TEXT, **text})
    tokenizer = more.pop("tokenizer", {"kind": "clip", "context_length": text_config.context_length})
    config = EncoderConfig(
        image=image_config,
        text=text_config,
        projection=ProjectionConfig(dim=dim, **more.pop("projection", {})),
        preprocess=preprocess or Preprocess(image_config.image_size),
        tokenizer=tokenizer,
        **more,
    )
    return Encoder(build_encoder_model(config, seed=3), config, name="small")


def clip(**changed: Any) -> Encoder:
    return make({**VIT, **changed.pop("image", {})}, changed.pop("text", {}), **changed)


def coca() -> Encoder:
    gelu = {"activation": "gelu"}
    return make({**VIT, **gelu, "pool": "attention"}, {**gelu, "pool": "appended"})


def siglip(**image: Any) -> Encoder:
    shape = {**VIT, "class_token": False, "pool": "map", "patch_bias": True, "pre_norm": False, "ln_eps": 1e-6}
    return make(
        {**shape, "activation": "gelu_tanh", **image},
        {"causal": False, "pool": "last", "ln_eps": 1e-6, "activation": "gelu_tanh", "vocab_size": 300},
        projection={"image": "none", "biased": ("text",)},
        logit_bias_init=-10.0,
        tokenizer=byte_tokenizer(12, "canonicalize"),
        preprocess=Preprocess(32, "squash", "none", rgb="before_resize", mean=(0.5,) * 3, std=(0.5,) * 3),
    )


def biomed() -> Encoder:
    text = {"kind": "huggingface", "source": "small", "pool": "cls", "options": {"config": BERT}}
    return make(
        TIMM, text, dim=40, projection={"text": "mlp"}, tokenizer=byte_tokenizer(12, "whitespace")
    )  # fmt: skip


def dual() -> Encoder:
    return make(
        {"kind": "huggingface", "source": "vit", "image_size": 32, "options": {"config": HF_VIT}},
        {"kind": "huggingface", "source": "bert", "pool": "cls", "options": {"config": BERT, "pooler": True}},
        tokenizer=byte_tokenizer(12, None),
        preprocess=THEIRS,
    )


def same(ours: Encoder, again: Encoder) -> None:
    state, other = ours.model.state_dict(), again.model.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name
    images = make_test_images(2)
    pixels = torch.stack([ours.preprocess(i) for i in images])
    assert torch.equal(torch.stack([again.preprocess(i) for i in images]), pixels)
    assert torch.equal(ours.tokenizer.encode(TEXTS).ids, again.tokenizer.encode(TEXTS).ids)
    assert torch.equal(ours.encode_image(pixels), again.encode_image(pixels))
    assert torch.equal(ours.encode_text(TEXTS), again.encode_text(TEXTS))
    assert ours.logit_scale == again.logit_scale
    assert ours.logit_bias == again.logit_bias


RESNET: dict[str, Any] = {"kind": "resnet", "image_size": 64, "width": 8, "layers": (1, 1, 1, 1), "heads": 4}


@pytest.mark.parametrize(
    "encoder",
    [
        clip,
        lambda: clip(image={"activation": "gelu", "pool": "mean", "layer_scale": True, "pre_norm": False},
                     text={"activation": "gelu", "pool": "last", "causal": False, "ln_eps": 1e-6}),
        lambda: make(RESNET, {"activation": "gelu"}),
        coca,
        biomed,
    ],
    ids=["clip", "options", "resnet", "coca", "biomedclip"],
)  # fmt: skip
def test_open_clip_round_trip(tmp_path: Path, encoder: Any) -> None:
    ours = encoder()
    assert export_encoder(ours, tmp_path / "out", to="open_clip") == ()
    same(ours, load(tmp_path / "out"))


@pytest.mark.parametrize(
    "encoder", [lambda: clip(preprocess=THEIRS, text={"ln_eps": 1e-3}), siglip, dual], ids=["clip", "siglip", "dual"]
)
def test_huggingface_round_trip(tmp_path: Path, encoder: Any) -> None:
    ours = encoder()
    export_encoder(ours, tmp_path / "out", to="huggingface")
    same(ours, load(tmp_path / "out"))


def test_its_own_form(tmp_path: Path) -> None:
    ours = TinyEncoder(1)
    export_encoder(ours, tmp_path / "out", to="chiasm")
    again = load(tmp_path / "out")
    assert again.space == ours.space


def test_preprocessing_that_differs_must_be_accepted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="centre crop lies one pixel before") as caught:
        export_encoder(clip(), tmp_path / "out", to="huggingface")
    assert "--accept-differences" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    told = export_encoder(clip(), tmp_path / "out", to="huggingface", accept_differences=True)
    assert "centre crop" in told[0]
    again = load(tmp_path / "out")
    assert again.preprocess_spec.crop_rounding is None
    assert again.preprocess_spec.rgb == "before_resize"
    with pytest.raises(CheckpointError, match="one pixel further"):
        export_encoder(clip(preprocess=THEIRS), tmp_path / "back", to="open_clip")


@pytest.mark.parametrize(
    ("encoder", "to", "message"),
    [
        (lambda: TinyEncoder(0), "open_clip", "shortened vocabulary"),
        (lambda: clip(text={"activation": "gelu"}), "open_clip", "different activations"),
        (lambda: clip(text={"pool": "mean"}), "open_clip", "the pooling `mean`"),
        (lambda: clip(projection={"text": "mlp"}), "open_clip", "an MLP"),
        (lambda: clip(projection={"standardize": ("image",)}), "open_clip", "standardized"),
        (lambda: clip(scale="none"), "open_clip", "without a logit scale"),
        (lambda: clip(image={"registers": 2, "patch_bias": True}), "open_clip", "timm has no ViT"),
        (lambda: clip(text={"pool": "appended", "cls_mask": "correct"}), "open_clip", "corrected mask"),
        (lambda: clip(preprocess=Preprocess(32, cut_bottom=0.1)), "open_clip", "cutting off"),
        (lambda: clip(preprocess=Preprocess(32, interpolation="lanczos")), "open_clip", "filter `lanczos`"),
        (lambda: clip(preprocess=Preprocess(32, "longest_pad", "none")), "huggingface", "resizing `longest_pad`"),
        (siglip, "open_clip", "timm has no ViT"),
        (dual, "open_clip", "an image tower of transformers"),
        (coca, "huggingface", "the image pooling `attention`"),
        (lambda: clip(image={"pre_norm": False}), "huggingface", "without a LayerNorm before"),
        (lambda: clip(text={"causal": False, "pool": "last"}), "huggingface", "text pooling `last`"),
        (biomed, "huggingface", "an image tower `vit` beside a text tower `huggingface`"),
        (lambda: siglip(patch_bias=False), "huggingface", "patches without a bias"),
    ],
)
def test_what_is_refused(tmp_path: Path, encoder: Any, to: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        export_encoder(encoder(), tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(InputError, match="is there already"):
        export_encoder(clip(), tmp_path, to="open_clip")
    with pytest.raises(InputError, match="unknown format"):
        export_encoder(clip(), tmp_path / "new", to="onnx")  # type: ignore[arg-type]


def test_the_command(tmp_path: Path) -> None:
    ours = clip()
    export_encoder(ours, tmp_path / "model", to="chiasm")
    arguments = ["export", str(tmp_path / "model"), "--to", "open_clip", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["to"] == "open_clip"
    same(ours, load(tmp_path / "out"))
    arguments = ["export", str(tmp_path / "out"), "--to", "huggingface", "--out", str(tmp_path / "theirs")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "--accept-differences" in result.output
    result = CliRunner().invoke(app, [*arguments, "--accept-differences", "--activation", "gelu"])
    assert result.exit_code == 0, result.output
    assert "centre crop" in result.output
    assert load(tmp_path / "theirs").config == replace(
        load(tmp_path / "theirs").config, image=replace(ours.config.image, activation="gelu")
    )
