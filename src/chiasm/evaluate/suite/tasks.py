"""The table of a suite's tasks: name -> settings and a function from vectors to a result.

In: :class:`Cell` (vectors of one model on one data set, its rows, its prompts). Out: :class:`TaskResult`. A new task is one
entry: a frozen dataclass of settings and a function under ``@suite_task``; plug-ins use the group ``chiasm.suite_tasks``.
What has to be chosen is chosen on validation patients, never on test rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import ConfigError, InputError
from chiasm.evaluate.suite.results import Number, TaskResult, of_measure, score_answers
from chiasm.evaluate.suite.rows import DataRows
from chiasm.registry import Registry
from chiasm.tasks.zero_shot import ZeroShotResult
from chiasm.types import Embeddings

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cell:
    """What a task gets to see of a model and a data set.

    Attributes:
        data: Rows, truth and parts.
        images: Vectors of the rows whose image could be read, in the data set's order.
        zero_shot: Gives the zero-shot result of some rows of ``images``; raises where the model cannot.
        texts: Gives the vectors of the data set's texts; raises where the model cannot.
        seed: Of everything drawn at random.
        n_resamples: Of every interval.
    """

    data: DataRows
    images: Embeddings
    zero_shot: Callable[[Embeddings], ZeroShotResult]
    texts: Callable[[], Embeddings]
    seed: int
    n_resamples: int

    @property
    def options(self) -> dict[str, Any]:
        """Seed and resamples, as the metrics take them."""
        return {"n_resamples": self.n_resamples, "seed": self.seed}

    def part(self, name: str) -> tuple[Embeddings, Rows]:
        """Return the vectors of a part with their rows in the data set; there may be none."""
        place = {s.id: i for i, s in enumerate(self.data.samples)}
        kept = [k for k, i in enumerate(self.images.ids) if self.data.parts[place[i]] == name]
        rows = np.asarray([place[self.images.ids[k]] for k in kept], dtype=np.int64)
        return self.images.select(np.asarray(kept, dtype=np.int64)), rows


@dataclass(frozen=True)
class SuiteTask:
    """One entry of the table.

    Attributes:
        title: For people.
        settings: Dataclass of its settings.
        run: The function.
        uses: What it needs besides images: ``prompts``, ``texts`` (of the rows), ``labels``, ``train`` (fitted rows).
    """

    title: str
    settings: type
    run: Callable[[Cell, Any], TaskResult]
    uses: tuple[Literal["prompts", "texts", "labels", "train"], ...]


SUITE_TASKS: Registry[SuiteTask] = Registry("task of a suite", "chiasm.suite_tasks")


def suite_task(
    name: str, title: str, settings: type, *uses: Literal["prompts", "texts", "labels", "train"]
) -> Callable[[Callable[[Cell, Any], TaskResult]], Callable[[Cell, Any], TaskResult]]:
    """Return a decorator that puts a function into the table."""

    def add(function: Callable[[Cell, Any], TaskResult]) -> Callable[[Cell, Any], TaskResult]:
        SUITE_TASKS.add(name, SuiteTask(title, settings, function, uses))
        return function

    return add


@dataclass(frozen=True)
class NoSettings:
    """A task without settings of its own."""


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of ``linear_probe``.

    Attributes:
        cs: Inverse strengths of the L2 penalty to choose from; empty: the sweep of the estimator.
    """

    cs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if any(c <= 0 for c in self.cs):
            raise ConfigError("`cs` must be positive")


@dataclass(frozen=True)
class NeighbourSettings:
    """Settings of ``knn``.

    Attributes:
        ks: Numbers of neighbours to choose from on validation patients.
    """

    ks: tuple[int, ...] = (1, 5, 10, 20, 50)

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ConfigError("`ks` must be numbers of at least 1")


@dataclass(frozen=True)
class FewShotSettings:
    """Settings of ``few_shot``.

    Attributes:
        shots: Labelled patients a class.
        draws: Random draws of the shots; their AUROCs are averaged.
        method: ``prototype`` (nothing to choose) or ``linear_probe`` with ``c``.
        c: Inverse strength of the probe, fixed: so few rows leave nothing to choose on.
    """

    shots: int = 8
    draws: int = 10
    method: Literal["prototype", "linear_probe"] = "prototype"
    c: float = 1.0

    def __post_init__(self) -> None:
        if self.shots < 1 or self.draws < 1 or self.c <= 0:
            raise ConfigError("`shots` and `draws` must be at least 1, `c` positive")


@dataclass(frozen=True)
class RetrievalSettings:
    """Settings of ``retrieval``.

    Attributes:
        ks: Depths of recall; the first is the one that models are compared by, text to image.
    """

    ks: tuple[int, ...] = (5, 1, 10)

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ConfigError("`ks` must be depths of at least 1")


@dataclass(frozen=True)
class SurvivalSettings:
    """Settings of ``survival``.

    Attributes:
        time: Column of the time to event or to the end of follow-up, one value a patient.
        event: Column that says whether the event was seen.
        event_is: The value that means the event.
    """

    time: str
    event: str
    event_is: str | int = 1

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Columns of the table that the result depends on."""
        return self.time, self.event


@suite_task("zero_shot", "zero-shot", NoSettings, "prompts", "labels")
def zero_shot(cell: Cell, settings: NoSettings) -> TaskResult:
    """Classify the test rows by sentences."""
    images, rows = cell.part("test")
    result = cell.zero_shot(images)
    truth = cell.data.truth[rows]
    return score_answers(
        rows, truth, result.scores, images.groups, cell.data.labels, mode=cell.data.mode, notes=result.notes,
        **cell.options,
    )  # fmt: skip


@suite_task("calibration", "calibration of zero-shot", NoSettings, "prompts", "labels")
def calibration(cell: Cell, settings: NoSettings) -> TaskResult:
    """Compare zero-shot probabilities with the share of right answers: expected calibration error and Brier score."""
    from chiasm.metrics.calibration import brier_score_interval

    images, rows = cell.part("test")
    result = cell.zero_shot(images)
    truth, given = cell.data.truth[rows], np.asarray(result.probabilities, dtype=np.float64)
    numbers = {"ece": Number(of_measure("ece", truth, given, images.groups, **cell.options), None, "lower")}
    if cell.data.mode == "single":
        classes = [None if np.isnan(t).any() else int(t.argmax()) for t in truth]
        known = truth[~np.isnan(truth).any(axis=1)]
        rates = known.mean(axis=0)
        brier = brier_score_interval(classes, given, images.groups, **cell.options)
        constant = float(((rates - known) ** 2).sum(axis=1).mean()) / (2 if len(rates) == 2 else 1)
        numbers["brier"] = Number(brier, constant, "lower")
    notes = ("majority of the Brier score: always saying the shares of the test rows",)
    return TaskResult(numbers, "ece", "ece", rows, truth, given, (), notes)


@suite_task("linear_probe", "linear probe", ProbeSettings, "labels", "train")
def linear_probe(cell: Cell, settings: ProbeSettings) -> TaskResult:
    """Fit logistic regression on the training rows, its strength chosen on validation patients."""
    from chiasm.tasks.few_shot import LinearProbe

    options: dict[str, Any] = {"Cs": settings.cs} if settings.cs else {}
    return _fitted(cell, lambda: LinearProbe(seed=cell.seed, **options))


@suite_task("prototype", "prototypes", NoSettings, "labels", "train")
def prototype(cell: Cell, settings: NoSettings) -> TaskResult:
    """Give each row the class whose mean training vector is nearest."""
    from chiasm.tasks.few_shot import Prototypes

    return _fitted(cell, Prototypes)


@suite_task("knn", "nearest neighbours", NeighbourSettings, "labels", "train")
def knn(cell: Cell, settings: NeighbourSettings) -> TaskResult:
    """Give each row the share of a class among its nearest training rows by cosine; k is chosen on validation."""
    from chiasm.evaluate.suite.neighbours import Neighbours

    return _fitted(cell, lambda: Neighbours(settings.ks, seed=cell.seed))


@suite_task("few_shot", "few-shot", FewShotSettings, "labels", "train")
def few_shot(cell: Cell, settings: FewShotSettings) -> TaskResult:
    """Fit on a few labelled patients a class, several times, and average what the draws reach."""
    from chiasm.tasks.few_shot import LinearProbe, Prototypes

    train, train_rows = _training(cell)
    test, rows = cell.part("test")
    draws = []
    for draw in range(settings.draws):
        scores = np.empty((len(rows), len(cell.data.labels)))
        for columns, codes in _problems(cell.data.truth[train_rows], cell.data.mode):
            chosen = _shots(codes, train.groups, settings.shots, [cell.seed, draw, columns[0]])
            kind: Any = Prototypes() if settings.method == "prototype" else LinearProbe(C=settings.c)
            kind.fit(train.vectors[chosen], codes[chosen], [train.groups[i] for i in chosen])
            scores[:, columns] = _columns(kind.logits(test.vectors), kind.classes_, columns, cell.data.mode)
        draws.append(scores)
    notes = (
        f"{settings.shots} patients a class, mean of {settings.draws} draws; the interval is that of the test rows",
    )
    return score_answers(
        rows, cell.data.truth[rows], np.stack(draws, axis=2), test.groups, cell.data.labels, mode=cell.data.mode,
        notes=notes, **cell.options,
    )  # fmt: skip


@suite_task("retrieval", "retrieval", RetrievalSettings, "texts")
def retrieval(cell: Cell, settings: RetrievalSettings) -> TaskResult:
    """Search the test images by their texts, and back; a text that several images share has several right answers."""
    from chiasm.evaluate.search_scores import score_retrieval

    images, rows = cell.part("test")
    place = {cell.data.samples[r].id: int(r) for r in rows}
    texts = cell.texts()
    texts = texts.select([k for k, i in enumerate(texts.ids) if i in place])
    if not len(texts):
        raise InputError(f"no test row of data set `{cell.data.name}` has a text")
    found = score_retrieval(images, texts, ks=settings.ks, **cell.options)
    numbers: dict[str, Number] = {}
    for name, side in (("text to image", found.text_to_image), ("image to text", found.image_to_text)):
        for k in settings.ks:
            numbers[f"{name} R@{k}"] = Number(side.recall[k], side.majority[k])
        numbers[f"{name} median rank"] = Number(side.median_rank, None, "lower")
    # Each text's own image is searched, so each query has a rank.
    hits = (found.text_to_image.ranks <= settings.ks[0]).astype(np.float64)[:, None]
    asked = np.asarray([place[i] for i in texts.ids], dtype=np.int64)
    return TaskResult(
        numbers, f"text to image R@{settings.ks[0]}", "hit", asked, np.zeros_like(hits), hits,
        notes=(f"{found.text_to_image.corpus_size} images are searched",),
    )  # fmt: skip


@suite_task("survival", "survival", SurvivalSettings, "train")
def survival(cell: Cell, settings: SurvivalSettings) -> TaskResult:
    """Fit Cox's model with an elastic net on training and validation patients, and order the test patients by risk."""
    from chiasm.metrics.survival import survival_target
    from chiasm.tasks.survival import event_flags, survival_data
    from chiasm.tasks.survival_models import CoxNet

    known = sorted({k for s in cell.data.samples for k in s.labels})
    for name in settings.label_columns:
        if name not in known:
            raise InputError(f"data set `{cell.data.name}` has no column `{name}`", hint=f"columns: {', '.join(known)}")
    flags = event_flags([s.labels.get(settings.event) for s in cell.data.samples], event_is=settings.event_is)
    parts = {}
    for name in ("train", "val", "test"):
        images, rows = cell.part(name)
        if len(rows):
            days = [cell.data.samples[r].labels.get(settings.time) for r in rows]
            parts[name] = survival_data(images.vectors, images.groups, days, [flags[r] for r in rows])
    fitted = [parts[name] for name in ("train", "val") if name in parts]
    features, time, event = (np.concatenate([getattr(d, k) for d in fitted]) for k in ("features", "time", "event"))
    model = CoxNet(seed=cell.seed).fit(features, survival_target(time, event))
    if "test" not in parts:
        raise InputError(f"no image of the test rows of data set `{cell.data.name}` can be read")
    test = parts["test"]
    images, rows = cell.part("test")
    first = {g: int(r) for g, r in reversed(list(zip(images.groups, rows, strict=True)))}
    truth = np.stack([test.time, test.event.astype(np.float64)], axis=1)
    risk = np.asarray(model.predict(test.features), dtype=np.float64)[:, None]
    found = of_measure("cindex", truth, risk, test.patients, **cell.options)
    return TaskResult(
        {"concordance": Number(found, 0.5)}, "concordance", "cindex",
        np.asarray([first[p] for p in test.patients], dtype=np.int64), truth, risk,
        notes=(f"fitted on {len(features)} patients with {int(event.sum())} events; tested on {test.events} events",),
        chosen=dict(model.chosen_),
    )  # fmt: skip


def _fitted(cell: Cell, make: Callable[[], Any]) -> TaskResult:
    """Fit an estimator on the training rows, label by label or on classes, and score it on the test rows."""
    from chiasm.tasks.few_shot import ValidationRows

    train, train_rows = _training(cell)
    held, held_rows = cell.part("val")
    test, rows = cell.part("test")
    scores = np.full((len(rows), len(cell.data.labels)), 0.0)
    chosen: dict[str, Any] = {}
    notes: list[str] = []
    unheld = 0  # problems whose validation rows have one class only, or none
    validation = dict(_problems(cell.data.truth[held_rows], cell.data.mode)) if len(held) else {}
    for columns, codes in _problems(cell.data.truth[train_rows], cell.data.mode):
        known = np.flatnonzero(codes >= 0)
        name = cell.data.labels[columns[0]] if len(columns) == 1 else "classes"
        if len(np.unique(codes[known])) < 2:
            notes.append(f"`{name}` has one class only among the training rows and is not fitted")
            continue
        given = None
        if columns in validation:
            held_codes = validation[columns]
            use = np.flatnonzero(np.isin(held_codes, np.unique(codes[known])))
            if len(np.unique(held_codes[use])) > 1:
                given = ValidationRows(held.vectors[use], held_codes[use], [held.groups[i] for i in use])
        unheld += given is None
        kind = make()
        kind.fit(train.vectors[known], codes[known], [train.groups[i] for i in known], validation=given)
        chosen |= {f"{k} of {name}" if len(columns) == 1 else k: v for k, v in kind.chosen_.items()}
        scores[:, columns] = _columns(kind.logits(test.vectors), kind.classes_, columns, cell.data.mode)
    quarter = "a quarter of the training patients"
    where = quarter if not len(held) else f"{len(held)} validation rows"
    if len(held) and unheld:
        where += f", of {unheld} labels whose validation rows have one class only on {quarter}"
    notes.insert(0, f"fitted on {len(train_rows)} rows; choices on {where}")
    return score_answers(
        rows, cell.data.truth[rows], scores, test.groups, cell.data.labels, mode=cell.data.mode, notes=notes,
        chosen=chosen, **cell.options,
    )  # fmt: skip


def _training(cell: Cell) -> tuple[Embeddings, Rows]:
    train, rows = cell.part("train")
    if not len(train):
        raise no_training_rows(cell.data.name)
    return train, rows


def no_training_rows(data: str) -> InputError:
    """Return the error of a task that is fitted, on data without a part to fit on."""
    return InputError(
        f"data set `{data}` has no training rows",
        hint="name its parts with `split`, or draw them by patient with `fractions`",
    )


def _problems(truth: Floats, mode: str) -> list[tuple[tuple[int, ...], NDArray[np.int64]]]:
    """Return (columns, codes (n,) with -1 for "not labelled"): one problem of classes, or one a label."""
    if mode == "single":
        codes = np.where(np.isnan(truth).any(axis=1), -1, np.nan_to_num(truth).argmax(axis=1))
        return [(tuple(range(truth.shape[1])), codes.astype(np.int64))]
    return [((k,), np.where(np.isnan(column), -1, np.nan_to_num(column)).astype(np.int64)) for k, column in
            enumerate(truth.T)]  # fmt: skip


def _columns(logits: Floats, classes: NDArray[Any], columns: Sequence[int], mode: str) -> Floats:
    """Return scores (n, columns): log-odds of each label or class, the least for a class that was never trained."""
    if mode != "single":
        return (logits[:, 1] - logits[:, 0])[:, None]
    # Against all others together: a logit alone says nothing across rows.
    odds = np.stack(
        [logits[:, k] - np.logaddexp.reduce(np.delete(logits, k, axis=1), axis=1) for k in range(logits.shape[1])],
        axis=1,
    )
    found = np.full((len(logits), len(columns)), odds.min() - 1.0)
    found[:, classes.astype(np.int64)] = odds
    return found


def _shots(codes: NDArray[np.int64], groups: Sequence[str], shots: int, seed: list[int]) -> Rows:
    """Return the rows of ``shots`` random patients a class, one row each; a patient serves one class only."""
    random = np.random.default_rng(seed)
    taken: set[str] = set()
    chosen: list[int] = []
    for code in np.unique(codes[codes >= 0]):
        rows = np.flatnonzero(codes == code)
        found = 0
        for row in random.permutation(rows):
            if groups[row] not in taken and found < shots:
                taken.add(groups[row])
                chosen.append(int(row))
                found += 1
        if found < shots:
            raise InputError(f"a class has {found} training patients, but {shots} shots were asked for")
    return np.asarray(chosen, dtype=np.int64)
