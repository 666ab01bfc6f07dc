"""What weight file is this, and what tensors does it hold? Recognised by content, read without running anything.

In: a path. Out: a :class:`StateFile`, a flat mapping of names to memory-mapped tensors. Known containers: safetensors,
the zip archive of ``torch.save``, its older stream of pickles, and TorchScript archives as OpenAI publishes CLIP
(their code is never run; names and tensors are read from the archive's data); and a plain zip archive around one of
these, as MedCLIP's. Training checkpoints of open_clip and Lightning are unwrapped. Everything else raises ``CheckpointError`` and says what it looks like.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from chiasm.checkpoints.pickle_reader import Inert, TensorRef
from chiasm.checkpoints.storages import DAMAGED, Archive, NotPytorch, TensorCutter, read_legacy, read_zip
from chiasm.checkpoints.zipped import unpacked, weight_member
from chiasm.errors import CheckpointError

Container = Literal["safetensors", "torch", "torch_legacy", "torchscript", "zipped"]

#: Keys under which training checkpoints keep the weights, in order of preference.
WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher")
#: Scalars of a training checkpoint that are kept as metadata.
NOTES = ("epoch", "name", "global_step", "pytorch-lightning_version")
MAX_SAFETENSORS_HEADER = 100_000_000
#: OpenAI's largest archive has about 6,000 attributes; shared parts could otherwise multiply without end.
MAX_SCRIPT_ATTRIBUTES = 200_000
MAX_SCRIPT_DEPTH = 64

_FOREIGN: tuple[tuple[bytes, str, str | None], ...] = (
    (b"\x89PNG", "a PNG image", None),
    (b"\xff\xd8\xff", "a JPEG image", None),
    (b"%PDF", "a PDF document", None),
    (b"\x1f\x8b", "a gzip archive", "unpack it and give the weight file inside"),
    (b"\x89HDF", "an HDF5 file", None),
    (b"\x93NUMPY", "a NumPy array", None),
    (b"version https://git-lfs", "a git-lfs pointer, not the weights", "fetch the file itself: `git lfs pull`"),
    (b"<!DOCTYPE", "an HTML page", "the download gave a web page; check the address"),
    (b"<html", "an HTML page", "the download gave a web page; check the address"),
)


@dataclass(frozen=True)
class StateFile:
    """The content of a weight file.

    Attributes:
        tensors: Name to tensor; memory-mapped where the layout allows it, so writing to them never changes the file.
        container: What the file is.
        metadata: Notes that the file carries: safetensors metadata, epoch and name of a training checkpoint.
    """

    tensors: dict[str, torch.Tensor]
    container: Container
    metadata: dict[str, Any] = field(default_factory=dict)


def sniff(path: str | Path) -> Container:
    """Return what kind of weight file this is, from its content alone.

    Raises:
        CheckpointError: Absent, empty, or none of the known containers; the message says what it looks like.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"weight file `{path.name}` does not exist or is no file")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"weight file `{path.name}` cannot be read: {type(error).__name__}") from error
    if not size:
        raise CheckpointError(f"weight file `{path.name}` is empty", hint=DAMAGED)
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch_legacy"
    if len(head) > 8 and head[8:9] == b"{":
        (length,) = struct.unpack("<Q", head[:8])
        if length <= MAX_SAFETENSORS_HEADER and 8 + length > size:
            raise CheckpointError(f"`{path.name}` is a truncated safetensors file", hint=DAMAGED)
        if length <= MAX_SAFETENSORS_HEADER:
            return "safetensors"
    for magic, what, hint in _FOREIGN:
        if head.startswith(magic):
            raise CheckpointError(
                f"`{path.name}` is {what}; expected a weight file", hint=hint or "give a weight file or a model folder"
            )
    if head[257:262] == b"ustar":
        raise CheckpointError(f"`{path.name}` is a tar archive", hint="unpack it and give the weight file inside")
    raise CheckpointError(
        f"`{path.name}` is no weight file that chiasm knows",
        hint="known: safetensors, PyTorch's .pt/.pth/.bin, OpenAI's TorchScript archives",
    )


def _sniff_zip(path: Path) -> Container:
    try:
        return "torchscript" if Archive(path).is_torchscript else "torch"
    except NotPytorch:
        if weight_member(path) is None:
            raise
        return "zipped"


def read_state_dict(path: str | Path) -> StateFile:
    """Read the tensors of a weight file.

    Training checkpoints are unwrapped, and a ``module.`` before every name (left by distributed training) is removed.

    Raises:
        CheckpointError: Absent, foreign, damaged or hostile file, or one without tensors. Nothing in the file is run.
    """
    path = Path(path)
    container = sniff(path)
    if container == "zipped":
        member = weight_member(path)
        assert member is not None
        with unpacked(path, member) as inner:
            if sniff(inner) == "zipped":
                raise CheckpointError(f"`{path.name}` holds an archive in an archive; expected a weight file in it")
            inside = read_state_dict(inner)
        return replace(inside, metadata={**inside.metadata, "packed": member.filename[:200]})
    if container == "safetensors":
        tensors, metadata = _read_safetensors(path)
    elif container == "torch_legacy":
        value, cutter = read_legacy(path)
        tensors, metadata = _tensors_of(path, value, cutter)
    else:
        value, cutter, is_script = read_zip(path)
        if is_script:
            tensors, metadata = _script_tensors(value, cutter), {}
        else:
            tensors, metadata = _tensors_of(path, value, cutter)
    if not tensors:
        raise CheckpointError(f"`{path.name}` holds no tensors")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return StateFile(tensors, container, metadata)


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"`{path.name}` is a damaged safetensors file", hint=DAMAGED) from error


def _tensors_of(path: Path, value: Any, cutter: TensorCutter) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict in an unpickled value, and the notes beside it."""
    if isinstance(value, Inert):
        raise CheckpointError(
            f"`{path.name}` holds a whole pickled object (`{value.kind}`), which only running its code could load",
            hint="save `model.state_dict()` instead of the model",
        )
    if not isinstance(value, Mapping):
        raise CheckpointError(f"`{path.name}` holds {type(value).__name__}; expected a mapping of names to tensors")
    notes = {k: value[k] for k in NOTES if isinstance(value.get(k), (str, int, float))}
    for wrapper in WRAPPERS:
        inner = value.get(wrapper)
        if isinstance(inner, Mapping) and any(isinstance(v, TensorRef) for v in inner.values()):
            value = inner
            break
    refs = {k: v for k, v in value.items() if isinstance(v, TensorRef) and isinstance(k, str)}
    return {name: cutter.cut(ref, name) for name, ref in refs.items()}, notes


def _script_tensors(value: Any, cutter: TensorCutter) -> dict[str, torch.Tensor]:
    """Names and tensors of a TorchScript module, as its ``state_dict`` would give them (plain attributes included)."""
    found: dict[str, torch.Tensor] = {}
    todo: list[tuple[str, Any, int]] = [("", value, 0)]
    visited = 0
    while todo:
        prefix, item, depth = todo.pop()
        visited += 1
        if visited > MAX_SCRIPT_ATTRIBUTES or depth > MAX_SCRIPT_DEPTH:
            raise CheckpointError("the TorchScript module has too many parts")
        if isinstance(item, Inert):
            todo.extend((f"{prefix}{k}.", v, depth + 1) for k, v in reversed(item.state.items()))
        elif isinstance(item, TensorRef):
            name = prefix.removesuffix(".")
            found[name] = cutter.cut(item, name)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file of a model directory.

    Raises:
        CheckpointError: Absent, not JSON, or no object.
    """
    try:
        if path.stat().st_size > 64 * 2**20:
            raise CheckpointError(f"`{path.name}` is too large for a description of a model")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"model directory `{path.parent.name}` lacks `{path.name}`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path.name}` is damaged: it is not JSON", hint=DAMAGED) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path.name}` must hold a JSON object, got {type(value).__name__}")
    return value
