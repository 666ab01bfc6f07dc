"""A device's name to the device, asked for before anything is put there."""

from __future__ import annotations

import torch

from chiasm.errors import InputError


def find_device(device: str | torch.device) -> torch.device:
    """Return the device, after asking whether this machine has it: torch's own complaint comes late and is long.

    Raises:
        InputError: Unknown, or not here.
    """
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device `{device}`", hint="`cpu`, `cuda`, `cuda:1` or `mps`") from None
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            raise InputError(f"device `{place}` is not here: {count} CUDA devices are available", hint="use `cpu`")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device `mps` is not here: this machine or this torch has no Metal", hint="use `cpu`")
    return place
