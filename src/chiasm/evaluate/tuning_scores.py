"""Learned prompts beside the words that they started from and beside the plain ensemble, on patients that taught nothing.

In: classifiers of one encoder, images with a truth. Out: :class:`TuningScores`: every score with its interval over
patients, chance and majority, and paired differences with p by Holm over the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.encoders.face import Encoder
from chiasm.errors import InputError, LeakageError
from chiasm.metrics.bootstrap import WeightStatistic, paired_difference, weighted_interval
from chiasm.metrics.classification import majority_baseline
from chiasm.metrics.compare import PairedTest, compare_findings, compare_metric
from chiasm.metrics.labels import as_binary, is_missing
from chiasm.metrics.weighted import auroc_statistic, balanced_accuracy_statistic, macro_auroc_statistic
from chiasm.tasks.k_shot import Draws, Episode, Method
from chiasm.tasks.zero_shot import Mode, TextClassifier, classifier_of_directions, classify
from chiasm.train.prompt_tuning import TunedPrompts, tune_prompts
from chiasm.train.prompt_writer import TuningConfig
from chiasm.types import Embeddings, Interval, LabelValue

Rows = NDArray[np.intp]
Truth = Mapping[str, Sequence[LabelValue]] | Sequence[str | None]


@dataclass(frozen=True)
class Arm:
    """One classifier's scores.

    Attributes:
        name: ``learned``, ``plain`` ...
        whole: Macro AUROC (``multi``) or balanced accuracy (``single``).
        per_label: Label -> AUROC (``multi``); empty in ``single``.
    """

    name: str
    whole: Interval
    per_label: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"whole": self.whole.to_dict(), "per_label": {n: i.to_dict() for n, i in self.per_label.items()}}


@dataclass(frozen=True)
class TuningScores:
    """Learned prompts and what they are compared with.

    Attributes:
        mode: ``multi`` or ``single``.
        metric: Name of the number ``whole``.
        arms: The learned prompts first.
        differences: Other arm -> learned less it, on ``whole``.
        p_values: Other arm -> p of no difference.
        findings: Other arm -> label -> paired test; empty in ``single``.
        majority: Accuracy of the most frequent class (``single``), else None.
        rows: Test rows.
        patients: Test patients.
    """

    mode: Mode
    metric: str
    arms: tuple[Arm, ...]
    differences: Mapping[str, Interval]
    p_values: Mapping[str, float]
    findings: Mapping[str, Mapping[str, PairedTest]]
    majority: float | None
    rows: int
    patients: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "mode": self.mode,
            "metric": self.metric,
            "rows": self.rows,
            "patients": self.patients,
            "majority": self.majority,
            "arms": {arm.name: arm.to_dict() for arm in self.arms},
            "differences": {n: i.to_dict() | {"p": self.p_values[n]} for n, i in self.differences.items()},
            "findings": {n: {f: t.to_dict() for f, t in tests.items()} for n, tests in self.findings.items()},
        }


def tuned_classifier(tuned: TunedPrompts) -> TextClassifier:
    """Return learned prompts as the classifier that every task takes."""
    return classifier_of_directions(
        tuned.labels,
        tuned.positive,
        tuned.negative,
        space=tuned.space,
        logit_scale=tuned.logit_scale,
        logit_bias=tuned.logit_bias,
    )


def coop_method(
    encoder: Encoder,
    images: Embeddings,
    draws: Draws,
    *,
    spoken: Sequence[str] | None = None,
    config: TuningConfig | None = None,
) -> Method:
    """Return learned prompts as a method of the k-shot protocol; the episode's validation rows choose the epoch.

    Args:
        encoder: Of the images.
        images: All rows, in the order of the draws.
        draws: From :func:`chiasm.tasks.k_shot.draw_episodes`.
        spoken: What stands in the prompt for each class; by default the classes' names.
        config: Settings of mode ``single``; the seed is the episode's.

    Raises:
        InputError: Another mode, or a number of names that does not fit.
    """
    base = config or TuningConfig()
    labels = [f"{i:04d}" for i in range(len(draws.classes))]  # classes may be numbers
    words = [str(c).replace("_", " ") for c in draws.classes] if spoken is None else list(spoken)
    if base.mode != "single" or len(words) != len(labels):
        raise InputError(f"got {len(words)} names for {len(labels)} classes that exclude each other")

    def method(episode: Episode) -> tuple[NDArray[np.float64], Mapping[str, Any]]:
        rows = np.concatenate([episode.train, episode.validation])
        tuned = tune_prompts(
            encoder,
            images.select(rows),
            dict(zip(labels, words, strict=True)),
            [labels[t] for t in draws.truth[rows]],
            config=replace(base, seed=episode.seed),
            groups=[episode.patients[i] for i in rows],
            held=range(len(episode.train), len(rows)),
        )
        answer = classify(images.select(episode.test), tuned_classifier(tuned))
        return answer.probabilities, {"epoch": tuned.best_epoch}

    return method


def take_shots(truth: Truth, groups: Sequence[str], rows: Sequence[int] | Rows, shots: int, *, seed: int = 0) -> Rows:
    """Return rows of which every class has at least ``shots``, one row a patient, drawn in a random order.

    In ``multi`` (a mapping) the classes are presence and absence of every label; a drawn row counts for all of them, so
    frequent ones get more.

    Raises:
        InputError: A class has fewer patients.
    """
    if shots < 1:
        raise InputError(f"the number of shots must be at least 1, got {shots}")
    classes: list[set[tuple[str, str]]]
    if isinstance(truth, Mapping):
        columns = {n: as_binary(list(v)) for n, v in truth.items()}
        classes = [{(n, str(int(c[k]))) for n, c in columns.items() if not np.isnan(c[k])} for k in range(len(groups))]
    else:
        classes = [set() if is_missing(v) else {("", str(v))} for v in truth]
    order = np.random.default_rng(seed).permutation(np.asarray(rows, dtype=np.intp))
    lacking = {c: shots for k in order for c in classes[k]}
    seen: set[str] = set()
    taken = []
    for k in order:
        useful = [c for c in classes[k] if lacking[c] > 0]
        if useful and groups[k] not in seen:
            seen.add(groups[k])
            taken.append(k)
            for c in classes[k]:
                lacking[c] -= 1
    short = [c for c, n in lacking.items() if n > 0]
    if short:
        raise InputError(f"{len(short)} classes have fewer than {shots} patients", hint="ask for fewer shots")
    return np.sort(np.asarray(taken, dtype=np.intp))


def score_tuning(
    images: Embeddings,
    classifiers: Mapping[str, TextClassifier],
    truth: Truth,
    *,
    train: Sequence[int] | Rows,
    test: Sequence[int] | Rows,
    n_resamples: int = 1000,
    seed: int = 0,
) -> TuningScores:
    """Score classifiers on the same test rows; the first is compared with each of the others.

    Args:
        images: Embeddings of all rows.
        classifiers: Name -> classifier, the learned one first.
        truth: Label -> 0, 1, None a row (``multi``), or the class of each row (``single``).
        train: Rows that taught; no patient of them may be scored.
        test: Rows that score.
        n_resamples: Of the intervals.
        seed: Of the intervals.

    Raises:
        LeakageError: A patient taught and is scored.
        InputError: Nothing is labelled.
    """
    test = np.asarray(test, dtype=np.intp)
    groups = np.asarray(images.groups)
    both = set(groups[np.asarray(train, dtype=np.intp)]) & set(groups[test])
    if both:
        raise LeakageError(f"{len(both)} patients taught the prompts and are scored", hint="split by patient")
    mode: Mode = "multi" if isinstance(truth, Mapping) else "single"
    chosen, patients = images.select(test), list(groups[test])
    results = {name: classify(chosen, c, mode=mode) for name, c in classifiers.items()}
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    names = next(iter(classifiers.values())).labels
    statistics: dict[str, WeightStatistic] = {}
    findings: dict[str, Mapping[str, PairedTest]] = {}
    per_label: dict[str, dict[str, Interval]] = {name: {} for name in results}
    majority = None
    if isinstance(truth, Mapping):
        columns = {n: as_binary([truth[n][int(k)] for k in test]) for n in names}
        matrix = np.stack([columns[n] for n in names], axis=1)
        scores = {name: {n: r.logits[:, r.column(n)] for n in names} for name, r in results.items()}
        statistics = {name: macro_auroc_statistic(matrix, r.logits) for name, r in results.items()}
        for name, r in results.items():
            for n in names:
                statistic = auroc_statistic(columns[n], r.logits[:, r.column(n)])
                per_label[name][n] = weighted_interval(statistic, patients, chance=0.5, **options)
        first = next(iter(scores))
        findings = {
            n: compare_findings(columns, scores[first], s, patients, **options) for n, s in scores.items() if n != first
        }
        chance, metric = 0.5, "macro AUROC"
    else:
        answers = [truth[int(k)] for k in test]
        known = [a for a in answers if not is_missing(a)]
        if not known:
            raise InputError("no test row is labelled")
        statistics = {name: balanced_accuracy_statistic(answers, list(r.predicted)) for name, r in results.items()}
        majority, chance, metric = majority_baseline(known), 1 / len(set(known)), "balanced accuracy"
    arms = tuple(
        Arm(name, weighted_interval(s, patients, chance=chance, **options), per_label[name])
        for name, s in statistics.items()
    )
    reference = next(iter(statistics))
    compared = {
        n: paired_difference(statistics[reference], s, patients, **options)
        for n, s in statistics.items()
        if n != reference
    }
    p_values = {n: c.p_value for n, c in compared.items()}
    if mode == "single":
        labelled = [k for k, a in enumerate(answers) if not is_missing(a)]
        number = {n: k for k, n in enumerate(names)}

        def told(name: str) -> list[int]:
            return [number[results[name].predicted[k]] for k in labelled]

        right = [number[str(answers[k])] for k in labelled]
        kept = [patients[k] for k in labelled]
        for n in compared:
            made: Any = balanced_accuracy_statistic
            p_values[n] = compare_metric(made, right, told(reference), told(n), kept, **options).p_raw
    return TuningScores(
        mode,
        metric,
        arms,
        {n: c.difference for n, c in compared.items()},
        p_values,
        findings,
        majority,
        len(test),
        len(set(patients)),
    )
