"""OpenAI's six CLIP models, and the architectures that open_clip names after them.

References: openai/CLIP ``clip/model.py`` and ``clip/clip.py``; Radford et al. 2021, https://arxiv.org/abs/2103.00020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.types import Preprocess


def _clip(image: Mapping[str, Any], *, dim: int, width: int = 512) -> EncoderConfig:
    """OpenAI's shape: a text tower of 12 blocks, 64 channels a head, QuickGELU in both towers."""
    tower = ImageTowerConfig(**image)
    return EncoderConfig(
        image=tower,
        text=TextTowerConfig(width=width, layers=12, heads=width // 64),
        projection=ProjectionConfig(dim=dim),
        preprocess=Preprocess(size=tower.image_size),
    )


def _vit(patch_size: int, *, large: bool = False, image_size: int = 224) -> EncoderConfig:
    size = {"width": 1024, "layers": 24, "heads": 16} if large else {"width": 768, "layers": 12, "heads": 12}
    image = {"kind": "vit", "patch_size": patch_size, "image_size": image_size, **size}
    return _clip(image, dim=768 if large else 512, width=768 if large else 512)


def _resnet(*layers: int, dim: int) -> EncoderConfig:
    return _clip({"kind": "resnet", "layers": layers, "width": 64, "heads": 32}, dim=dim)


#: open_clip's names with QuickGELU, OpenAI's activation.
_OPENAI: Mapping[str, EncoderConfig] = {
    "ViT-B-32": _vit(32),
    "ViT-B-16": _vit(16),
    "ViT-L-14": _vit(14, large=True),
    "ViT-L-14-336": _vit(14, large=True, image_size=336),
    "RN50": _resnet(3, 4, 6, 3, dim=1024),
    "RN101": _resnet(3, 4, 23, 3, dim=512),
}


def with_gelu(config: EncoderConfig) -> EncoderConfig:
    """Return a configuration with exact GELU in both towers: what open_clip's plain names mean."""
    return replace(
        config,
        image=replace(config.image, activation="gelu"),
        text=replace(config.text, activation="gelu"),
    )


#: open_clip's architecture names: without a suffix GELU, with ``-quickgelu`` OpenAI's activation.
ARCHITECTURES: Mapping[str, EncoderConfig] = {
    **{name: with_gelu(config) for name, config in _OPENAI.items()},
    **{f"{name}-quickgelu": config for name, config in _OPENAI.items()},
}

_ADDRESSES = "openai/CLIP clip/clip.py: the address holds the file's SHA-256"


def _entry(architecture: str, digest: str) -> CatalogEntry:
    file = {"ViT-L-14-336": "ViT-L-14-336px"}.get(architecture, architecture)
    own = {"ViT-L-14-336": "ViT-L/14@336px"}.get(architecture, architecture.replace("-", "/").replace("ViT/", "ViT-"))
    name = f"openai/{file}"
    url = f"https://openaipublic.azureedge.net/clip/models/{digest}/{file}.pt"
    return CatalogEntry(
        name=name,
        config=_OPENAI[architecture],
        aliases=tuple(sorted({own, f"openai/{own}", f"openai/{architecture}"} - {name, architecture})),
        weights=WeightSource(_ADDRESSES, url=url, sha256=digest),
    )


ENTRIES = (
    _entry("ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    _entry("ViT-B-16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    _entry("ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    _entry("ViT-L-14-336", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
    _entry("RN50", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    _entry("RN101", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
)
