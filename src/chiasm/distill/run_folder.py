"""The folder of a run: what lies where, who may write into it, and answers as CSV.

Comes in: a recipe and what was asked for (``--resume``, ``--overwrite``). Goes out: a folder that holds nothing of
another recipe; small records, each replaced by one rename.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.config import to_toml
from chiasm.distill.recipe import DistillRecipe, load_distill_recipe
from chiasm.errors import CheckpointError, ChiasmError, ConfigError, FileFormatError, InputError
from chiasm.io.manifest import Rejected, write_bytes_atomic, write_json_atomic, write_rejected
from chiasm.train.recipe import expand_path

#: What a run writes; nothing else in a folder is ever deleted.
FILES = ("recipe.toml", "data.json", "predictions.csv", "results.json", "rejected.jsonl", "controls.json", "index.html")
FOLDERS = ("stages", "arms", "model")


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes.

    Attributes:
        path: The folder.
        cache: Of features, text vectors and stages; the folder itself unless the recipe names one to share.
    """

    path: Path
    cache: Path

    @property
    def stages(self) -> Path:
        """Finished and interrupted stages."""
        return self.cache / "stages"

    @property
    def model(self) -> Path:
        """The classifier."""
        return self.path / "model"

    def arm(self, name: str, seed: int) -> Path:
        """Folder of one arm and seed."""
        return self.path / "arms" / name / f"seed-{seed}"


def open_run(
    recipe: DistillRecipe, *, out: str | Path | None = None, resume: bool = False, overwrite: bool = False
) -> RunFolder:
    """Return the folder of a run, ready to be written to; nothing is written yet.

    Raises:
        ConfigError: Neither recipe nor caller names a folder.
        InputError: It holds a run, and neither ``resume`` nor ``overwrite`` was said; or it cannot be written.
        CheckpointError: It holds a run of another recipe.
    """
    chosen = out if out is not None else recipe.run.out
    if chosen is None:
        raise ConfigError("the recipe names no `run.out`", hint="pass `--out FOLDER`")
    folder = Path(chosen if out is not None else expand_path(str(chosen), "run.out"))
    if holds_run(folder):
        if not (resume or overwrite):
            raise InputError(
                f"folder `{folder.name}` holds a run already",
                hint="go on with `--resume`, start anew with `--overwrite`, or choose another folder",
            )
        if overwrite and not resume:
            _clear(folder)
        else:
            _check_same(folder, recipe)
    cache = folder if recipe.run.cache is None else Path(expand_path(recipe.run.cache, "run.cache"))
    _tidy(folder, cache)
    return RunFolder(folder, cache)


def begin_run(
    folder: RunFolder,
    recipe: DistillRecipe,
    *,
    facts: Mapping[str, Any],
    notes: Sequence[str],
    rejected: Sequence[Rejected] = (),
) -> None:
    """Write what is known before the first step; from then on the folder holds a run.

    Args:
        folder: Of the run.
        recipe: Becomes ``recipe.toml``.
        facts: Become ``data.json``, with the notes.
        notes: What every output must say.
        rejected: Rows that could not be used; become ``rejected.jsonl`` where there are any.

    Raises:
        InputError: The disk is full, or the folder may not be written to.
    """
    if rejected:
        write_rejected(folder.path / "rejected.jsonl", rejected)
    write_json_atomic(folder.path / "data.json", dict(facts) | {"notes": list(notes)})
    write_bytes_atomic(folder.path / "recipe.toml", to_toml(recipe).encode())


def holds_run(folder: Path) -> bool:
    """Return whether a run has got beyond its data there: what broke off before may be started again."""
    return (folder / "recipe.toml").exists()


def _check_same(folder: Path, recipe: DistillRecipe) -> None:
    try:
        before = load_distill_recipe(folder / "recipe.toml").digest
    except ChiasmError:
        before = ""
    if before != recipe.digest:
        raise CheckpointError(
            "the run in this folder was started with another recipe",
            hint="restore it (`recipe.toml` in the folder), choose another folder, or start anew with `--overwrite`",
        )


def _tidy(folder: Path, cache: Path) -> None:
    """Delete what a run that was killed left of unfinished writes; a cache that others may be writing to is spared."""
    places = [folder, *folder.glob("arms/*/*"), *((folder / "features", folder / "stages") if cache == folder else ())]
    for place in places:
        for leftover in place.glob(".*.part"):
            leftover.unlink(missing_ok=True)
    for checkpoint in (cache / "stages").glob("*.part.safetensors"):
        if checkpoint.with_name(checkpoint.name.replace(".part.", ".")).exists():  # its stage is done
            checkpoint.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def write_predictions(path: Path, probabilities: NDArray[np.float64], truth: NDArray[np.int64]) -> None:
    """Write ``class_0,..,class_{C-1},target``; numbers come back to the last bit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(f"class_{i}" for i in range(probabilities.shape[1])), "target"])
    for row, target in zip(probabilities.tolist(), truth.tolist(), strict=True):
        writer.writerow([*map(repr, row), target])
    write_bytes_atomic(path, text.getvalue().encode())


def read_predictions(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return probabilities and truth of :func:`write_predictions`.

    Raises:
        FileFormatError: The file is not such a table.
    """
    try:
        rows = list(csv.reader(path.read_text().splitlines()))
        if rows[0] != [*(f"class_{i}" for i in range(len(rows[0]) - 1)), "target"]:
            raise ValueError
        values = np.array([[float(v) for v in row] for row in rows[1:]], np.float64).reshape(-1, len(rows[0]))
    except (OSError, ValueError, IndexError) as error:
        raise FileFormatError(f"`{path.name}` is no table of predictions") from error
    return np.ascontiguousarray(values[:, :-1]), values[:, -1].astype(np.int64)
