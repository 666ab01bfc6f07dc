"""Embeddings to a map of two dimensions, with numbers that say how far the map can be trusted.

In: :class:`~chiasm.types.Embeddings` of images, or of images and texts. Out: a frozen :class:`Projection`. PCA is a
linear view; t-SNE (van der Maaten and Hinton 2008) and UMAP (McInnes et al. 2018) keep neighbourhoods, and distances
between their groups mean nothing. Unit vectors are projected, so Euclidean neighbours are cosine neighbours.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, MissingExtra, UnknownName
from chiasm.metrics.bootstrap import weighted_interval
from chiasm.metrics.projection import neighbourhood_terms
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings, Interval, LabelValue, Modality, Space, check_same_space

#: Trustworthiness costs memory that grows with the square of the rows; more are judged on a seeded sample of so many.
TRUST_ROWS = 2_000

Method = Literal["pca", "tsne", "umap"]
Engine = Literal["scikit-learn", "opentsne"]
METHODS: tuple[Method, ...] = ("pca", "tsne", "umap")

#: What every map must be read with.
WARNING = {
    "pca": "A map of two dimensions leaves most of the space out: points that lie together here may be far apart there. "
    "Only distances along the two axes shown are kept.",
    "tsne": "On this map only who is next to whom has a meaning. Distances between groups, their sizes and their density "
    "have none, and structureless data can show clumps, too.",
    "umap": "On this map only who is next to whom has a meaning. Distances between groups, their sizes and their density "
    "have none, and structureless data can show clumps, too.",
}


@dataclass(frozen=True)
class ModalityGap:
    """How far images and texts lie apart in their common space (Liang et al. 2022).

    Attributes:
        distance: Euclidean distance of the two means of unit vectors; 0 to 2.
        within_images: Mean cosine of two different images.
        within_texts: Mean cosine of two different texts.
        across: Mean cosine of an image and a text.
    """

    distance: float
    within_images: float
    within_texts: float
    across: float

    @property
    def note(self) -> str:
        """One sentence for the reader of a map that shows both modalities."""
        return (
            f"images and texts lie {self.distance:.2f} apart (mean cosine across {self.across:.2f}, among images "
            f"{self.within_images:.2f}, among texts {self.within_texts:.2f}): only the order of cosines within one row "
            "or column of a comparison has a meaning, not the distance between the two clouds"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the note as plain JSON values."""
        values = {
            "distance": self.distance,
            "within_images": self.within_images,
            "within_texts": self.within_texts,
            "across": self.across,
        }
        return {k: None if np.isnan(v) else v for k, v in values.items()} | {"note": self.note}


@dataclass(frozen=True)
class Faith:
    """How far a map keeps neighbourhoods; 1 is perfect, ``chance`` is that of the same places dealt out at random.

    Attributes:
        trustworthiness: Neighbours on the map are neighbours in the space, weighted by rank; interval by patient. NaN
            below 4 rows.
        continuity: Neighbours in the space are neighbours on the map.
        n_neighbors: Neighbours that were looked at.
        rows: Rows that were judged.
        of: Rows of the map.
    """

    trustworthiness: Interval
    continuity: Interval
    n_neighbors: int
    rows: int
    of: int

    @property
    def note(self) -> str:
        """One sentence for the reader of the map."""
        sample = f", judged on a random {self.rows:,} of {self.of:,} rows" if self.rows < self.of else ""
        return (
            f"Trustworthiness {self.trustworthiness} (how many neighbours on the map are real), continuity "
            f"{self.continuity} (how many real neighbours the map keeps together); 1 is perfect, a random map has "
            f"{_text(self.trustworthiness.chance)}. {self.n_neighbors} neighbours{sample}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "trustworthiness": self.trustworthiness.to_dict(),
            "continuity": self.continuity.to_dict(),
            "n_neighbors": self.n_neighbors,
            "rows": self.rows,
            "of": self.of,
        }


@dataclass(frozen=True)
class Projection:
    """A place on a plane for every row.

    Attributes:
        xy: float32, shape (n, 2).
        ids: One per row.
        modalities: One per row.
        labels: Column name to one value a row, as the embeddings carried them.
        method: ``pca``, ``tsne`` or ``umap``.
        seed: Of the map and of the sample that is judged.
        faith: How far neighbourhoods are kept.
        explained_variance: Share of the variance on each axis (PCA only).
        gap: Present when both modalities are mapped.
        centered: Whether each modality's mean was subtracted first.
        space: Where the vectors come from.
        settings: What else the map depends on: engine, perplexity, neighbours, components.
    """

    xy: NDArray[np.float32]
    ids: tuple[str, ...]
    modalities: tuple[Modality, ...]
    labels: dict[str, tuple[LabelValue, ...]]
    method: Method
    seed: int
    faith: Faith
    explained_variance: tuple[float, float] | None
    gap: ModalityGap | None
    centered: bool
    space: Space
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trustworthiness(self) -> float:
        """Of ``faith``, as one number."""
        return self.faith.trustworthiness.value

    @property
    def n_neighbors(self) -> int:
        """Neighbours that were judged."""
        return self.faith.n_neighbors

    @property
    def warning(self) -> str:
        """What the map must be read with."""
        return WARNING[self.method]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "method": self.method,
            "seed": self.seed,
            "n": len(self),
            "trustworthiness": None if np.isnan(self.trustworthiness) else self.trustworthiness,
            "n_neighbors": self.n_neighbors,
            "faith": self.faith.to_dict(),
            "settings": dict(self.settings),
            "explained_variance": None if self.explained_variance is None else list(self.explained_variance),
            "modality_gap": None if self.gap is None else self.gap.to_dict(),
            "centered": self.centered,
            "space": self.space.to_dict(),
            "points": [
                {"id": i, "modality": m, "x": float(x), "y": float(y)}
                for i, m, (x, y) in zip(self.ids, self.modalities, self.xy, strict=True)
            ],
        }


def project(
    embeddings: Embeddings | Sequence[Embeddings],
    method: Method = "tsne",
    *,
    seed: int = 0,
    perplexity: float | None = None,
    n_neighbors: int = 10,
    center_modalities: bool = False,
    engine: Engine = "scikit-learn",
    components: int = 0,
    umap_neighbors: int = 15,
    min_dist: float = 0.1,
) -> Projection:
    """Return a place on a plane for every row.

    Args:
        embeddings: One set, or several of one space (images and texts).
        method: ``pca``, ``tsne`` or ``umap`` (umap-learn, extra ``analysis``).
        seed: Makes the map repeatable on one machine.
        perplexity: Of t-SNE; by default 30, less for fewer than 91 rows.
        n_neighbors: How many neighbours trustworthiness and continuity look at; less for few rows.
        center_modalities: Subtract each modality's mean first, so that images and texts share one cloud.
        engine: Of t-SNE: ``opentsne`` (extra ``analysis``) is fast for many rows.
        components: Principal components that t-SNE and UMAP start from; 0: all dimensions. The map is judged by all
            dimensions either way.
        umap_neighbors: Neighbours that UMAP keeps; more show coarser structure.
        min_dist: UMAP's smallest distance on the map.

    Raises:
        SpaceMismatch: When the sets come from two spaces.
        InputError: When there are too few rows or vectors are damaged.
        MissingExtra: openTSNE or umap-learn is not installed.
    """
    parts = [embeddings] if isinstance(embeddings, Embeddings) else list(embeddings)
    if not parts:
        raise InputError("no embeddings were given to project")
    if method not in METHODS:
        raise UnknownName("projection", method, METHODS)
    space = check_same_space(*parts)
    modalities: tuple[Modality, ...] = tuple(p.modality for p in parts for _ in range(len(p)))
    unit = np.concatenate([unit_vectors(p, p.modality) for p in parts]).astype(np.float64)
    n = len(unit)
    least = 3 if method == "pca" else 5
    if n < least:
        raise InputError(f"{method} needs at least {least} rows, got {n}")
    gap = modality_gap(unit, modalities) if len(set(modalities)) == 2 else None
    points = unit
    if center_modalities:
        points = unit.copy()
        for modality in set(modalities):
            rows = np.asarray([m == modality for m in modalities])
            points[rows] -= points[rows].mean(axis=0)
    explained: tuple[float, float] | None = None
    settings: dict[str, Any] = {}
    start = _leading(points, components) if method != "pca" else points
    if method == "pca":
        xy, explained = _pca(points)
    elif method == "tsne":
        chosen = _perplexity(n, perplexity)
        xy = _tsne(start, seed, chosen) if engine == "scikit-learn" else _open_tsne(start, seed, chosen)
        settings = {"engine": engine, "perplexity": chosen, "components": components}
    else:
        near = max(2, min(umap_neighbors, n - 1))
        xy = _umap(start, seed, near, min_dist)
        settings = {"umap_neighbors": near, "min_dist": min_dist, "components": components}
    columns = set(parts[0].labels).intersection(*(p.labels for p in parts))
    return Projection(
        xy.astype(np.float32),
        tuple(i for p in parts for i in p.ids),
        modalities,
        {c: tuple(v for p in parts for v in p.labels[c]) for c in parts[0].labels if c in columns},
        method,
        seed,
        judge_map(points, xy, [g for p in parts for g in p.groups], n_neighbors=n_neighbors, seed=seed),
        explained,
        gap,
        center_modalities,
        space,
        settings,
    )


def judge_map(
    points: NDArray[np.float64],
    xy: NDArray[np.floating[Any]],
    groups: Sequence[str],
    *,
    n_neighbors: int = 10,
    seed: int = 0,
) -> Faith:
    """Return trustworthiness and continuity with intervals by patient, on at most :data:`TRUST_ROWS` rows.

    Args:
        points: (n, dim) in the space.
        xy: (n, 2) on the map.
        groups: Patient of each row.
        n_neighbors: Neighbours to look at; fewer for few rows.
        seed: Of the sample, of the resamples and of the random map.
    """
    n = len(points)
    near = max(1, min(n_neighbors, (n - 1) // 2))
    random = np.random.default_rng(seed)
    rows = np.sort(random.choice(n, TRUST_ROWS, replace=False)) if n > TRUST_ROWS else np.arange(n)
    if n < 4:
        none = Interval(float("nan"), float("nan"), float("nan"), n)
        return Faith(none, none, near, n, n)
    own = points[rows]
    places = np.asarray(xy, dtype=np.float64)[rows]
    terms = neighbourhood_terms(own, places, near)
    chance = neighbourhood_terms(own, places[random.permutation(len(rows))], near)
    names = [groups[int(r)] for r in rows]

    def interval(values: NDArray[np.float64], by_chance: NDArray[np.float64]) -> Interval:
        return weighted_interval(
            lambda w: (w @ values) / w.sum(axis=1),
            names,
            n_resamples=500,
            seed=seed,
            chance=float(by_chance.mean()),
        )

    return Faith(interval(terms[0], chance[0]), interval(terms[1], chance[1]), near, len(rows), n)


def modality_gap(unit: NDArray[np.float64], modalities: Sequence[Modality]) -> ModalityGap:
    """Return how far apart the unit vectors of the two modalities lie; needs rows of both."""
    is_image = np.asarray([m == "image" for m in modalities])
    images, texts = unit[is_image], unit[~is_image]
    image_mean, text_mean = images.mean(axis=0), texts.mean(axis=0)

    def within(rows: NDArray[np.float64]) -> float:
        n = len(rows)  # |sum of unit vectors|^2 = n + n (n - 1) * mean cosine of two different ones
        total = rows.sum(axis=0)
        return float("nan") if n < 2 else float((total @ total - n) / (n * (n - 1)))

    return ModalityGap(
        float(np.linalg.norm(image_mean - text_mean)), within(images), within(texts), float(image_mean @ text_mean)
    )


def _pca(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[float, float] | None]:
    """Return the first two principal components, signs fixed so that the largest loading is positive."""
    centered = points - points.mean(axis=0)
    n, dim = centered.shape
    if n > dim:  # the covariance is the smaller matrix, and reading the rows in one product bounds the memory
        values, vectors = np.linalg.eigh(centered.T @ centered)
        values, axes = values[::-1], vectors.T[::-1]
    else:
        _, singular, axes = np.linalg.svd(centered, full_matrices=False)
        values = singular**2
    if dim < 2:
        axes = np.vstack([axes, np.zeros_like(axes)])
        values = np.append(values, 0.0)
    axes = axes[:2]
    largest = axes[np.arange(2), np.abs(axes).argmax(axis=1)]
    axes = axes * np.where(largest < 0, -1.0, 1.0)[:, None]
    total = float(np.maximum(values, 0.0).sum())
    share = (float(values[0]) / total, float(max(values[1], 0.0)) / total) if total > 0 else (0.0, 0.0)
    return centered @ axes.T, share


def _leading(points: NDArray[np.float64], components: int) -> NDArray[np.float64]:
    wanted = min(components, points.shape[1], len(points) - 1)
    if wanted < 2 or wanted == points.shape[1]:
        return points
    from sklearn.decomposition import PCA

    solver = "covariance_eigh" if len(points) > points.shape[1] else "full"
    return np.asarray(PCA(n_components=wanted, svd_solver=solver).fit_transform(points))


def _perplexity(n: int, perplexity: float | None) -> float:
    chosen = min(30.0, (n - 1) / 3) if perplexity is None else perplexity
    if not 0 < chosen < n:
        raise InputError(f"the perplexity must lie between 0 and the number of rows {n}, got {chosen:g}")
    return chosen


def _tsne(points: NDArray[np.float64], seed: int, perplexity: float) -> NDArray[np.float64]:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    start, _ = _pca(points)
    spread = float(start[:, 0].std())
    start = start / spread * 1e-4 if spread > 0 else np.random.default_rng(seed).normal(scale=1e-4, size=start.shape)
    model = TSNE(
        n_components=2,
        perplexity=perplexity,
        init=start.astype(np.float32),
        learning_rate="auto",
        random_state=seed,
        n_jobs=1,
    )
    with threadpool_limits(1):  # its sums over threads come in any order, so two runs would differ
        result: NDArray[np.float64] = model.fit_transform(points.astype(np.float32))
    return result


def _open_tsne(points: NDArray[np.float64], seed: int, perplexity: float) -> NDArray[np.float64]:
    """Return the map of Poličar et al. 2019 with its defaults, one thread and a seed."""
    try:
        from openTSNE import TSNE
    except ImportError as error:
        raise MissingExtra("openTSNE", "analysis") from error
    return np.asarray(TSNE(perplexity=perplexity, n_jobs=1, random_state=seed).fit(points), dtype=np.float64)


def _umap(points: NDArray[np.float64], seed: int, neighbors: int, min_dist: float) -> NDArray[np.float64]:
    """Return umap-learn's map with its defaults, one thread and a seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an absent TensorFlow, and of few rows
        try:
            from umap import UMAP
        except ImportError as error:
            raise MissingExtra("umap-learn", "analysis") from error
        model = UMAP(n_neighbors=neighbors, min_dist=min_dist, random_state=seed, n_jobs=1)
        return np.asarray(model.fit_transform(points.astype(np.float32)), dtype=np.float64)


def _text(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.2f}"
