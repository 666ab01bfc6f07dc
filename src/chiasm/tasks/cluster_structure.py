"""Whether clusters are there: are they found again in other patients, and more separate than pieces of one cloud?

In: points, the patient of each, and a function that clusters. Out: the clusters and a frozen :class:`Structure`.

Every method cuts every cloud into pieces, and pieces of a long cloud are even stable. So two questions are asked. Patients
are drawn anew and clustered anew: do the clusterings agree on the rows that they share (adjusted Rand index, Hennig's
Jaccard per cluster)? And is the silhouette larger than that of normally distributed clouds with the same mean and
covariance, cut in the same way? The clouds keep
how rows of one patient resemble each other. Where several k were tried, so they are on those clouds: the best of all k is compared
with the best of all k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.metrics.clustering import adjusted_rand, jaccard_by_cluster
from chiasm.progress import Progress

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Fit = Callable[[Floats, int, int], Integers]

#: Agreement of clusterings of other patients from which clusters count as stable (Hennig 2008 for the Jaccard index).
STABLE = 0.75
#: Rows at most (of whole patients) that are drawn anew, and of a structureless cloud.
JUDGED_ROWS = 2_000
#: Other seeds of the same method on the same rows.
SEEDS = 5


@dataclass(frozen=True)
class Candidate:
    """One number of clusters that was tried.

    Attributes:
        k: Number of clusters (0: the method decides).
        silhouette: On the judged rows; NaN with fewer than two clusters.
        null_silhouette: Mean over structureless clouds; NaN when none was cut in two.
        stability: Mean adjusted Rand index between resamples.
    """

    k: int
    silhouette: float
    null_silhouette: float
    stability: float

    @property
    def lead(self) -> float:
        """Silhouette less that of structureless clouds; where those have no clusters at all, the silhouette itself."""
        return self.silhouette - (self.null_silhouette if math.isfinite(self.null_silhouette) else 0.0)


@dataclass(frozen=True)
class Structure:
    """Whether clusters are there.

    Attributes:
        k: Chosen or given number of clusters.
        stability: Mean adjusted Rand index between clusterings of other patients, on the rows they share; a row in no
            cluster belongs to one cluster more.
        stability_low: 2.5 % quantile over pairs of resamples.
        stability_high: 97.5 % quantile.
        null_stability: The same on structureless clouds: a long cloud is cut stably, too.
        seed_stability: Mean adjusted Rand index between other seeds on the same rows.
        jaccard: For each cluster how well it is found again, the mean over resamples of the largest Jaccard index.
        silhouette: On the judged rows.
        null_silhouette: Mean over structureless clouds.
        p_value: Share of structureless clouds whose silhouette leads as much, the best of all k with the best of all k.
        candidates: All k that were tried.
        resamples: Number of resamples.
        null_draws: Number of structureless clouds.
        judged_rows: Rows that resamples and clouds were limited to.
    """

    k: int
    stability: float
    stability_low: float
    stability_high: float
    null_stability: float
    seed_stability: float
    jaccard: tuple[float, ...]
    silhouette: float
    null_silhouette: float
    p_value: float
    candidates: tuple[Candidate, ...]
    resamples: int
    null_draws: int
    judged_rows: int

    @property
    def found(self) -> bool:
        """Whether there are at least two clusters that are stable and more separate than pieces of one cloud."""
        return len(self.jaccard) > 1 and self.stability >= STABLE and self.p_value <= 0.05

    @property
    def verdict(self) -> str:
        """One sentence for readers."""
        if len(self.jaccard) < 2:
            return "no stable structure: fewer than two clusters were found"
        stable = f"clusterings of other patients agree to {self.stability:.2f} (adjusted Rand index)"
        separate = f"silhouette {self.silhouette:.2f}, of structureless clouds {_text(self.null_silhouette)}, p = {self.p_value:.3f}"
        if self.found:
            return f"stable structure: {stable}; {separate}"
        why = []
        if self.stability < STABLE:
            why.append(f"below {STABLE}")
        if self.p_value > 0.05:
            why.append("no more separate than pieces of one cloud")
        return f"no stable structure ({' and '.join(why)}): {stable}; {separate}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, the verdict and the leads as plain JSON values."""
        values = asdict(self)
        values["candidates"] = [{**asdict(c), "lead": c.lead} for c in self.candidates]
        plain = _without_nan(values)
        assert isinstance(plain, dict)
        return {**plain, "found": self.found, "verdict": self.verdict}


def fit_kmeans(points: Floats, k: int, seed: int) -> Integers:
    """Return the clusters of scikit-learn's k-means, the best of four starts."""
    from sklearn.cluster import KMeans

    k = min(k, len(np.unique(points, axis=0)))
    found: Integers = KMeans(k, n_init=4, random_state=seed).fit_predict(points).astype(np.int64)
    return found


def examine(
    points: Floats,
    groups: NDArray[np.intp],
    *,
    fit: Fit,
    ks: Sequence[int],
    on_sphere: bool,
    resamples: int,
    null_draws: int,
    seed: int,
    progress: Progress,
) -> tuple[Integers, Structure]:
    """Cluster, choose k where there are several, and judge.

    The rule for k: among the k whose stability reaches :data:`STABLE`, or among all where none does, the one whose
    silhouette leads most over that of structureless clouds (the idea of the gap statistic of Tibshirani et al. 2001).

    Args:
        points: Rows to cluster.
        groups: Number of the patient of each row.
        fit: Points, k and a seed to clusters.
        ks: Numbers of clusters to try.
        on_sphere: Whether the points have unit norm; structureless clouds are brought there, too.
        resamples: How often patients are drawn.
        null_draws: How many structureless clouds.
        seed: Of all draws.
        progress: Is told of every draw.

    Returns:
        Clusters numbered by size, and what was found.
    """
    progress.start(resamples + null_draws, "clusters")
    random = np.random.default_rng(seed)
    judged = _some_patients(groups, random, JUDGED_ROWS)
    clouds = _Clouds(points, groups, judged, on_sphere)
    own = [_score(points[judged], fit(points[judged], k, seed)) for k in ks]
    again: list[dict[int, Integers]] = []
    drawn: list[NDArray[np.intp]] = []
    for r in range(resamples):
        rows = judged[_redrawn(clouds.groups, random)]
        drawn.append(rows)
        again.append({k: fit(points[rows], k, seed + 1 + r) for k in ks})
        progress.advance()
    stability = {k: _pairwise(drawn, [found[k] for found in again]) for k in ks}
    null = np.full((null_draws, len(ks)), np.nan)
    null_pairs: dict[int, list[float]] = {k: [] for k in ks}
    for draw in range(null_draws):
        cloud = clouds.draw(random)
        for column, k in enumerate(ks):
            null[draw, column] = _score(cloud, fit(cloud, k, seed))
            if len(ks) == 1 or draw < 4:  # a mean beside the score; the test is of the silhouette
                null_pairs[k].append(_halves(cloud, clouds.groups, fit, k, random))
        progress.advance()
    means = [_mean(c) for c in null.T]
    candidates = tuple(Candidate(k, own[i], means[i], _mean(stability[k])) for i, k in enumerate(ks))
    chosen = _best(candidates)
    k = candidates[chosen].k
    found = _by_size(fit(points, k, seed))
    seeds = [fit(points[judged], k, seed + 1000 + s) for s in range(SEEDS)]
    jaccard = [jaccard_by_cluster(found[rows], result[k]) for rows, result in zip(drawn, again, strict=True)]
    jaccard = [np.pad(j, (0, int(found.max(initial=-1)) + 1 - len(j)), constant_values=np.nan) for j in jaccard]
    low, high = np.quantile(stability[k], (0.025, 0.975)) if len(stability[k]) else (math.nan, math.nan)
    progress.finish()
    return found, Structure(
        k=k,
        stability=candidates[chosen].stability,
        stability_low=float(low),
        stability_high=float(high),
        null_stability=_mean(null_pairs[k]),
        seed_stability=float(np.mean([adjusted_rand(a, b) for a, b in combinations(seeds, 2)])),
        jaccard=tuple(_mean(c) for c in np.asarray(jaccard).T),
        silhouette=own[chosen],
        null_silhouette=means[chosen],
        p_value=_p_value(candidates, chosen, null),
        candidates=candidates,
        resamples=resamples,
        null_draws=null_draws,
        judged_rows=len(judged),
    )


def is_separable(clusters: Integers) -> bool:
    """Return whether a silhouette exists: at least two clusters, and a row more than clusters."""
    return 2 <= len(np.unique(clusters)) < len(clusters)


def silhouettes(points: Floats, clusters: Integers) -> Floats:
    """Return scikit-learn's silhouette of every row (Rousseeuw 1987): -1 to 1."""
    from sklearn.metrics import silhouette_samples

    return np.asarray(silhouette_samples(points, clusters), dtype=np.float64)


def _score(points: Floats, clusters: Integers) -> float:
    rows = clusters >= 0
    return float(silhouettes(points[rows], clusters[rows]).mean()) if is_separable(clusters[rows]) else math.nan


def _some_patients(groups: NDArray[np.intp], random: np.random.Generator, most: int) -> NDArray[np.intp]:
    """Return all rows, or those of so many random patients as have about ``most`` rows."""
    if len(groups) <= most:
        return np.arange(len(groups))
    order = random.permutation(int(groups.max()) + 1)
    kept = max(2, int((np.cumsum(np.bincount(groups)[order]) <= most).sum()))
    return np.flatnonzero(np.isin(groups, order[:kept]))


def _redrawn(groups: NDArray[np.intp], random: np.random.Generator) -> NDArray[np.intp]:
    """Return the distinct rows of patients drawn with replacement.

    A row that was drawn twice is kept once: copies would be clusters of their own to HDBSCAN (Hennig 2007, section 3).
    """
    count = int(groups.max()) + 1
    return np.flatnonzero(np.isin(groups, random.integers(count, size=count)))


def _pairwise(rows: Sequence[NDArray[np.intp]], clusters: Sequence[Integers]) -> list[float]:
    """Return the adjusted Rand index of every pair of resamples on the rows they share."""
    found = []
    for i, j in combinations(range(len(rows)), 2):
        _, first, second = np.intersect1d(rows[i], rows[j], assume_unique=True, return_indices=True)
        if len(first) > 1:
            found.append(adjusted_rand(clusters[i][first], clusters[j][second]))
    return found


def _halves(cloud: Floats, groups: NDArray[np.intp], fit: Fit, k: int, random: np.random.Generator) -> float:
    """Return the agreement of two resamples of a cloud's patients."""
    rows = [_redrawn(groups, random) for _ in range(2)]
    found = _pairwise(rows, [fit(cloud[r], k, i) for i, r in enumerate(rows)])
    return found[0] if found else math.nan


class _Clouds:
    """Normally distributed points with the mean and covariances, between and within patients, of the given ones.

    Rows of one patient resemble each other. A cloud without that would make the clumps of patients look like structure.
    """

    def __init__(self, points: Floats, groups: NDArray[np.intp], judged: NDArray[np.intp], on_sphere: bool) -> None:
        sizes = np.bincount(groups)
        centers = np.zeros((len(sizes), points.shape[1]))
        np.add.at(centers, groups, points)
        centers /= sizes[:, None]
        several = sizes[groups] > 1
        self.mean = points.mean(axis=0)
        self.between = _root(centers - centers.mean(axis=0), len(sizes) - 1)
        self.within = _root((points - centers[groups])[several], int(several.sum()))
        self.groups = np.unique(groups[judged], return_inverse=True)[1]
        self.several = several[judged]
        self.on_sphere = on_sphere

    def draw(self, random: np.random.Generator) -> Floats:
        """Return one cloud, with as many rows a patient as the judged rows have."""
        count = int(self.groups.max()) + 1
        cloud: Floats = self.mean + (random.standard_normal((count, len(self.between))) @ self.between)[self.groups]
        if len(self.within):
            cloud[self.several] += random.standard_normal((int(self.several.sum()), len(self.within))) @ self.within
        if self.on_sphere:
            cloud /= np.maximum(np.linalg.norm(cloud, axis=1, keepdims=True), 1e-12)
        return cloud


def _root(deviations: Floats, freedom: int) -> Floats:
    """Return R with R'R the covariance of the deviations."""
    if not len(deviations):
        return np.zeros((0, deviations.shape[1]))
    return np.asarray(np.linalg.qr(deviations, mode="r")) / math.sqrt(max(freedom, 1))


def _best(candidates: Sequence[Candidate]) -> int:
    stable = [i for i, c in enumerate(candidates) if c.stability >= STABLE and math.isfinite(c.silhouette)]
    pool = stable or [i for i, c in enumerate(candidates) if math.isfinite(c.silhouette)] or [0]
    return max(pool, key=lambda i: candidates[i].lead)


def _p_value(candidates: Sequence[Candidate], chosen: int, null: Floats) -> float:
    lead = candidates[chosen].lead
    if not math.isfinite(lead):
        return 1.0
    center = np.asarray([c.null_silhouette if math.isfinite(c.null_silhouette) else 0.0 for c in candidates])
    leads = np.where(np.isfinite(null), null - center, -np.inf).max(axis=1)
    return float((1 + (leads >= lead).sum()) / (len(null) + 1))


def _by_size(clusters: Integers) -> Integers:
    """Number clusters by size, largest first; equal sizes by their first row."""
    names, first, counts = np.unique(clusters[clusters >= 0], return_index=True, return_counts=True)
    result = np.full(len(clusters), -1, dtype=np.int64)
    for new, old in enumerate(names[np.lexsort((first, -counts))]):
        result[clusters == old] = new
    return result


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: Sequence[float] | Floats) -> float:
    """Return the mean of what is defined, NaN where nothing is."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else math.nan


def _text(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "none (they have no clusters)"
