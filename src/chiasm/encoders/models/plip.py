"""PLIP: OpenAI's ViT-B/32, tuned on pathology from Twitter; a folder of transformers, or a state dict in OpenAI's keys.

References: PathologyFoundation/plip ``reproducibility/factory.py``; Huang et al. 2023, Nature Medicine 29.
"""

from __future__ import annotations

from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.encoders.models.openai import ARCHITECTURES

_REPOSITORY = "vinid/plip"
ENTRIES = (
    CatalogEntry(
        name="plip",
        config=ARCHITECTURES["ViT-B-32-quickgelu"],
        aliases=(_REPOSITORY,),
        layout="openai",
        weights=WeightSource(
            f"https://huggingface.co/{_REPOSITORY}",
            repository=_REPOSITORY,
            files=("pytorch_model.bin", "config.json", "preprocessor_config.json"),
        ),
        parameters=151_277_313,
    ),
)
