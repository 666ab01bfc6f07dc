"""ImageNet's usual backbones: ResNet-50, ConvNeXt-T and Swin-T, for probes and as a start of training.

References: torchvision ``models/resnet.py``, ``models/convnext.py``, ``models/swin_transformer.py``: the addresses of
the weights, and the resizing that belongs to them. The same names also read the files of timm and of the authors;
those were measured with other resizing (timm: bicubic, crop 0.875 to 0.95), which must then be stated by the user.
"""

from __future__ import annotations

from typing import Any, Literal

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig
from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.encoders.models.backbone import IMAGENET, TORCHVISION, image_backbone, resnet_backbone
from chiasm.types import Preprocess

_FILES = "https://download.pytorch.org/models"
_CONVNEXT = {
    "model_type": "convnext",
    "hidden_sizes": [96, 192, 384, 768],
    "depths": [3, 3, 9, 3],
    "num_stages": 4,
    "layer_norm_eps": 1e-6,  # of the last norm: transformers' own default is 1e-12
}
_SWIN = {
    "model_type": "swin",
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "image_size": 224,
    "patch_size": 4,
}


def _preprocess(resize_size: int, interpolation: Literal["bilinear", "bicubic"] = "bilinear") -> Preprocess:
    return Preprocess(size=224, resize_size=resize_size, interpolation=interpolation, **TORCHVISION, **IMAGENET)


def _transformers(name: str, config: dict[str, Any], preprocess: Preprocess) -> EncoderConfig:
    image = ImageTowerConfig(kind="huggingface", source=name, image_size=preprocess.size, options={"config": config})
    return image_backbone(image, 768, preprocess)


ENTRIES = (
    CatalogEntry(
        name="resnet50",
        config=resnet_backbone(_preprocess(232)),
        aliases=("torchvision/resnet50",),
        layout="torchvision_resnet",
        weights=WeightSource("torchvision models/resnet.py (IMAGENET1K_V2)", url=f"{_FILES}/resnet50-11ad3fa6.pth"),
    ),
    CatalogEntry(
        name="convnext-tiny",
        config=_transformers("convnext-tiny", _CONVNEXT, _preprocess(236)),
        aliases=("convnext_tiny",),
        layout="convnext",
        weights=WeightSource("torchvision models/convnext.py", url=f"{_FILES}/convnext_tiny-983f1562.pth"),
    ),
    CatalogEntry(
        name="swin-tiny",
        config=_transformers("swin-tiny", _SWIN, _preprocess(232, "bicubic")),
        aliases=("swin_t", "swin_tiny_patch4_window7_224"),
        layout="swin",
        weights=WeightSource("torchvision models/swin_transformer.py", url=f"{_FILES}/swin_t-704ceda3.pth"),
    ),
)
