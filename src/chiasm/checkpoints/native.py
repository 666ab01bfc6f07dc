"""chiasm's own model directory: ``model.safetensors``, ``encoder.json`` and, where known, ``recipe.toml``.

``encoder.json`` states the format, the encoder's name, its whole configuration (towers, projections, tokenizer,
preprocessing), how it was trained, and the SHA-256 of the weight file. Writing is atomic: everything is written and
synced under ``*.next`` names first, then renamed, weights before description. A full disk or a kill at any moment
leaves either the old model or the new one; if it strikes between the two renames, reading finds the new description
under its ``.next`` name. Other files in the directory are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from chiasm.checkpoints.containers import read_json, read_state_dict
from chiasm.checkpoints.proven import file_sha256
from chiasm.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "encoder.json"
RECIPE_FILE = "recipe.toml"
NEXT = ".next"


class Form(NamedTuple):
    """What a model directory holds, which its description file says.

    Attributes:
        file: Name of the description file.
        format: As it stands there.
        version: Highest version that is read, and the one that is written.
        what: For messages.
    """

    file: str
    format: str
    version: int
    what: str


ENCODER = Form(DESCRIPTION_FILE, "chiasm-encoder", 1, "model")
CLASSIFIER = Form("classifier.json", "chiasm-classifier", 1, "classifier")


@dataclass(frozen=True)
class ModelDir:
    """The content of a model directory.

    Attributes:
        name: Name of the encoder; part of its space.
        config: What ``EncoderConfig.from_dict`` reads.
        tensors: The weights, memory-mapped.
        training: Provenance: recipe digest, data, steps, scores ... as the trainer wrote it.
        sha256: Of the weight file.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


def is_model_dir(path: str | Path, *, form: Form = ENCODER) -> bool:
    """Return whether a directory holds a chiasm model, or one whose writing was cut off between two renames."""
    directory = Path(path)
    return any((directory / name).is_file() for name in (form.file, form.file + NEXT))


def save_model_dir(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    config: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    form: Form = ENCODER,
) -> Path:
    """Write a model directory, replacing the model that is there.

    Args:
        directory: Created when absent.
        tensors: A state dict, on any device.
        name: Name of the encoder.
        config: ``EncoderConfig.to_dict()``; it must build without the places it was made from.
        training: JSON values about how the weights came to be.
        recipe: Text of the resolved recipe (TOML).
        form: What it is.

    Returns:
        The directory.

    Raises:
        CheckpointError: The files cannot be written (a full disk, say); what was there before is intact.
    """
    directory = Path(directory)
    weights, description = directory / WEIGHTS_FILE, directory / form.file
    files = [weights, description] + ([directory / RECIPE_FILE] if recipe is not None else [])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_weights(_next(weights), tensors)
        value = {
            "format": form.format,
            "version": form.version,
            "name": name,
            "config": dict(config),
            "training": dict(training or {}),
            "weights": {"file": WEIGHTS_FILE, "sha256": _sha256(_next(weights)), "tensors": len(tensors)},
        }
        _write_text(_next(description), _laid_out(value))
        _next(weights).chmod(_next(description).stat().st_mode)  # safetensors writes for the owner alone
        if recipe is not None:
            _write_text(_next(directory / RECIPE_FILE), recipe)
        for file in files:
            _next(file).replace(file)
        _sync(directory)
    except OSError as error:
        for file in files:
            with contextlib.suppress(OSError):
                _next(file).unlink(missing_ok=True)
        raise CheckpointError(
            f"the {form.what} cannot be written to `{directory.name}`: {error.strerror or type(error).__name__}",
            hint=f"free some space or choose another place; the {form.what} that was there before is intact",
        ) from error
    return directory


def read_model_dir(directory: str | Path, *, form: Form = ENCODER) -> ModelDir:
    """Read a model directory; the weight file is checked against its SHA-256 (see :mod:`chiasm.checkpoints.proven`).

    Raises:
        CheckpointError: Missing or damaged files, weights that are not those of the description, or a newer format.
    """
    directory = Path(directory)
    weights = directory / WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(f"model directory `{directory.name}` lacks `{WEIGHTS_FILE}`")
    sha256 = file_sha256(weights)
    described: str | None = None
    for path in (directory / form.file, directory / (form.file + NEXT)):
        if not path.is_file():
            continue
        value = _checked(path, form)
        described = value["weights"]["sha256"]
        if described == sha256:
            state = read_state_dict(weights)
            return ModelDir(value["name"], value["config"], state.tensors, value["training"], sha256)
    if described is None:
        raise CheckpointError(f"model directory `{directory.name}` lacks `{form.file}`")
    raise CheckpointError(
        f"`{directory.name}/{WEIGHTS_FILE}` is damaged or belongs to another model: its SHA-256 starts with "
        f"{sha256[:12]}, `{form.file}` states {described[:12]}",
        hint="copy the directory again",
    )


def read_description(directory: str | Path, *, form: Form = ENCODER) -> dict[str, Any]:
    """Return the checked content of the description without looking at the weights.

    Raises:
        CheckpointError: Absent or damaged, or a newer format.
    """
    directory = Path(directory)
    for path in (directory / form.file, directory / (form.file + NEXT)):
        if path.is_file():
            return _checked(path, form)
    raise CheckpointError(f"`{directory.name}` holds no chiasm {form.what}", hint=f"expected `{form.file}` in it")


def _checked(path: Path, form: Form) -> dict[str, Any]:
    value = read_json(path)
    if value.get("format") != form.format:
        raise CheckpointError(f"`{path.name}` is no description of a chiasm {form.what}")
    if not isinstance(value.get("version"), int) or value["version"] > form.version:
        raise CheckpointError(
            f"`{path.name}` has format version {value.get('version')}, this chiasm reads up to {form.version}",
            hint="upgrade chiasm",
        )
    weights = value.get("weights")
    if (
        not isinstance(value.get("name"), str)
        or not isinstance(value.get("config"), dict)
        or not isinstance(value.setdefault("training", {}), dict)
        or not isinstance(weights, dict)
        or not isinstance(weights.get("sha256"), str)
    ):
        raise CheckpointError(f"`{path.name}` lacks the name, the configuration or the digest of the weights")
    return value


def _laid_out(value: Mapping[str, Any]) -> str:
    """JSON with one line per field and per part of the configuration: a vocabulary takes one line, not thousands."""

    def line(item: Any) -> str:
        return json.dumps(item, ensure_ascii=False)

    parts = ",\n".join(f"  {line(k)}: {line(v)}" for k, v in value["config"].items())
    lines = [f" {line(k)}: " + (f"{{\n{parts}\n }}" if k == "config" else line(v)) for k, v in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _next(path: Path) -> Path:
    return path.with_name(path.name + NEXT)


def _write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory (tied weights, slices of one buffer): give each its own.
        start = flat.untyped_storage().data_ptr()
        plain[name] = flat.clone() if start in seen or flat.untyped_storage().nbytes() != flat.nbytes else flat
        seen.add(start)
    try:
        save_file(plain, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, "writing the weights failed (is the disk full?)") from error
    _sync(path)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
