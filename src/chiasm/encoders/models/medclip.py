"""MedCLIP with its two image towers.

References: RyanWangZf/MedCLIP ``medclip/modeling_medclip.py``, ``medclip/dataset.py``, ``medclip/constants.py``; Wang et
al. 2022, "MedCLIP: Contrastive learning from unpaired medical images and text". Both zip archives hold one
``pytorch_model.bin``; the vocabulary of BioClinicalBERT is not in them.
"""

from __future__ import annotations

from dataclasses import replace

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.types import Preprocess

_MEAN, _STD = 0.5862785803043838, 0.27950088968644304
#: One grey channel, repeated; ``pad_square`` pads small images instead of enlarging them. This is ``MedCLIPProcessor``,
#: which users call; ``ZeroShotImageDataset``, with which the authors evaluated, resizes with the bilinear filter.
PREPROCESS = Preprocess(resize="pad_square", crop="none", grey=True, mean=(_MEAN,) * 3, std=(_STD,) * 3)
BIO_CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"
#: microsoft/swin-tiny-patch4-window7-224
_SWIN_TINY = {
    "model_type": "swin", "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7,
    "image_size": 224, "patch_size": 4,
}  # fmt: skip


def _medclip(image: ImageTowerConfig) -> EncoderConfig:
    return EncoderConfig(
        image=image,
        text=TextTowerConfig(kind="named", source="medclip", context_length=77),
        projection=ProjectionConfig(dim=512),
        tokenizer={"kind": "huggingface", "source": BIO_CLINICAL_BERT, "context_length": 77},
        preprocess=PREPROCESS,
    )


def with_masked_mean(config: EncoderConfig) -> EncoderConfig:
    """Return MedCLIP with a text tower that leaves padding out, so that a text has one vector: not the published one."""
    return replace(config, text=replace(config.text, options={**config.text.options, "masked_mean": True}))


def _entries(name: str, config: EncoderConfig, file: str, aliases: tuple[str, ...]) -> tuple[CatalogEntry, ...]:
    url = f"https://storage.googleapis.com/pytrial/{file}"
    published = CatalogEntry(
        name=name,
        config=config,
        aliases=aliases,
        layout="medclip",
        weights=WeightSource("RyanWangZf/MedCLIP medclip/constants.py", url=url),
    )
    corrected = replace(
        published,
        name=f"{name}-masked",
        config=with_masked_mean(config),
        aliases=(),
        description="MedCLIP whose text vectors leave padding out: other vectors than the published ones",
    )
    evaluated = replace(
        published,
        name=f"{name}-bilinear",
        config=replace(config, preprocess=replace(PREPROCESS, interpolation="bilinear")),
        aliases=(),
        description="MedCLIP with the bilinear resize of its authors' evaluation; their processor for users is bicubic",
    )
    return published, corrected, evaluated


_SWIN = ImageTowerConfig(
    kind="huggingface", source="microsoft/swin-tiny-patch4-window7-224", options={"config": _SWIN_TINY}
)
_RESNET = ImageTowerConfig(kind="named", source="classic_resnet")
ENTRIES = (
    *_entries("medclip-swin", _medclip(_SWIN), "medclip-vit-pretrained.zip", ("medclip", "medclip-vit", "medclip-2d")),
    *_entries("medclip-resnet", _medclip(_RESNET), "medclip-pretrained.zip", ()),
)
