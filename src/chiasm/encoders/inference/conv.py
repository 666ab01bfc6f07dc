"""A convolution for inference: batch norm folded in, channels last, weight laid out once, ReLU and shortcut fused.

In: an ``nn.Conv2d`` and the ``nn.BatchNorm2d`` behind it. Out: a callable maps (batch, in, rows, columns) -> (batch, out,
rows, columns), in float32 or bfloat16 (products of bfloat16 numbers are added in float32), channels last in memory.

As with linear layers (:mod:`chiasm.encoders.inference.packed`) oneDNN's operators are private to torch: they are looked
up at run time, tried against ``F.conv2d``, and ``F.conv2d`` takes their place where they are absent or differ.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.encoders.inference.packed import NotPackable, require_plain

#: Images for which the layout is chosen. Other numbers work as well.
USUAL_BATCH = 8
Pair = tuple[int, int]


class PackedConv:
    """relu(x ∗ W + b + shortcut), for inference; ReLU and shortcut are optional.

    Args:
        conv: Its weight is copied.
        norm: Batch norm behind it, folded into weight and bias in float64; None: there is none.
        side: Rows and columns of the usual input, for which the layout is chosen; others work as well.
        dtype: float32 or bfloat16: of the products' inputs and of the result. Sums are float32.
        relu: Whether negative results become zero, before they are rounded to ``dtype``.

    Raises:
        NotPackable: Anything but a plain zero-padded convolution and a batch norm in eval mode with statistics.

    Attributes:
        dtype: As given.
        packed: Whether oneDNN's layout is used, not ``F.conv2d``.
    """

    def __init__(
        self, conv: nn.Module, norm: nn.Module | None, *, side: int, dtype: torch.dtype, relu: bool = False
    ) -> None:
        weight, bias = folded(conv, norm)
        assert isinstance(conv, nn.Conv2d)
        self.dtype = dtype
        self.packed = can_convolve(dtype)
        self._relu = relu
        self._shape = (_pair(conv.padding), _pair(conv.stride), _pair(conv.dilation), conv.groups)
        self._bias = None if bias is None else bias.to(dtype)
        plain = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        usual = (USUAL_BATCH, conv.in_channels, side, side)
        self._weight = _reordered(plain, *self._shape, usual) if self.packed else plain

    def __call__(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return maps of type ``dtype``, channels last.

        Args:
            x: At least one image, of any floating type and memory layout.
            shortcut: Added before the ReLU: as large as the result, of type ``dtype``, channels last. It is
                OVERWRITTEN with the result.
        """
        x = x.to(self.dtype, memory_format=torch.channels_last)
        padding, stride, dilation, groups = self._shape
        if not self.packed:
            out = F.conv2d(x, self._weight, self._bias, stride, padding, dilation, groups)
            out = out if shortcut is None else out.add_(shortcut)
            return out.relu_() if self._relu else out
        return _convolved(x, self._weight, self._bias, shortcut, self._relu, padding, stride, dilation, groups)


def folded(conv: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias (float32) of a convolution with the batch norm behind it, worked out in float64.

    W' = W · γ / √(var + eps) for each output channel, b' = (b − mean) · γ / √(var + eps) + β (Ioffe and Szegedy 2015,
    section 3.1, with the statistics of inference).

    Raises:
        NotPackable: See :class:`PackedConv`.
    """
    require_plain(conv, nn.Conv2d)
    assert isinstance(conv, nn.Conv2d)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise NotPackable(f"a convolution padded with `{conv.padding_mode}`, `{conv.padding}`")
    if norm is None:
        return conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    require_plain(norm, nn.BatchNorm2d)
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise NotPackable("a batch norm that uses the statistics of its batch")
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    bias = -mean if conv.bias is None else conv.bias.detach().double() - mean
    bias = bias * scale
    if norm.affine:
        bias = bias + norm.bias.detach().double()
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    return weight.float(), bias.float()


@cache
def can_convolve(dtype: torch.dtype) -> bool:
    """Return whether oneDNN's packed convolution is here and agrees with ``F.conv2d``; tried once a type."""
    if not torch._C._has_mkldnn:
        return False
    generator = torch.Generator().manual_seed(0)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    try:
        with torch.inference_mode():
            for kernel, stride, groups in ((3, 1, 1), (1, 1, 1), (3, 2, 4)):
                x, weight = _drawn(generator, 2, 16, 9, 9), _drawn(generator, 24, 16 // groups, kernel, kernel)
                bias = torch.randn(24, generator=generator)
                shape = ((kernel // 2,) * 2, (stride,) * 2, (1, 1), groups)
                plain = F.conv2d(x, weight, bias, stride, kernel // 2, 1, groups)
                other = _drawn(generator, *plain.shape)
                packed = _reordered(weight.to(dtype), *shape, (1, 16, 7, 7))  # of another size than what comes
                for relu in (False, True):
                    for shortcut in (None, other):
                        overwritten = None if shortcut is None else shortcut.to(dtype, copy=True)
                        found = _convolved(x.to(dtype), packed, bias.to(dtype), overwritten, relu, *shape).float()
                        expected = plain if shortcut is None else plain + shortcut
                        expected = expected.relu() if relu else expected
                        if not bool((found - expected).abs().max() <= bound * expected.abs().max()):
                            return False
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def _drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


def _reordered(
    weight: Tensor, padding: Pair, stride: Pair, dilation: Pair, groups: int, usual: tuple[int, ...]
) -> Tensor:
    operators: Any = torch.ops.mkldnn
    found: Tensor = operators._reorder_convolution_weight(weight, padding, stride, dilation, groups, usual)
    return found


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    relu: bool,
    padding: Pair,
    stride: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    operators: Any = torch.ops.mkldnn
    shape = (padding, stride, dilation, groups)
    if shortcut is None:
        out: Tensor = operators._convolution_pointwise(x, weight, bias, *shape, "relu" if relu else "none", [], "")
        return out
    out = operators._convolution_pointwise_.binary(
        shortcut, x, weight, bias, *shape, "add", 1.0, "relu" if relu else None, [], None
    )
    return out


def _pair(value: int | tuple[int, ...] | str) -> Pair:
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[1])
