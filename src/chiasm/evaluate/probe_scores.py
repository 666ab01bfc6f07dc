"""How often the true sentence wins over its contradiction for the right image, and what a reader of texts alone gets.

A model may win such a contest without looking: by always preferring the sentence without "no", or the one that says
"left". So three things stand beside the share of wins: chance (one half), the share that a fixed preference gets, and the
share that the model gets for the mean of all images, which shows nothing (its own preference). What the image adds is
the difference to that, on the same probes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Comparison, paired_difference, weighted_interval
from chiasm.metrics.weighted import mean_statistic
from chiasm.tasks.contradictions import KINDS, Probe
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings, Interval, check_same_space


@dataclass(frozen=True)
class ProbeGroup:
    """The probes of negation, or of laterality.

    Attributes:
        wins: Share in which the true sentence is nearer to the image; ties count one half; chance is one half.
        kinds: Kind to its share of wins.
        always: Share of wins of the better of two fixed preferences (always without "no", always with; always left,
            always right).
        blind: Share of wins for the mean of all images in place of the image.
        gain: ``wins`` less ``blind``, on the same probes, resampling patients.
        corrected: Share of wins after the mean image's preference is subtracted: what the image itself says.
    """

    wins: Interval
    kinds: Mapping[str, Interval]
    always: float
    blind: Interval
    gain: Comparison
    corrected: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        p = self.gain.p_value
        return {
            "wins": self.wins.to_dict(),
            "kinds": {name: value.to_dict() for name, value in self.kinds.items()},
            "always": self.always,
            "blind": self.blind.to_dict(),
            "gain": {**self.gain.difference.to_dict(), "p_value": p if np.isfinite(p) else None},
            "corrected": self.corrected.to_dict(),
        }


@dataclass(frozen=True)
class ProbeScores:
    """Negation and laterality.

    Attributes:
        groups: ``negation``, ``laterality`` -> scores; one without probes is absent.
        images: Images that have a probe.
        probes: Number of probes.
    """

    groups: Mapping[str, ProbeGroup]
    images: int
    probes: int

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Return rows of text for print: probe, wins with interval, n, without an image, always one way."""
        rows = []
        for name, found in self.groups.items():
            blind, always = f"{found.blind.value:.3f}", f"{found.always:.3f}"
            rows.append((name, str(found.wins), str(found.wins.n), blind, always))
            rows += [(f"  {kind}", str(value), str(value.n), "", "") for kind, value in found.kinds.items()]
            rows.append((f"  {name} corrected", str(found.corrected), str(found.corrected.n), "", ""))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **{name: found.to_dict() for name, found in self.groups.items()},
            "images": self.images,
            "probes": self.probes,
        }


def score_probes(
    images: Embeddings,
    probes: Sequence[Probe],
    embed: Callable[[Sequence[str]], Embeddings],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> ProbeScores:
    """Score minimal pairs.

    Args:
        images: A probe's ``row`` counts these.
        probes: Of :func:`chiasm.tasks.contradictions.make_probes` on the texts of the images.
        embed: Sentences -> embeddings, in their order; each different sentence is asked for once.
        n_resamples: Bootstrap samples per interval.
        seed: Of the bootstrap.

    Raises:
        SpaceMismatch: Images and sentences lie in two spaces.
        InputError: There is no probe, or one names a row that is absent.
    """
    if not probes:
        raise InputError(
            "no sentence could be turned into its contradiction",
            hint="texts need sentences such as “No effusion.” or “Nodule on the left.”; --probe-rules says which",
        )
    if max(p.row for p in probes) >= len(images):
        raise InputError(f"a probe names row {max(p.row for p in probes)} of {len(images)} images")
    sentences = list(dict.fromkeys(s for p in probes for s in (p.true, p.false)))
    embedded = embed(sentences)
    check_same_space(images, embedded)
    place = {s: k for k, s in enumerate(sentences)}
    vectors, texts = unit_vectors(images, "image"), unit_vectors(embedded, "sentence")
    rows = np.array([p.row for p in probes])
    step = texts[[place[p.true] for p in probes]].astype(np.float64) - texts[[place[p.false] for p in probes]]
    used = np.unique(rows)
    lead = np.einsum("nd,nd->n", vectors[rows].astype(np.float64), step)
    bias: NDArray[np.float64] = step @ vectors[used].mean(0).astype(np.float64)
    groups = np.array([images.groups[r] for r in rows], dtype=object)
    kinds = np.array([p.kind for p in probes], dtype=object)
    options = {"n_resamples": n_resamples, "seed": seed}
    found = {}
    for name, pair in KINDS.items():
        chosen = np.isin(kinds, pair)
        if chosen.any():
            found[name] = _group(lead[chosen], bias[chosen], kinds[chosen], groups[chosen], pair, options)
    return ProbeScores(found, len(used), len(probes))


def _group(
    lead: NDArray[np.float64],
    bias: NDArray[np.float64],
    kinds: NDArray[Any],
    groups: NDArray[Any],
    pair: tuple[str, str],
    options: Mapping[str, Any],
) -> ProbeGroup:
    wins, blind, corrected = (np.where(v == 0, 0.5, v > 0) for v in (lead, bias, lead - bias))

    def interval(values: NDArray[Any], rows: NDArray[Any] | slice = slice(None)) -> Interval:
        return weighted_interval(mean_statistic(values[rows]), list(groups[rows]), chance=0.5, **options)

    first = float((kinds == pair[0]).mean())
    return ProbeGroup(
        interval(wins),
        {kind: interval(wins, np.flatnonzero(kinds == kind)) for kind in pair if (kinds == kind).any()},
        max(first, 1 - first),
        interval(blind),
        paired_difference(mean_statistic(wins), mean_statistic(blind), list(groups), **options),
        interval(corrected),
    )
