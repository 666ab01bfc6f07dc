"""What an embedding is, in numbers: the five steps of zero-shot classification for one image.

In: the raw embedding of one image and of a few texts. Out: a frozen :class:`Inspection` that holds every intermediate
number: vectors, norms before and after normalisation, cosines, logits, probabilities, the winner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from chiasm.errors import InputError
from chiasm.tasks.zero_shot import ScaleSource, choose_logit_scale, sigmoid, softmax, unit_vectors
from chiasm.types import Embeddings, Space, check_same_space

FIRST_NUMBERS = 8


@dataclass(frozen=True)
class VectorFacts:
    """One vector before and after normalisation.

    Attributes:
        name: What was embedded: an id, or the text itself.
        shape: Number of dimensions, as a shape.
        first: The first numbers as the model gave them.
        norm_before: L2 norm as the model gave it.
        first_after: The first numbers of the unit vector.
        norm_after: L2 norm of the unit vector.
    """

    name: str
    shape: tuple[int, ...]
    first: tuple[float, ...]
    norm_before: float
    first_after: tuple[float, ...]
    norm_after: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "first": list(self.first),
            "norm_before": self.norm_before,
            "first_after": list(self.first_after),
            "norm_after": self.norm_after,
        }


@dataclass(frozen=True)
class Inspection:
    """The five steps: embed the image, embed the texts, normalise, compare, turn into probabilities.

    Attributes:
        image: The image's vector.
        texts: The texts' vectors.
        cosines: Of the image with each text.
        logit_scale: Multiplier of the cosines.
        logit_scale_source: ``model``, ``argument``, or ``fallback`` when the model has none.
        logit_bias: Added after the scale, None when the model has none.
        logits: scale × cosine + bias.
        probabilities: Softmax over the texts.
        sigmoids: Independent probability of each text, for models with a logit bias; None otherwise.
        space: Where they were compared.
        already_normalized: The vectors came with unit norm, so the norms before are not the model's.
    """

    image: VectorFacts
    texts: tuple[VectorFacts, ...]
    cosines: tuple[float, ...]
    logit_scale: float
    logit_scale_source: ScaleSource
    logit_bias: float | None
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]
    sigmoids: tuple[float, ...] | None
    space: Space
    already_normalized: bool = False

    @property
    def winner(self) -> str:
        """The text with the highest logit (ties: the first)."""
        return self.texts[int(np.argmax(self.logits))].name

    def rows(self) -> tuple[tuple[str, float, float, float], ...]:
        """Return, per text, itself, its cosine, its logit and its probability."""
        names = [facts.name for facts in self.texts]
        return tuple(zip(names, self.cosines, self.logits, self.probabilities, strict=True))

    def steps(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Return the title of each step and a few lines with this image's own numbers."""
        count, dim = len(self.texts), self.image.shape[0]
        bias = "" if self.logit_bias is None else f", plus the bias {self.logit_bias:.3f}"
        where = {"model": "the model's own", "argument": "as asked for", "fallback": "the model has none, so 100"}
        best = int(np.argmax(self.logits))
        norms = [f"norm of `{t.name}`: {t.norm_before:.4f} → {t.norm_after:.4f}" for t in self.texts]
        sigmoid_line = (
            ()
            if self.sigmoids is None
            else (f"each text alone, by the sigmoid of its logit: {', '.join(f'{p:.4f}' for p in self.sigmoids)}",)
        )
        return (
            ("Embed the image", (
                f"the image tower turns the picture into {dim} numbers, shape {self.image.shape}",
                f"the first: {_numbers(self.image.first)}",
            )),
            (f"Embed {'the text' if count == 1 else f'{count} texts'}", (
                f"the text tower turns each into {dim} numbers",
                *(f"the first of `{t.name}`: {_numbers(t.first)}" for t in self.texts),
            )),
            ("Normalise", (
                "each vector is divided by its norm: now all have length 1 and only directions count",
                f"norm of the image: {self.image.norm_before:.4f} → {self.image.norm_after:.4f}",
                *norms,
                *(("the vectors came normalised, so the norms before are not the model's",)
                  if self.already_normalized else ()),
            )),
            ("Compare", (
                f"the cosine of the image with each text, times the logit scale {self.logit_scale:.4f} "
                f"({where[self.logit_scale_source]}){bias}, is its logit",
            )),
            ("Softmax", (
                f"the logits become probabilities that add up to 1 over {'it' if count == 1 else 'them'} only",
                f"`{self.winner}` gets {self.probabilities[best]:.4f}",
                *sigmoid_line,
            )),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        rows = []
        for k, facts in enumerate(self.texts):
            row = facts.to_dict() | {
                "cosine": self.cosines[k],
                "logit": self.logits[k],
                "probability": self.probabilities[k],
            }
            if self.sigmoids is not None:
                row["sigmoid"] = self.sigmoids[k]
            rows.append(row)
        return {
            "image": self.image.to_dict(),
            "texts": rows,
            "logit_scale": self.logit_scale,
            "logit_scale_source": self.logit_scale_source,
            "logit_bias": self.logit_bias,
            "winner": self.winner,
            "space": self.space.to_dict(),
            "already_normalized": self.already_normalized,
        }


def inspect(image: Embeddings, texts: Embeddings, *, logit_scale: float | None = None) -> Inspection:
    """Return every number between one image, a few texts and their probabilities.

    Args:
        image: One row; raw, so that its norm can be shown.
        texts: At least one row; raw, for the same reason.
        logit_scale: Multiplier of the cosines; by default the model's.

    Raises:
        SpaceMismatch: When image and texts come from two spaces.
        InputError: When there is not exactly one image, or no text, or vectors are damaged.
    """
    space = check_same_space(image, texts)
    if len(image) != 1:
        raise InputError(f"one image can be inspected at a time, got {len(image)}")
    if len(texts) == 0:
        raise InputError("no text was given to compare the image with")
    if image.modality != "image" or texts.modality != "text":
        raise InputError(f"expected an image and texts, got {image.modality} and {texts.modality} embeddings")
    image_unit, text_unit = unit_vectors(image, "image"), unit_vectors(texts, "text")
    scale, source = choose_logit_scale(image.logit_scale, texts.logit_scale, logit_scale)
    bias = texts.logit_bias if texts.logit_bias is not None else image.logit_bias
    cosines = (text_unit.astype(np.float64) @ image_unit[0].astype(np.float64)).clip(-1.0, 1.0)
    logits = scale * cosines + (bias or 0.0)
    names = texts.ids if texts.texts is None else [t or i for t, i in zip(texts.texts, texts.ids, strict=True)]
    return Inspection(
        _facts(image.ids[0], image.vectors[0], image_unit[0]),
        tuple(_facts(names[k], texts.vectors[k], text_unit[k]) for k in range(len(texts))),
        tuple(cosines.tolist()),
        scale,
        source,
        bias,
        tuple(logits.tolist()),
        tuple(softmax(logits).tolist()),
        None if bias is None else tuple(sigmoid(logits).tolist()),
        space,
        image.normalized or texts.normalized,
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:+.4f}" for v in values) + ", ..."


def _facts(name: str, raw: np.ndarray, unit: np.ndarray) -> VectorFacts:
    return VectorFacts(
        name,
        tuple(raw.shape),
        tuple(float(v) for v in raw[:FIRST_NUMBERS]),
        float(np.linalg.norm(raw.astype(np.float64))),
        tuple(float(v) for v in unit[:FIRST_NUMBERS]),
        float(np.linalg.norm(unit.astype(np.float64))),
    )
