"""The two ResNets for inference: batch norms folded, channels last, packed convolutions, attention for one query.

In: pixels (batch, 3, size, size), float32. Out: what the tower itself gives, (batch, output_dim), float32. Served are
CLIP's ResNet (:mod:`chiasm.encoders.resnet`) and He's (:mod:`chiasm.encoders.classic_resnet`) with the towers of GLoRIA
and BioViL around it. With bfloat16 the maps between convolutions are bfloat16; pooling and projections are float32.

Whoever wants maps, patches, a prior image or gradients asks the module itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.encoders import classic_resnet
from chiasm.encoders.biovil import BioVilImageTower
from chiasm.encoders.classic_resnet import ClassicResNet
from chiasm.encoders.gloria import GloriaImageTower
from chiasm.encoders.inference.conv import PackedConv, folded
from chiasm.encoders.inference.packed import NotPackable, PackedLinear, pack, require_plain
from chiasm.encoders.resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from chiasm.encoders.vit import check_pixels

#: Channels-last maps -> channels-last maps, of the trunk's type.
Step = Callable[[Tensor], Tensor]


class PackedModifiedResNet:
    """A :class:`ModifiedResNet` with folded and packed convolutions.

    Args:
        tower: In eval mode; its convolutions are copied.
        dtype: Of the convolutions.

    Raises:
        NotPackable: A part of it is not chiasm's own, has hooks, or is in training mode.
    """

    def __init__(self, tower: ModifiedResNet, *, dtype: torch.dtype) -> None:
        require_plain(tower, ModifiedResNet)
        require_plain(tower.avgpool, nn.AvgPool2d)
        self._tower = tower
        side = _halved(tower.image_size)
        stem = [(tower.conv1, tower.bn1, tower.image_size), (tower.conv2, tower.bn2, side)]
        stem.append((tower.conv3, tower.bn3, side))
        self._steps: list[Step] = [PackedConv(c, b, side=s, dtype=dtype, relu=True) for c, b, s in stem]
        self._steps.append(tower.avgpool)
        side //= 2
        for stage in range(tower.stages):
            for module in _blocks(getattr(tower, f"layer{stage + 1}")):
                block = _ModifiedBlock(module, side, dtype)
                self._steps.append(block)
                side = block.side
        self._pool = _AttentionPool(tower.attnpool, dtype) if tower.attnpool is not None else None
        self._fc = None if tower.fc is None else pack(tower.fc, dtype=torch.float32)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (batch, output_dim), float32, not normalised."""
        tower = self._tower
        check_pixels(pixels, tower.image_size)
        if not len(pixels):
            return pixels.new_zeros(0, tower.output_dim)
        x = pixels
        for step in self._steps:
            x = step(x)
        if self._pool is not None:
            return self._pool(x)
        mean = x.float().mean((2, 3))
        return mean if self._fc is None else self._fc(mean)


class PackedClassicResNet:
    """A :class:`ClassicResNet` with folded and packed convolutions.

    Args:
        tower: In eval mode; its convolutions are copied.
        side: Of the pixels, in pixels; any other works as well where the tower allows it.
        dtype: Of the convolutions.

    Raises:
        NotPackable: As for :class:`PackedModifiedResNet`.
    """

    def __init__(self, tower: ClassicResNet, *, side: int, dtype: torch.dtype) -> None:
        require_plain(tower, ClassicResNet)
        self._tower = tower
        self._stem = PackedConv(tower.conv1, tower.bn1, side=side, dtype=dtype, relu=True)
        side = _halved(_halved(side))
        self._blocks: list[Step] = []
        for stage in range(len(tower.channels)):
            for module in _blocks(getattr(tower, f"layer{stage + 1}")):
                block = _ClassicBlock(module, side, dtype)
                self._blocks.append(block)
                side = block.side

    def map(self, pixels: Tensor) -> Tensor:
        """Return the last stage's map (batch, channels, rows, columns) of at least one image, channels last."""
        if self._tower.image_size is not None:
            check_pixels(pixels, self._tower.image_size)
        x = F.max_pool2d(self._stem(pixels), 3, 2, padding=1)
        for block in self._blocks:
            x = block(x)
        return x

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return (batch, output_dim), float32."""
        if not len(pixels):
            return self._tower(pixels)  # type: ignore[no-any-return]
        return self.map(pixels).float().mean((2, 3))


class PackedGloria:
    """A :class:`GloriaImageTower` for the vectors of whole images."""

    def __init__(self, tower: GloriaImageTower, *, dtype: torch.dtype) -> None:
        require_plain(tower, GloriaImageTower)
        self._tower = tower
        self._backbone = PackedClassicResNet(tower.backbone, side=tower.upsample, dtype=dtype)
        self._embedder = pack(tower.global_embedder, dtype=torch.float32)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (batch, output_dim), float32, not normalised."""
        tower = self._tower
        check_pixels(pixels, tower.image_size)
        if not len(pixels):
            return tower(pixels)  # type: ignore[no-any-return]
        enlarged = F.interpolate(pixels, (tower.upsample, tower.upsample), mode="bilinear", align_corners=True)
        return self._embedder(self._backbone(enlarged))


class PackedBioVil:
    """A :class:`BioVilImageTower` without a prior image: what stands in its place goes into the projector's bias."""

    def __init__(self, tower: BioVilImageTower, *, dtype: torch.dtype) -> None:
        require_plain(tower, BioVilImageTower)
        require_plain(tower.projector, nn.Sequential)
        first, norm, relu, last = tower.projector
        require_plain(relu, nn.ReLU)
        require_plain(last, nn.Conv2d)
        assert isinstance(last, nn.Conv2d)
        self._tower = tower
        side = tower.backbone.image_size or 448
        self._backbone = PackedClassicResNet(tower.backbone, side=side, dtype=dtype)
        weight, bias = folded(first, norm)
        assert bias is not None
        weight = weight.flatten(1).double()
        if tower.takes_prior:
            require_plain(tower.squeeze, nn.Conv2d)
            squeeze = tower.squeeze.weight.detach().flatten(1).double()
            here, before = weight[:, : len(squeeze)], weight[:, len(squeeze) :]
            bias = (bias.double() + before @ tower.missing_previous.detach().double().flatten()).float()
            weight = here @ squeeze
        self._first = PackedLinear(weight.float(), bias, dtype=dtype, activation="relu")
        # The mean over places and the last convolution may change places: both are linear.
        self._last = PackedLinear(last.weight.flatten(1), last.bias, dtype=torch.float32)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (batch, output_dim), float32, not normalised."""
        if not len(pixels):
            return self._tower(pixels)  # type: ignore[no-any-return]
        maps = self._backbone.map(pixels)
        batch, channels = maps.shape[:2]
        rows = self._first(maps.permute(0, 2, 3, 1).reshape(-1, channels))
        return self._last(rows.view(batch, -1, rows.shape[1]).float().mean(1))


#: Towers that :func:`resnet_form` serves -> their forms.
RESNETS: dict[type[nn.Module], Any] = {
    ModifiedResNet: PackedModifiedResNet,
    ClassicResNet: PackedClassicResNet,
    GloriaImageTower: PackedGloria,
    BioVilImageTower: PackedBioVil,
}


def resnet_form(tower: nn.Module, dtype: torch.dtype, *, side: int = 224) -> Step:
    """Return the form of an image tower that is or holds a ResNet.

    Args:
        tower: In eval mode, on the CPU.
        dtype: Of the convolutions.
        side: Usual side of the input in pixels, where the tower itself does not state it.

    Raises:
        NotPackable: It is none of them, or not plainly so.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise NotPackable(f"{type(tower).__name__} has no {dtype} form")
    if type(tower) is ClassicResNet:
        return PackedClassicResNet(tower, side=tower.image_size or side, dtype=dtype)
    made = RESNETS.get(type(tower))
    if made is not None:
        form: Step = made(tower, dtype=dtype)
        return form
    raise NotPackable(f"{type(tower).__name__} is no ResNet")


class _ModifiedBlock:
    def __init__(self, block: nn.Module, side: int, dtype: torch.dtype) -> None:
        require_plain(block, Bottleneck)
        assert isinstance(block, Bottleneck)
        require_plain(block.avgpool, nn.AvgPool2d, nn.Identity)
        self._pool = block.avgpool
        small = self.side = side // 2 if isinstance(block.avgpool, nn.AvgPool2d) else side
        self._one = PackedConv(block.conv1, block.bn1, side=side, dtype=dtype, relu=True)
        self._two = PackedConv(block.conv2, block.bn2, side=side, dtype=dtype, relu=True)
        self._three = PackedConv(block.conv3, block.bn3, side=small, dtype=dtype, relu=True)
        require_plain(block.downsample, nn.Identity, nn.Sequential)
        self._before: nn.Module | None = None
        self._shortcut: PackedConv | None = None
        if isinstance(block.downsample, nn.Sequential):
            self._before, conv, norm = block.downsample
            require_plain(self._before, nn.AvgPool2d)
            self._shortcut = PackedConv(conv, norm, side=small, dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        out = self._pool(self._two(self._one(x)))
        shortcut = x if self._shortcut is None or self._before is None else self._shortcut(self._before(x))
        return self._three(out, shortcut)


class _ClassicBlock:
    def __init__(self, block: nn.Module, side: int, dtype: torch.dtype) -> None:
        require_plain(block, classic_resnet.Bottleneck, classic_resnet.BasicBlock)
        assert isinstance(block, (classic_resnet.Bottleneck, classic_resnet.BasicBlock))
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if isinstance(block, classic_resnet.Bottleneck):
            pairs.append((block.conv3, block.bn3))
        self._convs: list[PackedConv] = []
        inner = side
        for conv, norm in pairs:
            self._convs.append(PackedConv(conv, norm, side=inner, dtype=dtype, relu=True))
            inner = _halved(inner) if conv.stride != (1, 1) else inner
        self.side = inner
        self._shortcut: PackedConv | None = None
        if block.downsample is not None:
            require_plain(block.downsample, nn.Sequential)
            self._shortcut = PackedConv(*block.downsample, side=side, dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        out = x
        for conv in self._convs[:-1]:
            out = conv(out)
        return self._convs[-1](out, x if self._shortcut is None else self._shortcut(x))


class _AttentionPool:
    """CLIP's attention pool: since there is one query, neither keys nor values of single positions are worked out.

    q · (W x + b) = (q W) · x + q · b, whose last term is the same for all positions and vanishes in the softmax; and
    Σ a (W x + b) = W (Σ a x) + b, since weights add up to 1. Exact in real arithmetic; for 50 positions it saves 96 % of
    the pool's products.
    """

    def __init__(self, pool: nn.Module, dtype: torch.dtype) -> None:
        require_plain(pool, AttentionPool2d)
        assert isinstance(pool, AttentionPool2d)
        for linear in (pool.k_proj, pool.v_proj):
            require_plain(linear, nn.Linear)
        self._query, self._out = pack(pool.q_proj, dtype=dtype), pack(pool.c_proj, dtype=dtype)
        heads, channels = pool.heads, pool.q_proj.in_features
        self._keys = pool.k_proj.weight.detach().view(heads, -1, channels)
        self._values = pool.v_proj.weight.detach().view(heads, -1, channels).transpose(1, 2)
        self._bias = pool.v_proj.bias.detach().view(heads, 1, -1)
        self._positions = pool.positional_embedding.detach()
        self._scale = 1 / math.sqrt(channels // heads)

    def __call__(self, maps: Tensor) -> Tensor:
        batch, channels = maps.shape[:2]
        x = maps.permute(0, 2, 3, 1).reshape(batch, -1, channels).float()
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self._positions
        query = self._query(x[:, 0]).float().view(batch, len(self._keys), -1).transpose(0, 1) * self._scale
        seen = torch.bmm(query, self._keys).transpose(0, 1)  # (batch, heads, channels)
        weights = torch.bmm(seen, x.transpose(1, 2)).softmax(-1)
        pooled = torch.bmm(weights, x).transpose(0, 1)  # (heads, batch, channels)
        values = torch.baddbmm(self._bias, pooled, self._values)
        return self._out(values.transpose(0, 1).reshape(batch, -1)).float()


def _blocks(layer: nn.Module) -> list[nn.Module]:
    require_plain(layer, nn.Sequential)
    return list(layer.children())


def _halved(side: int) -> int:
    """Rows behind a convolution or pooling of stride 2 with padding (kernel − 1) / 2."""
    return (side + 1) // 2
