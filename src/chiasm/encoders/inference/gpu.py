"""An encoder's two towers as they run on a GPU: autocast, channels last for convolutions, on demand a CUDA graph.

In: a model on a device and a precision. Out: :class:`GpuEngine`, with the signatures of
:class:`~chiasm.encoders.inference.engine.Engine`. The model itself runs, its weights stay float32 and where they are:
autocast casts matrix products and convolutions, and keeps LayerNorm, softmax and sums of the residual stream in
float32; attention goes to torch's fused kernels, as ``scaled_dot_product_attention`` chooses.

TF32 (float32 with 10 bits of mantissa) is torch's setting for the whole process and is left alone: matrix products do not
use it unless ``torch.set_float32_matmul_precision`` says so, but cuDNN's convolutions do by default, patch embeddings
and ResNets included. Who measures parity in ``fp32`` on a GPU sets ``torch.backends.cudnn.allow_tf32 = False``.

Nothing here needs a GPU to be imported or tried: with a CPU as the device the same code runs under the CPU's autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.encoders.dual import DualEncoder
from chiasm.encoders.precision import Precision
from chiasm.errors import ConfigError

#: A function of one tensor whose shape never changes, and an example -> the same function, recorded.
Record = Callable[[Callable[[Tensor], Tensor], Tensor], Callable[[Tensor], Tensor]]
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Calls before a graph is recorded: libraries choose their kernels and reserve memory in them.
WARM_UP = 3


class GpuEngine:
    """A model on a GPU, in one precision.

    Args:
        model: In eval mode, on its device.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        static_batch: Record images as a CUDA graph of this many: no time is lost between kernels, which pays for small
            batches. Each call is cut into such batches, the last one filled up with zeros. None: no graph. Texts are cut
            to their longest, so that no shape is fixed and none is recorded.

    Raises:
        ConfigError: int8, or a batch below 1.

    Attributes:
        plain: Empty: both sides run in the precision that was asked for.
        gate: None: int8 alone is checked.
    """

    gate = None

    def __init__(self, model: DualEncoder, precision: Precision, *, static_batch: int | None = None) -> None:
        if precision != "fp32" and precision not in TYPES:
            raise ConfigError(f"precision `{precision}` does not run on `{model.device}`", hint="use `bf16`")
        self.plain: dict[str, str] = {}
        self._model = model
        self._device = model.device
        self._dtype = TYPES.get(precision)
        self._image: Callable[[Tensor], Tensor] = self._embed
        if static_batch is not None:
            record = recorded if self._device.type == "cuda" else unrecorded
            self._image = StaticBatches(self._embed, static_batch, model.config.dim, record)

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """As :meth:`DualEncoder.encode_image`, without prior images; float32."""
        with self._arithmetic():
            features = self._image(pixels)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, ids: Tensor, lengths: Tensor | None = None, normalize: bool = False) -> Tensor:
        """As :meth:`DualEncoder.encode_text`; float32."""
        with self._arithmetic():
            features = self._model.encode_text(ids, lengths).float()
        return F.normalize(features, dim=-1) if normalize else features

    def _embed(self, pixels: Tensor) -> Tensor:
        return self._model.encode_image(pixels.contiguous(memory_format=torch.channels_last)).float()

    def _arithmetic(self) -> AbstractContextManager[object]:
        if self._dtype is None:
            return nullcontext()
        # Each weight is cast once a call, so that a cache gains nothing; inside of a graph it would be an error.
        return torch.autocast(self._device.type, dtype=self._dtype, cache_enabled=False)


class StaticBatches:
    """A function of batches of one size, for batches of any.

    Args:
        call: (batch, ...) -> (batch, width), row by row: no row looks at another.
        batch: The one size.
        width: Of a row of the result.
        record: What makes ``call`` fast for that size.

    Raises:
        ConfigError: A batch below 1.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], batch: int, width: int, record: Record) -> None:
        if batch < 1:
            raise ConfigError(f"a static batch has at least 1 image, got {batch}")
        self._call, self._batch, self._width, self._record = call, batch, width, record
        self._recorded: dict[tuple[object, ...], Callable[[Tensor], Tensor]] = {}
        self._lock = Lock()  # a graph has one input and one output, which two threads must not share

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, width) for (n, ...)."""
        if not len(x):
            return torch.zeros(0, self._width, device=x.device)
        with self._lock:
            return torch.cat([self._one(part) for part in torch.split(x, self._batch)])

    def _one(self, part: Tensor) -> Tensor:
        count = len(part)
        if count < self._batch:
            part = torch.cat([part, part.new_zeros(self._batch - count, *part.shape[1:])])
        key = (tuple(part.shape), part.dtype)
        if key not in self._recorded:
            self._recorded[key] = self._record(self._call, part)
        return self._recorded[key](part)[:count].clone()


def recorded(call: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``call`` as a CUDA graph: its kernels are launched at once, on the memory of ``example``'s copy.

    Weights that change in place are seen; weights that are replaced are not. The result is overwritten by the next call.
    """
    place = example.clone()
    stream: Any = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call(place)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # On the stream of this device, not of the current one; other threads may reserve page-locked memory meanwhile.
    with torch.cuda.device(example.device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = call(place)

    def replay(x: Tensor) -> Tensor:
        place.copy_(x)
        graph.replay()
        return result

    return replay


def unrecorded(call: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``call``: where there are no graphs, batches of one size still fix all shapes."""
    return call
