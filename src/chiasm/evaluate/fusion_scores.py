"""Out-of-fold probabilities of fused modalities to scores, with what each modality alone gives and a test of the gain.

Comes in: :class:`~chiasm.tasks.fusion.FusionRun`. Goes out: AUROC, balanced accuracy and log loss of every arm with
95 % intervals over patients, and fusion against each modality alone, corrected by Holm over all of these comparisons.

A row's class is the one whose probability is highest beside its share in training, so the majority baseline's balanced
accuracy is chance. Patients are resampled; the folds are not drawn again, so the intervals speak of these models'
predictions on other patients, not of other training sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from chiasm.metrics.bootstrap import weighted_interval
from chiasm.metrics.calibration import log_loss_statistic
from chiasm.metrics.classification import majority_baseline
from chiasm.metrics.compare import PairedTest, compare_auroc, compare_metric
from chiasm.metrics.paired import correct
from chiasm.metrics.weighted import balanced_accuracy_statistic, multiclass_auroc_statistic
from chiasm.tasks.fusion import FusionRun
from chiasm.tasks.modalities import Matrix
from chiasm.types import Interval

#: Log loss of a guesser is that of the class shares; AUROC's chance is one half.
CHANCE_AUROC = 0.5


@dataclass(frozen=True)
class ArmScores:
    """How good one arm is on all rows.

    Attributes:
        auroc: Of class 1, or the mean over classes against the rest.
        balanced_accuracy: Mean recall over classes.
        log_loss: Mean of minus the log probability of the true class; ``chance`` is that of the training shares.
    """

    auroc: Interval
    balanced_accuracy: Interval
    log_loss: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {k: getattr(self, k).to_dict() for k in ("auroc", "balanced_accuracy", "log_loss")}


@dataclass(frozen=True)
class FusionScores:
    """Every arm, every comparison, and what is left when a modality is not taken.

    Attributes:
        classes: Their names.
        counts: Class -> rows.
        patients: Number of patients.
        arms: Arm -> scores.
        differences: ``late fusion-image`` -> AUROC of the first less the second, p corrected by Holm over all.
        without: Modality -> fusion -> AUROC when that modality is missing from every row at prediction.
        majority_accuracy: Accuracy of always naming the most frequent class.
        weights: Modality -> mean weight in late fusion.
        present: Modality -> share of rows that have it.
        verdict: One sentence by a rule fixed beforehand: did fusion beat every modality alone?
    """

    classes: tuple[str, ...]
    counts: Mapping[str, int]
    patients: int
    arms: Mapping[str, ArmScores]
    differences: Mapping[str, PairedTest]
    without: Mapping[str, Mapping[str, Interval]]
    majority_accuracy: float
    weights: Mapping[str, float]
    present: Mapping[str, float]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "classes": list(self.classes),
            "rows": dict(self.counts),
            "patients": self.patients,
            "present": dict(self.present),
            "arms": {a: s.to_dict() for a, s in self.arms.items()},
            "majority_accuracy": self.majority_accuracy,
            "differences": {n: d.to_dict() for n, d in self.differences.items()},
            "without": {m: {a: i.to_dict() for a, i in found.items()} for m, found in self.without.items()},
            "late_fusion_weights": dict(self.weights),
            "verdict": self.verdict,
        }


def score_fusion(run: FusionRun, *, n_resamples: int = 1000, seed: int = 0) -> FusionScores:
    """Score all arms of a run and compare fusion with each modality alone.

    Args:
        run: From :func:`chiasm.tasks.fusion.compare_fusion`.
        n_resamples: Of the bootstrap and of permutations.
        seed: Of both.
    """
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    arms = {name: _score_arm(run, found, options) for name, found in run.probabilities.items()}
    fused = [a for a in arms if a.endswith("fusion")]
    alone = [a for a in arms if a not in fused]
    differences = correct({f"{f}-{m}": _compare(run, f, m, options) for f in fused for m in alone})
    without = {m: {a: _auroc(run, found, options) for a, found in by_arm.items()} for m, by_arm in run.dropped.items()}
    counts = {name: int((run.truth == k).sum()) for k, name in enumerate(run.classes)}
    return FusionScores(
        classes=run.classes,
        counts=counts,
        patients=len(set(run.groups)),
        arms=arms,
        differences=differences,
        without=without,
        majority_accuracy=majority_baseline(run.truth),
        weights=run.weights,
        present=run.present,
        verdict=_verdict(differences, fused, alone),
    )


def _score_arm(run: FusionRun, found: Matrix, options: Mapping[str, Any]) -> ArmScores:
    decided = np.argmax(found / run.priors, axis=1)
    accuracy = balanced_accuracy_statistic(run.truth, decided)
    guess = float(log_loss_statistic(run.truth, run.priors)(np.ones((1, len(found))))[0])
    loss = log_loss_statistic(run.truth, found)
    return ArmScores(
        auroc=_auroc(run, found, options),
        balanced_accuracy=weighted_interval(accuracy, run.groups, chance=1 / len(run.classes), **options),
        log_loss=weighted_interval(loss, run.groups, chance=guess, **options),
    )


def _auroc(run: FusionRun, found: Matrix, options: Mapping[str, Any]) -> Interval:
    statistic = multiclass_auroc_statistic(run.truth, found)
    return weighted_interval(statistic, run.groups, chance=CHANCE_AUROC, **options)


def _compare(run: FusionRun, first: str, second: str, options: Mapping[str, Any]) -> PairedTest:
    one, other = run.probabilities[first], run.probabilities[second]
    if len(run.classes) == 2:
        return compare_auroc(run.truth, one[:, 1], other[:, 1], run.groups, **options)
    return compare_metric(multiclass_auroc_statistic, run.truth, one, other, run.groups, **options)


def _verdict(differences: Mapping[str, PairedTest], fused: list[str], alone: list[str]) -> str:
    """Return the sentence: a gain is claimed only over every modality alone, each at a corrected p under 0.05."""
    if not fused:
        return "Only one modality was given, so nothing was fused."
    won = [f for f in fused if all(_is_gain(differences[f"{f}-{m}"]) for m in alone)]
    if won:
        return f"{' and '.join(won).capitalize()} beat every modality alone."
    best = [m for m in alone if not any(_is_gain(differences[f"{f}-{m}"]) for f in fused)]
    if not best:
        return "No single fusion beat every modality alone."
    return f"No gain over {' or '.join(best)} alone was shown."


def _is_gain(test: PairedTest) -> bool:
    return bool(test.difference.value > 0 and test.p < 0.05)
