"""Towers of transformers: same numbers as transformers itself, and rebuilt from what a saved model states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chiasm.encoders.adapters import apply_lora, freeze, merge_lora
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, LoraConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.huggingface import build_huggingface_image_tower, build_huggingface_text_tower
from chiasm.errors import CheckpointError, ConfigError, InputError
from chiasm.types import Preprocess

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES: dict[str, dict[str, Any]] = {
    "vit": SMALL | {"image_size": 32, "patch_size": 8},
    "dinov2": SMALL | {"image_size": 32, "patch_size": 8},
    "dinov2_with_registers": SMALL | {"image_size": 32, "patch_size": 8, "num_register_tokens": 4},
    "swin": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "image_size": 32,
        "patch_size": 4,
        "window_size": 4,
    },
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
}
TEXTS: dict[str, dict[str, Any]] = {
    "bert": SMALL | {"vocab_size": 60},
    "roberta": SMALL | {"vocab_size": 60},
    "megatron-bert": SMALL | {"vocab_size": 60},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 60},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 60},
}


def image_config(kind: str, pool: str = "mean", **change: Any) -> ImageTowerConfig:
    options = {"config": {"model_type": kind, **IMAGES[kind]}}
    return ImageTowerConfig(**{"kind": "huggingface", "source": kind, "image_size": 32, "pool": pool, "options": options} | change)  # fmt: skip


def text_config(kind: str, pool: str = "mean", **change: Any) -> TextTowerConfig:
    options = {"config": {"model_type": kind, **TEXTS[kind]}}
    return TextTowerConfig(**{"kind": "huggingface", "source": kind, "context_length": 12, "pool": pool, "options": options} | change)  # fmt: skip


def randomise(module: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_image_towers(kind: str, pixels: Tensor) -> None:
    tower = build_huggingface_image_tower(image_config(kind)).eval()
    randomise(tower)
    with torch.inference_mode():
        output = tower(pixels)
        patches = tower.patch_tokens(pixels)
        assert output.shape == (3, tower.output_dim)
        assert patches.shape[0] == 3
        assert patches.shape[1] == patches.shape[2]
        assert patches.shape[3] == tower.output_dim
        torch.testing.assert_close(patches.mean((1, 2)), output)
        torch.testing.assert_close(tower(pixels[1:2]), output[1:2], rtol=1e-4, atol=1e-5)
        assert tower(pixels[:0]).shape == (0, tower.output_dim)
        raw = tower.model(pixel_values=pixels)
        own = build_huggingface_image_tower(image_config(kind, "none")).eval()
        own.model.load_state_dict(tower.model.state_dict(), strict=False)
        assert own(pixels).shape == output.shape
        if kind in ("vit", "dinov2", "dinov2_with_registers"):
            first = build_huggingface_image_tower(image_config(kind, "cls")).eval()
            first.model.load_state_dict(tower.model.state_dict())
            torch.testing.assert_close(first(pixels), raw.last_hidden_state[:, 0])
            assert patches.shape[1:3] == (4, 4)
        else:
            with pytest.raises(ConfigError, match="no class token"):
                build_huggingface_image_tower(image_config(kind, "cls"))


def test_registers_are_no_patches(pixels: Tensor) -> None:
    tower = build_huggingface_image_tower(image_config("dinov2_with_registers")).eval()
    with torch.inference_mode():
        hidden = tower.model(pixel_values=pixels).last_hidden_state
        assert hidden.shape[1] == 1 + 4 + 16
        torch.testing.assert_close(tower(pixels), hidden[:, 5:].mean(1))
        assert not torch.allclose(tower(pixels), hidden[:, 1:].mean(1))  # the trap: registers in the mean


def test_a_vit_takes_another_image_size(pixels: Tensor) -> None:
    options = {"config": {"model_type": "vit", **IMAGES["vit"], "image_size": 64}}
    tower = build_huggingface_image_tower(image_config("vit", options=options)).eval()
    with torch.inference_mode():
        assert tower.patch_tokens(pixels).shape == (3, 4, 4, 32)


@pytest.mark.parametrize("kind", sorted(TEXTS))
@pytest.mark.parametrize("pool", ["mean", "cls", "eot", "last"])
def test_text_towers_see_no_padding(kind: str, pool: str) -> None:
    tower = build_huggingface_text_tower(text_config(kind, pool)).eval()
    randomise(tower)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 4, 1])
    mask = (torch.arange(9) < lengths[:, None]).long()
    with torch.inference_mode():
        output = tower(ids, mask)
        assert output.shape == (3, 32) == (3, tower.output_dim)
        assert tower(ids[:0], mask[:0]).shape == (0, 32)
        for row, length in enumerate(lengths.tolist()):
            alone = tower(ids[row : row + 1, :length], mask[row : row + 1, :length])
            if pool != "last":
                torch.testing.assert_close(output[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        changed = torch.where(mask == 1, ids, 7)
        if pool != "last":
            torch.testing.assert_close(tower(changed, mask), output, rtol=1e-4, atol=1e-5)


def test_pooler_of_bert() -> None:
    options = {"config": {"model_type": "bert", **TEXTS["bert"]}, "pooler": True}
    tower = build_huggingface_text_tower(text_config("bert", options=options)).eval()
    ids, mask = torch.randint(3, 60, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    with torch.inference_mode():
        assert torch.equal(tower(ids, mask), tower.model(input_ids=ids, attention_mask=mask).pooler_output)
    assert tower.stored.options["pooler"] is True


@pytest.mark.parametrize("kind", [*sorted(IMAGES), *sorted(TEXTS)])
def test_what_is_stored_rebuilds_the_tower(kind: str, pixels: Tensor) -> None:
    """Through JSON, as in ``encoder.json``; the source is only a name then."""
    is_image = kind in IMAGES
    config: Any = image_config(kind) if is_image else text_config(kind)
    build: Any = build_huggingface_image_tower if is_image else build_huggingface_text_tower
    tower = build(config).eval()
    stored = json.loads(json.dumps({"source": "x", "options": tower.stored.options}))
    again = build(image_config(kind, **stored) if is_image else text_config(kind, **stored)).eval()
    again.load_state_dict(tower.state_dict())
    inputs = (pixels,) if is_image else (torch.randint(3, 60, (2, 5)), torch.ones(2, 5, dtype=torch.long))
    with torch.inference_mode():
        assert torch.equal(tower(*inputs), again(*inputs))
    assert tower.stored == again.stored or tower.stored.options == again.stored.options


@pytest.mark.parametrize("kind", [*sorted(IMAGES), *sorted(TEXTS)])
def test_every_kind_can_be_locked_and_adapted(kind: str, pixels: Tensor) -> None:
    """LoRA by peft: it starts as the tower, trains alone, and merges into the tower's own weights."""
    is_image = kind in IMAGES
    tower: Any = (
        build_huggingface_image_tower(image_config(kind))
        if is_image
        else build_huggingface_text_tower(text_config(kind))
    ).eval()
    randomise(tower)
    inputs = (pixels,) if is_image else (torch.randint(3, 60, (2, 5)), torch.ones(2, 5, dtype=torch.long))
    with torch.inference_mode():
        plain, names = tower(*inputs), set(tower.state_dict())
    apply_lora(freeze(tower), LoraConfig(rank=2))
    torch.testing.assert_close(tower(*inputs), plain, rtol=1e-5, atol=1e-5)
    assert all("lora_" in n for n, p in tower.named_parameters() if p.requires_grad)
    tower(*inputs).square().sum().backward()
    assert any(
        float(p.grad.abs().sum()) > 0 for n, p in tower.named_parameters() if "lora_B" in n and p.grad is not None
    )
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        adapted = tower(*inputs)
        assert not torch.allclose(adapted, plain, atol=1e-4)
        merge_lora(tower)
        torch.testing.assert_close(tower(*inputs), adapted, rtol=1e-3, atol=1e-3)
    assert set(tower.state_dict()) == names


def test_nulls_that_matter_survive() -> None:
    options = {"config": {"model_type": "bert", **TEXTS["bert"], "pad_token_id": None}}
    tower = build_huggingface_text_tower(text_config("bert", options=options))
    assert isinstance(tower.stored.options["config"], str)
    config = EncoderConfig(
        image=ImageTowerConfig(image_size=32, width=32, heads=2, layers=1, patch_size=8),
        text=tower.stored,
        tokenizer={"kind": "clip", "context_length": 12},
        preprocess=Preprocess(32),
    )
    again = EncoderConfig.from_dict(config.to_dict())
    assert json.loads(again.text.options["config"])["pad_token_id"] is None
    build_huggingface_text_tower(again.text)


def test_pretrained_folder(tmp_path: Path) -> None:
    from transformers import AutoConfig, BertForMaskedLM, BertModel

    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **TEXTS["bert"])
    whole = BertForMaskedLM(config).eval()  # a head that the tower does not need, names with a prefix
    whole.save_pretrained(tmp_path / "private-folder")
    source = str(tmp_path / "private-folder")
    tower = build_huggingface_text_tower(text_config("bert", source=source, options={})).eval()
    ids, mask = torch.randint(3, 60, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    with torch.inference_mode():
        expected = whole.bert(input_ids=ids, attention_mask=mask).last_hidden_state.mean(1)
        torch.testing.assert_close(tower(ids, mask), expected)
    assert tower.stored.source == "private-folder"  # no path of this machine goes into a model file
    assert str(tmp_path) not in json.dumps(dict(tower.stored.options))
    with pytest.raises(CheckpointError, match="do not cover BertModel"):
        build_huggingface_text_tower(text_config("bert", source=source, options={"pooler": True}))
    BertModel(config).save_pretrained(tmp_path / "pooled")
    build_huggingface_text_tower(text_config("bert", source=str(tmp_path / "pooled"), options={"pooler": True}))


def test_t5_gives_its_encoder_alone(tmp_path: Path) -> None:
    from transformers import AutoConfig, T5Model

    torch.manual_seed(0)
    model = T5Model(AutoConfig.for_model("t5", **TEXTS["t5"])).eval()
    model.save_pretrained(tmp_path)
    tower = build_huggingface_text_tower(text_config("t5", source=str(tmp_path), options={})).eval()
    assert not any("decoder" in name for name in tower.state_dict())
    ids, mask = torch.randint(3, 60, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    with torch.inference_mode():
        torch.testing.assert_close(tower(ids, mask), model.encoder(input_ids=ids, attention_mask=mask)[0].mean(1))


def test_both_in_a_dual_encoder() -> None:
    config = EncoderConfig(
        image=image_config("dinov2"),
        text=text_config("bert", freeze=True),
        projection=ProjectionConfig(dim=10, image="mlp", text="linear"),
        tokenizer={"kind": "clip", "context_length": 12},
        preprocess=Preprocess(32),
    )
    model = build_encoder_model(config, seed=0).eval()
    names = set(model.state_dict())
    assert any(n.startswith("visual.trunk.model.") for n in names)
    assert "visual.head.2.weight" in names
    assert any(n.startswith("text.transformer.model.") for n in names)
    assert "text.proj.weight" in names
    again = build_encoder_model(config, seed=0).eval()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())  # the seed decides
    ids = torch.randint(3, 60, (2, 12))
    ids[1, 5:] = 0
    with torch.inference_mode():
        by_pad = model.encode_text(ids)
        torch.testing.assert_close(by_pad, model.encode_text(ids, torch.tensor([12, 5])))
        assert model.patch_features(torch.randn(1, 3, 32, 32)).shape == (1, 4, 4, 10)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith("text.transformer") for n in trained)


def test_refusals(tmp_path: Path) -> None:
    def image(**change: Any) -> None:
        build_huggingface_image_tower(image_config("vit", **change))

    def text(**change: Any) -> None:
        build_huggingface_text_tower(text_config("bert", **change))

    with pytest.raises(ConfigError, match=r"unknown field `image\.options\.pooling`"):
        image(options={"pooling": "x"})
    with pytest.raises(ConfigError, match="states no `model_type`"):
        image(options={"config": {"hidden_size": 3}})
    with pytest.raises(ConfigError, match="no configuration of transformers"):
        image(options={"config": {"model_type": "no-such-model"}})
    with pytest.raises(ConfigError, match="no configuration of transformers"):
        image(options={"config": "{"})
    with pytest.raises(ConfigError, match="no configuration of transformers"):
        image(options={"config": {"model_type": "vit", "hidden_size": "wide"}})
    with pytest.raises(ConfigError, match="only native towers know"):
        image(pool="attention")
    with pytest.raises(ConfigError, match="cannot take images of 4 pixels"):
        image(image_size=4)
    with pytest.raises(ConfigError, match="reads at most 512"):
        text(context_length=600)
    with pytest.raises(ConfigError, match="`gone` does not exist"):
        text(source=str(tmp_path / "gone"), options={})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no readable folder"):
        text(source=str(tmp_path / "empty"), options={})
    with pytest.raises(ConfigError, match="nor a name in the local cache"):
        text(source="nobody/no-such-model-here", options={})
    with pytest.raises(InputError, match="`no_such_package` is not installed"):
        text(source="package:no_such_package/model", options={})
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ConfigError, match="whole clip model"):
        image(source=str(tmp_path / "clip"), options={})


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, BertModel

    BertModel(AutoConfig.for_model("bert", **TEXTS["bert"])).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 are missing"):
        build_huggingface_text_tower(text_config("bert", source=str(tmp_path), options={}))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation", "auto_map"])
def test_code_named_in_a_configuration_is_not_fetched(tmp_path: Path, key: str) -> None:
    """transformers takes ``attn_implementation = "org/kernel"`` as a request to download and run that kernel."""
    from transformers import AutoConfig, BertModel

    value: Any = {"AutoModel": "org/repo--code.Model"} if key == "auto_map" else "kernels-community/flash-attn"
    options = {"config": {"model_type": "bert", **TEXTS["bert"], key: value}}
    tower = build_huggingface_text_tower(text_config("bert", options=options))
    assert tower.model.config._attn_implementation == "sdpa"
    assert "kernels-community" not in json.dumps(dict(tower.stored.options))
    BertModel(AutoConfig.for_model("bert", **TEXTS["bert"])).save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    tower = build_huggingface_text_tower(text_config("bert", source=str(tmp_path), options={}))
    assert tower.model.config._attn_implementation == "sdpa"


def test_names_of_the_hub_are_looked_up_in_the_cache_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without chiasm's own offline switch; the hub client itself stays offline here, so nothing leaves the machine."""
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE  # set in tests/conftest.py
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("nobody/no-such-model-here", "no such model", "bad//name"):
        with pytest.raises(ConfigError, match=r"nor a name in the local cache|does not exist"):
            build_huggingface_text_tower(text_config("bert", source=name, options={}))
