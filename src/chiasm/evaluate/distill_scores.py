"""Answers of all arms and seeds to scores: each arm's numbers, paired differences with corrected p values, a verdict.

In: :class:`~chiasm.metrics.paired.ArmPredictions`, one an arm and seed. Out: :class:`ControlScores`, frozen.

Notable choices. ``low``, ``high`` and ``p`` are over seeds: what training again would give. Where all seeds have one test
set, ``patients`` stands beside them: seeds and patients drawn anew together, what other patients would give as well.
Where each seed has a test set of its own (synthetic data), the scatter over seeds contains that of the test samples. The
questions of the verdict are one family for Holm's correction, all other differences a second one. Balanced accuracy
decides; differences of the other numbers are for reading.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from chiasm.errors import InputError
from chiasm.evaluate.distill_verdict import FEW_GROUPS, MAIN_QUESTIONS, SPOKEN, Outcome, Verdict, verdict
from chiasm.metrics.bootstrap import WeightStatistic
from chiasm.metrics.calibration import (
    ReliabilityCurve,
    brier_statistic,
    ece_statistic,
    log_loss_statistic,
    reliability_curve,
)
from chiasm.metrics.classification import MissingClassWarning, majority_baseline
from chiasm.metrics.paired import (
    ArmPredictions,
    JointDraws,
    SeedDifference,
    correct,
    joint_draws,
    mcnemar_exact,
    mean_over_seeds,
    seed_difference,
)
from chiasm.metrics.weighted import (
    accuracy_statistic,
    balanced_accuracy_statistic,
    macro_f1_statistic,
    multiclass_auroc_statistic,
)
from chiasm.progress import Progress, SilentProgress
from chiasm.types import Interval

__all__ = [
    "COMPARISONS",
    "MAIN_QUESTIONS",
    "SPOKEN",
    "ArmNumber",
    "ArmScores",
    "ControlScores",
    "Outcome",
    "Verdict",
    "score_arms",
    "verdict",
]

STATISTICS: dict[str, Callable[[ArmPredictions], WeightStatistic]] = {
    "balanced_accuracy": lambda a: balanced_accuracy_statistic(a.truth, a.predicted),
    "auroc": lambda a: multiclass_auroc_statistic(a.truth, a.probabilities),
    "accuracy": lambda a: accuracy_statistic(a.truth, a.predicted),
    "macro_f1": lambda a: macro_f1_statistic(a.truth, a.predicted),
    "ece": lambda a: ece_statistic(a.truth, a.probabilities),
    "ece_debiased": lambda a: ece_statistic(a.truth, a.probabilities, binning="mass", debiased=True),
    "brier": lambda a: brier_statistic(a.truth, a.probabilities),
    "log_loss": lambda a: log_loss_statistic(a.truth, a.probabilities),
}
"""Name of a number -> how it follows from answers, as a function of row weights."""

LOWER_IS_BETTER = frozenset({"ece", "ece_debiased", "brier", "log_loss"})

COMPARISONS = (
    ("clip_it", "unimodal"),
    ("clip_it", "lambda0"),
    ("clip_it", "shuffled"),
    ("clip_it", "random_text"),
    ("shuffled", "lambda0"),
    ("clip_it", "unimodal_lora"),
    ("clip_it", "prompt_text"),
    ("random_text", "lambda0"),
    ("prompt_text", "lambda0"),
    ("lambda0", "unimodal"),
    ("paired", "clip_it"),
    ("label_leak", "clip_it"),
)
"""Differences that are computed where both arms were run: (more, less)."""


@dataclass(frozen=True)
class ArmNumber:
    """One number of an arm.

    Attributes:
        value: Mean over seeds; NaN where no seed has it.
        low: Lower bound of the t interval over seeds, cut at the number's range; NaN with one seed.
        high: Upper bound.
        per_seed: One value a seed, in the order of ``ArmScores.seeds``.
        patients: With patients and seeds drawn anew together; None where the seeds have different test sets.
        chance: What answers without information reach, where there is such a number.
    """

    value: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    patients: Interval | None = None
    chance: float | None = None

    @property
    def interval(self) -> Interval:
        """The number with its interval over seeds; ``n`` counts seeds."""
        return Interval(self.value, self.low, self.high, len(self.per_seed), self.chance)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, NaN as None."""
        return {
            "value": _plain(self.value),
            "low": _plain(self.low),
            "high": _plain(self.high),
            "per_seed": [_plain(v) for v in self.per_seed],
            "patients": _bounds(self.patients),
            "chance": _plain(self.chance),
        }


@dataclass(frozen=True)
class ArmScores:
    """All numbers of one arm.

    Attributes:
        name: The arm.
        seeds: Seeds it was trained with, rising.
        numbers: ``balanced_accuracy``, ``auroc``, ``accuracy``, ``macro_f1``, ``ece`` (15 bins of equal width),
            ``ece_debiased`` (equal mass), ``brier``, ``log_loss``.
        reliability: Confidence against share of right answers, all seeds together.
    """

    name: str
    seeds: tuple[int, ...]
    numbers: Mapping[str, ArmNumber]
    reliability: ReliabilityCurve


@dataclass(frozen=True)
class ControlScores:
    """What an experiment with controls has shown.

    Attributes:
        arms: Name -> scores.
        differences: Number -> ``more-less`` -> paired difference; p is corrected within each number.
        mcnemar: ``more-less`` -> exact McNemar p of each common seed; samples count as independent.
        verdict: What they say about the text.
        level: Coverage of intervals; 1 - α.
        seeds: All seeds.
        n_test: Test samples a seed (the smallest and the largest number).
        n_groups: Patients a seed, likewise.
        n_classes: Classes.
        majority: Accuracy of always giving the most frequent class of the test set, mean over seeds.
        same_test_set: Whether all seeds were tested on the same samples.
        n_resamples: Of the joint intervals.
        digests: ``test_sets`` and ``predictions``: what it was computed from.
        notes: What a reader must know.
    """

    arms: Mapping[str, ArmScores]
    differences: Mapping[str, Mapping[str, SeedDifference]]
    mcnemar: Mapping[str, tuple[float, ...]]
    verdict: Verdict
    level: float
    seeds: tuple[int, ...]
    n_test: tuple[int, int]
    n_groups: tuple[int, int]
    n_classes: int
    majority: float
    same_test_set: bool
    n_resamples: int
    digests: Mapping[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: rates and differences as fractions of 1, NaN as None."""
        differences = {
            metric: {name: self._difference(metric, name) for name in found}
            for metric, found in self.differences.items()
        }
        return {
            "arms": {
                name: {
                    **{metric: number.to_dict() for metric, number in arm.numbers.items()},
                    "seeds": list(arm.seeds),
                    "n_seeds": len(arm.seeds),
                }
                for name, arm in self.arms.items()
            },
            "differences": differences.pop("balanced_accuracy"),
            "differences_of_other_numbers": differences,
            "verdict": self.verdict.sentence,
            "outcome": self.verdict.outcome,
            "headline": self.verdict.headline,
            "metric": "balanced_accuracy",
            "level": self.level,
            "seeds": list(self.seeds),
            "n_seeds": len(self.seeds),
            "n_test": list(self.n_test),
            "n_groups": list(self.n_groups),
            "n_classes": self.n_classes,
            "chance": _plain(self.chance),
            "majority_accuracy": _plain(self.majority),
            "same_test_set": self.same_test_set,
            "n_resamples": self.n_resamples,
            "computed_from": dict(self.digests),
            "notes": list(self.notes),
        }

    @property
    def chance(self) -> float:
        """Balanced accuracy of answers without information."""
        chance = next(iter(self.arms.values())).numbers["balanced_accuracy"].chance
        return math.nan if chance is None else chance

    def table(self) -> list[tuple[str, ...]]:
        """Return rows of text for print: arm, balanced accuracy, AUROC, ECE, log loss, seeds."""
        return [
            (
                name,
                *(str(arm.numbers[m].interval) for m in ("balanced_accuracy", "auroc", "ece", "log_loss")),
                str(len(arm.seeds)),
            )
            for name, arm in self.arms.items()
        ]

    def _difference(self, metric: str, name: str) -> dict[str, Any]:
        found = self.differences[metric][name]
        values: dict[str, Any] = {
            "value": _plain(found.value),
            "low": _plain(found.low),
            "high": _plain(found.high),
            "p": _plain(found.p),
            "p_raw": _plain(found.p_raw),
            "p_wilcoxon": _plain(found.p_wilcoxon),
            "smallest_p_wilcoxon": _plain(found.smallest_p_wilcoxon),
            "std": _plain(found.std),
            "n_seeds": len(found.seeds),
            "seeds": list(found.seeds),
            "per_seed": [_plain(v) for v in found.per_seed],
            "left_out": list(found.left_out),
            "patients": _bounds(found.patients),
            "family": "verdict" if name in MAIN_QUESTIONS else "other",
        }
        if metric == "balanced_accuracy":
            values["p_mcnemar"] = [_plain(p) for p in self.mcnemar[name]]
        return values


def score_arms(
    predictions: Sequence[ArmPredictions],
    *,
    level: float = 0.95,
    comparisons: Sequence[tuple[str, str]] = COMPARISONS,
    n_resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> ControlScores:
    """Score all arms and compare them.

    Args:
        predictions: One an arm and seed, in any order; arms keep the order of their first appearance. An arm may lack
            seeds: pairs are made of common ones.
        level: Coverage of intervals; the verdict asks for p below 1 - ``level``.
        comparisons: Pairs (more, less) of arms; those with an absent arm are skipped.
        n_resamples: Of the joint intervals.
        seed: Of the resampling.
        progress: Told of each number that is resampled: seconds for thousands of test samples, minutes for tens of
            thousands.

    Returns:
        Scores, differences and verdict.

    Raises:
        InputError: When there is nothing to score, an arm has a seed twice, the numbers of classes differ, or two arms
            of one seed were tested on different samples.

    Warns:
        MissingClassWarning: When a class has no test sample: the AUROC is NaN then.
    """
    by_arm = _arranged(predictions)
    seeds = tuple(sorted({s for found in by_arm.values() for s in found}))
    tests = {s: next(found[s] for found in by_arm.values() if s in found) for s in seeds}
    same = len({t.test_digest for t in tests.values()}) == 1
    statistics = {
        metric: {arm: {s: make(found[s]) for s in found} for arm, found in by_arm.items()}
        for metric, make in STATISTICS.items()
    }
    values = {
        metric: {arm: {s: _of_all(f, by_arm[arm][s].n) for s, f in found.items()} for arm, found in arms.items()}
        for metric, arms in statistics.items()
    }
    draws: dict[str, JointDraws] = {}
    if same:
        groups = tests[seeds[0]].groups
        progress = progress or SilentProgress()
        progress.start(len(STATISTICS), "resampling patients and seeds")
        for metric, arms in statistics.items():
            rows = [[found.get(s) for s in seeds] for found in arms.values()]
            draws[metric] = joint_draws(rows, groups, n_resamples=n_resamples, seed=seed, level=level)
            progress.advance()
        progress.finish()
    names = list(by_arm)
    chances = _chances(list(tests.values()))
    scored = {
        arm: _arm_scores(arm, by_arm[arm], values, chances, draws, names.index(arm), level=level, pooled=same)
        for arm in names
    }
    differences = {
        metric: _differences(values[metric], comparisons, draws.get(metric), level=level) for metric in STATISTICS
    }
    balanced = {arm: found.numbers["balanced_accuracy"].value for arm, found in scored.items()}
    sizes = [t.n for t in tests.values()]
    patients = [len(set(t.groups)) for t in tests.values()]
    return ControlScores(
        arms=scored,
        differences=differences,
        mcnemar=_mcnemar(by_arm, comparisons),
        verdict=verdict(differences["balanced_accuracy"], values=balanced, level=level),
        level=level,
        seeds=seeds,
        n_test=(min(sizes), max(sizes)),
        n_groups=(min(patients), max(patients)),
        n_classes=predictions[0].n_classes,
        majority=float(np.mean([majority_baseline(t.truth) for t in tests.values()])),
        same_test_set=same,
        n_resamples=n_resamples if same else 0,
        digests=_digests(tests, by_arm),
        notes=_notes(by_arm, tests, same=same),
    )


def _arranged(predictions: Sequence[ArmPredictions]) -> dict[str, dict[int, ArmPredictions]]:
    """Return arm -> seed -> answers, after checking that they can be compared."""
    if not predictions:
        raise InputError("there are no predictions to score")
    by_arm: dict[str, dict[int, ArmPredictions]] = {}
    first: dict[int, ArmPredictions] = {}
    for given in predictions:
        found = by_arm.setdefault(given.arm, {})
        if given.seed in found:
            raise InputError(f"arm `{given.arm}` has two sets of predictions with seed {given.seed}")
        if given.n_classes != predictions[0].n_classes:
            raise InputError(f"arm `{given.arm}` has {given.n_classes} classes, arm `{predictions[0].arm}` has "
                             f"{predictions[0].n_classes}")  # fmt: skip
        other = first.setdefault(given.seed, given)
        if given.test_digest != other.test_digest:
            raise InputError(
                f"arms `{other.arm}` and `{given.arm}` were tested on different samples with seed {given.seed}",
                hint="a paired difference needs the same test samples, in the same order",
            )
        found[given.seed] = given
    return {arm: dict(sorted(found.items())) for arm, found in by_arm.items()}


def _of_all(statistic: WeightStatistic, n: int) -> float:
    return float(statistic(np.ones((1, n)))[0])


def _chances(tests: Sequence[ArmPredictions]) -> dict[str, float]:
    """Return what answers without information reach: guesses, or the shares of the classes as probabilities."""
    found: dict[str, list[float]] = {}
    for test in tests:
        counts = np.bincount(test.truth, minlength=test.n_classes)
        shares = counts[counts > 0] / counts.sum()
        half = 2 if test.n_classes == 2 else 1
        for name, value in (
            ("balanced_accuracy", 1 / len(shares)),
            ("accuracy", 1 / len(shares)),
            ("auroc", 0.5),
            ("brier", (1 - float((shares**2).sum())) / half),
            ("log_loss", -float((shares * np.log(shares)).sum())),
        ):
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _arm_scores(
    arm: str,
    found: Mapping[int, ArmPredictions],
    values: Mapping[str, Mapping[str, Mapping[int, float]]],
    chances: Mapping[str, float],
    draws: Mapping[str, JointDraws],
    index: int,
    *,
    level: float,
    pooled: bool,
) -> ArmScores:
    numbers = {}
    answers = list(found.values())
    tops = {"log_loss": math.inf, "brier": 1.0 if answers[0].n_classes == 2 else 2.0}
    for metric in STATISTICS:
        per_seed = tuple(values[metric][arm][s] for s in found)
        mean = mean_over_seeds(per_seed, level=level)
        numbers[metric] = ArmNumber(
            mean.value,
            max(mean.low, 0.0) if math.isfinite(mean.low) else math.nan,
            min(mean.high, tops.get(metric, 1.0)) if math.isfinite(mean.high) else math.nan,
            per_seed,
            draws[metric].interval(mean.value, index) if metric in draws else None,
            chances.get(metric),
        )
    curve = reliability_curve(
        np.concatenate([a.truth for a in answers]),
        np.concatenate([a.probabilities for a in answers]),
        groups=[g if pooled else f"{a.seed}/{g}" for a in answers for g in a.groups],
        n_resamples=200,
        level=level,
    )
    return ArmScores(arm, tuple(found), numbers, curve)


def _differences(
    values: Mapping[str, Mapping[int, float]],
    comparisons: Sequence[tuple[str, str]],
    draws: JointDraws | None,
    *,
    level: float,
) -> dict[str, SeedDifference]:
    names = list(values)
    found = {}
    for more, less in comparisons:
        if more in values and less in values:
            made = seed_difference(values[more], values[less], level=level)
            joint = draws.interval(made.value, names.index(more), names.index(less)) if draws else None
            found[f"{more}-{less}"] = replace(made, patients=joint)
    return correct(found, [MAIN_QUESTIONS])


def _mcnemar(
    by_arm: Mapping[str, Mapping[int, ArmPredictions]], comparisons: Sequence[tuple[str, str]]
) -> dict[str, tuple[float, ...]]:
    found = {}
    for more, less in comparisons:
        if more in by_arm and less in by_arm:
            pairs = [(by_arm[more][s], by_arm[less][s]) for s in by_arm[more] if s in by_arm[less]]
            found[f"{more}-{less}"] = tuple(
                mcnemar_exact(a.predicted == a.truth, b.predicted == b.truth).p for a, b in pairs
            )
    return found


def _digests(tests: Mapping[int, ArmPredictions], by_arm: Mapping[str, Mapping[int, ArmPredictions]]) -> dict[str, str]:
    def together(parts: Sequence[str]) -> str:
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    return {
        "test_sets": together(list(dict.fromkeys(t.test_digest for t in tests.values()))),
        "predictions": together(sorted(f"{arm} {s} {a.digest}" for arm, f in by_arm.items() for s, a in f.items())),
    }


def _notes(
    by_arm: Mapping[str, Mapping[int, ArmPredictions]], tests: Mapping[int, ArmPredictions], *, same: bool
) -> tuple[str, ...]:
    notes = []
    every = set(tests)
    for arm, found in by_arm.items():
        if every - set(found):
            notes.append(f"{arm}: {len(found)} of {len(every)} seeds; pairs are made of common seeds only")
    if every and len(every) > 1:
        still = [
            arm for arm, found in by_arm.items() if same and len({a.digest for a in found.values()}) == 1 < len(found)
        ]
        if still:
            notes.append(f"the seed changes nothing in {', '.join(still)}")
    missing = max(t.n_classes - len(np.unique(t.truth)) for t in tests.values())
    if missing:
        text = f"{missing} of {next(iter(tests.values())).n_classes} classes have no test sample: no AUROC"
        warnings.warn(text, MissingClassWarning, stacklevel=3)
        notes.append(text)
    few = min(len(set(t.groups)) for t in tests.values())
    if same and few < FEW_GROUPS:
        notes.append(f"only {few} patients in the test set: intervals over patients are rough" if few > 1 else
                     "one patient in the test set: nothing can be said about others")  # fmt: skip
    if not same:
        notes.append("each seed has a test set of its own: intervals over seeds contain the choice of test samples")
    return tuple(notes)


def _plain(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _bounds(interval: Interval | None) -> dict[str, float | None] | None:
    return None if interval is None else {"low": _plain(interval.low), "high": _plain(interval.high)}
