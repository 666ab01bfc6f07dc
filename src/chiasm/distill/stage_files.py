"""Stages on disk: the checkpoint of one that is under way, and the result of one that is done.

Comes in: tensors and where the stage stands. Goes out: ``STAGE-KEY.safetensors`` (done) and ``STAGE-KEY.part.safetensors``
(under way), each replaced by one rename. The key is a digest of all that decides the weights, so a file is either the
right one or has another name; a damaged file counts as absent and is made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.train.checkpoint import KEY, write_safetensors

FORMAT = "chiasm-stage-1"


@dataclass
class Position:
    """Where a stage stands.

    Attributes:
        step: Optimizer steps done, those of the warm-up included.
        best: Best value of the monitor so far; None before the first.
        best_step: Step of the stage proper at which that was.
        reference: The monitor when it last got better by more than ``min_delta``.
        stale: Validations since then.
        curve: Everything that was measured at each validation.
        seconds: Time spent, over all starts.
        done: Whether the stage has ended.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    reference: float | None = None
    stale: int = 0
    curve: tuple[Mapping[str, float], ...] = ()
    seconds: float = 0.0
    done: bool = False


@dataclass(frozen=True)
class StageFiles:
    """The two files of one stage.

    Attributes:
        folder: The cache, which runs may share.
        name: ``STAGE-KEY``.
    """

    folder: Path
    name: str

    @property
    def result(self) -> Path:
        """The finished stage."""
        return self.folder / f"{self.name}.safetensors"

    @property
    def checkpoint(self) -> Path:
        """The stage under way."""
        return self.folder / f"{self.name}.part.safetensors"

    def save(self, path: Path, tensors: Mapping[str, Tensor], position: Position, about: Mapping[str, Any]) -> None:
        """Write one of the two files.

        Raises:
            TrainingError: It cannot be written; the file before it is intact.
        """
        write_safetensors(path, tensors, {"format": FORMAT, "position": asdict(position), "about": dict(about)})

    def load(self, path: Path) -> tuple[dict[str, Tensor], Position, dict[str, Any]] | None:
        """Read one of the two files; None when it is absent, damaged, or of another kind."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[KEY])
                if header["format"] != FORMAT:
                    return None
                # Copies in memory of torch's own: arithmetic may depend on where a mapped file happens to lie.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            known = {f.name for f in fields(Position)}
            position = Position(**{k: v for k, v in header["position"].items() if k in known})
            position.curve = tuple(position.curve)
            return tensors, position, header["about"]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
            return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by ``optim/NUMBER/SLOT``, numbers in the order of its parameters."""
    tensors = {}
    for number, state in optimizer.state_dict()["state"].items():
        for slot, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optim/{number}/{slot}"] = value
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put :func:`optimizer_tensors` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optim/"):
            _, number, slot = name.split("/")
            state.setdefault(int(number), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below ``prefix/``, without it."""
    return {n.removeprefix(f"{prefix}/"): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}
