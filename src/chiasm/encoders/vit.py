"""CLIP's vision transformer.

In: pixels (batch, 3, size, size), normalised. Out: (batch, output_dim). The patch embedding is one matrix product; with
class-token pooling the last block computes the class token alone, which is exact. Keys are OpenAI's: ``conv1``,
``class_embedding``, ``positional_embedding``, ``ln_pre``, ``transformer``, ``ln_post``, ``proj`` (and open_clip's
``attn_pool``). With ``patch_bias``, ``layer_scale``, ``registers`` and without ``pre_norm`` it is the ViT of timm, DINO
and DINOv2 too; where those give the class token no position, row 0 of ``positional_embedding`` is zero. Without
``class_token`` and with ``pool = "map"`` it is SigLIP's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from chiasm.encoders.base import ImageTowerConfig
from chiasm.encoders.pooling import LatentPooler
from chiasm.encoders.transformer import LayerNorm, Transformer, init_standard, xavier_uniform
from chiasm.errors import InputError

PatchMode = Literal["auto", "tokens", "values"]


class ViTFeatures(NamedTuple):
    """What :meth:`VisionTransformer.forward_features` keeps.

    Attributes:
        pooled: (batch, output_dim), the embedding.
        tokens: (batch, 1 + registers + patches, width), class token first, after the last block and before ``ln_post``.
        attentions: One (batch, heads, tokens, tokens) a block, rows sum to 1, inside the graph of ``pooled``; empty
            when they were not asked for.
    """

    pooled: Tensor
    tokens: Tensor
    attentions: tuple[Tensor, ...]


class AttentionalPooler(nn.Module):
    """Pool tokens with a learned query (open_clip's ``AttentionalPooler`` with one query; Yu et al. 2022, CoCa)."""

    def __init__(self, dim: int, context_dim: int, *, heads: int = 8, ln_eps: float = 1e-5) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, dim))
        self.attn = nn.MultiheadAttention(dim, heads, kdim=context_dim, vdim=context_dim, batch_first=True)
        self.ln_q = LayerNorm(dim, eps=ln_eps)
        self.ln_k = LayerNorm(context_dim, eps=ln_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, 1, dim)."""
        x = self.ln_k(x)
        query = self.ln_q(self.query).expand(x.shape[0], -1, -1)
        pooled: Tensor = self.attn(query, x, x, need_weights=False)[0]
        return pooled

    def values(self, x: Tensor) -> Tensor:
        """Return what each token would contribute if all attention were on it: (batch, tokens, dim)."""
        dim = self.query.shape[1]
        packed = self.attn.in_proj_weight
        weight = packed[2 * dim :] if packed is not None else self.attn.v_proj_weight
        values = F.linear(self.ln_k(x), weight, self.attn.in_proj_bias[2 * dim :])
        projected: Tensor = self.attn.out_proj(values)
        return projected

    def init_weights(self, generator: Generator) -> None:
        """Draw the query from N(0, 1) and the matrices as ``nn.MultiheadAttention`` does."""
        with torch.no_grad():
            self.query.normal_(generator=generator)
            for module in self.modules():
                init_standard(module, generator)
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                weight = getattr(self.attn, name)
                if weight is not None:
                    xavier_uniform(weight, generator)
            self.attn.in_proj_bias.zero_()
            self.attn.out_proj.bias.zero_()


class VisionTransformer(nn.Module):
    """The image tower of CLIP (Dosovitskiy et al. 2021, as changed by Radford et al. 2021).

    Args:
        config: Its shape; ``kind`` must be ``vit``.
        output_dim: Dimensions of the joint space; None leaves the projection out.

    Attributes:
        output_dim: Dimensions of the output.
        image_size: Side of the square input, in pixels.
        first_patch: Position of the first patch among the tokens.
    """

    def __init__(self, config: ImageTowerConfig, output_dim: int | None) -> None:
        super().__init__()
        assert isinstance(config.layers, int)
        width = config.width
        self.pool = config.pool
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size
        classes = int(config.has_class_token)
        self.first_patch = classes + config.registers
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=config.patch_bias)
        self.class_embedding = nn.Parameter(torch.empty(width)) if classes else None
        self.positional_embedding = nn.Parameter(torch.empty(self.grid**2 + classes, width))
        self.registers = nn.Parameter(torch.empty(config.registers, width)) if config.registers else None
        self.ln_pre = LayerNorm(width, eps=config.ln_eps) if config.pre_norm else nn.Identity()
        self.transformer = Transformer(
            width,
            config.layers,
            config.pool_heads,
            mlp_ratio=config.mlp_ratio,
            activation=config.activation,
            ln_eps=config.ln_eps,
            layer_scale=config.layer_scale,
        )
        self.attn_pool: AttentionalPooler | None = None
        pooled_dim = width
        if config.pool == "attention":
            pooled_dim = output_dim or width
            self.attn_pool = AttentionalPooler(pooled_dim, width, heads=_pooler_heads(pooled_dim), ln_eps=config.ln_eps)
        self.map_pool: LatentPooler | None = None
        if config.pool == "map":
            self.map_pool = LatentPooler(
                width,
                config.pool_heads,
                mlp_ratio=config.mlp_ratio,
                activation=config.activation,
                ln_eps=config.ln_eps,
            )
        self.ln_post = LayerNorm(pooled_dim, eps=config.ln_eps)
        self.proj = None if output_dim is None else nn.Parameter(torch.empty(pooled_dim, output_dim))
        self.output_dim = output_dim or pooled_dim

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (batch, output_dim), not normalised."""
        last: Literal["first", "all"] = "first" if self.pool == "cls" else "all"
        return self.pooled(self.transformer(self._embed(pixels), last=last))

    def forward_features(self, pixels: Tensor, return_attention: bool = False) -> ViTFeatures:
        """Return the embeddings with all tokens and, on request, every block's attention weights.

        The last block runs in full, so that patch tokens exist. The weights are part of the graph: gradients of any
        function of ``pooled`` with respect to them are there for the asking (Chefer et al. 2021).
        """
        x = self._embed(pixels)
        if return_attention:
            tokens, attentions = self.transformer.attend(x)
        else:
            tokens, attentions = self.transformer(x), ()
        return ViTFeatures(self.pooled(tokens), tokens, attentions)

    def patch_features(self, pixels: Tensor, mode: PatchMode = "auto") -> Tensor:
        """Return one vector of the joint space for every patch, not normalised: (batch, rows, columns, output_dim).

        Args:
            pixels: (batch, 3, size, size).
            mode: ``tokens`` takes the patch tokens of the last block through ``ln_post`` and ``proj``. ``values`` lets
                each token of the last block see itself alone, which keeps the place of things where the class token is
                pooled (Zhou et al. 2022, "Extract Free Dense Labels from CLIP", section 3.2 and its code). ``auto`` is
                ``values`` for class-token pooling and ``tokens`` otherwise; under mean pooling the embedding is then
                exactly the mean of the patches' vectors.
        """
        if mode == "auto":
            mode = "values" if self.pool == "cls" else "tokens"
        x = self.transformer(self._embed(pixels), last="values" if mode == "values" else "all")
        x = x[:, self.first_patch :]
        if self.attn_pool is not None:
            x = self.attn_pool.values(x)
        x = self.ln_post(x)
        if self.map_pool is not None:
            x = self.map_pool.values(x)
        return self.project(x).reshape(x.shape[0], self.grid, self.grid, self.output_dim)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See :meth:`Transformer.set_grad_checkpointing`."""
        self.transformer.set_grad_checkpointing(enable)

    def init_weights(self, generator: Generator) -> None:
        """Draw all weights by OpenAI's scheme.

        Class and positional embeddings and ``proj`` from N(0, 1/width); everything else by PyTorch's defaults.
        """
        std = self.positional_embedding.shape[1] ** -0.5
        with torch.no_grad():
            for module in (self.conv1, self.ln_pre, self.ln_post):
                init_standard(module, generator)
            if self.class_embedding is not None:
                self.class_embedding.normal_(std=std, generator=generator)
            self.positional_embedding.normal_(std=std, generator=generator)
            if self.registers is not None:
                self.registers.normal_(std=std, generator=generator)
            if self.proj is not None:
                self.proj.normal_(std=std, generator=generator)
        self.transformer.init_weights(generator, scaled=False)
        for pool in (self.attn_pool, self.map_pool):
            if pool is not None:
                pool.init_weights(generator)

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return what still trains when the tower is locked."""
        return [] if self.proj is None else [self.proj]

    def _embed(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels, self.image_size)
        if isinstance(self.conv1, nn.Conv2d):
            p = self.patch_size
            patches = pixels.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
            x = F.linear(patches, self.conv1.weight.flatten(1), self.conv1.bias)
        else:  # adapted: its weights alone are not what it does
            x = self.conv1(pixels).flatten(2).transpose(1, 2)
        return self.with_positions(x)

    def with_positions(self, x: Tensor) -> Tensor:
        """Return the tokens that enter the first block, for embedded patches (batch, patches, width)."""
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.positional_embedding
        if self.registers is not None:
            between = self.registers.to(x.dtype).expand(x.shape[0], -1, -1)
            first = self.first_patch - len(self.registers)
            x = torch.cat([x[:, :first], between, x[:, first:]], dim=1)
        embedded: Tensor = self.ln_pre(x)
        return embedded

    def pooled(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (batch, output_dim) for all tokens behind the last block."""
        if self.attn_pool is not None:
            return self.project(self.ln_post(self.attn_pool(tokens))[:, 0])
        if self.map_pool is not None:
            return self.project(self.map_pool(self.ln_post(tokens[:, self.first_patch :])))
        if self.pool == "cls":
            return self.project(self.ln_post(tokens[:, 0]))
        return self.project(self.ln_post(tokens[:, self.first_patch :]).mean(1))

    def project(self, x: Tensor) -> Tensor:
        """Bring vectors of the tower's width, behind ``ln_post``, into the joint space; as they are without ``proj``."""
        return x if self.proj is None else x @ self.proj


def check_pixels(pixels: Tensor, image_size: int) -> None:
    """Raise ``InputError`` unless ``pixels`` is a floating-point batch of the right shape."""
    expected = (3, image_size, image_size)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
        raise InputError(
            f"images have shape {tuple(pixels.shape)}, the tower expects (batch, 3, {image_size}, {image_size})",
            hint="prepare images with the encoder's own `preprocess`",
        )
    if not pixels.is_floating_point():
        raise InputError(
            f"pixels are {pixels.dtype}, the tower expects floating point",
            hint="prepare images with the encoder's own `preprocess`",
        )


def _pooler_heads(dim: int) -> int:
    return next(heads for heads in (8, 4, 2, 1) if dim % heads == 0)
