"""Histology backbones of others: Lunit's and Owkin's, and the two generic names for a user's own.

References: lunit-io/benchmark-ssl-pathology ``README.md`` and the notes of its release ``pretrained-weights``
(statistics), Kang et al. 2023; owkin/HistoSSLscaling ``rl_benchmarks/models/feature_extractors/ibot_vit.py``, hub
repository owkin/phikon, Filiot et al. 2023.

``histo-vit`` and ``histo-resnet`` are no publications: no model "HistoViT" or "HistoResNet" is known. They read a
user's own histology-pretrained ViT (names of timm, DINO or DINOv2) or ResNet, whose shape is taken from its tensors:
``load(path, family="histo-vit")``.
"""

from __future__ import annotations

from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.encoders.models.backbone import BASE, IMAGENET, SMALL, TORCHVISION, resnet_backbone, vit_backbone
from chiasm.types import Preprocess

_LUNIT = "https://github.com/lunit-io/benchmark-ssl-pathology/releases/download/pretrained-weights"
_LUNIT_SOURCE = "lunit-io/benchmark-ssl-pathology README.md"
#: Lunit publishes the statistics and no resizing; torchvision's usual filter is taken.
LUNIT_PREPROCESS = Preprocess(
    size=224,
    interpolation="bilinear",
    mean=(0.70322989, 0.53606487, 0.66096631),
    std=(0.21716536, 0.26081574, 0.20723464),
    **TORCHVISION,
)
_PHIKON = Preprocess(size=224, resize="squash", crop="none", interpolation="bilinear", rgb="before_resize", **IMAGENET)
_OWN = Preprocess(size=224, interpolation="bilinear", **TORCHVISION, **IMAGENET)

ENTRIES = (
    CatalogEntry(
        name="lunit-vits16",
        config=vit_backbone(SMALL, 16, LUNIT_PREPROCESS),
        aliases=("lunit-dino-p16",),
        layout="timm_vit",
        weights=WeightSource(_LUNIT_SOURCE, url=f"{_LUNIT}/dino_vit_small_patch16_ep200.torch"),
    ),
    CatalogEntry(
        name="lunit-resnet50",
        config=resnet_backbone(LUNIT_PREPROCESS),
        aliases=("lunit-bt-rn50",),
        layout="torchvision_resnet",
        weights=WeightSource(_LUNIT_SOURCE, url=f"{_LUNIT}/bt_rn50_ep200.torch"),
    ),
    CatalogEntry(
        name="phikon",
        config=vit_backbone(BASE, 16, _PHIKON, ln_eps=1e-12),
        aliases=("owkin/phikon",),
        layout="huggingface_vit",
        weights=WeightSource(
            "owkin/HistoSSLscaling README.md",
            repository="owkin/phikon",
            files=("model.safetensors", "pytorch_model.bin", "config.json", "preprocessor_config.json"),
        ),
    ),
    CatalogEntry(
        name="histo-vit",
        config=vit_backbone(SMALL, 16, _OWN),
        aliases=("histovit",),
        layout="own_vit",
        description="a user's own histology-pretrained ViT; no published model of this name is known",
    ),
    CatalogEntry(
        name="histo-resnet",
        config=resnet_backbone(_OWN),
        aliases=("historesnet",),
        layout="own_resnet",
        description="a user's own histology-pretrained ResNet; no published model of this name is known",
    ),
)
