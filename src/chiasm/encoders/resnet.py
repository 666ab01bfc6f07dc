"""CLIP's modified ResNet.

In: pixels (batch, 3, size, size), normalised. Out: (batch, output_dim). Against torchvision's ResNet: a stem of three
convolutions and an average pool, average pools before strided convolutions, and attention pooling. Keys are OpenAI's:
``conv1..3``, ``bn1..3``, ``layerL.B.*``, ``attnpool.*``. One to four stages are allowed, so small models keep a finer
feature map.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from chiasm.encoders.base import ImageTowerConfig
from chiasm.encoders.transformer import init_standard
from chiasm.encoders.vit import check_pixels
from chiasm.errors import InputError


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with a shortcut; a stride is an average pool, so that nothing aliases."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inplanes != out:
            steps: OrderedDict[str, nn.Module] = OrderedDict()
            steps["-1"] = nn.AvgPool2d(stride)
            steps["0"] = nn.Conv2d(inplanes, out, 1, bias=False)
            steps["1"] = nn.BatchNorm2d(out)
            self.downsample = nn.Sequential(steps)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, 4·planes, height/stride, width/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + self.downsample(x))


class AttentionPool2d(nn.Module):
    """Attention whose one query is the mean of all positions; keys and values are the mean and every position."""

    def __init__(self, side: int, channels: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(side**2 + 1, channels))
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, output_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Return (batch, output_dim) for features (batch, channels, side, side)."""
        x = features.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = self._heads(self.q_proj(x[:, :1])), self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        projected: Tensor = self.c_proj(pooled[:, 0])
        return projected

    def values(self, features: Tensor) -> Tensor:
        """Return (batch, height, width, output_dim): each position through the value and output projections."""
        projected: Tensor = self.c_proj(self.v_proj(features.permute(0, 2, 3, 1)))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)


class ModifiedResNet(nn.Module):
    """The convolutional image tower of CLIP (Radford et al. 2021, section 2.4; He et al. 2019; Zhang 2019).

    Args:
        config: Its shape; ``kind`` must be ``resnet``.
        output_dim: Dimensions of the joint space; None keeps the final channels (attention pooling still has its output
            projection).

    Attributes:
        output_dim: Dimensions of the output.
        image_size: Side of the square input, in pixels.
        stages: Number of stages; ``layer1`` … ``layerN``.
    """

    def __init__(self, config: ImageTowerConfig, output_dim: int | None) -> None:
        super().__init__()
        assert isinstance(config.layers, tuple)
        width = config.width
        self.image_size = config.image_size
        self.position_std = config.position_std
        self.stages = len(config.layers)
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        inplanes = width
        for stage, blocks in enumerate(config.layers):
            planes = width * 2**stage
            first = Bottleneck(inplanes, planes, stride=1 if stage == 0 else 2)
            inplanes = planes * Bottleneck.expansion
            rest = [Bottleneck(inplanes, planes) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.output_dim = output_dim or inplanes
        self.attnpool: AttentionPool2d | None = None
        self.fc: nn.Linear | None = None
        if config.pool == "attention":
            side = config.image_size // config.stride_px
            self.attnpool = AttentionPool2d(side, inplanes, config.pool_heads, self.output_dim)
        elif output_dim is not None:
            self.fc = nn.Linear(inplanes, output_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (batch, output_dim), not normalised."""
        return self.pool(self.forward_features(pixels))

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Return the feature map of the last stage, (batch, channels, rows, columns): what Grad-CAM looks at."""
        check_pixels(pixels, self.image_size)
        x = F.relu(self.bn1(self.conv1(pixels)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.avgpool(x)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        features: Tensor = x
        return features

    def pool(self, features: Tensor) -> Tensor:
        """Return the embeddings of a feature map that :meth:`forward_features` gave."""
        if self.attnpool is not None:
            embedded: Tensor = self.attnpool(features)
            return embedded
        mean = features.mean((2, 3))
        return mean if self.fc is None else F.linear(mean, self.fc.weight)

    def patch_features(self, pixels: Tensor) -> Tensor:
        """Return one vector of the joint space for every position, not normalised: (batch, rows, columns, output_dim).

        With attention pooling each position goes through ``v_proj`` and ``c_proj`` without the positional embedding, as
        in Zhou et al. 2022 (MaskCLIP, section 3.2). With mean pooling each goes through ``fc``, and the embedding is
        exactly the mean of all.
        """
        features = self.forward_features(pixels)
        if self.attnpool is not None:
            return self.attnpool.values(features)
        positions = features.permute(0, 2, 3, 1)
        return positions if self.fc is None else F.linear(positions, self.fc.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse: recomputing a block would count its batch statistics twice."""
        if enable:
            raise InputError(
                "gradient checkpointing is not offered for a `resnet`: its batch statistics would be counted twice",
                hint="use smaller batches with GradCache, or a `vit`",
            )

    def init_weights(self, generator: Generator) -> None:
        """Draw all weights by OpenAI's scheme.

        PyTorch's defaults, but the last batch norm of every block starts at zero (so blocks start as identities), the
        attention pool's matrices are N(0, 1/channels) and its positions N(0, 1/channels), or of the configured
        ``position_std``.
        """
        with torch.no_grad():
            for module in self.modules():
                init_standard(module, generator)
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    module.bn3.weight.zero_()
            if self.attnpool is not None:
                pool = self.attnpool
                std = 1 / math.sqrt(pool.c_proj.in_features)
                for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                    linear.weight.normal_(std=std, generator=generator)
                places = std if self.position_std is None else self.position_std
                pool.positional_embedding.normal_(std=places, generator=generator)

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return what still trains when the tower is locked."""
        if self.attnpool is not None:
            return list(self.attnpool.c_proj.parameters())
        return [] if self.fc is None else list(self.fc.parameters())
