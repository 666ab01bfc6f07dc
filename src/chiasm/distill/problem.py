"""What the stages of distillation work on: rows with labels, features or pixels, and the text targets of each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

#: Rows and a generator (None: without augmentation) -> model input, (rows, width) or (rows, 3, height, width).
Inputs = Callable[[NDArray[np.int64], np.random.Generator | None], "Tensor"]


@dataclass(frozen=True)
class Rows:
    """The images of one split.

    Attributes:
        ids: One per image, unique.
        groups: Patient (else slide, study, id) of each: never on two sides.
        labels: (n,), class numbers.
        features: (n, width), float32, of the locked backbone; None while it still has to be trained.
        pixels: Makes what the tower takes; None when features were given and there is no image.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    labels: NDArray[np.int64]
    features: NDArray[np.float32] | None = None
    pixels: Inputs | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        if len(self.groups) != n or len(self.labels) != n or (self.features is not None and len(self.features) != n):
            raise InputError(f"rows are incomplete: {n} ids, {len(self.groups)} groups, {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Targets:
    """Text embeddings that the images of training and validation learn to predict.

    Attributes:
        train: (n, text_dim), float32 unit rows.
        validation: (m, text_dim).
        train_mask: (n,), False where an image has no text: it then learns from its label alone.
        validation_mask: (m,).
        digest: Of all of these.
    """

    train: NDArray[np.float32]
    validation: NDArray[np.float32]
    train_mask: NDArray[np.bool_]
    validation_mask: NDArray[np.bool_]
    digest: str

    @property
    def dim(self) -> int:
        """Dimensions of the text embeddings."""
        return int(self.train.shape[1])


@dataclass(frozen=True)
class Problem:
    """Everything one seed works on.

    Attributes:
        classes: Names in the order of the logits.
        train: Images that are trained on.
        validation: Images that decide which weights are kept.
        test: Images that nothing is decided by.
        digest: Of ids, labels and what the inputs are made from; part of every cached stage's name.
        facts: Counts and digests for people and ``results.json``.
        shared_groups: Whether groups may be on two sides, because the recipe says so (``data.leakage = "warn"``).
    """

    classes: tuple[str, ...]
    train: Rows
    validation: Rows
    test: Rows
    digest: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    shared_groups: bool = False

    def __post_init__(self) -> None:
        if self.shared_groups:
            return
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = set(getattr(self, one).groups) & set(getattr(self, other).groups)
            if shared:
                raise InputError(f"{len(shared)} groups are in both {one} and {other}", hint="split by patient")
