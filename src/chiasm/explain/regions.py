"""A rectangle of an image to a vector of the joint space, so that tasks can work on regions as on images.

Three ways, each with its weakness. ``crop`` embeds the rectangle as an image of its own: it works for every encoder, but
a crop is an unusual image, and whatever tells left from right is gone. ``patches`` averages the patch vectors inside the
box: one pass for any number of boxes, but only where the tower has patch vectors, and these need not speak of their own
place. ``cover`` hides everything else under the mean colour: the place is kept, but so much grey is unusual, too. It is
the default: on phantoms it named the finding of a box best (docs/lab-notes.md, 2026-11-21).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import InputError, UnknownName
from chiasm.explain.heatmap import model_view
from chiasm.explain.similarity import patch_vectors
from chiasm.explain.towers import image_batch, quiet
from chiasm.types import Box, Embeddings

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder

RegionMethod = Literal["crop", "patches", "cover"]
WAYS = ("crop", "patches", "cover")
_BATCH = 32


def embed_regions(
    encoder: Encoder,
    images: Sequence[Image],
    boxes: Sequence[Box],
    *,
    how: RegionMethod = "cover",
    ids: Sequence[str] | None = None,
    patients: Sequence[str | None] | None = None,
) -> Embeddings:
    """Return one unit vector for each image's box.

    Args:
        encoder: Any encoder; ``patches`` needs patch vectors.
        images: One per box.
        boxes: In pixels of their image; parts outside are cut off.
        how: See the module.
        ids: By default the positions.
        patients: For tasks that leave out a query's own patient.

    Raises:
        InputError: Lengths that differ, a box without area or outside its image or outside what the model sees, or a
            tower without patch vectors.
        UnknownName: An unknown way.
    """
    if how not in WAYS:
        raise UnknownName("way to embed a region", how, WAYS)
    if len(images) != len(boxes) or not images:
        raise InputError(f"every image needs its box; got {len(images)} images and {len(boxes)} boxes")
    corners = [_inside(box, image.size) for box, image in zip(boxes, images, strict=True)]
    rows = []
    with quiet(encoder.model):
        for start in range(0, len(images), _BATCH):
            part = slice(start, start + _BATCH)
            rows.append(_embed(encoder, images[part], corners[part], how))
    vectors = F.normalize(torch.cat(rows).float(), dim=-1).cpu().numpy()
    return Embeddings(
        vectors=np.asarray(vectors, np.float32),
        ids=tuple(ids) if ids is not None else tuple(str(i) for i in range(len(images))),
        space=encoder.space,
        modality="image",
        logit_scale=encoder.logit_scale,
        logit_bias=encoder.logit_bias,
        patients=None if patients is None else tuple(patients),
        members=encoder.members,
    )


def sees_region(encoder: Encoder, image_size: tuple[int, int], box: Box) -> bool:
    """Return whether the model's view of an image of this width and height holds some of a box; a crop can miss it."""
    try:
        _mask(encoder, image_size, _inside(box, image_size), encoder.preprocess_spec.size)
    except InputError:
        return False
    return True


def scale_box(box: Box, of: tuple[int, int], to: tuple[int, int]) -> Box:
    """Return the same place on an image of another width and height."""
    x, y = to[0] / of[0], to[1] / of[1]
    return Box(box.x0_px * x, box.y0_px * y, box.x1_px * x, box.y1_px * y, box.label)


def _inside(box: Box, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    edges = (box.x0_px, box.y0_px, box.x1_px, box.y1_px)
    if not all(map(math.isfinite, edges)) or box.x1_px <= box.x0_px or box.y1_px <= box.y0_px:
        raise InputError(f"a box must have x0 < x1 and y0 < y1, got {edges}")
    x0, y0 = max(0, math.floor(box.x0_px)), max(0, math.floor(box.y0_px))
    x1, y1 = min(image_size[0], math.ceil(box.x1_px)), min(image_size[1], math.ceil(box.y1_px))
    if x1 <= x0 or y1 <= y0:
        raise InputError(f"the box {edges} lies outside the image of {image_size[0]} × {image_size[1]} pixels")
    return x0, y0, x1, y1


def _embed(encoder: Encoder, images: Sequence[Image], corners: Sequence[tuple[int, int, int, int]], how: str) -> Tensor:
    visual = encoder.model.image_side()
    with torch.inference_mode():
        if how == "crop":
            found: Tensor = visual(image_batch(encoder, [i.crop(c) for i, c in zip(images, corners, strict=True)]))
            return found
        pixels = image_batch(encoder, images)
        if how == "cover":
            size = pixels.shape[-1]
            masks = torch.stack([_mask(encoder, i.size, c, size) for i, c in zip(images, corners, strict=True)])
            covered: Tensor = visual(pixels * masks[:, None].to(pixels))
            return covered
        vectors = patch_vectors(visual, pixels)
        rows, columns = vectors.shape[1:3]
        masks = torch.stack(
            [_mask(encoder, i.size, c, rows, columns) for i, c in zip(images, corners, strict=True)]
        ).to(vectors)
        return torch.einsum("brcd,brc->bd", vectors, masks) / masks.sum((1, 2))[:, None]


def _mask(
    encoder: Encoder,
    image_size: tuple[int, int],
    corner: tuple[int, int, int, int],
    rows: int,
    columns: int | None = None,
) -> Tensor:
    """Return the share of each cell of the model's grid that the box covers, (rows, columns), 0 to 1."""
    columns = rows if columns is None else columns
    left, top, right, bottom = model_view(encoder.preprocess_spec, image_size)
    x0, y0, x1, y1 = corner

    def cover(low: float, high: float, start: float, end: float, cells: int) -> Tensor:
        edges = torch.linspace(start, end, cells + 1, dtype=torch.float64)
        shared = torch.minimum(edges[1:], torch.tensor(high)) - torch.maximum(edges[:-1], torch.tensor(low))
        return shared.clamp(min=0) / (edges[1] - edges[0])

    mask = cover(y0, y1, top, bottom, rows)[:, None] * cover(x0, x1, left, right, columns)[None, :]
    if float(mask.sum()) <= 0:
        raise InputError("the box lies in a part of the image that the model's crop leaves out", hint="use how='crop'")
    return mask
