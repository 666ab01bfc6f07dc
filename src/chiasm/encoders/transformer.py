"""The pre-norm transformer that CLIP's ViT and text tower share, in OpenAI's key layout.

In: token vectors (batch, tokens, width). Out: the same shape, or one token of each row. One product makes queries, keys
and values; attention is PyTorch's fused kernel; no dropout. Keys: ``resblocks.N.{ln_1, attn.in_proj_weight,
attn.in_proj_bias, attn.out_proj, ln_2, mlp.c_fc, mlp.c_proj}``, and open_clip's ``{ls_1, ls_2}.gamma``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from chiasm.encoders.base import Activation

AttentionMode = Literal["all", "first", "row", "values", "weights"]
#: Up to this many tokens the CPU's fused attention is faster on float32 numbers than on bfloat16 ones, backward above
#: all (a third of the time at 50 tokens, equal at 197, slower at 577).
FLOAT_TOKENS = 256


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes half-precision input in float32, as OpenAI's does, and gives the input's type back."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


_SIGMOID_SCALE = 1.702


class _ScaledSiLU(torch.autograd.Function):
    """silu(c x) / c. The constants cancel in its derivative, silu'(c x), so the backward pass is one kernel more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x * _SIGMOID_SCALE).mul_(1 / _SIGMOID_SCALE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        scaled = ctx.saved_tensors[0] * _SIGMOID_SCALE
        if torch.is_grad_enabled():  # to be differentiated again, which the kernel cannot
            sigmoid = scaled.sigmoid()
            slope: Tensor = sigmoid * (1 + scaled * (1 - sigmoid))
            return gradients[0] * slope
        found: Tensor = torch.ops.aten.silu_backward(gradients[0], scaled)
        return found


class QuickGELU(nn.Module):
    """x · σ(1.702 x), computed as silu(1.702 x) / 1.702."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        if x.requires_grad and torch.is_grad_enabled() and not is_traced():
            trained: Tensor = _ScaledSiLU.apply(x)  # type: ignore[no-untyped-call]
            return trained
        return F.silu(x * _SIGMOID_SCALE) * (1 / _SIGMOID_SCALE)


def is_traced() -> bool:
    """Return whether the call is being recorded (export, compilation), where only plain operations belong."""
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


class SwiGLU(nn.Module):
    """SiLU(first half) · second half (Shazeer 2020; timm's ``SwiGLUPacked``): gives half of the channels back."""

    def forward(self, x: Tensor) -> Tensor:
        """Halve the last axis."""
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


ACTIVATIONS: Mapping[Activation, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "swiglu": SwiGLU,
}


class Attention(nn.Module):
    """Multi-head self-attention in the key layout of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        mode: AttentionMode = "all",
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: (batch, tokens, width).
            causal: Whether a token sees only itself and what precedes it.
            mode: ``all`` answers every token; ``first`` answers the first token alone, from all tokens; ``row`` answers
                the token at ``rows`` of each text, from what it sees; ``values`` lets every token see itself alone
                (Zhou et al. 2022, MaskCLIP); ``weights`` is ``all`` that also returns the attention weights (batch,
                heads, tokens, tokens), which stay in the graph.
            mask: (batch, 1, tokens, tokens) booleans, True where a token is seen; in place of ``causal``, in mode
                ``all``, ``row`` or ``weights``.
            rows: (batch,) positions, in mode ``row``.
        """
        width = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if mode == "values":
            return self.out_proj(F.linear(x, weight[2 * width :], bias[2 * width :])), None
        if mode in ("first", "row"):
            if mode == "row":
                assert rows is not None
                mask = _seen_from(rows, x.shape[1], causal, mask)
            q = self._split(F.linear(one_token(x, mode, rows), weight[:width], bias[:width]), 1)[0]
            k, v = self._split(F.linear(x, weight[width:], bias[width:]), 2)
        else:
            q, k, v = self._split(F.linear(x, weight, bias), 3)
        weights = None
        if mode == "weights":
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            elif causal:
                hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(hidden, float("-inf"))
            weights = scores.softmax(-1)
            out = weights @ v
        else:
            out = fused_attention(q, k, v, mask=mask, causal=causal and mode == "all" and mask is None)
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        batch, tokens, width = x.shape
        head_dim = width // (parts * self.heads)
        return x.view(batch, tokens, parts, self.heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    """Return PyTorch's fused attention of (batch, heads, tokens, dim), in float32 where bfloat16 costs more than it saves.

    The numbers that come in may be bfloat16 (the outputs of linear layers under autocast); attention among up to
    :data:`FLOAT_TOKENS` of them on a CPU then works in float32, which is also nearer to the truth.
    """
    dtype = q.dtype
    if dtype != torch.bfloat16 or q.device.type != "cpu" or k.shape[2] > FLOAT_TOKENS or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.float(), k.float(), v.float()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).to(dtype)


def one_token(x: Tensor, mode: AttentionMode, rows: Tensor | None) -> Tensor:
    """Return (batch, 1, width): the first token of each row, or the one at ``rows`` in mode ``row``."""
    if mode == "first":
        return x[:, :1]
    return x[torch.arange(len(x), device=x.device), rows].unsqueeze(1)


def _seen_from(rows: Tensor, tokens: int, causal: bool, mask: Tensor | None) -> Tensor | None:
    """Return what the tokens at ``rows`` see: (batch, 1, 1, tokens) booleans, or None for everything."""
    if mask is not None:
        return mask[torch.arange(len(rows), device=rows.device), :, rows].unsqueeze(2)
    if not causal:
        return None
    return (torch.arange(tokens, device=rows.device) <= rows[:, None])[:, None, None, :]


class MLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(hidden // 2 if activation == "swiglu" else hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token."""
        out: Tensor = self.c_proj(self.gelu(self.c_fc(x)))
        return out


class LayerScale(nn.Module):
    """Multiply channel by channel (Touvron et al. 2021, CaiT); starts at 1e-5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last axis."""
        return x * self.gamma


class Block(nn.Module):
    """One residual block: attention, then an MLP, each behind its LayerNorm and, where wanted, before a LayerScale."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float,
        activation: Activation,
        ln_eps: float,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = LayerNorm(width, eps=ln_eps)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width, eps=ln_eps)
        self.mlp = MLP(width, hidden, activation)
        self.ls_1 = LayerScale(width) if layer_scale else nn.Identity()
        self.ls_2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        mode: AttentionMode = "all",
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens (one of each row in modes ``first`` and ``row``) and, in mode ``weights``, the weights."""
        attended, weights = self.attn(self.ln_1(x), causal=causal, mode=mode, mask=mask, rows=rows)
        x = (one_token(x, mode, rows) if mode in ("first", "row") else x) + self.ls_1(attended)
        return x + self.ls_2(self.mlp(self.ln_2(x))), weights


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
        grad_checkpointing: Recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        activation: Activation = "quick_gelu",
        ln_eps: float = 1e-5,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=mlp_ratio, activation=activation, ln_eps=ln_eps, layer_scale=layer_scale)
            for _ in range(layers)
        )

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        last: AttentionMode = "all",
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run all blocks, the last one in mode ``last``; ``mask`` and ``rows`` as in :class:`Attention`.

        ``last="first"`` and ``last="row"`` return (batch, 1, width): in the last block only that token's query, output
        projection and MLP are computed. That is exact for whoever reads only this token, and saves 10/12 of the block.
        """
        for i, block in enumerate(self.resblocks):
            mode = last if i == self.layers - 1 else "all"
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, mode, mask, rows, use_reentrant=False)[0]
            else:
                x = block(x, causal, mode, mask, rows)[0]
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: less memory, about a third more time, the same gradients."""
        self.grad_checkpointing = enable

    def attend(self, x: Tensor, *, causal: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all blocks in full and return also every block's attention weights, inside the graph."""
        kept = []
        for block in self.resblocks:
            x, weights = block(x, causal, "weights")
            kept.append(weights)
        return x, tuple(kept)

    def init_weights(self, generator: Generator, *, scaled: bool) -> None:
        """Draw all weights.

        Args:
            generator: Source of randomness.
            scaled: OpenAI's text scheme (normal; in-projections width^-½, MLP in (2·width)^-½, everything that
                writes to the residual stream width^-½ · (2·layers)^-½). Otherwise PyTorch's defaults, which OpenAI
                leaves in the ViT: Xavier-uniform QKV, uniform ±fan_in^-½ elsewhere.
        """
        attn_std = self.width**-0.5
        proj_std = attn_std * (2 * self.layers) ** -0.5
        with torch.no_grad():
            for module in self.resblocks.modules():
                init_standard(module, generator)
            for block in self.resblocks:
                assert isinstance(block, Block)
                attn, mlp = block.attn, block.mlp
                attn.in_proj_bias.zero_()
                attn.out_proj.bias.zero_()
                if scaled:
                    attn.in_proj_weight.normal_(std=attn_std, generator=generator)
                    attn.out_proj.weight.normal_(std=proj_std, generator=generator)
                    mlp.c_fc.weight.normal_(std=(2 * self.width) ** -0.5, generator=generator)
                    mlp.c_proj.weight.normal_(std=proj_std, generator=generator)
                else:
                    xavier_uniform(attn.in_proj_weight, generator)


def xavier_uniform(weight: Tensor, generator: Generator) -> None:
    """Fill a matrix uniformly within ±√(6 / (rows + columns)) (Glorot and Bengio 2010)."""
    bound = math.sqrt(6 / sum(weight.shape))
    weight.uniform_(-bound, bound, generator=generator)


def init_standard(module: nn.Module, generator: Generator) -> None:
    """Give one module PyTorch's default weights, drawn from ``generator``; its children are left alone."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        bound = 1 / math.sqrt(math.prod(module.weight.shape[1:]))
        module.weight.uniform_(-bound, bound, generator=generator)
        if module.bias is not None:
            module.bias.uniform_(-bound, bound, generator=generator)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        module.reset_parameters()
    elif isinstance(module, LayerScale):
        module.gamma.fill_(1e-5)
