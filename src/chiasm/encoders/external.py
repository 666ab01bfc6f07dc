"""A torch module of the user's own package as a tower: ``package.module:factory``.

In: the source and the options of a tower's declaration. Out: a module with ``output_dim``, found by a dry run. The
factory is imported and called only when that is allowed: a recipe is the user's own, a model file may be anybody's.

Options of ours, all others go to the factory as keyword arguments:

- ``features``: name of a method that gives the feature map (batch, channels, rows, columns) or tokens
  (batch, n, channels); the output is then its mean, and patch tokens exist.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.encoders.base import ImageTowerConfig
from chiasm.errors import ChiasmError, ConfigError

#: Factories that chiasm itself ships; they need no permission.
OWN_FACTORIES = frozenset(
    f"chiasm.encoders.pretrained_demo:{name}" for name in ("efficientnet_lite0", "efficientnet_lite0_levels")
)


class ExternalImageTower(nn.Module):
    """A user's module behind the interface of an image tower.

    Args:
        module: pixels (batch, 3, size, size) -> (batch, width), or a feature map or tokens, whose mean is taken. It may
            have a method ``patch_tokens``: pixels -> (batch, rows, columns, width).
        features: Method of ``module`` to call instead of the module.
        image_size: Side of the input of the dry run, in pixels.

    Attributes:
        output_dim: Width of the output.
        stored: Of chiasm's own factories only: the declaration that builds the tower without its first weights.
    """

    stored: ImageTowerConfig

    def __init__(self, module: nn.Module, features: str | None, image_size: int) -> None:
        super().__init__()
        self.module = module
        self._method = _method(module, features)
        was_training = module.training
        module.eval()
        output = _dry_run(self._call, torch.zeros(2, 3, image_size, image_size))
        module.train(was_training)
        if output.ndim not in (2, 3, 4):
            raise ConfigError(f"the factory's module gives shape {tuple(output.shape)}; expected (batch, width)")
        self.output_dim = int(output.shape[{2: 1, 3: 2, 4: 1}[output.ndim]])
        self._has_patches = output.ndim > 2

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (batch, output_dim)."""
        if pixels.shape[0] == 0:
            return pixels.new_zeros(0, self.output_dim)
        output = self._call(pixels)
        if output.ndim == 4:
            return output.mean((2, 3))
        return output.mean(1) if output.ndim == 3 else output

    @property
    def patch_tokens(self) -> Any:
        """The function pixels -> (batch, rows, columns, output_dim), or None when the module gives only one vector."""
        return self._patch_tokens if self._has_patches else getattr(self.module, "patch_tokens", None)

    def _patch_tokens(self, pixels: Tensor) -> Tensor:
        output = self._call(pixels)
        if output.ndim == 4:
            return output.permute(0, 2, 3, 1)
        side = math.isqrt(output.shape[1])
        patches = output[:, output.shape[1] - side**2 :]
        return patches.reshape(patches.shape[0], side, side, patches.shape[2])

    def _call(self, pixels: Tensor) -> Tensor:
        output: Tensor = getattr(self.module, self._method)(pixels)
        return output


class ExternalTextTower(nn.Module):
    """A user's module behind the interface of a text tower.

    Args:
        module: (ids, mask), both (batch, tokens) -> (batch, width).
        context_length: Tokens of the dry run.

    Attributes:
        output_dim: Width of the output.
        pad_id: The module's own ``pad_id``, or None.
    """

    def __init__(self, module: nn.Module, context_length: int) -> None:
        super().__init__()
        self.module = module
        self.pad_id: int | None = getattr(module, "pad_id", None)
        ids = torch.zeros(2, context_length, dtype=torch.long)
        was_training = module.training
        module.eval()
        output = _dry_run(module, ids, torch.ones_like(ids))
        module.train(was_training)
        if output.ndim != 2:
            raise ConfigError(f"the factory's module gives shape {tuple(output.shape)}; expected (batch, width)")
        self.output_dim = int(output.shape[1])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (batch, output_dim)."""
        output: Tensor = self.module(ids, mask)
        return output


def build_python_tower(
    source: str,
    options: Mapping[str, Any],
    *,
    allow_code: bool = False,
    image_size: int | None = None,
    context_length: int | None = None,
) -> ExternalImageTower | ExternalTextTower:
    """Import a factory, call it, and return its module as a tower.

    Args:
        source: ``package.module:factory`` or ``package.module:Class.method``.
        options: ``features`` (see above); the rest are keyword arguments of the factory.
        allow_code: Permission to import and run the factory.
        image_size: Side of the input; None: 224.
        context_length: Given for a text tower: tokens of a text.

    Raises:
        ConfigError: No permission, no such factory, wrong options, or a module that does not fit.
    """
    source = source.removeprefix("python:")
    if not allow_code and source not in OWN_FACTORIES:
        raise ConfigError(
            f"a tower of this model is code (`{source}`), which is not run without permission",
            hint="if you trust where the model comes from: `allow_code=True`, on the command line `--allow-code`",
        )
    keywords = dict(options)
    features = keywords.pop("features", None)
    module = _made(source, keywords)
    if context_length is not None:
        return ExternalTextTower(module, context_length)
    return ExternalImageTower(module, features, image_size or 224)


def _made(source: str, keywords: dict[str, Any]) -> nn.Module:
    module_name, _, attribute = source.partition(":")
    try:
        found: Any = import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        package = (error.name or module_name).partition(".")[0]
        raise ConfigError(
            f"the tower `{source}` is code of the package `{package}`, which is not installed; a model folder holds "
            "the weights of such a tower, not its code",
            hint="install the package that the model was trained with, or correct `package.module:factory`",
        ) from error
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"there is no factory `{source}`: {error}", hint="write `package.module:factory`, installed in this Python"
        ) from error
    try:
        made = found(**keywords)
    except ChiasmError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the factory `{source}` refuses its options: {error}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"the factory `{source}` returns {type(made).__name__}; expected a torch.nn.Module")
    return made


def _method(module: nn.Module, features: str | None) -> str:
    if features is None:
        return "forward"
    if not callable(getattr(module, features, None)):
        raise ConfigError(f"{type(module).__name__} has no method `{features}`", hint="correct `options.features`")
    return features


def _dry_run(function: Any, *inputs: Tensor) -> Tensor:
    shapes = " and ".join(str(tuple(i.shape)) for i in inputs)
    try:
        with torch.inference_mode():
            output = function(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"the factory's module fails on an input of shape {shapes}: {error}") from error
    if not isinstance(output, Tensor):
        raise ConfigError(f"the factory's module returns {type(output).__name__}; expected a tensor")
    return output
