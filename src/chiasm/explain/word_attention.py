"""GLoRIA's map: where each word of a text looks in an image.

In: an encoder whose towers keep regions and words (``image_locals``, ``word_features``), images and texts. Out: one
:class:`~chiasm.explain.heatmap.HeatMap` a word, or one a text (of the word that decides).

Notable: with a single word the softmax over words gives 1 everywhere and the map is flat. That is what the equation
says: the map tells which word a region is about *rather than another word of the same text*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import InputError
from chiasm.explain.heatmap import HeatMap, model_view
from chiasm.explain.towers import image_batch, quiet, scores, text_direction, trunk_of
from chiasm.losses.local import ATTENTION_SCALE, word_attention

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder

METHOD = "gloria"


def word_maps(
    encoder: Encoder, image: Image, text: str, *, attention_scale: float = ATTENTION_SCALE
) -> tuple[HeatMap, ...]:
    """Return where each word of a text looks in an image, in the order of the words.

    Args:
        encoder: One whose towers keep regions and words (GLoRIA's).
        image: Of any size and mode.
        text: A sentence; words are what lies between spaces and signs for the encoder's tokenizer.
        attention_scale: 4 as published.

    Raises:
        InputError: The encoder keeps no regions or words, or the text has no word.

    References:
        Huang et al. 2021, equation 3; marshuang80/gloria, ``gloria/loss/gloria_loss.py`` ``attention_fn`` and
        ``plot_attn_maps``, which draws these values.
    """
    visual, tower = _local_towers(encoder)
    with quiet(encoder.model), torch.inference_mode():
        pixels = image_batch(encoder, [image])
        regions, words = _features(encoder, visual, tower, pixels, text)
        found = word_attention(regions.flatten(2), words, scale=attention_scale)[0].view(-1, *regions.shape[2:])
        cosine = float(scores(encoder.model.image_side()(pixels), text_direction(encoder, text)[None])[0])
    names = _word_names(encoder, text)
    return tuple(
        HeatMap(
            found[k].float().cpu().numpy(),
            image.size,
            model_view(encoder.preprocess_spec, image.size),
            METHOD,
            names[k] if k < len(names) else f"word {k + 1}",
            (),
            cosine,
            encoder.name,
        )
        for k in range(len(found))
    )


def deciding_word_maps(encoder: Encoder, pixels: Tensor, texts: Sequence[str]) -> Tensor:
    """Return where the deciding word of a text looks, for texts that share their images: (batch, rows, columns).

    GLoRIA classifies by the word that is nearest to its context (the maximum over words of the cosine of equation 5);
    this is the attention of that word. The mean over all words says nothing: the words share out every region, so it
    is all but flat. Several texts are an ensemble: the mean of their maps.

    Args:
        encoder: One whose towers keep regions and words.
        pixels: Preprocessed, (batch, 3, size, size).
        texts: At least one.

    Raises:
        InputError: As :func:`word_maps`.
    """
    visual, tower = _local_towers(encoder)
    with torch.inference_mode():
        maps = []
        for text in texts:
            regions, words = _features(encoder, visual, tower, pixels, text)
            attention = word_attention(regions.flatten(2), words)
            seen = attention @ regions.flatten(2).transpose(1, 2)
            best = F.cosine_similarity(seen, words[None], dim=2).argmax(1)
            chosen = attention[torch.arange(len(attention), device=best.device), best]
            maps.append(chosen.view(-1, *regions.shape[2:]))
        return torch.stack(maps).mean(0)


def has_word_attention(encoder: Encoder) -> bool:
    """Return whether an encoder's towers keep what the map needs."""
    model: Any = encoder.model
    text = getattr(model, "text", None)
    text = getattr(text, "transformer", text)
    visual = getattr(model, "visual", None)
    return visual is not None and hasattr(trunk_of(visual), "image_locals") and hasattr(text, "word_features")


def _local_towers(encoder: Encoder) -> tuple[nn.Module, nn.Module]:
    if not has_word_attention(encoder):
        raise InputError(
            f"`{encoder.name}` does not keep image regions and words, which method `gloria` compares",
            hint="GLoRIA's towers do; `auto` takes a method that fits the model",
        )
    model: Any = encoder.model
    text = getattr(model.text, "transformer", model.text)
    text.read_vocabulary(encoder.tokenizer)
    return trunk_of(model.visual), text


def _features(encoder: Encoder, visual: Any, tower: Any, pixels: Tensor, text: str) -> tuple[Tensor, Tensor]:
    """Return the regions (batch, dim, rows, columns) and the words (words, dim) of one text."""
    if not text.strip():
        raise InputError("a heat map needs a text, got an empty one")
    tokens = encoder.tokenizer.encode([text])
    words, counts = tower.word_features(tokens.ids.to(encoder.device), tokens.mask.to(encoder.device))
    count = int(counts[0])
    if count < 1:
        raise InputError("the text has no word left: GLoRIA drops sentences of one word", hint="give a longer text")
    return visual.image_locals(pixels).float(), words[0, 1 : 1 + count].float()


def _word_names(encoder: Encoder, text: str) -> list[str]:
    """Return the words as the tokenizer's pieces spell them; empty when it has no vocabulary of pieces."""
    content = encoder.tokenizer.to_dict().get("tokenizer", {}).get("model", {})
    vocabulary, mark = content.get("vocab", {}), content.get("continuing_subword_prefix") or "##"
    if not isinstance(vocabulary, dict):
        return []
    spelled = {number: piece for piece, number in vocabulary.items()}
    tokens = encoder.tokenizer.encode([text])
    length = int(tokens.mask[0].sum())
    names: list[str] = []
    for number in tokens.ids[0, 1 : length - 1].tolist():
        piece = spelled.get(number, "?")
        if piece.startswith(mark) and piece != mark and names:
            names[-1] += piece[len(mark) :]
        else:
            names.append(piece)
    return names
