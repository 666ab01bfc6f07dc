"""ConvNeXt's four key layouts: torchvision, timm, facebookresearch/ConvNeXt and transformers.

In: any of them. Out: the names of transformers' ``ConvNextModel`` under ``visual.trunk.model.``.

References: torchvision ``models/convnext.py``; timm ``models/convnext.py`` (``checkpoint_filter_fn``);
facebookresearch/ConvNeXt ``models/convnext.py``; transformers ``models/convnext``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chiasm.checkpoints.layout import Layout, renamed, without_prefixes

STAGES = range(8)
#: Inside a block, the names of all layouts -> transformers'.
BLOCK = (
    (r"(?:dwconv|conv_dw|block\.0)\.", "dwconv."),
    (r"(?:norm|block\.2)\.", "layernorm."),
    (r"(?:pwconv1|mlp\.fc1|block\.3)\.", "pwconv1."),
    (r"(?:pwconv2|mlp\.fc2|block\.5)\.", "pwconv2."),
    (r"(?:gamma|layer_scale)$", "layer_scale_parameter"),
)
#: Outside of the blocks: stem, last norm, downsampling, and where blocks begin. The first rule that fits counts.
OUTER = (
    (r"(?:stem\.0|downsample_layers\.0\.0|features\.0\.0)\.", "embeddings.patch_embeddings."),
    (r"(?:stem\.1|downsample_layers\.0\.1|features\.0\.1)\.", "embeddings.layernorm."),
    (r"(?:head\.norm|classifier\.0|norm)\.", "layernorm."),
    (r"stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"downsample_layers\.(\d+)\.", r"encoder.stages.\1.downsampling_layer."),
    (r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.", r"encoder.stages.\1.layers.\2."),
    *((rf"features\.{2 * s}\.", f"encoder.stages.{s}.downsampling_layer.") for s in STAGES if s),
    *((rf"features\.{2 * s + 1}\.(\d+)\.", rf"encoder.stages.{s}.layers.\1.") for s in STAGES),
)
#: Entries that files carry and models lack, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    "head.fc.": "timm's classifier: no part of the features",
    "head.weight": "the original's classifier",
    "head.bias": "the original's classifier",
    "classifier.2.": "torchvision's classifier",
    "classifier.weight": "transformers' classifier",
    "classifier.bias": "transformers' classifier",
}
PREFIXES = ("module.", "convnext.", "backbone.", "trunk.")
_STEMS = ("stem.0.weight", "downsample_layers.0.0.weight", "features.0.0.weight", "embeddings.patch_embeddings.weight")
_BLOCKS = re.compile(
    r"(?:encoder\.)?(?:stages|features)\.\d+\.(?:blocks\.|layers\.)?\d+\.(?:dwconv|conv_dw|block\.0)\.weight"
)


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefixes of training wraps and of transformers' models with a head."""
    return without_prefixes(tensors, PREFIXES)


def is_convnext(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a ConvNeXt in one of the four layouts."""
    names = plain_names(tensors)
    return any(stem in names for stem in _STEMS) and any(_BLOCKS.fullmatch(name) for name in names)


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a ConvNeXt's tensors under transformers' names; what is not understood keeps its name.

    Scales lose torchvision's two axes of size one, and pointwise layers that are stored as convolutions theirs.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in plain_names(tensors).items():
        if name.startswith(tuple(DROPPED)):
            continue
        outer = renamed(name, OUTER)
        block = re.fullmatch(r"(encoder\.stages\.\d+\.layers\.\d+\.)(.+)", outer)
        new = block[1] + renamed(block[2], BLOCK) if block else outer
        if new.endswith("layer_scale_parameter"):
            result[new] = tensor.reshape(-1)
        else:
            flat = tensor.ndim == 4 and new.endswith(("pwconv1.weight", "pwconv2.weight"))
            result[new] = tensor.flatten(1) if flat else tensor
    return result


def _convert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"visual.trunk.model.{name}": tensor for name, tensor in to_transformers(tensors).items()}


LAYOUT = Layout("convnext", is_convnext, _convert)
