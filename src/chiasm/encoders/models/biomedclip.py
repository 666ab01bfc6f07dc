"""BiomedCLIP: timm's ViT-B/16 and PubMedBERT, in open_clip's form.

References: the ``open_clip_config.json`` of its repository; Zhang et al. 2024, https://arxiv.org/abs/2303.00915.
"""

from __future__ import annotations

from typing import Any

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.entry import CatalogEntry, WeightSource

PUBMED_BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
#: BERT base with PubMedBERT's vocabulary.
BERT_BASE: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
#: Files of a repository in open_clip's form whose tokenizer is its own.
FILES = ("open_clip_pytorch_model.bin", "open_clip_config.json", "tokenizer*", "vocab.txt", "special_tokens_map.json")
#: A ViT as timm has it: exact GELU, epsilon 1e-6, no LayerNorm before the blocks; the class token behind the last one.
TIMM_VIT_B_16 = ImageTowerConfig(
    patch_size=16, width=768, layers=12, heads=12, activation="gelu", pre_norm=False, ln_eps=1e-6, patch_bias=True
)
CONFIG = EncoderConfig(
    image=TIMM_VIT_B_16,
    text=TextTowerConfig(
        kind="huggingface", source=PUBMED_BERT, context_length=256, pool="cls", options={"config": BERT_BASE}
    ),
    projection=ProjectionConfig(dim=512, text="mlp"),
    tokenizer={"kind": "huggingface", "source": PUBMED_BERT, "context_length": 256, "clean": "whitespace"},
)
_REPOSITORY = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
ENTRIES = (
    CatalogEntry(
        name="biomedclip",
        config=CONFIG,
        aliases=(_REPOSITORY,),
        layout="open_clip",
        weights=WeightSource(f"https://huggingface.co/{_REPOSITORY}", repository=_REPOSITORY, files=FILES),
        parameters=195_902_721,
    ),
)
