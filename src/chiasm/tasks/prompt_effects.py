"""What each template and each name of a label does to the score.

In: image embeddings, a :class:`~chiasm.tasks.prompt_grid.GridVectors`, the truth where there is one. Out: a
:class:`PromptEffects`: for every option its score alone and what the ensemble loses without it (with intervals over
patients, the two always on the same resamples), how much it moves the answers (which needs no truth), and the cosines
between the directions of the labels: labels whose directions nearly coincide cannot be told apart by any image.

Nothing is chosen here. Who picks the best row of this table has tuned on the rows that made it; ``prompt_search`` is for
that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from chiasm.errors import UnknownName
from chiasm.metrics.bootstrap import paired_difference, weighted_interval
from chiasm.tasks.prompt_checks import PromptFault, find_faults
from chiasm.tasks.prompt_grid import (
    METRICS,
    Floats,
    GridVectors,
    Metric,
    Pick,
    Problem,
    Truth,
    chance_of,
    majority_of,
    make_problems,
    statistic_of,
    truth_of,
)
from chiasm.tasks.zero_shot import Mode
from chiasm.types import Embeddings, Interval


@dataclass(frozen=True)
class OptionEffect:
    """What one template or one name does.

    Attributes:
        problem: The label, or all classes.
        kind: ``template`` or ``synonym``.
        option: Its text; with the label in front where only that label has it.
        example: A prompt that has it.
        alone: Score of the option by itself, with all options of the other kind; None without truth.
        leave_one_out: Score of the plain ensemble less that of the ensemble without the option: above 0 it helps, below
            it harms. None without truth, or where it is the only one.
        changed: Share of the images whose answer differs between the option alone and the plain ensemble: the side of
            the middle for a label, the class for classes.
        rank_correlation: Spearman's, of the option's scores with the ensemble's; NaN for classes.
        shift: Mean logit of the option less that of the ensemble; NaN for classes.
        cosine: Of the option's direction with the ensemble's, mean over labels.
    """

    problem: str
    kind: str
    option: str
    example: str
    alone: Interval | None
    leave_one_out: Interval | None
    changed: float
    rank_correlation: float
    shift: float
    cosine: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = dict(vars(self))
        for name in ("alone", "leave_one_out"):
            found = getattr(self, name)
            values[name] = None if found is None else found.to_dict()
        return values


@dataclass(frozen=True)
class PromptEffects:
    """What prompts do.

    Attributes:
        mode: ``multi`` or ``single``.
        metric: Of the scores; None without truth.
        effects: One an option, label by label.
        ensemble: Problem -> score of the plain ensemble; empty without truth.
        majority: Problem -> score of always saying the most frequent class, where that is not chance.
        labels: Names, in the order of ``cosines``.
        cosines: Between the positive directions of the labels.
        negative_cosines: Label -> cosine of its positive with its negative direction.
        faults: Prompts that seem to say something else than their label.
        rows: Images.
        patients: Patients among them.
    """

    mode: Mode
    metric: Metric | None
    effects: tuple[OptionEffect, ...]
    ensemble: Mapping[str, Interval]
    majority: Mapping[str, float]
    labels: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    negative_cosines: Mapping[str, float]
    faults: tuple[PromptFault, ...]
    rows: int
    patients: int

    def of(self, problem: str) -> tuple[OptionEffect, ...]:
        """Return the effects of one label."""
        return tuple(e for e in self.effects if e.problem == problem)

    @property
    def inverted(self) -> tuple[str, ...]:
        """Labels whose plain ensemble scores below chance with its whole interval: their prompts say the opposite."""
        return tuple(
            name
            for name, score in self.ensemble.items()
            if score.chance is not None and self.metric == "auroc" and score.high < score.chance
        )

    @property
    def inverted_options(self) -> tuple[OptionEffect, ...]:
        """Options whose own score lies below chance with its whole interval."""
        below = self.metric == "auroc"
        return tuple(e for e in self.effects if below and e.alone is not None and e.alone.high < 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "mode": self.mode,
            "metric": self.metric,
            "rows": self.rows,
            "patients": self.patients,
            "ensemble": {name: score.to_dict() for name, score in self.ensemble.items()},
            "majority": dict(self.majority),
            "inverted": list(self.inverted),
            "effects": [effect.to_dict() for effect in self.effects],
            "labels": list(self.labels),
            "cosines": [list(row) for row in self.cosines],
            "negative_cosines": dict(self.negative_cosines),
            "faults": [fault.to_dict() for fault in self.faults],
        }


def explain_prompts(
    images: Embeddings,
    vectors: GridVectors,
    truth: Truth | None = None,
    *,
    mode: Mode = "multi",
    metric: Metric | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> PromptEffects:
    """Return what every template and every name does to the score, or without truth to the answers.

    Args:
        images: Image embeddings.
        vectors: The wordings, from :meth:`~chiasm.tasks.prompt_grid.PromptGrid.embed`.
        truth: Label -> 0, 1 or None a row (``multi``), or the class of each row (``single``).
        mode: ``multi``: any number of labels can be true. ``single``: classes exclude each other.
        metric: Of the scores; by default ``auroc`` or ``balanced_accuracy``.
        n_resamples: Of the intervals.
        seed: Of the intervals.

    Raises:
        SpaceMismatch: Images and texts come from two spaces.
        InputError: A truth that does not fit.
        UnknownName: A metric that the mode does not have.
    """
    used = METRICS[mode][0] if metric is None else metric
    if used not in METRICS[mode]:
        raise UnknownName(f"metric of mode `{mode}`", used, METRICS[mode], hint=f"one of: {', '.join(METRICS[mode])}")
    problems = make_problems(images, vectors, mode=mode)
    effects: list[OptionEffect] = []
    ensemble: dict[str, Interval] = {}
    majority: dict[str, float] = {}
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    for problem in problems:
        known = None if truth is None else truth_of(problem, truth, len(images))
        if known is not None:
            whole = statistic_of(used, known, problem.answers(problem.everything))
            chance = chance_of(used, known)
            ensemble[problem.name] = weighted_interval(whole, images.groups, chance=chance, **options)
            most = majority_of(used, known)
            majority |= {} if most is None else {problem.name: most}
        effects.extend(_effects(problem, vectors, images, known, used, options))
    classifier = vectors.classifier()
    against = classifier.negative
    return PromptEffects(
        mode,
        None if truth is None else used,
        tuple(effects),
        ensemble,
        majority,
        classifier.labels,
        tuple(tuple(float(v) for v in row) for row in classifier.positive @ classifier.positive.T),
        {}
        if against is None
        else {n: float(p @ q) for n, p, q in zip(classifier.labels, classifier.positive, against, strict=True)},
        find_faults(vectors.grid.prompts()),
        len(images),
        len(set(images.groups)),
    )


def _effects(
    problem: Problem,
    vectors: GridVectors,
    images: Embeddings,
    truth: Floats | None,
    metric: Metric,
    options: dict[str, Any],
) -> list[OptionEffect]:
    plain = problem.everything
    found = []
    for number, axis in enumerate(problem.axes):
        if len(axis.options) < 2 and (axis.kind == "synonym" or any(len(a.options) > 1 for a in problem.axes)):
            continue
        for k, option in enumerate(axis.options):
            only = (*plain[:number], frozenset([k]), *plain[number + 1 :])
            rest = frozenset(plain[number] - {k})
            without = (*plain[:number], rest, *plain[number + 1 :]) if rest else None
            alone = leave = None
            if truth is not None:
                statistic = statistic_of(metric, truth, problem.answers(only))
                alone = weighted_interval(statistic, images.groups, chance=chance_of(metric, truth), **options)
                leave = None if without is None else _lost(problem, plain, without, truth, metric, images, options)
            changed, correlation, shift = _moved(problem, only, plain)
            chosen = problem.chosen(only)
            first = problem.labels[0] if not axis.label else next(x for x in problem.labels if x.name == axis.label)
            found.append(
                OptionEffect(
                    problem.name,
                    axis.kind,
                    f"{axis.label}: {option}" if axis.label else option,
                    first.select(*chosen[first.name]).positive[0],
                    alone,
                    leave,
                    changed,
                    correlation,
                    shift,
                    _cosine(problem, vectors, only, plain),
                )
            )
    return found


def _lost(
    problem: Problem,
    plain: Pick,
    without: Pick,
    truth: Floats,
    metric: Metric,
    images: Embeddings,
    options: dict[str, Any],
) -> Interval:
    both = [statistic_of(metric, truth, problem.answers(pick)) for pick in (plain, without)]
    return paired_difference(both[0], both[1], images.groups, **options).difference


def _moved(problem: Problem, only: Pick, plain: Pick) -> tuple[float, float, float]:
    """Return the share of changed answers, the rank correlation and the mean shift of the logits."""
    first, second = problem.scores(only), problem.scores(plain)
    if len(problem.labels) > 1:
        return float((first.argmax(1) != second.argmax(1)).mean()), math.nan, math.nan
    paired = bool(problem.labels[0].select(*problem.chosen(plain)[problem.name]).negative)
    middles = (0.0, 0.0) if paired else (float(np.median(first)), float(np.median(second)))
    changed = float(((first[:, 0] > middles[0]) != (second[:, 0] > middles[1])).mean())
    ranks = rankdata(first[:, 0]), rankdata(second[:, 0])
    spread = ranks[0].std() * ranks[1].std()
    correlation = (
        float(((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())).mean() / spread) if spread else math.nan
    )
    return changed, correlation, problem.logit_scale * float((first - second).mean())


def _cosine(problem: Problem, vectors: GridVectors, only: Pick, plain: Pick) -> float:
    cosines = []
    for label in problem.labels:
        directions = []
        for pick in (only, plain):
            texts = label.select(*problem.chosen(pick)[label.name]).positive
            mean = vectors.vectors[[vectors.row[t] for t in texts]].astype(np.float64).mean(0)
            directions.append(mean / np.linalg.norm(mean))
        cosines.append(float(directions[0] @ directions[1]))
    return float(np.mean(cosines))
