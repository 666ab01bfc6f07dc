"""transformers' ``SiglipModel``: its names both ways, and its model directory.

In: a directory with ``config.json``, weights and, where present, ``preprocessor_config.json`` and the tokenizer's
files. Out: tensors in chiasm's names and the mapping that ``EncoderConfig.from_dict`` reads. SigLIP has no class token,
no causal mask and no mask of padding; the text's vector is the last position of the full context; images are pooled by
a learned query with an MLP behind it (Zhai et al. 2023, https://arxiv.org/abs/2303.15343).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoints.containers import read_json
from chiasm.checkpoints.huggingface import BLOCK_NAMES, QKV, preprocess_of, read_weights
from chiasm.errors import CheckpointError

TEXT = "text.transformer."
#: chiasm's name -> transformers' name, outside of the blocks.
NAMES: Mapping[str, str] = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.conv1.bias": "vision_model.embeddings.patch_embedding.bias",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.map_pool.attn.in_proj_weight": "vision_model.head.attention.in_proj_weight",
    "visual.map_pool.attn.in_proj_bias": "vision_model.head.attention.in_proj_bias",
    "visual.map_pool.attn.out_proj.weight": "vision_model.head.attention.out_proj.weight",
    "visual.map_pool.attn.out_proj.bias": "vision_model.head.attention.out_proj.bias",
    "visual.map_pool.ln.weight": "vision_model.head.layernorm.weight",
    "visual.map_pool.ln.bias": "vision_model.head.layernorm.bias",
    "visual.map_pool.mlp.c_fc.weight": "vision_model.head.mlp.fc1.weight",
    "visual.map_pool.mlp.c_fc.bias": "vision_model.head.mlp.fc1.bias",
    "visual.map_pool.mlp.c_proj.weight": "vision_model.head.mlp.fc2.weight",
    "visual.map_pool.mlp.c_proj.bias": "vision_model.head.mlp.fc2.bias",
    f"{TEXT}token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    f"{TEXT}positional_embedding": "text_model.embeddings.position_embedding.weight",
    f"{TEXT}ln_final.weight": "text_model.final_layer_norm.weight",
    f"{TEXT}ln_final.bias": "text_model.final_layer_norm.bias",
    "text.proj.weight": "text_model.head.weight",
    "text.proj.bias": "text_model.head.bias",
}
BLOCKS: Mapping[str, str] = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    f"{TEXT}transformer.resblocks": "text_model.encoder.layers",
}
#: Entries whose shapes differ: chiasm's, transformers'.
QUERY = ("visual.map_pool.query", "vision_model.head.probe")
NUMBERS = ("logit_scale", "logit_bias")
_IGNORED = re.compile(r".*\.embeddings\.position_ids")  # counted from 0; a buffer of older versions
_BLOCK = re.compile(r"(.+)\.(\d+)\.(.+)\.(weight|bias)")
_FUSED = re.compile(r"(.+)\.(\d+)\.attn\.in_proj_(weight|bias)")


def to_native(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a ``SiglipModel`` state dict under chiasm's names, QKV joined; unknown names are passed on.

    Raises:
        CheckpointError: A block without its three projections, or a scale that is not one number.
    """
    outer = {theirs: ours for ours, theirs in NAMES.items()}
    blocks = {theirs: ours for ours, theirs in BLOCKS.items()}
    inner = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        if name in outer:
            result[outer[name]] = tensor
        elif name in NUMBERS:
            if tensor.numel() != 1:
                raise CheckpointError(f"`{name}` has the shape {tuple(tensor.shape)}; expected one number")
            result[name] = tensor.reshape(())
        elif name == QUERY[1]:
            result[QUERY[0]] = tensor.reshape(-1, tensor.shape[-1])
        elif match and match[1] in blocks and match[3] in inner:
            result[f"{blocks[match[1]]}.{match[2]}.{inner[match[3]]}.{match[4]}"] = tensor
        elif match and match[1] in blocks and match[3].removeprefix("self_attn.") in QKV:
            fused = f"{blocks[match[1]]}.{match[2]}.attn.in_proj_{match[4]}"
            parts.setdefault(fused, {})[match[3].removeprefix("self_attn.")] = tensor
        elif not _IGNORED.fullmatch(name):
            result[name] = tensor
    for fused, three in parts.items():
        if set(three) != set(QKV) or len({t.shape for t in three.values()}) != 1:
            raise CheckpointError(f"`{fused}` cannot be joined: its query, key and value do not match")
        result[fused] = torch.cat([three[part] for part in QKV])
    return result


def from_native(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return chiasm's tensors under the names of ``SiglipModel``; the inverse of :func:`to_native`.

    Raises:
        CheckpointError: A weight that ``SiglipModel`` has no place for.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, fused = _BLOCK.fullmatch(name), _FUSED.fullmatch(name)
        if name in NAMES:
            result[NAMES[name]] = tensor
        elif name in NUMBERS:
            result[name] = tensor.reshape(1)
        elif name == QUERY[0]:
            result[QUERY[1]] = tensor[None]
        elif fused and fused[1] in BLOCKS:
            for part, piece in zip(QKV, tensor.chunk(3), strict=True):
                result[f"{BLOCKS[fused[1]]}.{fused[2]}.self_attn.{part}.{fused[3]}"] = piece.contiguous()
        elif block and block[1] in BLOCKS and block[3] in BLOCK_NAMES:
            result[f"{BLOCKS[block[1]]}.{block[2]}.{BLOCK_NAMES[block[3]]}.{block[4]}"] = tensor
        else:
            raise CheckpointError(f"transformers' SiglipModel has no place for `{name}`")
    return result


def read_model_dir(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a local ``SiglipModel`` directory.

    Raises:
        CheckpointError: Missing or damaged files, an unknown activation, or preprocessing that chiasm cannot express.
    """
    directory = Path(directory)
    stated = read_json(directory / "config.json")
    vision, text = _part(stated, "vision_config"), _part(stated, "text_config")
    if vision.get("vision_use_head") is False:
        raise CheckpointError(f"`{directory.name}` has no pooling head, so it has no image vectors")
    tensors = to_native(read_weights(directory))
    width, context = _number(vision, "hidden_size", 768), _number(text, "max_position_embeddings", 64)
    image_size = _number(vision, "image_size", 224)
    config: dict[str, Any] = {
        "image": {
            "kind": "vit",
            "image_size": image_size,
            "patch_size": _number(vision, "patch_size", 16),
            "class_token": False,
            "patch_bias": True,
            "pre_norm": False,
            "pool": "map",
            **_tower(vision),
        },
        "text": {
            "kind": "clip",
            "context_length": context,
            "vocab_size": _number(text, "vocab_size", 32000),
            "causal": False,
            "pool": "last",
            **_tower(text),
        },
        "projection": {"dim": width, "image": "none", "biased": ["text"]},
        "logit_bias_init": -10.0,
        "tokenizer": _tokenizer(directory, context),
        "preprocess": _preprocess(directory, image_size),
    }
    return tensors, config


def _tower(stated: Mapping[str, Any]) -> dict[str, Any]:
    width, hidden = _number(stated, "hidden_size", 768), _number(stated, "intermediate_size", 3072)
    ratio = hidden / width
    known = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
    name = stated.get("hidden_act", "gelu_pytorch_tanh")
    if name not in known:
        raise CheckpointError(f"the activation `{name}` is not one of SigLIP's", hint=f"known: {', '.join(known)}")
    eps = stated.get("layer_norm_eps", 1e-6)
    if not isinstance(eps, float):
        raise CheckpointError(f"`layer_norm_eps` must be a number, got {type(eps).__name__}")
    return {
        "width": width,
        "layers": _number(stated, "num_hidden_layers", 12),
        "heads": _number(stated, "num_attention_heads", 12),
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
        "activation": known[name],
        "ln_eps": eps,
    }


def _tokenizer(directory: Path, context: int) -> dict[str, Any]:
    """The tokenizer in the folder; SigLIP's own drops punctuation and case before it cuts words.

    Deviation: mended encoding and HTML entities, as in open_clip; transformers leaves them as they are.
    """
    result: dict[str, Any] = {"kind": "huggingface", "source": str(directory), "context_length": context}
    file = directory / "tokenizer_config.json"
    stated = read_json(file) if file.is_file() else {}
    if isinstance(stated.get("chiasm_clean"), str):  # a model that chiasm has exported
        result["clean"] = stated["chiasm_clean"]
    elif stated.get("tokenizer_class", "SiglipTokenizer") == "SiglipTokenizer":
        result["clean"] = "canonicalize"
    return result


def _preprocess(directory: Path, image_size: int) -> dict[str, Any]:
    file = directory / "preprocessor_config.json"
    stated = read_json(file) if file.is_file() else {}
    size = {"height": image_size, "width": image_size}
    half = [0.5, 0.5, 0.5]
    return preprocess_of({"size": size, "image_mean": half, "image_std": half, **stated, "do_center_crop": False})


def _part(stated: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = stated.get(name)
    return part if isinstance(part, Mapping) else {}


def _number(part: Mapping[str, Any], name: str, default: int) -> int:
    value = part.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"`{name}` must be a positive integer, got {value!r}")
    return value
