"""In which arithmetic the towers train: what a recipe may ask for, and what a run keeps when it goes on elsewhere.

Comes in: a recipe's wish (``auto``, ``fp32``, ``bf16``), the device, and the checkpoint of a run that goes on. Goes out:
``fp32`` or ``bf16``. In ``bf16`` the towers run under autocast, whose linear layers and convolutions multiply bfloat16
numbers; loss, weights, gradients and optimizer stay in float32. Unlike inference, training has no weights to pack once,
so autocast is the right form here.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from chiasm.encoders.precision import VARIABLE, bf16_pays
from chiasm.errors import ConfigError
from chiasm.train.checkpoint import read_position
from chiasm.train.distributed import Group, of_main
from chiasm.train.recipe import OptimConfig

TrainingPrecision = Literal["fp32", "bf16"]
#: What a run trained in whose checkpoint does not say so: the default of that time.
BEFORE = "fp32"


class PrecisionWarning(UserWarning):
    """A run goes on in another precision than this machine would choose for a new one."""


def training_precision(wanted: str, device: str | torch.device = "cpu") -> TrainingPrecision:
    """Return the precision that a wish means on a device.

    Args:
        wanted: ``fp32``, ``bf16`` or ``auto``. The latter is what the variable ``CHIASM_PRECISION`` says if that can be
            trained in, else bf16 where a small trial shows that it pays (:func:`chiasm.encoders.precision.bf16_pays`).
        device: Where the model trains.

    Raises:
        ConfigError: Something else; weights in whole numbers (``int8``) cannot be trained.
    """
    if wanted == "auto":
        stated = os.environ.get(VARIABLE, "auto")
        wanted = stated if stated in ("fp32", "bf16") else "bf16" if bf16_pays(torch.device(device).type) else "fp32"
    if wanted == "bf16":
        return "bf16"
    if wanted != "fp32":
        raise ConfigError(
            f"`optim.precision` is `{wanted}`, in which nothing can be trained", hint="one of: auto, fp32, bf16"
        )
    return "fp32"


def settle_precision(
    optim: OptimConfig, device: str | torch.device, *, goes_on_from: Path | None = None, group: Group | None = None
) -> OptimConfig:
    """Return the configuration with ``fp32`` or ``bf16`` in the place of ``auto``; all processes get the same.

    Args:
        optim: Of the recipe.
        device: Where the model trains.
        goes_on_from: Checkpoint of the run that is resumed, if it is there: under ``auto`` its precision is kept, with
            a warning where this machine would choose another one.
        group: The processes; the first one decides.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    if optim.precision != "auto":
        return optim
    chosen = training_precision("auto", device)
    if goes_on_from is not None and goes_on_from.exists():
        began = read_position(goes_on_from).precision or BEFORE
        if began != chosen:
            warnings.warn(
                f"the run began in {began} and goes on in it; for a new run this machine would choose {chosen}",
                PrecisionWarning,
                stacklevel=3,
            )
        chosen = training_precision(began, device)
    is_bf16 = of_main({"bf16": float(chosen == "bf16")}, group or Group())["bf16"]
    return replace(optim, precision="bf16" if is_bf16 else "fp32")


def arithmetic(precision: TrainingPrecision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which towers run: autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
