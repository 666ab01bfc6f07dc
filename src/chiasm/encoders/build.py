"""From a declaration to a module.

In: :class:`EncoderConfig`. Out: :class:`DualEncoder` with drawn weights, or without memory on the ``meta`` device for a
loader that assigns them. No weight file is read here.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Generator, nn

from chiasm.encoders.base import EncoderConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.dual import DualEncoder, ProjectedTextTower
from chiasm.encoders.image_side import (
    NoDraws,
    adapt_tower,
    build_image_tower,
    check_width,
    draw_weights,
    projection_head,
    python_tower,
)
from chiasm.encoders.named import build_named_tower
from chiasm.encoders.text import TextTransformer
from chiasm.errors import ConfigError


def build_encoder_model(
    config: EncoderConfig,
    *,
    allow_code: bool = False,
    seed: int | None = None,
    device: Literal["cpu", "meta"] = "cpu",
    draw: bool = True,
) -> DualEncoder:
    """Build the two towers with their projections.

    Args:
        config: The declaration.
        allow_code: Whether a tower of kind ``python`` may run the factory that the declaration names.
        seed: Of the drawn weights; the same seed gives the same weights on every machine's CPU, whatever was drawn
            before. None: taken from torch's global generator.
        device: ``meta`` allocates nothing and draws nothing; for native towers whose weights will be assigned.
        draw: False fills foreign towers with zeros, since their weights will be assigned: it takes little time.

    Returns:
        The model in training mode, locked and adapted as declared.

    Raises:
        ConfigError: Widths that do not fit, code that is not allowed, or ``meta`` for a foreign tower.
    """
    if device == "meta" and not config.is_native:
        raise ConfigError("a model with a foreign tower cannot be built on the `meta` device", hint="build it on `cpu`")
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if config.members is not None:
        from chiasm.encoders.ensemble import EnsembleModel

        one = replace(config, members=None)
        seeds = range(seed, seed + config.members)
        models = [build_encoder_model(one, allow_code=allow_code, seed=s, device=device, draw=draw) for s in seeds]
        return EnsembleModel(models, config).train()
    visual = text = None
    with torch.random.fork_rng(devices=[]), nullcontext() if draw else NoDraws():
        torch.manual_seed(seed)
        generator = Generator().manual_seed(seed)
        if config.has_image:
            visual = build_image_tower(config.image, config.projection, generator, device, allow_code)
        if config.has_text:
            text = _text_tower(config.text, config.projection, generator, device, allow_code)
        model = DualEncoder(visual, text, config)
    return model.to(device).train()


def _text_tower(
    config: TextTowerConfig,
    projection: ProjectionConfig,
    generator: Generator,
    device: str,
    allow_code: bool,
) -> nn.Module:
    fused = config.is_native and projection.is_fused("text")
    inner_dim = projection.dim if fused and projection.text == "linear" else None
    trunk: nn.Module
    if config.kind == "clip":
        with torch.device("meta"):
            trunk = TextTransformer(config, inner_dim)
        draw_weights(trunk, generator, device)
    elif config.kind == "huggingface":
        from chiasm.encoders.huggingface import build_huggingface_text_tower

        trunk = build_huggingface_text_tower(config)
    elif config.kind == "named":
        trunk = build_named_tower(config)
    else:
        trunk = python_tower(config, allow_code)
    adapt_tower(trunk, config.freeze, config.lora, native=config.is_native)
    if fused:
        check_width(trunk, projection.dim, "projection.dim")
        return trunk
    head = projection_head(projection.text, trunk, projection, "text", device)
    can_trim = bool(getattr(trunk, "can_trim", config.kind == "huggingface" and config.pool != "last"))
    return ProjectedTextTower(trunk, head, projection.dim, can_trim=can_trim)
