"""What a search may not find: cells (query, row), looked up by blocks of rows.

Comes in: the hidden rows of each query. Goes out: places in a block of scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class HiddenCells:
    """Cells (query, row) that may not be found, sorted by row."""

    row: NDArray[np.int64]
    query: NDArray[np.int64]

    @classmethod
    def of(cls, rows: list[NDArray[np.int64]]) -> HiddenCells:
        """Make them of the hidden rows of each query."""
        row = np.concatenate([*rows, np.empty(0, np.int64)])
        query = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        order = np.argsort(row, kind="stable")
        return cls(row[order], query[order])

    def queries(self, which: NDArray[np.int64]) -> HiddenCells:
        """Return the cells of some queries (rising), which are numbered anew in that order."""
        if not len(which):
            return HiddenCells(self.row[:0], self.query[:0])
        place = np.minimum(np.searchsorted(which, self.query), len(which) - 1)
        inside = which[place] == self.query
        return HiddenCells(self.row[inside], place[inside])

    def rows(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return queries and columns of the cells in some rows, columns counted from the first of them."""
        part = slice(*np.searchsorted(self.row, (first, last)))
        return self.query[part], self.row[part] - first
