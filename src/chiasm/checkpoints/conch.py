"""CONCH's key layout: timm's ViT with two attentional poolers, and CoCa's text tower.

In: ``visual.trunk.*``, ``visual.attn_pool_contrast.*``, ``visual.ln_contrast.*``, ``visual.proj_contrast``, ``text.*``,
``logit_scale``. Out: those of ``encoders.conch`` under ``visual.*``, and the text tower's at the top. Positions for another
input than 448 pixels are resized as CONCH does it: bilinear, without antialiasing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.checkpoints import timm
from chiasm.checkpoints.layout import Layout
from chiasm.errors import CheckpointError

TRUNK = "visual.trunk."
RENAMED = {
    "visual.attn_pool_contrast.": "visual.trunk.attn_pool.",
    "visual.ln_contrast.": "visual.trunk.ln_pool.",
    "text.": "",
}
#: Stored as (in, out), which a head holds the other way round.
PROJECTION = "visual.proj_contrast"
#: Entries that files carry and the model lacks, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    "text_decoder.": "writes captions; the released file is without it",
    "visual.attn_pool_caption.": "feeds the caption decoder, not the embedding",
    "visual.ln_caption.": "feeds the caption decoder, not the embedding",
    "text.attn_mask": "the causal mask; follows from the context length",
}
#: What the space for probes leaves out besides: it ends before the projection and has no text side.
DROPPED_BY_PROBES: Mapping[str, str] = {
    "text.": "the other side of the joint space",
    PROJECTION: "leads into the joint space",
    "logit_scale": "belongs to the joint space",
}


def is_conch(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are CONCH's."""
    return "visual.attn_pool_contrast.query" in tensors


def _convert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    dropped = {**DROPPED, **(DROPPED_BY_PROBES if config.get("sides") == "image" else {})}
    kept = {k: v for k, v in tensors.items() if not any(k.startswith(d) for d in dropped)}
    trunk = {k.removeprefix(TRUNK): v for k, v in kept.items() if k.startswith(TRUNK)}
    if not timm.is_timm_vit(trunk):
        raise CheckpointError("the weights lack the image tower `visual.trunk.*` of CONCH")
    image = {"image_size": config["image"]["image_size"], "patch_size": config["image"]["options"]["patch_size"]}
    trunk["pos_embed"] = _resized(trunk["pos_embed"], int(image["image_size"]) // int(image["patch_size"]))
    result = {f"visual.trunk.vit.{k}": v for k, v in timm.to_native(trunk, image).items()}
    for name, tensor in kept.items():
        if name.startswith(TRUNK):
            continue
        if name == PROJECTION and tensor.ndim == 2:
            result["visual.head.weight"] = tensor.T.contiguous()
            continue
        prefix = next((p for p in RENAMED if name.startswith(p)), "")
        target = RENAMED.get(prefix, "") + name.removeprefix(prefix)
        result[target] = tensor.reshape(()) if name == "logit_scale" and tensor.numel() == 1 else tensor
    return result


def _resized(positions: Tensor, grid: int) -> Tensor:
    """Positions (1, 1 + side², width) for another grid; what is no such tensor is left for timm's check."""
    side = math.isqrt(max(positions.shape[-2] - 1, 0)) if positions.ndim == 3 else 0
    if side == grid or side < 1 or side**2 + 1 != positions.shape[-2] or len(positions) != 1:
        return positions
    square = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, (grid, grid), mode="bilinear", align_corners=False, antialias=False)
    flat = resized.permute(0, 2, 3, 1).reshape(1, grid**2, -1).to(positions.dtype)
    return torch.cat([positions[:, :1], flat], dim=1)


LAYOUT = Layout("conch", is_conch, _convert)
