"""A linear layer in int8: weights with one scale an output, inputs with one scale a row, sums exact.

In: rows (n, in), float32, or rows that are int8 already. Out: act(x Wᵀ + b), float32 or int8 rows. Each row is rounded by
its own largest value, so an embedding never depends on what else is in its batch (one scale for a whole tensor, as ONNX
Runtime's dynamic quantisation has it, moves embeddings by more than the rounding itself). Both roundings are symmetric,
to -127..127. Nothing is calibrated and nothing is written to disk.

The products are oneDNN's (``torch.ops.onednn.qlinear_pointwise``: AMX or VNNI where the processor has them); what stands
around them is ``int8_rows.c``. Both are tried at first use, with values at which sums of 16 bits would saturate. Where
one is absent or wrong torch computes the same numbers in float32, slower.

References: Dettmers et al. 2022, LLM.int8() (vector-wise quantisation, and why outlier channels break it: whoever
uses this has the result checked, see :mod:`chiasm.encoders.inference.gate`).
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.encoders.inference.packed import PLAIN, Activation, PackedLinear

_VERSION = 1  # of the interface of int8_rows.c
#: What the compiled code works out itself; others follow it.
_COMPILED: dict[str, int] = {"none": 0, "silu": 1, "relu": 2}
_LEAST = 1e-30  # below this a row or a channel counts as zeros


class Rows(NamedTuple):
    """Rows as int8.

    Attributes:
        values: (n, width), int8, -127..127.
        scale: (n,), float32: a row is ``values * scale``; NaN for a row with something that was no finite number.
    """

    values: Tensor
    scale: Tensor


class QuantizedLinear:
    """act(x Wᵀ + b) with int8 products, for inference.

    Args:
        weight: (out, in); it is rounded, not kept.
        bias: (out,), or None; stays float32.
        activation: Applied to the result, in float32.
        int8_result: Whether the result is :class:`Rows` for the next such layer, not float32.

    Attributes:
        out_features: Length of a row of the result.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, activation: Activation = "none", int8_result: bool = False
    ) -> None:
        self.out_features = weight.shape[0]
        self._activation = activation
        self._int8_result = int8_result
        with torch.inference_mode():
            weight = weight.detach().float()
            self._bias = None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
            self._scale = weight.abs().amax(1).clamp(min=_LEAST) / 127
            values = (weight / self._scale[:, None]).round()
            self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
            self._packed: Tensor | None = None
            self._plain: Tensor | None = None
            if can_multiply():
                self._packed = _operators().qlinear_prepack(values.to(torch.int8), None)
            else:
                self._plain = values * self._scale[:, None]

    def __call__(self, x: Tensor | Rows) -> Tensor | Rows:
        """Return (n, out) for rows (n, in) of any floating type, or for rows that are int8 already."""
        rows = x if isinstance(x, Rows) else quantize_rows(x.float())
        return finish_rows(
            self._product(rows.values), rows.scale, self._bias, activation=self._activation,
            int8_result=self._int8_result,
        )  # fmt: skip

    def _product(self, values: Tensor) -> Tensor:
        """Sums times the weights' scales, a tensor of its own."""
        if self._plain is not None:
            return F.linear(values.float(), self._plain)
        if not len(values):
            return torch.empty(0, self.out_features)
        return _multiply(values, self._packed, self._scale, self._zeros)


def make_linear(
    weight: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    activation: Activation = "none",
    int8_result: bool = False,
) -> Any:
    """Return the layer of a type: :class:`QuantizedLinear` of ``torch.int8``, else :class:`PackedLinear`.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        dtype: ``torch.int8``, or what :class:`PackedLinear` takes.
        activation: Applied to the result.
        int8_result: Of int8 alone: the result goes to another such layer and nowhere else.
    """
    if dtype == torch.int8:
        return QuantizedLinear(weight, bias, activation=activation, int8_result=int8_result)
    return PackedLinear(weight, bias, dtype=dtype, activation=activation)


def quantize_rows(x: Tensor) -> Rows:
    """Round each row of (n, width), float32, by its own largest value; ties go to the even number."""
    library = _library()
    if library is not None and len(x):
        rows: Rows = _compiled_rows(library, x.contiguous(), None, None, 0, int8_result=True)
        return rows
    largest = x.abs().amax(1) if x.numel() else x.new_zeros(len(x))
    scale = largest.clamp(min=_LEAST) / 127
    scale = torch.where(largest.isfinite(), scale, float("nan"))
    return Rows((x * (1 / scale)[:, None]).nan_to_num_(0.0).round_().to(torch.int8), scale)


def finish_rows(
    y: Tensor, scale: Tensor, bias: Tensor | None, *, activation: Activation = "none", int8_result: bool = False
) -> Tensor | Rows:
    """Return act(y · scale + bias), as float32 or as int8 rows.

    Args:
        y: (n, width), float32; overwritten.
        scale: (n,).
        bias: (width,), or None.
        activation: By name.
        int8_result: Whether to round the rows.
    """
    library = _library()
    number = _COMPILED.get(activation)
    if library is not None and len(y) and y.is_contiguous():
        if number is not None:
            found: Tensor | Rows = _compiled_rows(library, y, scale, bias, number, int8_result=int8_result)
            return found
        y = PLAIN[activation](_compiled_rows(library, y, scale, bias, 0, int8_result=False))
    else:
        y = y.mul_(scale[:, None])
        y = PLAIN[activation](y if bias is None else y.add_(bias))
    return quantize_rows(y) if int8_result else y


def _compiled_rows(
    library: ctypes.CDLL, y: Tensor, scale: Tensor | None, bias: Tensor | None, activation: int, *, int8_result: bool
) -> Any:
    """Sizes are those of the tensors; all of them are contiguous and of the types that C expects."""
    values = torch.empty(y.shape, dtype=torch.int8) if int8_result else None
    found = torch.empty(len(y)) if int8_result else None
    library.chiasm_int8_rows(
        y.data_ptr(), *y.shape,
        None if scale is None else scale.data_ptr(), None if bias is None else bias.data_ptr(), activation,
        None if values is None else values.data_ptr(), None if found is None else found.data_ptr(), _widest(),
    )  # fmt: skip
    return y if values is None or found is None else Rows(values, found)


def _operators() -> Any:
    return torch.ops.onednn


def _multiply(values: Tensor, packed: Tensor | None, scale: Tensor, zeros: Tensor) -> Tensor:
    result: Tensor = _operators().qlinear_pointwise(
        values, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


@cache
def can_multiply() -> bool:
    """Return whether oneDNN's int8 product is here and exact, also where sums of 16 bits would saturate; tried once."""
    if not torch._C._has_mkldnn:
        return False
    generator = torch.Generator().manual_seed(0)
    values, weight = (torch.randint(-127, 128, (n, 64), generator=generator, dtype=torch.int8) for n in (7, 33))
    values[:2], weight[:2] = 127, 127
    values[1], weight[1, ::2] = -127, -127
    scale = torch.rand(33, generator=generator) + 0.5
    try:
        with torch.inference_mode():
            packed = _operators().qlinear_prepack(weight, None)
            found = _multiply(values, packed, scale, torch.zeros(33, dtype=torch.int32))
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    expected = (values.double() @ weight.double().T) * scale
    return bool(((found - expected).abs() <= 1e-5 * expected.abs() + 1e-3).all())


@cache
def _library() -> ctypes.CDLL | None:
    library = load_library(Path(__file__).parent)
    return library if library is not None and _agrees(library) else None


@cache
def _widest() -> int:
    library = load_library(Path(__file__).parent)
    return 0 if library is None else int(library.chiasm_int8_rows_widest())


def load_library(folder: Path) -> ctypes.CDLL | None:
    """Return the compiled code of a folder, or None where it is absent, foreign to this machine or of another version."""
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_int8_rows{suffix}"
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            call, version, widest = (
                library.chiasm_int8_rows, library.chiasm_int8_rows_version, library.chiasm_int8_rows_widest,
            )  # fmt: skip
        except (OSError, AttributeError):
            continue
        version.argtypes = widest.argtypes = []
        version.restype = widest.restype = ctypes.c_int32
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        call.argtypes = [pointer, size, size, pointer, pointer, ctypes.c_int, pointer, pointer, ctypes.c_int32]
        call.restype = None
        if version() == _VERSION:
            return library
    return None


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether a few rows come out as torch has them."""
    generator = torch.Generator().manual_seed(0)
    y, bias = torch.randn(3, 70, generator=generator) * 30, torch.randn(70, generator=generator)
    scale = torch.tensor([0.5, 1.0, 3.0])
    for name, number in _COMPILED.items():
        expected = PLAIN[name](y * scale[:, None] + bias)
        rows = _compiled_rows(library, y.clone(), scale, bias, number, int8_result=True)
        off = (rows.values * rows.scale[:, None] - expected).abs() > 0.51 * rows.scale[:, None]
        if bool(off.any()) or not torch.allclose(rows.scale * 127, expected.abs().amax(1), rtol=1e-5):
            return False
    return True
