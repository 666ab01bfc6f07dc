"""The key layouts of BioViL, BioViL-T and CXR-BERT.

In: the image model's plain state dict (``encoder.*``, ``projector.model.*``) under ``image.``, beside it in the same
folder transformers' file of the text model (``bert.*``, ``cls.*``, ``cls_projection_head.*``) under ``text.``. Out: the
names of ``encoders.biovil``. The size of the vocabulary is that of the file.

References: microsoft/hi-ml, hi-ml-multimodal, ``image/model/model.py`` and ``text/model/modelling_cxrbert.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chiasm.checkpoints.layout import Layout, renamed

TEXT_FILES = ("model.safetensors", "pytorch_model.bin")
RULES = (
    (r"image\.encoder\.encoder\.", "visual.trunk.backbone."),
    (r"image\.encoder\.backbone_to_vit\.", "visual.trunk.squeeze."),
    (r"image\.encoder\.vit_pooler\.", "visual.trunk.pooler."),
    (r"image\.encoder\.missing_previous_emb$", "visual.trunk.missing_previous"),
    (r"image\.projector\.model\.", "visual.trunk.projector."),
    (r"text\.(bert|cls_projection_head)\.", r"text.transformer.\1."),
)
#: Entries that files carry and the model lacks, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    "image.encoder.encoder.fc.": "ImageNet's classifier, which torchvision's class brings along; nothing reads it",
    "text.cls.predictions.": "guesses masked words; no part of the embedding",
    "text.bert.embeddings.position_ids": "a counter that older transformers saved",
}
WORDS = "text.bert.embeddings.word_embeddings.weight"


def is_biovil(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a BioViL or BioViL-T image model with its text model."""
    return "image.projector.model.0.weight" in tensors and "text.cls_projection_head.dense_to_hidden.weight" in tensors


def is_cxr_bert(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of CXR-BERT alone."""
    return "cls_projection_head.dense_to_hidden.weight" in tensors


def _convert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    kept = {k: v for k, v in tensors.items() if not any(k.startswith(d) for d in DROPPED)}
    return {renamed(name, RULES): tensor for name, tensor in kept.items()}


def _infer(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the file's vocabulary."""
    words = tensors.get(WORDS)
    if words is None or words.ndim != 2:
        return dict(config)
    text = config["text"]
    return {**config, "text": {**text, "options": {**text["options"], "vocab_size": len(words)}}}


def _as_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"text.{name}": tensor for name, tensor in tensors.items()}


LAYOUT = Layout(
    "biovil", is_biovil, _convert, parts={"image.": ("biovil*image*.pt", "*.pt"), "text.": TEXT_FILES}, infer=_infer
)
TEXT_LAYOUT = Layout(
    "cxr_bert",
    is_cxr_bert,
    lambda tensors, config: _convert(_as_text(tensors), config),
    parts={"": TEXT_FILES},
    infer=lambda tensors, config: _infer(_as_text(tensors), config),
)
