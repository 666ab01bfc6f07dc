"""BiomedCLIP, BioCLIP, PLIP and QuiltNet by name, from small files in the forms of the published ones."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.checkpoints import huggingface
from chiasm.checkpoints.open_clip_names import from_native
from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import CheckpointError, ConfigError
from chiasm.load import get_tokenizer, load

SMALL_CLIP: dict[str, Any] = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "heads": 1}


def small(config: EncoderConfig) -> EncoderConfig:
    """The same declaration with two blocks of 64 channels."""
    image = dataclasses.replace(config.image, **SMALL_CLIP)
    text = config.text
    if text.kind == "clip":
        text = dataclasses.replace(text, width=64, layers=2, heads=1)
    else:
        bert = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 48}
        options = {"config": {**text.options["config"], **bert, "vocab_size": 90}}
        text = dataclasses.replace(text, options=options)
    preprocess = dataclasses.replace(config.preprocess, size=32)
    projection = dataclasses.replace(config.projection, dim=48)
    return dataclasses.replace(config, image=image, text=text, preprocess=preprocess, projection=projection)


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> dict[str, EncoderConfig]:
    """The catalog with these models in small."""
    configs = {}
    find = CATALOG.find
    for name in ("biomedclip", "bioclip", "plip", "quiltnet-b-32", "quiltnet-b-16", "quiltnet-b-16-pmb"):
        configs[name] = small(CATALOG.get(name).config)

    def found(name: str) -> Any:
        entry = find(name)
        if entry is None or entry.name not in configs:
            return entry
        return dataclasses.replace(entry, config=configs[entry.name])

    monkeypatch.setattr(CATALOG, "find", found)
    return configs


def weights(config: EncoderConfig) -> dict[str, Tensor]:
    return dict(build_encoder_model(config, seed=1).state_dict())


def folder(path: Path, config: EncoderConfig, model: dict[str, Any]) -> Path:
    path.mkdir()
    torch.save(from_native(weights(config), config.to_dict()), path / "open_clip_pytorch_model.bin")
    stated = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (path / "open_clip_config.json").write_text(json.dumps(stated))
    return path


CLIP_CFG: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "layers": 2, "heads": 1},
}


@pytest.mark.parametrize("name", ["bioclip", "quiltnet-b-32", "quiltnet-b-16"])
def test_a_folder_is_obeyed_and_its_activation_told(
    tmp_path: Path, catalog: dict[str, EncoderConfig], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = folder(tmp_path / "hub", catalog[name], CLIP_CFG)
    with caplog.at_level(logging.INFO, logger="chiasm"):
        ours = load(path, family=name)
    assert ours.name == name
    assert torch.equal(get_tokenizer(path)("a leaf"), ours.tokenizer("a leaf"))
    assert ours.config.text.activation == "gelu"
    assert ours.preprocess_spec.std == (0.25, 0.25, 0.25)
    assert "was trained with quick_gelu, its folder states gelu" in caplog.text
    assert "activation gelu (image), gelu (text)" in caplog.text
    right = load(path, family=name, activation="quick_gelu")
    assert right.config.image.activation == right.config.text.activation == "quick_gelu"
    quick = folder(tmp_path / "quick", catalog[name], {**CLIP_CFG, "quick_gelu": True})
    caplog.clear()
    assert load(quick, family=name).config.text.activation == "quick_gelu"
    assert "was trained" not in caplog.text
    bare = load(path / "open_clip_pytorch_model.bin", family=name)  # without the folder's word: as it was trained
    assert bare.config.text.activation == "quick_gelu"


@pytest.mark.parametrize("name", ["biomedclip", "quiltnet-b-16-pmb"])
def test_a_bare_file_of_timm_and_bert(tmp_path: Path, catalog: dict[str, EncoderConfig], name: str) -> None:
    config = catalog[name]
    state = from_native(weights(config), config.to_dict())
    assert "visual.trunk.pos_embed" in state
    assert "text.proj.2.weight" in state
    state["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "epoch_3.pt")
    ours = load(tmp_path / "epoch_3.pt", family=name)
    for key, tensor in weights(config).items():
        assert torch.equal(ours.model.state_dict()[key], tensor), key
    assert ours.config.tokenizer["context_length"] == 256
    with pytest.raises(CheckpointError, match="not those of a CLIP in a layout") as caught:
        load(tmp_path / "epoch_3.pt")
    assert "open_clip_config.json" in str(caught.value.hint)


def test_another_model_under_a_name(tmp_path: Path, catalog: dict[str, EncoderConfig]) -> None:
    path = folder(tmp_path / "hub", catalog["bioclip"], CLIP_CFG)
    with pytest.raises(CheckpointError, match="text side is another one"):
        load(path, family="biomedclip")


@pytest.mark.parametrize("name", ["plip", "quiltnet-b-32"])
def test_a_folder_of_transformers(tmp_path: Path, catalog: dict[str, EncoderConfig], name: str) -> None:
    state = huggingface.to_huggingface(weights(catalog[name]))
    torch.save(state, tmp_path / "pytorch_model.bin")
    shape = {"num_attention_heads": 1, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "clip", "text_config": shape, "vision_config": shape})
    )
    ours = load(tmp_path, family=name)
    assert ours.name == name
    for key, tensor in weights(catalog[name]).items():
        assert torch.equal(ours.model.state_dict()[key], tensor), key


def test_plip_in_openais_keys(tmp_path: Path, catalog: dict[str, EncoderConfig]) -> None:
    torch.save(weights(catalog["plip"]), tmp_path / "epoch_7.pt")
    ours = load(tmp_path / "epoch_7.pt", family="plip")
    assert ours.config.text.activation == "quick_gelu"


def test_an_activation_that_does_not_exist(tmp_path: Path, catalog: dict[str, EncoderConfig]) -> None:
    path = folder(tmp_path / "hub", catalog["bioclip"], CLIP_CFG)
    with pytest.raises(ConfigError, match="unknown activation `relu`"):
        load(path, activation="relu")
