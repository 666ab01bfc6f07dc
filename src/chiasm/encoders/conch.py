"""CONCH's image tower: timm's ViT pooled by a learned query. Its text tower is CoCa's (``text.pool = "appended"``).

In: pixels (batch, 3, size, size). Out: (batch, ``output_dim``), before the projection into the joint space, which lies
in the tower's head. Without that projection it is the space that the authors use for probes; the catalog's
``conch-probe`` is that space as an encoder of its own.

References: Lu et al. 2024, "A visual-language foundation model for computational pathology"; Yu et al. 2022, CoCa. The
code is written from the description of the architecture; nothing of the authors' code (CC-BY-NC-ND) is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from chiasm.encoders.base import ImageTowerConfig
from chiasm.encoders.named import tower_options
from chiasm.encoders.transformer import LayerNorm
from chiasm.encoders.vit import AttentionalPooler, VisionTransformer
from chiasm.errors import ConfigError

IMAGE_OPTIONS: Mapping[str, Any] = {
    "width": 768, "layers": 12, "heads": 12, "patch_size": 16, "output_dim": 512, "pool_heads": 8,
}  # fmt: skip


class ConchImageTower(nn.Module):
    """timm's ViT, whose normalised tokens (class token included) one learned query pools.

    Args:
        config: The declaration; its options are those of :data:`IMAGE_OPTIONS`.

    Attributes:
        output_dim: Dimensions of the pooled vector, before CONCH's projection into the joint space.
    """

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        options = tower_options(config, IMAGE_OPTIONS)
        width, dim = options["width"], options["output_dim"]
        shape = ImageTowerConfig(
            kind="vit",
            image_size=config.image_size,
            width=width,
            layers=options["layers"],
            heads=options["heads"],
            patch_size=options["patch_size"],
            activation="gelu",
            pre_norm=False,
            patch_bias=True,
            ln_eps=1e-6,
        )
        if dim == width or dim % options["pool_heads"]:
            raise ConfigError(
                f"`image.options.output_dim` is {dim}: it must differ from the width {width} and be a multiple of the "
                f"{options['pool_heads']} heads"
            )
        self.vit = VisionTransformer(shape, None)
        self.attn_pool = AttentionalPooler(dim, width, heads=options["pool_heads"])
        self.ln_pool = LayerNorm(dim)
        self.output_dim: int = dim
        generator = Generator().manual_seed(int(torch.randint(2**62, ())))
        self.vit.init_weights(generator)
        self.attn_pool.init_weights(generator)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the pooled vectors (batch, output_dim), neither projected nor normalised."""
        tokens = self.vit.ln_post(self.vit.forward_features(pixels).tokens)
        pooled: Tensor = self.ln_pool(self.attn_pool(tokens)[:, 0])
        return pooled

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Return what the pooler would give if it looked at one patch alone: (batch, rows, columns, output_dim).

        CONCH publishes no map of this kind; it is the pooler's analogue of Zhou et al. 2022 (MaskCLIP).
        """
        tokens = self.vit.ln_post(self.vit.forward_features(pixels).tokens)
        values: Tensor = self.ln_pool(self.attn_pool.values(tokens[:, self.vit.first_patch :]))
        return values.reshape(len(values), self.vit.grid, self.vit.grid, self.output_dim)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See :meth:`Transformer.set_grad_checkpointing`."""
        self.vit.set_grad_checkpointing(enable)
