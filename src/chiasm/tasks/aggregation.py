"""How published protocols turn prompts into one score a class: pure functions on arrays, without a model.

In: unit vectors, or similarities of images with prompts. Out: directions, scores, probabilities.

=====================  ============================================================  ====================
function               what it does                                                  published by
=====================  ============================================================  ====================
``mean_direction``     mean of unit (or of raw) text vectors, then unit norm         CLIP; BioViL, MI-Zero
``pair_probability``   softmax over two cosines without a logit scale                CheXzero
``pool_prompts``       best, or mean, similarity among the prompts of a class        MedCLIP, GLoRIA
``standardise``        z-score of every class over the images of a batch             GLoRIA
``top_mean``           mean of the best j tiles of a slide, class by class           MI-Zero, CONCH
=====================  ============================================================  ====================
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName

Pooling = Literal["max", "mean"]


def mean_direction(vectors: NDArray[Any], *, unit_first: bool = True, what: str = "prompts") -> NDArray[np.float64]:
    """Return the unit vector (dim,) of the mean of an ensemble (prompts, dim).

    Args:
        vectors: At least one; raw ones where ``unit_first`` is False.
        unit_first: Give every vector unit norm before the mean (OpenAI CLIP). BioViL and MI-Zero average raw vectors,
            so that longer ones weigh more.
        what: Named in the error.

    Raises:
        InputError: A vector is zero or not finite, or the vectors cancel out.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms < 1e-12).any():
        raise InputError(f"the embeddings of the {what} are zero or not finite")
    mean = (rows / norms if unit_first else rows).mean(axis=0)
    norm = float(np.linalg.norm(mean))
    if norm < 1e-6 * (1.0 if unit_first else float(norms.max())):
        raise InputError(f"the {what} cancel each other out")
    direction: NDArray[np.float64] = mean / norm
    return direction


def split_members(vectors: NDArray[Any], members: int) -> NDArray[np.float64]:
    """Return the unit vectors of every member of an ensemble: (members, rows, dim of a member).

    An ensemble's vectors are its members' unit vectors side by side, divided by the square root of their number, so
    that its cosines are the mean of theirs.

    Raises:
        InputError: When the dimensions cannot be shared out.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    if members < 1 or rows.shape[1] % members:
        raise InputError(f"vectors of {rows.shape[1]} dimensions cannot come from {members} models")
    parts = rows.reshape(len(rows), members, -1).transpose(1, 0, 2)
    norms = np.linalg.norm(parts, axis=2, keepdims=True)
    if (norms < 1e-12).any():
        raise InputError("a member of the ensemble gave a zero vector, which has no direction")
    unit: NDArray[np.float64] = parts / norms
    return unit


def pair_probability(positive: NDArray[Any], negative: NDArray[Any]) -> NDArray[np.float64]:
    """Return exp(p) / (exp(p) + exp(n)) of cosines, without a logit scale, in [0.119, 0.881].

    References:
        CheXzero, ``zero_shot.py``. No scale means that probabilities hug one half; their order is what counts.
    """
    difference = np.asarray(positive, np.float64) - np.asarray(negative, np.float64)
    probability: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-difference))
    return probability


def pool_prompts(similarities: NDArray[Any], how: Pooling) -> NDArray[np.float64]:
    """Return one score an image (images,) from its similarities (images, prompts) with the prompts of one class."""
    values = np.asarray(similarities, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise InputError(f"similarities must have shape (images, prompts), got {values.shape}")
    if how not in ("max", "mean"):
        raise UnknownName("pooling of prompts", how, ("max", "mean"))
    pooled: NDArray[np.float64] = values.max(axis=1) if how == "max" else values.mean(axis=1)
    return pooled


def standardise(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Return scores (images, classes) with mean 0 and deviation 1 in every class, over the images at hand.

    A single image is returned as it is. The deviation is that of the population.

    References:
        GLoRIA, ``utils.normalize``. So a score depends on the other images of the batch: it is reproduced for
        published figures only. Deviation: a class in which all images score alike gets 0 where GLoRIA gives NaN.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) <= 1:
        return values.copy()
    centred = values - values.mean(axis=0)
    deviation = values.std(axis=0)
    flat = deviation <= 1e-12 * np.maximum(np.abs(values).max(axis=0), 1.0)
    z: NDArray[np.float64] = np.where(flat, 0.0, centred / np.where(flat, 1.0, deviation))
    return z


def top_mean(similarities: NDArray[Any], j: int) -> NDArray[np.float64]:
    """Return, class by class, the mean of the j highest similarities (tiles, classes) of one slide: (classes,).

    A slide with fewer than j tiles uses them all.

    References:
        MI-Zero (Lu et al. 2023) and CONCH (Lu et al. 2024), top-j pooling. Their notebooks choose j on the test labels:
        report every j, or choose it on a validation set.
    """
    values = np.asarray(similarities, dtype=np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise InputError(f"similarities must have shape (tiles, classes) with a tile at least, got {values.shape}")
    if j < 1:
        raise InputError(f"j must be at least 1, got {j}")
    kept = min(j, len(values))
    best: NDArray[np.float64] = np.sort(values, axis=0)[-kept:].mean(axis=0)
    return best
