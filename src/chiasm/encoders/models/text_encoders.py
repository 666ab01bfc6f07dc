"""Text encoders without an image side: medical BERTs, BioMegatron and T5, for training and for texts alone.

References: the hub's repositories named below; transformers ``models/bert``, ``models/megatron_bert``, ``models/t5``.
The embedding is the mean over a text's own tokens, padding left out; a recipe may choose another pooling.

BioMegatron has no repository that could be confirmed, so weights and vocabulary are the user's own, from a folder.
"""

from __future__ import annotations

from typing import Any

from chiasm.encoders.base import TextTowerConfig
from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.encoders.models.backbone import text_backbone

#: What ``BertConfig`` and ``MegatronBertConfig`` do not have as their default is stated.
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "config.json",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
)
CONTEXT = 512


def _entry(
    name: str,
    model: dict[str, Any],
    width: int,
    *,
    repository: str = "",
    aliases: tuple[str, ...] = (),
    layout: str = "bert",
    pad_token: str = "[PAD]",
) -> CatalogEntry:
    source = repository or name
    text = TextTowerConfig(
        kind="huggingface", source=source, context_length=CONTEXT, pool="mean", options={"config": model}
    )
    tokenizer = {"kind": "huggingface", "source": source, "context_length": CONTEXT, "pad_token": pad_token}
    weights = WeightSource(f"hub repository {repository}", repository=repository, files=_FILES) if repository else None
    return CatalogEntry(
        name=name,
        config=text_backbone(text, width, tokenizer),
        aliases=(*((repository,) if repository else ()), *aliases),
        layout=layout,
        weights=weights,
    )


ENTRIES = (
    _entry(
        "bioclinicalbert",
        {"model_type": "bert", "vocab_size": 28996, **_BASE},
        768,
        repository="emilyalsentzer/Bio_ClinicalBERT",
    ),
    _entry(
        "pubmedbert",
        {"model_type": "bert", "vocab_size": 30522, **_BASE},
        768,
        repository="microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
        aliases=("microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract",),
    ),
    _entry(
        "bluebert",
        {"model_type": "bert", "vocab_size": 30522, **_BASE},
        768,
        repository="bionlp/bluebert_pubmed_mimic_uncased_L-12_H-768_A-12",
    ),
    _entry("biomegatron", {"model_type": "megatron-bert", **_LARGE}, 1024, layout="megatron_bert"),
    _entry(
        "t5-base",
        {"model_type": "t5", "vocab_size": 32128, **_T5_BASE},
        768,
        repository="google-t5/t5-base",
        layout="t5",
        pad_token="<pad>",
    ),
)
