"""QuiltNet: three models of histopathology in open_clip's form, tuned on Quilt-1M.

References: wisdomik/Quilt1M; Ikezogwo et al. 2023, https://arxiv.org/abs/2306.11207. The two with CLIP's text tower
were tuned from OpenAI's weights, hence with QuickGELU; where a folder states an activation, the folder counts.
"""

from __future__ import annotations

from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.encoders.models import biomedclip
from chiasm.encoders.models.openai import ARCHITECTURES


def _entry(size: str, config: EncoderConfig, parameters: int, files: tuple[str, ...]) -> CatalogEntry:
    repository = f"wisdomik/QuiltNet-{size}"
    return CatalogEntry(
        name=f"quiltnet-{size.lower()}",
        config=config,
        aliases=(repository,),
        layout="open_clip",
        weights=WeightSource(f"https://huggingface.co/{repository}", repository=repository, files=files),
        parameters=parameters,
    )


_CLIP_FILES = ("open_clip_pytorch_model.bin", "open_clip_config.json")
ENTRIES = (
    _entry("B-32", ARCHITECTURES["ViT-B-32-quickgelu"], 151_277_313, _CLIP_FILES),
    _entry("B-16", ARCHITECTURES["ViT-B-16-quickgelu"], 149_620_737, _CLIP_FILES),
    _entry("B-16-PMB", biomedclip.CONFIG, 195_902_721, biomedclip.FILES),
)
