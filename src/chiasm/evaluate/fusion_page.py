"""Fused modalities to a page: each alone, early and late fusion, the test of the gain, and what a missing one costs."""

from __future__ import annotations

import math

from chiasm.evaluate.figures import interval_dots
from chiasm.evaluate.fusion_scores import FusionScores
from chiasm.evaluate.page import Figure, KeyNumber, Note, Page, Section, Table
from chiasm.evaluate.run_card import RunCard
from chiasm.metrics.compare import PairedTest


def fusion_page(scores: FusionScores, card: RunCard, *, label: str) -> Page:
    """Return the page; it holds counts and scores, nothing of a patient.

    Args:
        scores: From :func:`chiasm.evaluate.fusion_scores.score_fusion`.
        card: Of the run.
        label: Column that was predicted.
    """
    best = max(scores.arms, key=lambda a: scores.arms[a].auroc.value)
    rows = ", ".join(f"{n:,} {name}" for name, n in scores.counts.items())
    return Page(
        title="Several modalities, one answer",
        subtitle=f"“{label}” ({rows}; {scores.patients:,} patients) predicted by models that never saw the patient. {scores.verdict}",
        key_numbers=tuple(
            KeyNumber(f"AUROC, {arm}", found.auroc, "highest here" if arm == best else "")
            for arm, found in scores.arms.items()
        ),
        sections=(_arms(scores), _differences(scores), _missing(scores), card.section()),
        footer=("Research and teaching only; not a medical device.",),
    )


def _arms(scores: FusionScores) -> Section:
    table = Table(
        columns=("arm", "AUROC", "balanced accuracy", "log loss", "log loss of the class shares"),
        rows=tuple(
            (arm, s.auroc, s.balanced_accuracy, s.log_loss, f"{s.log_loss.chance or 0:.3f}")
            for arm, s in scores.arms.items()
        ),
        caption=f"Always naming the most frequent class is right in {scores.majority_accuracy:.1%} of the rows.",
    )
    figure = Figure(
        svg=interval_dots({arm: s.auroc for arm, s in scores.arms.items()}, xlabel="AUROC"),
        caption="Area under the ROC curve with 95 % intervals over patients.",
    )
    return Section(
        title="Each alone, and together",
        intro="Out-of-fold probabilities; patients are whole in every fold, and everything that is fitted – means, components, "
        "penalties, weights – comes from training patients.",
        blocks=(figure, table),
    )


def _differences(scores: FusionScores) -> Section:
    def row(name: str, test: PairedTest) -> tuple[object, ...]:
        return (
            name.replace("-", " − ", 1),
            test.difference,
            _p(test.p),
            _p(test.p_raw),
            test.test.replace("delong", "DeLong").replace("_", ", "),
        )

    rows = tuple(row(n, t) for n, t in scores.differences.items())
    return Section(
        title="Did fusion help?",
        intro="AUROC of fusion less that of one modality, on the same rows. A gain is claimed only over every modality alone.",
        blocks=(
            Note(scores.verdict),
            Table(("difference", "AUROC [95 %]", "p (Holm)", "p alone", "test"), rows),
        ),
    )


def _p(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _missing(scores: FusionScores) -> Section:
    rows = tuple(
        (m, f"{scores.present[m]:.1%}", *(f"{scores.weights.get(m, 0):.2f}",), *(by_arm.values()))
        for m, by_arm in scores.without.items()
    )
    names = tuple(next(iter(scores.without.values()))) if scores.without else ()
    return Section(
        title="When a modality is missing",
        intro="The same models, asked as if one modality had not been taken for anybody. Nothing is trained again.",
        blocks=(
            Table(
                (
                    "modality",
                    "rows that have it",
                    "weight in late fusion",
                    *(f"AUROC of {n} without it" for n in names),
                ),
                rows,
            ),
        ),
    )
