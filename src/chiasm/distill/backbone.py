"""The vision backbone of distillation: a tower, where it came from, its features on disk, and pixels to train it with.

Comes in: ``[backbone]`` of a recipe and the images. Goes out: features (rows, width), float32, computed once per tower,
preparation and images, whoever asks (seeds and arms share them); and functions that make pixels, augmented when a
generator is given. Files of the cache are named by the digest of the tower's weights, its declaration, the preparation
and the content of the images, so nothing stale can be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from chiasm.config import build, changed_fields
from chiasm.data.augment import Augment
from chiasm.datasets.images import hash_image
from chiasm.distill.recipe import BackboneConfig
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, weights_digest
from chiasm.encoders.image_side import build_backbone, without_projection
from chiasm.errors import ConfigError
from chiasm.io.manifest import RejectLog, write_json_atomic
from chiasm.progress import Progress, SilentProgress
from chiasm.train.features import VERSION, cached_rows, run_tower
from chiasm.train.images import file_images, images_of
from chiasm.train.pairs import PairTable, file_facts
from chiasm.train.recipe import expand_path, resolve_augment
from chiasm.train.sources import ImageBatch
from chiasm.types import Preprocess, digest_of

#: Rows of one file of the cache: what a killed run loses at most.
SHARD = 1024
PIXELS_DIGEST = 24


@dataclass(frozen=True)
class Backbone:
    """A tower and what it takes to build it again.

    Attributes:
        tower: Pixels (n, 3, size, size) -> (n, width); in eval mode. Trained towers are copies of it.
        config: Its declaration; of both sides of the encoder it came from, the image side counts.
        projected: Whether it gives the embedding of the joint space.
        name: Of the model, for people.
        width: Numbers per image.
        digest: Of weights and declaration.
    """

    tower: nn.Module
    config: EncoderConfig
    projected: bool
    name: str
    width: int
    digest: str

    @property
    def preprocess(self) -> Preprocess:
        """How images are prepared."""
        return self.config.preprocess

    def with_tower(self, tower: nn.Module) -> Backbone:
        """Return the same backbone with other weights (trained ones)."""
        return replace(self, tower=tower.eval(), digest=_digest(tower, self.config, self.projected))


def open_backbone(config: BackboneConfig, *, seed: int, device: str = "cpu") -> Backbone:
    """Load or build the tower of a recipe.

    Args:
        config: Of the recipe.
        seed: Of a tower that is drawn; loaded ones do not depend on it.
        device: Where its weights go.

    Raises:
        ConfigError: No backbone, several models side by side, no image side, or a projection of a tower without one.
        CheckpointError: Weights that are absent, foreign or damaged.
        UnknownName: No model of that name.
    """
    if config.image is not None:
        if config.projected:
            raise ConfigError("`backbone.projected` has no meaning for a tower from scratch: it has no joint space")
        declared = _declared(config.image, config)
        # A recipe is the user's own: the code that it names may run.
        tower = build_backbone(declared, projected=False, allow_code=True, seed=seed)
        stored = getattr(tower, "stored", None)
        declared = declared if stored is None else replace(declared, image=stored)
        return _backbone(tower.to(device), declared, False, config.image.source or config.image.kind)
    if config.encoder is None:
        raise ConfigError("`backbone.encoder` is missing", hint="name a model, or describe a tower in `backbone.image`")
    from chiasm.load import load

    encoder = load(expand_path(config.encoder, "backbone.encoder"), device=device, family=config.family)
    declared = encoder.model.stored_config
    if not declared.has_image or declared.members is not None:
        raise ConfigError(
            "`backbone.encoder` must be one model with an image side",
            hint="`chiasm models` lists them; an ensemble has no single tower",
        )
    visual = encoder.model.image_side()
    tower = visual if config.projected else without_projection(visual)
    return _backbone(tower, declared, config.projected, encoder.name)


def _declared(image: ImageTowerConfig, config: BackboneConfig) -> EncoderConfig:
    preprocess = build(Preprocess, {"size": image.image_size, **config.preprocess}, where="backbone.preprocess.")
    return EncoderConfig(image=replace(image, freeze=False, lora=None), preprocess=preprocess, sides="image")


def _backbone(tower: nn.Module, config: EncoderConfig, projected: bool, name: str) -> Backbone:
    width = int(tower.output_dim)  # type: ignore[arg-type]
    tower = tower.requires_grad_(False).eval()
    return Backbone(tower, config, projected, name, width, _digest(tower, config, projected))


def _digest(tower: nn.Module, config: EncoderConfig, projected: bool) -> str:
    """Identify what a tower computes: version, weights, and what its declaration states beyond the defaults."""
    values = [VERSION, weights_digest(tower.state_dict()), changed_fields(config.image), projected]
    return digest_of(values, 24)


class ImagePool:
    """The images of a run, ready for any backbone: their content's digests, their features, their pixels.

    Args:
        table: All images that can be used.
        folder: Of the cache.
        batch_size: Images per forward pass without gradients.
        progress: Told while features are computed.
        workers: Threads that decode and prepare images.
    """

    def __init__(
        self,
        table: PairTable,
        *,
        folder: Path,
        batch_size: int = 32,
        progress: Progress | None = None,
        workers: int = 2,
    ) -> None:
        self.table = table
        self.folder = folder
        self.batch_size = batch_size
        self.progress = progress or SilentProgress()
        self.workers = workers
        self._contents: list[str] | None = None
        self._pixels: dict[tuple[Preprocess, Augment | None], PoolPixels] = {}

    @property
    def contents(self) -> list[str]:
        """The digest of each image's content, whatever it is called and wherever it lies."""
        if self._contents is None:
            self._contents = image_digests(self.table, folder=self.folder, progress=self.progress, workers=self.workers)
        return self._contents

    def features(self, backbone: Backbone, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the features (len(rows), width) of these rows, computed or found.

        Bits depend on backbone, images and the list of rows, never on what was computed before.

        Raises:
            TrainingError: When a file cannot be written.
        """
        parts = [
            self._shard(backbone, np.asarray(rows[start : start + SHARD], np.int64))
            for start in range(0, len(rows), SHARD)
        ]
        if not parts:
            return np.zeros((0, backbone.width), np.float32)
        return np.ascontiguousarray(np.concatenate(parts), np.float32)

    def _shard(self, backbone: Backbone, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        key = [backbone.digest, changed_fields(backbone.preprocess), [self.contents[r] for r in rows], self.batch_size]
        images = file_images(self.table, backbone.preprocess, augment=None, workers=self.workers)
        device = next((p.device for p in backbone.tower.parameters()), None)

        def batches() -> Iterator[NDArray[np.float32]]:
            for start in range(0, len(rows), self.batch_size):
                pixels, _ = images(rows[start : start + self.batch_size], None)
                yield run_tower(backbone.tower, pixels if device is None else pixels.to(device))

        return cached_rows(self.folder / f"image-{digest_of(key, 24)}.npy", batches, len(rows), self.progress)

    def pixels(self, backbone: Backbone, augment: Augment | None) -> PoolPixels:
        """Return what makes pixels of rows of the table for a tower that is trained; nothing is decoded yet.

        Seeds with one preparation share it, so that images are decoded once.
        """
        key = (backbone.preprocess, augment)
        if key not in self._pixels:
            self._pixels[key] = PoolPixels(
                self.table, backbone.preprocess, augment, self.progress, workers=self.workers
            )
        return self._pixels[key]


@dataclass(frozen=True)
class _Reading:
    """Images that could be decoded once are expected to be readable again."""

    in_memory: Literal["auto", "always", "never"] = "auto"
    on_bad_row: Literal["skip", "fail"] = "fail"


class PoolPixels:
    """Makes pixels of rows, from decoded images in memory where they fit; they are decoded at the first call."""

    def __init__(
        self,
        table: PairTable,
        preprocess: Preprocess,
        augment: Augment | None,
        progress: Progress | None = None,
        *,
        workers: int = 2,
    ) -> None:
        self.table = table
        self.workers = workers
        self.preprocess = preprocess
        self.augment = augment
        self.progress = progress
        self._images: ImageBatch | None = None

    def __call__(self, rows: NDArray[np.int64], rng: np.random.Generator | None) -> object:
        """Return pixels (n, 3, size, size), augmented when there is a generator."""
        if self._images is None:
            self._images, _ = images_of(
                self.table, self.preprocess, data=_Reading(), augment=self.augment, rejects=RejectLog(),
                progress=self.progress, workers=self.workers,
            )  # fmt: skip
        return self._images(rows, rng)[0]


def chosen_augment(config: BackboneConfig) -> Augment | None:
    """Return the augmentation of a recipe; None when there is none.

    Raises:
        ConfigError: Unknown field, preset or type.
    """
    augment = resolve_augment(config.augment)
    return None if augment == Augment.preset("none") else augment


def image_digests(table: PairTable, *, folder: Path, progress: Progress | None = None, workers: int = 2) -> list[str]:
    """Return a digest of each image's content, remembered in ``folder`` while no file changes.

    See `chiasm.datasets.images.hash_image`, which pairs on disk are made with, too; phantoms are known by their pixels.
    """
    if table.arrays is not None:
        shape = list(table.arrays.shape[1:])
        return [hashlib.sha256(repr(shape).encode() + a.tobytes()).hexdigest()[:PIXELS_DIGEST] for a in table.arrays]
    note = folder / f"content-{digest_of(file_facts(table.samples), 24)}.json"
    if note.exists():
        found: list[str] = json.loads(note.read_text())
        return found

    def one(row: int) -> str:
        sample = table.samples[row]
        assert sample.image is not None
        return hash_image(sample.image).hex()[:PIXELS_DIGEST]

    progress = progress or SilentProgress()
    progress.start(len(table), "contents of images")
    digests: list[str] = []
    try:
        with ThreadPoolExecutor(max(1, workers), thread_name_prefix="chiasm-digest") as pool:
            for digest in pool.map(one, range(len(table))):
                digests.append(digest)
                progress.advance(1)
    finally:
        progress.finish()
    write_json_atomic(note, digests)
    return digests
