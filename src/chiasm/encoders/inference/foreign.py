"""Towers that are not chiasm's own, for inference in mixed bfloat16: the same module with packed linear layers.

In: a module whose code nobody here has read (a model of transformers, a user's own). Out: a *twin* that runs the same
code on the same parameters, in which every plain ``nn.Linear`` multiplies packed bfloat16 numbers and gives back the type
that came in. No weight is copied but the packed ones, and the module itself is not changed.

Nobody knows what foreign code does with its layers, so twin and module are compared on random input before the twin is
used. Code that reads ``linear.weight`` itself (``nn.MultiheadAttention``) finds the module's own parameter and is exact.

In float32 a foreign tower runs as it is: packing alone gained 1.0 to 1.06 times (ViT, Swin, ConvNeXt), which is not worth
a second copy of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.encoders.inference.packed import NotPackable, PackedLinear
from chiasm.errors import ChiasmError

#: Largest 1 − cosine of a row of the twin's result to the module's.
BOUND = 1e-4
#: Rows of the input that both are tried on, and tokens of a text.
TRIED, TOKENS = 2, 12
#: Ids of the tried texts stay below this: every vocabulary has as many.
SMALL_IDS = 10
#: Where transformers' own hooks come from: they note hidden states when asked to, and change nothing.
_RECORDER = "transformers.utils.output_capturing"


class PackedLayer(nn.Linear):
    """A linear layer that multiplies packed numbers; its parameters are the original's."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._parameters = linear._parameters
        self.training = False
        self.packed = PackedLinear(linear.weight, linear.bias, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features), of the input's type, for (..., in_features)."""
        rows = input.reshape(-1, self.in_features)
        return self.packed(rows).to(input.dtype).view(*input.shape[:-1], self.out_features)


def foreign_form(tower: nn.Module, dtype: torch.dtype, *, side: int = 224) -> Callable[[Tensor], Tensor]:
    """Return the twin of an image tower: pixels (batch, 3, side, side) -> (batch, width).

    Args:
        tower: In eval mode, float32, on the CPU.
        dtype: bfloat16.
        side: Of the pixels that are tried, where the tower does not state its ``image_size``.

    Raises:
        NotPackable: See :func:`make_twin`; or the twin's result is too far from the tower's.
    """
    twin: Callable[[Tensor], Tensor] = make_twin(tower, dtype)
    stated = getattr(tower, "image_size", None)
    generator = torch.Generator().manual_seed(0)
    edge = stated if isinstance(stated, int) else side
    _compare(tower, twin, torch.randn(TRIED, 3, edge, edge, generator=generator))
    return twin


def foreign_text_form(side: nn.Module, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the twin of a text side, projection included: ids (batch, tokens), lengths (batch,) -> (batch, dim).

    Args:
        side: A :class:`~chiasm.encoders.dual.ProjectedTextTower`, in eval mode, float32, on the CPU.
        dtype: bfloat16.

    Raises:
        NotPackable: As :func:`foreign_form`.
    """
    twin: Callable[[Tensor, Tensor | None], Tensor] = make_twin(side, dtype)
    ids = torch.randint(1, SMALL_IDS, (TRIED, TOKENS), generator=torch.Generator().manual_seed(0))
    _compare(side, twin, ids, torch.tensor([TOKENS, TOKENS // 2]))
    return twin


def make_twin(module: nn.Module, dtype: torch.dtype) -> Any:
    """Return a module that runs the same code on the same parameters with packed linear layers.

    Raises:
        NotPackable: float32 or int8; a module that has hooks, is in training mode, on another device or of another type;
            one without linear layers.
    """
    if dtype != torch.bfloat16:
        raise NotPackable(f"{type(module).__name__} is not chiasm's own and runs as it is in {dtype}")
    for part in module.modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if any(not str(getattr(hook, "__module__", "")).startswith(_RECORDER) for hook in hooks):
            raise NotPackable(f"a {type(part).__name__} has hooks")
        if part.training:
            raise NotPackable(f"a {type(part).__name__} is in training mode")
    for parameter in module.parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise NotPackable(f"weights are {parameter.dtype} on {parameter.device}")
    if not any(type(part) is nn.Linear for part in module.modules()):
        raise NotPackable(f"{type(module).__name__} holds no linear layers")
    return _twin(module, dtype, {})


def _twin(module: nn.Module, dtype: torch.dtype, made: dict[int, nn.Module]) -> nn.Module:
    """``made``: what stands in two places stays one module."""
    if id(module) not in made:
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            made[id(module)] = PackedLayer(module, dtype)
        else:
            other = made[id(module)] = copy.copy(module)
            other._modules = {
                name: None if child is None else _twin(child, dtype, made) for name, child in module._modules.items()
            }
    return made[id(module)]


def _compare(module: Any, twin: Any, *inputs: Tensor) -> None:
    name = type(module).__name__
    try:
        with torch.inference_mode():
            expected, found = module(*inputs), twin(*inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, ChiasmError) as error:
        raise NotPackable(f"{name} cannot be tried: {type(error).__name__}") from error
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor) or expected.shape != found.shape:
        raise NotPackable(f"{name} gives no tensor, or another one with packed layers")
    near = F.cosine_similarity(found.flatten(1).double(), expected.flatten(1).double())
    length = found.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    if not bool((1 - near).max() <= BOUND) or not bool((length - 1).abs().max() <= BOUND**0.5):
        raise NotPackable(f"{name} gives other vectors with packed layers: 1 - cos is {float((1 - near).max()):.1e}")
