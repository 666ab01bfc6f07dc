"""Whether one model of a suite beats another on the same rows, and whether a group of patients fares differently.

In: results of tasks. Out: paired tests (DeLong for AUROC, swaps of the models for anything else) with p corrected by Holm
in stated families, and subgroup tables with the difference to the rest. Tables of subgroups describe; they say nothing
of a cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.evaluate.suite.results import MEASURES, TaskResult, interval_of, number_of
from chiasm.metrics.bootstrap import WeightStatistic, holm, paired_difference, weighted_interval
from chiasm.metrics.compare import PairedTest, compare_auroc, compare_metric
from chiasm.metrics.paired import correct
from chiasm.types import Interval


@dataclass(frozen=True)
class ModelTest:
    """Two models in one task on one data set.

    Attributes:
        data: Key of the data set.
        task: Key of the task.
        finding: Name of the finding; empty: the number that models are compared by.
        first: Key of the first model.
        second: Key of the second.
        test: Difference with interval, ``p`` corrected within ``family``.
        family: In words: which tests were corrected together.
    """

    data: str
    task: str
    finding: str
    first: str
    second: str
    test: PairedTest
    family: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        named = {k: getattr(self, k) for k in ("data", "task", "finding", "first", "second", "family")}
        found = self.test.to_dict()
        return {**named, "first_value": found.pop("first"), "second_value": found.pop("second"), **found}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelTest:
        """Rebuild from :meth:`to_dict`."""
        v = values
        first, second, p, p_raw = (number_of(v[k]) for k in ("first_value", "second_value", "p", "p_raw"))
        difference = interval_of(v["difference"])
        test = PairedTest(first, second, difference, p, p_raw, v["test"], v["interval"], int(v["patients"]))
        return cls(v["data"], v["task"], v["finding"], v["first"], v["second"], test, v["family"])


@dataclass(frozen=True)
class GroupScore:
    """One group of patients in one cell.

    Attributes:
        column: What the groups are made by.
        group: Its name.
        n: Rows; None where the group is too small.
        patients: Patients; None where the group is too small.
        value: The number that models are compared by, within the group; None where it is too small.
        difference: Group less rest with its interval; None where either is too small.
        p_raw: Two-sided p value of "no difference" (bootstrap of patients).
        p: Corrected by Holm over all groups of the cell.
        findings: How many labels the number is a mean over: those with enough patients, in the rest too where there
            is a difference.
        suppressed: Why there is no number; empty: there is one.
    """

    column: str
    group: str
    n: int | None
    patients: int | None
    value: Interval | None
    difference: Interval | None
    p_raw: float
    p: float
    findings: int = 0
    suppressed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""

        def plain(x: float) -> float | None:
            return float(x) if math.isfinite(x) else None

        return {
            "column": self.column,
            "group": self.group,
            "n": self.n,
            "patients": self.patients,
            "value": None if self.value is None else self.value.to_dict(),
            "difference": None if self.difference is None else self.difference.to_dict(),
            "p_raw": plain(self.p_raw),
            "p": plain(self.p),
            "findings": self.findings,
            "suppressed": self.suppressed,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GroupScore:
        """Rebuild from :meth:`to_dict`."""
        value, difference = (None if values[k] is None else interval_of(values[k]) for k in ("value", "difference"))
        p = {k: number_of(values[k]) for k in ("p_raw", "p")}
        return cls(**{**values, "value": value, "difference": difference, **p})


def compare_models(
    data: str,
    task: str,
    results: Mapping[str, TaskResult],
    groups: Sequence[str],
    *,
    n_permutations: int,
    seed: int,
) -> tuple[ModelTest, ...]:
    """Compare every pair of models in one task on one data set.

    Args:
        data: Key of the data set.
        task: Key of the task.
        results: Model -> result.
        groups: Patient of each row of the data set.
        n_permutations: Where the test is not DeLong's.
        seed: Of permutations and resamples.

    Returns:
        For each pair the number that models are compared by (one family: all pairs), then every finding (one family: all
        findings of all pairs). Rows that one model lacks are left out for both.
    """
    options: dict[str, Any] = {"n_resamples": n_permutations, "seed": seed}
    main: dict[str, PairedTest] = {}
    single: dict[str, PairedTest] = {}
    names: dict[str, tuple[str, str, str]] = {}
    for first, second in combinations(results, 2):
        one, other = results[first], results[second]
        if one.measure != other.measure:
            raise InputError(f"results of `{first}` and `{second}` are of different kinds")
        a, b = _common(one.rows, other.rows)
        patients = [groups[r] for r in one.rows[a]]
        if not patients:
            continue
        key = f"{first}\0{second}"
        names[key] = ("", first, second)
        main[key] = _compare(one, one.truth[a], one.answers[a], other.answers[b], patients, options)
        for k, finding in enumerate(one.findings if len(one.findings) > 1 else ()):
            names[f"{key}\0{finding}"] = (finding, first, second)
            part = (one.truth[a][:, [k]], one.answers[a][:, [k]], other.answers[b][:, [k]])
            single[f"{key}\0{finding}"] = _compare(one, *part, patients, options)
    found: list[ModelTest] = []
    pairs = len(main)
    for tests, family in (
        (correct(main), f"{pairs} pairs of models"),
        (correct(single), f"{len(single)} tests: each finding of {pairs} pairs of models"),
    ):
        found += [ModelTest(data, task, *names[key], test, family) for key, test in tests.items()]
    return tuple(found)


def best_model(tests: Sequence[ModelTest], models: Sequence[str], *, alpha: float, lower: bool = False) -> str | None:
    """Return the model that is better than every other one by corrected tests, or None.

    Args:
        tests: Of one task on one data set.
        models: All models with a result there.
        alpha: Bound on the corrected p value.
        lower: Whether less is better.
    """
    wins: dict[str, set[str]] = {m: set() for m in models}
    for t in tests:
        if t.finding or not t.test.p < alpha or not math.isfinite(t.test.difference.value):
            continue
        first_wins = (t.test.difference.value < 0) == lower
        winner, loser = (t.first, t.second) if first_wins else (t.second, t.first)
        wins[winner].add(loser)
    return next((m for m in models if len(models) > 1 and wins[m] == set(models) - {m}), None)


def compare_groups(
    result: TaskResult,
    column: str,
    of_row: Sequence[str | None],
    groups: Sequence[str],
    *,
    smallest: int,
    n_resamples: int,
    seed: int,
) -> tuple[GroupScore, ...]:
    """Score one cell within each group of a column, and against the rest.

    Args:
        result: The cell.
        column: Name of the column.
        of_row: Group of each row of the data set; None: unknown, and left out of "the rest" too.
        groups: Patient of each row of the data set.
        smallest: A group needs this many patients, and a quarter as many with and without some finding.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        One row a group, the largest first; ``p`` is still to be corrected (:func:`correct_groups`).
    """
    names = [of_row[r] for r in result.rows]
    known = np.flatnonzero([n is not None for n in names])
    patients = [groups[result.rows[k]] for k in known]
    if not patients:
        return ()
    member = np.asarray([names[k] for k in known], dtype=object)
    truth, answers = result.truth[known], result.answers[known]
    counts = {g: int((member == g).sum()) for g in dict.fromkeys(member)}
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    make = MEASURES[result.measure].make
    found = []
    for group in sorted(counts, key=lambda g: (-counts[g], g)):
        inside = member == group
        own, rest = (_usable(side, truth, patients, result, smallest) for side in (inside, ~inside))
        if isinstance(own, str):
            found.append(GroupScore(column, group, None, None, None, None, math.nan, math.nan, suppressed=own))
            continue
        both = [k for k in own if not isinstance(rest, str) and k in rest]
        used = both or own
        of_labels = result.measure == "auroc"  # the only measure that is a mean over labels
        wanted, given = (truth[:, used], answers[:, used]) if of_labels else (truth, answers)
        statistic = make(wanted, given)
        within = _restricted(statistic, inside)
        kept = [patients[i] for i in np.flatnonzero(inside)]
        value = weighted_interval(make(wanted[inside], given[inside]), kept, chance=result.main.value.chance, **options)
        difference, p = None, math.nan
        if both:
            test = paired_difference(within, _restricted(statistic, ~inside), patients, **options)
            difference, p = replace(test.difference, n=int(inside.sum())), test.p_value
        patients_inside = len(set(kept))
        found.append(
            GroupScore(column, group, counts[group], patients_inside, value, difference, p, math.nan, len(used))
        )
    return tuple(found)


def correct_groups(rows: Sequence[GroupScore]) -> tuple[GroupScore, ...]:
    """Return the rows with p corrected by Holm over all groups; of a column of two groups one test counts."""
    once: dict[tuple[str, float], int] = {}
    of_row: list[tuple[str, float]] = []
    per_column = {c: sum(r.column == c for r in rows) for c in {r.column for r in rows}}
    for i, row in enumerate(rows):
        two = per_column[row.column] == 2 and math.isfinite(row.p_raw)
        key = (row.column, -1.0 if two else float(i))
        once.setdefault(key, i)
        of_row.append(key)
    order = list(once)
    adjusted = dict(zip(order, holm([rows[once[k]].p_raw for k in order]).tolist(), strict=True)) if order else {}
    return tuple(
        replace(row, p=adjusted[key] if math.isfinite(row.p_raw) else math.nan)
        for row, key in zip(rows, of_row, strict=True)
    )


def _compare(
    result: TaskResult, truth: Any, first: Any, second: Any, patients: Sequence[str], options: dict[str, Any]
) -> PairedTest:
    if result.measure == "auroc" and first.shape[1:] == (1,) == second.shape[1:]:
        return compare_auroc(truth[:, 0], first[:, 0], second[:, 0], patients, **options)
    kind = MEASURES[result.measure]
    return compare_metric(kind.make, truth, first, second, patients, ranks=kind.ranks, **options)


def _common(first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the places of the rows that both have."""
    if np.array_equal(first, second):
        return np.arange(len(first)), np.arange(len(first))
    _, a, b = np.intersect1d(first, second, return_indices=True)
    return a, b


def _restricted(statistic: WeightStatistic, inside: NDArray[np.bool_]) -> WeightStatistic:
    mask = inside.astype(np.float64)
    return lambda weights: statistic(weights * mask)


def _usable(
    inside: NDArray[np.bool_], truth: NDArray[Any], patients: Sequence[str], result: TaskResult, smallest: int
) -> list[int] | str:
    """Return the labels that a group can be scored on, or why there is none, without saying how small it is."""
    if len({patients[i] for i in np.flatnonzero(inside).tolist()}) < smallest:
        return f"fewer than {smallest} patients"
    least = max(1, smallest // 4)
    if result.measure == "cindex":
        events = len({patients[i] for i in np.flatnonzero(inside & (truth[:, 1] == 1)).tolist()})
        return [0] if events >= least else f"fewer than {least} events"
    if result.measure != "auroc":
        return [0]
    found = []
    for k in range(truth.shape[1]):
        sides = [len({patients[i] for i in np.flatnonzero(inside & (truth[:, k] == side)).tolist()}) for side in (0, 1)]
        if min(sides) >= least:
            found.append(k)
    return found or f"no finding with {least} patients on both sides"
