"""open_clip's key layouts and chiasm's, both ways: native, ``CustomTextCLIP``, CoCa, timm's ViT, Hugging Face's texts.

In: tensors under the one's names and the model's declaration (``EncoderConfig.to_dict``). Out: tensors under the
other's. What is dropped is listed with its reason; a name that is not understood is passed on for the strict load.

References:
    open_clip ``model.py`` (``convert_to_custom_text_state_dict``, ``resize_pos_embed``, ``resize_text_pos_embed``),
    ``coca_model.py``, ``timm_model.py``, ``hf_model.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.checkpoints import timm
from chiasm.checkpoints.layout import Layout
from chiasm.checkpoints.openai import DROPPED as OPENAI_SCALARS
from chiasm.errors import CheckpointError

#: Patterns of entries that files carry and models lack, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    r"(.*\.)?attn_mask": "the causal mask follows from the context length",
    r".*\.position_ids": "counted from 0 by transformers up to 4.30; says nothing",
    r"text\.transformer\.(.*\.)?token_type_ids": "zeros, a buffer of older versions of transformers",
    r"text_decoder\..*": "CoCa's captioning; no part of the embeddings",
}
#: Only where the text tower does not use it.
_POOLER = "transformer.pooler."
_MATRIX = "text_projection"


def is_open_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a model of open_clip with towers of any kind that chiasm reads."""
    has_image = "visual.conv1.weight" in tensors or "visual.trunk.patch_embed.proj.weight" in tensors
    return has_image and any(
        name in ("token_embedding.weight", "text.token_embedding.weight") or name.startswith("text.transformer.")
        for name in tensors
    )


def to_native(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a model of open_clip under the names of the model that ``config`` declares.

    Positions of images are resized to the declared size (bicubic, antialiased), those of texts to the declared context
    (linear), as open_clip does. Of CoCa's image queries the first is kept: it alone is the embedding.

    Args:
        tensors: In open_clip's names.
        config: ``EncoderConfig.to_dict()``.

    Raises:
        CheckpointError: Positions that fit no square grid, or a bias of the sigmoid loss that is not one number.
    """
    visual: dict[str, Tensor] = {}
    words: dict[str, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in OPENAI_SCALARS or any(re.fullmatch(pattern, name) for pattern in DROPPED):
            continue
        if name in ("logit_scale", "logit_bias"):
            if tensor.numel() != 1:
                raise CheckpointError(f"`{name}` has the shape {tuple(tensor.shape)}; expected one number")
            result[name] = tensor.reshape(())
        elif name.startswith("visual."):
            visual[name.removeprefix("visual.")] = tensor
        else:
            words[name.removeprefix("text.")] = tensor
    if config.get("logit_bias_init") is not None and "logit_bias" not in result:
        result["logit_bias"] = torch.zeros(())  # as open_clip does
    return result | _image(visual, config) | _text(words, config)


def _image(visual: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    image, fused = config["image"], is_fused(config, "image")
    if image["kind"] != "vit":
        return {f"visual.{name}": tensor for name, tensor in visual.items()}
    if not any(name.startswith("trunk.") for name in visual):
        found = dict(visual)
        if "positional_embedding" in found and found["positional_embedding"].ndim == 2:
            grid = image["image_size"] // image["patch_size"]
            found["positional_embedding"] = timm.resize_positions(found["positional_embedding"], grid, antialias=True)
        if image["pool"] == "attention" and "attn_pool.query" in found:
            found["attn_pool.query"] = found["attn_pool.query"][:1]
        return {f"visual.{name}": tensor for name, tensor in found.items()}
    trunk = {n.removeprefix("trunk."): t for n, t in visual.items() if n.startswith("trunk.")}
    prefix = "visual." if fused else "visual.trunk."
    result = {f"{prefix}{name}": tensor for name, tensor in timm.to_native(trunk, image).items()}
    for name, tensor in visual.items():
        if name == "head.proj.weight" and fused:
            result["visual.proj"] = tensor.T.contiguous()
        elif name.startswith("head.proj."):
            result[f"visual.head.{name.removeprefix('head.proj.')}"] = tensor
        elif not name.startswith("trunk."):
            result[f"visual.{name}"] = tensor
    return result


def _text(words: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    text = config["text"]
    result: dict[str, Tensor] = {}
    if text["kind"] == "huggingface":
        uses_pooler = bool(text.get("options", {}).get("pooler"))
        for name, tensor in words.items():
            if name.startswith(_POOLER) and not uses_pooler:
                continue  # what the pooling of this model does not read
            inner = name.removeprefix("transformer.")
            if inner == name:
                result[f"text.{name}"] = tensor
            elif inner == "embed_tokens.weight":  # T5, of which open_clip keeps the encoder
                result["text.transformer.model.shared.weight"] = tensor
                result["text.transformer.model.encoder.embed_tokens.weight"] = tensor
            elif inner.startswith(("block.", "final_layer_norm.")):
                result[f"text.transformer.model.encoder.{inner}"] = tensor
            else:
                result[f"text.transformer.model.{inner}"] = tensor
        return result
    prefix = "" if is_fused(config, "text") else "text.transformer."
    for name, tensor in words.items():
        if prefix and name.startswith(f"{_MATRIX}."):
            result[f"text.proj.{name.removeprefix(f'{_MATRIX}.')}"] = tensor
        else:
            is_positions = name == "positional_embedding"
            result[f"{prefix}{name}"] = _resized_text_positions(tensor, text) if is_positions else tensor
    return result


def _resized_text_positions(positions: Tensor, text: Mapping[str, Any]) -> Tensor:
    context = int(text["context_length"])
    if positions.ndim != 2 or text["pool"] == "appended" or len(positions) == context:
        return positions
    resized = F.interpolate(positions.float().T[None], size=context, mode="linear", align_corners=False)
    return resized[0].T.to(positions.dtype).contiguous()


def is_fused(config: Mapping[str, Any], side: str) -> bool:
    """Whether a native tower of the declaration holds its projection itself (``ProjectionConfig.is_fused``)."""
    projection = config["projection"]
    return (
        projection[side] != "mlp"
        and side not in projection.get("standardize", ())
        and side not in (projection.get("biased") or ())
    )


def from_native(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of chiasm's model under open_clip's names; the inverse of :func:`to_native`.

    Native towers keep the layout of OpenAI where open_clip's ``CLIP`` has it. Towers in timm's shape (no ``ln_pre``, a
    bias in the patches) become ``visual.trunk``.

    Raises:
        CheckpointError: A tensor that open_clip has no place for.
    """
    custom = needs_custom_text(config)
    result: dict[str, Tensor] = {}
    visual = {n.removeprefix("visual."): t for n, t in tensors.items() if n.startswith("visual.")}
    if is_timm_shape(config):
        result |= _timm_names(visual)
    elif not is_fused(config, "image"):
        raise CheckpointError("open_clip's own image towers have one matrix as projection, this one has another")
    else:
        result |= {f"visual.{name}": tensor for name, tensor in visual.items()}
    for name, tensor in tensors.items():
        if name.startswith("visual."):
            continue
        if name in ("logit_scale", "logit_bias"):
            result[name] = tensor
            continue
        result |= _text_name(name, tensor, config, custom)
    return result


def _text_name(name: str, tensor: Tensor, config: Mapping[str, Any], custom: bool) -> dict[str, Tensor]:
    if config["text"]["kind"] == "huggingface":
        inner = name.removeprefix("text.transformer.model.")
        if inner == "shared.weight":
            return {"text.transformer.embed_tokens.weight": tensor}
        if inner == "encoder.embed_tokens.weight":
            return {}
        if inner.startswith(("encoder.block.", "encoder.final_layer_norm.")):
            return {f"text.transformer.{inner.removeprefix('encoder.')}": tensor}
        return {name if inner == name else f"text.transformer.{inner}": tensor}
    if name.startswith("text.proj."):
        return {f"text.{_MATRIX}.{name.removeprefix('text.proj.')}": tensor}
    plain = name.removeprefix("text.transformer.")
    return {f"text.{plain}" if custom else plain: tensor}


def needs_custom_text(config: Mapping[str, Any]) -> bool:
    """Whether open_clip needs ``CustomTextCLIP`` for this declaration."""
    return (
        config["text"]["kind"] != "clip"
        or not is_fused(config, "text")
        or config["text"]["pool"] == "appended"
        or is_timm_shape(config)
    )


def is_timm_shape(config: Mapping[str, Any]) -> bool:
    """Whether the image tower is a ViT of timm's shape rather than of open_clip's own."""
    image = config["image"]
    return image["kind"] == "vit" and (
        image["patch_bias"] or image.get("class_token") is False or image["registers"] > 0 or image["pool"] == "map"
    )


def _timm_names(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    trunk: dict[str, Tensor] = {}
    for long, tensor in visual.items():
        name = long.removeprefix("trunk.")
        if name == "proj":
            result["visual.head.proj.weight"] = tensor.T.contiguous()
        elif name.startswith("head."):
            result[f"visual.head.proj.{name.removeprefix('head.')}"] = tensor
        else:
            trunk[name] = tensor
    return result | {f"visual.trunk.{name}": tensor for name, tensor in timm.from_native(trunk).items()}


#: transformers' form may lie in the same folder, under the plain names.
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "*.pt", "*.safetensors", "*.bin")
LAYOUT = Layout("open_clip", is_open_clip, to_native, {"": _FILES})
