"""Whole models of transformers by their ``model_type``: which reader takes which folder.

In: a directory with ``config.json``. Out: tensors in chiasm's names and the mapping that ``EncoderConfig.from_dict``
reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chiasm.checkpoints import dual_encoder, huggingface, siglip
from chiasm.checkpoints.containers import read_json

READERS: Mapping[str, Callable[[str | Path], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "siglip": siglip.read_model_dir,
    dual_encoder.MODEL_TYPE: dual_encoder.read_model_dir,
}


def read_model_dir(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a ``CLIPModel``, ``SiglipModel`` or ``VisionTextDualEncoderModel`` directory.

    Raises:
        CheckpointError: Another model type, missing or damaged files.
    """
    model_type = read_json(Path(directory) / "config.json").get("model_type")
    reader = READERS.get(str(model_type), huggingface.read_model_dir)
    return reader(directory)
