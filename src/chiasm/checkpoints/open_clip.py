"""open_clip's hub directory: ``open_clip_config.json`` with weights beside it, for its native CLIP models.

In: a local directory. Out: tensors in OpenAI's layout and the mapping that ``EncoderConfig.from_dict`` reads. The
configuration states the activation (``quick_gelu``), so no family needs to be named.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chiasm.checkpoints.containers import read_json
from chiasm.checkpoints.huggingface import read_weights
from chiasm.checkpoints.openai import config_from_state_dict, is_openai_layout, tidy
from chiasm.errors import CheckpointError

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

#: What a configuration of a native model may state; anything else changes the architecture.
_KNOWN: Mapping[str, frozenset[str]] = {
    "vision_cfg": frozenset({"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}),
    "text_cfg": frozenset({"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}),
}


def read_model_dir(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a hub directory of open_clip.

    Raises:
        CheckpointError: A timm, Hugging Face or CoCa tower, an unknown architecture field, missing or damaged files.
    """
    directory = Path(directory)
    stated = read_json(directory / CONFIG_FILE)
    model = _mapping(stated, "model_cfg")
    vision, text = _mapping(model, "vision_cfg"), _mapping(model, "text_cfg")
    for part, fields in (("vision_cfg", vision), ("text_cfg", text)):
        for name, value in fields.items():
            if name not in _KNOWN[part] and value not in (None, False, ""):
                raise CheckpointError(f"open_clip model with `{part}.{name}` is not a native CLIP, the kind read here")
    tensors = tidy(read_weights(directory, WEIGHT_FILES))
    if not is_openai_layout(tensors):
        raise CheckpointError(f"the weights in `{directory.name}` are not those of a native CLIP of open_clip")
    config = config_from_state_dict(
        tensors,
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        image_heads=_image_heads(tensors, vision.get("head_width", 64)),
        text_heads=text["heads"] if isinstance(text.get("heads"), int) else None,
    )
    image = config["image"]
    for name, ours in (("image_size", image["image_size"]), ("patch_size", image.get("patch_size"))):
        if ours is not None and vision.get(name, ours) not in (ours, [ours, ours]):
            raise CheckpointError(f"`vision_cfg.{name}` is {vision[name]}, the weights are for {ours}")
    config["preprocess"] = preprocess_of(stated.get("preprocess_cfg"), image["image_size"])
    return tensors, config


def _image_heads(tensors: Mapping[str, Tensor], head_width: object) -> int:
    if not isinstance(head_width, int) or head_width < 1:
        raise CheckpointError("`vision_cfg.head_width` must be a positive integer")
    is_vit = "visual.proj" in tensors
    channels = tensors["visual.conv1.weight"].shape[0] if is_vit else 64 * tensors["visual.conv1.weight"].shape[0]
    return int(channels) // head_width


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


def _mapping(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = parent.get(name)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"`{CONFIG_FILE}` lacks `{name}`")
    return value
