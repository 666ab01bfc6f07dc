"""Swin's five key layouts: torchvision, timm, microsoft/Swin-Transformer, transformers 4 and transformers 5.

In: any of them. Out: the names of transformers 5's ``SwinModel`` under ``visual.trunk.model.``. timm keeps the
downsampling at the start of the next stage, all others at the end of the stage before it; that place is also what tells
microsoft's files from timm's, whose other names are the same.

References: torchvision ``models/swin_transformer.py``; timm ``models/swin_transformer.py`` (``checkpoint_filter_fn``);
microsoft/Swin-Transformer ``models/swin_transformer.py``; transformers ``models/swin`` and ``conversion_mapping.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chiasm.checkpoints.layout import Layout, renamed, without_prefixes
from chiasm.checkpoints.medclip import swin_names

STAGES = range(8)
_QKV = re.compile(r"(.+)\.attn\.qkv\.(weight|bias)")
#: Inside a block: timm's and microsoft's name -> transformers'.
BLOCK = (
    (r"norm1\.", "layernorm_before."),
    (r"norm2\.", "layernorm_after."),
    (r"attn\.relative_position_bias_table$", "attention.relative_position_bias.relative_position_bias_table"),
    (r"attn\.proj\.", "attention.o_proj."),
    (r"mlp\.(?:fc1|0)\.", "mlp.fc1."),  # torchvision counts the MLP's layers
    (r"mlp\.(?:fc2|3)\.", "mlp.fc2."),
)
#: Outside of the blocks.
OUTER = (
    (r"(?:patch_embed\.proj|features\.0\.0)\.", "embeddings.patch_embeddings.projection."),
    (r"(?:patch_embed\.norm|features\.0\.2)\.", "embeddings.norm."),
    (r"norm\.", "layernorm."),
)
TORCHVISION_STAGES = tuple(
    rule
    for s in STAGES
    for rule in (
        (rf"features\.{2 * s + 1}\.(\d+)\.", rf"encoder.layers.{s}.blocks.\1."),
        (rf"features\.{2 * s + 2}\.", f"encoder.layers.{s}.downsample."),
    )
)
TIMM_STAGES = tuple((rf"layers\.{s + 1}\.downsample\.", f"encoder.layers.{s}.downsample.") for s in STAGES)
MICROSOFT_STAGES = ((r"layers\.(\d+)\.", r"encoder.layers.\1."),)
#: Entries that files carry and models lack, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    "head.": "a classifier: no part of the features",
    "classifier.": "likewise, in transformers",
}
#: The same, by the end of the name.
DROPPED_ENDS: Mapping[str, str] = {
    "relative_position_index": "follows from the size of the window",
    "attn_mask": "follows from the sizes of the window and of the input",
}
PREFIXES = ("module.", "swin.", "backbone.", "trunk.")


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefixes of training wraps and of transformers' models with a head."""
    return without_prefixes(tensors, PREFIXES)


def is_swin(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a Swin in one of the five layouts."""
    names = plain_names(tensors)
    blocks = ("layers.0.blocks.0.attn.qkv.weight", "features.1.0.attn.qkv.weight")
    return any(b in names for b in blocks) or (
        "embeddings.patch_embeddings.projection.weight" in names
        and any(n.startswith("encoder.layers.0.blocks.0.attention.") for n in names)
    )


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Swin's tensors under transformers 5's names; what is not understood keeps its name."""
    names = {
        n: t
        for n, t in plain_names(tensors).items()
        if not n.startswith(tuple(DROPPED)) and not n.endswith(tuple(DROPPED_ENDS))
    }
    if any(n.startswith("encoder.layers.") for n in names):
        return swin_names(names)
    if "features.0.0.weight" in names:
        stages = TORCHVISION_STAGES
    elif any(n.startswith("layers.0.downsample.") for n in names):
        stages = MICROSOFT_STAGES
    else:
        stages = TIMM_STAGES + MICROSOFT_STAGES
    result: dict[str, Tensor] = {}
    for name, tensor in names.items():
        staged = renamed(renamed(name, OUTER), stages)
        block = re.fullmatch(r"(encoder\.layers\.\d+\.blocks\.\d+\.)(.+)", staged)
        fused = _QKV.fullmatch(staged)
        if fused:
            for part, piece in zip("qkv", tensor.chunk(3), strict=False):
                result[f"{fused[1]}.attention.{part}_proj.{fused[2]}"] = piece
        else:
            result[block[1] + renamed(block[2], BLOCK) if block else staged] = tensor
    return result


def _convert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"visual.trunk.model.{name}": tensor for name, tensor in to_transformers(tensors).items()}


LAYOUT = Layout("swin", is_swin, _convert)
