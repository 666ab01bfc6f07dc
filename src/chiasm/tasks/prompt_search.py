"""Choose templates and names of labels on validation patients, and say how much of the gain is luck.

In: image embeddings with patients, a :class:`~chiasm.tasks.prompt_grid.GridVectors`, the truth, and which rows may choose.
Out: a :class:`PromptSearch`: the chosen prompts, their score on rows that had no part in the choice, beside the plain
ensemble of all prompts, and three measures of luck:

* how often the winner changes when the validation patients are drawn again with replacement;
* what the winners of those draws score on the untouched rows: the score that a search of this size gives, not its best;
* optimism, the score on the rows that chose less the score on the others.

Small sets are searched completely; larger ones by single changes (an option in, an option out) from the plain ensemble
until none helps. The winner never scores less than the plain ensemble on the rows that chose; on others it may.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, combinations, product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.data.splits import split_by_group
from chiasm.errors import InputError, LeakageError, UnknownName
from chiasm.metrics.bootstrap import Clusters, WeightStatistic, paired_difference, weighted_interval
from chiasm.metrics.compare import PairedTest, compare_auroc, compare_metric
from chiasm.metrics.paired import correct
from chiasm.metrics.weighted import auprc_statistic
from chiasm.tasks.prompt_choice import ProblemSearch, PromptSearch, Single
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
from chiasm.tasks.prompts import PromptSet
from chiasm.tasks.zero_shot import Mode
from chiasm.types import Embeddings, Interval

Strategy = Literal["auto", "exhaustive", "greedy"]
Rows = NDArray[np.intp]

#: Choices up to which ``auto`` tries all.
EXHAUSTIVE = 1024
#: Choices that ``exhaustive`` tries at most.
MOST = 65536
#: Steps of a greedy search.
STEPS = 64
_TIE = 1e-9


def split_patients(images: Embeddings, *, share: float = 0.5, seed: int = 0) -> tuple[Rows, Rows]:
    """Return the rows that choose and the rows that score, no patient in both."""
    part = np.asarray(split_by_group(images.groups, {"choose": share, "test": 1 - share}, seed=seed))
    return np.flatnonzero(part == "choose"), np.flatnonzero(part == "test")


def search_prompts(
    images: Embeddings,
    vectors: GridVectors,
    truth: Truth,
    *,
    choose: Sequence[int] | Rows,
    test: Sequence[int] | Rows,
    mode: Mode = "multi",
    metric: Metric | None = None,
    strategy: Strategy = "auto",
    redraws: int = 100,
    n_resamples: int = 1000,
    seed: int = 0,
) -> PromptSearch:
    """Choose prompts on some patients and score them on others.

    Args:
        images: Image embeddings of both parts.
        vectors: The wordings, from :meth:`~chiasm.tasks.prompt_grid.PromptGrid.embed`.
        truth: Label -> 0, 1 or None a row (``multi``), or the class of each row (``single``).
        choose: Rows that may choose.
        test: Rows that score; none of their patients may choose.
        mode: ``multi``: any number of labels can be true, each chooses for itself. ``single``: classes exclude each
            other and choose together.
        metric: What is maximised; by default ``auroc`` (``multi``) or ``balanced_accuracy`` (``single``).
        strategy: ``exhaustive`` tries every subset, ``greedy`` single changes from the plain ensemble, ``auto`` the
            first up to 1024 choices.
        redraws: Times that the validation patients are drawn again.
        n_resamples: Of the intervals.
        seed: Of both.

    Raises:
        LeakageError: A patient is in both parts.
        InputError: A part is empty, or the metric does not fit the mode.
    """
    choose, test = np.asarray(choose, dtype=np.intp), np.asarray(test, dtype=np.intp)
    _check_parts(images, choose, test)
    metric = METRICS[mode][0] if metric is None else metric
    if metric not in METRICS[mode]:
        raise UnknownName(f"metric of mode `{mode}`", metric, METRICS[mode], hint=f"one of: {', '.join(METRICS[mode])}")
    if strategy not in ("auto", "exhaustive", "greedy"):
        raise UnknownName("strategy", strategy, ("auto", "exhaustive", "greedy"))
    groups = np.asarray(images.groups)
    problems = make_problems(images, vectors, mode=mode)
    runs = [
        _Run(p, truth_of(p, truth, len(images)), metric, choose, test, groups, redraws, n_resamples, seed)
        for p in problems
    ]
    found = [run.search(strategy) for run in runs]
    corrected = correct({p.name: p.difference for p in found})
    found = [_with_difference(p, corrected[p.name]) for p in found]
    chosen = PromptSet(tuple(label for p in found for label in p.prompts.labels))
    together = _mean([run.test_statistic(run.winner) for run in runs])
    plain = _mean([run.test_statistic(run.problem.everything) for run in runs])
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    chance = float(np.mean([p.test.chance for p in found]))
    compared = paired_difference(together, plain, groups[test], **options)
    return PromptSearch(
        mode,
        metric,
        tuple(found),
        chosen,
        vectors.grid.prompts(),
        weighted_interval(together, groups[test], chance=chance, **options),
        weighted_interval(plain, groups[test], chance=chance, **options),
        compared.difference,
        compared.p_value,
        _mean_of_known([p.optimism.value for p in found]),
        len(choose),
        len(test),
        len(set(groups[choose])),
        len(set(groups[test])),
    )


class _Run:
    """The search of one problem: every choice is scored on all redraws of the validation patients at once."""

    def __init__(
        self,
        problem: Problem,
        truth: Floats,
        metric: Metric,
        choose: Rows,
        test: Rows,
        groups: NDArray[Any],
        redraws: int,
        n_resamples: int,
        seed: int,
    ) -> None:
        self.problem, self.metric, self.seed, self.n_resamples = problem, metric, seed, n_resamples
        self.truth, self.choose, self.test, self.groups = truth, choose, test, groups
        drawn = list(Clusters(groups[choose]).weights(redraws, seed)) if redraws else []
        self.weights = np.concatenate([np.ones((1, len(choose))), *drawn])
        self.known: dict[Pick, Floats] = {}
        self.winner = problem.everything

    def values(self, pick: Pick) -> Floats:
        """Return the score on the rows that choose (first), and on each redraw of their patients."""
        if pick not in self.known:
            statistic = statistic_of(self.metric, self.truth[self.choose], self.problem.answers(pick)[self.choose])
            self.known[pick] = np.asarray(statistic(self.weights), dtype=np.float64)
        return self.known[pick]

    def test_statistic(self, pick: Pick) -> WeightStatistic:
        """Return the score on the test rows as a function of their weights."""
        return statistic_of(self.metric, self.truth[self.test], self.problem.answers(pick)[self.test])

    def test_value(self, pick: Pick) -> float:
        return float(self.test_statistic(pick)(np.ones((1, len(self.test))))[0])

    def search(self, strategy: Strategy) -> ProblemSearch:
        problem = self.problem
        everything = problem.everything
        searched = bool(np.isfinite(self.values(everything)[0])) and len(_classes(self.truth[self.choose])) > 1
        whole = strategy == "exhaustive" or (strategy == "auto" and problem.size <= EXHAUSTIVE)
        if whole and problem.size > MOST:
            raise InputError(
                f"`{problem.name}` has {problem.size} choices; at most {MOST} are tried one by one",
                hint="use the strategy `greedy`, or fewer templates",
            )
        if not searched:
            winners = [everything] * len(self.weights)
        elif whole:
            winners = self._exhaustive()
        else:
            winners = [self._greedy(k) for k in range(len(self.weights))]
        self.winner = winners[0]
        return self._report(winners[0], winners[1:], searched)

    def _exhaustive(self) -> list[Pick]:
        picks = sorted(_subsets(self.problem), key=lambda pick: -sum(map(len, pick)))  # of equals the largest ensemble
        table = np.stack([self.values(pick) for pick in picks])
        table = np.where(np.isfinite(table), table, -np.inf)
        best = table.max(0)
        return [picks[int(np.argmax(table[:, k] >= best[k] - _TIE))] for k in range(table.shape[1])]

    def _greedy(self, column: int) -> Pick:
        here = self.problem.everything
        value = self.values(here)[column]
        for _ in range(STEPS):
            found = max(
                _neighbours(self.problem, here), key=lambda pick: _finite(self.values(pick)[column]), default=here
            )
            if not self.values(found)[column] > value + _TIE:
                break
            here, value = found, self.values(found)[column]
        return here

    def _report(self, winner: Pick, redrawn: list[Pick], searched: bool) -> ProblemSearch:
        problem, everything = self.problem, self.problem.everything
        chosen = problem.chosen(winner)
        again = np.array([self.test_value(pick) for pick in redrawn]) if redrawn else np.full(1, np.nan)
        counts = Counter(redrawn)
        test = self._interval(winner, self.test)
        prompts = PromptSet(tuple(label.select(*chosen[label.name]) for label in problem.labels))
        return ProblemSearch(
            name=problem.name,
            templates=chosen[problem.labels[0].name][0],
            synonyms={name: names for name, (_, names) in chosen.items()},
            prompts=prompts,
            candidates=problem.size,
            tried=len(self.known),
            searched=searched,
            validation=self._interval(winner, self.choose),
            validation_plain=self._interval(everything, self.choose),
            test=test,
            test_plain=self._interval(everything, self.test),
            difference=self._difference(winner, everything),
            optimism=self._optimism(winner),
            reselected=_percentiles(again),
            winner_share=counts[winner] / len(redrawn) if redrawn else math.nan,
            winners=len(counts),
            option_share=self._shares(redrawn),
            singles=self._singles(),
            majority=majority_of(self.metric, self.truth[self.test]),
        )

    def _interval(self, pick: Pick, rows: Rows) -> Interval:
        statistic = statistic_of(self.metric, self.truth[rows], self.problem.answers(pick)[rows])
        chance = chance_of(self.metric, self.truth[rows])
        return weighted_interval(
            statistic, self.groups[rows], n_resamples=self.n_resamples, seed=self.seed, chance=chance
        )

    def _difference(self, winner: Pick, plain: Pick) -> PairedTest:
        truth, groups = self.truth[self.test], self.groups[self.test]
        answers = [self.problem.answers(pick)[self.test] for pick in (winner, plain)]
        if winner == plain or len(_classes(truth)) < 2:
            value = self.test_value(plain)
            difference = 0.0 if math.isfinite(value) else math.nan
            nothing = Interval(difference, difference, difference, int((~np.isnan(truth)).sum()), 0.0)
            return PairedTest(value, value, nothing, math.nan, 1.0, "permutation", "bootstrap", len(set(groups)))
        options: dict[str, Any] = {"n_resamples": self.n_resamples, "seed": self.seed}
        if self.metric == "auroc":
            return compare_auroc(truth, answers[0], answers[1], list(groups), **options)
        known = np.flatnonzero(~np.isnan(truth))
        if self.metric == "auprc":
            parts = truth[known], answers[0][known], answers[1][known]
            return compare_metric(auprc_statistic, *parts, list(groups[known]), ranks=True, **options)
        return compare_metric(
            lambda t, a: statistic_of(self.metric, np.asarray(t, dtype=float), np.asarray(a, dtype=float)),
            truth[known],
            answers[0][known],
            answers[1][known],
            list(groups[known]),
            **options,
        )

    def _optimism(self, winner: Pick) -> Interval:
        """Return validation less test score of the winner; the patients of each side are drawn on their own."""
        sides = []
        for rows, seed in ((self.choose, self.seed), (self.test, self.seed + 1)):
            statistic = statistic_of(self.metric, self.truth[rows], self.problem.answers(winner)[rows])
            clusters = Clusters(self.groups[rows])
            draws = [statistic(w) for w in clusters.weights(self.n_resamples, seed)]
            sides.append((float(statistic(np.ones((1, len(rows))))[0]), np.concatenate(draws)))
        draws_of_both = sides[0][1] - sides[1][1]
        known = draws_of_both[np.isfinite(draws_of_both)]
        low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (math.nan, math.nan)
        return Interval(sides[0][0] - sides[1][0], float(low), float(high), len(self.choose) + len(self.test), 0.0)

    def _shares(self, redrawn: list[Pick]) -> dict[str, float]:
        found: dict[str, float] = {}
        for number, axis in enumerate(self.problem.axes):
            if len(axis.options) < 2:
                continue
            for k, option in enumerate(axis.options):
                name = f"{axis.label}: {option}" if axis.label else option
                found[name] = float(np.mean([k in pick[number] for pick in redrawn])) if redrawn else math.nan
        return found

    def _singles(self) -> tuple[Single, ...]:
        found = []
        for number, axis in enumerate(self.problem.axes):
            for k, option in enumerate(axis.options):
                if len(axis.options) < 2:
                    continue
                pick = list(self.problem.everything)
                pick[number] = frozenset([k])
                chosen = tuple(pick)
                name = f"{axis.label}: {option}" if axis.label else option
                found.append(Single(name, axis.kind, float(self.values(chosen)[0]), self.test_value(chosen)))
        return tuple(found)


def _check_parts(images: Embeddings, choose: Rows, test: Rows) -> None:
    for name, rows in (("choose", choose), ("test", test)):
        if not len(rows):
            raise InputError(f"no row may {'choose' if name == 'choose' else 'be scored'}", hint="split by patient")
        if rows.min() < 0 or rows.max() >= len(images):
            raise InputError(f"rows of `{name}` must lie in 0 to {len(images) - 1}")
    groups = np.asarray(images.groups)
    both = set(groups[choose]) & set(groups[test])
    if both:
        raise LeakageError(
            f"{len(both)} patients are among the rows that choose prompts and among those that score them",
            hint="split with `split_patients`",
        )


def _subsets(problem: Problem) -> Iterable[Pick]:
    def of(count: int) -> list[frozenset[int]]:
        sizes = (combinations(range(count), size) for size in range(1, count + 1))
        return [frozenset(chosen) for chosen in chain.from_iterable(sizes)]

    return product(*(of(len(axis.options)) for axis in problem.axes))


def _neighbours(problem: Problem, pick: Pick) -> list[Pick]:
    found = []
    for number, axis in enumerate(problem.axes):
        for k in range(len(axis.options)):
            changed = pick[number] ^ {k}
            if changed:
                found.append((*pick[:number], frozenset(changed), *pick[number + 1 :]))
    return found


def _mean(statistics: Sequence[WeightStatistic]) -> WeightStatistic:
    """Return the mean over labels, NaN where a label is undefined left out."""

    def mean(weights: Floats) -> Floats:
        values = np.stack([np.asarray(s(weights), dtype=np.float64) for s in statistics])
        known = np.isfinite(values)
        counts = known.sum(0)
        total: Floats = np.where(known, values, 0.0).sum(0) / np.maximum(counts, 1)
        return np.where(counts > 0, total, np.nan)

    return mean


def _with_difference(found: ProblemSearch, difference: PairedTest) -> ProblemSearch:
    return replace(found, difference=difference)


def _mean_of_known(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def _classes(truth: Floats) -> set[float]:
    return set(truth[~np.isnan(truth)].tolist())


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _percentiles(values: Floats) -> tuple[float, float, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return math.nan, math.nan, math.nan
    low, middle, high = np.quantile(known, (0.05, 0.5, 0.95))
    return float(low), float(middle), float(high)
