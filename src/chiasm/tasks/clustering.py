"""Embeddings to groups of rows, with the answer to whether there are groups at all.

In: :class:`~chiasm.types.Embeddings`; labels are not read. Out: a frozen :class:`Clustering`: the cluster of each row,
how stable the clusters are when patients are drawn anew, and how much more separate they are than the pieces into which
the same method cuts one structureless cloud (``tasks/cluster_structure.py``). k-means and HDBSCAN are scikit-learn's.

Notable choices: unit vectors are clustered, so distances are those of cosines. Above :data:`COMPONENTS` dimensions
the leading principal components are taken, or distances concentrate and HDBSCAN finds only noise. Clusters are numbered
by size, largest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import ConfigError, InputError, UnknownName
from chiasm.metrics.bootstrap import weighted_interval
from chiasm.progress import Progress, SilentProgress
from chiasm.tasks.cluster_structure import Structure, examine, fit_kmeans, is_separable, silhouettes
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings, Interval, check_same_space

Method = Literal["kmeans", "hdbscan"]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Principal components that are clustered where a space has more dimensions.
COMPONENTS = 50
#: Rows of a cluster that its medoid is sought against, and of all rows that silhouettes are computed on.
SAMPLED_ROWS = 2_000


@dataclass(frozen=True)
class ClusterSettings:
    """How to cluster.

    Attributes:
        method: ``kmeans`` or ``hdbscan``.
        k: Clusters of k-means. None: chosen from 2 to ``max_k`` by the rule of ``examine``.
        max_k: Largest k that is tried.
        min_cluster_size: Of HDBSCAN. None: one row in a hundred, at least 10.
        components: Principal components. None: :data:`COMPONENTS` where there are more dimensions; 0: no PCA.
        resamples: How often patients are drawn anew for the stability.
        null_draws: Structureless clouds that the clusters are compared with.
        seed: Of everything drawn at random.
    """

    method: Method = "kmeans"
    k: int | None = None
    max_k: int = 10
    min_cluster_size: int | None = None
    components: int | None = None
    resamples: int = 20
    null_draws: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("kmeans", "hdbscan"):
            raise UnknownName("clustering", self.method, ("kmeans", "hdbscan"))
        least = {"k": 2, "max_k": 2, "min_cluster_size": 2, "components": 0, "resamples": 2, "null_draws": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"clusters.{name} must be at least {low}, got {value}")

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        number = self.k if self.method == "kmeans" else self.min_cluster_size
        return self.method + ("" if number is None else f":{number}")


def parse_clusters(text: str, *, components: int | None = None, seed: int = 0) -> ClusterSettings:
    """Return the settings of ``kmeans``, ``kmeans:8``, ``hdbscan`` or ``hdbscan:15`` (least size of a cluster).

    Raises:
        UnknownName: For another method.
        InputError: When what follows the colon is no number.
    """
    method, _, number = text.strip().lower().replace("k-means", "kmeans").partition(":")
    if method not in ("kmeans", "hdbscan"):
        raise UnknownName("clustering", method, ("kmeans", "hdbscan"), hint="--clusters kmeans:8, kmeans or hdbscan")
    if number and not number.isdecimal():
        raise InputError(f"--clusters {method}: expects a whole number after the colon, got `{number}`")
    value = int(number) if number else None
    return ClusterSettings(
        method,  # type: ignore[arg-type]  # checked above
        k=value if method == "kmeans" else None,
        min_cluster_size=value if method == "hdbscan" else None,
        components=components,
        seed=seed,
    )


@dataclass(frozen=True)
class Clustering:
    """A cluster for every row, and what is known of the clusters.

    Attributes:
        clusters: int, shape (n,); numbered from 0, largest first; -1: in none (HDBSCAN's noise).
        ids: One per row.
        settings: As given, with ``k`` or ``min_cluster_size`` as used.
        central: Rows of each cluster from its medoid outwards, up to 12.
        patients: Distinct groups in each cluster.
        largest_patient: Largest share of a cluster that one group has.
        silhouette: Mean over (sampled) rows in a cluster, with its interval by patient; ``chance`` is that of a
            structureless cloud cut by the same method. NaN with fewer than two clusters.
        structure: Stability, the structureless clouds, and how ``k`` was chosen.
        components: Principal components used, 0 for none, and the share of variance they hold.
        variance: See ``components``.
    """

    clusters: Integers
    ids: tuple[str, ...]
    settings: ClusterSettings
    central: tuple[tuple[int, ...], ...]
    patients: tuple[int, ...]
    largest_patient: tuple[float, ...]
    silhouette: Interval
    structure: Structure
    components: int
    variance: float

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        """Number of clusters, without the rows that are in none."""
        return len(self.central)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each cluster."""
        return tuple(int((self.clusters == c).sum()) for c in range(self.count))

    @property
    def noise(self) -> float:
        """Share of rows that are in no cluster."""
        return float((self.clusters < 0).mean())

    @property
    def names(self) -> tuple[str, ...]:
        """The cluster of each row for readers: ``cluster 1`` ..., ``none``."""
        return tuple("none" if c < 0 else f"cluster {c + 1}" for c in self.clusters.tolist())

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the rows as plain JSON values."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "n": len(self),
            "count": self.count,
            "noise": self.noise,
            "components": self.components,
            "variance": self.variance,
            "silhouette": self.silhouette.to_dict(),
            "structure": self.structure.to_dict(),
            "clusters": [
                {
                    "cluster": i + 1,
                    "rows": size,
                    "patients": self.patients[i],
                    "largest_patient": self.largest_patient[i],
                    "jaccard": None if np.isnan(self.structure.jaccard[i]) else float(self.structure.jaccard[i]),
                    "medoid": self.ids[self.central[i][0]],
                }
                for i, size in enumerate(self.sizes)
            ],
        }


def cluster(
    embeddings: Embeddings, settings: ClusterSettings | None = None, *, progress: Progress | None = None
) -> Clustering:
    """Return the clusters of embeddings; patients are drawn whole wherever rows are drawn.

    Args:
        embeddings: Of one side.
        settings: How.
        progress: Is told of every fit.

    Raises:
        InputError: Fewer rows than clusters need, or damaged vectors.
    """
    settings = settings or ClusterSettings()
    unit = unit_vectors(embeddings, embeddings.modality).astype(np.float64)
    n = len(unit)
    least = max(8, 2 * (settings.k or 2))
    if n < least:
        raise InputError(f"{settings.name} needs at least {least} rows, got {n}")
    points, components, variance = reduce_dimensions(unit, settings.components)
    if settings.method == "hdbscan" and settings.min_cluster_size is None:
        settings = dataclasses.replace(settings, min_cluster_size=min(max(10, round(n / 100)), n // 2))
    groups = np.unique(np.asarray(embeddings.groups, dtype=str), return_inverse=True)[1]
    found, structure = examine(
        points,
        groups,
        fit=_fitter(settings, n),
        ks=_candidates(settings, n),
        on_sphere=components == 0,
        resamples=settings.resamples,
        null_draws=settings.null_draws,
        seed=settings.seed,
        progress=progress or SilentProgress(),
    )
    if settings.method == "kmeans":
        settings = dataclasses.replace(settings, k=structure.k)
    count = int(found.max(initial=-1)) + 1
    of_cluster = [np.bincount(groups[found == c]) for c in range(count)]
    return Clustering(
        found,
        embeddings.ids,
        settings,
        tuple(_central(points, np.flatnonzero(found == c), settings.seed) for c in range(count)),
        tuple(int((counts > 0).sum()) for counts in of_cluster),
        tuple(float(counts.max() / counts.sum()) for counts in of_cluster),
        _silhouette(points, found, groups, structure, settings.seed),
        structure,
        components,
        variance,
    )


def reduce_dimensions(unit: Floats, components: int | None) -> tuple[Floats, int, float]:
    """Return the leading principal components, their number (0: all dimensions as they are) and share of variance."""
    n, dim = unit.shape
    wanted = (COMPONENTS if dim > COMPONENTS else 0) if components is None else components
    wanted = min(wanted, dim, n - 1)
    if wanted == 0:
        return unit, 0, 1.0
    from sklearn.decomposition import PCA

    model = PCA(n_components=wanted, svd_solver="covariance_eigh" if n > dim else "full")
    points = np.asarray(model.fit_transform(unit))
    return points, wanted, float(model.explained_variance_ratio_.sum())


def nearest_texts(
    clustering: Clustering, embeddings: Embeddings, texts: Embeddings, *, top: int = 5
) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Return for each cluster the texts that are nearer to it than to all rows together.

    Args:
        clustering: Of ``embeddings``.
        embeddings: What was clustered.
        texts: Terms or reports of the same space.
        top: Texts a cluster.

    Returns:
        Rows of ``texts`` with their lead: cosine with the cluster's mean direction less that with the mean of all rows.
        The second term takes out what is near to everything.

    Raises:
        SpaceMismatch: The texts come from another space.
    """
    check_same_space(embeddings, texts)
    unit, words = unit_vectors(embeddings, embeddings.modality), unit_vectors(texts, "text")
    means = np.stack([unit[clustering.clusters == c].mean(axis=0) for c in range(clustering.count)] or [unit[0]])
    means = np.vstack([means, unit.mean(axis=0)])
    means = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    cosine = words @ means.T
    lead = cosine[:, : clustering.count] - cosine[:, -1:]
    order = np.argsort(-lead, axis=0, kind="stable")[:top]
    return tuple(tuple((int(r), float(lead[r, c])) for r in order[:, c]) for c in range(clustering.count))


def _candidates(settings: ClusterSettings, n: int) -> Sequence[int]:
    if settings.method == "hdbscan":
        return (0,)
    return (settings.k,) if settings.k else tuple(range(2, min(settings.max_k, n // 4) + 1))


def _fitter(settings: ClusterSettings, n: int) -> Any:
    """Return a function of points, k and a seed to clusters."""

    def hdbscan(points: Floats, k: int, seed: int) -> Integers:
        from sklearn.cluster import HDBSCAN

        # A share of the rows, or a resample with fewer of them would be asked for denser clusters.
        least = max(min(5, settings.min_cluster_size or 5), round((settings.min_cluster_size or 5) * len(points) / n))
        return np.asarray(HDBSCAN(min_cluster_size=least, n_jobs=1, copy=True).fit_predict(points), dtype=np.int64)

    return fit_kmeans if settings.method == "kmeans" else hdbscan


def _central(points: Floats, rows: NDArray[np.intp], seed: int, *, keep: int = 12) -> tuple[int, ...]:
    """Return the rows with the smallest mean distance to their cluster, the medoid first."""
    from sklearn.metrics import pairwise_distances_chunked

    others = rows
    if len(rows) > SAMPLED_ROWS:
        others = np.random.default_rng(seed).choice(rows, SAMPLED_ROWS, replace=False)
    chunks = pairwise_distances_chunked(points[rows], points[others], reduce_func=lambda d, _: d.mean(axis=1))
    mean = np.concatenate(list(chunks))
    return tuple(rows[np.argsort(mean, kind="stable")[:keep]].tolist())


def _silhouette(points: Floats, found: Integers, groups: NDArray[np.intp], structure: Structure, seed: int) -> Interval:
    rows = np.flatnonzero(found >= 0)
    if len(rows) > SAMPLED_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, SAMPLED_ROWS, replace=False))
    chance = structure.null_silhouette if np.isfinite(structure.null_silhouette) else None
    if not is_separable(found[rows]):
        return Interval(float("nan"), float("nan"), float("nan"), len(rows), chance)
    values = silhouettes(points[rows], found[rows])
    return weighted_interval(
        lambda w: (w @ values) / w.sum(axis=1), groups[rows].tolist(), n_resamples=500, seed=seed, chance=chance
    )
