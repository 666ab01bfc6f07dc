"""A BERT whose hidden layers are read: what the text towers of MedCLIP and GLoRIA stand on.

In: a tower's options. Out: transformers' ``BertModel`` without its pooler, which none of them reads. The default is
BioClinicalBERT's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.errors import ConfigError

#: Width, blocks, attention heads, hidden width of the MLP, rows of the word and of the position embedding.
BERT_OPTIONS: Mapping[str, Any] = {
    "width": 768, "layers": 12, "heads": 12, "mlp_width": 3072, "vocab_size": 28996, "positions": 512,
}  # fmt: skip


def build_bert(options: Mapping[str, Any], context_length: int) -> nn.Module:
    """Return a ``BertModel`` with drawn weights.

    Args:
        options: All of :data:`BERT_OPTIONS`.
        context_length: Tokens that it must be able to read.

    Raises:
        ConfigError: Widths that do not fit, or too few positions.
    """
    from transformers import BertConfig, BertModel

    if options["width"] % options["heads"]:
        raise ConfigError(
            f"`text.options.heads` must divide the width {options['width']}, got {options['heads']}",
            hint="BioClinicalBERT has 12 heads",
        )
    if context_length > options["positions"]:
        raise ConfigError(
            f"`text.context_length` is {context_length}, the tower reads at most {options['positions']} tokens"
        )
    config = BertConfig(
        vocab_size=options["vocab_size"],
        hidden_size=options["width"],
        num_hidden_layers=options["layers"],
        num_attention_heads=options["heads"],
        intermediate_size=options["mlp_width"],
        max_position_embeddings=options["positions"],
    )
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


def hidden_layers(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Return the embeddings and the output of every block, each (batch, tokens, width)."""
    output: Any = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    layers: tuple[Tensor, ...] = output.hidden_states
    return layers


def no_rows(ids: Tensor, width: int, model: nn.Module) -> Tensor:
    """Return an empty batch of vectors, which transformers' attention cannot make."""
    return torch.zeros(0, width, device=ids.device, dtype=next(model.parameters()).dtype)
