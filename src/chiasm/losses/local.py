"""Regions of an image compared with the words of a text: GLoRIA's attention similarity and its local loss.

In: embeddings of regions (images, dim, rows, columns) and of words (texts, slots, dim), and how many words each text has.
Out: similarities (images, texts). Each word looks at the image: its context is the mean of the regions, weighted by how
much they are about this word rather than about another one; a text is as near to an image as its words to their contexts.

References: Huang et al. 2021, equations 3 to 6; marshuang80/gloria ``gloria/loss/gloria_loss.py`` and
``gloria/models/gloria_model.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import InputError

ATTENTION_SCALE = 4.0
WORD_SCALE = 5.0
LOSS_SCALE = 10.0
_EPSILON = 1e-8


def attention_similarity(
    regions: Tensor,
    words: Tensor,
    counts: Tensor | Sequence[int],
    *,
    first: int = 1,
    pool: Literal["max", "sum"] = "max",
    attention_scale: float = ATTENTION_SCALE,
    word_scale: float = WORD_SCALE,
) -> Tensor:
    """Return GLoRIA's local similarity of every image with every text.

    Args:
        regions: (images, dim, rows, columns), not normalised: attention is by raw dot products.
        words: (texts, slots, dim), as a text tower's ``word_features`` gives them.
        counts: (texts,) how many slots to take, at least 1 each. The words of a text, as ``word_features`` counts them;
            or what :func:`peer_word_counts` counts, which reproduces the published code.
        first: The first slot to take: 1 leaves ``[CLS]`` out, as GLoRIA does when it classifies; 0 as when it trains.
        pool: ``max`` takes the word nearest to its context, as GLoRIA does when it classifies; ``sum`` adds up, as when
            it trains.
        attention_scale: Multiplies the attention to regions (4).
        word_scale: Multiplies the cosines of words and contexts (5).

    Returns:
        (images, texts): the logarithm of the largest, or of the sum, of exp(``word_scale`` · cosine).

    Raises:
        InputError: Shapes that do not fit, or a text without words or with more of them than slots.
    """
    if regions.ndim != 4 or words.ndim != 3 or regions.shape[1] != words.shape[2] or len(counts) != len(words):
        raise InputError(
            f"regions {tuple(regions.shape)}, words {tuple(words.shape)} and {len(counts)} counts do not fit",
            hint="expected (images, dim, rows, columns), (texts, slots, dim) and one count a text",
        )
    numbers = [int(n) for n in counts]
    if numbers and (min(numbers) < 1 or max(numbers) + first > words.shape[1]):
        raise InputError(f"texts have {min(numbers)} to {max(numbers)} words; expected 1 to {words.shape[1] - first}")
    context = regions.flatten(2)
    found = [
        _text_similarity(context, words[i, first : first + n], pool, attention_scale, word_scale)
        for i, n in enumerate(numbers)
    ]
    return torch.stack(found, dim=1) if found else regions.new_zeros(len(regions), 0)


def _text_similarity(context: Tensor, words: Tensor, pool: str, attention_scale: float, word_scale: float) -> Tensor:
    """Similarities (images,) of regions (images, dim, places) with the words (words, dim) of one text."""
    attention = word_attention(context, words, scale=attention_scale)
    seen = attention @ context.transpose(1, 2)  # (images, words, dim)
    products = (seen * words).sum(2)
    cosines = products / (seen.norm(dim=2) * words.norm(dim=1)).clamp(min=_EPSILON)
    scaled = word_scale * cosines
    pooled: Tensor = scaled.amax(1) if pool == "max" else scaled.logsumexp(1)
    return pooled


def word_attention(context: Tensor, words: Tensor, *, scale: float = ATTENTION_SCALE) -> Tensor:
    """Return how much each word of a text looks at each region: (images, words, places); a word's places sum to 1.

    Args:
        context: Regions (images, dim, places), not normalised.
        words: Of one text (words, dim).
        scale: Multiplies the regions' shares before the softmax over places.

    References:
        Huang et al. 2021, equation 3, with the softmax over words before it that the published code has.
    """
    shares = (words @ context).softmax(dim=1)  # of each region, among the words
    return (scale * shares).softmax(dim=2)  # of each word, among the regions


def peer_word_counts(texts: Sequence[str], slots: int) -> Tensor:
    """Return what GLoRIA's published code takes for the number of words: the characters of each text, without ``[``.

    Slots of zeros behind the words then take part in the attention, and a cosine of 0 in the maximum. The published code
    fails where there are more characters than slots; here they are cut off, at ``slots`` less one for ``[CLS]``.

    Args:
        texts: As the user wrote them, before any cleaning.
        slots: Of the text tower (97).

    Raises:
        InputError: A text without characters.
    """
    counts = [min(sum(c != "[" for c in text), slots - 1) for text in texts]
    if min(counts, default=1) < 1:
        raise InputError(f"text {counts.index(0)} is empty")
    return torch.tensor(counts, dtype=torch.long)


def local_contrastive_loss(
    regions: Tensor, words: Tensor, counts: Tensor | Sequence[int], *, loss_scale: float = LOSS_SCALE
) -> Tensor:
    """Return GLoRIA's local loss: cross-entropy of the similarities of pairs, over images plus over texts.

    Args:
        regions: (pairs, dim, rows, columns).
        words: (pairs, slots, dim); the i-th text belongs to the i-th image.
        counts: (pairs,) words of each text; ``[CLS]`` takes part beside them.
        loss_scale: Multiplies the similarities (10).
    """
    with_start = [int(n) + 1 for n in counts]
    logits = loss_scale * attention_similarity(regions, words, with_start, first=0, pool="sum")
    target = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
