"""UNI and UNI2-h, pathology: image encoders of Mahmood Lab.

References: mahmoodlab/UNI ``uni/get_encoder/get_encoder.py`` (architecture, ImageNet's statistics, bilinear resizing of
the shorter side, centre crop); Chen et al. 2024, https://doi.org/10.1038/s41591-024-02857-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.encoders.models.backbone import IMAGENET, LARGE, TORCHVISION, vit_backbone
from chiasm.types import Preprocess

_PREPROCESS = Preprocess(size=224, interpolation="bilinear", **TORCHVISION, **IMAGENET)
_SOURCE = "mahmoodlab/UNI uni/get_encoder/get_encoder.py"
#: timm's packed SwiGLU: the hidden width of both halves together is 8192.
_UNI2: Mapping[str, Any] = {"registers": 8, "activation": "swiglu", "mlp_ratio": 2.66667 * 2}

ENTRIES = (
    CatalogEntry(
        name="uni",
        config=vit_backbone(LARGE, 16, _PREPROCESS, layer_scale=True),
        aliases=("MahmoodLab/UNI", "uni-l16"),
        layout="timm_vit",
        weights=WeightSource(_SOURCE, repository="MahmoodLab/UNI", files=("pytorch_model.bin",)),
        gate="agreement",
        parameters=303_350_784,
    ),
    CatalogEntry(
        name="uni2-h",
        config=vit_backbone({"width": 1536, "layers": 24}, 14, _PREPROCESS, layer_scale=True, **_UNI2),
        aliases=("MahmoodLab/UNI2-h",),
        layout="timm_vit",
        weights=WeightSource(_SOURCE, repository="MahmoodLab/UNI2-h", files=("pytorch_model.bin",)),
        gate="agreement",
    ),
)
