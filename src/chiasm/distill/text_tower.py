"""A retriever's text side that training may adapt: texts of rows, by number, to embeddings with gradients.

Comes in: an encoder and which texts stand beside which row. Goes out: the module that
:class:`chiasm.distill.text_side.TrainedText` adapts. Its state holds texts and rows, too, so that its digest tells them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder


@dataclass(frozen=True)
class RowTexts:
    """The texts of the training rows, followed by those of the validation rows.

    Attributes:
        texts: Distinct texts.
        rows: (n, k), numbers of texts; -1 for none.
        weights: (n, k), zero where there is none.
        train: How many of the rows are trained on.
    """

    texts: tuple[str, ...]
    rows: NDArray[np.int64]
    weights: NDArray[np.float64]
    train: int

    def dealt_out(self, seed: int) -> Self:
        """Return the same texts in the order in which :func:`chiasm.distill.targets.shuffled` deals out targets."""
        n, m = self.train, len(self.rows) - self.train
        train = np.random.default_rng([seed, 11]).permutation(n)
        held_out = np.random.default_rng([seed, 12]).permutation(m) + n
        order = np.concatenate([train, held_out])
        return replace(self, rows=self.rows[order], weights=self.weights[order])


class TextTower(nn.Module):
    """``tower(split, rows)``: weighted means of unit vectors of the rows' texts, (rows, dim).

    Args:
        encoder: Its text side and tokenizer are used; weights are shared, nothing is changed.
        texts: Of the rows.
    """

    ids: Tensor
    lengths: Tensor
    rows: Tensor
    weights: Tensor

    def __init__(self, encoder: Encoder, texts: RowTexts) -> None:
        super().__init__()
        used, place = np.unique(np.maximum(texts.rows, 0), return_inverse=True)
        tokens = encoder.tokenizer.encode([texts.texts[i] for i in used])
        self.train_rows = texts.train
        self.model = text_only(encoder.model)
        # Not persistent: a checkpoint must not hold the words of patients, nor anything they can be read from.
        self.register_buffer("ids", tokens.ids, persistent=False)
        self.register_buffer("lengths", tokens.lengths, persistent=False)
        self.register_buffer(
            "rows", torch.from_numpy(place.reshape(texts.rows.shape).astype(np.int64)), persistent=False
        )
        weights = np.where(texts.rows >= 0, texts.weights, 0.0)
        self.register_buffer("weights", torch.from_numpy(weights.astype(np.float32)), persistent=False)

    def forward(self, split: str, rows: Tensor) -> Tensor:
        """Return embeddings of rows of ``train`` or ``validation``."""
        at = rows + (0 if split == "train" else self.train_rows)
        numbers, place = torch.unique(self.rows[at], return_inverse=True)
        model: Any = self.model
        vectors = F.normalize(model.encode_text(self.ids[numbers], self.lengths[numbers]), dim=-1)
        means: Tensor = (self.weights[at].unsqueeze(-1) * vectors[place]).sum(dim=1)
        return means


def text_only(model: nn.Module) -> nn.Module:
    """Return a dual encoder without its image side; weights are shared, the argument is not changed."""
    bare = copy.copy(model)
    bare._modules = {**model._modules, "visual": None}
    bare._parameters = {n: p for n, p in model._parameters.items() if not n.startswith("logit_")}
    for name in ("logit_scale", "logit_bias"):
        bare._parameters[name] = None
    return bare
