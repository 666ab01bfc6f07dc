"""What a key layout is: the type of the entries of ``checkpoints.layouts``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: In a folder, the file to read; the first that is there counts.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.torch",
)


@dataclass(frozen=True)
class Layout:
    """One key layout.

    Attributes:
        name: As the catalog's entries name it.
        matches: Whether tensors have this layout's names.
        convert: (tensors, configuration as ``EncoderConfig.to_dict`` gives it) -> tensors under the model's names. What
            a file may hold besides is dropped here, each with its reason; anything else that is not understood is
            passed on, so that the strict load reports it.
        parts: Prefix put before the names of a file -> glob patterns of that file in a folder.
        infer: (tensors, configuration) -> the configuration with the shape that the tensors have; None: the stated one
            counts.
    """

    name: str
    matches: Callable[[Mapping[str, Tensor]], bool]
    convert: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": WEIGHT_FILES})
    infer: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Any]] | None = None


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """Return a name after the first rule (pattern at the start of the name, replacement) that fits; else unchanged."""
    for pattern, replacement in rules:
        new, count = re.subn(rf"^(?:{pattern})", replacement, name)
        if count:
            return new
    return name


def without_prefixes(tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors without what training wraps put before every name; each prefix is taken off once, in order."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name
        for prefix in prefixes:
            short = short.removeprefix(prefix)
        result[short] = tensor
    return result
