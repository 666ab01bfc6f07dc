"""Run a suite: embed what is missing, compute the cells that are not on disk, compare, and write one page.

In: a :class:`Suite` and a folder. Out: a :class:`SuiteRun` and, in the folder, ``suite.json``, ``index.html``, the cells
and the vectors. Killed at any time, the same call goes on. A model or data set that fails takes its own cells with it and
no other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from chiasm.config import to_mapping
from chiasm.errors import ChiasmError, InputError, UnknownName
from chiasm.evaluate.run_card import RunCard, make_run_card, package_versions
from chiasm.evaluate.suite.cells import CellOutcome, cell_key, read_cell, write_cell
from chiasm.evaluate.suite.comparisons import (
    GroupScore,
    ModelTest,
    best_model,
    compare_groups,
    compare_models,
    correct_groups,
)
from chiasm.evaluate.suite.leakage import DataLeakage, Exposure, find_exposure, find_leakage
from chiasm.evaluate.suite.questions import ask, question_digest, read_question
from chiasm.evaluate.suite.rows import DataRows, read_rows
from chiasm.evaluate.suite.settings import Suite, TaskEntry
from chiasm.evaluate.suite.tasks import SUITE_TASKS, Cell, no_training_rows
from chiasm.evaluate.suite.vectors import ModelVectors, no_text_tower
from chiasm.io.manifest import write_json_atomic
from chiasm.progress import Progress, SilentProgress
from chiasm.types import Modality, digest_of

#: What a model, its weights or a library may raise besides our own errors; such a cell fails, the suite goes on.
FOREIGN = (ValueError, RuntimeError, ArithmeticError, MemoryError)


@dataclass(frozen=True)
class PlannedCell:
    """A cell before it is run.

    Attributes:
        model: Key of the model.
        data: Key of the data set.
        task: Key of the task.
        cached: Whether its result is on disk.
        embeds: Rows that would have to be embedded first.
        seconds: How long it took, where it is on disk.
        problem: Why it cannot run, as far as that is known already.
    """

    model: str
    data: str
    task: str
    cached: bool
    embeds: int
    seconds: float | None = None
    problem: str = ""


@dataclass(frozen=True, eq=False)
class SuiteRun:
    """A suite that has ended.

    Attributes:
        suite: What was run.
        cells: One a model, data set and task.
        tests: Between models.
        subgroups: (model, data, task) -> rows.
        best: (data, task) -> the model that corrected tests call better than every other; absent: none.
        leakage: One a data set.
        exposure: One a model and data set.
        rows: Data set -> its rows.
        embedded: (model, data set, modality) that were embedded now.
        card: Of the suite.
        broken: Data set or model -> why none of its cells ran.
    """

    suite: Suite
    cells: tuple[CellOutcome, ...]
    tests: tuple[ModelTest, ...]
    subgroups: Mapping[tuple[str, str, str], tuple[GroupScore, ...]]
    best: Mapping[tuple[str, str], str]
    leakage: tuple[DataLeakage, ...]
    exposure: tuple[Exposure, ...]
    rows: Mapping[str, DataRows]
    embedded: tuple[tuple[str, str, str], ...]
    card: RunCard
    broken: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[CellOutcome, ...]:
        """Cells without a result."""
        return tuple(c for c in self.cells if c.result is None)

    def cell(self, model: str, data: str, task: str) -> CellOutcome | None:
        """Return one cell, or None where it was not asked for."""
        return next((c for c in self.cells if (c.model, c.data, c.task) == (model, data, task)), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "suite": self.suite.name,
            "cells": [c.to_dict() for c in self.cells],
            "tests": [t.to_dict() for t in self.tests],
            "best": [{"data": d, "task": t, "model": m} for (d, t), m in self.best.items()],
            "subgroups": [
                {"model": m, "data": d, "task": t, "groups": [g.to_dict() for g in found]}
                for (m, d, t), found in self.subgroups.items()
            ],
            "leakage": [x.to_dict() for x in self.leakage],
            "exposure": [x.to_dict() for x in self.exposure],
            "failed": len(self.failed),
            "embedded": [list(e) for e in self.embedded],
            "run_card": self.card.to_dict(),
        }


def wanted_cells(suite: Suite, only: Sequence[str] = ()) -> tuple[tuple[str, str, TaskEntry], ...]:
    """Return (model, data set, task) of every cell that is asked for, data set by data set.

    Args:
        suite: The suite.
        only: ``model=NAME``, ``data=NAME``, ``task=NAME``; several of one kind widen, of two kinds narrow.

    Raises:
        UnknownName: The suite has no such name.
    """
    known = {"model": list(suite.models), "data": list(suite.data), "task": list(suite.tasks)}
    chosen: dict[str, set[str]] = {}
    for word in only:
        kind, _, name = word.partition("=")
        if kind not in known:
            raise UnknownName("part of a suite", kind, known, hint="--only model=NAME, data=NAME or task=NAME")
        if name not in known[kind]:
            raise UnknownName(kind, name, known[kind], hint=f"the suite has: {', '.join(known[kind])}")
        chosen.setdefault(kind, set()).add(name)
    return tuple(
        (model, data, task)
        for data in suite.data
        for task in suite.entries
        for model in suite.models
        if (not task.data or data in task.data)
        and (not suite.models[model].data or data in suite.models[model].data)
        and (not task.models or model in task.models)
        and all(
            name in chosen.get(kind, {name}) for kind, name in (("model", model), ("data", data), ("task", task.name))
        )
    )


def plan_suite(suite: Suite, folder: Path, *, only: Sequence[str] = ()) -> tuple[PlannedCell, ...]:
    """Say which cells there are, which of them are on disk, and how many rows would have to be embedded."""
    work = _Work(suite, folder, SilentProgress())
    found = []
    for model, data, task in wanted_cells(suite, only):
        rows = work.rows(data)
        if rows is None:
            found.append(PlannedCell(model, data, task.name, False, 0, None, work.broken[data]))
            continue
        try:
            key = work.key(model, rows, task)
            vectors = work.models[model]
            work.check(model, rows, task)
            earlier = read_cell(folder, key)
            sides: tuple[Modality, ...] = (
                ("image", "text") if "texts" in SUITE_TASKS.get(task.kind).uses else ("image",)
            )
            missing = sum(len(rows) for side in sides if not vectors.is_stored(rows, side))
            seconds = None if earlier is None else earlier[1].seconds
            found.append(PlannedCell(model, data, task.name, earlier is not None, 0 if earlier else missing, seconds))
        except (ChiasmError, *FOREIGN) as error:
            found.append(PlannedCell(model, data, task.name, False, 0, None, _reason(error)))
    return tuple(found)


def run_suite(suite: Suite, folder: Path, *, only: Sequence[str] = (), progress: Progress | None = None) -> SuiteRun:
    """Run a suite, or what is missing of it.

    Args:
        suite: From :func:`chiasm.evaluate.suite.settings.load_suite`.
        folder: Of results and vectors; made when absent.
        only: As :func:`wanted_cells`.
        progress: Stages of embedding and of cells.

    Raises:
        ChiasmError: The folder cannot be written, or ``only`` names nothing.
        KeyboardInterrupt: On Ctrl-C; what is on disk stays and is used by the next run.
    """
    began = time.monotonic()
    bar = progress or SilentProgress()
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "settings.json", to_mapping(suite))
    work = _Work(suite, folder, bar)
    wanted = wanted_cells(suite, only)
    for model in dict.fromkeys(m for m, _, _ in wanted):  # one model in memory at a time
        cells = [(data, task) for m, data, task in wanted if m == model]
        work.prepare(model, cells)
        work.forget(model)
    bar.start(len(wanted), "cells")
    cells_done = []
    for model, data, task in wanted:
        cells_done.append(work.cell(model, data, task))
        bar.advance(1)
    bar.finish()
    return _assemble(work, tuple(cells_done), began)


class _Work:
    """What a run holds while it runs: opened data, vectors, reasons for failures."""

    def __init__(self, suite: Suite, folder: Path, bar: Progress) -> None:
        self.suite, self.folder, self.bar = suite, folder, bar
        self.models = {name: ModelVectors(name, entry, suite, folder) for name, entry in suite.models.items()}
        self.broken: dict[str, str] = {}
        self._rows: dict[str, DataRows | None] = {}
        self._failures: dict[tuple[str, str, str], str] = {}

    def rows(self, name: str) -> DataRows | None:
        """Return a data set, or None where it cannot be read; the reason is in ``broken``."""
        if name not in self._rows:
            try:
                self._rows[name] = read_rows(name, self.suite.data[name], seed=self.suite.seed)
            except ChiasmError as error:
                self._rows[name] = None
                self.broken[name] = _reason(error)
        return self._rows[name]

    def key(self, model: str, rows: DataRows, task: TaskEntry) -> str:
        """Return the name of a cell's file."""
        needs_prompts = "prompts" in SUITE_TASKS.get(task.kind).uses
        prompts = question_digest(read_question(rows.entry)) if needs_prompts else None
        return cell_key(self.suite, rows, task, self.models[model].space, prompts)

    def prepare(self, model: str, cells: Sequence[tuple[str, TaskEntry]]) -> None:
        """Compute the vectors that the cells of a model lack, so that the model is needed once."""
        vectors = self.models[model]
        for data, task in cells:
            rows = self.rows(data)
            if rows is None:
                continue
            try:
                if read_cell(self.folder, self.key(model, rows, task)) is not None:
                    continue
                uses = SUITE_TASKS.get(task.kind).uses
                self.check(model, rows, task)
                vectors.images(rows, self.bar)
                if "texts" in uses:
                    vectors.texts(rows, self.bar)
                if "prompts" in uses:
                    ask(read_question(rows.entry), vectors)
            except (ChiasmError, *FOREIGN) as error:
                self._failures[model, data, task.name] = _reason(error)

    def check(self, model: str, rows: DataRows, task: TaskEntry) -> None:
        """Raise what can be known before anything is embedded: no labels, no training rows, no texts, no text tower."""
        uses = SUITE_TASKS.get(task.kind).uses
        if "labels" in uses and not rows.labels:
            raise InputError(
                f"data set `{rows.name}` has no labels",
                hint="name `labels` and `truth`, or leave the task to others: data = [...]",
            )
        if "train" in uses and "train" not in rows.parts:
            raise no_training_rows(rows.name)
        if "texts" in uses and not rows.has_text:
            raise InputError(f"data set `{rows.name}` has no texts to search by", hint='columns = { text = "NAME" }')
        if {"texts", "prompts"} & {*uses} and not self.models[model].has_text:
            raise no_text_tower(model)

    def forget(self, model: str) -> None:
        """Let the weights go."""
        self.models[model].__dict__.pop("encoder", None)

    def cell(self, model: str, data: str, task: TaskEntry) -> CellOutcome:
        """Return a cell from disk, or computed now, or the reason why there is none."""
        rows, began = self.rows(data), time.monotonic()
        named = (model, data, task.name)
        if rows is None:
            return CellOutcome(*named, "", None, None, self.broken[data])
        if named in self._failures:
            return CellOutcome(*named, "", None, None, self._failures[named])
        try:
            key = self.key(model, rows, task)
            earlier = read_cell(self.folder, key)
            if earlier is not None:
                return CellOutcome(*named, key, *earlier, cached=True)
            kind = SUITE_TASKS.get(task.kind)
            vectors = self.models[model]
            question = read_question(rows.entry) if "prompts" in kind.uses else None
            images = vectors.images(rows)
            cell = Cell(
                rows,
                images,
                ask(question, vectors) if question is not None else _no_prompts,
                partial(vectors.texts, rows),
                self.suite.seed,
                self.suite.n_resamples,
            )
            result = kind.run(cell, task.settings)
        except (ChiasmError, *FOREIGN) as error:
            return CellOutcome(*named, "", None, None, _reason(error))
        card = make_run_card(
            f"chiasm evaluate: {task.name} of {model} on {data}",
            {"images": images},
            seed=self.suite.seed,
            split=rows.parts,
            prompts=None if question is None else [question_digest(question)],
            settings={
                "task": task.kind, **to_mapping(task.settings), "resamples": self.suite.n_resamples,
                "weights": vectors.space.weights, "truth": rows.digests["truth"], "pictures": rows.digests["images"],
            },
            seconds=time.monotonic() - began,
        )  # fmt: skip
        write_cell(self.folder, key, result, card)
        return CellOutcome(*named, key, result, card)

    def compared(
        self, rows: DataRows, task: str, cells: Mapping[str, CellOutcome]
    ) -> tuple[tuple[ModelTest, ...], dict[str, tuple[GroupScore, ...]]]:
        """Return tests between models and groups of each, from disk where these very cells were compared before."""
        suite, results = self.suite, {m: c.result for m, c in cells.items() if c.result is not None}
        groups = {column: digest_of(list(values)) for column, values in rows.subgroups.items()}
        settings = [suite.seed, suite.n_permutations, suite.n_resamples, suite.smallest_group]
        key = digest_of([rows.name, task, {m: c.key for m, c in cells.items()}, list(cells), groups, settings, 1], 32)
        path = self.folder / "comparisons" / f"{key}.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return tuple(ModelTest.from_dict(v) for v in values["tests"]), {
                m: tuple(GroupScore.from_dict(v) for v in found) for m, found in values["groups"].items()
            }
        except (OSError, ValueError, TypeError, KeyError):
            pass
        tests = compare_models(
            rows.name, task, results, rows.groups, n_permutations=suite.n_permutations, seed=suite.seed
        )
        options = {"smallest": suite.smallest_group, "n_resamples": suite.n_resamples, "seed": suite.seed}
        of_model = {
            model: correct_groups(
                [
                    g
                    for column, of_row in rows.subgroups.items()
                    for g in compare_groups(result, column, of_row, rows.groups, **options)
                ]
            )
            for model, result in results.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {m: [g.to_dict() for g in found] for m, found in of_model.items()}
        write_json_atomic(path, {"tests": [t.to_dict() for t in tests], "groups": plain})
        return tests, of_model

    def leakage(self, rows: DataRows) -> DataLeakage:
        """Return what crosses the parts of a data set, from disk where it was looked for before."""
        key = digest_of([rows.name, dict(rows.digests), self.suite.near_duplicates, 1], 24)
        path = self.folder / "leakage" / f"{key}.json"
        try:
            return DataLeakage.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            pass
        found = find_leakage(rows, near_duplicates=self.suite.near_duplicates)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, found.to_dict())
        return found


def _assemble(work: _Work, cells: tuple[CellOutcome, ...], began: float) -> SuiteRun:
    suite = work.suite
    tests: list[ModelTest] = []
    groups: dict[tuple[str, str, str], tuple[GroupScore, ...]] = {}
    best: dict[tuple[str, str], str] = {}
    rows = {d: r for d in dict.fromkeys(c.data for c in cells) if (r := work.rows(d)) is not None}
    questions = list(dict.fromkeys((c.data, c.task) for c in cells if c.result is not None))
    work.bar.start(len(questions), "comparisons")
    for data, task in questions:
        results = {c.model: c for c in cells if (c.data, c.task) == (data, task) and c.result is not None}
        found, of_model = work.compared(rows[data], task, results)
        tests += found
        lower = any(c.result is not None and c.result.main.better == "lower" for c in results.values())
        winner = best_model(found, list(results), alpha=suite.alpha, lower=lower)
        if winner is not None:
            best[data, task] = winner
        groups |= {(model, data, task): scored for model, scored in of_model.items() if scored}
        work.bar.advance(1)
    work.bar.finish()
    leakage = tuple(work.leakage(r) for r in rows.values())
    met = dict.fromkeys((c.model, c.data) for c in cells if c.data in rows)
    exposure = tuple(_exposure(work, model, rows[data]) for model, data in met)
    embedded = tuple((m, d, side) for m, v in work.models.items() for d, side in v.embedded)
    card = _suite_card(work, cells, rows, time.monotonic() - began)
    return SuiteRun(suite, cells, tuple(tests), groups, best, leakage, exposure, rows, embedded, card, work.broken)


def _exposure(work: _Work, model: str, rows: DataRows) -> Exposure:
    vectors = work.models[model]
    images = None
    try:
        if work.suite.models[model].floor != "colours" and vectors.is_stored(rows, "image"):
            images = vectors.images(rows)
    except (ChiasmError, *FOREIGN):
        images = None
    return find_exposure(model, vectors.entry, rows, images, near_cosine=work.suite.near_cosine)


def _suite_card(work: _Work, cells: Sequence[CellOutcome], rows: Mapping[str, DataRows], seconds: float) -> RunCard:
    suite = work.suite
    keys = digest_of(sorted(c.key for c in cells if c.key))
    return RunCard(
        command=f"chiasm evaluate {suite.name}.toml",
        data={name: r.digests["rows"][:12] for name, r in rows.items()},
        rows={name: len(r) for name, r in rows.items()},
        model=", ".join(dict.fromkeys(c.model for c in cells)),
        seed=suite.seed,
        split=digest_of([r.digests["parts"] for r in rows.values()]),
        settings={
            "cells": f"{sum(c.result is not None for c in cells)} of {len(cells)}",
            "cells digest": keys,
            "resamples": suite.n_resamples,
            "permutations": suite.n_permutations,
            "alpha": suite.alpha,
            "smallest group": suite.smallest_group,
        },
        seconds=seconds,
        versions=package_versions(),
    )


def _reason(error: BaseException) -> str:
    """Return why a cell failed; of a foreign error its kind alone, as its text may quote data."""
    if isinstance(error, ChiasmError):
        return error.message + (f" (hint: {error.hint})" if error.hint else "")
    return f"{type(error).__name__} inside a library; `--debug` shows it"


def _no_prompts(images: Any) -> Any:
    raise AssertionError("this task did not say that it uses prompts")
