"""Locked towers run once: their features are kept on disk, and only projections train.

Comes in: a dual encoder with a locked tower, rows of images or token ids. Goes out: mapped arrays (views, rows, width),
under a name that is a digest of the tower's weights, of the preparation and of the rows; so a changed weight,
augmentation or image makes a new file, and three seeds share one. View 0 is the image as validation sees it, the others
are augmented.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.config import changed_fields
from chiasm.encoders.base import weights_digest
from chiasm.encoders.dual import DualEncoder, ProjectedImageTower, ProjectedTextTower
from chiasm.encoders.image_side import without_projection
from chiasm.encoders.text import text_features
from chiasm.encoders.vit import VisionTransformer
from chiasm.errors import TrainingError
from chiasm.progress import Progress, SilentProgress
from chiasm.train.sources import ImageBatch
from chiasm.train.texts import TokenTable
from chiasm.types import digest_of

BATCH = 64
#: Part of every name in the cache: a new number when a tower computes something else, or a field's default changes.
VERSION = 1


class LockedSides(nn.Module):
    """A dual encoder that takes features of its locked towers in the place of pixels and token ids.

    Args:
        dual: The encoder; its parameters are this module's own.
        image: Whether pixels are replaced by features.
        text: Whether token ids are.
    """

    def __init__(self, dual: DualEncoder, *, image: bool, text: bool) -> None:
        super().__init__()
        self.dual = dual
        self.image = image
        self.text = text

    def forward(self, images: Tensor, ids: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Return what :meth:`DualEncoder.forward` returns, and ``text_guide``: unit features of a locked text tower."""
        dual = self.dual
        assert dual.logit_scale is not None
        image = project_image(dual, images) if self.image else dual.encode_image(images)
        text = project_text(dual, ids) if self.text else dual.encode_text(ids, lengths)
        out = {
            "image_features": F.normalize(image, dim=-1),
            "text_features": F.normalize(text, dim=-1),
            "logit_scale": dual.logit_scale.exp(),
        }
        if dual.logit_bias is not None:
            out["logit_bias"] = dual.logit_bias.clone()
        if self.text:
            out["text_guide"] = F.normalize(ids, dim=-1)
        return out


def locked_sides(model: nn.Module) -> tuple[bool, bool]:
    """Return whether the image and the text tower can be cached: nothing but their projection trains."""
    if not isinstance(model, DualEncoder):
        return False, False
    visual, text = model.visual, model.text
    image_ok = isinstance(visual, ProjectedImageTower) or (
        isinstance(visual, VisionTransformer) and visual.attn_pool is None
    )
    text_ok = text is None or isinstance(text, ProjectedTextTower)
    return image_ok and not _trains(bare_image_tower(model)), text_ok and not _trains(bare_text_tower(model))


def _trains(tower: nn.Module) -> bool:
    return any(p.requires_grad for p in tower.parameters())


def bare_image_tower(model: DualEncoder) -> nn.Module:
    """Return the image tower without its projection; weights are shared, the model is not changed."""
    return without_projection(model.image_side())


def bare_text_tower(model: DualEncoder) -> nn.Module:
    """Return a module (ids, lengths) -> features without projection; weights are shared, the model is not changed."""
    if isinstance(model.text, ProjectedTextTower):
        bare: Any = copy.copy(model.text)
        bare._modules = {**model.text._modules, "proj": nn.Identity()}
        return bare  # type: ignore[no-any-return]
    return _NativeText(model)


class _NativeText(nn.Module):
    """The text parts of a native dual encoder, which has them as its own, without projection."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.token_embedding = model.token_embedding
        self.positional_embedding = model.positional_embedding
        self.cls_emb = model.cls_emb
        self.transformer = model.transformer
        self.ln_final = model.ln_final
        self.text_projection = None
        self.text_plan = model.text_plan

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        parts: Any = self
        return text_features(parts, ids, lengths)


def project_image(model: DualEncoder, features: Tensor) -> Tensor:
    """Return the embeddings of an image tower's features, not normalised."""
    visual: Any = model.visual
    if isinstance(visual, ProjectedImageTower):
        return visual.head(features)  # type: ignore[no-any-return]
    return features if visual.proj is None else features @ visual.proj


def project_text(model: DualEncoder, features: Tensor) -> Tensor:
    """Return the embeddings of a text tower's features, not normalised."""
    if isinstance(model.text, ProjectedTextTower):
        return model.text.proj(features)  # type: ignore[no-any-return]
    projection: Any = model.text_projection
    return features if projection is None else features @ projection


class CachedImages:
    """Features in the place of pixels; training draws one of the views of each row.

    Args:
        features: (views, rows, width).
    """

    def __init__(self, features: NDArray[np.float32]) -> None:
        self.features = features

    def __call__(self, rows: NDArray[np.int64], rng: np.random.Generator | None) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the features of these rows: of a drawn view, or of view 0."""
        views = rng.integers(0, len(self.features), len(rows)) if rng is not None else np.zeros(len(rows), np.int64)
        return torch.from_numpy(np.ascontiguousarray(self.features[views, rows])), np.arange(len(rows))


def cache_image_features(
    model: DualEncoder,
    images: ImageBatch,
    rows: int,
    *,
    folder: Path,
    describes: Any,
    views: int = 1,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Return the image tower's features (views, rows, width), computed or found in ``folder``.

    Args:
        model: With a locked image tower.
        images: Makes pixels.
        rows: How many.
        folder: Of the cache.
        describes: JSON value that identifies the pixels: digests of preparation, augmentation and images.
        views: View 0 is plain, further ones are augmented.
        progress: Told after every batch.

    Raises:
        TrainingError: When the file cannot be written.
    """
    tower = bare_image_tower(model)
    device = model.device

    def batches() -> Iterator[NDArray[np.float32]]:
        for view in range(views):
            for start in range(0, rows, BATCH):
                wanted = np.arange(start, min(start + BATCH, rows))
                pixels, kept = images(wanted, np.random.default_rng([view, start]) if view else None)
                if len(kept) != len(wanted):
                    raise TrainingError("an image could not be read while features were computed")
                yield run_tower(tower, pixels.to(device))

    key = {"of": describes, "views": views, "tower": _digest(tower, model.config.image)}
    flat = cached_rows(folder / f"image-{digest_of(key, 24)}.npy", batches, rows * views, progress)
    return flat.reshape(views, rows, -1)


def cache_text_features(
    model: DualEncoder, table: TokenTable, *, folder: Path, progress: Progress | None = None
) -> NDArray[np.float32]:
    """Return the text tower's features (distinct texts, width), computed or found in ``folder``.

    Raises:
        TrainingError: When the file cannot be written.
    """
    tower = bare_text_tower(model)
    device = model.device

    def batches() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(table.texts), BATCH):
            tokens = table.tokens(np.arange(start, min(start + BATCH, len(table.texts))))
            yield run_tower(tower, tokens.ids.to(device), tokens.lengths.to(device))

    ids = {"ids": table.ids, "lengths": table.lengths}
    key = {"of": weights_digest(ids), "tower": _digest(tower, model.config.text)}
    return cached_rows(folder / f"text-{digest_of(key, 24)}.npy", batches, len(table.texts), progress)


def _digest(tower: nn.Module, config: Any) -> list[Any]:
    """Identify what a tower computes: version, weights, and what its declaration states beyond the defaults.

    A field that is added later leaves the names of existing files alone. Code of the user's own (kind ``python``) is
    known by its name only: after a change that leaves the weights alone, the cache must be deleted.
    """
    return [VERSION, weights_digest(tower.state_dict()), changed_fields(config)]


def run_tower(tower: nn.Module, *inputs: Tensor) -> NDArray[np.float32]:
    """Return what a tower gives in eval mode and without gradients; its mode is left as it was."""
    was_training = tower.training
    tower.eval()
    try:
        with torch.no_grad():
            return tower(*inputs).float().cpu().numpy()  # type: ignore[no-any-return]
    finally:
        tower.train(was_training)


def cached_rows(
    path: Path, batches: Callable[[], Iterator[NDArray[np.float32]]], rows: int, progress: Progress | None
) -> NDArray[np.float32]:
    """Return the mapped array at ``path``, written from ``batches`` when it is not there.

    Raises:
        TrainingError: When the file cannot be written; nothing is left of the attempt.
    """
    if not path.exists():
        progress = progress or SilentProgress()
        progress.start(rows, "features of locked towers")
        try:
            _write(path, batches(), rows, progress)
        except OSError as error:
            raise TrainingError(
                f"the cache of features cannot be written: {error.strerror or type(error).__name__}",
                hint="free some space, or set `run.cache_features = false`",
            ) from error
        finally:
            progress.finish()
    features: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    return features


def _write(path: Path, batches: Iterator[NDArray[np.float32]], rows: int, progress: Progress) -> None:
    """Write rows batch by batch through a plain file: a full disk would kill the writer of a mapped one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            header = False
            for batch in batches:
                if not header:
                    shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, batch.shape[1])}
                    np.lib.format.write_array_header_1_0(file, shape)  # type: ignore[no-untyped-call]
                    header = True
                file.write(np.ascontiguousarray(batch, "<f4").tobytes())
                progress.advance(len(batch))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
