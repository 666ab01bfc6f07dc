"""DINO and DINOv2 of facebookresearch: image encoders without labels, natural images.

References: facebookresearch/dino ``hubconf.py``, ``eval_linear.py`` (resize 256 bicubic, crop 224, ImageNet's
statistics) and ``vision_transformer.py``; facebookresearch/dinov2 ``hub/backbones.py``, ``data/transforms.py`` (the
same resizing) and ``models/vision_transformer.py``. Caron et al. 2021; Oquab et al. 2024; Darcet et al. 2024.

DINOv2's weights have positions for 518 px, resized here to 224 px by the rule of the model's own code: with an offset
of 0.1 and without antialiasing, except for the models with registers, which use neither (as timm does it for all).
"""

from __future__ import annotations

from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.encoders.models.backbone import BASE, IMAGENET, LARGE, SMALL, TORCHVISION, vit_backbone
from chiasm.types import Preprocess

_PREPROCESS = Preprocess(size=224, resize_size=256, interpolation="bicubic", **TORCHVISION, **IMAGENET)
_FILES = "https://dl.fbaipublicfiles.com"


def _dino(name: str, file: str, size: dict[str, int], patch_size: int) -> CatalogEntry:
    return CatalogEntry(
        name=f"dino-{name}",
        config=vit_backbone(size, patch_size, _PREPROCESS),
        aliases=(f"dino_{name}",),
        layout="dino_vit",
        weights=WeightSource("facebookresearch/dino hubconf.py", url=f"{_FILES}/dino/{file}/{file}.pth"),
    )


def _dinov2(name: str, size: dict[str, int], *, registers: bool = False) -> CatalogEntry:
    model = f"dinov2_{name}"
    file = f"{model}_reg4_pretrain" if registers else f"{model}_pretrain"
    suffix = "-reg" if registers else ""
    return CatalogEntry(
        name=f"dinov2-{name}{suffix}",
        config=vit_backbone(size, 14, _PREPROCESS, layer_scale=True, registers=4 if registers else 0),
        aliases=(f"{model}{suffix.replace('-', '_')}",),
        layout="timm_vit" if registers else "dino_vit",
        weights=WeightSource("facebookresearch/dinov2 hub/backbones.py", url=f"{_FILES}/dinov2/{model}/{file}.pth"),
    )


ENTRIES = (
    _dino("vits8", "dino_deitsmall8_pretrain", SMALL, 8),
    _dino("vits16", "dino_deitsmall16_pretrain", SMALL, 16),
    _dino("vitb8", "dino_vitbase8_pretrain", BASE, 8),
    _dino("vitb16", "dino_vitbase16_pretrain", BASE, 16),
    _dinov2("vits14", SMALL),
    _dinov2("vits14", SMALL, registers=True),
    _dinov2("vitb14", BASE),
    _dinov2("vitb14", BASE, registers=True),
    _dinov2("vitl14", LARGE),
    _dinov2("vitl14", LARGE, registers=True),
)
