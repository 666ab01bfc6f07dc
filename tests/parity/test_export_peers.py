"""What chiasm exports, read by open_clip and transformers: same tensors, same ids, same embeddings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chiasm.data.huggingface_tokenizer import HuggingFaceTokenizer
from chiasm.encoders.base import Encoder, EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.export import export_encoder
from chiasm.testing import make_test_images
from chiasm.types import Preprocess

pytestmark = pytest.mark.peer

TIGHT = 1e-5
TEXTS = ["a mass", "no, one", "x"]
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "heads": 1}
TIMM: dict[str, Any] = {
    "patch_size": 16, "width": 192, "layers": 12, "heads": 3, "activation": "gelu", "pre_norm": False, "ln_eps": 1e-6,
    "patch_bias": True,
}  # fmt: skip
TEXT: dict[str, Any] = {"context_length": 77, "width": 64, "layers": 2, "heads": 1}
BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
HF_VIT: dict[str, Any] = {
    "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip


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


def make(image: dict[str, Any], text: dict[str, Any], **more: Any) -> Encoder:
    image_config, text_config = ImageTowerConfig(**image), TextTowerConfig(**{**TEXT, **text})
    size = image_config.image_size
    config = EncoderConfig(
        image=image_config,
        text=text_config,
        projection=ProjectionConfig(dim=more.pop("dim", 64), **more.pop("projection", {})),
        preprocess=more.pop("preprocess", Preprocess(size)),
        tokenizer=more.pop("tokenizer", {"kind": "clip", "context_length": text_config.context_length}),
        **more,
    )
    model = build_encoder_model(config, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("logit_scale") or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(name.endswith("weight") + 0.2 * noise)
    return Encoder(model, config, name="small")


def error(ours: Tensor, theirs: Tensor) -> float:
    rms = theirs.square().mean(1, keepdim=True).sqrt()
    return float(((ours - theirs).abs() / torch.maximum(theirs.abs(), rms)).max())


def siglip() -> Encoder:
    shape = {**VIT, "class_token": False, "pool": "map", "patch_bias": True, "pre_norm": False, "ln_eps": 1e-6}
    text = {"causal": False, "pool": "last", "ln_eps": 1e-6, "activation": "gelu_tanh", "vocab_size": 300}
    return make(
        {**shape, "activation": "gelu_tanh"},
        {**text, "context_length": 12},
        projection={"image": "none", "biased": ("text",)},
        logit_bias_init=-10.0,
        tokenizer=byte_tokenizer(12, None),
        preprocess=Preprocess(32, "squash", "none", rgb="before_resize", mean=(0.5,) * 3, std=(0.5,) * 3),
    )


GELU: dict[str, Any] = {"activation": "gelu"}
BERT_TEXT: dict[str, Any] = {
    "kind": "huggingface", "source": "small", "pool": "cls", "options": {"config": BERT}, "context_length": 12
}  # fmt: skip


@pytest.mark.parametrize(
    ("image", "text", "more"),
    [
        (VIT, {}, {}),
        ({**VIT, **GELU, "pool": "mean", "layer_scale": True, "pre_norm": False},
         {**GELU, "pool": "last", "causal": False, "ln_eps": 1e-6}, {"logit_bias_init": -3.0}),
        ({"kind": "resnet", "image_size": 64, "width": 16, "layers": (1, 1, 1, 1), "heads": 8}, GELU, {}),
        ({**VIT, **GELU, "pool": "attention"}, {**GELU, "pool": "appended"}, {}),
        (TIMM, BERT_TEXT, {"dim": 40, "projection": {"text": "mlp"}, "tokenizer": byte_tokenizer(12, "whitespace")}),
        ({**TIMM, "pool": "mean"}, {"activation": "quick_gelu"}, {"projection": {"biased": ("image", "text")}}),
    ],
    ids=["clip", "options", "resnet", "coca", "biomedclip", "biased"],
)  # fmt: skip
def test_open_clip_reads_it(tmp_path: Path, image: dict[str, Any], text: dict[str, Any], more: dict[str, Any]) -> None:
    import open_clip

    ours = make(image, text, **more)
    export_encoder(ours, tmp_path / "out", to="open_clip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
        peer: Any = theirs.eval()
        pixels = torch.stack([transform(i) for i in make_test_images(3)])
        assert torch.equal(torch.stack([ours.preprocess(i) for i in make_test_images(3)]), pixels)
        ids = tokenizer(TEXTS)
        assert torch.equal(ours.tokenizer(TEXTS), ids)
        with torch.inference_mode():
            limit = 1e-4 if image.get("kind") == "resnet" else TIGHT
            assert error(ours.encode_image(pixels), peer.encode_image(pixels)) <= limit
            assert error(ours.encode_text(TEXTS), peer.encode_text(ids)) <= TIGHT
    assert ours.logit_scale == pytest.approx(float(peer.logit_scale.detach().exp()))


def features(output: Any) -> Tensor:
    return getattr(output, "pooler_output", output)  # type: ignore[no-any-return]


def dual() -> Encoder:
    return make(
        {"kind": "huggingface", "source": "vit", "image_size": 32, "options": {"config": HF_VIT}},
        {**BERT_TEXT, "options": {"config": BERT, "pooler": True}},
        tokenizer=byte_tokenizer(12, None),
        preprocess=Preprocess(32, rgb="before_resize"),
    )


@pytest.mark.parametrize(
    ("make_encoder", "kind"),
    [
        (lambda: make(VIT, {}, preprocess=Preprocess(32, rgb="before_resize")), "CLIPModel"),
        (siglip, "SiglipModel"),
        (dual, "VisionTextDualEncoderModel"),
    ],
    ids=["clip", "siglip", "dual"],
)
def test_transformers_reads_it(tmp_path: Path, make_encoder: Any, kind: str) -> None:
    import transformers

    ours: Encoder = make_encoder()
    export_encoder(ours, tmp_path / "out", to="huggingface")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = getattr(transformers, kind).from_pretrained(str(tmp_path / "out"), output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
        processor = transformers.AutoImageProcessor.from_pretrained(str(tmp_path / "out"))
    peer: nn.Module = model.eval()
    assert not any(info.values()), info
    batch = tokenizer(TEXTS, padding="max_length", max_length=ours.tokenizer.context_length, return_tensors="pt")
    pixels = torch.stack([ours.preprocess(i) for i in make_test_images(3)])
    shown = torch.stack([processor(i, return_tensors="pt")["pixel_values"][0] for i in make_test_images(3)])
    std = torch.tensor(ours.preprocess_spec.std)[:, None, None]
    assert float(((shown - pixels) * std).abs().max()) <= 1 / 255 + 1e-6
    for row, expected in zip(batch.input_ids.tolist(), ours.tokenizer.encode_ids(TEXTS), strict=True):
        assert row[: len(expected)] == expected
    attention = {} if kind == "SiglipModel" else {"attention_mask": batch.attention_mask}
    any_peer: Any = peer
    with torch.inference_mode():
        assert error(ours.encode_image(pixels), features(any_peer.get_image_features(pixel_values=pixels))) <= TIGHT
        theirs = features(any_peer.get_text_features(input_ids=batch.input_ids, **attention))
        assert error(ours.encode_text(TEXTS), theirs) <= TIGHT
