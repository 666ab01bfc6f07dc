"""What heat-map methods need from an encoder: its image tower untouched, pixels, and a direction for a text.

Nothing here changes the model: modes are restored, no parameter's ``requires_grad`` or ``grad`` is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.data.tokens import warn_if_cut
from chiasm.encoders.dual import ProjectedImageTower
from chiasm.encoders.resnet import ModifiedResNet
from chiasm.encoders.vit import VisionTransformer
from chiasm.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode, then give every module its own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def trunk_of(visual: nn.Module) -> nn.Module:
    """Return the tower itself, without a projection that stands behind it."""
    if isinstance(visual, ProjectedImageTower):
        trunk: nn.Module = visual.trunk
        return trunk
    return visual


def project(visual: nn.Module, features: Tensor) -> Tensor:
    """Return the tower's output in the joint space."""
    if isinstance(visual, ProjectedImageTower):
        projected: Tensor = visual.head(features)
        return projected
    return features


def natural_method(visual: nn.Module) -> str:
    """Return the method that suits a tower.

    Foreign towers get occlusion also where they have patch vectors: under pooling, the vector of a patch need not speak
    of what lies there (see ``methods``).
    """
    trunk = trunk_of(visual)
    if isinstance(trunk, ModifiedResNet):
        return "layer_cam"
    return "attention" if isinstance(trunk, VisionTransformer) else "occlusion"


def image_batch(encoder: Encoder, images: Sequence[Image]) -> Tensor:
    """Return the preprocessed pixels of images, on the encoder's device and in its type."""
    if not images:
        raise InputError("no image was given to explain")
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    return pixels.to(encoder.device, encoder.model.dtype)


def text_direction(encoder: Encoder, text: str | Sequence[str], against: Sequence[str] = ()) -> Tensor:
    """Return the direction that a text stands for, float32 (dim,).

    Several texts are an ensemble: their unit vectors are averaged and normalised again. With ``against``, the unit
    vector of those texts is subtracted, so that what both sides share drops out; the result is then not of unit norm.
    """
    positive = [text] if isinstance(text, str) else list(text)
    texts = [*positive, *against]
    if not positive or not all(t.strip() for t in texts):
        raise InputError("a heat map needs a text, got an empty one")
    tokens = warn_if_cut(encoder.tokenizer.encode(texts))
    with torch.inference_mode():  # by the model itself, as the map is: in float32, whatever the encoder's precision
        found = encoder.model.eval().encode_text(tokens.ids.to(encoder.device), tokens.lengths)
    unit = F.normalize(found.float(), dim=-1)
    direction = F.normalize(unit[: len(positive)].mean(0), dim=-1)
    if against:
        direction = direction - F.normalize(unit[len(positive) :].mean(0), dim=-1)
    return direction.clone()


def scores(embedded: Tensor, directions: Tensor) -> Tensor:
    """Return the dot products (batch,) of unit embeddings with their directions (batch, dim)."""
    return (F.normalize(embedded.float(), dim=-1) * directions).sum(-1)
