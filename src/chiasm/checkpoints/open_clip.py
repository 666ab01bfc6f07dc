"""open_clip's hub directory: ``open_clip_config.json`` with weights beside it, whatever towers the model has.

In: a local directory, or a weight file inside of it. Out: tensors in chiasm's names and the mapping that
``EncoderConfig.from_dict`` reads. The configuration states the activation (``quick_gelu``), so no family needs to be
named.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chiasm.checkpoints.containers import read_json, read_state_dict
from chiasm.checkpoints.huggingface import read_weights
from chiasm.checkpoints.open_clip_config import config_of
from chiasm.checkpoints.open_clip_names import is_open_clip, to_native
from chiasm.errors import CheckpointError

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def read_model_dir(directory: str | Path, weights: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a hub directory of open_clip.

    Args:
        directory: It holds ``open_clip_config.json``, weights under one of open_clip's names or one training checkpoint
            (``epoch_N.pt``), and the tokenizer's files where the model has not CLIP's own.
        weights: The weight file; None: the one in the directory.

    Raises:
        CheckpointError: A tower that chiasm does not read, an unknown architecture field, missing or damaged files.
    """
    directory = Path(directory)
    stated = read_json(directory / CONFIG_FILE)
    model = stated.get("model_cfg")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"`{CONFIG_FILE}` lacks `model_cfg`")
    checkpoints = sorted(directory.glob("epoch_*.pt"))
    if weights is None and len(checkpoints) == 1 and not any(f.name in WEIGHT_FILES for f in directory.iterdir()):
        weights = checkpoints[0]
    tensors = read_weights(directory, WEIGHT_FILES) if weights is None else read_state_dict(weights).tensors
    if not is_open_clip(tensors):
        raise CheckpointError(f"the weights in `{directory.name}` are not those of a CLIP of open_clip")
    config = config_of(model, tensors, directory)
    config["preprocess"] = preprocess_of(stated.get("preprocess_cfg"), config["image"]["image_size"])
    return to_native(tensors, config), config


def preprocess_of(stated: object, image_size: int) -> dict[str, Any]:
    """Return the fields of ``Preprocess`` for open_clip's ``preprocess_cfg`` (its evaluation transform)."""
    cfg = stated if isinstance(stated, Mapping) else {}
    resize = {"shortest": "shortest", "squash": "squash", "longest": "longest_pad"}.get(
        cfg.get("resize_mode") or "shortest"
    )
    filters = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
    interpolation = filters.get(cfg.get("interpolation") or "bicubic")
    if resize is None or interpolation is None:
        raise CheckpointError(f"the resizing in `{CONFIG_FILE}` is not one of open_clip's")
    if cfg.get("size") not in (None, image_size, [image_size, image_size], [3, image_size, image_size]):
        raise CheckpointError(f"`preprocess_cfg.size` is not the {image_size} of the weights")
    fill = cfg.get("fill_color") or 0
    result: dict[str, Any] = {
        "size": image_size,
        "resize": resize,
        "crop": "center" if resize == "shortest" else "none",
        "interpolation": interpolation,
    }
    if isinstance(fill, int) and 0 <= fill <= 255:
        result["fill"] = fill
    for name in ("mean", "std"):
        values = cfg.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
            raise CheckpointError(f"`preprocess_cfg.{name}` must be three numbers")
        result[name] = [float(v) for v in values]
    return result
