"""transformers' ``CLIPModel``: its names as data, both ways, and its model directory.

In: a directory with ``config.json``, weights (safetensors or ``.bin``, whole or in shards) and, where present,
``preprocessor_config.json``; or a flat mapping of names. Out: OpenAI's names and the mapping that
``EncoderConfig.from_dict`` reads. transformers itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoints.containers import read_json, read_state_dict
from chiasm.checkpoints.openai import config_from_state_dict
from chiasm.errors import CheckpointError

#: OpenAI's name -> transformers' name, outside of the blocks.
NAMES: Mapping[str, str] = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # the missing letters are theirs
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
#: Matrices that transformers keeps transposed.
TRANSPOSED: Mapping[str, str] = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
#: Inside a block, without ``.weight`` / ``.bias``.
BLOCK_NAMES: Mapping[str, str] = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCKS: Mapping[str, str] = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
QKV = ("q_proj", "k_proj", "v_proj")
#: Buffers of transformers up to 4.30, counted from 0; they say nothing.
_IGNORED = re.compile(r".*\.embeddings\.position_ids")
_BLOCK = re.compile(r"(.+)\.(\d+)\.(.+)\.(weight|bias)")
_FUSED = re.compile(r"(.+)\.(\d+)\.attn\.in_proj_(weight|bias)")


def is_huggingface_layout(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of transformers' ``CLIPModel``."""
    return NAMES["token_embedding.weight"] in tensors and NAMES["visual.conv1.weight"] in tensors


def to_openai(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a ``CLIPModel`` state dict under OpenAI's names: QKV joined, projections transposed.

    Raises:
        CheckpointError: A name that ``CLIPModel`` does not have, or a block without its three projections.
    """
    outer = {theirs: ours for ours, theirs in NAMES.items()}
    turned = {theirs: ours for ours, theirs in TRANSPOSED.items()}
    blocks = {theirs: ours for ours, theirs in BLOCKS.items()}
    inner = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        if name in outer:
            result[outer[name]] = tensor.reshape(()) if name == "logit_scale" else tensor
        elif name in turned:
            if tensor.ndim != 2:
                raise CheckpointError(f"`{name}` has {tensor.ndim} dimensions; expected 2")
            result[turned[name]] = tensor.T.contiguous()
        elif match and match[1] in blocks and match[3] in inner:
            result[f"{blocks[match[1]]}.{match[2]}.{inner[match[3]]}.{match[4]}"] = tensor
        elif match and match[1] in blocks and match[3].removeprefix("self_attn.") in QKV:
            fused = f"{blocks[match[1]]}.{match[2]}.attn.in_proj_{match[4]}"
            parts.setdefault(fused, {})[match[3].removeprefix("self_attn.")] = tensor
        elif not _IGNORED.fullmatch(name):
            raise CheckpointError(f"`{name}` is no weight of transformers' CLIPModel")
    for fused, three in parts.items():
        if set(three) != set(QKV) or len({t.shape for t in three.values()}) != 1:
            raise CheckpointError(f"`{fused}` cannot be joined: its query, key and value do not match")
        result[fused] = torch.cat([three[part] for part in QKV])
    return result


def to_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in OpenAI's layout (ViT) under the names of ``CLIPModel``; the inverse of :func:`to_openai`.

    Raises:
        CheckpointError: A weight that ``CLIPModel`` has no place for (a ResNet, say).
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, fused = _BLOCK.fullmatch(name), _FUSED.fullmatch(name)
        if name in NAMES:
            result[NAMES[name]] = tensor
        elif name in TRANSPOSED:
            result[TRANSPOSED[name]] = tensor.T.contiguous()
        elif fused and fused[1] in BLOCKS:
            for part, piece in zip(QKV, tensor.chunk(3), strict=True):
                result[f"{BLOCKS[fused[1]]}.{fused[2]}.self_attn.{part}.{fused[3]}"] = piece.contiguous()
        elif block and block[1] in BLOCKS and block[3] in BLOCK_NAMES:
            result[f"{BLOCKS[block[1]]}.{block[2]}.{BLOCK_NAMES[block[3]]}.{block[4]}"] = tensor
        else:
            raise CheckpointError(f"transformers' CLIPModel has no place for `{name}`")
    return result


def read_model_dir(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a local ``CLIPModel`` directory.

    Returns:
        The tensors under OpenAI's names, and the mapping for ``EncoderConfig.from_dict``. Activation, heads and
        preprocessing are the directory's own, where it states them, and ``CLIPConfig``'s defaults where it does not.

    Raises:
        CheckpointError: Another model type, missing or damaged files, or preprocessing that chiasm cannot express.
    """
    directory = Path(directory)
    stated = read_json(directory / "config.json")
    if stated.get("model_type") != "clip":
        raise CheckpointError(
            f"`{directory.name}` holds a `{stated.get('model_type')}` model; expected `clip`",
            hint='to use it as a tower, name it in a recipe: `kind = "huggingface"`',
        )
    tensors = to_openai(read_weights(directory))
    vision, text = _part(stated, "vision_config"), _part(stated, "text_config")
    config = config_from_state_dict(
        tensors,
        activation=_activation(text),
        image_heads=_integer(vision, "num_attention_heads", 12),
        text_heads=_integer(text, "num_attention_heads", 8),
    )
    config["image"] |= {"activation": _activation(vision), "ln_eps": _number(vision, "layer_norm_eps", 1e-5)}
    epsilon = _number(text, "layer_norm_eps", 1e-5)
    if epsilon != 1e-5:
        config["text"]["ln_eps"] = epsilon
    processor = directory / "preprocessor_config.json"
    if processor.is_file():
        config["preprocess"] = preprocess_of(read_json(processor))
    return tensors, config


def read_weights(
    directory: Path, names: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
) -> dict[str, Any]:
    """Return all tensors of a model directory, from one file or from the shards that an index lists.

    Raises:
        CheckpointError: No weights, a shard that is missing, or one outside of the directory.
    """
    for name in names:
        if (directory / name).is_file():
            return read_state_dict(directory / name).tensors
        index = directory / f"{name}.index.json"
        if not index.is_file():
            continue
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise CheckpointError(f"`{index.name}` lists no shards")
        tensors: dict[str, Any] = {}
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"`{index.name}` names a shard outside of its directory")
            tensors |= read_state_dict(directory / shard).tensors
        missing = sorted(set(shards) - set(tensors))
        if missing:
            raise CheckpointError(f"`{index.name}` lists {len(missing)} weights that no shard holds: `{missing[0]}`")
        return tensors
    raise CheckpointError(f"model directory `{directory.name}` has no weights", hint=f"expected {' or '.join(names)}")


def preprocess_of(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Preprocess`` for a ``CLIPImageProcessor`` configuration.

    transformers converts to RGB before it resizes.

    Raises:
        CheckpointError: Steps that ``Preprocess`` cannot express (resizing to one size and cropping to another, say).
    """
    size, crop = _side(stated.get("size", 224)), _side(stated.get("crop_size", 224))
    squash = isinstance(stated.get("size"), Mapping) and "shortest_edge" not in stated["size"]
    filters = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    interpolation = filters.get(stated.get("resample", 3))
    crops = stated.get("do_center_crop", True)
    if interpolation is None or not stated.get("do_resize", True) or (crops and not squash and size != crop):
        raise CheckpointError(f"its image processor resizes to {size} and crops to {crop}, which chiasm cannot express")
    if not stated.get("do_normalize", True) or abs(_number(stated, "rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise CheckpointError("its image processor does not scale to [0, 1] and normalise, which chiasm always does")
    result: dict[str, Any] = {
        "size": size,
        "resize": "squash" if squash else "shortest",
        "crop": "center" if crops and not squash else "none",
        "interpolation": interpolation,
        "rgb": "before_resize" if stated.get("do_convert_rgb", True) else "after_resize",
    }
    if result["rgb"] == "after_resize" and result["crop"] == "center":
        result["crop_rounding"] = "down"  # transformers' own, whatever converts to RGB
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        values = stated.get(theirs)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
            raise CheckpointError(f"`{theirs}` of its image processor must be three numbers")
        result[ours] = [float(v) for v in values]
    return result


def _side(size: Any) -> int:
    if isinstance(size, Mapping):
        sides = [size[k] for k in ("shortest_edge", "height", "width") if k in size]
        size = sides[0] if sides and all(s == sides[0] for s in sides) else None
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 4096:
        raise CheckpointError("the size in its image processor is not one side in pixels")
    return size


def _part(stated: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = stated.get(name)
    return part if isinstance(part, Mapping) else {}


def _activation(part: Mapping[str, Any]) -> str:
    name = part.get("hidden_act", "quick_gelu")
    if name not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"the activation `{name}` is not one of CLIP's (`quick_gelu`, `gelu`)")
    return str(name)


def _number(part: Mapping[str, Any], name: str, default: float) -> float:
    value = part.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"`{name}` must be a number, got {type(value).__name__}")
    return float(value)


def _integer(part: Mapping[str, Any], name: str, default: int) -> int:
    value = part.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"`{name}` must be an integer, got {type(value).__name__}")
    return value
