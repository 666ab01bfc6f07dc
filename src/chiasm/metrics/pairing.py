"""What a pairing looks like from outside: how many images share a report, and whether it agrees with labels.

Comes in: the report of each image, and for the audit the label of each image. Goes out: frozen numbers. Labels are read
here, after the pairing, and never go back into it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.labels import as_classes
from chiasm.types import Interval


@dataclass(frozen=True)
class Hubness:
    """How images are spread over the reports of a corpus.

    Attributes:
        images: With a report.
        reports: In the corpus.
        used: Reports that at least one image has.
        max_load: Most images that share one report.
        top_share: Share of images that the most used 1 % of the reports have (at least one report).
        gini: Of the number of images a report: 0 when all have equally many, towards 1 when few have all.
        skewness: Third standardised moment of the number of images a report; above about 1 there are hubs. NaN when all
            reports have equally many.
        entropy: Of the distribution of images over reports, in bits.
        effective: 2 to the power of ``entropy``: as many reports with equally many images have this entropy.
    """

    images: int
    reports: int
    used: int
    max_load: int
    top_share: float
    gini: float
    skewness: float
    entropy: float
    effective: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; a number that does not exist is None."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass(frozen=True)
class Agreement:
    """How much the report of an image tells of its label, beside what chance would give.

    Attributes:
        nmi: Normalised mutual information in [0, 1] with its null: ``low`` and ``high`` are the 2.5 and 97.5 %
            quantiles **of the null**, ``chance`` its mean, ``n`` the images. Many reports make it large by chance alone.
        adjusted: (nmi − chance) / (1 − chance): 0 by chance, 1 when reports determine labels.
        p_value: Share of permutations that reach ``nmi``, in (0, 1].
        purity: Share of images whose label is the most frequent one of their report; by itself it favours many reports.
        permuted: What the null permutes: ``patients`` when each has one label, else ``images``.
    """

    nmi: Interval
    adjusted: float
    p_value: float
    purity: Interval
    permuted: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**asdict(self), "nmi": self.nmi.to_dict(), "purity": self.purity.to_dict()}


def count_images(report_rows: ArrayLike, reports: int) -> NDArray[np.int64]:
    """Return how many images have each report (the k-occurrence of the hubness literature).

    Args:
        report_rows: Row of the report of each image; any shape, -1 where there is none.
        reports: Size of the corpus.

    Raises:
        InputError: A row lies outside the corpus.
    """
    rows = np.asarray(report_rows).ravel().astype(np.int64)
    if rows.size and (rows.max() >= reports or rows.min() < -1):
        raise InputError(f"rows from {rows.min()} to {rows.max()} do not lie in a corpus of {reports} reports")
    return np.bincount(rows[rows >= 0], minlength=reports).astype(np.int64)


def hubness(loads: ArrayLike) -> Hubness:
    """Return how evenly images are spread.

    Args:
        loads: Images of each report, zeros included.

    Raises:
        InputError: There is no report, or a number is negative.

    References:
        Radovanović et al., 2010, Hubs in space, JMLR 11 (skewness of the k-occurrence).
    """
    counts = np.asarray(loads, dtype=np.float64)
    if counts.ndim != 1 or len(counts) == 0 or (counts < 0).any():
        raise InputError("loads must be a list of numbers of images that are not negative")
    total, n = counts.sum(), len(counts)
    rising = np.sort(counts)
    gini = float((2 * np.arange(1, n + 1) - n - 1) @ rising / (n * total)) if total else math.nan
    spread = counts.std()
    skewness = float((((counts - counts.mean()) / spread) ** 3).mean()) if spread > 0 else math.nan
    share = counts[counts > 0] / total if total else np.ones(0)
    entropy = float(-(share * np.log2(share)).sum()) + 0.0 if total else math.nan
    top = max(1, round(n / 100))
    return Hubness(
        images=int(total),
        reports=n,
        used=int((counts > 0).sum()),
        max_load=int(counts.max()),
        top_share=float(rising[-top:].sum() / total) if total else math.nan,
        gini=gini,
        skewness=skewness,
        entropy=entropy,
        effective=2.0**entropy if total else math.nan,
    )


def quantiles(values: ArrayLike, at: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> dict[str, float]:
    """Return quantiles as ``{"p05": ...}`` of what is not NaN; NaN where nothing is left."""
    known = np.asarray(values, dtype=np.float64).ravel()
    known = known[np.isfinite(known)]
    found = np.quantile(known, at) if len(known) else np.full(len(at), np.nan)
    return {f"p{round(100 * q):02d}": float(v) for q, v in zip(at, found, strict=True)}


def mutual_information(table: NDArray[np.float64]) -> float:
    """Return the normalised mutual information of a table of counts, 2·I / (H + H'); 0 when either entropy is 0.

    Deviation: scikit-learn gives 1 when both sides have one class; that says nothing about agreement, so it is 0 here.
    """
    joint = table / table.sum()
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    h = _entropy(rows) + _entropy(columns)
    if not _entropy(rows) or not _entropy(columns):
        return 0.0
    return float(np.clip(2 * (h - _entropy(joint.ravel())) / h, 0.0, 1.0))


def _entropy(shares: NDArray[np.float64]) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def label_agreement(
    report_rows: ArrayLike,
    labels: Sequence[Any],
    *,
    groups: Sequence[Hashable] | None = None,
    permutations: int = 500,
    seed: int = 0,
) -> Agreement:
    """Compare reports with labels that the pairing never saw: an audit.

    The null deals out the labels anew. Where every patient has one label the labels of patients are permuted, or images
    of one patient, which resemble each other and each other's reports, would look like agreement.

    Args:
        report_rows: (n,) row of the report of each image; -1 (none) is left out.
        labels: One per image; None is left out.
        groups: Patient of each image.
        permutations: Of the null.
        seed: Of the null.

    Raises:
        InputError: Lengths differ, or fewer than two images are left.
    """
    rows = np.asarray(report_rows)
    (classes,) = as_classes(labels)
    if rows.shape != classes.shape or (groups is not None and len(groups) != len(rows)):
        raise InputError(f"{len(rows)} images have {len(classes)} labels")
    keep = (rows >= 0) & (classes >= 0)
    if keep.sum() < 2:
        raise InputError(f"{int(keep.sum())} images have both a report and a label; agreement needs two")
    _, report = np.unique(rows[keep], return_inverse=True)
    _, label = np.unique(classes[keep], return_inverse=True)
    group = np.arange(len(label))
    if groups is not None:
        _, group = np.unique(np.asarray([str(g) for g in groups])[keep], return_inverse=True)
    first = np.zeros(group.max() + 1, dtype=np.int64)
    first[group[::-1]] = label[::-1]
    whole = bool((first[group] == label).all()) and len(first) < len(label)
    shape = (report.max() + 1, label.max() + 1)

    def table(of: NDArray[np.int64]) -> NDArray[np.float64]:
        flat = np.bincount(report * shape[1] + of, minlength=shape[0] * shape[1])
        return flat.reshape(shape).astype(np.float64)

    random = np.random.default_rng(seed)
    null = np.empty((permutations, 2))
    for i in range(permutations):
        drawn = random.permutation(first)[group] if whole else random.permutation(label)
        found = table(drawn)
        null[i] = mutual_information(found), found.max(axis=1).sum() / len(label)
    observed = table(label)
    value, pure = mutual_information(observed), float(observed.max(axis=1).sum() / len(label))
    chance = float(null[:, 0].mean())
    return Agreement(
        _beside(value, null[:, 0], len(label)),
        float((value - chance) / (1 - chance)) if chance < 1 else 0.0,
        float((1 + (null[:, 0] >= value - 1e-12).sum()) / (permutations + 1)),
        _beside(pure, null[:, 1], len(label)),
        "patients" if whole else "images",
    )


def _beside(value: float, null: NDArray[np.float64], n: int) -> Interval:
    low, high = np.quantile(null, (0.025, 0.975))
    return Interval(value, float(low), float(high), n, float(null.mean()))
