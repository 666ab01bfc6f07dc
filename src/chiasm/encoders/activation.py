"""Which activation a model's native towers use: told, and changed on request, because no weight file states it.

In: a declaration. Out: a sentence, or another declaration. torch is not imported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from chiasm.encoders.base import Activation, EncoderConfig
from chiasm.errors import ConfigError


def activations_of(config: EncoderConfig) -> str:
    """Return one sentence on the activations of the native towers, which no weight file states."""
    vit = config.has_image and config.image.kind == "vit"
    sides = [("image", config.image.activation)] if vit else []
    if config.has_text and config.text.kind == "clip":
        sides.append(("text", config.text.activation))
    return "activation " + ", ".join(f"{a} ({side})" for side, a in sides) if sides else "activations of its own towers"


def with_activation(config: EncoderConfig, activation: str) -> EncoderConfig:
    """Return a declaration with another activation in its native towers.

    Raises:
        ConfigError: No such activation, or no native tower that has one.
    """
    known = get_args(Activation)
    if activation not in known:
        raise ConfigError(f"unknown activation `{activation}`", hint=f"one of: {', '.join(known)}")
    vit, clip = config.has_image and config.image.kind == "vit", config.has_text and config.text.kind == "clip"
    if not vit and not clip:
        raise ConfigError("this model has no native transformer whose activation could be changed")
    changed: Any = activation
    image = replace(config.image, activation=changed) if vit else config.image
    return replace(config, image=image, text=replace(config.text, activation=changed) if clip else config.text)
