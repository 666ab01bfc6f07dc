"""A user's own backbone: a state dict in well-known names whose shape is read from its tensors.

In: a ViT in the names of timm, DINO, DINOv2 or transformers, or a ResNet in torchvision's. Out: the same as those
layouts, and before it the configuration with the shape that the tensors have. Statistics and resizing cannot be told
from weights: the catalog's entries ``histo-vit`` and ``histo-resnet`` say which are taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chiasm.checkpoints import huggingface_vit, resnet, timm
from chiasm.checkpoints.layout import Layout
from chiasm.errors import CheckpointError


def _is_vit(tensors: Mapping[str, Tensor]) -> bool:
    return timm.is_timm_vit(tensors) or huggingface_vit.is_huggingface_vit(tensors)


def _native_vit(tensors: Mapping[str, Tensor], image: Mapping[str, Any]) -> dict[str, Tensor]:
    if timm.is_timm_vit(tensors):
        return timm.to_native(timm.plain_names(tensors), image)
    return huggingface_vit.to_native(tensors, image)


def infer_vit(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the shape of a ViT's tensors.

    The input is the one that the positions were made for, so they are not resized. Heads have 64 channels, as in all
    ViTs that are published under these names; a width that is no multiple of 64 is refused.

    Raises:
        CheckpointError: Tensors that are missing or contradict each other.
    """
    patch = _shape(_first(tensors, ("patch_embed.proj.weight", "patch_embeddings.projection.weight")), 4)
    positions = _shape(_first(tensors, ("pos_embed", "position_embeddings")), 3)
    grid = math.isqrt(max(positions[1] - (math.isqrt(positions[1]) ** 2 != positions[1]), 1))
    native = _native_vit(tensors, {"image_size": grid * patch[2], "patch_size": patch[2]})
    width = patch[0]
    if width % 64:
        raise CheckpointError(f"the ViT is {width} wide, no multiple of 64; its number of heads cannot be told")
    block = "transformer.resblocks.0."
    into, out = _matrix(native, f"{block}mlp.c_fc.weight"), _matrix(native, f"{block}mlp.c_proj.weight")
    image = {
        **config["image"],
        "width": width,
        "layers": len({m[1] for n in native if (m := re.match(r"transformer\.resblocks\.(\d+)\.", n))}),
        "heads": width // 64,
        "patch_size": patch[2],
        "image_size": grid * patch[2],
        "mlp_ratio": into[0] / width,
        "activation": "swiglu" if into[0] == 2 * out[1] else "gelu",
        "pre_norm": "ln_pre.weight" in native,
        "layer_scale": f"{block}ls_1.gamma" in native,
        "registers": len(native["registers"]) if "registers" in native else 0,
        "ln_eps": 1e-6 if timm.is_timm_vit(tensors) else 1e-12,
    }
    preprocess = {**config["preprocess"], "size": grid * patch[2]}
    return {
        **config,
        "image": image,
        "preprocess": preprocess,
        "projection": {**config["projection"], "dim": width},
    }


def infer_resnet(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the shape of a ResNet's tensors.

    Raises:
        CheckpointError: Tensors that are missing or contradict each other.
    """
    names = resnet.to_trunk(tensors)
    found = [m for n in names if (m := re.match(r"layer(\d+)\.(\d+)\.", n))]
    stages = sorted({int(m[1]) for m in found})
    layers = [len({m[2] for m in found if int(m[1]) == stage}) for stage in stages]
    block = "bottleneck" if "layer1.0.conv3.weight" in names else "basic"
    width = _shape(names["conv1.weight"], 4)[0]
    dim = width * 2 ** (len(stages) - 1) * (4 if block == "bottleneck" else 1)
    image = {**config["image"], "options": {"layers": layers, "width": width, "block": block}}
    return {**config, "image": image, "projection": {**config["projection"], "dim": dim}}


def _first(tensors: Mapping[str, Tensor], ends: tuple[str, ...]) -> Tensor:
    for name, tensor in tensors.items():
        if name.endswith(ends):
            return tensor
    raise CheckpointError(f"the weights lack `{ends[0]}`")


def _matrix(native: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in native:
        raise CheckpointError("the blocks of the ViT are missing or have other names")
    return _shape(native[name], 2)


def _shape(tensor: Tensor, dimensions: int) -> tuple[int, ...]:
    if tensor.ndim != dimensions or 0 in tensor.shape:
        raise CheckpointError(f"a tensor of the shape {tuple(tensor.shape)} should have {dimensions} dimensions")
    return tuple(tensor.shape)


def _convert_vit(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"visual.{name}": tensor for name, tensor in _native_vit(tensors, config["image"]).items()}


VIT_LAYOUT = Layout("own_vit", _is_vit, _convert_vit, infer=infer_vit)
RESNET_LAYOUT = Layout("own_resnet", resnet.is_resnet, resnet.LAYOUT.convert, infer=infer_resnet)
