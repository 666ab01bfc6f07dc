"""What makes a training step faster on the machine at hand without changing what it computes.

Comes in: a model that is about to be trained. Two measures, each measured in `docs/lab-notes.md`:

- Convolutional towers are laid out channels-last, in which the CPU's and the GPU's convolution kernels work.
- Freed memory stays with the process. glibc returns every large block to the kernel and takes it back, zeroed, page by
  page, at the next allocation; a training step allocates the same large activations over and over.
"""

from __future__ import annotations

import ctypes
import platform
from typing import TypeVar

import torch
from torch import nn

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BELOW_BYTES = 2**30

M = TypeVar("M", bound=nn.Module)


def prepare_for_training(model: M) -> M:
    """Lay out convolutions channels-last and let the process keep the memory that steps free; return the model."""
    keep_freed_memory()
    if any(isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def keep_freed_memory() -> bool:
    """Tell glibc to serve blocks below 1 GiB from its heap and not to give it back; return whether it was told.

    Elsewhere (musl, macOS, Windows) nothing happens. The process's peak memory does not change; it keeps the peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BELOW_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
