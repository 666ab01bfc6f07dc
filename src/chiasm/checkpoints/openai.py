"""OpenAI's key layout: which configuration a state dict has, and which names it may hold besides.

In: names and tensors. Out: the mapping that ``EncoderConfig.from_dict`` reads. The layout is shared by OpenAI's
archives, open_clip's native models, CheXzero, BioCLIP and QuiltNet; shapes tell the architecture, but neither the
activation nor the preprocessing. Hence the activation is an argument here, and a *family* in ``chiasm.load``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chiasm.checkpoints.layout import Layout
from chiasm.errors import CheckpointError

#: Which activation the weights of a family were trained with. Keys and shapes are the same.
FAMILIES: Mapping[str, str] = {"openai": "quick_gelu", "open_clip": "gelu"}

#: Entries that files carry and models lack, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    "input_resolution": "a scalar in OpenAI's archives; follows from the positional embedding",
    "context_length": "a scalar in OpenAI's archives; follows from the positional embedding",
    "vocab_size": "a scalar in OpenAI's archives; follows from the token embedding",
}
#: The causal mask is a plain attribute in archives and a buffer in old exports; it follows from the context length.
_MASK = re.compile(r"(.*\.)?attn_mask")
_TEXT_PARTS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
CLIP_VOCABULARY = 49408


def is_openai_layout(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of OpenAI's CLIP, with the text tower at the top or under ``text.``."""
    return "visual.conv1.weight" in tensors and (
        "token_embedding.weight" in tensors or "text.token_embedding.weight" in tensors
    )


def tidy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the names and shapes that the model has.

    Drops what :data:`DROPPED` lists and the causal mask, moves open_clip's ``text.*`` (its ``CustomTextCLIP``) to the
    top, and makes ``logit_scale`` and ``logit_bias`` 0-dim.
    """
    custom = "text.token_embedding.weight" in tensors
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in DROPPED or _MASK.fullmatch(name):
            continue
        short = name.removeprefix("text.")
        target = short if custom and short.startswith(_TEXT_PARTS) else name
        result[target] = tensor.reshape(()) if target in ("logit_scale", "logit_bias") else tensor
    return result


def config_from_state_dict(
    tensors: Mapping[str, Tensor],
    *,
    activation: str,
    image_heads: int | None = None,
    text_heads: int | None = None,
) -> dict[str, Any]:
    """Return the configuration of a CLIP in OpenAI's layout, read off its shapes.

    Args:
        tensors: What :func:`tidy` returned.
        activation: ``quick_gelu`` or ``gelu``; the shapes cannot tell.
        image_heads: Attention heads where a folder states them; None: OpenAI's rule of 64 channels a head.
        text_heads: The same for the text tower.

    Returns:
        A mapping for ``EncoderConfig.from_dict``, with CLIP's tokenizer and OpenAI's preprocessing.

    Raises:
        CheckpointError: A name is missing or a shape is impossible.

    References:
        ``build_model`` in openai/CLIP, ``clip/model.py``. Deviation: unless the heads are given, widths that are no
        multiple of 64 are refused.
    """
    tokens, text_width = _shape(tensors, "token_embedding.weight", 2)
    if tokens != CLIP_VOCABULARY:
        raise CheckpointError(f"the token embedding has {tokens} rows; CLIP's vocabulary has {CLIP_VOCABULARY}")
    context, _ = _shape(tensors, "positional_embedding", 2)
    _, dim = _shape(tensors, "text_projection", 2)
    is_vit = "visual.proj" in tensors
    image, channels = _vit(tensors) if is_vit else _resnet(tensors)
    image["heads"] = image_heads or _heads(channels, "image")
    if is_vit:
        image["activation"] = activation
    config: dict[str, Any] = {
        "image": image,
        "text": {
            "kind": "clip",
            "context_length": context,
            "vocab_size": tokens,
            "width": text_width,
            "layers": _blocks(tensors, "transformer.resblocks"),
            "heads": text_heads or _heads(text_width, "text"),
            "mlp_ratio": _mlp_ratio(tensors, "transformer.resblocks.0", text_width),
            "activation": activation,
        },
        "projection": {"dim": dim},
        "tokenizer": {"kind": "clip", "context_length": context},
        "preprocess": {"size": image["image_size"]},
    }
    if "logit_bias" in tensors:
        config["logit_bias_init"] = float(tensors["logit_bias"])
    return config


def _vit(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    width, _, patch, patch_columns = _shape(tensors, "visual.conv1.weight", 4)
    positions, _ = _shape(tensors, "visual.positional_embedding", 2)
    grid = math.isqrt(max(positions - 1, 0))
    if grid < 1 or grid**2 + 1 != positions or patch != patch_columns:
        raise CheckpointError(f"an image of {positions} positions and patches {patch}×{patch_columns} is not square")
    config = {
        "kind": "vit",
        "image_size": grid * patch,
        "width": width,
        "layers": _blocks(tensors, "visual.transformer.resblocks"),
        "patch_size": patch,
        "mlp_ratio": _mlp_ratio(tensors, "visual.transformer.resblocks.0", width),
        "pre_norm": "visual.ln_pre.weight" in tensors,
    }
    return config, width


def _resnet(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    width = _shape(tensors, "visual.layer1.0.conv1.weight", 4)[0]
    positions, channels = _shape(tensors, "visual.attnpool.positional_embedding", 2)
    side = math.isqrt(max(positions - 1, 0))
    if side < 1 or side**2 + 1 != positions:
        raise CheckpointError(f"an attention pool of {positions} positions is not square")
    stages = [_blocks(tensors, f"visual.layer{i}") for i in range(1, 5) if f"visual.layer{i}.0.conv1.weight" in tensors]
    config = {
        "kind": "resnet",
        "image_size": side * 4 * 2 ** (len(stages) - 1),
        "width": width,
        "layers": stages,
        "pool": "attention",
    }
    return config, channels


def _blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    indices = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    if not indices or indices != set(range(len(indices))):
        raise CheckpointError(f"the blocks `{prefix}.*` are missing or have gaps")
    return len(indices)


def _mlp_ratio(tensors: Mapping[str, Tensor], block: str, width: int) -> float:
    return _shape(tensors, f"{block}.mlp.c_fc.weight", 2)[0] / width


def _heads(width: int, side: str) -> int:
    if width % 64:
        raise CheckpointError(
            f"the {side} tower is {width} wide, no multiple of 64; its number of heads cannot be told from the weights",
            hint="load it from a model directory, which states the configuration",
        )
    return width // 64


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"the weights lack `{name}`, which a CLIP in OpenAI's layout has")
    if tensor.ndim != dimensions or 0 in tensor.shape:
        raise CheckpointError(f"`{name}` has the shape {tuple(tensor.shape)}; expected {dimensions} dimensions")
    return tuple(tensor.shape)


LAYOUT = Layout("openai", is_openai_layout, lambda tensors, config: tidy(tensors))
