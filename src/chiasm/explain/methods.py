"""One entry for all heat maps: encoder, image and text in, :class:`~chiasm.explain.heatmap.HeatMap` out.

======================  =====================================  =======================================================
method                  towers                                 source
======================  =====================================  =======================================================
``attention``           CLIP's ViT                             Chefer, Gur and Wolf 2021
``layer_cam``           CLIP's ResNet                          Jiang et al. 2021
``grad_cam``            CLIP's ResNet                          Selvaraju et al. 2017
``similarity``          all that give patch vectors            Zhou et al. 2022 (MaskCLIP)
``biovil``              the same; made for BioViL              Boecking et al. 2022: ``similarity``, blurred
``occlusion``           all                                    Zeiler and Fergus 2014
``combined``            CLIP's ViT and ResNet                  their own map and ``occlusion``, standardised and added
``gloria``              those that keep regions and words      Huang et al. 2021: the deciding word
======================  =====================================  =======================================================

``auto`` is ``attention`` for CLIP's ViT, ``layer_cam`` for its ResNet, ``occlusion`` for all others. ``similarity`` is fast
and serves any number of texts in one pass, but after pooling a patch's vector need not speak of what lies there, so it is
never the automatic choice. ``combined`` points best at the findings of phantoms, and costs as much as ``occlusion``.

A map shows what the model's score hangs on. It is no finding, and no proof that the model looked at the right thing:
``explain.fidelity`` tests a method, ``evaluate.scores.score_pointing`` scores maps against true boxes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from chiasm.encoders.resnet import ModifiedResNet
from chiasm.encoders.vit import VisionTransformer
from chiasm.errors import ChiasmError, InputError, UnknownName
from chiasm.explain.combined import can_combine, combined_maps
from chiasm.explain.gradients import attention_relevance, grad_cam, layer_cam
from chiasm.explain.heatmap import HeatMap, model_view
from chiasm.explain.occlusion import occlusion_maps
from chiasm.explain.similarity import biovil_maps, patch_text_maps
from chiasm.explain.towers import image_batch, natural_method, quiet, scores, text_direction, trunk_of
from chiasm.explain.word_attention import METHOD as GLORIA
from chiasm.explain.word_attention import deciding_word_maps, has_word_attention
from chiasm.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder

MethodName = Literal[
    "auto", "attention", "layer_cam", "grad_cam", "similarity", "biovil", "occlusion", "combined", "gloria"
]
MapFunction = Callable[[nn.Module, Tensor, Tensor], Tensor]

METHODS: dict[str, MapFunction] = {
    "attention": attention_relevance,
    "layer_cam": layer_cam,
    "grad_cam": grad_cam,
    "similarity": patch_text_maps,
    "biovil": biovil_maps,
    "occlusion": occlusion_maps,
    "combined": combined_maps,
}

#: Words that name nothing that could be seen; ``explain_words`` leaves them out.
STOP_WORDS = frozenset(
    {
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "to",
        "and",
        "or",
        "with",
        "without",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "there",
        "this",
        "that",
        "it",
        "its",
        "as",
        "by",
        "for",
        "from",
        "no",
        "not",
        "than",
        "then",
        "which",
        "showing",
        "shows",
        "show",
        "seen",
        "image",
        "picture",
    }
)


def choose_method(encoder: Encoder, method: MethodName = "auto") -> str:
    """Return the method to use; ``auto`` picks by the kind of image tower.

    Raises:
        UnknownName: When there is no such method.
    """
    if method == "auto":
        return natural_method(encoder.model.image_side())
    if method not in METHODS and method != GLORIA:
        known = (*METHODS, GLORIA)
        raise UnknownName("method", method, known, hint=f"methods: auto, {', '.join(known)}")
    return method


def methods_for(encoder: Encoder) -> tuple[str, ...]:
    """Return the methods that an encoder's towers can serve, the automatic one first."""
    visual = encoder.model.image_side()
    trunk = trunk_of(visual)
    serves = {
        "attention": isinstance(trunk, VisionTransformer),
        "layer_cam": isinstance(trunk, ModifiedResNet),
        "grad_cam": isinstance(trunk, ModifiedResNet),
        "similarity": _has_patches(encoder),
        "biovil": _has_patches(encoder),
        "occlusion": True,
        "combined": can_combine(visual),
        GLORIA: has_word_attention(encoder),
    }
    found = [name for name, can in serves.items() if can]
    first = natural_method(visual)
    return (first, *(name for name in found if name != first))


def _has_patches(encoder: Encoder) -> bool:
    size = encoder.preprocess_spec.size
    try:
        encoder.patch_features(torch.zeros(1, 3, size, size))
    except ChiasmError:
        return False
    return True


def explain(
    encoder: Encoder,
    image: Image,
    text: str | Sequence[str],
    *,
    method: MethodName = "auto",
    against: Sequence[str] = (),
) -> HeatMap:
    """Return where an image supports a text.

    Args:
        encoder: Any encoder.
        image: Of any size and mode; the map lies on this image, not on its crop.
        text: What to look for; several texts are an ensemble.
        method: See the module's table.
        against: Texts that say the opposite ("no pneumothorax"); what both sides share then drops out of the map.

    Raises:
        InputError: When the text is empty, or the tower cannot serve the method.
        UnknownName: When there is no such method.
    """
    return explain_batch(encoder, [image], [text], method=method, against=[against])[0]


def explain_batch(
    encoder: Encoder,
    images: Sequence[Image],
    texts: Sequence[str | Sequence[str]],
    *,
    method: MethodName = "auto",
    against: Sequence[Sequence[str]] | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> tuple[HeatMap, ...]:
    """Return one map per image, each for its own text; texts that repeat are embedded once.

    Args:
        encoder: Any encoder.
        images: One per map.
        texts: One (or one ensemble) per image.
        method: See the module's table.
        against: One list per image, or None.
        batch_size: Images per pass.
        progress: Told after every batch.
    """
    if len(texts) != len(images):
        raise InputError(f"{len(images)} images came with {len(texts)} texts")
    if against is not None and len(against) != len(images):
        raise InputError(f"{len(images)} images came with {len(against)} lists of texts to set against")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    keys = [
        ((text,) if isinstance(text, str) else tuple(text), tuple(against[k]) if against is not None else ())
        for k, text in enumerate(texts)
    ]
    name = choose_method(encoder, method)
    progress = progress or SilentProgress()
    with quiet(encoder.model):
        directions = {key: text_direction(encoder, *key) for key in dict.fromkeys(keys)}
        maps: list[HeatMap] = []
        progress.start(len(images), "explaining")
        try:
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size]
                wanted = keys[start : start + batch_size]
                stacked = torch.stack([directions[key] for key in wanted])
                maps.extend(_maps(encoder, part, wanted, stacked, name))
                progress.advance(len(part))
        finally:
            progress.finish()
    return tuple(maps)


def _maps(
    encoder: Encoder,
    images: Sequence[Image],
    keys: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
    directions: Tensor,
    method: str,
) -> list[HeatMap]:
    visual = encoder.model.image_side()
    pixels = image_batch(encoder, images)
    values = _gloria(encoder, pixels, keys) if method == GLORIA else METHODS[method](visual, pixels, directions)
    with torch.inference_mode():
        whole = scores(visual(pixels), directions)
    return [
        HeatMap(
            values[k].float().cpu().numpy(),
            image.size,
            model_view(encoder.preprocess_spec, image.size),
            method,
            " / ".join(keys[k][0]),
            keys[k][1],
            float(whole[k]),
            encoder.name,
        )
        for k, image in enumerate(images)
    ]


def _gloria(encoder: Encoder, pixels: Tensor, keys: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> Tensor:
    if any(against for _, against in keys):
        raise InputError("method `gloria` compares words, and cannot set texts against it", hint="leave `against` out")
    return torch.cat([deciding_word_maps(encoder, pixels[k : k + 1], texts) for k, (texts, _) in enumerate(keys)])


def words_of(text: str) -> list[str]:
    """Return the words of a text that could name something visible, each once, in order."""
    words = re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text)
    kept = [word for word in words if word.lower() not in STOP_WORDS]
    return list(dict.fromkeys(kept))


def explain_words(
    encoder: Encoder,
    image: Image,
    text: str,
    *,
    method: MethodName = "auto",
    how: Literal["alone", "left out"] = "alone",
) -> tuple[HeatMap, ...]:
    """Return one map for every word of a text that could name something visible.

    Args:
        encoder: Any encoder.
        image: Of any size and mode.
        text: A report, a caption, a prompt.
        method: See the module's table.
        how: ``alone`` looks for the word by itself. ``left out`` looks for what the whole text has and the text without
            the word has not, which says more of words that mean little alone ("left"); a text of one word is looked for
            alone.

    Raises:
        InputError: When no word of the text could name something visible.
    """
    words = words_of(text)
    if not words:
        raise InputError("the text holds no word to look for")
    if how not in ("alone", "left out"):
        raise UnknownName("value of how", how, ("alone", "left out"))
    texts: list[str] = list(words)
    against: list[tuple[str, ...]] = [()] * len(words)
    if how == "left out" and len(words) > 1:
        texts = [text] * len(words)
        against = [(_without(text, word),) for word in words]
    maps = explain_batch(encoder, [image] * len(words), texts, method=method, against=against)
    return tuple(dataclasses.replace(found, text=word) for found, word in zip(maps, words, strict=True))


def _without(text: str, word: str) -> str:
    return " ".join(re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", " ", text).split())
