"""Is this still the encoder that it was? Vectors of fixed inputs, recorded once and compared ever after.

In: an encoder. Out: a check. No published vectors are known, so none are invented: the first load that passed every
other check is written to ``$CHIASM_HOME/selftest/<digest of the weights>.json``. A later one with the same weights must
give the same vectors, also under other versions of the packages, and whatever its activation, preprocessing and
tokenizer are declared to be.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm import __version__, fetch
from chiasm.encoders.activation import activations_of
from chiasm.evaluate.doctor import Check

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder

VERSION = 1
#: Largest difference over the largest number of a row; a wrong activation is a hundred times that.
TOLERANCE = 1e-4
#: On accelerators, whose matrix products may round to TF32.
LOOSE_TOLERANCE = 2e-3
TEXTS = ("chest radiograph", "There is a small left pleural effusion, no pneumothorax.", "HE-stained colon, 20x")
_PACKAGES = ("torch", "numpy", "pillow", "transformers", "tokenizers")


def record_path(encoder: Encoder) -> Path:
    """Return where the vectors of these weights lie."""
    return fetch.models_folder().parent / "selftest" / f"{encoder.space.weights}.json"


def check_self_test(encoder: Encoder, *, verified: bool) -> Check:
    """Compare an encoder with what was recorded of its weights; record it where nothing is and it is ``verified``.

    Args:
        encoder: The loaded encoder.
        verified: Whether every other check passed; what did not is never recorded.
    """
    path, name = record_path(encoder), "self-test"
    found = _measure(encoder)
    known = _read(path)
    if known is not None:
        return _compare(encoder, known, found)
    if path.exists():
        return Check(name, "note", f"the record `{path.name}` is damaged", f"remove {path}")
    if not verified or not all(np.isfinite(v).all() for v in found.values()):
        return Check(name, "note", "not recorded, because another check did not pass")
    value = {
        "format": "chiasm-selftest",
        "version": VERSION,
        "date": datetime.now(UTC).date().isoformat(),
        "encoder": encoder.name,
        "declared": _declared(encoder),
        "versions": _versions(),
        "vectors": {k: [[float(f"{x:.7g}") for x in row] for row in v.tolist()] for k, v in found.items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        following = path.with_name(f"{path.name}.next")
        following.write_text(json.dumps(value) + "\n", encoding="utf-8")
        following.replace(path)
    except OSError as error:
        return Check(name, "note", f"cannot be recorded: {error.strerror or type(error).__name__}",
                     "set CHIASM_HOME to a folder of yours")  # fmt: skip
    return Check(name, "ok", "recorded; every later check of these weights is compared with it")


def _compare(encoder: Encoder, known: Mapping[str, Any], found: Mapping[str, NDArray[np.float32]]) -> Check:
    tolerance = TOLERANCE if encoder.device.type == "cpu" else LOOSE_TOLERANCE
    worst = 0.0
    for side, vectors in found.items():
        expected = np.asarray(known["vectors"].get(side, []), dtype=np.float64)
        if expected.shape != vectors.shape:
            return Check("self-test", "wrong", f"the vectors of {side} have another shape than on {known['date']}",
                         "the same weights were recorded as another model; one of the two declarations is wrong")  # fmt: skip
        rows = np.maximum(np.abs(expected).max(axis=1, keepdims=True), 1e-12)
        difference = np.abs(vectors - expected) / rows
        worst = max(worst, float(difference.max()) if np.isfinite(difference).all() else np.inf)
    what = f"{worst:.1e} from the vectors of {known['date']} (largest difference, relative)"
    if worst <= tolerance:
        return Check("self-test", "ok", what)
    declared, before, now = known["declared"], known["versions"], _versions()
    changes = [f"{k}: {declared.get(k)} then, {v} now" for k, v in _declared(encoder).items() if declared.get(k) != v]
    changes += [f"{k} {before.get(k)} then, {v} now" for k, v in now.items() if before.get(k) != v]
    hint = (
        "changed since: " + "; ".join(changes)
        if changes
        else "nothing that was declared has changed: is the machine sound?"
    )
    return Check("self-test", "wrong", what, hint)


def _measure(encoder: Encoder) -> dict[str, NDArray[np.float32]]:
    found = {}
    if encoder.config.has_image:
        found["images"] = np.asarray(encoder.encode(probe_images(), show_progress_bar=False), dtype=np.float32)
    if encoder.config.has_text:
        found["texts"] = np.asarray(encoder.encode(list(TEXTS), show_progress_bar=False), dtype=np.float32)
    return found


def probe_images() -> list[Image]:
    """Return three pictures made by formulas: wide grey, tall colour, and a palette."""
    from PIL import Image

    rows, columns = np.mgrid[0:311, 0:403]
    grey = (127.5 + 127.5 * np.sin(columns / 17) * np.cos(rows / 23)).astype(np.uint8)
    rows, columns = np.mgrid[0:389, 0:257]
    colour = np.stack([rows * 255 // 388, columns * 255 // 256, (rows * columns) % 256], axis=2).astype(np.uint8)
    return [Image.fromarray(grey), Image.fromarray(colour), Image.fromarray(colour[:200, :200]).convert("P")]


def _declared(encoder: Encoder) -> dict[str, Any]:
    """What the weights themselves do not say."""
    tokenizer = dict(encoder.config.tokenizer) if encoder.config.has_text else {}
    return {
        "activation": activations_of(encoder.config),
        "preprocessing": encoder.preprocess_spec.to_dict(),
        "tokenizer": {k: tokenizer[k] for k in ("kind", "context_length", "lower_case") if k in tokenizer},
    }


def _versions() -> dict[str, str]:
    versions = {"chiasm": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        for side in value["vectors"].values():
            np.asarray(side, dtype=np.float64)
        if value["version"] > VERSION or not isinstance(value["date"], str):
            return None
        return {k: value[k] for k in ("date", "declared", "versions", "vectors")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
