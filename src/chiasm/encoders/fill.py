"""From a declaration and its tensors to a model: strict, without memory for what the file already holds.

In: :class:`EncoderConfig` and tensors under the model's names. Out: :class:`DualEncoder`, or its image tower alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from chiasm.encoders.base import EncoderConfig
from chiasm.errors import CheckpointError

if TYPE_CHECKING:
    from chiasm.encoders.dual import DualEncoder


def filled_model(config: EncoderConfig, tensors: Mapping[str, Tensor], *, allow_code: bool = False) -> DualEncoder:
    """Build the model and give it the tensors, strictly, leaving nothing on the meta device.

    A foreign tower is built on the CPU, since it may keep buffers that no file holds; its draws leave torch's global
    generator as it was.

    Args:
        config: What to build.
        tensors: Under the model's names, in any floating-point type; the model has them in float32.
        allow_code: Whether a tower of kind ``python`` may run its factory.

    Raises:
        CheckpointError: Names or shapes that do not fit, or a declaration far larger than the weights.
        ConfigError: A tower is code and ``allow_code`` is false.
    """
    from chiasm.encoders.build import build_encoder_model

    _check_declaration(config, tensors)
    device: Literal["cpu", "meta"] = "meta" if config.is_native else "cpu"
    try:
        model = build_encoder_model(config, seed=0, allow_code=allow_code, device=device, draw=False)
    except RuntimeError as error:  # torch's own, of sizes that cannot be
        raise CheckpointError("the model states a configuration that cannot be built") from error
    fill_module(model, tensors)
    return model


def filled_backbone(
    config: EncoderConfig, tensors: Mapping[str, Tensor], *, projected: bool, allow_code: bool = False
) -> nn.Module:
    """Build the image tower alone and give it the tensors, strictly; see :func:`filled_model`.

    Args:
        config: What to build; its text side is not looked at.
        tensors: Under the tower's own names.
        projected: See :func:`chiasm.encoders.image_side.build_backbone`.
        allow_code: Whether a tower of kind ``python`` may run its factory.

    Raises:
        CheckpointError: Names or shapes that do not fit, or a declaration far larger than the weights.
        ConfigError: A tower is code and ``allow_code`` is false.
    """
    from chiasm.encoders.image_side import build_backbone

    _check_declaration(config, tensors)
    device: Literal["cpu", "meta"] = "meta" if config.image.is_native else "cpu"
    try:
        tower = build_backbone(config, projected=projected, allow_code=allow_code, device=device, draw=False)
    except RuntimeError as error:  # torch's own, of sizes that cannot be
        raise CheckpointError("the model states a configuration that cannot be built") from error
    fill_module(tower, tensors)
    return tower


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module its tensors, strictly, in float32, and leave nothing on the meta device.

    Raises:
        CheckpointError: Names or shapes that do not fit.
    """
    _check_names(module.state_dict(), tensors)
    own = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    with torch.no_grad():
        module.load_state_dict(own, strict=True, assign=True)
    for part in module.modules():
        tie = getattr(part, "tie_weights", None)  # T5's embedding has two names
        if callable(tie):
            tie()
    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if left:
        raise CheckpointError(f"`{left[0]}` has no weights after loading")


def _check_declaration(config: EncoderConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a configuration that would fetch a tower, or that is far larger than the weights beside it."""
    count = len(tensors)
    longest = max((max(t.shape, default=0) for t in tensors.values()), default=0)
    for tower in (config.image, config.text):
        if tower.lora is not None and tower.lora.rank > max(longest, 1):
            raise CheckpointError(f"the model states adapters of rank {tower.lora.rank}, which its weights cannot hold")
    elements = sum(t.numel() for t in tensors.values())
    layers: list[object] = [config.text.layers, config.image.layers]
    for tower in (config.image, config.text):
        if tower.kind not in ("huggingface", "named"):
            continue
        stated = tower.options.get("config") if tower.kind == "huggingface" else tower.options
        try:
            values = json.loads(stated) if isinstance(stated, str) else stated
        except ValueError:
            values = None
        if not isinstance(values, Mapping):
            raise CheckpointError("the model names a tower of transformers without stating its configuration")
        layers.extend(v for k, v in values.items() if "layers" in k or k == "depths")
        sizes = [v for k, v in values.items() if isinstance(v, int) and not k.endswith("_id")]
        if max(sizes, default=0) > max(elements, 10_000):
            raise CheckpointError(f"the model states sizes beyond the {elements:,} numbers in its weights")
    layers.append(config.members)
    depths = [n for item in layers for n in (item if isinstance(item, (list, tuple)) else [item])]
    deepest = max((n for n in depths if isinstance(n, int)), default=0)
    if deepest > max(count, 100):
        raise CheckpointError(f"the model states {deepest} layers, its weights are {count} tensors")


def _check_names(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    shapes = [
        f"`{k}` is {tuple(found[k].shape)}, not {tuple(expected[k].shape)}"
        for k in expected
        if k in found and found[k].shape != expected[k].shape
    ]
    problems = []
    for what, names in (("lack", missing), ("have besides", extra)):
        if names:
            shown = ", ".join(f"`{n}`" for n in names[:3]) + (" …" if len(names) > 3 else "")
            problems.append(f"{what} {len(names)}: {shown}")
    if shapes:
        problems.append(f"have other shapes: {'; '.join(shapes[:3])}")
    if problems:
        raise CheckpointError(f"the weights do not fit the model: they {', '.join(problems)}")
