"""UMAP through umap-learn: the same map as calling it directly. Its compiler takes ten seconds, hence ``slow``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from chiasm.tasks.projection import project


@pytest.mark.slow
def test_umap_equals_umap_learn(make: Callable[..., Any]) -> None:
    random = np.random.default_rng(0)
    which = np.arange(90) % 3
    vectors = make(random.normal(size=(3, 16))[which] * 3 + 0.3 * random.normal(size=(90, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        umap = pytest.importorskip("umap", reason="umap-learn is not installed (extra `analysis`)")
        direct = umap.UMAP(random_state=3, n_jobs=1).fit_transform(vectors.normalize().vectors)
    found = project(vectors, "umap", seed=3)
    np.testing.assert_allclose(found.xy, direct, rtol=1e-3, atol=1e-3)
    assert found.trustworthiness > 0.8
