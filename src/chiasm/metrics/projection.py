"""How far a map of two dimensions keeps the neighbourhoods of a space.

Comes in: the points and their places on the map. Goes out: one term a row, whose means are trustworthiness (neighbours on
the map are neighbours in the space) and continuity (neighbours in the space are neighbours on the map).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError

Floats = NDArray[np.float64]


def neighbourhood_terms(points: Floats, places: Floats, n_neighbors: int) -> tuple[Floats, Floats]:
    """Return the terms of trustworthiness and continuity of each row.

    Args:
        points: (n, dim) in the space; Euclidean distances.
        places: (n, 2) on the map.
        n_neighbors: How many neighbours are looked at, below n / 2.

    Returns:
        Two arrays (n,). Their means are the trustworthiness and the continuity: 1 is perfect, a random map has about 0.5.

    Raises:
        InputError: Too many neighbours for so few rows.

    References:
        Venna and Kaski, 2001, Neighborhood preservation in nonlinear projection methods, equations 1 and 2,
        https://doi.org/10.1007/3-540-44668-0_68. Trustworthiness equals scikit-learn's.
    """
    n = len(points)
    if not 0 < n_neighbors < n / 2:
        raise InputError(f"the number of neighbours must lie between 1 and half of the {n} rows, got {n_neighbors}")
    in_space, on_map = _ranks(np.asarray(points, dtype=np.float64)), _ranks(np.asarray(places, dtype=np.float64))
    scale = 2.0 / (n_neighbors * (2.0 * n - 3.0 * n_neighbors - 1.0))

    def terms(near: NDArray[np.int64], far: NDArray[np.int64]) -> Floats:
        """Sum how far the near ones of one side lie beyond the neighbours on the other."""
        beyond = np.where((near >= 1) & (near <= n_neighbors), np.maximum(far - n_neighbors, 0), 0)
        return np.asarray(1.0 - scale * beyond.sum(axis=1), dtype=np.float64)

    return terms(on_map, in_space), terms(in_space, on_map)


def _ranks(points: Floats) -> NDArray[np.int64]:
    """Return the rank of each point among the neighbours of each: 0 for itself, 1 for the nearest."""
    from sklearn.metrics import pairwise_distances

    distances = pairwise_distances(points)
    np.fill_diagonal(distances, -1.0)
    order = np.argsort(distances, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(len(points))[None, :], axis=1)
    return ranks.astype(np.int64)
