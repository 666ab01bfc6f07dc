"""CLIPScore: does an image agree with its text? Of a table of pairs, with intervals and the control that gives it meaning.

Comes in: embeddings of images and of texts with the same ids, perhaps of reference texts. Goes out: a score of every pair,
their mean with its interval over patients, and the same for texts that were exchanged between patients. The number itself
depends on the encoder and has no absolute scale: only its difference from exchanged texts, and from other sets under the
same encoder, can be read.

References:
    Hessel et al. 2021, "CLIPScore", section 3, https://arxiv.org/abs/2104.08718: 2.5 · max(cos, 0), and RefCLIPScore,
    the harmonic mean with the nearest reference text. Deviation: texts are taken as they are; the paper puts "A photo
    depicts" before each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import Comparison, paired_difference, weighted_interval
from chiasm.metrics.weighted import mean_statistic
from chiasm.types import Embeddings, Interval, check_same_space

#: The paper's factor, which spreads the cosines of CLIP ViT-B/32 over about 0 to 1.
WEIGHT = 2.5
#: Exchanges of texts that the control averages.
EXCHANGES = 20
#: Times that a text of the own patient is drawn again, before texts of others are looked for one by one.
REDRAWS = 40

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ClipScores:
    """The agreement of images with their texts.

    Attributes:
        ids: Of the pairs that were scored.
        scores: CLIPScore of each, float64, 0 to 2.5.
        mean: Their mean with its interval over patients; ``chance`` is the mean with exchanged texts.
        exchanged: Mean of each image's score with texts of other patients.
        gain: The mean of the scores less that of the exchanged ones, in pairs.
        wins: How often the own text scores above a text of another patient; chance 0.5, ties count half.
        n_missing: Rows that only one side has.
        reference: RefCLIPScore of each pair, or None without reference texts.
        reference_mean: Its mean.
    """

    ids: tuple[str, ...]
    scores: Floats
    mean: Interval
    exchanged: Interval
    gain: Comparison
    wins: Interval
    n_missing: int
    reference: Floats | None = None
    reference_mean: Interval | None = None

    def table(self) -> list[tuple[str, str, str, str]]:
        """Return rows of text: measure, value with interval, n, chance."""
        rows = {"CLIPScore": self.mean, "with texts of other patients": self.exchanged, "own text wins": self.wins}
        rows["difference"] = self.gain.difference
        if self.reference_mean is not None:
            rows["RefCLIPScore"] = self.reference_mean
        return [(name, str(v), str(v.n), "-" if v.chance is None else f"{v.chance:.3f}") for name, v in rows.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; scores without ids, in the order of the rows."""
        p = self.gain.p_value
        return {
            "clip_score": self.mean.to_dict(),
            "exchanged": self.exchanged.to_dict(),
            "gain": {"difference": self.gain.difference.to_dict(), "p_value": None if np.isnan(p) else float(p)},
            "wins": self.wins.to_dict(),
            "ref_clip_score": None if self.reference_mean is None else self.reference_mean.to_dict(),
            "n_missing": self.n_missing,
            "scores": self.scores.tolist(),
        }


def clip_score(cosines: ArrayLike) -> Floats:
    """Return 2.5 · max(cosine, 0) of each cosine."""
    return WEIGHT * np.maximum(np.asarray(cosines, dtype=np.float64), 0.0)


def ref_clip_score(cosines: ArrayLike, reference_cosines: ArrayLike) -> Floats:
    """Return the harmonic mean of CLIPScore and of the text's cosine with its nearest reference, 0 where one is 0.

    Args:
        cosines: Of image and text, (n,).
        reference_cosines: Of the text with its nearest reference text, (n,); negative ones count as 0.
    """
    image = clip_score(cosines)
    text = np.maximum(np.asarray(reference_cosines, dtype=np.float64), 0.0)
    total = image + text
    return np.divide(2 * image * text, total, out=np.zeros_like(total), where=total > 0)


def score_agreement(
    images: Embeddings,
    texts: Embeddings,
    *,
    references: Embeddings | None = None,
    reference_ids: Sequence[str] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> ClipScores:
    """Return how well images agree with their texts; rows are paired by id.

    Args:
        images: One row an image.
        texts: One row a text, with the image's id.
        references: Embedded reference texts, any number a pair.
        reference_ids: The pair that each reference belongs to; by default the references' ids.
        n_resamples: Of every interval.
        seed: Of intervals and exchanges.

    Raises:
        InputError: Fewer than two groups of pairs, or a pair without a reference.
        SpaceMismatch: Vectors of different encoders.
    """
    check_same_space(images, texts, *(() if references is None else (references,)))
    rows = {name: k for k, name in enumerate(texts.ids)}
    kept = [(i, rows[name]) for i, name in enumerate(images.ids) if name in rows]
    groups = [images.groups[i] for i, _ in kept]
    if len(set(groups)) < 2:
        raise InputError(
            f"{len(kept)} images have a text, of {len(set(groups))} patients; at least two patients are needed",
            hint="images and texts are paired by their ids",
        )
    image = images.normalize().vectors[[i for i, _ in kept]].astype(np.float64)
    text = texts.normalize().vectors[[j for _, j in kept]].astype(np.float64)
    own = (image * text).sum(1)
    scores = clip_score(own)
    other, wins = _exchange(image, text, own, groups, seed)
    reference = reference_mean = None
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    if references is not None:
        names = [images.ids[i] for i, _ in kept]
        reference = ref_clip_score(own, _nearest_reference(text, names, references, reference_ids))
        reference_mean = weighted_interval(mean_statistic(reference), groups, **options)
    return ClipScores(
        tuple(images.ids[i] for i, _ in kept),
        scores,
        weighted_interval(mean_statistic(scores), groups, chance=float(other.mean()), **options),
        weighted_interval(mean_statistic(other), groups, **options),
        paired_difference(mean_statistic(scores), mean_statistic(other), groups, **options),
        weighted_interval(mean_statistic(wins), groups, chance=0.5, **options),
        len(images) + len(texts) - 2 * len(kept),
        reference,
        reference_mean,
    )


def _exchange(image: Floats, text: Floats, own: Floats, groups: Sequence[str], seed: int) -> tuple[Floats, Floats]:
    """Return each image's mean score with texts of other patients, and how often its own text wins."""
    rng = np.random.default_rng(seed)
    codes = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)[1]
    total, won = np.zeros(len(own)), np.zeros(len(own))
    for _ in range(EXCHANGES):
        partner = rng.integers(0, len(own), len(own))
        for _ in range(REDRAWS):  # until nobody has a text of their own patient
            same = np.flatnonzero(codes[partner] == codes)
            if not len(same):
                break
            partner[same] = rng.integers(0, len(own), len(same))
        for row in np.flatnonzero(codes[partner] == codes):  # of a patient who has nearly all rows
            partner[row] = rng.choice(np.flatnonzero(codes != codes[row]))
        cosine = (image * text[partner]).sum(1)
        total += clip_score(cosine)
        won += np.where(np.isclose(own, cosine, rtol=0, atol=1e-9), 0.5, own > cosine)
    return total / EXCHANGES, won / EXCHANGES


def _nearest_reference(
    text: Floats, names: Sequence[str], references: Embeddings, reference_ids: Sequence[str] | None
) -> Floats:
    owners = references.ids if reference_ids is None else tuple(reference_ids)
    if len(owners) != len(references):
        raise InputError(f"{len(references)} references came with {len(owners)} ids")
    vectors = references.normalize().vectors.astype(np.float64)
    of: dict[str, list[int]] = {}
    for k, owner in enumerate(owners):
        of.setdefault(owner, []).append(k)
    missing = sum(name not in of for name in names)
    if missing:
        raise InputError(f"{missing} of {len(names)} pairs have no reference text")
    return np.array([float((vectors[of[name]] @ text[k]).max()) for k, name in enumerate(names)])
