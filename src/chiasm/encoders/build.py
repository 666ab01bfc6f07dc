"""From a declaration to a module.

In: :class:`EncoderConfig`. Out: :class:`DualEncoder` with drawn weights, or without memory on the ``meta`` device for a
loader that assigns them. No weight file is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator, nn
from torch.overrides import TorchFunctionMode

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, LoraConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.dual import DualEncoder, ProjectedImageTower, ProjectedTextTower
from chiasm.encoders.named import build_named_tower
from chiasm.encoders.resnet import ModifiedResNet
from chiasm.encoders.text import TextTransformer
from chiasm.encoders.vit import VisionTransformer
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
    with torch.random.fork_rng(devices=[]), nullcontext() if draw else _NoDraws():
        torch.manual_seed(seed)
        generator = Generator().manual_seed(seed)
        if config.has_image:
            visual = _image_tower(config.image, config.projection, generator, device, allow_code)
        if config.has_text:
            text = _text_tower(config.text, config.projection, generator, device, allow_code)
        model = DualEncoder(visual, text, config)
    return model.to(device).train()


class _NoDraws(TorchFunctionMode):
    """While it is active, tensors are filled with zeros instead of random numbers.

    Zeros and not nothing: torch draws a truncated normal again until all numbers lie inside the bounds.
    """

    _DRAWS = frozenset({"normal_", "uniform_", "trunc_normal_", "bernoulli_", "exponential_", "cauchy_", "log_normal_"})
    #: Those of ``torch.nn.init`` come here whole, and what they call inside comes here no more.
    _SCHEMES = frozenset(
        {"kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "orthogonal_", "sparse_"}
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._DRAWS or name in self._SCHEMES:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, torch.Tensor):
                with torch.no_grad():
                    return tensor.zero_()
        if name in ("rand", "randn"):
            keywords = {k: v for k, v in (kwargs or {}).items() if k != "generator"}
            return torch.zeros(*args, **keywords)
        return func(*args, **(kwargs or {}))


def _image_tower(
    config: ImageTowerConfig,
    projection: ProjectionConfig,
    generator: Generator,
    device: str,
    allow_code: bool,
) -> nn.Module:
    fused = config.is_native and projection.is_fused("image")
    inner_dim = projection.dim if fused and projection.image == "linear" else None
    trunk: nn.Module
    if config.kind in ("vit", "resnet"):
        kind = VisionTransformer if config.kind == "vit" else ModifiedResNet
        with torch.device("meta"):
            trunk = kind(config, inner_dim)
        _draw(trunk, generator, device)
    elif config.kind == "huggingface":
        from chiasm.encoders.huggingface import build_huggingface_image_tower

        trunk = build_huggingface_image_tower(config)
    elif config.kind == "named":
        trunk = build_named_tower(config)
    else:
        trunk = _python_tower(config, allow_code)
    _check_width(trunk, config.output_dim if not config.is_native else None, "image.output_dim")
    _adapt(trunk, config.freeze, config.lora)
    if fused:
        _check_width(trunk, projection.dim, "projection.dim")
        return trunk
    head = _projection(projection.image, trunk, projection, "image", device)
    return ProjectedImageTower(trunk, head, projection.dim)


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
        _draw(trunk, generator, device)
    elif config.kind == "huggingface":
        from chiasm.encoders.huggingface import build_huggingface_text_tower

        trunk = build_huggingface_text_tower(config)
    elif config.kind == "named":
        trunk = build_named_tower(config)
    else:
        trunk = _python_tower(config, allow_code)
    _adapt(trunk, config.freeze, config.lora)
    if fused:
        _check_width(trunk, projection.dim, "projection.dim")
        return trunk
    head = _projection(projection.text, trunk, projection, "text", device)
    can_trim = bool(getattr(trunk, "can_trim", config.kind == "huggingface" and config.pool != "last"))
    return ProjectedTextTower(trunk, head, projection.dim, can_trim=can_trim)


def _draw(tower: VisionTransformer | ModifiedResNet | TextTransformer, generator: Generator, device: str) -> None:
    if device != "meta":
        tower.to_empty(device=device)
        tower.init_weights(generator)


def _python_tower(config: ImageTowerConfig | TextTowerConfig, allow_code: bool) -> nn.Module:
    from chiasm.encoders.external import OWN_FACTORIES, ExternalImageTower, build_python_tower

    assert config.source is not None
    tower = build_python_tower(
        config.source,
        config.options,
        allow_code=allow_code,
        image_size=config.image_size if isinstance(config, ImageTowerConfig) else None,
        context_length=config.context_length if isinstance(config, TextTowerConfig) else None,
    )
    if (
        isinstance(tower, ExternalImageTower)
        and isinstance(config, ImageTowerConfig)
        and config.source in OWN_FACTORIES
    ):
        # A saved model has weights of its own, so whoever loads it needs no package that holds the first ones.
        tower.stored = replace(config, options={**config.options, "pretrained": False})
    return tower


def _adapt(trunk: nn.Module, freeze: bool, lora: LoraConfig | None) -> None:
    if not freeze and lora is None:
        return
    from chiasm.encoders import adapters

    if freeze:
        adapters.freeze(trunk)
    if lora is not None:
        adapters.apply_lora(trunk, lora)
    if isinstance(trunk, (VisionTransformer, ModifiedResNet, TextTransformer)):
        for parameter in trunk.projection_parameters():
            parameter.requires_grad_(True)


def _projection(
    kind: Literal["linear", "mlp", "none"],
    trunk: nn.Module,
    config: ProjectionConfig,
    side: Literal["image", "text"],
    device: str,
) -> nn.Module:
    from chiasm.encoders.adapters import make_projection

    width = int(trunk.output_dim)  # type: ignore[arg-type]
    if kind == "none":
        _check_width(trunk, config.dim, f"projection.{side}")
    with torch.device(device):
        head: nn.Module = make_projection(
            kind,
            width,
            config.dim,
            config.hidden,
            config.dropout,
            input_dropout=config.input_dropout,
            standardize=side in config.standardize,
            bias=side in (config.biased or ()),
        )
    return head


def _check_width(trunk: nn.Module, expected: int | None, field: str) -> None:
    width = int(trunk.output_dim)  # type: ignore[arg-type]
    if expected is not None and width != expected:
        raise ConfigError(
            f"`{field}` wants {expected} dimensions, the tower gives {width}",
            hint="set the width to match, or let a `linear` projection bridge it",
        )
