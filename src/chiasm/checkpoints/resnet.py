"""torchvision's names of a ResNet, which timm shares: ImageNet's, Lunit's and a user's own weights.

In: ``conv1``, ``bn1``, ``layerL.B.conv1..3``, ``layerL.B.downsample.0`` and ``.1``, often under the prefix of a training
wrap. Out: the names of chiasm's tower ``classic_resnet`` under ``visual.trunk.``.

References: torchvision ``models/resnet.py``; timm ``models/resnet.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoints.layout import Layout

#: Entries that files carry and models lack, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    "fc.": "a classifier or a projection head of the training: no part of the features",
    "head.": "likewise, under the name of other trainers",
    "instance_discriminator.": "MoCo's head and queue, as VISSL writes them",
}
PREFIXES = ("module.", "model.", "backbone.", "encoder_q.", "encoder.", "resnet.", "trunk.", "base_encoder.")
_STEM = "conv1.weight"


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the one ResNet in a file under torchvision's names.

    Where names have prefixes, those of the ResNet alone are taken off; a second network in the file (a momentum encoder)
    keeps its names, and so does everything that is not understood.
    """
    prefix = next((n.removesuffix(_STEM) for n in tensors if _is_stem(n)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _is_stem(name: str) -> bool:
    parts = name.split(".")
    return ".".join(parts[-2:]) == _STEM and all(f"{part}." in PREFIXES for part in parts[:-2])


def is_resnet(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of torchvision's ResNet, training wraps allowed."""
    names = plain_names(tensors)
    return {_STEM, "bn1.weight", "layer1.0.conv1.weight", "layer1.0.bn2.weight"} <= set(names)


def to_trunk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under torchvision's names, without heads; batch counters that a file leaves out are zero."""
    result = {}
    for name, tensor in plain_names(tensors).items():
        if any(name.startswith(d) for d in DROPPED):
            continue
        result[name] = tensor
        if name.endswith("running_var"):  # torch reads the counter only to average statistics in training
            result.setdefault(re.sub("running_var$", "num_batches_tracked", name), torch.tensor(0))
    return result


def _convert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"visual.trunk.{name}": tensor for name, tensor in to_trunk(tensors).items()}


LAYOUT = Layout("torchvision_resnet", is_resnet, _convert)
