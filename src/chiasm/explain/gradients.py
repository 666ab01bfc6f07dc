"""Maps from gradients of the image–text cosine: Grad-CAM and LayerCAM for CLIP's ResNet, weighted attention for its ViT.

Gradients are taken with respect to one inner tensor only, so parameters keep their ``grad`` and ``requires_grad``, and
locked towers are explained like any other. Callers may be in ``no_grad`` or ``inference_mode``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chiasm.encoders.resnet import ModifiedResNet
from chiasm.encoders.vit import VisionTransformer
from chiasm.errors import InputError
from chiasm.explain.towers import project, scores, trunk_of


def grad_cam(visual: nn.Module, pixels: Tensor, directions: Tensor) -> Tensor:
    """Return Grad-CAM of the last stage for the image–text cosine: (batch, rows, columns), not negative.

    Each channel of the last feature map is weighted by the mean gradient of the cosine with respect to it; the weighted
    sum is cut at zero.

    Args:
        visual: Image tower in eval mode, with CLIP's ResNet in it.
        pixels: (batch, 3, size, size).
        directions: (batch, dim), one a picture.

    Raises:
        InputError: When the tower is no CLIP ResNet.

    References:
        Selvaraju et al. 2017, equations 1 and 2, https://arxiv.org/abs/1610.02391. Deviation: the target is the cosine
        with a text, not the score of a class.
    """
    features, gradient = _last_stage(visual, pixels, directions)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * features).sum(1).relu().float()


def layer_cam(visual: nn.Module, pixels: Tensor, directions: Tensor) -> Tensor:
    """Return LayerCAM of the last stage for the image–text cosine: (batch, rows, columns), not negative.

    Each value of the last feature map is weighted by its own gradient, cut at zero. Grad-CAM gives one weight to a whole
    channel, which suits average pooling; under CLIP's attention pooling the gradient differs from place to place.

    Args:
        visual: Image tower in eval mode, with CLIP's ResNet in it.
        pixels: (batch, 3, size, size).
        directions: (batch, dim), one a picture.

    Raises:
        InputError: When the tower is no CLIP ResNet.

    References:
        Jiang et al. 2021, "LayerCAM", equations 5 and 6, https://doi.org/10.1109/TIP.2021.3089943. Deviations: the
        target is a cosine; one stage is drawn, and earlier ones are not fused with it.
    """
    features, gradient = _last_stage(visual, pixels, directions)
    return (gradient.relu() * features).sum(1).relu().float()


def _last_stage(visual: nn.Module, pixels: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last feature map and the gradient of the image–text cosine with respect to it."""
    trunk = trunk_of(visual)
    if not isinstance(trunk, ModifiedResNet):
        raise InputError(
            "class activation maps need the feature map of a `resnet` tower",
            hint="`auto` takes a method that fits the model",
        )
    with torch.inference_mode(False):
        with torch.no_grad():
            features = trunk.forward_features(pixels.clone())
        features = features.detach().requires_grad_()
        with torch.enable_grad():
            target = scores(project(visual, trunk.pool(features)), directions.clone()).sum()
            (gradient,) = torch.autograd.grad(target, features)
        return features.detach(), gradient


def attention_relevance(visual: nn.Module, pixels: Tensor, directions: Tensor) -> Tensor:
    """Return the relevance of every patch for the image–text cosine: (batch, rows, columns), not negative.

    Every block's attention is weighted by the gradient of the cosine, cut at zero and averaged over heads; the blocks
    are chained as R ← R + A·R from the identity. A class-token model is read at the class token; one that averages its
    patches is read at the mean of all patches, without their own share.

    Args:
        visual: Image tower in eval mode, with CLIP's ViT in it.
        pixels: (batch, 3, size, size).
        directions: (batch, dim), one a picture.

    Raises:
        InputError: When the tower is no CLIP ViT.

    References:
        Chefer, Gur and Wolf 2021, equations 5 and 6, https://arxiv.org/abs/2103.15679, and their CLIP notebook.
        Deviations: the target is a cosine, not a logit; mean-pooled models, which the paper leaves out, are read as
        said above, and so are models with an attention pooler (its own weights are left out).
    """
    trunk = trunk_of(visual)
    if not isinstance(trunk, VisionTransformer):
        raise InputError(
            "weighted attention needs the attention of a `vit` tower", hint="`auto` takes a method that fits the model"
        )
    with torch.inference_mode(False), torch.enable_grad():
        found = trunk.forward_features(pixels.clone().requires_grad_(), return_attention=True)
        target = scores(project(visual, found.pooled), directions.clone()).sum()
        gradients = torch.autograd.grad(target, found.attentions, allow_unused=True)
    with torch.no_grad():
        tokens = found.attentions[0].shape[-1]
        relevance = torch.eye(tokens, device=pixels.device).expand(len(pixels), -1, -1)
        for attention, gradient in zip(found.attentions, gradients, strict=True):
            if gradient is None:
                continue
            weighted = (gradient * attention).float().relu().mean(1)
            relevance = relevance + weighted @ relevance
        relevance = relevance - torch.eye(tokens, device=pixels.device)
        row = relevance[:, 0] if trunk.pool == "cls" else relevance[:, trunk.first_patch :].mean(1)
        return row[:, trunk.first_patch :].reshape(len(pixels), trunk.grid, trunk.grid)
