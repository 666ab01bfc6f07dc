"""Zero-shot classification on embeddings: prompts become directions, images are compared with them.

In: :class:`~chiasm.types.Embeddings` of images and a :class:`TextClassifier`. Out: a frozen :class:`ZeroShotResult`.

Protocol (Radford et al. 2021, section 3.1; open_clip ``build_zero_shot_classifier``): every prompt's embedding is
normalised, the prompts of a class are averaged, the mean is normalised again; logits are cosines times the logit scale
plus the bias, where the model has one. Then

* ``single``: a softmax over the classes, which exclude each other;
* ``multi``: for every label alone, a softmax over its positive and its negative direction; or, for models trained with
  the sigmoid loss (they have a logit bias) and labels without negative prompts, the sigmoid of the logit.

Deviation from CheXzero: its softmax over the pair leaves out the logit scale; ours applies it. The order of images, and
so every AUROC, is the same. ``protocol_run`` follows CheXzero and the others to the letter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, SpaceMismatch, UnknownName
from chiasm.tasks.aggregation import mean_direction
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.types import Embeddings, Space

if TYPE_CHECKING:
    import pandas as pd

#: Used when a model carries no logit scale; the clamp of CLIP training, where most trained models end.
FALLBACK_LOGIT_SCALE = 100.0
_UNIT_TOLERANCE = 2e-2  # bf16 vectors stray from unit norm by up to 0.8 %

Mode = Literal["single", "multi"]
Activation = Literal["softmax", "pair", "sigmoid"]
ScaleSource = Literal["model", "argument", "fallback", "protocol"]


@dataclass(frozen=True)
class TextClassifier:
    """One unit vector per label, and one against it where the label has negative prompts.

    Attributes:
        prompts: What the vectors were made of.
        positive: float32, shape (labels, dim), unit rows.
        negative: The same for the negative prompts, or None when not every label has some.
        space: Where the vectors live.
        logit_scale: Of the model, None when it has none.
        logit_bias: Of the model, None when it has none.
        ways: Per label, unit rows for the ways in which it can be true, or None where it is one ensemble.
    """

    prompts: PromptSet
    positive: NDArray[np.float32]
    negative: NDArray[np.float32] | None
    space: Space
    logit_scale: float | None = None
    logit_bias: float | None = None
    ways: tuple[NDArray[np.float32] | None, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, one per row."""
        return self.prompts.names


def unit_vectors(embeddings: Embeddings, what: str) -> NDArray[np.float32]:
    """Return the rows with unit norm, after checking that they can be compared.

    Raises:
        InputError: When a row is not finite or is zero, or when rows marked as normalised are not: raw and normalised
            vectors got mixed up.
    """
    vectors = embeddings.vectors
    norms = np.linalg.norm(vectors, axis=1)
    bad = ~np.isfinite(norms)
    if bad.any():
        raise InputError(f"{int(bad.sum())} of {len(vectors)} {what} embeddings are not finite")
    if (norms < 1e-12).any():
        raise InputError(
            f"{int((norms < 1e-12).sum())} of {len(vectors)} {what} embeddings are all zero, so they have no direction"
        )
    if not embeddings.normalized:
        unit: NDArray[np.float32] = vectors / norms[:, None]
        return unit
    if (np.abs(norms - 1) > _UNIT_TOLERANCE).any():
        raise InputError(
            f"{what} embeddings are marked as normalised, but have norms from {norms.min():.3g} to {norms.max():.3g}",
            hint="raw vectors need `normalized=False`",
        )
    return vectors


def raw_vectors(embeddings: Embeddings, what: str) -> NDArray[np.float32]:
    """Return the rows as the encoder gave them, after the checks of :func:`unit_vectors`.

    Raises:
        InputError: When the rows were normalised, so that their lengths are lost.
    """
    if embeddings.normalized:
        raise InputError(
            f"this protocol averages raw {what} embeddings, got normalised ones", hint="embed with `normalize=False`"
        )
    unit_vectors(embeddings, what)
    return embeddings.vectors


def embed_prompts(texts: list[str], embed_text: Callable[[list[str]], Embeddings]) -> Embeddings:
    """Return the embeddings of prompts; another number of rows or another modality raises ``InputError``."""
    embedded = embed_text(texts)
    if len(embedded) != len(texts):
        raise InputError(f"{len(texts)} prompts gave {len(embedded)} embeddings")
    if embedded.modality != "text":
        raise InputError(f"prompts must be embedded as text, got {embedded.modality} embeddings")
    return embedded


def build_classifier(
    prompts: PromptSet, embed_text: Callable[[list[str]], Embeddings], *, unit_first: bool = True
) -> TextClassifier:
    """Embed every distinct prompt once and average per label.

    Args:
        prompts: Labels with their prompts.
        embed_text: Texts to embeddings, one row per text in the same order, raw or normalised.
        unit_first: Give every prompt's vector unit norm before the mean; False averages raw vectors, as BioViL does.

    Raises:
        InputError: When the embeddings do not fit the texts, are unit vectors where raw ones are needed, or the prompts
            of a label cancel out.
    """
    texts = prompts.texts()
    embedded = embed_prompts(texts, embed_text)
    vectors = unit_vectors(embedded, "prompt") if unit_first else raw_vectors(embedded, "prompt")
    row = {text: k for k, text in enumerate(texts)}

    def direction(ensemble: Sequence[str], what: str) -> NDArray[np.float64]:
        return mean_direction(vectors[[row[t] for t in ensemble]], unit_first=unit_first, what=what)

    def directions(side: str) -> NDArray[np.float32]:
        rows = [direction(getattr(label, side), f"{side} prompts of label `{label.name}`") for label in prompts.labels]
        return np.asarray(rows, dtype=np.float32)

    def ways_of(label: LabelPrompts) -> NDArray[np.float32] | None:
        rows = [direction(way, f"prompts of one way of label `{label.name}`") for way in label.any_of]
        return np.asarray(rows, dtype=np.float32) if rows else None

    return TextClassifier(
        prompts,
        directions("positive"),
        directions("negative") if prompts.has_pairs else None,
        embedded.space,
        embedded.logit_scale,
        embedded.logit_bias,
        tuple(ways_of(label) for label in prompts.labels),
    )


def classifier_of_directions(
    labels: Sequence[str],
    positive: NDArray[np.float32],
    negative: NDArray[np.float32] | None = None,
    *,
    space: Space,
    logit_scale: float | None = None,
    logit_bias: float | None = None,
) -> TextClassifier:
    """Return a classifier of directions that no text has: learned prompts, say.

    Args:
        labels: Names.
        positive: (labels, dim) of any length.
        negative: Against each label, or None.
        space: Where they live.
        logit_scale: Of the model.
        logit_bias: Of the model.

    Raises:
        InputError: Shapes that do not fit, or a direction that is zero or not finite.
    """
    prompts = PromptSet(
        tuple(
            LabelPrompts(n, (f"[learned] {n}",), () if negative is None else (f"[learned: absent] {n}",))
            for n in labels
        )
    )

    def unit(side: NDArray[np.float32]) -> NDArray[np.float32]:
        vectors = np.asarray(side, dtype=np.float32)
        if vectors.shape != (len(prompts.labels), space.dim):
            raise InputError(f"directions have shape {vectors.shape}, expected {(len(prompts.labels), space.dim)}")
        return unit_vectors(Embeddings(vectors, prompts.names, space, "text", normalized=False), "learned prompt")

    against = None if negative is None else unit(negative)
    ways = (None,) * len(prompts.labels)
    return TextClassifier(prompts, unit(positive), against, space, logit_scale, logit_bias, ways)


@dataclass(frozen=True)
class ZeroShotResult:
    """What a zero-shot classifier says about every image.

    Attributes:
        probabilities: float64, shape (images, labels). Rows add up to 1 in ``single`` mode. They are the model's own,
            not calibrated.
        logits: float64, same shape: scale × cosine + bias; for a pair the difference of its two logits.
        cosines: float32, same shape, with the positive directions.
        negative_cosines: With the negative directions, where they were used.
        labels: One per column.
        ids: One per row.
        groups: Patient (or id) of each row, for clustered statistics.
        mode: ``single`` or ``multi``.
        activation: How logits became probabilities: ``softmax``, ``pair`` or ``sigmoid``.
        space: Where images and prompts were compared.
        logit_scale: The multiplier that was used.
        logit_scale_source: ``model``, ``argument``, ``protocol`` (it states one, or none: 1), or ``fallback`` when the
            model has none and 100 was used.
        logit_bias: What was added, where the model has one.
        prompts: The prompts that were used.
        paths: Image path of each row, where known.
        protocol: Name of the published protocol that was followed, where one was.
        variant: Which form of it: ``published``, ``corrected`` ...
        notes: What a reader must know about the protocol: its defects, and what of it could not be followed.
    """

    probabilities: NDArray[np.float64]
    logits: NDArray[np.float64]
    cosines: NDArray[np.float32]
    negative_cosines: NDArray[np.float32] | None
    labels: tuple[str, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    mode: Mode
    activation: Activation
    space: Space
    logit_scale: float
    logit_scale_source: ScaleSource
    logit_bias: float | None
    prompts: PromptSet
    paths: tuple[str | None, ...] | None = None
    protocol: str | None = None
    variant: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def scores(self) -> NDArray[np.float64]:
        """The log-odds of the probabilities, shape (images, labels): they order images alike but never saturate."""
        if self.activation != "softmax":
            return self.logits
        if len(self.labels) == 1:
            return np.zeros_like(self.logits)
        rows = np.arange(len(self.logits))
        best = self.logits.argmax(axis=1)
        exponentials = np.exp(self.logits - self.logits[rows, best][:, None])
        others = self.logits[rows, best][:, None] + np.log(
            np.maximum(
                exponentials.sum(axis=1, keepdims=True) - exponentials, 1e-300
            )  # the best column is mended below
        )
        rest = self.logits.copy()
        rest[rows, best] = -np.inf
        second = rest.max(axis=1)
        others[rows, best] = second + np.log(np.exp(rest - second[:, None]).sum(axis=1))
        odds: NDArray[np.float64] = self.logits - others
        return odds

    @property
    def predicted(self) -> tuple[str, ...]:
        """The most probable label of each image (ties: the first label)."""
        return tuple(self.labels[int(k)] for k in self.logits.argmax(axis=1))

    def column(self, label: str) -> int:
        """Return the column of a label; an unknown one raises ``UnknownName``."""
        if label not in self.labels:
            raise UnknownName("label", label, self.labels, hint=f"labels of this result: {', '.join(self.labels)}")
        return self.labels.index(label)

    def to_records(self, top_k: int | None = None) -> list[list[dict[str, Any]]]:
        """Return, per image, ``[{"score", "label"}, ...]`` by falling score: the shape of the Hugging Face pipeline."""
        order = np.argsort(-self.logits, axis=1, kind="stable")[:, :top_k]
        return [
            [{"score": float(self.probabilities[i, k]), "label": self.labels[k]} for k in row]
            for i, row in enumerate(order.tolist())
        ]

    def to_frame(self) -> pd.DataFrame:
        """Return a table with one row per image: ``id``, then the probability of each label."""
        import pandas as pd

        frame = pd.DataFrame(self.probabilities, columns=list(self.labels))
        frame.insert(0, "id", list(self.ids))
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "mode": self.mode,
            "activation": self.activation,
            "protocol": self.protocol,
            "variant": self.variant,
            "notes": list(self.notes),
            "labels": list(self.labels),
            "space": self.space.to_dict(),
            "logit_scale": self.logit_scale,
            "logit_scale_source": self.logit_scale_source,
            "logit_bias": self.logit_bias,
            "prompts": self.prompts.to_dict(),
            "images": [
                {
                    "id": self.ids[i],
                    "predicted": self.predicted[i] if self.mode == "single" else None,
                    "probabilities": _by_label(self.labels, self.probabilities[i]),
                    "logits": _by_label(self.labels, self.logits[i]),
                    "cosines": _by_label(self.labels, self.cosines[i]),
                }
                for i in range(len(self))
            ],
        }


def _by_label(labels: tuple[str, ...], values: NDArray[Any]) -> dict[str, float]:
    return {label: float(v) for label, v in zip(labels, values, strict=True)}


def classify(
    images: Embeddings,
    classifier: TextClassifier,
    *,
    mode: Mode = "single",
    logit_scale: float | None = None,
) -> ZeroShotResult:
    """Compare images with the prompts of a classifier.

    Args:
        images: Image embeddings, raw or normalised.
        classifier: From :func:`build_classifier`, in the same space.
        mode: ``single``: classes exclude each other. ``multi``: any number of labels can be true.
        logit_scale: Multiplier of the cosines; by default the model's. It is the multiplier itself, not its logarithm.

    Raises:
        SpaceMismatch: When images and prompts come from two spaces.
        InputError: When vectors are damaged, or ``multi`` lacks the negative prompts that it needs.
    """
    check_images(images, classifier.space)
    if mode not in ("single", "multi"):
        raise UnknownName("mode", mode, ("single", "multi"))
    scale, source = choose_logit_scale(images.logit_scale, classifier.logit_scale, logit_scale)
    bias = classifier.logit_bias if classifier.logit_bias is not None else images.logit_bias
    vectors = unit_vectors(images, "image")
    cosines = _positive_cosines(vectors, classifier, scale)
    logits = scale * cosines.astype(np.float64) + (bias or 0.0)
    negative_cosines = None
    activation: Activation = "softmax"
    if mode == "single":
        probabilities = softmax(logits)
    else:
        if classifier.negative is not None:
            activation = "pair"
            negative_cosines = vectors @ classifier.negative.T
            logits = scale * (cosines.astype(np.float64) - negative_cosines)
        elif bias is not None and not any(label.negative for label in classifier.prompts.labels):
            activation = "sigmoid"
        else:
            without = [label.name for label in classifier.prompts.labels if not label.negative]
            raise InputError(
                f"multi-label classification needs negative prompts; label `{without[0]}` has none",
                hint="make the prompts with `PromptSet.from_pairs`, or give `negative` texts",
            )
        probabilities = sigmoid(logits)
    return ZeroShotResult(
        probabilities,
        logits,
        cosines,
        negative_cosines,
        classifier.labels,
        images.ids,
        images.groups,
        mode,
        activation,
        images.space,
        scale,
        source,
        bias,
        classifier.prompts,
        images.paths,
    )


def check_images(images: Embeddings, space: Space) -> None:
    """Raise unless these are image embeddings of the prompts' space.

    Raises:
        SpaceMismatch: When images and prompts come from two spaces.
        InputError: When the embeddings are of texts.
    """
    if images.space != space:
        raise SpaceMismatch(
            f"images come from `{images.space}` and prompts from `{space}`; their similarity has no meaning",
            hint="embed both with the same model",
        )
    if images.modality != "image":
        raise InputError(f"zero-shot classification needs image embeddings, got {images.modality} embeddings")


def _positive_cosines(vectors: NDArray[np.float32], classifier: TextClassifier, scale: float) -> NDArray[np.float32]:
    """Return cosines with the positive directions; over several ways the log-mean-exp at the logit scale."""
    cosines = vectors @ classifier.positive.T
    for column, ways in enumerate(classifier.ways):
        if ways is not None:
            logits = scale * (vectors @ ways.T).astype(np.float64)
            peak = logits.max(axis=1, keepdims=True)
            cosines[:, column] = (peak[:, 0] + np.log(np.exp(logits - peak).mean(axis=1))) / scale
    return cosines


def choose_logit_scale(
    of_images: float | None, of_texts: float | None, override: float | None = None
) -> tuple[float, ScaleSource]:
    """Return the multiplier to use and where it comes from.

    Raises:
        InputError: When it is not a positive number, or the two sides disagree.
    """
    if of_images is not None and of_texts is not None and not np.isclose(of_images, of_texts, rtol=1e-3):
        raise InputError(
            f"images carry the logit scale {of_images:.6g} and texts {of_texts:.6g}; they must be one model's"
        )
    stated = of_texts if of_texts is not None else of_images
    source: ScaleSource = "argument" if override is not None else "model" if stated is not None else "fallback"
    scale = override if override is not None else stated if stated is not None else FALLBACK_LOGIT_SCALE
    if not (np.isfinite(scale) and scale > 0):
        raise InputError(f"the logit scale must be a positive number, got {scale}")
    if np.isclose(scale, np.log(100.0), atol=1e-3):
        warnings.warn(
            f"the logit scale is {scale:.4f} = ln 100: this looks like its logarithm; the multiplier is 100",
            UserWarning,
            stacklevel=3,
        )
    return float(scale), source


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the softmax over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    result: NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logistic function, without overflow."""
    small = np.exp(-np.abs(logits))
    result: NDArray[np.float64] = np.where(logits >= 0, 1.0, small) / (1.0 + small)
    return result
