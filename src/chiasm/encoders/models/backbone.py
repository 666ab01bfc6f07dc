"""How backbones of one side are declared: a tower without projection, its statistics, and no logit scale.

In: shapes. Out: :class:`EncoderConfig` with ``sides``. No entries of the catalog stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.types import Preprocess

IMAGENET: Mapping[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF: Mapping[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
#: torchvision's ``Resize`` and ``CenterCrop`` on an RGB image of Pillow; the filter is what differs.
TORCHVISION: Mapping[str, Any] = {"rgb": "before_resize", "crop_rounding": "even"}
#: Width and blocks of the usual ViTs; all have 64 channels a head.
SMALL, BASE, LARGE = {"width": 384, "layers": 12}, {"width": 768, "layers": 12}, {"width": 1024, "layers": 24}


def image_backbone(image: ImageTowerConfig, dim: int, preprocess: Preprocess) -> EncoderConfig:
    """Return the declaration of an image tower whose own output is the embedding."""
    return EncoderConfig(
        image=image,
        projection=ProjectionConfig(dim=dim, image="none", text="none"),
        preprocess=preprocess,
        sides="image",
        scale="none",
    )


def vit_backbone(
    size: Mapping[str, Any], patch_size: int, preprocess: Preprocess, *, ln_eps: float = 1e-6, **options: Any
) -> EncoderConfig:
    """Return timm's and DINO's ViT: exact GELU, biased patches, no norm before the blocks, class token.

    Args:
        size: Width and layers.
        patch_size: In pixels.
        preprocess: Its ``size`` is the input's.
        ln_eps: Of every LayerNorm; timm's, DINO's and DINOv2's is 1e-6, transformers' 1e-12.
        options: Other fields of :class:`ImageTowerConfig`.
    """
    image = {"activation": "gelu", "pre_norm": False, "patch_bias": True, "ln_eps": ln_eps, **options}
    tower = ImageTowerConfig(patch_size=patch_size, image_size=preprocess.size, **size, **image)
    return image_backbone(tower, size["width"], preprocess)


def resnet_backbone(preprocess: Preprocess) -> EncoderConfig:
    """Return torchvision's ResNet-50: the mean of its last map, 2048 numbers."""
    image = ImageTowerConfig(kind="named", source="classic_resnet", image_size=preprocess.size)
    return image_backbone(image, 2048, preprocess)


def text_backbone(text: TextTowerConfig, dim: int, tokenizer: Mapping[str, Any]) -> EncoderConfig:
    """Return the declaration of a text tower whose own output is the embedding."""
    return EncoderConfig(
        text=text,
        projection=ProjectionConfig(dim=dim, image="none", text="none"),
        tokenizer=tokenizer,
        sides="text",
        scale="none",
    )
