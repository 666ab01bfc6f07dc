"""open_clip's hub directory for native models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from chiasm.checkpoints.open_clip import preprocess_of, read_model_dir
from chiasm.encoders.base import EncoderConfig
from chiasm.errors import CheckpointError
from chiasm.types import Preprocess

Make = Callable[..., dict[str, Tensor]]
VISION = {"image_size": 24, "layers": 2, "width": 64, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3}
MODEL = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}


def write(folder: Path, tensors: dict[str, Tensor], model: object = MODEL, preprocess: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "open_clip_model.safetensors")
    stated = {"model_cfg": model, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(stated))
    return folder


def test_configuration_comes_from_the_directory(tmp_path: Path, openai_vit: Make) -> None:
    stated = {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear", "resize_mode": "squash"}
    tensors, values = read_model_dir(write(tmp_path, openai_vit(), MODEL, stated))
    config = EncoderConfig.from_dict(values)
    assert config.image.activation == config.text.activation == "gelu"
    assert (config.image.heads, config.text.heads) == (1, 4)
    expected = Preprocess(24, "squash", "none", "bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    assert config.preprocess == expected
    assert tensors["logit_scale"].shape == ()


def test_quick_gelu_head_width_and_bin_file(tmp_path: Path, openai_vit: Make) -> None:
    model = MODEL | {"quick_gelu": True, "vision_cfg": VISION | {"head_width": 16}}
    write(tmp_path, openai_vit(), model)
    (tmp_path / "open_clip_model.safetensors").unlink()
    custom = {k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in openai_vit().items()}
    torch.save(custom, tmp_path / "open_clip_pytorch_model.bin")
    tensors, values = read_model_dir(tmp_path)
    assert values["image"]["activation"] == "quick_gelu"
    assert values["image"]["heads"] == 4
    assert set(tensors) == set(openai_vit())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODEL | {"vision_cfg": {"timm_model_name": "vit_base_patch16_224"}}, "lack `visual.trunk.patch_embed"),
        (MODEL | {"vision_cfg": {"timm_model_name": "convnext_base"}}, "`convnext_base` of timm is not one"),
        (MODEL | {"text_cfg": {"hf_model_name": "bert"}}, "states no configuration"),
        (MODEL | {"vision_cfg": VISION | {"qk_norm": True}}, "`vision_cfg.qk_norm`"),
        (MODEL | {"vision_cfg": VISION | {"attentional_pool": "parallel"}}, "not the pooling of CoCa"),
        (MODEL | {"vision_cfg": VISION | {"pool_type": "none"}}, "pooling"),
        (MODEL | {"vision_cfg": VISION | {"norm_kwargs": {"affine": False}}}, "norm_kwargs"),
        (MODEL | {"text_cfg": TEXT | {"act_kwargs": {"inplace": True}}}, "act_kwargs"),
        (MODEL | {"text_cfg": TEXT | {"tokenizer_kwargs": {"strip_sep_token": True}}}, "strip_sep_token"),
        (MODEL | {"surprise": 1}, "`model_cfg.surprise`"),
        (MODEL | {"vision_cfg": VISION | {"head_width": 0}}, "head_width"),
        ({"embed_dim": 16}, "lacks `vision_cfg`"),
        (None, "lacks `model_cfg`"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, openai_vit: Make, model: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model_dir(write(tmp_path, openai_vit(), model))


def test_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not those of a CLIP of open_clip"):
        read_model_dir(write(tmp_path, {"visual.trunk.cls_token": torch.zeros(2)}))


def test_positions_are_resized_to_the_stated_image_and_context(tmp_path: Path, openai_vit: Make) -> None:
    changed = MODEL | {"vision_cfg": VISION | {"image_size": 40}, "text_cfg": TEXT | {"context_length": 40}}
    tensors, values = read_model_dir(write(tmp_path, openai_vit(), changed))
    assert values["image"]["image_size"] == 40
    assert tensors["visual.positional_embedding"].shape == (26, 64)
    assert tensors["positional_embedding"].shape == (40, 128)


@pytest.mark.parametrize(
    "stated", [{"resize_mode": "strange"}, {"interpolation": "area"}, {"size": 99}, {"mean": [1]}, {"std": ["a", 1, 1]}]
)
def test_preprocessing_that_is_refused(stated: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        preprocess_of(stated, 24)


def test_longest_side_with_padding() -> None:
    found = Preprocess.from_dict(preprocess_of({"resize_mode": "longest", "fill_color": 5, "size": [24, 24]}, 24))
    assert (found.resize, found.crop, found.fill) == ("longest_pad", "none", 5)
