"""One block of the native transformer for inference, on a matrix of rows that may belong to texts of any lengths.

In: rows (n, width), float32, and a function that attends within the right groups of rows. Out: the same shape; or, of
the last block, only the rows that are pooled. Weights are folded where that is exact: QuickGELU becomes SiLU (fc1's
weight and bias times 1.702, fc2's weight through 1.702), a LayerScale goes into the layer before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.encoders.inference.int8 import make_linear
from chiasm.encoders.inference.packed import Activation, NotPackable, require_plain
from chiasm.encoders.transformer import (
    MLP,
    Attention,
    Block,
    LayerNorm,
    LayerScale,
    QuickGELU,
    SwiGLU,
    Transformer,
)

#: Queries, keys and values side by side, (n, 3 · width) -> what each row gathers, (n, width).
Attend = Callable[[Tensor], Tensor]
#: Queries (m, width) and keys and values side by side (n, 2 · width) -> (m, width).
AttendFew = Callable[[Tensor, Tensor], Tensor]


class PackedBlock:
    """A :class:`~chiasm.encoders.transformer.Block` with packed weights.

    Args:
        block: Its weights are copied.
        dtype: Of the linear layers; ``torch.int8`` quantises them (:mod:`chiasm.encoders.inference.int8`).
        few: Whether only chosen rows of its output will be read (:meth:`few`); queries are then packed apart from keys
            and values.

    Raises:
        NotPackable: A part that is not chiasm's own: an adapted layer, a hook, weights of half precision.
    """

    def __init__(self, block: nn.Module, *, dtype: torch.dtype, few: bool = False) -> None:
        require_plain(block, Block)
        assert isinstance(block, Block)
        attn, mlp = block.attn, block.mlp
        for module, kind in ((attn, Attention), (mlp, MLP), (block.ln_1, LayerNorm), (block.ln_2, LayerNorm)):
            require_plain(module, kind)
        for linear in (attn.out_proj, mlp.c_fc, mlp.c_proj):
            require_plain(linear, nn.Linear)
        self.heads = attn.heads
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        width = attn.in_proj_weight.shape[1]
        parts = [slice(0, width), slice(width, None)] if few else [slice(None)]
        self._qkv = [make_linear(attn.in_proj_weight[p], attn.in_proj_bias[p], dtype=dtype) for p in parts]
        self._out = make_linear(*_scaled(attn.out_proj, block.ls_1), dtype=dtype)
        activation, gated, before = _activation(mlp.gelu)
        self._gated = gated
        fc = mlp.c_fc
        self._fc = make_linear(
            fc.weight * before, fc.bias * before, dtype=dtype, activation=activation, int8_result=not gated
        )
        weight, bias = _scaled(mlp.c_proj, block.ls_2)
        self._proj = make_linear(weight / before, bias, dtype=dtype)

    def all(self, x: Tensor, attend: Attend) -> Tensor:
        """Return all rows behind the block, (n, width) float32."""
        x = x + self._out(attend(self._qkv[0](_norm(self.ln_1, x))))
        return self._finish(x)

    def few(self, x: Tensor, rows: Tensor, attend: AttendFew) -> Tensor:
        """Return some rows behind the block, (m, width); every row still gives its keys and values.

        Args:
            x: (n, width), all rows before the block.
            rows: (m,) positions of those that are wanted.
            attend: Lets them see the rows of their own image or text.
        """
        normed = _norm(self.ln_1, x)
        query, keys_values = self._qkv[0](normed[rows]), self._qkv[1](normed)
        return self._finish(x[rows] + self._out(attend(query, keys_values)))

    def _finish(self, x: Tensor) -> Tensor:
        hidden = self._fc(_norm(self.ln_2, x))
        if self._gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        projected: Tensor = self._proj(hidden)
        return x + projected


def pack_blocks(transformer: nn.Module, *, dtype: torch.dtype, few: bool) -> list[PackedBlock]:
    """Return all blocks of a :class:`~chiasm.encoders.transformer.Transformer`, the last one for chosen rows or for all.

    Raises:
        NotPackable: See :class:`PackedBlock`.
    """
    require_plain(transformer, Transformer)
    assert isinstance(transformer, Transformer)
    last = len(transformer.resblocks) - 1
    return [PackedBlock(b, dtype=dtype, few=few and i == last) for i, b in enumerate(transformer.resblocks)]


def attend_equal(qkv: Tensor, batch: int, heads: int, *, causal: bool = False) -> Tensor:
    """Attend within groups of equal length: (batch · tokens, 3 · width) -> (batch · tokens, width)."""
    q, k, v = split_heads(qkv, batch, heads, 3)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).reshape(len(qkv), -1)


def attend_one(query: Tensor, keys_values: Tensor, batch: int, heads: int) -> Tensor:
    """Let one query a group see all of its group: (batch, width), (batch · tokens, 2 · width) -> (batch, width)."""
    (q,) = split_heads(query, batch, heads, 1)
    k, v = split_heads(keys_values, batch, heads, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1)


def split_heads(x: Tensor, batch: int, heads: int, parts: int) -> tuple[Tensor, ...]:
    """View rows (batch · tokens, parts · width) as ``parts`` tensors (batch, heads, tokens, width / heads)."""
    head_dim = x.shape[1] // (parts * heads)
    return x.view(batch, -1, parts, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def _norm(module: LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def _scaled(linear: nn.Linear, scale: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer with a LayerScale behind it."""
    require_plain(scale, nn.Identity, LayerScale)
    if isinstance(scale, LayerScale):
        return linear.weight * scale.gamma[:, None], linear.bias * scale.gamma
    return linear.weight, linear.bias


def _activation(module: nn.Module) -> tuple[Activation, bool, float]:
    """Name of the activation, whether it is a gate, and the factor before it (divided out behind it)."""
    require_plain(module, QuickGELU, nn.GELU, SwiGLU)
    if isinstance(module, QuickGELU):
        return "silu", False, 1.702
    if isinstance(module, SwiGLU):
        return "none", True, 1.0
    assert isinstance(module, nn.GELU)
    if module.approximate not in ("none", "tanh"):
        raise NotPackable(f"GELU by `{module.approximate}`")
    return ("gelu" if module.approximate == "none" else "gelu_tanh"), False, 1.0
