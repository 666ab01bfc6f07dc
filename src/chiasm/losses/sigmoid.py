"""SigLIP tile by tile: the sigmoid of every pair of row and column, gradients in the same pass.

Comes in: features, logit scale and bias, and which logits count as positive. Goes out: a scalar. Memory is
O(N · (D + tile)) instead of O(N²), and nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from chiasm.losses.pairs import Diagonal
from chiasm.losses.tiled import FeatureGradients, Plan, tiles_of, wide, without_autocast

Flip = Callable[[Tensor, slice], None]


class TiledSigLIP(torch.autograd.Function):
    """Sum over all pairs of −log sigmoid(±logit), divided by the number of rows, in tiles of rows.

    ``forward(rows, columns, scale, bias, diagonal, flip, plan)``: the diagonal belongs together, and
    ``flip(values, part)`` changes, in place, the sign of those other ``values``, shape (rows of the part, m), that do
    so too (None: there are none). Every logit stands for itself alone, so the gradients come out of the same pass and
    backward only multiplies them by the incoming scalar.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor,
        diagonal: Diagonal,
        flip: Flip | None,
        plan: Plan,
    ) -> Tensor:
        """Return the loss as a 0-dim tensor."""
        n, m = len(rows), len(columns)
        tile, precise = min(plan.tile, n), wide(rows.device)
        wanted = [plan.differentiate and needed for needed in ctx.needs_input_grad[:4]]
        gradients = FeatureGradients(rows, columns, wanted)
        pair = diagonal.cosines(rows, columns)
        logit_of_pair = pair * scale.to(precise) + bias.to(precise)
        by_pair = -torch.sigmoid(-logit_of_pair)
        loss, by_bias = F.softplus(-logit_of_pair).sum(), by_pair.sum()
        buffer = rows.new_empty((tile, m))
        with without_autocast(rows.device):
            for part in tiles_of(n, tile):
                logits = buffer[: part.stop - part.start]
                torch.addmm(bias, rows[part] * scale, columns.T, out=logits)
                if flip is not None:
                    flip(logits, part)
                diagonal.hide(logits, part)
                loss += F.softplus(logits).sum(1).sum(dtype=precise)
                if any(wanted):
                    logits.sigmoid_()
                    if flip is not None:
                        flip(logits, part)
                    by_bias += logits.sum(1).sum(dtype=precise)
                    gradients.add(part, logits)
        diagonal.add_gradients(gradients, by_pair, pair)
        weight = rows.new_tensor(1.0 / n)
        by_bias_out = (by_bias * weight).to(bias.dtype) if wanted[3] else None
        ctx.save_for_backward(*gradients.scaled(scale, weight), by_bias_out)
        return (loss / n).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the stored gradients by the incoming one."""
        return *(None if g is None else g * upstream for g in ctx.saved_tensors), None, None, None
