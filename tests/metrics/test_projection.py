"""Trustworthiness equals scikit-learn's, continuity its definition; both know a perfect and a random map."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.manifold import trustworthiness

from chiasm.errors import InputError
from chiasm.metrics.projection import neighbourhood_terms


def definition_of_continuity(points: np.ndarray, places: np.ndarray, k: int) -> float:
    """Equation 2 of Venna and Kaski, word by word."""
    n = len(points)
    total = 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i]
        in_space = sorted(others, key=lambda j: float(np.linalg.norm(points[i] - points[j])))
        on_map = sorted(others, key=lambda j: float(np.linalg.norm(places[i] - places[j])))
        for j in set(in_space[:k]) - set(on_map[:k]):
            total += on_map.index(j) + 1 - k
    return 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * total


@pytest.mark.parametrize("k", [1, 5, 12])
def test_parity(k: int) -> None:
    random = np.random.default_rng(k)
    points = random.normal(size=(40, 6))
    places = points[:, :2] + 0.3 * random.normal(size=(40, 2))
    trust, continuity = neighbourhood_terms(points, places, k)
    assert trust.mean() == pytest.approx(trustworthiness(points, places, n_neighbors=k), abs=1e-12)
    assert continuity.mean() == pytest.approx(definition_of_continuity(points, places, k), abs=1e-12)
    assert trust.mean() != pytest.approx(continuity.mean(), abs=1e-6)


def test_perfect_and_random() -> None:
    random = np.random.default_rng(0)
    points = random.normal(size=(200, 2))
    np.testing.assert_allclose(neighbourhood_terms(points, 3 * points + 1, 10), 1)
    for term in neighbourhood_terms(points, random.permutation(points), 10):
        assert abs(term.mean() - 0.5) < 0.05


def test_a_torn_map_loses_continuity_not_trust() -> None:
    line = np.linspace(0, 1, 60)[:, None] * [1.0, 0.0]
    torn = line + np.where(np.arange(60) % 2, 5.0, 0.0)[:, None] * [0.0, 1.0]
    trust, continuity = (t.mean() for t in neighbourhood_terms(line, torn, 5))
    assert continuity < trust


def test_too_many_neighbours() -> None:
    with pytest.raises(InputError, match="half of the 10 rows, got 5"):
        neighbourhood_terms(np.eye(10), np.eye(10)[:, :2], 5)
