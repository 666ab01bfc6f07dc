"""The k-shot protocol: which rows a classifier may learn from, and what it answers on a test set that never changes.

In: image embeddings with a class and a patient for each row, a mask of test rows. Out: episodes (a seed, k, and three sets
of rows that share no patient) and the answers of every method in every episode.

The rule. The test rows are fixed; their patients are in nothing else. For each seed the other patients are shuffled, and
a patient with images of several classes is given to the class that has fewest patients. Of each class, patients go in
turn to *support* (training) and *validation*: k shots are one image of each of the first k support patients, and as many
validation images of the first k validation patients. So the shots of k are among those of a larger k, and the number of
validation labels is never larger than that of training labels, as in a clinic that labels 2k images a class in all. Where
a class has fewer than 2k patients, further images of the same support (or validation) patients fill up the shots; where
these do not suffice either, k is left out and the reason told. ``all`` (k = None) takes every row: a fifth of the
patients, drawn by the seed, is validation, the rest is support.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.data.splits import split_by_group
from chiasm.errors import InputError, UnknownName
from chiasm.metrics.labels import is_missing
from chiasm.progress import Progress, SilentProgress
from chiasm.tasks.few_shot import (
    FewShotClassifier,
    LinearProbe,
    Prototypes,
    ValidationRows,
    ZeroShotReference,
    refuse_shared_patients,
)
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.tasks.text_adapters import CLIPAdapter, TextProbe, TipAdapter, TipAdapterF
from chiasm.tasks.zero_shot import TextClassifier
from chiasm.types import Embeddings

Rows = NDArray[np.int64]
#: Share of the patients that is validation where all rows are used.
ALL_VALIDATION = 0.2
IMAGE_METHODS = ("linear-probe", "prototypes", "prototypes-centred")
TEXT_METHODS = ("zero-shot", "tip-adapter", "tip-adapter-f", "clip-adapter", "text-probe")


@dataclass(frozen=True, eq=False)
class Episode:
    """Three sets of rows that share no patient.

    Attributes:
        seed: Of the draw.
        shots: Images a class to learn from; None: all.
        train: Rows to learn from.
        validation: Rows to choose on.
        test: Rows to be scored on.
        patients: Patient of every row of the data.

    Raises:
        LeakageError: A patient is in two of the sets.
    """

    seed: int
    shots: int | None
    train: Rows
    validation: Rows
    test: Rows
    patients: tuple[str, ...] = field(repr=False)

    def __post_init__(self) -> None:
        parts = {"support": self.train, "validation": self.validation, "test": self.test}
        refuse_shared_patients({name: [self.patients[i] for i in rows] for name, rows in parts.items()})


@dataclass(frozen=True, eq=False)
class Draws:
    """All episodes of a protocol.

    Attributes:
        episodes: For each k and seed.
        classes: The classes, sorted.
        truth: int64 (rows,) class number of each row; -1 where a row has no label.
        test: The fixed test rows.
        left_out: k -> why it could not be drawn.
        pool_patients: Class -> patients that shots can come from.
    """

    episodes: tuple[Episode, ...]
    classes: tuple[Any, ...]
    truth: Rows
    test: Rows
    left_out: Mapping[int, str]
    pool_patients: Mapping[Any, int]

    @property
    def shots(self) -> tuple[int | None, ...]:
        """The k that could be drawn, in order; None stands for all rows and comes last."""
        return tuple(dict.fromkeys(e.shots for e in self.episodes))


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method answered on the test rows of an episode.

    Attributes:
        method: Its name.
        seed: Of the episode.
        shots: Of the episode.
        probabilities: float64 (test rows, classes).
        train: Number of rows to learn from.
        validation: Number of rows to choose on.
        chosen: Hyper-parameters that were chosen on validation rows.
        seconds: Wall time of fitting and answering.
    """

    method: str
    seed: int
    shots: int | None
    probabilities: NDArray[np.float64]
    train: int
    validation: int
    chosen: Mapping[str, Any]
    seconds: float


Method = Callable[[Episode], tuple[NDArray[np.float64], Mapping[str, Any]]]
"""An episode -> probabilities of its test rows (rows, classes) in the order of the classes, and what was chosen."""


def draw_episodes(
    labels: Sequence[Any],
    groups: Sequence[str],
    test: Sequence[bool] | NDArray[np.bool_],
    *,
    shots: Sequence[int | None] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = tuple(range(10)),
) -> Draws:
    """Draw the episodes by the rule at the head of this module.

    Args:
        labels: Class of each row; None and NaN are in no episode.
        groups: Patient of each row.
        test: Which rows are test rows.
        shots: Values of k; None: all rows.
        seeds: One draw each.

    Raises:
        InputError: Lengths differ, there are no test rows, fewer than two classes, a class has no test row, or a class
            has fewer than two patients outside the test set.
        LeakageError: A patient has test rows and other rows.
    """
    patients = tuple(str(g) for g in groups)
    is_test = np.asarray(test, dtype=bool)
    if not len(labels) == len(patients) == len(is_test):
        raise InputError(
            f"there are {len(labels)} labels, {len(patients)} groups and {len(is_test)} marks of test rows"
        )
    if any(k is not None and k < 1 for k in shots) or not shots or not seeds:
        raise InputError("shots must be 1 or more (or all), and there must be a seed", hint="--shots 1,2,4,8,16,all")
    classes, truth = _numbered(labels)
    known = truth >= 0
    test_rows, pool = np.flatnonzero(known & is_test), np.flatnonzero(known & ~is_test)
    refuse_shared_patients({"test": [patients[i] for i in test_rows], "the rest": [patients[i] for i in pool]})
    if not len(test_rows):
        raise InputError("no test row has a label")
    counts = {}
    hint = f"{len(classes)} different labels: is it the right column? Rare classes can be left out by blank cells"
    for number, name in enumerate(classes):
        counts[name] = len({patients[i] for i in pool[truth[pool] == number]})
        if not (truth[test_rows] == number).any():
            raise InputError(
                f"class {number + 1} of {len(classes)} has no test row",
                hint="take another test split" if len(classes) < 20 else hint,
            )
        if counts[name] < 2:
            raise InputError(
                f"class {number + 1} of {len(classes)} has {counts[name]} patients outside the test set; two are needed",
                hint="one to learn from and one to choose on" if len(classes) < 20 else hint,
            )
    episodes: list[Episode] = []
    left_out: dict[int, str] = {}
    queues = {s: _queues(truth, patients, pool, len(classes), s) for s in seeds}
    for k in sorted(k for k in set(shots) if k is not None):
        drawn = {s: _take(queues[s], k) for s in seeds}
        short = min(min(len(q[part]) for q in of_seed) for of_seed in queues.values() for part in (0, 1))
        if any(d is None for d in drawn.values()):
            left_out[k] = f"a class has {short} images in its half of the patients, {k} are needed"
            continue
        episodes += [Episode(s, k, *d, test_rows, patients) for s, d in drawn.items() if d is not None]
    if None in shots:
        episodes += [_all_rows(truth, patients, pool, test_rows, s) for s in seeds]
    if not episodes:
        raise InputError(f"no number of shots can be drawn: {'; '.join(left_out.values())}")
    return Draws(tuple(episodes), classes, truth, test_rows, left_out, counts)


def run_episodes(
    draws: Draws,
    methods: Mapping[str, Method],
    *,
    only: Mapping[str, Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> tuple[Answer, ...]:
    """Let every method learn and answer in every episode.

    Args:
        draws: From :func:`draw_episodes`.
        methods: Name -> method: :func:`embedding_method`, or any function of an episode.
        only: Name of a costly method -> the seeds that it answers; the others answer all.
        progress: Gets one unit for each episode and method.

    Raises:
        InputError: A method's probabilities have another shape or are not finite.
    """
    bar = progress or SilentProgress()
    asked = [(e, name) for e in draws.episodes for name in methods if e.seed in (only or {}).get(name, (e.seed,))]
    bar.start(len(asked), "few-shot")
    found = []
    for episode, name in asked:
        began = time.perf_counter()
        probabilities, chosen = methods[name](episode)
        spent = time.perf_counter() - began
        expected = (len(episode.test), len(draws.classes))
        if np.shape(probabilities) != expected:
            raise InputError(f"{name} gave probabilities of shape {np.shape(probabilities)}, expected {expected}")
        if not np.isfinite(probabilities).all():
            raise InputError(f"{name} gave probabilities that are not finite",
                             hint="its fit went astray; leave it out, or change its settings")  # fmt: skip
        sizes = len(episode.train), len(episode.validation)
        found.append(Answer(name, episode.seed, episode.shots, probabilities, *sizes, dict(chosen), spent))
        bar.advance()
    bar.finish()
    return tuple(found)


def embedding_method(name: str, images: Embeddings, draws: Draws, *, texts: TextClassifier | None = None) -> Method:
    """Return a method on embeddings by its name.

    Args:
        name: One of :data:`IMAGE_METHODS` or :data:`TEXT_METHODS`.
        images: All rows, in the order of the draws.
        draws: From :func:`draw_episodes`.
        texts: Of the classes, for the methods that need them.

    Raises:
        UnknownName: No such method.
        InputError: The method needs texts.
    """
    make_estimator(name, 0, texts)  # an unknown name, or texts that are absent, are told before anything runs
    labels = np.asarray([draws.classes[t] if t >= 0 else None for t in draws.truth], dtype=object)

    def method(episode: Episode) -> tuple[NDArray[np.float64], Mapping[str, Any]]:
        estimator = make_estimator(name, episode.seed, texts)
        train, held = episode.train, episode.validation
        validation = ValidationRows(images.select(held), labels[held].tolist())
        estimator.fit(images.select(train), labels[train].tolist(), validation=validation)
        return estimator.predict_proba(images.select(episode.test)), estimator.chosen_

    return method


def make_estimator(name: str, seed: int = 0, texts: TextClassifier | None = None) -> FewShotClassifier:
    """Return an unfitted estimator by the name of its method.

    Raises:
        UnknownName: No such method.
        InputError: The method needs texts.
    """
    if name not in (*IMAGE_METHODS, *TEXT_METHODS):
        known = (*IMAGE_METHODS, *TEXT_METHODS)
        raise UnknownName("few-shot method", name, known, hint=f"methods: {', '.join(known)}")
    if name == "linear-probe":
        return LinearProbe(seed=seed)
    if name in ("prototypes", "prototypes-centred"):
        return Prototypes(center=name != "prototypes")
    if texts is None:
        raise InputError(f"`{name}` needs the texts of the classes", hint="--labels-file PROMPTS with --model")
    if name == "zero-shot":
        return ZeroShotReference(texts)
    if name == "tip-adapter":
        return TipAdapter(texts, seed=seed)
    if name == "tip-adapter-f":
        return TipAdapterF(texts, seed=seed)
    return CLIPAdapter(texts, seed=seed) if name == "clip-adapter" else TextProbe(texts, seed=seed)


def class_prompts(prompts: PromptSet, column: str, classes: Sequence[Any]) -> PromptSet:
    """Return prompts whose labels are the classes of a column.

    Labels of the prompts may be the classes' names in any case. For a column of 0 and 1, a label with the column's own
    name and negative prompts does too: these are the prompts of 0.

    Raises:
        InputError: Neither is so.
    """
    by_name = {label.name.strip().lower(): label for label in prompts.labels}
    names = [str(c) for c in classes]
    if all(name.strip().lower() in by_name for name in names):
        found = [by_name[name.strip().lower()] for name in names]
        return PromptSet(tuple(LabelPrompts(n, p.positive) for n, p in zip(names, found, strict=True)))
    own = by_name.get(column.strip().lower())
    if own is not None and own.negative and sorted(float(n) for n in names if _is_number(n)) == [0.0, 1.0]:
        sides = {0.0: own.negative, 1.0: own.positive}
        return PromptSet(tuple(LabelPrompts(n, sides[float(n)]) for n in names))
    absent = sum(name.strip().lower() not in by_name for name in names)
    raise InputError(
        f"{absent} of the {len(names)} classes of column `{column}` have no prompts",
        hint="name the labels of the prompts as the column does; for a column of 0 and 1 name one label as the column, "
        "with negative prompts",
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbered(labels: Sequence[Any]) -> tuple[tuple[Any, ...], Rows]:
    plain = [None if is_missing(v) else v for v in labels]
    try:
        classes = tuple(sorted({v for v in plain if v is not None}))
    except TypeError as error:
        raise InputError("labels mix numbers and text", hint="use one kind") from error
    if len(classes) < 2:
        raise InputError(f"the column holds {len(classes)} classes; a classifier needs two")
    number = {c: i for i, c in enumerate(classes)}
    return classes, np.array([-1 if v is None else number[v] for v in plain], dtype=np.int64)


Queue = tuple[list[int], list[int]]
"""Rows of one class in the order in which they are taken: of support patients, of validation patients."""


def _queues(truth: Rows, patients: Sequence[str], pool: Rows, n_classes: int, seed: int) -> list[Queue]:
    """Return for each class its rows, one image of each patient first, then second images, and so on."""
    random = np.random.default_rng([seed, 17])
    rows_of: dict[str, dict[int, list[int]]] = {}
    for row in pool[np.argsort([patients[i] for i in pool], kind="stable")]:  # by name: the order of rows is no matter
        rows_of.setdefault(patients[row], {}).setdefault(int(truth[row]), []).append(int(row))
    members: list[list[str]] = [[] for _ in range(n_classes)]
    shuffled = [list(rows_of)[i] for i in random.permutation(len(rows_of))]
    for patient in sorted(shuffled, key=lambda p: len(rows_of[p])):  # those with one class first: no choice
        members[min(rows_of[patient], key=lambda c: (len(members[c]), c))].append(patient)
    found: list[Queue] = []
    for c, own in enumerate(members):
        order = [own[i] for i in random.permutation(len(own))]
        sides = []
        for side in (order[::2], order[1::2]):
            shuffles = [random.permutation(rows_of[p][c]).tolist() for p in side]
            deepest = max((len(rows) for rows in shuffles), default=0)
            sides.append([rows[depth] for depth in range(deepest) for rows in shuffles if depth < len(rows)])
        found.append((sides[0], sides[1]))
    return found


def _take(queues: Sequence[Queue], k: int) -> tuple[Rows, Rows] | None:
    """Return k rows a class of both kinds, or None where a class has too few."""
    if any(len(rows) < k for queue in queues for rows in queue):
        return None
    sides = [[row for queue in queues for row in queue[part][:k]] for part in (0, 1)]
    return np.array(sides[0], dtype=np.int64), np.array(sides[1], dtype=np.int64)


def _all_rows(truth: Rows, patients: tuple[str, ...], pool: Rows, test: Rows, seed: int) -> Episode:
    of_pool = [patients[i] for i in pool]
    parts = split_by_group(
        of_pool,
        {"support": 1 - ALL_VALIDATION, "validation": ALL_VALIDATION},
        seed=seed,
        stratify=[int(truth[i]) for i in pool],
    )
    support = np.array([part == "support" for part in parts])
    if set(truth[pool[support]].tolist()) != set(truth[pool].tolist()):
        raise InputError("a class has too few patients to be split into support and validation")
    return Episode(seed, None, pool[support], pool[~support], test, patients)
