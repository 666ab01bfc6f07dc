"""Planted clusters are found; noise, a long cloud and a cone have "no stable structure"; patients are drawn whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from chiasm.errors import ConfigError, InputError, SpaceMismatch, UnknownName
from chiasm.metrics.clustering import adjusted_rand
from chiasm.tasks.clustering import ClusterSettings, cluster, nearest_texts, parse_clusters, reduce_dimensions

Make = Callable[..., Any]
QUICK = {"resamples": 6, "null_draws": 20, "max_k": 5}


def planted(n: int = 160, k: int = 3, dim: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    which = np.arange(n) % k
    return random.normal(size=(k, dim))[which] + 0.25 * random.normal(size=(n, dim)), which


@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
def test_planted_clusters_are_found(make: Make, method: Any) -> None:
    vectors, which = planted()
    found = cluster(make(vectors), ClusterSettings(method, **QUICK))
    assert found.count == 3
    assert adjusted_rand(found.clusters, which) > 0.95
    assert found.structure.found
    assert found.structure.verdict.startswith("stable structure")
    assert min(found.structure.jaccard) > 0.9
    assert found.silhouette.value > (found.silhouette.chance or 0)
    assert list(found.sizes) == sorted(found.sizes, reverse=True)
    again = cluster(make(vectors), ClusterSettings(method, **QUICK))
    np.testing.assert_array_equal(found.clusters, again.clusters)
    assert again.structure == found.structure
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
@pytest.mark.parametrize("shape", ["round", "cone"])
def test_one_cloud_has_no_structure(make: Make, method: Any, shape: str) -> None:
    random = np.random.default_rng(3)
    cloud = random.normal(size=(160, 12))
    if shape == "cone":  # as embeddings lie: far from the origin, and long
        cloud = cloud * np.r_[4, 2, np.ones(10)] + 12
    found = cluster(make(cloud), ClusterSettings(method, **QUICK))
    assert not found.structure.found
    assert "no stable structure" in found.structure.verdict


def test_a_long_cloud_is_cut_stably_but_not_believed(make: Make) -> None:
    random = np.random.default_rng(0)
    long = random.normal(size=(300, 8)) * np.r_[6, np.ones(7)] + 40
    found = cluster(make(long), ClusterSettings(k=2, resamples=6, null_draws=20))
    assert found.structure.stability > 0.75, "the trap: stability alone would believe it"
    assert not found.structure.found
    assert "no more separate" in found.structure.verdict


def test_kmeans_equals_scikit_learn(make: Make) -> None:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    vectors = make(planted()[0])
    found = cluster(vectors, ClusterSettings(k=4, resamples=2, null_draws=1, seed=5))
    unit = vectors.normalize().vectors.astype(np.float64)
    direct = KMeans(4, n_init=4, random_state=5).fit_predict(unit)
    assert adjusted_rand(found.clusters, direct) == 1
    assert found.silhouette.value == pytest.approx(silhouette_score(unit, direct), abs=1e-5)
    assert found.settings.k == 4


def test_clumps_of_patients_are_no_structure(make: Make) -> None:
    """Ten near-copies of each patient are tight clumps: blind to patients, they look like clusters."""
    random = np.random.default_rng(0)
    patients = np.repeat(np.arange(16), 10)
    vectors = random.normal(size=(16, 12))[patients] + 0.05 * random.normal(size=(160, 12))
    settings = ClusterSettings(k=5, resamples=6, null_draws=20)
    by_patient = cluster(make(vectors, patients=tuple(f"p{p}" for p in patients)), settings)
    by_row = cluster(make(vectors), settings)
    assert not by_patient.structure.found
    assert by_patient.structure.p_value > 0.05
    assert by_row.structure.found, "the trap"
    assert sum(by_patient.patients) >= 16
    assert max(by_patient.largest_patient) >= 1 / 16
    wide, narrow = by_patient.silhouette, by_row.silhouette
    assert wide.high - wide.low > narrow.high - narrow.low


def test_many_rows_are_judged_on_some_patients(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from chiasm.tasks import cluster_structure

    monkeypatch.setattr(cluster_structure, "JUDGED_ROWS", 60)
    vectors, which = planted(400)
    patients = tuple(f"p{i // 4}" for i in range(400))
    found = cluster(make(vectors, patients=patients), ClusterSettings(k=3, resamples=4, null_draws=20))
    assert found.structure.judged_rows == 60
    assert adjusted_rand(found.clusters, which) > 0.95
    assert found.structure.found


def test_medoids_are_central(make: Make) -> None:
    vectors, _ = planted(90)
    embeddings = make(vectors)
    found = cluster(embeddings, ClusterSettings(k=3, resamples=2, null_draws=1))
    unit = embeddings.normalize().vectors
    for c, central in enumerate(found.central):
        rows = np.flatnonzero(found.clusters == c)
        mean = np.linalg.norm(unit[rows][:, None] - unit[rows][None], axis=-1).mean(axis=1)
        assert central[0] == rows[mean.argmin()]
        assert len(central) == 12


def test_principal_components(make: Make) -> None:
    unit = make(np.random.default_rng(0).normal(size=(80, 60))).normalize().vectors.astype(np.float64)
    points, components, share = reduce_dimensions(unit, None)
    assert (points.shape, components) == ((80, 50), 50)
    assert 0.9 < share < 1
    whole, none, all_of_it = reduce_dimensions(unit, 0)
    assert whole is unit
    assert (none, all_of_it) == (0, 1.0)
    few, used, _ = reduce_dimensions(unit[:10], 30)
    assert few.shape[1] == used == 9
    distances = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (unit[:10], few)]
    np.testing.assert_allclose(distances[0], distances[1], atol=1e-8)


def test_nearest_texts(make: Make) -> None:
    vectors, which = planted()
    found = cluster(make(vectors), ClusterSettings(k=3, resamples=2, null_draws=1))
    means = np.stack([vectors[which == c].mean(axis=0) for c in range(3)])
    texts = make(np.vstack([means, np.ones(12)]), "text", prefix="t")
    nearest = nearest_texts(found, make(vectors), texts, top=2)
    for c, rows in enumerate(nearest):
        truth = np.bincount(which[found.clusters == c]).argmax()
        assert rows[0][0] == truth
        assert rows[0][1] > rows[1][1]
    with pytest.raises(SpaceMismatch):
        nearest_texts(found, make(vectors), make(means, "text", name="other"))


def test_settings_are_parsed() -> None:
    assert parse_clusters("kmeans:8").k == 8
    assert parse_clusters("K-means").name == "kmeans"
    assert parse_clusters("hdbscan:15").name == "hdbscan:15"
    with pytest.raises(UnknownName, match="did you mean `kmeans`"):
        parse_clusters("kmean:3")
    with pytest.raises(InputError, match="whole number"):
        parse_clusters("kmeans:many")
    with pytest.raises(ConfigError, match=r"clusters\.k must be at least 2, got 1"):
        parse_clusters("kmeans:1")
    with pytest.raises(UnknownName):
        dataclasses.replace(ClusterSettings(), method="dbscan")


def test_few_and_equal_rows(make: Make) -> None:
    with pytest.raises(InputError, match="kmeans:8 needs at least 16 rows, got 9"):
        cluster(make(np.eye(9)), ClusterSettings(k=8))
    same = cluster(make(np.ones((12, 3))), ClusterSettings(k=2, resamples=2, null_draws=2))
    assert same.count == 1
    assert not same.structure.found
    json.dumps(same.to_dict(), allow_nan=False)
    nothing = cluster(make(np.random.default_rng(0).normal(size=(30, 8))), ClusterSettings("hdbscan", resamples=2))
    assert nothing.structure.verdict.startswith("no stable structure")
    json.dumps(nothing.to_dict(), allow_nan=False)
