"""The nouns that travel between the folders: samples, preprocessing, spaces, embeddings, numbers with intervals.

Nothing here knows torch, files or models. Everything is frozen, so a value can be shared and hashed into a digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError, SpaceMismatch

Modality = Literal["image", "text"]
LabelValue = str | int | float | None


def digest_of(value: object, length: int = 12) -> str:
    """Return the first ``length`` hex digits of the SHA-256 of a JSON-serialisable value (keys sorted)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True)
class Preprocess:
    """How an encoder wants its images: a declaration that ``data.transforms`` turns into code.

    Attributes:
        size: Side of the square model input, in pixels.
        resize: ``shortest`` scales the shorter side to ``size``; ``squash`` ignores the aspect ratio;
            ``longest_pad`` scales the longer side to ``size`` and pads with ``fill``; ``pad_square`` pads to a square of
            at least ``size`` and scales that.
        crop: ``center`` after ``shortest``, and wherever ``resize_size`` is larger than ``size``; ``none`` otherwise.
        interpolation: Pillow's filter, or ``area``: OpenCV's INTER_AREA, the mean of what a pixel covers.
        rgb: When the image is converted to RGB. OpenAI CLIP and open_clip resize in the file's own mode and convert
            after it; transformers converts before it. The order changes palette, 1-bit and RGBA images.
        mean: Per channel, of pixels scaled to [0, 1].
        std: Per channel, of pixels scaled to [0, 1].
        fill: Grey value (0..255) of padding.
        cut_bottom: Share of the height that is cut off below before anything else: a burned-in mark or address.
        crop_rounding: Where a centre crop of odd margin lies: ``even`` rounds half the margin to the even pixel (OpenAI
            CLIP, open_clip), ``down`` rounds it down (transformers). None: as the family of ``rgb`` does.
        resize_size: Side that ``resize`` makes where it is not ``size``. None: ``size``.
        side_rounding: How ``longest_pad`` rounds the sides: ``shorter_down`` truncates the shorter one (GLoRIA),
            ``both_down`` both, so that the longer may be a pixel short (CheXzero). None: to the nearest (open_clip).
        grey: Whether the image is converted to greyscale (Pillow's ``L``) before anything else; its three channels are
            equal then.
        stretch: ``min_max`` spreads the range of the file's values over 0 to 255, rounding down, before ``grey``
            (BioViL). A constant image becomes black.
        second_resize: ``bicubic_tensor`` resizes the normalised tensor from ``resize_size`` to ``size``, bicubic
            without antialiasing (CheXzero). None: ``crop`` does it.
    """

    size: int = 224
    resize: Literal["shortest", "squash", "longest_pad", "pad_square"] = "shortest"
    crop: Literal["center", "none"] = "center"
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest", "area"] = "bicubic"
    rgb: Literal["after_resize", "before_resize"] = "after_resize"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    fill: int = 0
    cut_bottom: float = 0.0
    crop_rounding: Literal["even", "down"] | None = None
    resize_size: int | None = None
    side_rounding: Literal["shorter_down", "both_down"] | None = None
    grey: bool | None = None
    stretch: Literal["min_max"] | None = None
    second_resize: Literal["bicubic_tensor"] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; None is left out, so digests from before a field was added hold."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}

    @property
    def resized_side(self) -> int:
        """Side that ``resize`` makes."""
        return self.size if self.resize_size is None else self.resize_size

    @property
    def picture_size(self) -> int:
        """Side of the 8-bit picture before the normalisation: ``size``, unless a second resize follows it."""
        return self.size if self.second_resize is None else self.resized_side

    def scaled_sides(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that ``longest_pad`` scales an image to, before it pads it."""
        side, longest = self.resized_side, max(width, height)
        if self.side_rounding is None:
            ratio = longest / side
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        factor = side / longest
        new_width, new_height = max(1, int(width * factor)), max(1, int(height * factor))
        if self.side_rounding == "both_down":
            return new_width, new_height
        return (new_width, side) if height >= width else (side, new_height)

    def pad_margins(self, width: int, height: int) -> tuple[int, int, int]:
        """Return the side of ``pad_square``'s square, and where the image lies in it: left and top."""
        side = max(self.resized_side, width, height)
        return side, (side - width) // 2, (side - height) // 2

    def crop_offset(self, margin_px: int) -> int:
        """Return where the centre crop begins along an axis that is ``margin_px`` longer than ``picture_size``."""
        rounding = self.crop_rounding or ("down" if self.rgb == "before_resize" else "even")
        return margin_px // 2 if rounding == "down" else round(margin_px / 2)

    def kept_height(self, height_px: int) -> int:
        """Return how many of an image's rows remain after ``cut_bottom``, at least 1."""
        return max(1, height_px - int(height_px * self.cut_bottom))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`; unknown keys raise ``InputError``."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise InputError(f"unknown preprocess field `{key}`", hint=f"known fields: {', '.join(sorted(known))}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    @property
    def digest(self) -> str:
        """Short hash that changes with any field."""
        return digest_of(self.to_dict())


@dataclass(frozen=True)
class Space:
    """The identity of an embedding space: which encoder, which weights, which preprocessing.

    Two vectors may be compared only when their spaces are equal.
    """

    encoder: str
    weights: str
    preprocess: str
    dim: int

    def __str__(self) -> str:
        return f"{self.encoder}@{self.weights[:6]}.{self.preprocess[:4]}/{self.dim}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`."""
        return cls(**dict(values))


@dataclass(frozen=True)
class Box:
    """A labelled rectangle in image pixels, origin top left, right and bottom edges exclusive."""

    x0_px: float
    y0_px: float
    x1_px: float
    y1_px: float
    label: str = ""


@dataclass(frozen=True)
class Sample:
    """One row of a data set: an image, a text, or both, with what must keep it on one side of a split.

    Attributes:
        id: Unique within its table.
        image: Path of the image file, or None for text-only rows.
        text: Caption, note or report, or None for image-only rows.
        patient: Group that must not be split; None when unknown (then ``group`` falls back to study, slide, id).
        labels: Column name -> value; None means "not labelled" (never "negative").
        split: ``train``, ``val``, ``test`` ... as given by the data set, or None.
        boxes: Where findings lie, when known.
    """

    id: str
    image: Path | None = None
    text: str | None = None
    patient: str | None = None
    study: str | None = None
    slide: str | None = None
    labels: Mapping[str, LabelValue] = field(default_factory=dict)
    split: str | None = None
    boxes: tuple[Box, ...] = ()

    @property
    def group(self) -> str:
        """The widest known group: patient, else slide, else study, else the id itself."""
        return self.patient or self.slide or self.study or self.id


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval, the count behind it and what chance would give.

    ``low``/``high`` are NaN when no interval could be computed (one group only, say); ``chance`` is None where
    chance has no meaning.
    """

    value: float
    low: float
    high: float
    n: int
    chance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"value", "low", "high", "n", "chance"}`` with NaN as None, so that it is valid JSON."""

        def plain(x: float | None) -> float | None:
            return None if x is None or not np.isfinite(x) else float(x)

        return {
            "value": plain(self.value),
            "low": plain(self.low),
            "high": plain(self.high),
            "n": int(self.n),
            "chance": plain(self.chance),
        }

    def __str__(self) -> str:
        text = f"{self.value:.3f}"
        if np.isfinite(self.low) and np.isfinite(self.high):
            text += f" [{self.low:.3f}, {self.high:.3f}]"
        return text


@dataclass(frozen=True)
class Embeddings:
    """Vectors of one modality in one space, with the rows' identity: the only thing that tasks see.

    Attributes:
        vectors: float32, shape (n, dim).
        ids: One per row, unique.
        space: Identity of the space; tasks refuse to compare two spaces.
        modality: What was embedded.
        normalized: Whether rows have unit L2 norm.
        logit_scale: The multiplier of cosines (exp of the trained parameter), None when the model has none.
        logit_bias: Added after the scale (SigLIP), None when the model has none.
        texts: The text of each row, where there is one.
        paths: The image path of each row, where there is one.
        patients: The group of each row, for splits and clustered intervals.
        labels: Column name -> one value a row; None means "not labelled".
        members: Models whose unit vectors stand side by side in a row (divided by the root of their number), 1 for one
            encoder.
        precision: Arithmetic in which they were worked out (``fp32``, ``bf16``, ``int8``; ``encoders.precision``). Rows
            of different precision may be compared: they differ by rounding.
    """

    vectors: NDArray[np.float32]
    ids: tuple[str, ...]
    space: Space
    modality: Modality
    normalized: bool = True
    logit_scale: float | None = None
    logit_bias: float | None = None
    texts: tuple[str | None, ...] | None = None
    paths: tuple[str | None, ...] | None = None
    patients: tuple[str | None, ...] | None = None
    labels: Mapping[str, tuple[LabelValue, ...]] = field(default_factory=dict)
    members: int = 1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        vectors = np.ascontiguousarray(self.vectors, dtype=np.float32)
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "ids", tuple(self.ids))
        if vectors.ndim != 2:
            raise InputError(f"embeddings must have shape (n, dim), got {vectors.shape}")
        if vectors.shape[1] != self.space.dim:
            raise InputError(
                f"vectors have {vectors.shape[1]} dimensions, their space {self.space} has {self.space.dim}"
            )
        if self.members < 1 or self.space.dim % self.members:
            raise InputError(f"{self.space.dim} dimensions cannot be shared by {self.members} models")
        columns: dict[str, Sequence[object] | None] = {
            "ids": self.ids,
            "texts": self.texts,
            "paths": self.paths,
            "patients": self.patients,
            **{f"labels[{k}]": v for k, v in self.labels.items()},
        }
        for name, column in columns.items():
            if column is not None and len(column) != len(vectors):
                raise InputError(f"{name} has {len(column)} entries for {len(vectors)} vectors")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Number of dimensions of the space."""
        return self.space.dim

    def normalize(self) -> Embeddings:
        """Return the same rows with unit L2 norm (a zero row stays zero)."""
        if self.normalized:
            return self
        norms = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        return dataclasses.replace(self, vectors=self.vectors / np.maximum(norms, 1e-12), normalized=True)

    def select(self, rows: ArrayLike) -> Embeddings:
        """Return the rows given by an index array or a boolean mask, in that order."""
        index = np.asarray(rows)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        index = index.astype(np.int64)

        def pick(column: Sequence[Any] | None) -> tuple[Any, ...] | None:
            return None if column is None else tuple(column[int(i)] for i in index)

        return dataclasses.replace(
            self,
            vectors=self.vectors[index],
            ids=tuple(self.ids[int(i)] for i in index),
            texts=pick(self.texts),
            paths=pick(self.paths),
            patients=pick(self.patients),
            labels={k: tuple(v[int(i)] for i in index) for k, v in self.labels.items()},
        )

    @property
    def groups(self) -> tuple[str, ...]:
        """The group of each row for clustered statistics: its patient, else its id."""
        if self.patients is None:
            return self.ids
        return tuple(p if p is not None else i for p, i in zip(self.patients, self.ids, strict=True))


def check_same_space(*embeddings: Embeddings) -> Space:
    """Return the one space of all arguments.

    Raises:
        SpaceMismatch: When two of them differ; their similarity would have no meaning.
    """
    first = embeddings[0].space
    for other in embeddings[1:]:
        if other.space != first:
            raise SpaceMismatch(
                f"embeddings come from two spaces: `{first}` and `{other.space}`; their similarity has no meaning",
                hint="embed both sides with the same model",
            )
    return first
