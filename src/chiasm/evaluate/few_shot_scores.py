"""Answers of the k-shot protocol to numbers: learning curves with intervals, and who beats the reference where.

Comes in: the draws and answers of ``tasks.k_shot``. Goes out: :class:`FewShotScores`, which becomes JSON, a figure, a page.

The intervals. A point of a curve is the mean over seeds of a score on the one fixed test set. Its 95 % interval is made by
drawing test patients and seeds anew together (Owen 2007, ``metrics.paired.joint_draws``): it covers another hand of shots
and other test patients. Beside it stands Student's t interval over seeds alone: another hand of shots from the same pool,
the same test patients. Seeds draw from one finite pool of patients, so neither covers another hospital.

The comparisons. A method is compared with the reference at each k seed by seed (paired t, Holm over all comparisons of the
page); it is called better or worse only if that p is below 0.05 *and* the interval over patients and seeds lies on the same
side of 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from chiasm.errors import UnknownName
from chiasm.metrics.bootstrap import WeightStatistic
from chiasm.metrics.classification import majority_baseline
from chiasm.metrics.paired import JointDraws, SeedDifference, correct, joint_draws, mean_over_seeds, seed_difference
from chiasm.metrics.weighted import balanced_accuracy_statistic, multiclass_auroc_statistic
from chiasm.tasks.k_shot import Answer, Draws
from chiasm.types import Interval

Verdict = Literal["better", "worse", "not told apart"]
ALPHA = 0.05


@dataclass(frozen=True)
class Point:
    """One method at one k.

    Attributes:
        method: Its name.
        shots: Images a class; None: all.
        balanced_accuracy: Mean over seeds; interval over test patients and seeds; chance 1 / classes.
        over_seeds: The same mean with Student's t interval over seeds alone.
        auroc: Mean over seeds, interval as the first; several classes: the mean of each against the rest.
        accuracy: Mean over seeds; compare it with the majority.
        seeds: Seeds that count.
        per_seed: Balanced accuracy of each seed.
        train: Mean number of rows to learn from.
        validation: Mean number of rows to choose on.
        chosen: Hyper-parameter -> what was chosen in each seed.
        seconds: Mean wall time of an episode.
    """

    method: str
    shots: int | None
    balanced_accuracy: Interval
    over_seeds: Interval
    auroc: Interval
    accuracy: float
    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    train: float
    validation: float
    chosen: Mapping[str, tuple[Any, ...]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; shots are a number or ``all``."""
        return {
            "method": self.method,
            "shots": shots_name(self.shots),
            "balanced_accuracy": self.balanced_accuracy.to_dict(),
            "over_seeds": self.over_seeds.to_dict(),
            "auroc": self.auroc.to_dict(),
            "accuracy": self.accuracy,
            "seeds": list(self.seeds),
            "per_seed": list(self.per_seed),
            "train_rows": self.train,
            "validation_rows": self.validation,
            "chosen": {name: list(values) for name, values in self.chosen.items()},
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Contrast:
    """A method against the reference at one k.

    Attributes:
        method: Its name.
        shots: Images a class; None: all.
        difference: Balanced accuracy of the method less that of the reference; ``patients`` is its interval over
            patients and seeds, ``p`` is corrected.
    """

    method: str
    shots: int | None
    difference: SeedDifference

    @property
    def verdict(self) -> Verdict:
        """What may be claimed, by the rule at the head of this module."""
        found, both = self.difference, self.difference.patients
        if not (found.p < ALPHA and both is not None and math.isfinite(both.low)):
            return "not told apart"
        if found.value > 0 and both.low > 0:
            return "better"
        return "worse" if found.value < 0 and both.high < 0 else "not told apart"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        found = self.difference
        return {
            "method": self.method,
            "shots": shots_name(self.shots),
            "difference": found.value,
            "over_seeds": [found.low, found.high],
            "patients_and_seeds": None if found.patients is None else found.patients.to_dict(),
            "p": found.p,
            "p_uncorrected": found.p_raw,
            "seeds": len(found.seeds),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class FewShotScores:
    """All that is known after a run.

    Attributes:
        classes: Names of the classes.
        points: For each k, then each method.
        contrasts: Against ``reference``; empty with one method.
        reference: Name of the method that the others are compared with.
        chance: Balanced accuracy of guessing and of the majority: 1 / classes.
        majority: Accuracy of always answering with the most common class of the test set.
        test_rows: Rows of the test set.
        test_patients: Its patients.
        pool_patients: Class -> patients that shots were drawn from.
        left_out: k -> why it could not be drawn.
    """

    classes: tuple[str, ...]
    points: tuple[Point, ...]
    contrasts: tuple[Contrast, ...]
    reference: str
    chance: float
    majority: float
    test_rows: int
    test_patients: int
    pool_patients: Mapping[str, int]
    left_out: Mapping[int, str]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods in their order."""
        return tuple(dict.fromkeys(p.method for p in self.points))

    @property
    def shots(self) -> tuple[int | None, ...]:
        """The k in their order; None stands for all."""
        return tuple(dict.fromkeys(p.shots for p in self.points))

    def point(self, method: str, shots: int | None) -> Point:
        """Return one point of a curve; an unknown one raises ``UnknownName``."""
        for found in self.points:
            if (found.method, found.shots) == (method, shots):
                return found
        raise UnknownName("point of a curve", f"{method} at {shots_name(shots)}", self.methods)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "classes": list(self.classes),
            "chance": self.chance,
            "majority_accuracy": self.majority,
            "test_rows": self.test_rows,
            "test_patients": self.test_patients,
            "pool_patients": dict(self.pool_patients),
            "left_out": {str(k): why for k, why in self.left_out.items()},
            "curves": [p.to_dict() for p in self.points],
            "reference": self.reference,
            "contrasts": [c.to_dict() for c in self.contrasts],
        }


def score_few_shot(
    draws: Draws,
    answers: Sequence[Answer],
    *,
    reference: str | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> FewShotScores:
    """Score all answers.

    Args:
        draws: From :func:`chiasm.tasks.k_shot.draw_episodes`.
        answers: From :func:`chiasm.tasks.k_shot.run_episodes`.
        reference: Method that the others are compared with; None: ``linear-probe``, else the first.
        n_resamples: Of patients and seeds.
        seed: Of the resampling.

    Raises:
        UnknownName: The reference is none of the methods.
    """
    methods = list(dict.fromkeys(a.method for a in answers))
    chosen = reference or ("linear-probe" if "linear-probe" in methods else methods[0])
    if chosen not in methods:
        raise UnknownName("reference method", chosen, methods)
    truth, n_classes = draws.truth[draws.test], len(draws.classes)
    patients = [draws.episodes[0].patients[i] for i in draws.test]
    points: list[Point] = []
    contrasts: dict[str, Contrast] = {}
    for k in draws.shots:
        of_k = [a for a in answers if a.shots == k]
        by = {name: {a.seed: a for a in of_k if a.method == name} for name in methods}
        here = [name for name in methods if by[name]]
        seeds = sorted({a.seed for a in of_k})
        options = {"n_resamples": n_resamples, "seed": seed}
        drawn = joint_draws(_statistics(truth, by, here, seeds, auroc=False), patients, **options)
        areas = joint_draws(_statistics(truth, by, here, seeds, auroc=True), patients, **options)
        new = [_point(by[name], truth, n_classes, (drawn, areas), i) for i, name in enumerate(here)]
        points += new
        if chosen not in here:
            continue
        base = here.index(chosen)
        for i, name in enumerate(here):
            if name == chosen:
                continue
            found = seed_difference(_by_seed(new[i]), _by_seed(new[base]))
            both = replace(drawn.interval(found.value, i, base), chance=0.0)
            contrasts[f"{name} {k}"] = Contrast(name, k, replace(found, patients=both))
    adjusted = correct({key: c.difference for key, c in contrasts.items()})
    return FewShotScores(
        tuple(str(c) for c in draws.classes),
        tuple(points),
        tuple(replace(c, difference=adjusted[key]) for key, c in contrasts.items()),
        chosen,
        1 / n_classes,
        majority_baseline(truth),
        len(draws.test),
        len(set(patients)),
        {str(c): n for c, n in draws.pool_patients.items()},
        dict(draws.left_out),
    )


def shots_name(shots: int | None) -> int | str:
    """Return how a number of shots is written: None is ``all``."""
    return "all" if shots is None else shots


def _statistics(
    truth: Any, by: Mapping[str, Mapping[int, Answer]], names: Sequence[str], seeds: Sequence[int], *, auroc: bool
) -> list[list[WeightStatistic | None]]:
    def one(answer: Answer | None) -> WeightStatistic | None:
        if answer is None:
            return None
        given = answer.probabilities
        if auroc:
            return multiclass_auroc_statistic(truth, given)
        return balanced_accuracy_statistic(truth, given.argmax(axis=1))

    return [[one(by[name].get(s)) for s in seeds] for name in names]


def _point(
    answers: Mapping[int, Answer], truth: Any, n_classes: int, draws: tuple[JointDraws, JointDraws], place: int
) -> Point:
    seeds = tuple(sorted(answers))
    given = [answers[s] for s in seeds]
    once = np.ones((1, len(truth)))
    scores = [float(balanced_accuracy_statistic(truth, a.probabilities.argmax(1))(once)[0]) for a in given]
    areas = [float(multiclass_auroc_statistic(truth, a.probabilities)(once)[0]) for a in given]
    over = mean_over_seeds(scores)
    names = dict.fromkeys(name for a in given for name in a.chosen)
    return Point(
        given[0].method,
        given[0].shots,
        replace(draws[0].interval(over.value, place), chance=1 / n_classes),
        Interval(over.value, over.low, over.high, over.n, 1 / n_classes),
        replace(draws[1].interval(float(np.mean(areas)), place), chance=0.5),
        float(np.mean([(a.probabilities.argmax(1) == truth).mean() for a in given])),
        seeds,
        tuple(scores),
        float(np.mean([a.train for a in given])),
        float(np.mean([a.validation for a in given])),
        {name: tuple(a.chosen.get(name) for a in given) for name in names},
        float(np.mean([a.seconds for a in given])),
    )


def _by_seed(point: Point) -> dict[int, float]:
    return dict(zip(point.seeds, point.per_seed, strict=True))
