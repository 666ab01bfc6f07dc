"""Nearest neighbours by cosine with the number of neighbours chosen on validation patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.tasks.few_shot import FewShotClassifier, best_of, quality

Floats = NDArray[np.float64]


class Neighbours(FewShotClassifier):
    """The share of each class among the nearest training rows by cosine, classes weighed alike.

    Equal to ``sklearn.neighbors.KNeighborsClassifier(metric="cosine")`` on classes of equal size; the shares are smoothed
    by one vote spread over the classes, so that a class without a neighbour has a finite logit.

    Args:
        ks: Numbers of neighbours to choose from; those above the number of rows are left out.
        seed: Of the patients that are held back where no validation rows are given.
    """

    def __init__(self, ks: Sequence[int] = (1, 5, 10, 20, 50), *, seed: int = 0) -> None:
        self.ks = ks
        self.seed = seed

    def _open_choices(self) -> bool:
        return len(tuple(self.ks)) > 1

    def _given(self) -> dict[str, Any]:
        return {"k": int(next(iter(self.ks)))}

    def _search(self, x: Floats, y: Any, x_held: Floats, y_held: Any) -> dict[str, Any]:
        ks = sorted({min(int(k), len(x)) for k in self.ks}, reverse=True)  # more neighbours are the stronger prior
        order = _nearest(x_held, x, max(ks))
        found = [quality(_votes(order[:, :k], y, len(self.classes_)), y_held) for k in ks]
        return {"k": ks[best_of(found)]}

    def _fit_with(self, x: Floats, y: Any, chosen: dict[str, Any]) -> None:
        self.x_, self.y_, self.k_ = x, y, min(int(chosen["k"]), len(x))

    def _logits(self, x: Floats) -> Floats:
        return _votes(_nearest(x, self.x_, self.k_), self.y_, len(self.classes_))


def _nearest(queries: Floats, rows: Floats, k: int) -> NDArray[np.int64]:
    """Return the k nearest rows of each query, nearest first; ties: the earlier row."""
    found = np.empty((len(queries), k), dtype=np.int64)
    for start in range(0, len(queries), 512):
        block = queries[start : start + 512] @ rows.T
        found[start : start + 512] = np.argsort(-block, axis=1, kind="stable")[:, :k]
    return found


def _votes(nearest: NDArray[np.int64], y: NDArray[np.int64], classes: int) -> Floats:
    votes = np.stack([(y[nearest] == c).sum(axis=1) for c in range(classes)], axis=1).astype(np.float64)
    weighed = votes / np.maximum(np.bincount(y, minlength=classes), 1) * (len(y) / classes)
    logits: Floats = np.log(weighed + 1 / classes)
    return logits
