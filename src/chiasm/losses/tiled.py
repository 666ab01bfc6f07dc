"""Contrastive losses tile by tile: the N × N logits never lie in memory at once, or once only when N is small.

Comes in: float32 (or float64) features, a logit scale tensor, the place of the diagonal. Goes out: a scalar whose
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

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Flip = Callable[[Tensor, slice], None]

TILE_OF_PAIRS = 1024
"""Rows of pairs that are multiplied in float64 at a time."""


class Plan(NamedTuple):
    """How a loss walks through its logits.

    Attributes:
        tile: Rows of logits that are worked on at a time.
        offset: Row ``i`` belongs to column ``offset + i``.
        both: Average the softmax over rows with the softmax over columns (as many columns as rows, offset 0).
        keep: Store the logits for the backward pass: one matrix product less.
        differentiate: Whether a backward pass may follow (a Function cannot see ``torch.no_grad``).
    """

    tile: int
    offset: int = 0
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


def cosines_of_pairs(rows: Tensor, columns: Tensor, plan: Plan) -> Tensor:
    """Return the product of each row with its partner among the columns, in float64, tile by tile."""
    precise = wide(rows.device)
    cosines = rows.new_empty(len(rows), dtype=precise)
    for part in tiles_of(len(rows), min(plan.tile, TILE_OF_PAIRS)):
        partners = columns[plan.offset + part.start : plan.offset + part.stop]
        cosines[part] = (rows[part].to(precise) * partners.to(precise)).sum(1)
    return cosines


def share_of_others(gap: Tensor, others: LogSum) -> tuple[Tensor, Tensor]:
    """Return the probability of all other columns together, and the factor of exp(logit − maximum) that gives each.

    Args:
        gap: Log-sum-exp of the others less the logit of the pair.
        others: The log-sum-exp itself.
    """
    share = torch.sigmoid(gap)
    factor = torch.where(others.total > 0, share / others.total, 0.0)
    return share.to(others.total.dtype), factor.to(others.total.dtype)


class TiledInfoNCE(torch.autograd.Function):
    """Mean over rows (and columns) of −log softmax at the pair, in tiles of rows.

    ``forward(rows, columns, scale, plan)`` with ``rows`` (n, D) and ``columns`` (m, D).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, plan: Plan) -> Tensor:
        """Return the loss as a 0-dim tensor."""
        n, m = len(rows), len(columns)
        tile, offset, both, keep = min(plan.tile, n), plan.offset, plan.both, plan.keep
        precise = wide(rows.device)
        kept = rows.new_empty((n if keep else tile, m))
        buffer = rows.new_empty((tile, m))
        pair = cosines_of_pairs(rows, columns, plan)
        others = LogSum(rows.new_empty(n), rows.new_empty(n))
        running = RunningLogSum(m, rows)
        with without_autocast(rows.device):
            for part in tiles_of(n, tile):
                size = part.stop - part.start
                logits = kept[part] if keep else kept[:size]
                torch.mm(rows[part] * scale, columns.T, out=logits)
                logits.diagonal(offset + part.start).fill_(-torch.inf)
                others.maximum[part], others.total[part] = log_sum_of_rows(logits, buffer[:size])
                if both:
                    running.add(logits, buffer[:size])
            logit_of_pair = pair * scale.to(precise)
            gaps, column_others = others.minus(logit_of_pair), running.value()
            if both:
                gaps = torch.cat([gaps, column_others.minus(logit_of_pair)])
        ctx.plan = plan
        ctx.save_for_backward(rows, columns, scale, pair, gaps, *others, *column_others, kept if keep else None)
        return F.softplus(gaps).mean().to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Recompute each tile (or take the kept one) and gather the gradients of rows, columns and scale."""
        rows, columns, scale, pair, gaps, top, total, column_top, column_total, kept = ctx.saved_tensors
        offset, tile, both = ctx.plan.offset, min(ctx.plan.tile, len(rows)), ctx.plan.both
        n, m = len(rows), len(columns)
        share, factor = share_of_others(gaps[:n], LogSum(top, total))
        if both:
            column_share, column_factor = share_of_others(gaps[n:], LogSum(column_top, column_total))
            share = share + column_share
        gradients = PairGradients(rows, columns, ctx.needs_input_grad)
        first = rows.new_empty((tile, m))
        second = rows.new_empty((tile, m)) if both else first
        with without_autocast(rows.device):
            for part in tiles_of(n, tile):
                p, q = first[: part.stop - part.start], second[: part.stop - part.start]
                logits = kept[part] if kept is not None else torch.mm(rows[part] * scale, columns.T, out=p)
                if both:
                    torch.sub(logits, column_top, out=q).exp_().mul_(column_factor)
                torch.sub(logits, top[part].unsqueeze(1), out=p).exp_()
                if both:
                    torch.addcmul(q, p, factor[part].unsqueeze(1), out=p)
                else:
                    p.mul_(factor[part].unsqueeze(1))
                p.diagonal(offset + part.start).zero_()
                gradients.add(part, p)
        gradients.add_pairs(offset, -share, pair)
        return *gradients.scaled(scale, upstream / len(gaps)), None


class PairGradients:
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
        """Take in d loss / d logit of the rows ``part``, shape (rows of the part, m)."""
        rows, columns = self.features
        if self.rows is not None or self.scale is not None:
            pulled = by_logit @ columns
            if self.scale is not None:
                self.scale += torch.sum(rows[part] * pulled, dtype=self.scale.dtype)
            if self.rows is not None:
                self.rows[part] = pulled
        if self.columns is not None:
            self.columns.addmm_(by_logit.T, rows[part])

    def add_pairs(self, offset: int, by_logit: Tensor, cosine: Tensor) -> None:
        """Take in the diagonal, after all tiles: one addition of the largest term rounds less than a sum through it.

        Args:
            offset: The partner of row ``i`` is column ``offset + i``.
            by_logit: d loss / d logit of each pair, shape (n,).
            cosine: Product of the features of each pair, shape (n,).
        """
        rows, columns = self.features
        partners = slice(offset, offset + len(rows))
        if self.rows is not None:
            self.rows.addcmul_(columns[partners], by_logit.unsqueeze(1))
        if self.columns is not None:
            self.columns[partners].addcmul_(rows, by_logit.unsqueeze(1))
        if self.scale is not None:
            self.scale += torch.sum(by_logit * cosine, dtype=self.scale.dtype)

    def scaled(self, scale: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three gradients for a loss that is ``weight`` × the sum of what was taken in."""
        for gradient in (self.rows, self.columns):
            if gradient is not None:
                gradient.mul_(scale * weight)
        by_scale = None if self.scale is None else (self.scale * weight).to(scale.dtype)
        return self.rows, self.columns, by_scale


class TiledSigLIP(torch.autograd.Function):
    """Sum over all pairs of −log sigmoid(±logit), divided by the number of rows, in tiles of rows.

    ``forward(rows, columns, scale, bias, flip, plan)``: ``flip(values, part)`` changes, in place, the sign of those of
    ``values``, shape (rows of the part, m), whose row and column belong together; None: only the diagonal does. Every
    logit stands for itself alone, so the gradients come out of the same pass and backward only multiplies them by the
    incoming scalar.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, flip: Flip | None, plan: Plan
    ) -> Tensor:
        """Return the loss as a 0-dim tensor."""
        n, m = len(rows), len(columns)
        tile, precise = min(plan.tile, n), wide(rows.device)
        wanted = [plan.differentiate and needed for needed in ctx.needs_input_grad[:4]]
        gradients = PairGradients(rows, columns, wanted)
        pair = cosines_of_pairs(rows, columns, plan)
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
                logits.diagonal(plan.offset + part.start).fill_(-torch.inf)
                loss += F.softplus(logits).sum(1).sum(dtype=precise)
                if any(wanted):
                    logits.sigmoid_()
                    if flip is not None:
                        flip(logits, part)
                    by_bias += logits.sum(1).sum(dtype=precise)
                    gradients.add(part, logits)
        gradients.add_pairs(plan.offset, by_pair.to(rows.dtype), pair)
        weight = rows.new_tensor(1.0 / n)
        by_bias_out = (by_bias * weight).to(bias.dtype) if wanted[3] else None
        ctx.save_for_backward(*gradients.scaled(scale, weight), by_bias_out)
        return (loss / n).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the stored gradients by the incoming one."""
        return *(None if g is None else g * upstream for g in ctx.saved_tensors), None, None
