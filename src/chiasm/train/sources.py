"""Pairs by index: from bytes in memory, from files, or from cached features of locked towers.

Comes in: images, token ids and keys of the same rows. Goes out: :class:`Pairs` of any rows. Training draws a text
variant and augments; validation does neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chiasm.datasets.images import plain_reason
from chiasm.errors import ChiasmError, InputError
from chiasm.io.manifest import RejectLog
from chiasm.train.augmentation import BatchTransform
from chiasm.train.contrastive import Pairs
from chiasm.train.texts import TokenTable
from chiasm.types import Sample

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageBatch(Protocol):
    """Makes pixels (or cached features) of rows; without a generator nothing is random."""

    def __call__(self, rows: NDArray[np.int64], rng: np.random.Generator | None) -> tuple[Tensor, NDArray[np.int64]]:
        """Return pixels (n, 3, size, size) and the places in ``rows`` that they belong to: all but unreadable ones."""


class CachedText(NamedTuple):
    """Features of a locked text tower in the place of token ids."""

    ids: Tensor
    lengths: Tensor | None = None


class ArrayImages:
    """Images that lie in memory as bytes at the model's size.

    Args:
        images: uint8, (n, size, size) or (n, size, size, 3).
        transform: Bytes to pixels.
    """

    def __init__(self, images: NDArray[np.uint8], transform: BatchTransform) -> None:
        size = transform.preprocess.picture_size
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[1:3] != (size, size):
            raise InputError(
                f"images in memory must be uint8 (n, {size}, {size}) with or without 3 channels, "
                f"got {images.dtype} {images.shape}"
            )
        self.images = images
        self.transform = transform

    def __call__(self, rows: NDArray[np.int64], rng: np.random.Generator | None) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the pixels of these rows."""
        return self.transform(self.images[rows], rng), np.arange(len(rows))


class FileImages:
    """Images that are decoded when they are asked for, a batch in parallel.

    Args:
        open_row: Row -> decoded image; called from several threads.
        plain: Image -> pixels (3, size, size).
        augmented: The same with a generator; None: never augment.
        rejects: Where rows that cannot be read are noted, which are then left out of their batch; None: they raise.
        samples: Of the rows, for that note.
    """

    def __init__(
        self,
        open_row: Callable[[int], Image],
        plain: Callable[[Image], Tensor],
        *,
        augmented: Callable[[Image, np.random.Generator], Tensor] | None = None,
        rejects: RejectLog | None = None,
        samples: Sequence[Sample] = (),
        workers: int = 2,
    ) -> None:
        self.open_row = open_row
        self.plain = plain
        self.augmented = augmented
        self.rejects = rejects
        self.samples = samples
        self._noted: set[int] = set()
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="chiasm-decode")

    def __call__(self, rows: NDArray[np.int64], rng: np.random.Generator | None) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the pixels of these rows.

        Raises:
            ChiasmError: An image that cannot be read, when ``rejects`` is None.
            InputError: No image of the batch is left.
        """
        generators = [None] * len(rows) if rng is None else rng.spawn(len(rows))
        made = list(self._pool.map(self._one, rows.tolist(), generators))
        kept = [i for i, pixels in enumerate(made) if pixels is not None]
        if not kept:
            raise InputError("no image of a batch can be read", hint="look at `rejected.jsonl`")
        return torch.stack([p for p in made if p is not None]), np.array(kept, np.int64)

    def _one(self, row: int, rng: np.random.Generator | None) -> Tensor | None:
        try:
            image = self.open_row(row)
        except ChiasmError as error:
            if self.rejects is None:
                raise
            if row not in self._noted:
                self._noted.add(row)
                sample = self.samples[row] if self.samples else Sample("")
                self.rejects.add(row, sample.id, plain_reason(error, sample))
            return None
        return self.plain(image) if rng is None or self.augmented is None else self.augmented(image, rng)


class PairRows:
    """The source that the loop and the validation read.

    Args:
        images: Rows -> pixels, or cached features.
        tokens: Texts of all rows.
        keys: Equal for pairs that are right answers to each other.
        train: Whether to augment and to draw text variants.
        text_features: (distinct texts, dim) features of a locked text tower, in the order of ``tokens.texts``.
    """

    def __init__(
        self,
        images: ImageBatch,
        tokens: TokenTable,
        keys: Sequence[str],
        *,
        train: bool = True,
        text_features: NDArray[np.float32] | None = None,
    ) -> None:
        if len(tokens) != len(keys):
            raise InputError(f"{len(tokens)} texts and {len(keys)} keys do not belong together")
        self.images = images
        self.token_table = tokens
        self.keys = list(keys)
        self.train = train
        self.text_features = text_features

    def __len__(self) -> int:
        return len(self.keys)

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> Pairs:
        """Return the pairs of these rows."""
        drawn = rng if self.train else None
        pixels, kept = self.images(indices, drawn)
        numbers = self.token_table.choose(indices, drawn)[kept]
        tokens: Any = (
            self.token_table.tokens(numbers)
            if self.text_features is None
            else CachedText(torch.from_numpy(self.text_features[numbers]))
        )
        return Pairs(pixels, tokens, [self.keys[i] for i in indices[kept]])
