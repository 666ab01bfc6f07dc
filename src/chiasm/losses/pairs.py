"""Which rows and columns belong together: the diagonal, or a list of pairs made from keys.

Comes in: an offset, or integer keys. Goes out: :class:`Diagonal` and :class:`PairList`, which the tiled losses ask for
the logits of the pairs and hand the derivatives to. The pairs are few, so everything about them is done in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.losses.tiled import FeatureGradients, LogSum, Side, tiles_of, wide

PAIRS_AT_ONCE = 1024
"""Pairs whose features are multiplied at a time."""

LANES = 8
"""Partial sums of a product that are added up in float64; all of them would cost three times as much."""


class Diagonal:
    """Row ``i`` belongs to column ``offset + i`` and to no other.

    Args:
        n: Number of rows.
        offset: Column of the first row.
    """

    def __init__(self, n: int, offset: int = 0) -> None:
        self.offset = offset
        self.columns = slice(offset, offset + n)

    def cosines(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the product of the features of each pair, in float64."""
        return products(rows, columns[self.columns])

    def hide(self, logits: Tensor, part: slice) -> None:
        """Set the pairs of a tile, the rows ``part`` of all logits, to −∞."""
        logits.diagonal(self.offset + part.start).fill_(-torch.inf)

    def put(self, by_logit: Tensor, part: slice, by_pair: Tensor) -> None:
        """Set the derivatives of the pairs in a tile to 0: they come after all tiles."""
        by_logit.diagonal(self.offset + part.start).zero_()

    def side(self, logits: Tensor, others: LogSum, axis: int) -> Side:
        """Compare the logit of each pair with the others of its row (axis 0) or column (axis 1)."""
        gap = others.minus(logits)
        share = torch.sigmoid(gap)
        return Side(F.softplus(gap).mean(), -share, others.factor(share))

    def add_gradients(self, gradients: FeatureGradients, by_pair: Tensor, cosine: Tensor) -> None:
        """Add the pairs after all tiles: one addition of the largest term rounds less than a sum through it."""
        rows, columns = gradients.features
        weight = by_pair.to(rows.dtype).unsqueeze(1)
        if gradients.rows is not None:
            gradients.rows.addcmul_(columns[self.columns], weight)
        if gradients.columns is not None:
            gradients.columns[self.columns].addcmul_(rows, weight)
        if gradients.scale is not None:
            gradients.scale += (by_pair * cosine).sum()


class PairList:
    """Row ``i`` belongs to every column whose key equals its own.

    The target of a row is uniform over its positives, and so is that of a column.

    Args:
        row_keys: (n,) integers.
        column_keys: (m,) integers.
    """

    def __init__(self, row_keys: Tensor, column_keys: Tensor) -> None:
        self.counts = counts_of(row_keys, column_keys)
        sorted_keys, order = torch.sort(column_keys, stable=True)
        per_row, n = self.counts[0], len(row_keys)
        row = torch.repeat_interleave(torch.arange(n, device=row_keys.device), per_row)
        ends = torch.cumsum(per_row, 0)
        within = torch.arange(len(row), device=row_keys.device) - (ends - per_row)[row]
        self.index = (row, order[torch.searchsorted(sorted_keys, row_keys)[row] + within])
        self.ends = [0, *ends.tolist()]

    def cosines(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the product of the features of each pair, in float64."""
        row, column = self.index
        found = rows.new_empty(len(row), dtype=wide(rows.device))
        for part in tiles_of(len(row), PAIRS_AT_ONCE):
            left, right = rows.index_select(0, row[part]), columns.index_select(0, column[part])
            found[part] = products(left, right)
        return found

    def hide(self, logits: Tensor, part: slice) -> None:
        """Set the pairs of a tile, the rows ``part`` of all logits, to −∞."""
        place, _ = self._within(logits, part)
        logits.view(-1).index_fill_(0, place, -torch.inf)

    def put(self, by_logit: Tensor, part: slice, by_pair: Tensor) -> None:
        """Write the derivatives of the pairs into a tile."""
        place, listed = self._within(by_logit, part)
        by_logit.view(-1).index_copy_(0, place, by_pair[listed].to(by_logit.dtype))

    def _within(self, tile: Tensor, part: slice) -> tuple[Tensor, slice]:
        """Return where the pairs of a tile lie in its memory, and where in the list."""
        listed = slice(self.ends[part.start], self.ends[part.stop])
        row, column = (x[listed] for x in self.index)
        return (row - part.start) * tile.shape[1] + column, listed

    def side(self, logits: Tensor, others: LogSum, axis: int) -> Side:
        """Compare the logits of the pairs with the others of their row (axis 0) or column (axis 1)."""
        index, count = self.index[axis], self.counts[axis].to(logits.dtype)
        zero = logits.new_zeros(len(count))
        top = zero.scatter_reduce(0, index, logits, "amax", include_self=False)
        below = logits - top[index]
        total = zero.index_add(0, index, below.exp())
        gap = others.minus(top) - total.log()
        excess, share = F.softplus(gap), torch.sigmoid(gap)
        loss = excess + total.log() - zero.index_add(0, index, below) / count
        # log(softmax / target): exactly −excess where all positives of a row have one logit.
        log_ratio = (below - (total.log() - count.log())[index]) - excess[index]
        return Side(loss.mean(), torch.expm1(log_ratio) / count[index], others.factor(share))

    def add_gradients(self, gradients: FeatureGradients, by_pair: Tensor, cosine: Tensor) -> None:
        """Do nothing: the tiles held the pairs, because a list may be much longer than the features."""


def counts_of(row_keys: Tensor, column_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many columns have the key of each row, (n,), and how many rows have the key of each column, (m,)."""
    n = len(row_keys)
    numbers = torch.unique(torch.cat([row_keys, column_keys]), return_inverse=True)[1]
    size = int(numbers.max()) + 1
    in_rows = torch.bincount(numbers[:n], minlength=size)
    in_columns = torch.bincount(numbers[n:], minlength=size)
    return in_columns[numbers[:n]], in_rows[numbers[n:]]


def products(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of each row of ``a`` with the same row of ``b``; the last eight additions are in float64."""
    found = a.new_empty(len(a), dtype=wide(a.device))
    lanes = LANES if a.shape[1] % LANES == 0 else 1
    for part in tiles_of(len(a), PAIRS_AT_ONCE):
        by_lane = (a[part] * b[part]).view(-1, a.shape[1] // lanes, lanes).sum(1)
        found[part] = by_lane.sum(1, dtype=found.dtype)
    return found
