"""InfoNCE with soft targets, or with so many positives that a list of pairs would be longer than the features.

Comes in: features and :class:`Targets`. Goes out: cross-entropy between the softmax of each row (and column) of the
logits and the targets normalised over that row (column), tile by tile.

Notable choice: the derivative by the logit of a positive, softmax − target, is formed as target · expm1(log of their
ratio), so that it keeps its relative precision when the softmax is near the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from chiasm.losses.pairs import counts_of
from chiasm.losses.tiled import (
    FeatureGradients,
    LogSum,
    Plan,
    RunningLogSum,
    log_sum_of_rows,
    tiles_of,
    wide,
    without_autocast,
)


class Targets(Protocol):
    """Non-negative weights of every pair of row and column, given out tile by tile."""

    row_sums: Tensor
    column_sums: Tensor
    is_binary: bool

    def tile(self, part: slice) -> Tensor:
        """Return the weights of the rows ``part``, shape (rows of the part, m)."""


class KeyTargets:
    """Weight 1 where the key of the row equals the key of the column, else 0.

    Args:
        row_keys: Integers, shape (n,).
        column_keys: Integers, shape (m,).
        dtype: Of the weights.
    """

    is_binary = True

    def __init__(self, row_keys: Tensor, column_keys: Tensor, dtype: torch.dtype) -> None:
        self.row_keys = row_keys
        self.column_keys = column_keys
        self.dtype = dtype
        self.row_sums, self.column_sums = (count.to(dtype) for count in counts_of(row_keys, column_keys))

    def is_equal(self, part: slice) -> Tensor:
        """Return where the keys agree, boolean, shape (rows of the part, m)."""
        return self.row_keys[part].unsqueeze(1) == self.column_keys

    def tile(self, part: slice) -> Tensor:
        """Return the weights of the rows ``part``."""
        return self.is_equal(part).to(self.dtype)


class DenseTargets:
    """Weights given as a matrix of shape (n, m)."""

    is_binary = False

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.row_sums = matrix.sum(1)
        self.column_sums = matrix.sum(0)

    def tile(self, part: slice) -> Tensor:
        """Return the weights of the rows ``part``."""
        return self.matrix[part]


class TiledSoftInfoNCE(torch.autograd.Function):
    """Mean over rows (and columns) of the cross-entropy between targets and softmax, in tiles of rows.

    ``forward(rows, columns, scale, targets, plan)``, where ``plan.keep`` means nothing. The targets are constants:
    no gradient flows into them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, targets: Targets, plan: Plan) -> Tensor:
        """Return the loss as a 0-dim tensor."""
        n, m = len(rows), len(columns)
        tile, both = min(plan.tile, n), plan.both
        precise = wide(rows.device)
        buffers = rows.new_empty((2, tile, m))
        positives = LogSum(rows.new_empty(n), rows.new_empty(n))
        others = LogSum(rows.new_empty(n), rows.new_empty(n))
        losses = rows.new_empty(n, dtype=precise)
        column_positives, column_others = RunningLogSum(m, rows), RunningLogSum(m, rows)
        column_mean = rows.new_zeros(m, dtype=precise)
        with without_autocast(rows.device):
            for part in tiles_of(n, tile):
                logits, buffer = buffers[:, : part.stop - part.start]
                torch.mm(rows[part] * scale, columns.T, out=logits)
                weights = targets.tile(part)
                is_positive = weights > 0
                on = logits.masked_fill(~is_positive, -torch.inf)
                positives.maximum[part], positives.total[part] = log_sum_of_rows(on, buffer)
                torch.sub(logits, positives.maximum[part].unsqueeze(1), out=buffer).mul_(weights)
                losses[part] = -(buffer.sum(1) / targets.row_sums[part]).to(precise)
                if both:
                    column_positives.add(on, buffer)
                    column_mean += torch.mul(logits, weights, out=buffer).sum(0)
                off = logits.masked_fill_(is_positive, -torch.inf)
                others.maximum[part], others.total[part] = log_sum_of_rows(off, buffer)
                if both:
                    column_others.add(off, buffer)
        gaps = gap_between(others, positives, precise)
        loss = (losses + F.softplus(gaps) + positives.total.to(precise).log()).mean()
        state = [gaps, *positives, *others]
        if both:
            found, rest = column_positives.value(), column_others.value()
            gaps = gap_between(rest, found, precise)
            misfit = found.maximum - column_mean / targets.column_sums
            loss = (loss + (misfit + F.softplus(gaps) + found.total.to(precise).log()).mean()) / 2
            state += [gaps, *found, *rest]
        ctx.targets, ctx.plan = targets, plan
        ctx.save_for_backward(rows, columns, scale, *state)
        return loss.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Recompute each tile and gather the gradients of rows, columns and scale."""
        rows, columns, scale, *state = ctx.saved_tensors
        targets, both = ctx.targets, ctx.plan.both
        by_row = Softmax(state[:5], targets, 0)
        by_column = Softmax(state[5:], targets, 1) if both else None
        gradients = FeatureGradients(rows, columns, ctx.needs_input_grad)
        with without_autocast(rows.device):
            for part in tiles_of(len(rows), min(ctx.plan.tile, len(rows))):
                logits = torch.mm(rows[part] * scale, columns.T)
                weights = targets.tile(part)
                by_logit = by_row.less_target(logits, weights, part)
                if by_column is not None:
                    by_logit.add_(by_column.less_target(logits, weights, None))
                gradients.add(part, by_logit)
        weight = upstream / (2 * len(rows) if both else len(rows))
        return *gradients.scaled(scale, weight), None, None


def gap_between(others: LogSum, positives: LogSum, dtype: torch.dtype) -> Tensor:
    """Return the log-sum-exp of the others less that of the positives; −∞ where there are no others."""
    difference = others.maximum.to(dtype) - positives.maximum.to(dtype)
    return difference + others.total.to(dtype).log() - positives.total.to(dtype).log()


class Softmax:
    """The softmax of each row (or column) less its targets, tile by tile.

    Args:
        state: Log-sum-exp of the others less that of the positives, then maximum and total of the positives (logits
            with a weight above 0), then maximum and total of the others.
        targets: The weights.
        axis: 0 for rows, 1 for columns.
    """

    def __init__(self, state: Sequence[Tensor], targets: Targets, axis: int) -> None:
        sums = targets.column_sums if axis else targets.row_sums
        self.is_binary = targets.is_binary
        gaps, positives, others = state[0], LogSum(*state[1:3]), LogSum(*state[3:5])
        factor = others.factor(torch.sigmoid(gaps))
        # In this order: for equal positives the first difference is exactly 0, and the small softplus survives.
        log_of_rest = (positives.total.to(gaps.dtype).log() - sums.to(gaps.dtype).log()) + F.softplus(gaps)
        self.columns = (positives.maximum, log_of_rest.to(sums.dtype), sums, others.maximum, factor)

    def less_target(self, logits: Tensor, weights: Tensor, part: slice | None) -> Tensor:
        """Return softmax − target for a tile; ``part`` names its rows, None means that the values belong to columns."""
        top, rest, sums, top_of_others, factor = (v if part is None else v[part].unsqueeze(1) for v in self.columns)
        target = weights / sums
        on = torch.sub(logits, top).sub_(rest)
        if not self.is_binary:
            on.sub_(weights.log())
        on.expm1_().mul_(target)
        off = torch.sub(logits, top_of_others).exp_().mul_(factor)
        return torch.where(weights > 0, on, off)
