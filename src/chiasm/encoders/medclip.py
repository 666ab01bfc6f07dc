"""MedCLIP's text tower (Wang et al. 2022): the mean of three layers of BioClinicalBERT over all positions.

In: ids and mask (batch, tokens). Out: (batch, ``output_dim``), before the projection. MedCLIP averages over padding too,
so a text's vector depends on how far its batch is padded. MedCLIP pads a list of texts to its longest one (at most 77
tokens); here that list is what one call gets: ``encoder.encode_text(prompts)`` of all prompts of a class gives the
published vectors, while ``encode`` and ``embed`` pad each of their batches to its own longest text. With the option
``masked_mean`` padding is left out, so that a text has one vector: the one that MedCLIP gives to the text alone.

References: RyanWangZf/MedCLIP ``medclip/modeling_medclip.py`` (``MedCLIPTextModel``) and ``medclip/dataset.py``
(``padding=True``). Deviation: none, unless ``masked_mean`` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.encoders.base import TextTowerConfig
from chiasm.encoders.bert import BERT_OPTIONS, build_bert, hidden_layers, no_rows
from chiasm.encoders.named import tower_options

TEXT_OPTIONS: Mapping[str, Any] = {**BERT_OPTIONS, "masked_mean": False}


class MedClipTextTower(nn.Module):
    """BERT; the mean over positions of the first, the second and the last block.

    Args:
        config: The declaration; its options are those of :data:`TEXT_OPTIONS`.

    Attributes:
        output_dim: Width of BERT.
        pad_id: The id that fills texts up.
        can_trim: Whether padding may be cut off without a change.
        padding_counts: Whether the vector of a text depends on the longest text of its batch.
    """

    pad_id = 0

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        options = tower_options(config, TEXT_OPTIONS)
        self.model = build_bert(options, config.context_length)
        self.output_dim: int = options["width"]
        self.can_trim: bool = options["masked_mean"]
        self.padding_counts = not self.can_trim

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (batch, output_dim) for ids and mask (batch, tokens); the mask is 1 on the texts' own tokens.

        Columns that are padding in every row are cut off first.
        """
        if len(ids) == 0:
            return no_rows(ids, self.output_dim, self)
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        layers = hidden_layers(self.model, ids, mask)
        tokens = torch.stack([layers[1], layers[min(2, len(layers) - 1)], layers[-1]]).mean(0)
        if self.padding_counts:
            return tokens.mean(1)
        inside = mask[..., None].to(tokens.dtype)
        return (tokens * inside).sum(1) / inside.sum(1)
