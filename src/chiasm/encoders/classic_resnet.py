"""The ResNet of He et al. 2016 in torchvision's key layout: MedCLIP-ResNet, GLoRIA, BioViL and many backbones.

In: pixels (batch, 3, size, size), normalised. Out: (batch, ``output_dim``), the mean of the last stage's map. Keys are
torchvision's: ``conv1``, ``bn1``, ``layerL.B.conv1..3``, ``layerL.B.bn1..3``, ``layerL.B.downsample.0`` and ``.1``. There
is no classifier (``fc``): a projection into a joint space is the tower's head.

References: He et al. 2016, "Deep residual learning for image recognition"; torchvision ``models/resnet.py``, whose
bottleneck has its stride in the 3×3 convolution ("v1.5").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chiasm.encoders.base import ImageTowerConfig
from chiasm.encoders.named import tower_options
from chiasm.encoders.vit import check_pixels
from chiasm.errors import ConfigError

#: Of a tower ``classic_resnet``: ResNet-50. ResNet-18 is ``layers = [2, 2, 2, 2]`` with ``block = "basic"``.
OPTIONS: Mapping[str, Any] = {"layers": (3, 4, 6, 3), "width": 64, "block": "bottleneck"}


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with a shortcut.

    Args:
        channels: Of the input.
        planes: Of the inner convolutions; the output has four times as many.
        stride: Of the 3×3 convolution.
    """

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out = planes * self.expansion
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, 4·planes, height/stride, width/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, planes, height/stride, width/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


BLOCKS: Mapping[str, type[Bottleneck] | type[BasicBlock]] = {"bottleneck": Bottleneck, "basic": BasicBlock}


class ClassicResNet(nn.Module):
    """The stem and one to four stages.

    Args:
        layers: Blocks of each stage.
        width: Channels of the stem (64 in all released models).
        block: ``bottleneck`` or ``basic``.
        image_size: Side of the input, which is checked; None: any.

    Raises:
        ConfigError: An impossible shape.

    Attributes:
        output_dim: Channels of the last stage.
        channels: Channels of every stage.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        *,
        width: int = 64,
        block: str = "bottleneck",
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ConfigError(f"`image.options.block` is `{block}`", hint=f"one of: {', '.join(BLOCKS)}")
        if not 1 <= len(layers) <= 4 or min(layers) < 1:
            raise ConfigError(f"`image.options.layers` must list the blocks of one to four stages, got {list(layers)}")
        kind = BLOCKS[block]
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        widths = []
        for stage, count in enumerate(layers):
            planes = width * 2**stage
            blocks: list[nn.Module] = []
            for i in range(count):
                blocks.append(kind(channels, planes, 2 if stage and not i else 1))
                channels = planes * kind.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            widths.append(channels)
        self.channels = tuple(widths)
        self.output_dim = channels
        self._checkpointing = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def feature_maps(self, pixels: Tensor) -> list[Tensor]:
        """Return the map of every stage, each (batch, channels, rows, columns); the first lies at a quarter of the size."""
        if self.image_size is not None:
            check_pixels(pixels, self.image_size)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(pixels))), 3, 2, padding=1)
        maps = []
        for stage in range(len(self.channels)):
            layer = self.get_submodule(f"layer{stage + 1}")
            x = checkpoint(layer, x, use_reentrant=False) if self._checkpointing and self.training else layer(x)
            maps.append(x)
        return maps

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (batch, output_dim)."""
        return self.feature_maps(pixels)[-1].mean((2, 3))

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Return the last stage's map as (batch, rows, columns, output_dim); its mean is the tower's output."""
        return self.feature_maps(pixels)[-1].permute(0, 2, 3, 1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass: less memory, the same gradients."""
        self._checkpointing = enable


def build_classic_resnet(config: ImageTowerConfig) -> ClassicResNet:
    """Return a tower ``classic_resnet``; its options are those of :data:`OPTIONS`.

    Raises:
        ConfigError: An unknown option or an impossible shape.
    """
    options = tower_options(config, OPTIONS)
    return ClassicResNet(
        options["layers"], width=options["width"], block=options["block"], image_size=config.image_size
    )


def _shortcut(channels: int, out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
