"""The results of a suite on disk: one file a cell, named by a digest of everything that it depends on.

In: keys and results. Out: ``cells/DIGEST.json`` with numbers and run card, and ``cells/DIGEST.npz`` with the answers. The
JSON is written last and atomically: where it stands, the cell is whole. A cell of other weights, rows, prompts, settings
or versions has another name, so nothing stale is ever shown.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chiasm.config import to_mapping
from chiasm.evaluate.run_card import RunCard, package_versions
from chiasm.evaluate.suite.results import TaskResult
from chiasm.evaluate.suite.rows import DataRows
from chiasm.evaluate.suite.settings import Suite, TaskEntry
from chiasm.io.manifest import write_bytes_atomic, write_json_atomic
from chiasm.types import Space, digest_of

#: Raised when the meaning of a cell's file changes.
FORMAT = 2
State = Literal["done", "failed"]


@dataclass(frozen=True, eq=False)
class CellOutcome:
    """One cell of a suite as it ended.

    Attributes:
        model: Key of the model.
        data: Key of the data set.
        task: Key of the task.
        key: Digest of what it depends on; empty where it was not even known.
        result: None where it failed.
        card: Of the cell; None where it failed.
        reason: Why there is no result; empty where there is one.
        cached: Whether it was found on disk.
    """

    model: str
    data: str
    task: str
    key: str
    result: TaskResult | None
    card: RunCard | None
    reason: str = ""
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        named = {"model": self.model, "data": self.data, "task": self.task, "key": self.key, "cached": self.cached}
        if self.result is None or self.card is None:
            return {**named, "state": "failed", "reason": self.reason}
        return {**named, "state": "done", **self.result.to_dict(), "run_card": self.card.to_dict()}


def cell_key(suite: Suite, rows: DataRows, task: TaskEntry, space: Space, prompts: str | None) -> str:
    """Return a digest of everything that the result of a cell depends on."""
    versions = {k: v for k, v in package_versions().items() if k != "python"}
    columns = getattr(task.settings, "label_columns", ())
    extra = [[str(s.labels.get(c)) for s in rows.samples] for c in columns]
    return digest_of(
        [FORMAT, space.to_dict(), dict(rows.digests), rows.mode, prompts, task.kind, to_mapping(task.settings),
         suite.seed, suite.n_resamples, versions, *([extra] if extra else [])],
        32,
    )  # fmt: skip


def write_cell(folder: Path, key: str, result: TaskResult, card: RunCard) -> None:
    """Write a cell; it counts once its JSON stands."""
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(folder / "cells" / f"{key}.npz", result.arrays())
    write_json_atomic(folder / "cells" / f"{key}.json", {"result": result.to_dict(), "card": card.to_dict()})


def read_cell(folder: Path, key: str) -> tuple[TaskResult, RunCard] | None:
    """Return a cell of an earlier run, or None where there is none or it is damaged."""
    path = folder / "cells" / f"{key}.json"
    try:
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stored = io.BytesIO(path.with_suffix(".npz").read_bytes())
        with np.load(stored, allow_pickle=False) as arrays:
            result = TaskResult.read(values["result"], {k: arrays[k] for k in ("rows", "truth", "answers")})
        card = {k: v for k, v in values["card"].items() if k != "digest"}
        return result, RunCard(**card)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
