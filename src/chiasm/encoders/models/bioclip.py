"""BioCLIP: OpenAI's ViT-B/16, tuned on the tree of life. A model of biodiversity, not of medicine.

References: Imageomics/bioclip ``slurm/train.sh`` (trained with ``--pretrained openai``, hence with QuickGELU); Stevens
et al. 2024, https://arxiv.org/abs/2311.18803. Where its folder states an activation, the folder counts.
"""

from __future__ import annotations

from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.encoders.models.openai import ARCHITECTURES

_REPOSITORY = "imageomics/bioclip"
ENTRIES = (
    CatalogEntry(
        name="bioclip",
        config=ARCHITECTURES["ViT-B-16-quickgelu"],
        aliases=(_REPOSITORY,),
        layout="open_clip",
        weights=WeightSource(
            f"https://huggingface.co/{_REPOSITORY}",
            repository=_REPOSITORY,
            files=("open_clip_pytorch_model.bin", "open_clip_config.json"),
        ),
        parameters=149_620_737,
    ),
)
