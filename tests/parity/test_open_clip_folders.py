"""Folders as open_clip writes and reads them, with every kind of tower: same pixels, ids and embeddings as its loader.

The towers of timm and BERT are small, but built by timm and transformers themselves. One wrong setting each must miss.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chiasm.encoders.base import Encoder
from chiasm.encoders.fill import filled_model
from chiasm.load import load
from chiasm.testing import make_test_images

pytestmark = pytest.mark.peer

TIGHT = 1e-5
TEXTS = [
    "a chest radiograph",
    "Small left pleural effusion; no pneumothorax (1.5 cm).",
    "x",
    "caf\u00e9 &amp; tea " * 30,
]
VISION: dict[str, Any] = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
TEXT: dict[str, Any] = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("logit_scale") or not tensor.is_floating_point() or "mask" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(name.endswith("weight") + 0.2 * noise)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the value or to the root mean square of its row."""
    rms = theirs.square().mean(1, keepdim=True).sqrt()
    return float(((ours - theirs).abs() / torch.maximum(theirs.abs(), rms)).max())


def register_timm(size: int = 64) -> None:
    """Give timm small ViTs whose names follow its own rules."""
    from timm.layers import LayerNorm
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": size, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 3.7362}
    kinds: dict[str, dict[str, Any]] = {
        "vit_tiny_patch16_64": {},
        "vit_tiny_patch16_clip_64": {"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5)},
        "vit_tiny_patch16_clip_quickgelu_64": {
            "pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5), "act_layer": "quick_gelu"
        },
        "vit_tiny_patch16_siglip_64": {"class_token": False, "global_pool": "map"},
        "vit_tiny_patch16_siglip_gap_64": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    }  # fmt: skip

    def factory(name: str, options: dict[str, Any]) -> Callable[..., nn.Module]:
        def build(pretrained: bool = False, **keywords: Any) -> nn.Module:
            keywords = {k: v for k, v in keywords.items() if k in ("num_classes", "global_pool")}
            model: nn.Module = VisionTransformer(**{**shape, **options, **keywords})
            model.default_cfg = {"pool_size": None}  # type: ignore[assignment]
            return model

        build.__name__ = name
        build.__module__ = __name__
        return build

    import timm

    for name, options in kinds.items():
        if not timm.is_model(name):
            register_model(factory(name, options))


def bert_folder(folder: Path, kind: str = "bert") -> Path:
    """A configuration and a tokenizer of the Hugging Face library, small, made here."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(exist_ok=True)
    specials = ["[UNK]", "[PAD]"] if "roberta" in kind else ["[PAD]", "[UNK]"]  # RoBERTa pads with 1
    pieces = [*specials, "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789.,;:()&-'"]
    pieces += [f"##{c}" for c in pieces[4:]] + ["chest", "left", "no", "tea", "pleural"]
    engine = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=engine, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(str(folder))
    config: dict[str, Any] = {
        "model_type": kind, "vocab_size": len(pieces), "hidden_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 1, "intermediate_size": 96, "max_position_embeddings": 40,
    }  # fmt: skip
    if "roberta" in kind:
        config["layer_norm_eps"] = 1e-5  # as the published ones state
    if kind == "t5":
        config = {
            "model_type": "mt5", "vocab_size": len(pieces), "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2,
            "num_heads": 4, "is_encoder_decoder": True, "pad_token_id": 0, "decoder_start_token_id": 0,
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build(folder: Path, model_cfg: dict[str, Any], preprocess: dict[str, Any] | None = None) -> Path:
    """Write a hub directory with open_clip's own model class, random weights, and what old files hold besides."""
    import open_clip
    from open_clip.coca_model import CoCa

    folder.mkdir(exist_ok=True)
    keywords = json.loads(json.dumps(model_cfg))
    custom = keywords.pop("custom_text", False) or "hf_model_name" in model_cfg["text_cfg"]
    kind: Any = open_clip.CLIP
    if custom:
        kind = CoCa if "multimodal_cfg" in model_cfg else open_clip.CustomTextCLIP
    if "hf_model_name" in model_cfg["text_cfg"]:
        keywords["text_cfg"]["hf_model_pretrained"] = False
    model = kind(**keywords)
    randomise(model)
    state = dict(model.state_dict())
    if "hf_model_name" in model_cfg["text_cfg"] and model_cfg["text_cfg"].get("hf_pooler_type"):
        state["text.transformer.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    stated = {"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(stated))
    return folder


def peer_of(folder: Path) -> tuple[Any, Callable[..., Tensor], Callable[..., Tensor]]:
    import open_clip

    source = folder.with_name("peer")  # a copy: ours may be mapped into memory
    shutil.copytree(folder, source, dirs_exist_ok=True)
    state = torch.load(source / "open_clip_pytorch_model.bin", weights_only=True)
    state.pop("text.transformer.embeddings.position_ids", None)  # transformers 5 has no such buffer
    torch.save(state, source / "open_clip_pytorch_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{source}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{source}")
    return model.eval(), transform, tokenizer


def compare(ours: Encoder, peer: Any, transform: Any, tokenizer: Any) -> tuple[float, float]:
    """Errors of images and texts; pixels and ids must be equal."""
    images = make_test_images(3)
    pixels = torch.stack([transform(image) for image in images])
    assert torch.equal(torch.stack([ours.preprocess(image) for image in images]), pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = tokenizer(TEXTS)
        assert torch.equal(ours.tokenizer(TEXTS), ids)
        with torch.inference_mode():
            text_error = error(ours.encode_text(TEXTS), peer.encode_text(ids, normalize=False))
            return error(ours.encode_image(pixels), peer.encode_image(pixels, normalize=False)), text_error


def with_config(encoder: Encoder, **changed: Any) -> Encoder:
    """The same weights in a model with another declaration."""
    config = replace(
        encoder.config,
        image=replace(encoder.config.image, **changed.get("image", {})),
        text=replace(encoder.config.text, **changed.get("text", {})),
    )
    return Encoder(filled_model(config, encoder.model.state_dict()), config, name="wrong")


TIMM = {"timm_model_name": "vit_tiny_patch16_64", "timm_model_pretrained": False, "timm_pool": "", "image_size": 64}
BIOMED_TEXT = {
    "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 32
}  # fmt: skip
SIGLIP_TEXT = {
    **TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-3},
    "mlp_ratio": 3.7362,
}  # fmt: skip


@pytest.mark.parametrize(
    "vision",
    [
        {"timm_proj": "linear"},
        {"timm_proj": "linear", "timm_proj_bias": True, "timm_pool": "avg"},
        {"timm_model_name": "vit_tiny_patch16_clip_64", "timm_proj": "none", "timm_pool": "token"},
        {"timm_model_name": "vit_tiny_patch16_clip_quickgelu_64", "timm_proj": "linear"},
        {"timm_model_name": "vit_tiny_patch16_siglip_64", "timm_pool": "map", "timm_proj": "none"},
        {"timm_model_name": "vit_tiny_patch16_siglip_gap_64", "timm_pool": "avg", "timm_proj": "linear"},
    ],
    ids=["plain", "mean-bias", "clip", "quickgelu", "siglip", "gap"],
)
@pytest.mark.parametrize("quick", [False, True])
def test_a_timm_tower(tmp_path: Path, vision: dict[str, Any], quick: bool) -> None:
    register_timm()
    model = {
        "embed_dim": 48,
        "quick_gelu": quick,
        "vision_cfg": {**TIMM, **vision},
        "text_cfg": TEXT,
        "custom_text": True,
    }
    folder = build(tmp_path / "model", model)
    image_error, text_error = compare(load(folder), *peer_of(folder))
    assert max(image_error, text_error) <= TIGHT


def test_biomedclip_in_small(tmp_path: Path) -> None:
    register_timm()
    folder = bert_folder(tmp_path / "model")
    text = {**BIOMED_TEXT, "hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    model = {"embed_dim": 40, "vision_cfg": {**TIMM, "timm_proj": "linear"}, "text_cfg": text}
    build(folder, model, {"mean": [0.48, 0.45, 0.40], "std": [0.26, 0.26, 0.27]})
    ours = load(folder)
    assert "text.transformer.model.pooler.dense.weight" not in ours.model.state_dict()
    parts = peer_of(folder)
    assert max(compare(ours, *parts)) <= TIGHT
    (folder / "config.json").unlink()  # the hub's folder has none: BERT's shape is read off the weights
    assert max(compare(load(folder), *parts)) <= TIGHT
    for wrong in ({"image": {"activation": "quick_gelu"}}, {"image": {"ln_eps": 1e-3}}, {"image": {"pool": "mean"}}):
        assert compare(with_config(ours, **wrong), *parts)[0] > 10 * TIGHT
    assert compare(with_config(ours, text={"pool": "mean"}), *parts)[1] > 10 * TIGHT
    with torch.no_grad():  # without its projection
        ours.model.visual.proj.copy_(torch.eye(*ours.model.visual.proj.shape))
        ours.model.text.proj[0].weight.copy_(torch.eye(*ours.model.text.proj[0].weight.shape))
    assert min(compare(ours, *parts)) > 10 * TIGHT


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler", None])
@pytest.mark.parametrize("projection", ["linear", "mlp", None])
def test_poolers_and_projections_of_a_bert(tmp_path: Path, pooler: str | None, projection: str | None) -> None:
    folder = bert_folder(tmp_path / "model")
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "context_length": 32}
    text |= {"hf_pooler_type": pooler, "hf_proj_type": projection}
    build(folder, {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": text})
    ours, parts = load(folder), peer_of(folder)
    assert max(compare(ours, *parts)) <= TIGHT
    if pooler == "mean_pooler":
        assert compare(with_config(ours, text={"pool": "eot"}), *parts)[1] > 10 * TIGHT
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = parts[2](TEXTS)
        unmasked = ours.model.text.proj(ours.model.text.transformer(ids, torch.ones_like(ids)))  # padding is seen
        assert error(unmasked, parts[0].encode_text(ids)) > 10 * TIGHT


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_a_roberta_without_its_configuration(tmp_path: Path, kind: str) -> None:
    folder = bert_folder(tmp_path / f"small-{kind}", kind)
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "context_length": 32}
    text |= {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    build(folder, {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": text})
    parts = peer_of(folder)
    assert max(compare(load(folder), *parts)) <= TIGHT
    (folder / "config.json").unlink()
    ours = load(folder)
    assert max(compare(ours, *parts)) <= TIGHT
    stated = {**ours.config.text.options["config"], "layer_norm_eps": 1e-3}
    assert compare(with_config(ours, text={"options": {"config": stated}}), *parts)[1] > 10 * TIGHT


def test_the_encoder_of_t5(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "model", "t5")
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "context_length": 32}
    text |= {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}
    build(folder, {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": text})
    assert max(compare(load(folder), *peer_of(folder))) <= TIGHT


@pytest.mark.parametrize("queries", [1, 5])
def test_coca(tmp_path: Path, queries: int) -> None:
    vision = {**VISION, "attentional_pool": True, "attn_pooler_queries": queries, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    model = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, "multimodal_cfg": decoder, "custom_text": True}
    folder = build(tmp_path / "model", model)
    ours, parts = load(folder), peer_of(folder)
    assert max(compare(ours, *parts)) <= TIGHT
    assert compare(with_config(ours, text={"cls_mask": "correct"}), *parts)[1] > 10 * TIGHT
    parts[0].text.correct_cls_mask = True  # no configuration of open_clip 3.3 sets it, its tower has it
    assert compare(with_config(ours, text={"cls_mask": "correct"}), *parts)[1] <= TIGHT
    assert compare(ours, *parts)[1] > 10 * TIGHT


@pytest.mark.parametrize("tanh", [False, True])
def test_siglip(tmp_path: Path, tanh: bool) -> None:
    register_timm()
    folder = bert_folder(tmp_path / "model")
    text = {**SIGLIP_TEXT, "hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"clean": "canonicalize"}}
    text |= {"act_kwargs": {"approximate": "tanh"}} if tanh else {}
    vision = {**TIMM, "timm_model_name": "vit_tiny_patch16_siglip_64", "timm_pool": "map", "timm_proj": "none"}
    model = {"embed_dim": 48, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    build(folder, model, {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"})
    ours, parts = load(folder), peer_of(folder)
    assert max(compare(ours, *parts)) <= TIGHT
    assert ours.logit_bias == pytest.approx(float(parts[0].logit_bias.detach()))
    wrong: list[dict[str, Any]] = [{"pool": "eot"}, {"causal": True}, {"ln_eps": 1e-5}, {"activation": "quick_gelu"}]
    for change in wrong:
        assert compare(with_config(ours, text=change), *parts)[1] > 10 * TIGHT, change
    assert compare(with_config(ours, image={"activation": "quick_gelu"}), *parts)[0] > 10 * TIGHT


def test_quick_gelu_and_its_override(tmp_path: Path) -> None:
    """A fine-tune of OpenAI's weights whose configuration forgot ``quick_gelu`` (open_clip issue 771)."""
    folder = build(tmp_path / "model", {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True})
    parts = peer_of(folder)
    assert max(compare(load(folder), *parts)) <= TIGHT
    assert min(compare(load(folder, activation="gelu"), *parts)) > 10 * TIGHT
    ours = load(folder)
    ids, lengths, _ = ours.tokenizer.encode(TEXTS)
    with torch.inference_mode():
        expected = parts[0].encode_text(ids)
        assert error(ours.model.encode_text(ids, lengths), expected) <= TIGHT
        assert error(ours.model.encode_text(ids, lengths - 1), expected) > 10 * TIGHT  # not the end of the text
    config = folder / "open_clip_config.json"
    config.write_text(config.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    assert min(compare(load(folder), *parts)) > 10 * TIGHT
    assert max(compare(load(folder, activation="quick_gelu"), *parts)) <= TIGHT


@pytest.mark.parametrize(("size", "wrong"), [(112, {"mode": "bilinear"}), (32, {"antialias": False})])
def test_positions_for_another_image_size(tmp_path: Path, size: int, wrong: dict[str, Any]) -> None:
    import open_clip

    folder = build(tmp_path / "model", {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT})
    config = folder / "open_clip_config.json"
    config.write_text(config.read_text().replace('"image_size": 64', f'"image_size": {size}'))
    ours, parts = load(folder), peer_of(folder)
    assert ours.preprocess_spec.size == size
    assert max(compare(ours, *parts)) <= TIGHT
    assert isinstance(parts[0], open_clip.CLIP)
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)["visual.positional_embedding"]
    planes = state[1:].reshape(4, 4, -1).permute(2, 0, 1)[None]

    def resized(**options: Any) -> Tensor:
        rule: dict[str, Any] = {"mode": "bicubic", "antialias": True, **options}
        grid = torch.nn.functional.interpolate(planes, (size // 16, size // 16), **rule)[0]
        return torch.cat([state[:1], grid.permute(1, 2, 0).flatten(0, 1)])

    positions: Tensor = ours.model.visual.positional_embedding
    assert torch.allclose(positions, resized(), atol=1e-6)
    with torch.no_grad():
        positions.copy_(resized(**wrong))
    assert compare(ours, *parts)[0] > 10 * TIGHT


def test_a_training_checkpoint_beside_its_configuration(tmp_path: Path) -> None:
    register_timm()
    model = {"embed_dim": 48, "vision_cfg": {**TIMM, "timm_proj": "linear"}, "text_cfg": TEXT, "custom_text": True}
    folder = build(tmp_path / "model", model)
    parts = peer_of(folder)
    file = folder / "open_clip_pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    file.unlink()
    wrapped = {"epoch": 7, "name": "run", "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(wrapped, folder / "epoch_7.pt")
    assert max(compare(load(folder), *parts)) <= TIGHT
    assert max(compare(load(folder / "epoch_7.pt"), *parts)) <= TIGHT
