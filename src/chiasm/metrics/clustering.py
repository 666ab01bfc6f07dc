"""How far a clustering agrees with labels or with another clustering, each number beside what chance would give.

Comes in: the cluster of each row (-1: in none), and a label or another clustering. Goes out: frozen numbers with
intervals by patient.

Notable choices: rows in no cluster count as one cluster of their own, so leaving hard rows out earns nothing. Chance is
the mean over labels dealt out anew to whole patients of as many rows: images of one patient resemble each other, and would look like
agreement otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Clusters
from chiasm.metrics.labels import as_classes
from chiasm.types import Interval

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Patients at least that exchange labels with each other; fewer of one size are put to those of the next size.
SMALLEST_STRATUM = 5
#: Scores of an agreement, in the order of tables.
SCORES = ("ari", "ami", "nmi", "homogeneity", "completeness", "v_measure", "purity")
#: What the scores are, for readers.
MEANING = {
    "ari": "adjusted Rand index: pairs of rows that are together, or apart, on both sides; 0 by chance, 1 the same",
    "ami": "adjusted mutual information: 0 by chance, 1 the same; kinder than ARI to small classes",
    "nmi": "normalised mutual information (equal to the V-measure); many clusters make it large by chance",
    "homogeneity": "1 when every cluster holds one label only; many clusters make it large",
    "completeness": "1 when every label lies in one cluster only",
    "v_measure": "harmonic mean of homogeneity and completeness",
    "purity": "share of rows whose label is the commonest of their cluster; many clusters make it large",
}


@dataclass(frozen=True)
class ClusterAgreement:
    """What a clustering tells of a column of labels.

    Attributes:
        scores: Name (see :data:`SCORES`) to the score with its interval by patient; ``chance`` is its mean over permuted
            labels, ``n`` the rows that have a label.
        null_high: Name to the 97.5 % quantile over permuted labels: what only one in forty reaches by chance.
        p_value: Share of permutations whose ARI reaches the observed one, in (0, 1].
        permuted: What chance deals labels to: ``patients``, among those of (about) as many rows, or ``rows`` where no
            patient has several.
        classes: Labels that occur.
        clusters: Clusters that occur among labelled rows; rows in no cluster are one of them.
    """

    scores: Mapping[str, Interval]
    null_high: Mapping[str, float]
    p_value: float
    permuted: str
    classes: int
    clusters: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "scores": {k: {**v.to_dict(), "null_high": self.null_high[k]} for k, v in self.scores.items()},
            "p_value": self.p_value,
            "permuted": self.permuted,
            "classes": self.classes,
            "clusters": self.clusters,
        }


def contingency(first: Integers, second: Integers, weights: Floats | None = None) -> Floats:
    """Return the table of (weighted) counts of two numberings that start at 0."""
    if not len(first):
        return np.zeros((0, 0))
    shape = (int(first.max()) + 1, int(second.max()) + 1)
    flat = np.bincount(first * shape[1] + second, weights=weights, minlength=shape[0] * shape[1])
    return flat.reshape(shape).astype(np.float64)


def adjusted_rand(first: ArrayLike, second: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Return the adjusted Rand index of two clusterings of the same rows.

    Args:
        first: Cluster of each row.
        second: As ``first``.
        weights: How often each row was drawn in a resample. A row with its own copy is no pair, or duplicates alone
            would look like agreement.

    Returns:
        1 for equal partitions, 0 on average for independent ones; 1 when both are trivial in the same way.

    References:
        Hubert and Arabie, 1985, Comparing partitions, equation 5, https://doi.org/10.1007/BF01908075.
    """
    a, b = _numbered(first, second)
    w = np.ones(len(a)) if weights is None else np.asarray(weights, dtype=np.float64)
    return _pair_index(contingency(a, b, w), float((w**2).sum()))


def _pair_index(table: Floats, copies: float | Floats) -> float:
    """Return the ARI of a table of weights.

    Args:
        table: Weights of rows by cluster and label.
        copies: Ordered pairs that are no pairs, of a row with itself or of two copies of a patient: among those that are
            together on both sides, on the first, on the second, and all; one number where they are equal.
    """
    both, rows, columns, every = np.broadcast_to(np.asarray(copies, dtype=np.float64), (4,))

    def pairs(counts: Floats, left_out: float) -> float:
        return max(float((counts**2).sum()) - left_out, 0.0) / 2

    together = pairs(table, both)
    first, second = pairs(table.sum(axis=1), rows), pairs(table.sum(axis=0), columns)
    total = pairs(table.sum(keepdims=True), every)
    if total <= 0:
        return 1.0
    expected, largest = first * second / total, (first + second) / 2
    return 1.0 if math.isclose(largest, expected, abs_tol=1e-12) else (together - expected) / (largest - expected)


class _Copies:
    """Counts the pairs within patients, so that two copies of a drawn patient do not agree with each other."""

    def __init__(self, a: Integers, b: Integers, group: NDArray[np.intp]) -> None:
        self.group, self.first = group, np.unique(group, return_index=True)[1]
        self.sizes = np.bincount(group).astype(np.float64)
        cell = a * (int(b.max()) + 1) + b
        self.within = np.stack([self._squares(part) for part in (cell, a, b, np.zeros_like(a))])

    def _squares(self, part: Integers) -> Floats:
        """Return for each patient the sum of squared counts of a numbering of its rows."""
        width = int(part.max()) + 1
        cells, counts = np.unique(self.group * width + part, return_counts=True)
        squares = np.bincount(cells // width, weights=counts.astype(np.float64) ** 2, minlength=len(self.sizes))
        return np.asarray(squares, dtype=np.float64)

    def of(self, weights: Floats) -> Floats:
        """Return the ordered pairs to leave out of a resample: four numbers, see :func:`_pair_index`."""
        drawn = weights[self.first]
        found: Floats = self.within @ (drawn**2 - drawn) + float(drawn @ self.sizes)
        return found


def information_scores(table: Floats) -> dict[str, float]:
    """Return NMI, homogeneity, completeness, V-measure and purity of a table of clusters (rows) and labels (columns).

    One class or one cluster: homogeneity or completeness is 1, as scikit-learn has it.

    References:
        Rosenberg and Hirschberg, 2007, V-measure, https://aclanthology.org/D07-1043.
    """
    joint = table / table.sum()
    of_clusters, of_labels = _entropy(joint.sum(axis=1)), _entropy(joint.sum(axis=0))
    mutual = max(of_clusters + of_labels - _entropy(joint.ravel()), 0.0)
    homogeneity = mutual / of_labels if of_labels > 0 else 1.0
    completeness = mutual / of_clusters if of_clusters > 0 else 1.0
    total = homogeneity + completeness
    v_measure = 2 * homogeneity * completeness / total if total > 0 else 0.0
    purity = float(joint.max(axis=1).sum())
    return {
        "nmi": v_measure,
        "homogeneity": homogeneity,
        "completeness": completeness,
        "v_measure": v_measure,
        "purity": purity,
    }


def cluster_agreement(
    clusters: ArrayLike,
    labels: Sequence[Any],
    *,
    groups: Sequence[Hashable] | None = None,
    n_resamples: int = 400,
    permutations: int = 200,
    seed: int = 0,
) -> ClusterAgreement:
    """Compare a clustering with labels that it never saw.

    Args:
        clusters: Cluster of each row; -1 (in none) counts as one cluster of its own.
        labels: One per row; None is left out.
        groups: Patient of each row.
        n_resamples: Of the intervals; whole patients are drawn. Two copies of a patient form no pair in the ARI; mutual
            information and purity have no such remedy, and lean upwards in resamples of few patients.
        permutations: Of chance.
        seed: Of both.

    Raises:
        InputError: Lengths differ, or fewer than two rows have a label.
    """
    given = np.asarray(clusters)
    (classes,) = as_classes(labels)
    if given.shape != classes.shape or (groups is not None and len(groups) != len(given)):
        raise InputError(f"{len(given)} rows have {len(classes)} labels")
    keep = classes >= 0
    if keep.sum() < 2:
        raise InputError(f"{int(keep.sum())} rows have a label; agreement needs two")
    a, b = _numbered(given[keep], classes[keep])
    names = np.asarray([str(g) for g in groups])[keep] if groups is not None else np.arange(len(a)).astype(str)
    drawn = Clusters(names)
    value = _scores(a, b, np.ones(len(a)))
    copies = _Copies(a, b, drawn.of_row)
    draws = (
        [_scores(a, b, w, copies.of(w)) for block in drawn.weights(n_resamples, seed) for w in block]
        if drawn.count > 1
        else []
    )
    null, permuted = _permuted(a, b, drawn.of_row, permutations, seed)
    intervals = {}
    for name in SCORES:
        low, high = np.quantile([d[name] for d in draws], (0.025, 0.975)) if draws else (math.nan, math.nan)
        chance = float(np.mean([d[name] for d in null]))
        intervals[name] = Interval(value[name], float(low), float(high), len(a), chance)
    reached = sum(d["ari"] >= value["ari"] - 1e-12 for d in null)
    return ClusterAgreement(
        intervals,
        {name: float(np.quantile([d[name] for d in null], 0.975)) for name in SCORES},
        (1 + reached) / (permutations + 1),
        permuted,
        int(b.max()) + 1,
        int(a.max()) + 1,
    )


def jaccard_by_cluster(reference: ArrayLike, other: ArrayLike) -> Floats:
    """Return how well each cluster of a reference is found again in another clustering of the same rows.

    Args:
        reference: Cluster of each row, -1 for none; clusters are numbered from 0.
        other: As ``reference``; its numbers need not agree.

    Returns:
        For each cluster the largest Jaccard index with a cluster of ``other``, in [0, 1]; NaN for a cluster without a
        row here. Rows in no cluster form no cluster.

    References:
        Hennig, 2007, Cluster-wise assessment of cluster stability, https://doi.org/10.1016/j.csda.2006.11.025.
    """
    a, b = np.asarray(reference), np.asarray(other)
    _check_equal(a, b)
    count = int(a.max(initial=-1)) + 1
    sizes = np.bincount(a[a >= 0], minlength=count).astype(np.float64)
    best = np.where(sizes > 0, 0.0, np.nan)
    names, numbers = np.unique(b[b >= 0], return_inverse=True)
    if count and len(names):
        others = np.bincount(numbers, minlength=len(names))
        compact = np.full(len(b), -1)
        compact[b >= 0] = numbers
        rows = (a >= 0) & (b >= 0)
        flat = np.bincount(a[rows] * len(names) + compact[rows], minlength=count * len(names))
        both = flat.reshape(count, len(names))
        union = sizes[:, None] + others[None, :] - both
        best = np.where(sizes > 0, (both / np.maximum(union, 1)).max(axis=1), np.nan)
    return best


def _scores(a: Integers, b: Integers, weights: Floats, copies: Floats | None = None) -> dict[str, float]:
    table = contingency(a, b, weights)
    left_out: float | Floats = float((weights**2).sum()) if copies is None else copies
    return {
        "ari": _pair_index(table, left_out),
        "ami": _adjusted_information(table),
        **information_scores(table),
    }


def _adjusted_information(table: Floats) -> float:
    """Return the adjusted mutual information of a table of whole counts (Vinh et al. 2010), as scikit-learn has it.

    From the table rather than from the rows: a resample costs a tenth of the time.
    """
    from sklearn.metrics.cluster import expected_mutual_information

    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    if min(table.shape, default=0) < 2:
        return float(table.shape[0] == table.shape[1])
    total = int(table.sum())
    of_rows, of_columns = _entropy(table.sum(axis=1) / total), _entropy(table.sum(axis=0) / total)
    mutual = max(of_rows + of_columns - _entropy((table / total).ravel()), 0.0)
    expected = float(expected_mutual_information(table.astype(np.int64), total))
    span = (of_rows + of_columns) / 2 - expected
    # No room above chance: every row alone on both sides. scikit-learn calls that a perfect match, too.
    return 1.0 if abs(span) < 1e-12 else (mutual - expected) / span


def _permuted(
    a: Integers, b: Integers, group: NDArray[np.intp], permutations: int, seed: int
) -> tuple[list[dict[str, float]], str]:
    """Return the scores under labels dealt out anew, and what they were dealt to.

    Patients exchange labels with patients of as many rows: the share of each label stays what it is, or chance would lie
    below one cluster that holds everything where the patients of a common label have many rows.
    """
    first = np.zeros(int(group.max()) + 1, dtype=np.int64)
    first[group[::-1]] = b[::-1]
    whole = bool((first[group] == b).all())
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    order = np.argsort(group, kind="stable")
    alike = _alike(sizes, SMALLEST_STRATUM if whole else 1)
    rows_of = [order[starts[patients][:, None] + np.arange(sizes[patients[0]])] for patients in alike if not whole]
    random = np.random.default_rng(seed)
    ones = np.ones(len(a))
    null = []
    for _ in range(permutations):
        if whole:
            of_patient = first.copy()
            for patients in alike:
                of_patient[patients] = first[random.permutation(patients)]
            dealt = of_patient[group]
        else:  # labels of one patient stay together
            dealt = b.copy()
            for rows in rows_of:
                dealt[rows] = b[random.permutation(rows)]
        null.append(_scores(a, dealt, ones))
    return null, "rows" if len(first) == len(b) else "patients"


def _alike(sizes: NDArray[np.intp], least: int) -> list[NDArray[np.intp]]:
    """Return patients in lots of as many rows; neighbouring sizes are put together until a lot has ``least`` patients."""
    lots: list[NDArray[np.intp]] = []
    held: list[NDArray[np.intp]] = []
    for size in np.unique(sizes):
        held.append(np.flatnonzero(sizes == size))
        if sum(map(len, held)) >= least:
            lots.append(np.concatenate(held))
            held = []
    if held:
        lots[-1:] = [np.concatenate([*lots[-1:], *held])]
    return lots


def _numbered(first: ArrayLike, second: ArrayLike) -> tuple[Integers, Integers]:
    a, b = np.asarray(first), np.asarray(second)
    _check_equal(a, b)
    return np.unique(a, return_inverse=True)[1].astype(np.int64), np.unique(b, return_inverse=True)[1].astype(np.int64)


def _check_equal(a: NDArray[Any], b: NDArray[Any]) -> None:
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"two clusterings must have one entry a row each, got shapes {a.shape} and {b.shape}")


def _entropy(shares: Floats) -> float:
    shares = shares[shares > 0]
    return max(float(-(shares * np.log(shares)).sum()), 0.0)
