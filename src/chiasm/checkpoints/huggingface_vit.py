"""transformers' ``ViTModel``: its names, up to version 4 and since version 5, become those of chiasm's ViT.

In: ``embeddings.*``, ``encoder.layer.N.*`` (old) or ``layers.N.*`` (new), ``layernorm.*``, as Phikon is published. Out:
the names of :class:`chiasm.encoders.vit.VisionTransformer` under ``visual.``.

Reference: transformers ``modeling_vit.py`` and ``conversion_mapping.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoints.layout import Layout, renamed
from chiasm.checkpoints.timm import resize_positions
from chiasm.errors import CheckpointError

_BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."
_OURS = r"transformer.resblocks.\1."
RULES = (
    (r"embeddings\.patch_embeddings\.projection\.", "conv1."),
    (_BLOCK + r"layernorm_before\.", _OURS + "ln_1."),
    (_BLOCK + r"layernorm_after\.", _OURS + "ln_2."),
    (_BLOCK + r"attention\.(?:output\.dense|o_proj)\.", _OURS + "attn.out_proj."),
    (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.", _OURS + "mlp.c_fc."),
    (_BLOCK + r"(?:output\.dense|mlp\.fc2)\.", _OURS + "mlp.c_proj."),
    (r"layernorm\.", "ln_post."),
)
#: Entries that files carry and models lack, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    "pooler.": "a dense layer that self-supervised training never saw",
    "classifier.": "a classifier: no part of the features",
    "embeddings.mask_token": "stands for masked patches while iBOT trains",
}
_QKV = re.compile(_BLOCK + r"attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)")


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the ``vit.`` that models with a head put before every name."""
    return {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}


def is_huggingface_vit(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of transformers' ``ViTModel``."""
    names = plain_names(tensors)
    return "embeddings.patch_embeddings.projection.weight" in names and "embeddings.position_embeddings" in names


def to_native(tensors: Mapping[str, Tensor], image: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a ``ViTModel`` under the names of chiasm's ViT; what is not understood keeps its name.

    Positions are resized as transformers does it on request: bicubic, without antialiasing.

    Raises:
        CheckpointError: A block without its three projections, or positions that fit no square grid.
    """
    grid = int(image["image_size"]) // int(image["patch_size"])
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in plain_names(tensors).items():
        match = _QKV.fullmatch(name)
        if name == "embeddings.cls_token":
            result["class_embedding"] = tensor.reshape(-1)
        elif name == "embeddings.position_embeddings":
            result["positional_embedding"] = resize_positions(tensor.flatten(0, -2), grid, antialias=False)
        elif match:
            parts.setdefault(f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}", {})[match[2]] = tensor
        elif not any(name.startswith(d) for d in DROPPED):
            result[renamed(name, RULES)] = tensor
    for name, three in parts.items():
        if set(three) != set("qkv") or len({t.shape for t in three.values()}) != 1:
            raise CheckpointError(f"`{name}` cannot be joined: its query, key and value do not match")
        result[name] = torch.cat([three[part] for part in "qkv"])
    return result


def _convert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"visual.{name}": tensor for name, tensor in to_native(tensors, config["image"]).items()}


LAYOUT = Layout("huggingface_vit", is_huggingface_vit, _convert)
