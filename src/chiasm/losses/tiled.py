"""Softmax losses tile by tile: the N × N logits never lie in memory at once, or once only when N is small.

Comes in: float32 (or float64) features, a logit scale tensor, the pairs that belong together. Goes out: a scalar whose
backward recomputes each tile. Memory is O(N · (D + tile)) instead of O(N²).

Notable choices:

- A probability of the right pair near one is never subtracted from one. With ``d`` the logit of the pair and ``r`` the
  log-sum-exp of the *other* logits in its row, the loss of the row is softplus(r − d) and its derivative by ``d`` is
  −sigmoid(r − d). Both keep their relative precision when a batch is nearly solved at a logit scale of 100, where
  cross-entropy on float32 logits returns 0 and noise.
- A log-sum-exp stays a pair (maximum, sum) until it is used: logits near 100 have a spacing of 8e-6, so adding the
  logarithm of the sum to the maximum would cost two digits. For the same reason ``d`` is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Plan(NamedTuple):
    """How a loss walks through its logits.

    Attributes:
        tile: Rows of logits that are worked on at a time.
        both: Average the softmax over rows with the softmax over columns (as many columns as rows).
        keep: Store the logits for the backward pass: one matrix product less.
        differentiate: Whether a backward pass may follow (a Function cannot see ``torch.no_grad``).
    """

    tile: int
    both: bool = True
    keep: bool = False
    differentiate: bool = True


class LogSum(NamedTuple):
    """exp(maximum) · total, kept apart: the log-sum-exp without rounding at the size of the maximum.

    ``maximum`` is finite (0 where everything was −∞) and ``total`` is then 0.
    """

    maximum: Tensor
    total: Tensor

    def minus(self, logit: Tensor) -> Tensor:
        """Return the log-sum-exp less ``logit`` in the dtype of ``logit``; −∞ where the sum is empty."""
        return (self.maximum - logit) + self.total.to(logit.dtype).log()

    def factor(self, share: Tensor) -> Tensor:
        """Return what exp(logit − maximum) must be multiplied by to add up to ``share``; 0 where the sum is empty."""
        return torch.where(self.total > 0, share / self.total, 0.0).to(self.total.dtype)


class Side(NamedTuple):
    """The softmax in one direction, over all rows or over all columns.

    Attributes:
        loss: Mean over the rows (or columns), 0-dim float64.
        by_pair: d (sum of the losses) / d logit, for each pair that belongs together.
        factor: times exp(logit − maximum) it is the same derivative for the other logits of a row (or column).
    """

    loss: Tensor
    by_pair: Tensor
    factor: Tensor


class Pairs(Protocol):
    """Which rows and columns belong together; see ``losses.pairs``."""

    def cosines(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the product of the features of each pair, in float64."""

    def hide(self, logits: Tensor, part: slice) -> None:
        """Set the pairs of a tile, the rows ``part`` of all logits, to −∞."""

    def put(self, by_logit: Tensor, part: slice, by_pair: Tensor) -> None:
        """Write the derivatives of the pairs into a tile, or 0 when ``add_gradients`` takes care of them."""

    def side(self, logits: Tensor, others: LogSum, axis: int) -> Side:
        """Compare the logits of the pairs with those of the others, over rows (axis 0) or columns (axis 1)."""

    def add_gradients(self, gradients: FeatureGradients, by_pair: Tensor, cosine: Tensor) -> None:
        """Add what :meth:`put` left out."""


class RunningLogSum:
    """The log-sum-exp over the rows of a matrix that arrives tile by tile, one value a column.

    Args:
        columns: Number of columns.
        like: A tensor with the dtype and device of the tiles.
    """

    def __init__(self, columns: int, like: Tensor) -> None:
        self.maximum = like.new_full((columns,), -torch.inf)
        self.total = like.new_zeros(columns)

    def add(self, values: Tensor, buffer: Tensor) -> None:
        """Take in a tile of shape (rows, columns); ``buffer`` of the same shape is overwritten."""
        top = torch.maximum(self.maximum, values.amax(0))
        shift = finite_or_zero(top)
        self.total.mul_(torch.exp(self.maximum - shift))
        torch.sub(values, shift, out=buffer).exp_()
        self.total.add_(buffer.sum(0))
        self.maximum = top

    def value(self) -> LogSum:
        """Return what has been seen so far."""
        return LogSum(finite_or_zero(self.maximum), self.total)


def finite_or_zero(maximum: Tensor) -> Tensor:
    """Replace −∞ by 0, because −∞ − (−∞) is not a number."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def log_sum_of_rows(values: Tensor, buffer: Tensor) -> LogSum:
    """Return the log-sum-exp of each row; ``buffer`` of the same shape is overwritten."""
    top = finite_or_zero(values.amax(1))
    torch.sub(values, top.unsqueeze(1), out=buffer).exp_()
    return LogSum(top, buffer.sum(1))


def tiles_of(n: int, size: int) -> Iterator[slice]:
    """Cut ``range(n)`` into slices of ``size``."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype of short sums: float64, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context in which matrix products keep the dtype of their operands."""
    return torch.autocast(device.type, enabled=False)


class FeatureGradients:
    """Gathers the gradients of rows, columns and scale from tiles of d loss / d logit.

    Args:
        rows: (n, D) features, one tile of which goes with each tile of logits.
        columns: (m, D) features.
        wanted: Whether the gradients of rows, columns and scale are needed; work for the others is not done.
    """

    def __init__(self, rows: Tensor, columns: Tensor, wanted: Sequence[bool]) -> None:
        self.features = (rows, columns)
        self.rows = torch.empty_like(rows) if wanted[0] else None
        self.columns = torch.zeros_like(columns) if wanted[1] else None
        self.scale = rows.new_zeros((), dtype=wide(rows.device)) if wanted[2] else None

    def add(self, part: slice, by_logit: Tensor) -> None:
        """Take in d loss / d logit of the rows ``part``, shape (rows of the part, m); each part comes once."""
        rows, columns = self.features
        if self.rows is not None or self.scale is not None:
            pulled = rows.new_empty(rows[part].shape) if self.rows is None else self.rows[part]
            torch.mm(by_logit, columns, out=pulled)
            if self.scale is not None:
                self.scale += (rows[part] * pulled).sum(1).sum(dtype=self.scale.dtype)
        if self.columns is not None:
            self.columns.addmm_(by_logit.T, rows[part])

    def scaled(self, scale: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three gradients for a loss that is ``weight`` × the sum of what was taken in."""
        for gradient in (self.rows, self.columns):
            if gradient is not None:
                gradient.mul_(scale * weight)
        by_scale = None if self.scale is None else (self.scale * weight).to(scale.dtype)
        return self.rows, self.columns, by_scale


class TiledInfoNCE(torch.autograd.Function):
    """Mean over rows (and columns) of the cross-entropy between the pairs and the softmax, in tiles of rows.

    ``forward(rows, columns, scale, pairs, plan)`` with ``rows`` (n, D) and ``columns`` (m, D). With ``plan.both`` the
    mean of both directions is returned.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, pairs: Pairs, plan: Plan) -> Tensor:
        """Return the loss as a 0-dim tensor."""
        n, m = len(rows), len(columns)
        tile, both, keep = min(plan.tile, n), plan.both, plan.keep
        kept = rows.new_empty((n if keep else tile, m))
        buffer = rows.new_empty((tile, m))
        others = LogSum(rows.new_empty(n), rows.new_empty(n))
        running = RunningLogSum(m, rows)
        with without_autocast(rows.device):
            for part in tiles_of(n, tile):
                size = part.stop - part.start
                logits = kept[part] if keep else kept[:size]
                torch.mm(rows[part] * scale, columns.T, out=logits)
                pairs.hide(logits, part)
                others.maximum[part], others.total[part] = log_sum_of_rows(logits, buffer[:size])
                if both:
                    running.add(logits, buffer[:size])
            cosine = pairs.cosines(rows, columns)
            logits = cosine * scale.to(cosine.dtype)
            side = pairs.side(logits, others, 0)
            state = [cosine, side.by_pair, others.maximum, side.factor]
            loss = side.loss
            if both:
                other_side = pairs.side(logits, running.value(), 1)
                state[1] = side.by_pair + other_side.by_pair
                state += [running.value().maximum, other_side.factor]
                loss = (loss + other_side.loss) / 2
        ctx.pairs, ctx.plan = pairs, plan
        ctx.save_for_backward(rows, columns, scale, kept if keep else None, *state)
        return loss.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Recompute each tile (or take the kept one) and gather the gradients of rows, columns and scale."""
        rows, columns, scale, kept, cosine, by_pair, top, factor, *by_column = ctx.saved_tensors
        n, m = len(rows), len(columns)
        tile = min(ctx.plan.tile, n)
        gradients = FeatureGradients(rows, columns, ctx.needs_input_grad)
        buffers = rows.new_empty((2 if by_column else 1, tile, m))
        with without_autocast(rows.device):
            for part in tiles_of(n, tile):
                p, q = buffers[0, : part.stop - part.start], buffers[-1, : part.stop - part.start]
                logits = kept[part] if kept is not None else torch.mm(rows[part] * scale, columns.T, out=p)
                if by_column:
                    torch.sub(logits, by_column[0], out=q).exp_().mul_(by_column[1])
                torch.sub(logits, top[part].unsqueeze(1), out=p).exp_()
                if by_column:
                    torch.addcmul(q, p, factor[part].unsqueeze(1), out=p)
                else:
                    p.mul_(factor[part].unsqueeze(1))
                ctx.pairs.put(p, part, by_pair)
                gradients.add(part, p)
            ctx.pairs.add_gradients(gradients, by_pair, cosine)
        return *gradients.scaled(scale, upstream / (2 * n if by_column else n)), None, None
