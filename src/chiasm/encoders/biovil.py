"""BioViL's and BioViL-T's image tower, and CXR-BERT, their text tower.

In: pixels (batch, 3, size, size) in [0, 1], for BioViL-T also those of the patient's prior image; ids with their mask.
Out: (batch, 128), projected already: BioViL projects every patch and takes the mean of the projected ones, which is not
the projection of the mean, since a batch norm and a ReLU lie between.

References: Boecking et al. 2022, "Making the most of text semantics to improve biomedical vision-language processing";
Bannur et al. 2023, "Learning to exploit temporal structure for biomedical vision-language processing"; microsoft/hi-ml,
hi-ml-multimodal (MIT). Deviation: no dropout and no stochastic depth in the temporal pooler while it trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.encoders.base import ImageTowerConfig, TextTowerConfig
from chiasm.encoders.bert import BERT_OPTIONS, build_bert, no_rows
from chiasm.encoders.classic_resnet import ClassicResNet
from chiasm.encoders.named import tower_options
from chiasm.errors import ConfigError, InputError

IMAGE_OPTIONS: Mapping[str, Any] = {
    "layers": (3, 4, 6, 3), "width": 64, "output_dim": 128, "temporal": False, "temporal_dim": 256,
    "temporal_layers": 3, "temporal_heads": 8,
}  # fmt: skip
TEXT_OPTIONS: Mapping[str, Any] = {**BERT_OPTIONS, "vocab_size": 30522, "output_dim": 128}


class BioVilImageTower(nn.Module):
    """A ResNet, for BioViL-T a comparison with the prior image, and a projector of single patches.

    Args:
        config: The declaration; its options are those of :data:`IMAGE_OPTIONS`. ``temporal`` is BioViL-T.

    Attributes:
        output_dim: Dimensions of the joint space.
        takes_prior: Whether a prior image may be given.
    """

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        options = tower_options(config, IMAGE_OPTIONS)
        dim, inner = options["output_dim"], options["temporal_dim"]
        self.takes_prior: bool = options["temporal"]
        self.backbone = ClassicResNet(options["layers"], width=options["width"], image_size=config.image_size)
        channels = self.backbone.output_dim
        if self.takes_prior:
            self.squeeze = nn.Conv2d(channels, inner, 1, bias=False)
            self.pooler = TemporalPooler(inner, options["temporal_layers"], options["temporal_heads"])
            self.missing_previous = nn.Parameter(torch.empty(1, inner, 1, 1))
            nn.init.trunc_normal_(self.missing_previous, std=0.02)
            channels = 2 * inner
        self.projector = nn.Sequential(
            nn.Conv2d(channels, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(), nn.Conv2d(dim, dim, 1)
        )
        self.output_dim: int = dim

    def forward(self, pixels: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return the embeddings (batch, output_dim), the mean of the projected patches, not normalised.

        Args:
            pixels: (batch, 3, size, size) in [0, 1].
            prior: The same for an earlier image of each patient (BioViL-T). None: there is none, for which the model
                has a learned vector.
        """
        return self._map(pixels, prior).mean((2, 3))

    def patch_tokens(self, pixels: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return the projected patches (batch, rows, columns, output_dim); their mean is the embedding."""
        return self._map(pixels, prior).permute(0, 2, 3, 1)

    def image_locals(self, pixels: Tensor) -> Tensor:
        """Return the same as :meth:`patch_tokens`, as (batch, output_dim, rows, columns)."""
        return self._map(pixels, None)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage of the ResNet in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def _map(self, pixels: Tensor, prior: Tensor | None) -> Tensor:
        if prior is not None and not self.takes_prior:
            raise InputError("this image tower takes no prior image", hint="`biovil-t` does")
        if prior is not None and prior.shape != pixels.shape:
            raise InputError(f"prior images have shape {tuple(prior.shape)}, the images {tuple(pixels.shape)}")
        maps = self.backbone.feature_maps(pixels if prior is None else torch.cat([pixels, prior]))[-1]
        if self.takes_prior:
            maps = self.squeeze(maps)
            if prior is None:
                difference = self.missing_previous.expand(maps.shape[0], -1, *maps.shape[2:])
            else:
                maps, before = maps.split(len(pixels))
                difference = self.pooler(maps, before)
            maps = torch.cat([maps, difference], dim=1)
        projected: Tensor = self.projector(maps)
        return projected


class TemporalPooler(nn.Module):
    """A transformer over the patches of two images; what it says of the current one is the difference between them.

    Args:
        dim: Channels of the maps.
        layers: Blocks.
        heads: Attention heads.
    """

    def __init__(self, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        if dim % heads or dim % 4:
            raise ConfigError(f"`image.options.temporal_dim` must be a multiple of 4 and of {heads} heads, got {dim}")
        self.type_embed = nn.Parameter(torch.empty(2, 1, dim))
        self.blocks = nn.ModuleList(TemporalBlock(dim, heads) for _ in range(layers))
        self.norm_post = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.type_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:
        """Return a map like ``current`` for two maps (batch, dim, rows, columns)."""
        batch, dim, rows, columns = current.shape
        place = sine_positions(rows, columns, dim).to(current)
        where = torch.cat([place + self.type_embed[0], place + self.type_embed[1]])
        x = torch.cat([current.flatten(2), previous.flatten(2)], dim=2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, where)
        normed: Tensor = self.norm_post(x[:, : rows * columns])
        return normed.transpose(1, 2).reshape(batch, dim, rows, columns)


class TemporalBlock(nn.Module):
    """Attention and MLP, each behind its LayerNorm; the place is added to queries, keys and values alike."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = TemporalAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TemporalMLP(dim)

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        """Return tokens like ``x`` (batch, tokens, dim); ``where`` is (tokens, dim)."""
        x = x + self.attn(self.norm1(x) + where)
        added: Tensor = x + self.mlp(self.norm2(x))
        return added


class TemporalAttention(nn.Module):
    """Multi-head self-attention with separate projections, of which only the last has a bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.proj_q = nn.Linear(dim, dim, bias=False)
        self.proj_k = nn.Linear(dim, dim, bias=False)
        self.proj_v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (batch, tokens, dim)."""
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (f(x).view(split).transpose(1, 2) for f in (self.proj_q, self.proj_k, self.proj_v))
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class TemporalMLP(nn.Module):
    """Two linear layers of one width around a GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


def sine_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Return DETR's code of the places of a grid, rows first: (rows · columns, dim).

    Rows and columns are counted from 1 and scaled to (0, 2π]; half of the channels hold the row, half the column, each
    as sines and cosines of geometric frequencies (Carion et al. 2020, "normalized" position embedding, base 10,000).
    """
    half = dim // 2
    frequencies = 10_000.0 ** (2 * torch.arange(half // 2, dtype=torch.float32).repeat_interleave(2) / half)

    def code(count: int) -> Tensor:
        places = torch.arange(1, count + 1, dtype=torch.float32)
        angles = (places / (count + 1e-6) * 2 * math.pi)[:, None] / frequencies
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)

    row, column = code(rows), code(columns)
    both = [row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)]
    return torch.cat(both, dim=2).reshape(rows * columns, dim)


class CxrBertTextTower(nn.Module):
    """BERT, whose first token goes through a projection head of its own.

    Args:
        config: The declaration; its options are those of :data:`TEXT_OPTIONS`.

    Attributes:
        output_dim: Dimensions of the joint space.
        pad_id: The id that fills texts up.
        can_trim: True: padding is masked.
    """

    can_trim = True

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        options = tower_options(config, TEXT_OPTIONS)
        self.bert = build_bert(options, config.context_length)
        self.output_dim: int = options["output_dim"]
        self.cls_projection_head = ProjectionHead(options["width"], self.output_dim)
        self.pad_id = 0

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (batch, output_dim) for ids and mask (batch, tokens), not normalised."""
        if len(ids) == 0:
            return no_rows(ids, self.output_dim, self.bert)
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        projected: Tensor = self.cls_projection_head(hidden[:, 0])
        return projected

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute BERT's layers in the backward pass."""
        bert: Any = self.bert
        (bert.gradient_checkpointing_enable if enable else bert.gradient_checkpointing_disable)()


class ProjectionHead(nn.Module):
    """Linear, GELU, LayerNorm, linear, in CXR-BERT's names."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.dense_to_hidden = nn.Linear(width, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12)
        self.dense_to_output = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, dim)."""
        out: Tensor = self.dense_to_output(self.LayerNorm(F.gelu(self.dense_to_hidden(x))))
        return out
