"""In which arithmetic an encoder works out its vectors: what may be asked for, and what this machine runs fast.

``fp32`` is what parity is measured in. ``bf16`` is mixed: linear layers (and convolutions) multiply bfloat16 numbers and
add them in float32; the residual stream, LayerNorm, softmax, pooling and the projection's result stay float32. ``int8``
quantises linear layers and has to pass a check on the user's own images (:mod:`chiasm.encoders.inference.int8`).
``auto`` is ``bf16`` where a small trial shows that it pays, else ``fp32``; it is never ``int8``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from chiasm.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16", "int8"]
#: What runs everywhere, int8 aside; ``fp16`` is for those who know that their GPU wants it.
PRECISIONS: tuple[str, ...] = ("auto", "fp32", "bf16", "int8")
#: What ``auto`` stands for when it is set; for runs that must not depend on the machine.
VARIABLE = "CHIASM_PRECISION"
#: How many times as fast as float32 bfloat16 has to be to be chosen: below this its rounding buys nothing.
WORTH = 1.3
#: Rows, inputs and outputs of the layer that is tried: eight images of a ViT-B/32 with a quarter of its width.
_TRIAL = (400, 192, 768)


def resolve_precision(wanted: str, device: str | torch.device = "cpu") -> Precision:
    """Return the precision that a wish means on a device.

    Args:
        wanted: ``auto``, ``fp32``, ``bf16`` or ``int8``; also ``fp16``, which on a CPU means ``bf16`` because CPUs
            convert half-precision numbers one by one (3 GF/s where bfloat16 reaches hundreds).
        device: Where the encoder runs.

    Raises:
        ConfigError: Unknown, or int8 on a GPU.
    """
    place = torch.device(device)
    source = ""
    if wanted == "auto" and os.environ.get(VARIABLE):
        wanted, source = os.environ[VARIABLE], f" ({VARIABLE} names it)"
    if wanted == "auto":
        return "bf16" if bf16_pays(place.type) else "fp32"
    if wanted == "fp16":
        return "bf16" if place.type == "cpu" else "fp16"
    if wanted not in PRECISIONS:
        raise ConfigError(f"precision `{wanted}` is not known{source}", hint=f"one of: {', '.join(PRECISIONS)}")
    if wanted == "int8" and place.type != "cpu":
        raise ConfigError(f"precision `int8` runs on the CPU, the encoder is on `{place}`", hint="use `bf16` there")
    return wanted  # type: ignore[return-value]


@cache
def bf16_pays(device_type: str) -> bool:
    """Return whether bfloat16 matrix products are at least 1.3 times as fast as float32 ones here; tried once.

    On a CPU without bfloat16 instructions they are emulated and slower. On a GPU the driver says what it has.
    """
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type != "cpu":
        return False
    from chiasm.encoders.inference.packed import PackedLinear, can_pack

    if not can_pack(torch.bfloat16):
        return False
    rows, inputs, outputs = _TRIAL
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.zeros(outputs)
    with torch.inference_mode():
        plain, fast = (PackedLinear(weight, bias, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        # Other work on the machine can hide a gain, hardly make one up: one round of three that shows it is enough.
        return any(_gain(plain, fast, x) > WORTH for _ in range(3))


def _gain(plain: Callable[[Tensor], Tensor], fast: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Shortest of ten calls of one over that of the other, called in turn, after one of each that is not counted."""
    found: list[list[float]] = [[], []]
    for _ in range(11):
        for layer, seconds in zip((plain, fast), found, strict=True):
            began = time.perf_counter()
            layer(x)
            seconds.append(time.perf_counter() - began)
    return min(found[0][1:]) / min(found[1][1:])
