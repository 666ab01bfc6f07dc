"""What a linear probe learns from weak labels, beside one that learns from the given labels of the same rows.

Comes in: embeddings of images, weak labels of their texts, given labels. Goes out: the area under the ROC curve of both
probes on test patients, judged by the given labels, and their difference. The weak labels of test rows are never used, so a
probe cannot profit from what the rules get wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import paired_difference, weighted_interval
from chiasm.metrics.weighted import auroc_statistic
from chiasm.tasks.few_shot import LinearProbe, refuse_shared_patients
from chiasm.types import Embeddings, Interval

#: Fewer patients of either class than this, in training or test, give no probe.
FEWEST = 4


@dataclass(frozen=True)
class ProbePair:
    """Two probes of one finding.

    Attributes:
        weak: AUROC of the probe trained on weak labels; chance is one half.
        given: AUROC of the probe trained on given labels, of all training rows that have one.
        difference: ``weak`` less ``given``, on the same test rows, resampling patients.
        p_value: Of "no difference".
        trained_weak: Training rows with a weak label.
        trained_given: Training rows with a given label.
    """

    weak: Interval
    given: Interval
    difference: Interval
    p_value: float
    trained_weak: int
    trained_given: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "weak": self.weak.to_dict(),
            "given": self.given.to_dict(),
            "difference": self.difference.to_dict(),
            "p_value": self.p_value if np.isfinite(self.p_value) else None,
            "trained_weak": self.trained_weak,
            "trained_given": self.trained_given,
        }


@dataclass(frozen=True)
class WeakProbeScores:
    """Probes of several findings.

    Attributes:
        findings: Finding -> pair.
        left_out: Finding -> why it has no pair.
    """

    findings: Mapping[str, ProbePair]
    left_out: Mapping[str, str]

    def table(self) -> list[tuple[str, ...]]:
        """Return rows of text for print: finding, test rows, both AUROCs, their difference."""
        return [
            (name, str(pair.weak.n), str(pair.weak), str(pair.given), str(pair.difference))
            for name, pair in self.findings.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"findings": {n: p.to_dict() for n, p in self.findings.items()}, "left_out": dict(self.left_out)}


def compare_probes(
    images: Embeddings,
    weak: Mapping[str, NDArray[np.float64]],
    given: Mapping[str, NDArray[np.float64]],
    *,
    test: NDArray[np.bool_] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> WeakProbeScores:
    """Train both probes of every finding that has weak and given labels.

    Args:
        images: One row an image; its patients keep training and test apart.
        weak: Finding -> 0, 1 or NaN (not used) an image, from :meth:`WeakLabels.resolve`.
        given: Finding -> the same, taken for the truth.
        test: Rows of test patients; None: three tenths of the patients, drawn.
        n_resamples: Bootstrap samples per interval.
        seed: Of the draw, of the patients on which C is chosen, and of the bootstrap.

    Raises:
        InputError: A column has the wrong length, or no finding can be trained.
        LeakageError: A patient is in training and in test rows.
    """
    groups = np.array([str(g) for g in images.groups], dtype=object)
    rows = draw_test(images.groups, seed) if test is None else np.asarray(test, dtype=bool)
    if len(rows) == len(groups):
        refuse_shared_patients({"training": groups[~rows].tolist(), "test": groups[rows].tolist()})
    found: dict[str, ProbePair] = {}
    left_out: dict[str, str] = {}
    for name in (n for n in weak if n in given):
        a, b = weak[name], given[name]
        if len(a) != len(images) or len(b) != len(images) or len(rows) != len(images):
            raise InputError(f"finding `{name}` has {len(a)} and {len(b)} labels for {len(images)} images")
        parts = {
            "weak": np.flatnonzero(~rows & ~np.isnan(a)),
            "given": np.flatnonzero(~rows & ~np.isnan(b)),
            "test": np.flatnonzero(rows & ~np.isnan(b)),
        }
        labels = {"weak": a, "given": b, "test": b}
        few = [part for part, index in parts.items() if _fewest(labels[part][index], groups[index]) < FEWEST]
        if few:
            left_out[name] = f"fewer than {FEWEST} patients of a class among the {few[0]} rows"
            continue
        found[name] = _pair(images, parts, labels, groups, n_resamples=n_resamples, seed=seed)
    if not found:
        raise InputError(
            "no finding has enough patients with weak and with given labels", hint="; ".join(f"{n}: {w}" for n, w in left_out.items()) or "name --truth"
        )  # fmt: skip
    return WeakProbeScores(found, left_out)


def draw_test(groups: Sequence[str], seed: int, share: float = 0.3) -> NDArray[np.bool_]:
    """Return which rows belong to a drawn share of the patients."""
    names = np.unique(np.array([str(g) for g in groups]))
    chosen = np.random.default_rng(seed).permutation(len(names))[: max(1, round(share * len(names)))]
    picked = set(names[chosen].tolist())
    return np.array([str(g) in picked for g in groups], dtype=bool)


def _pair(
    images: Embeddings,
    parts: Mapping[str, NDArray[np.intp]],
    labels: Mapping[str, NDArray[np.float64]],
    groups: NDArray[Any],
    *,
    n_resamples: int,
    seed: int,
) -> ProbePair:
    test = parts["test"]
    truth, patients = labels["test"][test], list(groups[test])
    statistics = {}
    for part in ("weak", "given"):
        index = parts[part]
        probe = LinearProbe(seed=seed).fit(images.select(index), labels[part][index].astype(int), list(groups[index]))
        statistics[part] = auroc_statistic(truth, probe.logits(images.select(test))[:, 1])
    options = {"n_resamples": n_resamples, "seed": seed}
    compared = paired_difference(statistics["weak"], statistics["given"], patients, **options)  # type: ignore[arg-type]
    weak, given = (
        weighted_interval(statistics[part], patients, chance=0.5, **options)  # type: ignore[arg-type]
        for part in ("weak", "given")
    )
    return ProbePair(weak, given, compared.difference, compared.p_value, len(parts["weak"]), len(parts["given"]))


def _fewest(labels: NDArray[np.float64], groups: NDArray[Any]) -> int:
    """Return the patients of the rarer class."""
    return min(len(set(groups[labels == value].tolist())) for value in (0, 1))
