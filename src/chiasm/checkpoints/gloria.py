"""GLoRIA's key layout: a Lightning checkpoint whose names begin with ``gloria.``.

In: ``gloria.img_encoder.{model,global_embedder,local_embedder}.*`` and ``gloria.text_encoder.model.*``. Out: the names of
chiasm's model. The checkpoint also holds its configuration as an object of a package (omegaconf); the restricted reader
of ``checkpoints.pickle_reader`` puts an inert placeholder there, so neither that package nor Lightning is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoints.layout import Layout, renamed

RULES = (
    (r"img_encoder\.model\.", "visual.trunk.backbone."),
    (r"img_encoder\.global_embedder\.", "visual.trunk.global_embedder."),
    (r"img_encoder\.local_embedder\.", "visual.trunk.local_embedder."),
    (r"text_encoder\.model\.", "text.transformer.model."),
)
#: Beginnings of names that files carry and models lack, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    "text_encoder.model.embeddings.position_ids": "counts from 0; transformers 4.31 stopped saving it",
    "text_encoder.model.pooler.": "GLoRIA reads hidden layers, not BERT's pooler",
}


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.rsplit("gloria.", 1)[-1]: tensor for name, tensor in tensors.items()}


def _is_gloria(tensors: Mapping[str, Tensor]) -> bool:
    names = _plain(tensors)
    return "img_encoder.local_embedder.weight" in names and "img_encoder.global_embedder.weight" in names


def _convert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in _plain(tensors).items():
        if name.startswith(tuple(DROPPED)):
            continue
        new = renamed(name, RULES)
        result[new] = tensor
        if new.endswith("running_var"):  # the counter beside it matters to training alone, and old files lack it
            result.setdefault(new.removesuffix("running_var") + "num_batches_tracked", torch.tensor(0))
    return result


LAYOUT = Layout("gloria", _is_gloria, _convert)
