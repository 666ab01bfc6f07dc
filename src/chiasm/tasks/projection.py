"""Embeddings to a map of two dimensions, with a number that says how far the map can be trusted.

In: :class:`~chiasm.types.Embeddings` of images, or of images and texts. Out: a frozen :class:`Projection`. PCA is a
linear view; t-SNE (van der Maaten and Hinton 2008) keeps neighbourhoods, and its distances between groups mean nothing.
Unit vectors are projected, so Euclidean neighbours are cosine neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings, LabelValue, Modality, Space, check_same_space

#: Trustworthiness costs memory that grows with the square of the rows; more are judged on a seeded sample of so many.
TRUST_ROWS = 2_000

Method = Literal["pca", "tsne"]


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
class Projection:
    """A place on a plane for every row.

    Attributes:
        xy: float32, shape (n, 2).
        ids: One per row.
        modalities: One per row.
        labels: Column name to one value a row, as the embeddings carried them.
        method: ``pca`` or ``tsne``.
        seed: Of t-SNE and of the sample for trustworthiness.
        trustworthiness: Share of neighbours on the map that are neighbours in the space, rank-weighted; 1 is perfect,
            about 0.5 is random (Venna and Kaski 2001). NaN below 4 rows.
        n_neighbors: Neighbours that were judged.
        explained_variance: Share of the variance on each axis (PCA only).
        gap: Present when both modalities are mapped.
        centered: Whether each modality's mean was subtracted first.
        space: Where the vectors come from.
    """

    xy: NDArray[np.float32]
    ids: tuple[str, ...]
    modalities: tuple[Modality, ...]
    labels: dict[str, tuple[LabelValue, ...]]
    method: Method
    seed: int
    trustworthiness: float
    n_neighbors: int
    explained_variance: tuple[float, float] | None
    gap: ModalityGap | None
    centered: bool
    space: Space

    def __len__(self) -> int:
        return len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "method": self.method,
            "seed": self.seed,
            "n": len(self),
            "trustworthiness": None if np.isnan(self.trustworthiness) else self.trustworthiness,
            "n_neighbors": self.n_neighbors,
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
) -> Projection:
    """Return a place on a plane for every row.

    Args:
        embeddings: One set, or several of one space (images and texts).
        method: ``pca`` or ``tsne``.
        seed: Makes t-SNE repeatable on one machine.
        perplexity: Of t-SNE; by default 30, less for fewer than 91 rows.
        n_neighbors: How many neighbours trustworthiness looks at; less for few rows.
        center_modalities: Subtract each modality's mean first, so that images and texts share one cloud.

    Raises:
        SpaceMismatch: When the sets come from two spaces.
        InputError: When there are too few rows or vectors are damaged.
    """
    parts = [embeddings] if isinstance(embeddings, Embeddings) else list(embeddings)
    if not parts:
        raise InputError("no embeddings were given to project")
    if method not in ("pca", "tsne"):
        raise UnknownName("projection", method, ("pca", "tsne"))
    space = check_same_space(*parts)
    modalities: tuple[Modality, ...] = tuple(p.modality for p in parts for _ in range(len(p)))
    unit = np.concatenate([unit_vectors(p, p.modality) for p in parts]).astype(np.float64)
    n = len(unit)
    least = 3 if method == "pca" else 5
    if n < least:
        raise InputError(f"{method} needs at least {least} rows, got {n}")
    gap = modality_gap(unit, modalities) if len(set(modalities)) == 2 else None
    points = unit.copy()
    if center_modalities:
        for modality in set(modalities):
            rows = np.asarray([m == modality for m in modalities])
            points[rows] -= points[rows].mean(axis=0)
    xy, explained = _pca(points)
    if method == "tsne":
        xy, explained = _tsne(points, seed, perplexity), None
    neighbors = max(1, min(n_neighbors, (n - 1) // 2))
    columns = set(parts[0].labels).intersection(*(p.labels for p in parts))
    return Projection(
        xy.astype(np.float32),
        tuple(i for p in parts for i in p.ids),
        modalities,
        {c: tuple(v for p in parts for v in p.labels[c]) for c in parts[0].labels if c in columns},
        method,
        seed,
        _trustworthiness(points, xy, neighbors, seed),
        neighbors,
        explained,
        gap,
        center_modalities,
        space,
    )


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


def _tsne(points: NDArray[np.float64], seed: int, perplexity: float | None) -> NDArray[np.float64]:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    n = len(points)
    chosen = min(30.0, (n - 1) / 3) if perplexity is None else perplexity
    if not 0 < chosen < n:
        raise InputError(f"the perplexity must lie between 0 and the number of rows {n}, got {chosen:g}")
    start, _ = _pca(points)
    spread = float(start[:, 0].std())
    start = start / spread * 1e-4 if spread > 0 else np.random.default_rng(seed).normal(scale=1e-4, size=start.shape)
    model = TSNE(
        n_components=2,
        perplexity=chosen,
        init=start.astype(np.float32),
        learning_rate="auto",
        random_state=seed,
        n_jobs=1,
    )
    with threadpool_limits(1):  # its sums over threads come in any order, so two runs would differ
        result: NDArray[np.float64] = model.fit_transform(points.astype(np.float32))
    return result


def _trustworthiness(points: NDArray[np.float64], xy: NDArray[np.float64], neighbors: int, seed: int) -> float:
    n = len(points)
    if n < 4:
        return float("nan")
    from sklearn.manifold import trustworthiness

    if n > TRUST_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(n, TRUST_ROWS, replace=False))
        points, xy = points[rows], xy[rows]
    return float(trustworthiness(points, xy, n_neighbors=neighbors))
