"""What the names of open_clip's models and of timm's ViTs mean, against the models that those packages build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chiasm.checkpoints.export_open_clip import _TIMM_NAMES
from chiasm.checkpoints.open_clip_config import config_of
from chiasm.checkpoints.open_clip_names import from_native, to_native
from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.errors import CheckpointError

pytestmark = pytest.mark.peer

TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
#: open_clip's own models that chiasm refuses, by the tower that it does not have.
OTHERS = ("eva", "convnext", "fastvit", "mci", "vitamin", "pe_core", "swin", "relpos", "gap_256")


def timm_names() -> list[str]:
    import timm

    found = {name for name in timm.list_models("vit_*") if "_siglip_" in name or "_clip_" in name}
    kept = {name for name in found if "plus" not in name and "xsmall" not in name and "so150m" not in name}
    every = sorted(kept | set(_TIMM_NAMES), reverse=True)
    several = "large_patch16_siglip"  # of others one resolution says enough
    seen: set[str] = set()
    result = []
    for name in every:
        stem = name.rpartition("_")[0]
        if (stem not in seen and "giga" not in name) or several in name:
            result.append(name)
        seen.add(stem)
    return result


def shapes_of(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    return model, {f"visual.trunk.{k}": v for k, v in model.state_dict().items()}


def test_timm_names() -> None:
    from timm.layers import QuickGELU

    for name in timm_names():
        model, tensors = shapes_of(name)
        size = model.patch_embed.img_size[0]
        siglip = "siglip" in name
        pool = "avg" if "gap" in name else "map" if siglip else "token"
        vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": size}
        config = config_of({"embed_dim": 8, "vision_cfg": vision, "text_cfg": TEXT}, tensors, Path())["image"]
        block = model.blocks[0]
        assert config["heads"] == block.attn.num_heads, name
        assert config["layers"] == len(model.blocks), name
        assert config["patch_size"] == model.patch_embed.patch_size[0], name
        assert int(config["width"] * config["mlp_ratio"]) == block.mlp.fc1.out_features, name
        assert config["ln_eps"] == block.norm1.eps, name
        assert config["pre_norm"] == (not isinstance(model.norm_pre, torch.nn.Identity)), name
        assert config.get("class_token", True) == (model.cls_token is not None), name
        activation = "gelu"
        if isinstance(block.mlp.act, QuickGELU):
            activation = "quick_gelu"
        elif getattr(block.mlp.act, "approximate", "none") == "tanh" or "Tanh" in type(block.mlp.act).__name__:
            activation = "gelu_tanh"
        assert config["activation"] == activation, (name, block.mlp.act)


def test_every_configuration_of_open_clip_is_understood_or_refused() -> None:
    import open_clip

    folder = Path(open_clip.__file__).parent / "model_configs"
    understood, refused = [], []
    for file in sorted(folder.glob("*.json")):
        model = json.loads(file.read_text())
        name = str(model["vision_cfg"].get("timm_model_name", ""))
        if "giant" in name or "so400m" in name:  # as the smaller ones; seconds each
            continue
        tensors = shapes_of(name)[1] if name.startswith("vit_") and not any(o in name for o in OTHERS) else {}
        try:
            config_of(model, tensors, Path())
            understood.append(file.stem)
        except CheckpointError as error:
            refused.append((file.stem, name, error.message))
    for model_name, name, message in refused:
        if "CLIPA" in model_name:  # a LayerNorm behind the mean, which chiasm's ViT does not have
            assert "the pooling in `vision_cfg`" in message
            continue
        foreign = "states no configuration" in message  # a Hugging Face text tower, whose folder has it
        assert foreign or any(o in name for o in OTHERS) or "MobileCLIP" in model_name, (model_name, message)
    assert len(understood) >= 60, len(understood)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP-384", "coca_ViT-L-14", "RN50x4"])
def test_full_size_names_and_shapes_both_ways(name: str) -> None:
    """Without memory: every tensor of the model in full size has its place here, and its way back."""
    import open_clip
    from open_clip.coca_model import CoCa

    stated = open_clip.get_model_config(name)
    keywords = json.loads(json.dumps(stated))
    custom = keywords.pop("custom_text", False)
    kind: Any = CoCa if "multimodal_cfg" in keywords else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.device("meta"):
        theirs = kind(**keywords).state_dict()
    values = config_of(stated, theirs, Path())
    values["preprocess"] = {"size": values["image"]["image_size"]}
    config = EncoderConfig.from_dict(values)
    ours = build_encoder_model(config, device="meta").state_dict()
    converted = to_native(theirs, config.to_dict())
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.items()}
    back = from_native(ours, config.to_dict())
    assert set(back) == {key for key in theirs if not key.startswith("text_decoder.")}
    for key, tensor in back.items():
        if key != "visual.attn_pool.query":  # of CoCa's queries the first is the embedding
            assert tensor.shape == theirs[key].shape, key
