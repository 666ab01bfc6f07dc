"""BioViL, BioViL-T and their text model CXR-BERT, for chest radiographs and their reports.

References: Boecking et al. 2022; Bannur et al. 2023; microsoft/hi-ml, hi-ml-multimodal (``image/model/pretrained.py``
names the files and revisions).
"""

from __future__ import annotations

from typing import Any

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.types import Preprocess

_SPECIALIZED = "microsoft/BiomedVLP-CXR-BERT-specialized"
_TEMPORAL = "microsoft/BiomedVLP-BioViL-T"
_TOKENIZER_FILES = ("config.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
_SOURCE = "microsoft/hi-ml, hi-ml-multimodal/src/health_multimodal/image/model/pretrained.py"


def _preprocess(size: int) -> Preprocess:
    """The whole range of grey values, 512 pixels, the centre; no normalisation."""
    return Preprocess(
        size=size,
        resize_size=512,
        interpolation="bilinear",
        grey=True,
        stretch="min_max",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def _config(repository: str, *, size: int, temporal: bool) -> EncoderConfig:
    options = {"layers": [3, 4, 6, 3], "width": 64, "output_dim": 128, "temporal": temporal}
    return EncoderConfig(
        image=ImageTowerConfig(kind="named", source="biovil", image_size=size, options=options),
        text=_text(),
        projection=ProjectionConfig(dim=128, image="none", text="none"),
        tokenizer=_tokenizer(repository),
        preprocess=_preprocess(size),
        scale="none",
    )


def _text() -> TextTowerConfig:
    """BERT-base; the file states the size of the vocabulary."""
    options = {"width": 768, "layers": 12, "heads": 12, "output_dim": 128}
    return TextTowerConfig(kind="named", source="cxr_bert", context_length=512, pool="cls", options=options)


def _tokenizer(repository: str) -> dict[str, Any]:
    """Marks at the end of a prompt are removed, and a text that is too long is refused, as the authors' code does."""
    return {
        "kind": "huggingface", "source": repository, "context_length": 512, "pad_token": "[PAD]",
        "clean": "end_marks", "too_long": "refuse",
    }  # fmt: skip


ENTRIES = (
    CatalogEntry(
        name="biovil",
        config=_config(_SPECIALIZED, size=480, temporal=False),
        layout="biovil",
        weights=WeightSource(
            _SOURCE,
            repository=_SPECIALIZED,
            files=("biovil_image_resnet50_proj_size_128.pt", "pytorch_model.bin", *_TOKENIZER_FILES),
            revision="v1.1",
        ),
        licence="MIT",
        description="BioViL: ResNet-50 and CXR-BERT for frontal chest radiographs and radiology reports",
        parameters=0,
    ),
    CatalogEntry(
        name="biovil-t",
        config=_config(_TEMPORAL, size=448, temporal=True),
        layout="biovil",
        weights=WeightSource(
            _SOURCE,
            repository=_TEMPORAL,
            files=("biovil_t_image_model_proj_size_128.pt", "pytorch_model.bin", *_TOKENIZER_FILES),
            revision="v1.0",
        ),
        licence="MIT",
        description="BioViL-T: as BioViL, and it may compare a radiograph with an earlier one of the same patient",
        parameters=0,
    ),
    CatalogEntry(
        name="cxr-bert",
        config=EncoderConfig(
            text=_text(),
            projection=ProjectionConfig(dim=128, text="none"),
            tokenizer=_tokenizer(_SPECIALIZED),
            sides="text",
        ),
        layout="cxr_bert",
        weights=WeightSource(
            _SOURCE, repository=_SPECIALIZED, files=("pytorch_model.bin", *_TOKENIZER_FILES), revision="v1.1"
        ),
        licence="MIT",
        description="CXR-BERT: BERT for radiology reports, its sentence vectors those of BioViL's joint space",
        parameters=0,
    ),
)
