"""The image side of an encoder: a tower with its projection, or the bare backbone. No text code is imported here.

In: :class:`EncoderConfig`. Out: a module pixels -> vectors. ``encoders.build`` puts a text side beside it; a vision
classifier (:mod:`chiasm.classifier`) needs nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, LoraConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.named import build_named_tower
from chiasm.encoders.resnet import ModifiedResNet
from chiasm.encoders.vit import VisionTransformer
from chiasm.errors import ConfigError, InputError


class ProjectedImageTower(nn.Module):
    """Any image tower with a projection behind it.

    Args:
        trunk: pixels -> (batch, ``trunk.output_dim``); may have ``patch_tokens``: pixels -> (batch, rows, columns,
            ``trunk.output_dim``).
        head: Projection into the joint space.
        output_dim: Dimensions of the joint space.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, output_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.output_dim = output_dim

    def forward(self, pixels: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return the embeddings (batch, output_dim), not normalised; ``prior``: see :meth:`DualEncoder.encode_image`."""
        embedded: Tensor = self.head(self.trunk(pixels) if prior is None else self.trunk(pixels, prior))
        return embedded

    def patch_features(self, pixels: Tensor) -> Tensor:
        """Return (batch, rows, columns, output_dim): each patch of the trunk through the head, not normalised."""
        patches = getattr(self.trunk, "patch_tokens", None) or getattr(self.trunk, "patch_features", None)
        if patches is None:
            raise InputError(
                "this image tower has no patch tokens, so it has no heat maps of patches",
                hint="give the tower a method `patch_tokens(pixels) -> (batch, rows, columns, output_dim)`",
            )
        embedded: Tensor = self.head(patches(pixels))
        return embedded

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return what still trains when the tower is locked."""
        return list(self.head.parameters())


class NoDraws(TorchFunctionMode):
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


def build_image_tower(
    config: ImageTowerConfig,
    projection: ProjectionConfig,
    generator: Generator,
    device: str,
    allow_code: bool,
) -> nn.Module:
    """Return an image tower with its projection; native towers hold a linear one themselves.

    Raises:
        ConfigError: Widths that do not fit, or code that is not allowed.
    """
    fused = config.is_native and projection.is_fused("image")
    inner_dim = projection.dim if fused and projection.image == "linear" else None
    trunk: nn.Module
    if config.kind in ("vit", "resnet"):
        kind = VisionTransformer if config.kind == "vit" else ModifiedResNet
        with torch.device("meta"):
            trunk = kind(config, inner_dim)
        draw_weights(trunk, generator, device)
    elif config.kind == "huggingface":
        from chiasm.encoders.huggingface import build_huggingface_image_tower

        trunk = build_huggingface_image_tower(config)
    elif config.kind == "named":
        trunk = build_named_tower(config)
    else:
        trunk = python_tower(config, allow_code)
    check_width(trunk, config.output_dim if not config.is_native else None, "image.output_dim")
    adapt_tower(trunk, config.freeze, config.lora, native=config.is_native)
    if fused:
        check_width(trunk, projection.dim, "projection.dim")
        return trunk
    head = projection_head(projection.image, trunk, projection, "image", device)
    return ProjectedImageTower(trunk, head, projection.dim)


def draw_weights(tower: Any, generator: Generator, device: str) -> None:
    """Give a native tower made on the meta device memory and drawn weights; on ``meta`` do nothing."""
    if device != "meta":
        tower.to_empty(device=device)
        tower.init_weights(generator)


def python_tower(config: ImageTowerConfig | TextTowerConfig, allow_code: bool) -> nn.Module:
    """Return the tower of a declaration of kind ``python``."""
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


def adapt_tower(trunk: nn.Module, freeze: bool, lora: LoraConfig | None, *, native: bool) -> None:
    """Lock and adapt a tower as declared; the projection inside a native tower still trains."""
    if not freeze and lora is None:
        return
    from chiasm.encoders import adapters

    if freeze:
        adapters.freeze(trunk)
    if lora is not None:
        adapters.apply_lora(trunk, lora)
    if native:
        own: Any = trunk
        for parameter in own.projection_parameters():
            parameter.requires_grad_(True)


def projection_head(
    kind: Literal["linear", "mlp", "none"],
    trunk: nn.Module,
    config: ProjectionConfig,
    side: Literal["image", "text"],
    device: str,
) -> nn.Module:
    """Return the projection of one side as a module of its own."""
    from chiasm.encoders.adapters import make_projection

    width = int(trunk.output_dim)  # type: ignore[arg-type]
    if kind == "none":
        check_width(trunk, config.dim, f"projection.{side}")
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


def check_width(trunk: nn.Module, expected: int | None, field: str) -> None:
    """Raise ``ConfigError`` unless the tower gives as many numbers as a field states."""
    width = int(trunk.output_dim)  # type: ignore[arg-type]
    if expected is not None and width != expected:
        raise ConfigError(
            f"`{field}` wants {expected} dimensions, the tower gives {width}",
            hint="set the width to match, or let a `linear` projection bridge it",
        )


def build_backbone(
    config: EncoderConfig,
    *,
    projected: bool = False,
    allow_code: bool = False,
    seed: int = 0,
    device: Literal["cpu", "meta"] = "cpu",
    draw: bool = True,
) -> nn.Module:
    """Build the image side alone: pixels (batch, 3, size, size) -> (batch, ``output_dim``).

    Args:
        config: The declaration; its text side is not looked at.
        projected: Whether the vectors are those of the joint space, or the tower's own output before the projection.
        allow_code: Whether a tower of kind ``python`` may run the factory that the declaration names.
        seed: Of the drawn weights.
        device: ``meta`` allocates nothing; for native towers whose weights will be assigned.
        draw: False fills foreign towers with zeros, since their weights will be assigned.

    Raises:
        ConfigError: No image side, an ensemble, widths that do not fit, or code that is not allowed.
    """
    if not config.has_image or config.members is not None:
        raise ConfigError("a backbone is the image tower of one encoder", hint="name a model with an image side")
    with torch.random.fork_rng(devices=[]), nullcontext() if draw else NoDraws():
        torch.manual_seed(seed)
        generator = Generator().manual_seed(seed)
        visual = build_image_tower(config.image, config.projection, generator, device, allow_code)
        visual = visual if projected else without_projection(visual)
    return visual.to(device)


def without_projection(visual: nn.Module) -> nn.Module:
    """Return an image tower without its projection; weights are shared, the argument is not changed.

    The attention pool of a CLIP ResNet keeps its output matrix, which is part of the pooling.
    """
    if isinstance(visual, ProjectedImageTower):
        return visual.trunk
    bare: Any = copy.copy(visual)
    if isinstance(visual, VisionTransformer):
        bare._parameters = {**visual._parameters, "proj": None}
        bare.output_dim = visual.ln_post.weight.shape[0]
    elif isinstance(visual, ModifiedResNet) and visual.fc is not None:
        bare._modules = {**visual._modules, "fc": None}
        bare.output_dim = visual.fc.in_features
    return bare  # type: ignore[no-any-return]
