"""kaiko.ai's pathology models, which CLIP-IT calls VITS_8, VITS_16, VITB_8, VITB_16 and DINOL14.

References: kaiko-ai/towards_large_pathology_fms ``hubconf.py`` and ``README.md``; https://arxiv.org/abs/2404.15217.

Deviation: their README resizes the image as a tensor, chiasm with Pillow; a pixel differs by at most 1 of 255. Their
``vitl14`` was trained at 518 px; here, as in CLIP-IT, its positions are resized to 224 px as timm does it.
"""

from __future__ import annotations

from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.encoders.models.backbone import BASE, HALF, LARGE, SMALL, TORCHVISION, vit_backbone
from chiasm.types import Preprocess

_PREPROCESS = Preprocess(size=224, interpolation="bilinear", **TORCHVISION, **HALF)
_RELEASE = "https://github.com/kaiko-ai/towards_large_pathology_fms/releases/download/0.0.1"
_REGISTERS = {"layer_scale": True, "registers": 4}


def _entry(name: str, clip_it: str, size: dict[str, int], patch_size: int, **options: object) -> CatalogEntry:
    return CatalogEntry(
        name=f"kaiko-{name}",
        config=vit_backbone(size, patch_size, _PREPROCESS, **options),  # type: ignore[arg-type]
        aliases=(clip_it,),
        layout="timm_vit",
        weights=WeightSource("kaiko-ai/towards_large_pathology_fms hubconf.py", url=f"{_RELEASE}/{name}.pth"),
    )


ENTRIES = (
    _entry("vits8", "VITS_8", SMALL, 8),
    _entry("vits16", "VITS_16", SMALL, 16),
    _entry("vitb8", "VITB_8", BASE, 8),
    _entry("vitb16", "VITB_16", BASE, 16),
    _entry("vitl14", "DINOL14", LARGE, 14, **_REGISTERS),
)
