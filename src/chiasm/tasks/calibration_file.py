"""A calibration as a file: plain JSON, and beside it the reference of an out-of-domain score where there is one.

``NAME.json`` holds everything but large arrays; ``NAME.domain.npz`` the arrays of a
:class:`~chiasm.tasks.domain.DomainReference`, whose digest stands in the JSON, so that the two cannot be mixed up.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.errors import FileFormatError, InputError
from chiasm.io.manifest import write_bytes_atomic, write_json_atomic
from chiasm.tasks.calibrated import Calibration
from chiasm.tasks.domain import DomainReference
from chiasm.tasks.scored_rows import ScoredRows
from chiasm.types import Embeddings

MAX_BYTES = 64 * 2**20
_ARRAYS = ("mean", "basis", "validation_scores", "validation_weights")


@dataclass(frozen=True, eq=False)
class SavedCalibration:
    """A calibration with what tells whether an image is of its kind at all.

    Attributes:
        calibration: Of the classifier.
        domain: Reference of the out-of-domain score, or None.
    """

    calibration: Calibration
    domain: DomainReference | None = None

    def records(self, rows: ScoredRows, images: Embeddings | None = None) -> list[dict[str, Any]]:
        """Return one flat record a row: calibrated probabilities and answers, and whether the image is foreign.

        A foreign image gets the answer "out of domain", whatever its score.

        Args:
            rows: Scores of the same classifier; their truth is not looked at.
            images: The embeddings behind the scores, in the same order, for the out-of-domain score; None: none is given.

        Raises:
            SpaceMismatch: Rows or images of another space.
            InputError: Rows of another classifier, or images in another order.
        """
        found = self.calibration.apply(rows).to_records()
        if self.domain is None or images is None:
            return found
        if images.ids != rows.ids:
            raise InputError("the images of the out-of-domain score are not those of the scores")
        outside = self.domain.score(images)
        for record, score, p, out in zip(found, outside.scores, outside.p_values, outside.outside, strict=True):
            record |= {"out of domain": bool(out), "domain score": float(score), "domain p": float(p)}
            if out:
                record |= {key: "out of domain" for key in record if key.split(" ")[0] == "answer"}
        return found


def save_calibration(path: str | Path, calibration: Calibration, domain: DomainReference | None = None) -> list[Path]:
    """Write ``path`` (JSON) and, with a domain, ``NAME.domain.npz`` beside it; return the files."""
    path = Path(path)
    values, written = calibration.to_dict(), [path]
    if domain is not None:
        buffer = io.BytesIO()
        arrays = {name: getattr(domain, name) for name in _ARRAYS}
        # Half the size; distances keep six digits.
        np.savez(buffer, **{k: a.astype(np.float32) if k == "basis" else a for k, a in arrays.items()})
        beside = path.with_suffix(".domain.npz")
        write_bytes_atomic(beside, buffer.getvalue())
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        values["domain"] = {**domain.to_dict(), "file": beside.name, "sha256": digest}
        written.append(beside)
    write_json_atomic(path, values)
    return written


def load_calibration(path: str | Path) -> SavedCalibration:
    """Return what :func:`save_calibration` wrote; nothing in the files is run.

    Raises:
        InputError: For a file that does not exist or is no calibration.
        FileFormatError: When the JSON or the arrays are damaged, missing or of another calibration.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"calibration `{path.name}` does not exist", hint="`chiasm calibrate --save FILE` writes one")
    if path.stat().st_size > MAX_BYTES:
        raise FileFormatError(f"calibration `{path.name}` is larger than {MAX_BYTES // 2**20} MiB")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"calibration `{path.name}` is not valid JSON") from error
    if not isinstance(values, dict):
        raise InputError(f"`{path.name}` is no calibration", hint="`chiasm calibrate --save FILE` writes one")
    described = values.pop("domain", None)
    calibration = Calibration.from_dict(values)
    if described is None:
        return SavedCalibration(calibration)
    if not isinstance(described, dict):
        raise FileFormatError(f"the domain in calibration `{path.name}` is damaged")
    beside = path.with_suffix(".domain.npz")  # never a path that the file names
    if not beside.is_file():
        raise FileFormatError(f"`{beside.name}` is missing beside `{path.name}`", hint="move the two files together")
    content = beside.read_bytes()
    if hashlib.sha256(content).hexdigest() != described.get("sha256"):
        raise FileFormatError(f"`{beside.name}` does not belong to `{path.name}`", hint="move the two files together")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = {name: np.asarray(arrays[name], dtype=np.float64) for name in _ARRAYS}
        return SavedCalibration(calibration, DomainReference.from_dict(described, found))
    except (KeyError, IndexError, ValueError, TypeError, OverflowError, zipfile.BadZipFile, OSError) as error:
        raise FileFormatError(f"the domain in `{beside.name}` is damaged") from error
