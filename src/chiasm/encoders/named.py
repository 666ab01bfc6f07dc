"""The table of towers that are published, but are neither CLIP's own nor models of transformers.

In: a tower's declaration with ``kind = "named"``, whose ``source`` is a name of this table and whose ``options`` give
the shape. Out: a module as ``encoders.build`` wants it.

An image tower is a callable pixels (batch, 3, size, size) -> (batch, ``output_dim``), a text tower a callable
(ids, mask) -> (batch, ``output_dim``); each has the attribute ``output_dim``, and as a rule ``patch_tokens`` or
``pad_id``. Their modules are imported when they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from chiasm.encoders.base import ImageTowerConfig, TextTowerConfig
from chiasm.errors import ConfigError, UnknownName

#: Name -> ``module:function``; the function takes the tower's declaration and returns the module.
IMAGE_TOWERS: Mapping[str, str] = {
    "gloria": "chiasm.encoders.gloria:GloriaImageTower",
    "biovil": "chiasm.encoders.biovil:BioVilImageTower",
    "classic_resnet": "chiasm.encoders.classic_resnet:build_classic_resnet",
    "conch": "chiasm.encoders.conch:ConchImageTower",
}
TEXT_TOWERS: Mapping[str, str] = {
    "gloria": "chiasm.encoders.gloria:GloriaTextTower",
    "cxr_bert": "chiasm.encoders.biovil:CxrBertTextTower",
    "medclip": "chiasm.encoders.medclip:MedClipTextTower",
}


def build_named_tower(config: ImageTowerConfig | TextTowerConfig) -> nn.Module:
    """Return a tower of the table with drawn weights.

    Raises:
        UnknownName: No tower of that name.
        ConfigError: An unknown or impossible option.
    """
    side, table = ("image", IMAGE_TOWERS) if isinstance(config, ImageTowerConfig) else ("text", TEXT_TOWERS)
    name = config.source or ""
    if name not in table:
        raise UnknownName(f"{side} tower", name, list(table), hint=f"one of: {', '.join(table)}")
    module, _, function = table[name].partition(":")
    builder: Any = getattr(import_module(module), function)
    tower: nn.Module = builder(config)
    return tower


def tower_options(config: ImageTowerConfig | TextTowerConfig, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tower's options with the defaults for those that are not stated.

    Raises:
        ConfigError: An unknown option, one of another type than its default, or a number below 1.
    """
    side = "image" if isinstance(config, ImageTowerConfig) else "text"
    for name, value in config.options.items():
        if name not in defaults:
            known = ", ".join(sorted(defaults))
            raise ConfigError(f"unknown field `{side}.options.{name}`", hint=f"known fields: {known}")
        expected = type(defaults[name])
        if type(value) is not expected and not (expected is tuple and isinstance(value, list)):
            raise ConfigError(
                f"`{side}.options.{name}` must be of type {expected.__name__}, got {type(value).__name__}"
            )
        if expected is int and value < 1:
            raise ConfigError(f"`{side}.options.{name}` must be at least 1, got {value}")
    return {**defaults, **config.options}
