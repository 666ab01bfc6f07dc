"""Survival scores to a page: order, order over time, probabilities, risk groups, calibration, what was chosen.

Comes in: :class:`~chiasm.evaluate.survival_scores.SurvivalScores` and the run card. Goes out: a
:class:`~chiasm.evaluate.page.Page` without any row of a patient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import chiasm
from chiasm.evaluate.figures import interval_dots
from chiasm.evaluate.page import Block, Figure, KeyNumber, Note, Page, Section, Table
from chiasm.evaluate.run_card import RunCard
from chiasm.evaluate.survival_figures import auc_over_time, calibration_points, survival_curves
from chiasm.evaluate.survival_scores import NOTHING, SurvivalScores
from chiasm.types import Interval

METHODS = {
    "coxnet": "Cox's model with an elastic net",
    "forest": "a random survival forest",
    "neural": "a small network with Cox's partial likelihood",
}


def survival_page(scores: SurvivalScores, card: RunCard, *, source: str = "") -> Page:
    """Return the page.

    Args:
        scores: From :func:`chiasm.evaluate.survival_scores.score_survival`.
        card: Of the run.
        source: What the features came from, for the heading.
    """
    score = scores.models[scores.name]
    return Page(
        title="Survival from embeddings" if not source else f"Survival from {source}",
        subtitle=f"{METHODS.get(scores.method, scores.method).capitalize()} on {scores.name}. Every patient is predicted "
        f"by a model that saw neither the patient nor the outcome ({scores.folds} folds by patient; all choices inside the "
        "training folds). A higher risk is worse.",
        key_numbers=(
            KeyNumber("Harrell's C", score.harrell, "share of pairs in the right order"),
            KeyNumber("Uno's C", score.uno, f"up to {_time(scores.tau, scores.unit)}"),
            KeyNumber(
                "integrated Brier score", score.brier, f"{scores.models[NOTHING].brier.value:.3f} without features"
            ),
        ),
        sections=(
            _who(scores),
            _order(scores),
            _over_time(scores),
            _risk_groups(scores),
            _calibration(scores),
            _chosen(scores),
            card.section(),
        ),
        footer=(f"chiasm {chiasm.__version__}", "Research and teaching only; not a medical device."),
    )


def _who(scores: SurvivalScores) -> Section:
    share = scores.events / scores.patients
    rows: tuple[tuple[object, ...], ...] = (
        ("patients", f"{scores.patients:,} (of {scores.rows:,} rows)"),
        ("events", f"{scores.events:,} ({share:.0%} of patients; the others are censored)"),
        ("median follow-up", f"{_time(scores.follow_up.value, scores.unit)} (reverse Kaplan–Meier)"),
        *((f"columns of {name}", f"{m.columns:,}") for name, m in scores.models.items() if name != NOTHING),
    )
    notes = tuple(Note(text, "warning") for text in scores.warnings)
    return Section(
        "Who was studied",
        "Rows of a patient are one observation: vectors are pooled, and outcomes must agree.",
        (*notes, Table(("", ""), rows)),
    )


def _order(scores: SurvivalScores) -> Section:
    rows = tuple(
        (name, f"{m.columns:,}" if m.columns else "–", m.harrell, m.uno, f"{m.mean_auc:.3f}", m.brier)
        for name, m in scores.models.items()
    )
    gains = tuple(
        (f"{scores.name} – {name}", _signed(c.difference), _p(c.p_value).lstrip("= "))
        for name, c in scores.gains.items()
    )
    return Section(
        "How well are patients ordered",
        "A C-index is the share of comparable pairs in which the patient with the earlier event has the higher risk: 0.5 is "
        "chance, and 1 is out of reach even for the true hazard. Uno's weighs against censoring.",
        (
            Figure(
                interval_dots({n: m.harrell for n, m in scores.models.items()}, xlabel="Harrell's C", width=8.6),
                "Bootstrap of patients, 95 %, with the fitted models as they are: other training patients would add to it. "
                "Pairs are formed within a fold.",
                wide=True,
            ),
            Table(
                ("features", "columns", "Harrell's C", "Uno's C", "mean AUC", "integrated Brier score"),
                rows,
                f"Uno's C up to {_time(scores.tau, scores.unit)}, the last event with a tenth of patients under observation.",
            ),
            Table(
                ("difference of Harrell's C", "value", "p"),
                gains,
                "Paired by patient; p values corrected by Holm. Between nested models a difference near 0 is what "
                "features without information give.",
            ),
        ),
    )


def _over_time(scores: SurvivalScores) -> Section:
    gain = scores.brier_gain
    better = gain.difference.value < 0
    return Section(
        "Over time",
        "At each time: patients with an event until then against those without one until then.",
        (
            Figure(
                auc_over_time(
                    {n: m.auc for n, m in scores.models.items() if n != NOTHING}, scores.grid, unit=scores.unit
                ),
                f"Cumulative/dynamic AUC; the band belongs to {scores.name}.",
                wide=True,
            ),
            Table(
                ("event until", *(n for n in scores.models if n != NOTHING)),
                tuple(
                    (_time(t, scores.unit), *(m.auc[k] for n, m in scores.models.items() if n != NOTHING))
                    for k, t in enumerate(scores.grid)
                ),
                "AUC at each time; chance is 0.5.",
            ),
            Note(
                f"Predicted probabilities: integrated Brier score {scores.models[scores.name].brier} against "
                f"{scores.models[NOTHING].brier} of the Kaplan–Meier curve for everybody; difference "
                f"{_signed(gain.difference)}, p {_p(gain.p_value)}. "
                + (
                    "Lower is better."
                    if better
                    else "Lower is better: the model's probabilities are no better than that."
                )
            ),
        ),
    )


def _risk_groups(scores: SurvivalScores) -> Section:
    blocks: list[Block] = [
        Figure(
            survival_curves(scores.groups, scores.ticks, unit=scores.unit, end=scores.end),
            "Kaplan–Meier estimates with 95 % intervals at each time, and patients under observation, up to the time at "
            "which a twentieth of all patients is left.",
            wide=True,
        )
    ]
    test = scores.separation
    if test is not None and not math.isfinite(test.p_value):
        blocks.append(Note("Log-rank test, p not defined: no event fell while patients of two groups were at risk."))
    elif test is not None:
        blocks.append(
            Note(
                f"Log-rank test, stratified by fold: χ² = {test.chi2:.1f}, {test.df} degree{'s' if test.df > 1 else ''} of "
                f"freedom, p {_p(test.p_value)}. Folds share training patients, so this p is a description; the interval "
                "of the C-index is the test."
            )
        )
    else:
        blocks.append(Note("All patients have one risk: the features gave the model nothing to go by.", "warning"))
    rows = tuple(
        (g.name, f"{g.curve.n:,}", f"{g.events:,}", _time(g.curve.median.value, scores.unit)) for g in scores.groups
    )
    blocks.append(Table(("group", "patients", "events", "median time to the event"), rows))
    return Section(
        "Risk groups",
        "Out-of-fold risks, cut at quantiles of the risks of each model's training patients; no cut was chosen by outcome.",
        tuple(blocks),
    )


def _calibration(scores: SurvivalScores) -> Section:
    return Section(
        f"Calibration at {_time(scores.horizon, scores.unit)}",
        "Patients with alike predictions: what was predicted, and what Kaplan–Meier found.",
        (
            Figure(calibration_points(scores.calibration), "Beside each point the number of patients."),
            Table(
                ("patients", "predicted", "observed"),
                tuple((f"{p.observed.n:,}", f"{p.predicted:.3f}", _known(p.observed)) for p in scores.calibration),
                "Probability of the event until then. “–”: nobody of the group was followed that long.",
            ),
        ),
    )


def _chosen(scores: SurvivalScores) -> Section:
    rows = tuple(
        (name, str(fold + 1), _choice(chosen))
        for name, m in scores.models.items()
        for fold, chosen in enumerate(m.chosen)
        if chosen
    )
    return Section(
        "What was chosen",
        "By inner cross-validation, in each fold by itself. Choices that jump from fold to fold speak of a weak signal.",
        (Table(("features", "fold", "choice"), rows),),
    )


def _choice(chosen: Mapping[str, Any]) -> str:
    """Return what a fold chose in words: ``penalty 0.042, 7 columns``-like pairs, numbers short."""

    def plain(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ", ".join(plain(v) for v in value)
        return "none" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    return "; ".join(f"{name.replace('_', ' ')} {plain(value)}" for name, value in chosen.items())


def _time(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "not reached"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _known(interval: Interval) -> object:
    return interval if math.isfinite(interval.value) else "–"


def _signed(interval: object) -> str:
    text = str(interval)
    return text if text.startswith("-") else f"+{text}"


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "not defined"
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
