"""Maps: clusters stay together, the same seed gives the same map, the modality gap is stated."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from chiasm.errors import InputError, MissingExtra, SpaceMismatch, UnknownName
from chiasm.tasks.projection import TRUST_ROWS, _pca, modality_gap, project

Make = Callable[..., Any]


def clusters(n: int = 60, dim: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, dim)) * 3
    which = np.arange(n) % 3
    return centres[which] + 0.3 * rng.normal(size=(n, dim)), which


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_clusters_stay_together(make: Make, method: str) -> None:
    vectors, which = clusters()
    found = project(make(vectors, labels={"c": tuple(which.tolist())}), method, n_neighbors=5)
    assert found.xy.shape == (60, 2)
    assert found.xy.dtype == np.float32
    assert found.labels["c"] == tuple(which.tolist())
    assert found.faith.continuity.value > 0.8
    assert abs((found.faith.trustworthiness.chance or 0) - 0.5) < 0.1
    assert found.faith.trustworthiness.low < found.trustworthiness < found.faith.trustworthiness.high
    assert "distances" in found.warning.lower()
    assert "continuity" in found.faith.note
    distance = np.linalg.norm(found.xy[:, None] - found.xy[None], axis=-1) + 1e9 * np.eye(60)
    assert (which[distance.argmin(axis=1)] == which).all()
    assert found.trustworthiness > (0.9 if method == "tsne" else 0.75)
    assert found.gap is None
    assert (found.explained_variance is None) == (method == "tsne")
    np.testing.assert_array_equal(project(make(vectors), method).xy, found.xy)
    json.dumps(found.to_dict(), allow_nan=False)


def test_pca_matches_the_definition(make: Make) -> None:
    for n in (8, 40):  # fewer and more rows than dimensions take two ways
        unit = make(np.random.default_rng(n).normal(size=(n, 12))).normalize().vectors.astype(float)
        found = project(make(unit), "pca")
        centred = unit - unit.mean(axis=0)
        variance = np.linalg.svd(centred, compute_uv=False) ** 2
        assert found.explained_variance == pytest.approx(variance[:2] / variance.sum(), rel=1e-5)
        np.testing.assert_allclose((found.xy**2).sum(axis=0), variance[:2], rtol=1e-4)
    assert project(make([[1.0], [2.0], [-1.0]]), "pca").xy[:, 1].tolist() == [0, 0, 0]
    assert project(make(np.ones((5, 3))), "pca").explained_variance == (0.0, 0.0)


def test_modality_gap(make: Make) -> None:
    rng = np.random.default_rng(0)
    offset = np.zeros(16)
    offset[0] = 4
    images, texts = (
        make(rng.normal(size=(20, 16)) + offset),
        make(rng.normal(size=(10, 16)) - offset, "text", prefix="t"),
    )
    found = project([images, texts], "pca")
    assert found.gap is not None
    a, b = images.normalize().vectors, texts.normalize().vectors
    assert found.gap.across == pytest.approx(float((a @ b.T).mean()), abs=1e-5)
    assert found.gap.within_images == pytest.approx(float((a @ a.T)[~np.eye(20, dtype=bool)].mean()), abs=1e-5)
    assert found.gap.distance > 0.9
    assert "two clouds" in found.gap.note
    assert found.modalities == ("image",) * 20 + ("text",) * 10
    spread = np.linalg.norm(found.xy[:20].mean(axis=0) - found.xy[20:].mean(axis=0))
    centred = project([images, texts], "pca", center_modalities=True)
    assert np.linalg.norm(centred.xy[:20].mean(axis=0) - centred.xy[20:].mean(axis=0)) < 1e-3 < spread
    lonely = modality_gap(np.eye(2), ("image", "text"))
    assert np.isnan(lonely.within_images)
    json.dumps(lonely.to_dict(), allow_nan=False)


def test_large_sets_are_judged_on_a_sample(make: Make) -> None:
    vectors, _ = clusters(TRUST_ROWS + 500, 4)
    found = project(make(vectors), "pca")
    assert 0.5 < found.trustworthiness <= 1
    assert (found.faith.rows, found.faith.of) == (TRUST_ROWS, TRUST_ROWS + 500)
    assert "a random 2,000 of 2,500 rows" in found.faith.note


def test_t_sne_equals_opentsne(make: Make) -> None:
    opentsne = pytest.importorskip("openTSNE", reason="openTSNE is not installed (extra `analysis`)")
    vectors = make(clusters(90)[0])
    found = project(vectors, engine="opentsne", seed=4, perplexity=12)
    direct = opentsne.TSNE(perplexity=12, random_state=4, n_jobs=1).fit(vectors.normalize().vectors.astype(np.float64))
    np.testing.assert_allclose(found.xy, np.asarray(direct), rtol=1e-3, atol=1e-3)  # unit norm in float32
    assert found.settings["engine"] == "opentsne"
    assert found.trustworthiness > 0.8


def test_t_sne_equals_scikit_learn(make: Make) -> None:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    vectors = make(clusters(90)[0])
    unit = vectors.normalize().vectors.astype(np.float64)
    start = _pca(unit)[0]
    start = (start / start[:, 0].std() * 1e-4).astype(np.float32)
    with threadpool_limits(1):
        model = TSNE(perplexity=12, init=start, random_state=4, n_jobs=1)
        direct = model.fit_transform(unit.astype(np.float32))
    np.testing.assert_array_equal(project(vectors, "tsne", seed=4, perplexity=12).xy, direct)


def test_components_before_the_map(make: Make) -> None:
    vectors, which = clusters(60, 40)
    found = project(make(vectors), "tsne", components=5)
    distance = np.linalg.norm(found.xy[:, None] - found.xy[None], axis=-1) + 1e9 * np.eye(60)
    assert (which[distance.argmin(axis=1)] == which).all()
    assert found.settings["components"] == 5


@pytest.mark.parametrize(
    ("method", "module", "package"), [("tsne", "openTSNE", "openTSNE"), ("umap", "umap", "umap-learn")]
)
def test_a_missing_extra_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, method: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=package) as caught:
        project(make(np.eye(8)), method, engine="opentsne")
    assert "chiasm[analysis]" in (caught.value.hint or "")


def test_umap_gets_unit_vectors_and_a_seed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler behind UMAP takes ten seconds, so here it is asked, and `test_umap.py` runs it."""
    asked: dict[str, Any] = {}

    class UMAP:
        def __init__(self, **settings: Any) -> None:
            asked.update(settings)

        def fit_transform(self, points: np.ndarray) -> np.ndarray:
            asked["norms"] = np.linalg.norm(points, axis=1)
            return points[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    found = project(make(clusters(12)[0]), "umap", seed=7)
    np.testing.assert_allclose(asked.pop("norms"), 1, rtol=1e-6)
    assert asked == {"n_neighbors": 11, "min_dist": 0.1, "random_state": 7, "n_jobs": 1}
    assert found.settings["umap_neighbors"] == 11


def test_few_rows_and_wrong_input(make: Make) -> None:
    found = project(make(np.eye(3)), "pca")
    assert np.isnan(found.trustworthiness)
    assert found.to_dict()["trustworthiness"] is None
    assert project(make(np.eye(5)), "tsne").n_neighbors == 2
    assert np.isfinite(project(make(np.ones((6, 4))), "tsne").xy).all()
    with pytest.raises(InputError, match="at least 5 rows, got 4"):
        project(make(np.eye(4)), "tsne")
    with pytest.raises(InputError, match="no embeddings"):
        project([])
    with pytest.raises(InputError, match="perplexity"):
        project(make(np.eye(6)), "tsne", perplexity=6)
    with pytest.raises(UnknownName):
        project(make(np.eye(6)), "isomap")
    with pytest.raises(SpaceMismatch):
        project([make(np.eye(6)), make(np.eye(6), "text", name="other")])
