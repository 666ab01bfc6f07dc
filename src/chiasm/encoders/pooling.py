"""Pooling of patch tokens by a learned query: SigLIP's.

In: tokens (batch, n, width). Out: (batch, width).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from chiasm.encoders.base import Activation
from chiasm.encoders.transformer import MLP, LayerNorm, init_standard, xavier_uniform


class LatentPooler(nn.Module):
    """A query attends to all tokens, and an MLP with a residual follows (Zhai et al. 2022; timm's ``map`` pooling).

    Keys: ``query``, ``attn.{in_proj_weight, in_proj_bias, out_proj}``, ``ln``, ``mlp.{c_fc, c_proj}``.

    References:
        timm ``AttentionPoolLatent``; transformers ``SiglipMultiheadAttentionPoolingHead``.
    """

    def __init__(self, width: int, heads: int, *, mlp_ratio: float, activation: Activation, ln_eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, width))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln = LayerNorm(width, eps=ln_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, width) for tokens (batch, n, width)."""
        pooled: Tensor = self.attn(self.query.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]
        return self._finish(pooled)[:, 0]

    def values(self, x: Tensor) -> Tensor:
        """Return what the output would be if all attention were on one token: (batch, n, width)."""
        width = self.query.shape[1]
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        out: Tensor = self.attn.out_proj(F.linear(x, weight[2 * width :], bias[2 * width :]))
        return self._finish(out)

    def init_weights(self, generator: Generator) -> None:
        """Draw the query from N(0, 1/width) and the matrices as ``nn.MultiheadAttention`` and ``nn.Linear`` do."""
        with torch.no_grad():
            self.query.normal_(std=self.query.shape[1] ** -0.5, generator=generator)
            for module in self.modules():
                init_standard(module, generator)
            xavier_uniform(self.attn.in_proj_weight, generator)
            self.attn.in_proj_bias.zero_()
            self.attn.out_proj.bias.zero_()

    def _finish(self, x: Tensor) -> Tensor:
        finished: Tensor = x + self.mlp(self.ln(x))
        return finished
