"""A linear layer whose weight is laid out once for the CPU's matrix kernels.

In: the weight (out, in) and bias of an ``nn.Linear``. Out: a callable rows (n, in) -> (n, out), in float32 or bfloat16
(products of bfloat16 numbers are added in float32), with an activation worked out while the result is still in cache.

oneDNN's packing has no public face in torch: its two operators are looked up at run time, tried against ``F.linear``,
and ``F.linear`` takes their place where they are absent or differ. A packed weight cannot be trained, moved or saved, so
it lives beside the module and is made again when that changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "silu", "gelu", "gelu_tanh", "relu"]
#: Name and algorithm by which oneDNN knows an activation.
_FUSED: dict[str, tuple[str, str]] = {
    "none": ("none", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
#: Rows for which the layout is chosen; those of eight images of a ViT-B/32. Other numbers of rows work as well.
USUAL_ROWS = 400


class NotPackable(Exception):
    """A module that does something else than its kind says, an adapted layer for instance: it runs as it is."""


class PackedLinear:
    """act(x Wᵀ + b), for inference.

    Args:
        weight: (out, in), any floating type; it is laid out anew, not kept (without oneDNN it may be shared).
        bias: (out,), or None.
        dtype: float32 or bfloat16: of the products' inputs and of the result. Sums are float32.
        activation: Applied to the result, before it is rounded to ``dtype``.

    Attributes:
        dtype: As given.
        out_features: Length of a row of the result.
        packed: Whether oneDNN's layout is used, not ``F.linear``.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype, activation: Activation = "none"
    ) -> None:
        self.dtype = dtype
        self.out_features = weight.shape[0]
        self.packed = can_pack(dtype)
        self._activation = activation
        with torch.inference_mode():
            self._bias = None if bias is None else bias.detach().to(dtype, copy=self.packed).contiguous()
            plain = weight.detach().to(dtype).contiguous()
            self._weight = _operators()[0](plain, USUAL_ROWS) if self.packed else plain

    def __call__(self, x: Tensor) -> Tensor:
        """Return rows (n, out) of type ``dtype`` for rows (n, in) of any floating type."""
        x = x.to(self.dtype)
        if not self.packed:
            return PLAIN[self._activation](F.linear(x, self._weight, self._bias))
        if not len(x):
            return x.new_empty(0, self.out_features)
        name, algorithm = _FUSED[self._activation]
        result: Tensor = _operators()[1](x, self._weight, self._bias, name, [], algorithm)
        return result


def pack(module: nn.Module, *, dtype: torch.dtype, activation: Activation = "none") -> PackedLinear:
    """Return the packed form of an ``nn.Linear``.

    Raises:
        NotPackable: Anything else, subclasses (adapted or quantised layers) included, or one with hooks.
    """
    require_plain(module, nn.Linear)
    assert isinstance(module, nn.Linear)
    return PackedLinear(module.weight, module.bias, dtype=dtype, activation=activation)


def require_plain(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Raise ``NotPackable`` unless a module is of exactly one of these classes, without hooks, in float32 on the CPU."""
    if type(module) not in kinds:
        raise NotPackable(f"{type(module).__name__} is not {' or '.join(k.__name__ for k in kinds)}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotPackable(f"a {type(module).__name__} has hooks")
    if "forward" in module.__dict__:
        raise NotPackable(f"a {type(module).__name__} has a forward of its own")
    for parameter in module.parameters(recurse=False):
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise NotPackable(f"weights are {parameter.dtype} on {parameter.device}")


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN's packed layer is here and agrees with ``F.linear``; tried once a type."""
    if not torch._C._has_mkldnn:
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 48, generator=generator), torch.randn(33, 48, generator=generator)
    bias = torch.randn(33, generator=generator)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    try:
        reorder, linear = _operators()
        with torch.inference_mode():
            packed = reorder(weight, 7)
            for activation, (name, algorithm) in _FUSED.items():
                found = linear(x, packed, bias, name, [], algorithm).float()
                expected = PLAIN[activation](F.linear(x.float(), weight.float(), bias.float()))
                if not bool((found - expected).abs().max() <= bound * expected.abs().max()):
                    return False
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def _operators() -> tuple[Any, Any]:
    operators: Any = torch.ops.mkldnn
    return operators._reorder_linear_weight, operators._linear_pointwise
