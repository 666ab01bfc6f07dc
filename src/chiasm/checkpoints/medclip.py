"""MedCLIP's key layout: ``vision_model.*``, ``text_model.*``, ``logit_scale``, with the Swin of an old transformers.

In: the state dict in the published zip archives. Out: the names of chiasm's model. transformers renamed the parts of its
Swin after MedCLIP's release; :data:`SWIN_RULES` leads from the names in the file (transformers up to 4) to those of
transformers 5. The ``downsample`` of a stage has the same place in both (in timm's Swin it lies one stage later).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoints.layout import Layout, renamed

_BLOCK = r"(encoder\.layers\.\d+\.blocks\.\d+\.)"
#: Old name -> new name, inside of transformers' ``SwinModel``.
SWIN_RULES = (
    (_BLOCK + r"attention\.self\.query\.", r"\1attention.q_proj."),
    (_BLOCK + r"attention\.self\.key\.", r"\1attention.k_proj."),
    (_BLOCK + r"attention\.self\.value\.", r"\1attention.v_proj."),
    (
        _BLOCK + r"attention\.self\.relative_position_bias_table$",
        r"\1attention.relative_position_bias.relative_position_bias_table",
    ),
    (_BLOCK + r"attention\.output\.dense\.", r"\1attention.o_proj."),
    (_BLOCK + r"intermediate\.dense\.", r"\1mlp.fc1."),
    (_BLOCK + r"output\.dense\.", r"\1mlp.fc2."),
)
_HEADS = (
    (r"vision_model\.projection_head\.", "visual.head."),
    (r"vision_model\.model\.fc\.", "visual.head."),
    (r"text_model\.projection_head\.", "text.proj."),
)
#: Ends of names that files carry and models lack, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    ".attention.self.relative_position_index": "follows from the size of the window",
    ".embeddings.position_ids": "counts from 0; transformers 4.31 stopped saving it",
    "text_model.model.pooler.dense.weight": "MedCLIP reads hidden layers, not BERT's pooler",
    "text_model.model.pooler.dense.bias": "MedCLIP reads hidden layers, not BERT's pooler",
}
#: MedCLIP clamps the logarithm of its scale to [0, this] whenever it computes logits; its file may hold more.
MAX_LOG_SCALE = math.log(100.0)


def swin_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a ``SwinModel`` of transformers 4 under the names of transformers 5; new names stay."""
    return {
        renamed(name, SWIN_RULES): tensor
        for name, tensor in tensors.items()
        if not name.endswith("relative_position_index")
    }


def _is_medclip(tensors: Mapping[str, Tensor]) -> bool:
    return "text_model.projection_head.weight" in tensors and (
        "vision_model.projection_head.weight" in tensors or "vision_model.model.fc.weight" in tensors
    )


def _convert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    trunk = "visual.trunk.model." if config["image"]["kind"] == "huggingface" else "visual.trunk."
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if any(name.endswith(end) for end in DROPPED):
            continue
        new = renamed(name, _HEADS)
        if new.startswith("vision_model.model."):
            new = trunk + renamed(new.removeprefix("vision_model.model."), SWIN_RULES)
        elif new.startswith("text_model.model."):
            new = "text.transformer.model." + new.removeprefix("text_model.model.")
        result[new] = tensor
        if new.endswith("running_var"):  # the counter beside it matters to training alone, and old files lack it
            result.setdefault(new.removesuffix("running_var") + "num_batches_tracked", torch.tensor(0))
    if "logit_scale" in result:
        result["logit_scale"] = result["logit_scale"].reshape(()).float().clamp(0.0, MAX_LOG_SCALE)
    return result


LAYOUT = Layout("medclip", _is_medclip, _convert)
