"""Checkpoints that survive ``kill -9`` and a full disk, and from which training goes on bit for bit.

Comes in: model, optimizer, position. Goes out: one safetensors file, so that one rename makes it current; a killed or
failed write leaves the file before it. Weights, optimizer state and JSON only: nothing in it can run.

Notable choices. Locked weights are left out and recognised by their digest, since they come from the recipe's source
again. The order of batches, augmentation and dropout are functions of (seed, step, rank), see ``train.loop``; hence the
step is the whole position of the loader and of every random generator, and no generator state can go stale.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.encoders.base import weights_digest
from chiasm.errors import CheckpointError, TrainingError
from chiasm.train.distributed import spread_like, whole
from chiasm.train.optim import plain_name

FORMAT = "chiasm-training-1"
KEY = "chiasm"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        seed: Of the run.
        config: Digest of what must not change between start and resume.
        best: Best value of the selection metric so far, or None before the first validation.
        best_step: Step of that value.
        stale: Validations since then.
        last: Metrics of the last validation.
        best_metrics: All metrics at ``best_step``.
        done: Whether the run has ended (by its length or by early stopping).
        precision: What the run trains in; empty in checkpoints that do not say so.
    """

    step: int = 0
    seed: int = 0
    config: str = ""
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    last: Mapping[str, float] | None = None
    best_metrics: Mapping[str, float] | None = None
    done: bool = False
    precision: str = ""


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes: parameters that are not locked, and all buffers that are saved."""
    locked = {plain_name(n) for n, p in model.named_parameters() if not p.requires_grad}
    state = {plain_name(n): t for n, t in model.state_dict().items()}
    return {n: t for n, t in state.items() if n not in locked}


def locked_digest(model: nn.Module) -> str:
    """Return the digest of the locked parameters; empty when nothing is locked."""
    locked = {plain_name(n): whole(p) for n, p in model.named_parameters() if not p.requires_grad}
    return weights_digest(locked) if locked else ""


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    position: Position,
    locked: str | None = None,
    write: bool = True,
) -> None:
    """Write weights, optimizer state and position atomically.

    When the weights are spread over several processes, all of them must call this, since each holds a part.

    Args:
        path: A ``.safetensors`` file; an existing one is replaced in one step.
        model: Its locked parameters are left out.
        optimizer: None for a file that only holds weights (the best ones).
        position: Where the run stands.
        locked: :func:`locked_digest` if the caller has it already.
        write: Whether this process is the one that writes.

    Raises:
        TrainingError: When the file cannot be written (full disk, no permission); the file before it is intact.
    """
    tensors = {f"model/{n}": whole(t) for n, t in trained_state(model).items()}
    if optimizer is not None:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for slot, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optim/{name}/{slot}"] = whole(value)
    if not write:
        return
    header = {
        "format": FORMAT,
        "locked": locked_digest(model) if locked is None else locked,
        "position": asdict(position),
    }
    write_safetensors(path, tensors, header)


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file by way of a synced temporary file beside it and a rename.

    ``header`` becomes one string of metadata, since safetensors writes several in an order that varies.

    Raises:
        TrainingError: When the disk is full or the folder cannot be written; nothing is left of the attempt.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        # Copies: a tied weight would share its storage, which safetensors refuses.
        save_file(
            {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()},
            temporary,
            {KEY: json.dumps(header, sort_keys=True)},
        )
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"checkpoint `{path.name}` cannot be written: {_reason(error)}; the one before it is kept",
            hint="free some space or choose another `run.out`, then go on with `--resume`",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")


def _remove_leftovers(path: Path) -> None:
    """Delete what killed runs left of their unfinished writes of this file."""
    for leftover in path.parent.glob(f".{path.name}.*.part"):
        leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_position(path: str | Path) -> Position:
    """Return where the run of a checkpoint stood, without reading its tensors.

    Raises:
        CheckpointError: When the file is absent, damaged or not a training checkpoint.
    """
    return _read(Path(path), with_tensors=False)[1]


def load_checkpoint(path: str | Path, model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> Position:
    """Put a checkpoint's weights (and optimizer state) into ``model`` (and ``optimizer``), bit for bit.

    Raises:
        CheckpointError: When the file is absent, damaged, or made by another model; nothing is changed then.
    """
    path = Path(path)
    tensors, position, locked = _read(path, with_tensors=True)
    weights = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    target = trained_state(model)
    _check_same(path, {n: t.shape for n, t in target.items()}, {n: t.shape for n, t in weights.items()})
    if locked != locked_digest(model):
        raise CheckpointError(
            f"checkpoint `{path.name}` was trained on other locked weights than the model has now",
            hint="restore the tower that the run started with, or start a new run",
        )
    states = _optimizer_states(path, optimizer, tensors) if optimizer is not None else None
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(spread_like(weights[name], tensor))
    if optimizer is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
    return position


def _optimizer_states(
    path: Path, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    parameters = {n: p for g in optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)}
    names = list(parameters)
    shapes = {n: p.shape for n, p in parameters.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optim/"):
            name, _, slot = key.removeprefix("optim/").rpartition("/")
            found.setdefault(name, {})[slot] = _laid_out(value, parameters.get(name))
    if found:  # a run that is at step 0 has no state yet
        _check_same(path, shapes, {n: s["exp_avg"].shape if "exp_avg" in s else None for n, s in found.items()})
    return {i: found[n] for i, n in enumerate(names) if n in found}


def _laid_out(value: Tensor, parameter: Tensor | None) -> Tensor:
    """Return a copy in memory of torch's own, in the layout of the parameter that it belongs to.

    Fused AdamW walks parameter and state by address, so a channels-last filter needs channels-last states; and the file
    is mapped at any address, on whose alignment vector arithmetic may depend.
    """
    if parameter is None or parameter.shape != value.shape:
        return value.clone()
    if hasattr(parameter, "device_mesh"):
        return spread_like(value, parameter)
    return torch.empty_like(parameter, dtype=value.dtype, device="cpu", requires_grad=False).copy_(value)


def _check_same(path: Path, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    for problem, names in (
        ("lacks", expected.keys() - got.keys()),
        ("has the foreign tensor", got.keys() - expected.keys()),
        ("has another shape of", {n for n in expected if n in got and expected[n] != got[n]}),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"checkpoint `{path.name}` {problem} `{min(names)}`{more}",
                hint="resume with the recipe that the run was started with",
            )


def _read(path: Path, *, with_tensors: bool) -> tuple[dict[str, Tensor], Position, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "{}"))
            if header.get("format") != FORMAT:
                raise CheckpointError(
                    f"`{path.name}` is not a training checkpoint of chiasm",
                    hint="use `last.safetensors` of a run; a model to start from goes into `start` of the recipe",
                )
            tensors = {n: file.get_tensor(n) for n in file.keys()} if with_tensors else {}  # noqa: SIM118
        known = {f.name for f in fields(Position)}
        position = Position(**{k: v for k, v in header["position"].items() if k in known})
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint `{path.name}` to go on from") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint `{path.name}` cannot be read: {type(error).__name__}") from error
    return tensors, position, header.get("locked", "")
