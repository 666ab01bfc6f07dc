"""CONCH, for histology, and the two variants its authors use: 224 pixels, and the space for probes.

References: Lu et al. 2024, "A visual-language foundation model for computational pathology"; repository
mahmoodlab/CONCH; hub repository MahmoodLab/conch.
"""

from __future__ import annotations

from dataclasses import replace

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.types import Preprocess

CONTEXT = 127  # and one place for the class token

_CONFIG = EncoderConfig(
    image=ImageTowerConfig(
        kind="named",
        source="conch",
        image_size=448,
        patch_size=16,
        options={"width": 768, "layers": 12, "heads": 12, "patch_size": 16, "output_dim": 512, "pool_heads": 8},
    ),
    text=TextTowerConfig(
        context_length=CONTEXT,
        vocab_size=32007,
        width=768,
        layers=12,
        heads=12,
        activation="gelu",
        pool="appended",
        cls_mask="published",
    ),
    projection=ProjectionConfig(dim=512),
    tokenizer={"kind": "huggingface", "source": "MahmoodLab/conch", "context_length": CONTEXT, "pad_token": "<pad>"},
    preprocess=Preprocess(size=448),
)


def with_corrected_class_mask(config: EncoderConfig) -> EncoderConfig:
    """Return CONCH with a class token that sees the text and itself, which is not what its weights were trained with."""
    return replace(config, text=replace(config.text, cls_mask="correct"))


_WEIGHTS = WeightSource(
    "repository mahmoodlab/CONCH, README.md and conch/open_clip_custom/factory.py",
    repository="MahmoodLab/conch",
    files=("pytorch_model.bin", "meta.yaml"),
    ask="accept the terms at https://huggingface.co/MahmoodLab/conch; the tokenizer is "
    "conch/open_clip_custom/tokenizers/conch_byte_level_bpe_uncased.json of the authors' repository: put it beside "
    "`pytorch_model.bin` as `tokenizer.json`",
)
_LICENCE = "CC-BY-NC-ND 4.0 (weights, code and tokenizer)"
_TEXT_SIDE = "the published class mask, shifted by one, is kept"
_SMALL = Preprocess(size=224)


def _entry(name: str, config: EncoderConfig, description: str, parameters: int) -> CatalogEntry:
    return CatalogEntry(
        name=name,
        config=config,
        layout="conch",
        weights=_WEIGHTS,
        licence=_LICENCE,
        gate="agreement",
        description=description,
        parameters=parameters,
    )


_AT_224 = replace(_CONFIG, image=replace(_CONFIG.image, image_size=224), preprocess=_SMALL)
_PROBE = replace(_CONFIG, sides="image", projection=ProjectionConfig(dim=512, image="none"))

ENTRIES = (
    _entry("conch", _CONFIG, f"CONCH for histology, 448 pixels; {_TEXT_SIDE}", 197_958_913),
    _entry("conch-224", _AT_224, "CONCH at 224 pixels, as in the authors' CRC100k notebook", 197_507_329),
    _entry(
        "conch-corrected",
        with_corrected_class_mask(_CONFIG),
        "CONCH with a class token that sees the text and itself: other embeddings than the published ones",
        197_958_913,
    ),
    _entry(
        "conch-probe",
        _PROBE,
        "CONCH's image vectors before the projection, which its authors use for probes",
        87_567_104,
    ),
)
