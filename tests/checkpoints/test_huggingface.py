"""transformers' CLIP: names there and back, and the directory it writes itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.checkpoints.huggingface import (
    is_huggingface_layout,
    preprocess_of,
    read_model_dir,
    to_huggingface,
    to_openai,
)
from chiasm.encoders.base import EncoderConfig
from chiasm.errors import CheckpointError
from chiasm.types import Preprocess

Make = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``CLIPModel.save_pretrained`` writes, small, with random weights."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = text | {"image_size": 24, "patch_size": 8, "layer_norm_eps": 1e-6, "hidden_size": 64}
    text |= {"hidden_size": 64, "hidden_act": "gelu"}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    folder = tmp_path_factory.mktemp("hf") / "clip-tiny"
    model.save_pretrained(folder)
    processor = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "resample": 2,
                 "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "do_convert_rgb": True}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_names_there_and_back(openai_vit: Make) -> None:
    tensors = openai_vit()
    theirs = to_huggingface(tensors)
    assert is_huggingface_layout(theirs)
    back = to_openai(theirs)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)


def test_names_are_those_of_transformers(clip_dir: Path) -> None:
    from transformers import CLIPModel

    state = CLIPModel.from_pretrained(clip_dir).state_dict()
    again = to_huggingface(to_openai(state))
    assert set(again) == {k for k in state if "position_ids" not in k}
    assert all(torch.equal(again[k], state[k]) for k in again)
    older = state | {"text_model.embeddings.position_ids": torch.arange(77)}
    assert set(to_openai(older)) == set(to_openai(state))


def test_directory(clip_dir: Path) -> None:
    tensors, values = read_model_dir(clip_dir)
    config = EncoderConfig.from_dict(values)
    assert config.image.ln_eps == 1e-6
    assert (config.image.heads, config.text.heads) == (2, 2)
    assert (config.image.activation, config.text.activation) == ("quick_gelu", "gelu")
    expected = Preprocess(24, interpolation="bilinear", rgb="before_resize", mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert config.preprocess == expected
    assert "visual.transformer.resblocks.1.attn.in_proj_weight" in tensors


def test_shards(clip_dir: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_dir)
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file()
    whole, _ = read_model_dir(clip_dir)
    parts, _ = read_model_dir(tmp_path)
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    content = json.loads(index.read_text())
    for shards, message in (
        ({"a": "../outside.safetensors"}, "outside of its directory"),
        ({"a": "/etc/passwd"}, "outside of its directory"),
        (content["weight_map"] | {"ghost": next(iter(content["weight_map"].values()))}, "no shard holds"),
        ({"a": "absent.safetensors"}, "does not exist"),
        (["a"], "lists no shards"),
        ({"a": 3}, "lists no shards"),
    ):
        index.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(CheckpointError, match=message):
            read_model_dir(tmp_path)


def test_other_models_are_refused(tmp_path: Path, clip_dir: Path) -> None:
    stated = json.loads((clip_dir / "config.json").read_text())

    def with_config(change: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(stated | change))
        return tmp_path

    with pytest.raises(CheckpointError, match="`bert` model"):
        read_model_dir(with_config({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="has no weights"):
        read_model_dir(with_config({}))
    (tmp_path / "model.safetensors").symlink_to(clip_dir / "model.safetensors")
    for change, message in (
        ({"text_config": {"hidden_act": "relu"}}, "activation `relu`"),
        ({"text_config": {"layer_norm_eps": "x"}}, "must be a number"),
        ({"vision_config": {"num_attention_heads": "12"}}, "must be an integer"),
        ({"vision_config": {"layer_norm_eps": "x"}}, "must be a number"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_model_dir(with_config(change))


def test_foreign_names(openai_vit: Make) -> None:
    with pytest.raises(CheckpointError, match=r"no place for `visual\.attnpool"):
        to_huggingface({"visual.attnpool.q_proj.weight": torch.zeros(2)})
    theirs = to_huggingface(openai_vit())
    with pytest.raises(CheckpointError, match="no weight of transformers"):
        to_openai(theirs | {"decoder.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="2"):
        to_openai(theirs | {"text_projection.weight": torch.zeros(2)})
    del theirs["text_model.encoder.layers.0.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match="cannot be joined"):
        to_openai(theirs)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, Preprocess(rgb="before_resize")),
        ({"size": 336, "crop_size": 336, "do_convert_rgb": False}, Preprocess(336, crop_rounding="down")),
        ({"size": {"height": 96, "width": 96}, "do_center_crop": False},
         Preprocess(96, resize="squash", crop="none", rgb="before_resize")),
        ({"size": {"shortest_edge": 256}}, None),
        ({"size": {"height": 96, "width": 90}}, None),
        ({"size": {"shortest_edge": [2]}}, None),
        ({"do_resize": False}, None),
        ({"do_normalize": False}, None),
        ({"rescale_factor": 1.0}, None),
        ({"resample": 99}, None),
        ({"image_mean": [1, 2]}, None),
    ],
)  # fmt: skip
def test_preprocessing(stated: dict[str, Any], expected: Preprocess | None) -> None:
    if expected is not None:
        assert Preprocess.from_dict(preprocess_of(stated)) == expected
        return
    with pytest.raises(CheckpointError):
        preprocess_of(stated)
