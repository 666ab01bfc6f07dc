"""timm's names of a ViT, which DINO and DINOv2 share: UNI, kaiko's models, BiomedCLIP's trunk and more.

In: ``cls_token``, ``pos_embed``, ``patch_embed.proj``, ``blocks.N.*``, ``norm`` (``reg_token`` or ``register_tokens``).
SigLIP's have no ``cls_token`` and an ``attn_pool``.
Out: the names of :class:`chiasm.encoders.vit.VisionTransformer`. Positions are resized to the declared input as timm or
as DINO's own code does it, see :func:`resize_positions`: two layouts, because keys do not tell.

References:
    timm ``vision_transformer.py`` (``resample_abs_pos_embed``, ``_convert_dinov2``); facebookresearch/dino and
    facebookresearch/dinov2 ``interpolate_pos_encoding`` and, for the models with registers, ``hub/backbones.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.checkpoints.layout import Layout, renamed, without_prefixes
from chiasm.errors import CheckpointError

BLOCK = r"blocks\.(?:\d+\.(?=\d+\.))?(\d+)\."  # DINOv2's training checkpoints put blocks into chunks
RULES = (
    (r"patch_embed\.proj\.", "conv1."),
    (BLOCK + r"norm1\.", r"transformer.resblocks.\1.ln_1."),
    (BLOCK + r"norm2\.", r"transformer.resblocks.\1.ln_2."),
    (BLOCK + r"attn\.qkv\.", r"transformer.resblocks.\1.attn.in_proj_"),
    (BLOCK + r"attn\.proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (BLOCK + r"mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (BLOCK + r"mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (BLOCK + r"mlp\.w12\.", r"transformer.resblocks.\1.mlp.c_fc."),  # DINOv2's packed SwiGLU
    (BLOCK + r"mlp\.w3\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (BLOCK + r"ls([12])\.gamma$", r"transformer.resblocks.\1.ls_\2.gamma"),
    (r"norm_pre\.", "ln_pre."),
    (r"norm\.", "ln_post."),
    (r"attn_pool\.proj\.", "map_pool.attn.out_proj."),
    (r"attn_pool\.norm\.", "map_pool.ln."),
    (r"attn_pool\.mlp\.fc1\.", "map_pool.mlp.c_fc."),
    (r"attn_pool\.mlp\.fc2\.", "map_pool.mlp.c_proj."),
)
#: Entries that files carry and models lack, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    "mask_token": "stands for masked patches while DINOv2 trains",
    "head.": "DINO's projection head, or a classifier: no part of the features",
    "fc_norm.": "belongs to a classifier with mean pooling",
    "dino_head.": "DINOv2's projection head",
    "ibot_head.": "DINOv2's projection head",
}
#: Entries that are not merely renamed.
_JOINED = frozenset(
    {"cls_token", "pos_embed", "attn_pool.latent"}
    | {f"attn_pool.{part}.{kind}" for part in ("q", "kv") for kind in ("weight", "bias")}
)
PREFIXES = ("module.", "backbone.", "trunk.")
#: What DINO and DINOv2 (without registers) add to the number of patches before they divide by the old one.
DINO_OFFSET = 0.1


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefixes that training wraps put before every backbone name."""
    return without_prefixes(tensors, PREFIXES)


def is_timm_vit(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a ViT of timm, DINO or DINOv2, training wraps allowed."""
    names = plain_names(tensors)
    return "patch_embed.proj.weight" in names and "cls_token" in names and "pos_embed" in names


def to_native(
    tensors: Mapping[str, Tensor], image: Mapping[str, Any], *, antialias: bool = True, offset: float = 0.0
) -> dict[str, Tensor]:
    """Return a ViT's tensors under the names of chiasm's ViT, without ``visual.``.

    Args:
        tensors: In timm's names, without prefixes; what is not understood keeps its name.
        image: The tower's declaration: ``image_size``, ``patch_size``.
        antialias: How positions are resized, see :func:`resize_positions`.
        offset: Likewise.

    Raises:
        CheckpointError: Positions that fit no square grid.
    """
    grid = int(image["image_size"]) // int(image["patch_size"])
    result: dict[str, Tensor] = {}
    class_token = tensors["cls_token"].reshape(-1) if "cls_token" in tensors else None
    positions = tensors["pos_embed"]
    wrong_width = class_token is not None and positions.shape[-1] != len(class_token)
    if positions.ndim != 3 or len(positions) != 1 or wrong_width:
        raise CheckpointError(f"`pos_embed` has the shape {tuple(positions.shape)}; expected (1, positions, width)")
    positions = positions[0]
    side = math.isqrt(len(positions))
    if side**2 == len(positions):  # positions of patches alone: the class token has none
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    positions = resize_positions(positions, grid, antialias=antialias, offset=offset)
    result["positional_embedding"] = positions if class_token is not None else positions[1:]
    if class_token is not None:
        result["class_embedding"] = class_token
    if "attn_pool.latent" in tensors:
        result["map_pool.query"] = tensors["attn_pool.latent"].reshape(-1, tensors["attn_pool.latent"].shape[-1])
        for kind in ("weight", "bias"):
            parts = [
                tensors[f"attn_pool.{part}.{kind}"] for part in ("q", "kv") if f"attn_pool.{part}.{kind}" in tensors
            ]
            if len(parts) == 2:
                result[f"map_pool.attn.in_proj_{kind}"] = torch.cat(parts)
    for name, tensor in tensors.items():
        if name in _JOINED or any(name == d or name.startswith(d) for d in DROPPED):
            continue
        if name in ("reg_token", "register_tokens"):
            result["registers"] = tensor.reshape(-1, tensor.shape[-1])
            continue
        result[renamed(name, RULES)] = tensor
    return result


#: The rules of :data:`RULES` backwards.
_BACK = (
    (r"conv1\.", "patch_embed.proj."),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
    (r"transformer\.resblocks\.(\d+)\.ls_([12])\.gamma$", r"blocks.\1.ls\2.gamma"),
    (r"ln_pre\.", "norm_pre."),
    (r"ln_post\.", "norm."),
    (r"map_pool\.attn\.out_proj\.", "attn_pool.proj."),
    (r"map_pool\.ln\.", "attn_pool.norm."),
    (r"map_pool\.mlp\.c_fc\.", "attn_pool.mlp.fc1."),
    (r"map_pool\.mlp\.c_proj\.", "attn_pool.mlp.fc2."),
)


def from_native(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a ViT's tensors, named as chiasm's without ``visual.``, under timm's names; undoes :func:`to_native`.

    Raises:
        CheckpointError: A tensor that timm's ViT has no place for.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in ("class_embedding", "map_pool.query"):
            result["cls_token" if name == "class_embedding" else "attn_pool.latent"] = tensor.reshape(1, 1, -1)
        elif name in ("positional_embedding", "registers"):
            result["pos_embed" if name == "positional_embedding" else "reg_token"] = tensor[None]
        elif name.startswith("map_pool.attn.in_proj_"):
            kind, rows = name.removeprefix("map_pool.attn.in_proj_"), len(tensor) // 3
            result[f"attn_pool.q.{kind}"] = tensor[:rows].contiguous()
            result[f"attn_pool.kv.{kind}"] = tensor[rows:].contiguous()
        else:
            back = renamed(name, _BACK)
            if back == name:
                raise CheckpointError(f"timm's ViT has no place for `{name}`")
            result[back] = tensor
    return result


def resize_positions(positions: Tensor, grid: int, *, antialias: bool, offset: float = 0.0) -> Tensor:
    """Return positional embeddings (1 + grid², width) for another grid, bicubic; the class token's row is kept.

    timm, open_clip and the DINOv2 models with registers: ``antialias=True``, ``offset=0``. DINO and DINOv2 without
    registers: ``antialias=False``, ``offset=0.1``.

    Args:
        positions: (1 + side², width).
        grid: Patches along a side.
        antialias: Whether the filter widens when the grid shrinks.
        offset: Positions are sampled as if the grid were larger by this (DINO's guard against rounding, which moves
            every position a little: row i is taken at (i + ½) · side / (grid + offset) - ½).

    Raises:
        CheckpointError: The patches' rows are no square.
    """
    rows = len(positions) - 1
    side = math.isqrt(max(rows, 0))
    if side < 1 or side**2 != rows:
        raise CheckpointError(f"{rows} positions of patches form no square grid")
    if side == grid:
        return positions
    square = positions[1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if offset:
        scale = (grid + offset) / side
        resized = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
    flat = resized.permute(0, 2, 3, 1).reshape(grid**2, -1).to(positions.dtype)
    return torch.cat([positions[:1], flat])


def _convert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    native = to_native(plain_names(tensors), config["image"])
    return {f"visual.{name}": tensor for name, tensor in native.items()}


def _convert_dino(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    native = to_native(plain_names(tensors), config["image"], antialias=False, offset=DINO_OFFSET)
    return {f"visual.{name}": tensor for name, tensor in native.items()}


LAYOUT = Layout("timm_vit", is_timm_vit, _convert)
#: The same names; positions as the code of DINO and of DINOv2 without registers resizes them.
DINO_LAYOUT = Layout("dino_vit", is_timm_vit, _convert_dino)
