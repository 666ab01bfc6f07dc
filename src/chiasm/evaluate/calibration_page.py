"""A calibration to a page: reliability, errors before and after, thresholds, sets, "cannot tell", foreign images.

Comes in: scores of a calibration and the calibration. Goes out: a :class:`~chiasm.evaluate.page.Page` without any
patient's picture, text or id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import chiasm
from chiasm.evaluate.calibration_figures import abstention_bars, reliability_plots
from chiasm.evaluate.calibration_scores import Abstention, CalibrationScores, DomainScores, Errors
from chiasm.evaluate.page import Block, Commands, Figure, KeyNumber, Note, Page, Section, Table
from chiasm.evaluate.pairing_figures import distributions
from chiasm.evaluate.run_card import RunCard
from chiasm.tasks.calibrated import Calibration
from chiasm.types import Interval

#: Share of empty sets from which a reader is told why.
MANY_EMPTY = 0.02
_NAMES = {"ece": "calibration error (ECE)", "brier": "Brier score", "log_loss": "log loss"}


def calibration_page(
    calibration: Calibration, scores: CalibrationScores, card: RunCard, *, file: str | None = None
) -> Page:
    """Return the page.

    Args:
        calibration: As it was fitted.
        scores: On test patients.
        card: Of the run.
        file: Name of the saved calibration, for the commands to go on with.
    """
    sections = [_reliability(scores), _errors(scores), _thresholds(calibration, scores), _sets(calibration, scores)]
    if scores.domain is not None:
        sections.append(_domain(scores.domain))
    if scores.refused or scores.notes:
        rows = tuple(scores.refused.items())
        notes = tuple(Note(note) for note in scores.notes)
        table = (Table(("label", "why"), rows),) if rows else ()
        sections.append(
            Section(
                "What was left out, what did not help, what to know",
                "Too little to go by is said, not guessed.",
                (*table, *notes),
            )
        )
    if file is not None:
        sections.append(_go_on(file, calibration))
    fitted = calibration.patients
    return Page(
        title="Calibration",
        subtitle=f"Fitted on {fitted['probabilities']:,} validation patients (prediction sets on {fitted['sets']:,} others), "
        f"judged on {scores.n:,} images of {scores.patients:,} test patients.",
        key_numbers=_key_numbers(scores),
        sections=(*sections, card.section()),
        footer=(f"chiasm {chiasm.__version__}.", "Research and teaching only; not a medical device."),
    )


def _key_numbers(scores: CalibrationScores) -> tuple[KeyNumber, ...]:
    found = [
        KeyNumber("ECE before", scores.pooled.before["ece"]),
        KeyNumber("ECE after", scores.pooled.after["ece"], f"{scores.pooled.ece_debiased[1]:.3f} beyond chance"),
    ]
    if scores.sets is not None and scores.by_sets is not None:
        found += [
            KeyNumber("coverage of the sets", _unmarked(scores.sets.coverage), f"promised {scores.coverage:.2f}"),
            KeyNumber("“cannot tell”", scores.by_sets.undecided, "share of images"),
        ]
    else:
        judged = [f.sets for f in scores.labels if f.sets is not None]
        coverages = [s.coverage.value for s in judged if math.isfinite(s.coverage.value)]
        if coverages:
            mean = sum(coverages) / len(coverages)
            found.append(KeyNumber("coverage of the sets", Interval(mean, math.nan, math.nan, len(coverages)),
                                   f"mean of {len(coverages)} labels, promised {scores.coverage:.2f}"))  # fmt: skip
    if scores.domain is not None and scores.domain.auroc is not None:
        found.append(KeyNumber("foreign images, AUROC", scores.domain.auroc))
    return tuple(found)


def _reliability(scores: CalibrationScores) -> Section:
    what = "all labels together" if scores.mode == "multi" else "the most probable class"
    curves = {what: scores.pooled_curves, **{f.label: f.curves for f in scores.labels}}
    return Section(
        "What a stated probability is worth",
        "Rows are put into bins of equal number by their stated probability; on the dashed line the label is as frequent as "
        "stated. Bars are 95 % intervals over patients.",
        (Figure(reliability_plots(curves), "Orange: as the classifier states it. Blue: calibrated.", wide=True),),
    )


def _errors(scores: CalibrationScores) -> Section:
    rows: list[tuple[object, ...]] = []
    everything = "all labels" if scores.mode == "multi" else "most probable class"
    named: list[tuple[str, Errors, Interval | None]] = [(everything, scores.pooled, None)]
    named += [(f.label, f.errors, f.auroc) for f in scores.labels]
    for label, errors, auroc in named:
        for key, name in _NAMES.items():
            chance = errors.after[key].chance
            rows.append(
                (
                    label if key == "ece" else "",
                    name,
                    errors.before[key],
                    errors.after[key],
                    errors.gain[key],
                    "–" if chance is None else f"{chance:.3f}",
                    auroc if auroc is not None and key == "ece" else "",
                )
            )
    return Section(
        "Errors before and after",
        "Smaller is better; a gain above 0 is an improvement. The constant is what always saying the label's share among "
        "these rows gives.",
        (
            Table(
                ("label", "error", "before", "after", "gain", "constant", "AUROC"),
                tuple(rows),
                "Values with 95 % intervals over patients. The interval of the calibration error can lie above its value: "
                "resamples are noisier than the rows. AUROC is that of the scores; calibration keeps their order.",
            ),
        ),
    )


def _thresholds(calibration: Calibration, scores: CalibrationScores) -> Section:
    rows = []
    for found in scores.labels:
        if found.point is None or found.reached is None:
            continue
        point, now = found.point, found.reached
        rows.append((found.label, f"{point.threshold:.4f}", f"{point.sensitivity:.3f}", now.sensitivity, now.specificity,
                     now.ppv, now.npv))  # fmt: skip
    plan = calibration.plan
    how = " so that the expected sensitivity on new patients is kept" if plan.conservative else ""
    caution = (
        "" if plan.conservative else " A threshold reaches less on new patients half of the time; see --conservative."
    )
    blocks: tuple[Block, ...] = (
        Table(
            ("label", "threshold", "on validation", "sensitivity", "specificity", "PPV", "NPV"),
            tuple(rows),
            "PPV and NPV hold for labels as common as here.",
        ),
    )
    return Section(
        f"Thresholds at a sensitivity of {plan.sensitivity:.2f}",
        f"Chosen on validation patients{how}, then left alone.{caution}",
        blocks if rows else (Note("No label has enough rows for a threshold."),),
    )


def _sets(calibration: Calibration, scores: CalibrationScores) -> Section:
    plan = calibration.plan
    rows: list[tuple[object, ...]] = []
    bars: dict[str, tuple[Interval, Interval, Interval]] = {}

    def add(label: str, how: str, a: Abstention) -> None:
        reached = a.reached
        rows.append((label, how, a.undecided, a.accuracy, a.forced, f"{a.forced.chance or 0:.3f}", "" if reached is None else reached.sensitivity,
                     "" if reached is None else reached.specificity))  # fmt: skip
        bars[f"{label}, {how}"] = (a.undecided, a.accuracy, a.forced)

    coverage: list[tuple[object, ...]] = []
    if scores.sets is not None and scores.by_sets is not None:
        add("classes", "sets", scores.by_sets)
        s = scores.sets
        coverage.append(("classes", _unmarked(s.coverage), s.size, s.single, s.empty))
        coverage += [(f"true class {name}", _unmarked(c), "", "", "") for name, c in
                     zip(calibration.origin.labels, s.per_class, strict=True)]  # fmt: skip
    for found in scores.labels:
        if found.sets is not None and found.by_sets is not None:
            s = found.sets
            coverage.append((found.label, _unmarked(s.coverage), s.size, s.single, s.empty))
            sides = zip((f"{found.label} absent", f"{found.label} present"), s.per_class, strict=True)
            coverage += [(name, _unmarked(c), "", "", "") for name, c in sides]
            add(found.label, "sets", found.by_sets)
        if found.band is not None:
            add(found.label, "band", found.band)
    judged = [s for s in (scores.sets, *(f.sets for f in scores.labels)) if s is not None]
    blocks: list[Block] = []
    if bars:
        blocks.append(Figure(abstention_bars(bars), "What is left undecided, and what that buys.", wide=True))
    blocks.append(
        Table(
            ("rows", "coverage", "mean size", "sets of one", "empty sets"),
            tuple(coverage),
            "Every patient counts alike.",
        )
    )
    if any(found.empty.value > MANY_EMPTY for found in judged):
        text = "Some sets are empty: the classifier is right more often than the sets promise, and they keep their word by "
        blocks.append(Note(text + "leaving images out. Ask for a higher --coverage."))
    blocks.append(
        Table(
            (
                "label",
                "by",
                "“cannot tell”",
                "right, of the rest",
                "right, if forced",
                "majority",
                "sensitivity",
                "specificity",
            ),
            tuple(rows),
            f"Sets: cannot tell where the set holds not exactly one answer. Band: cannot tell between the thresholds of "
            f"sensitivity {plan.sensitivity:.2f} and specificity {plan.specificity:.2f}. Sensitivity and specificity are those of "
            "the rows with an answer; the majority is what always saying the more frequent side gives.",
        )
    )
    return Section(
        "Sets and “cannot tell”",
        f"A set holds the true answer with probability {plan.coverage:.2f}, if patients here are drawn as those of the "
        "validation; at another hospital nothing is promised. A set of all answers keeps the promise too: read the size.",
        tuple(blocks),
    )


def _domain(domain: DomainScores) -> Section:
    values: Mapping[str, object] = {"of the kind": domain.inside, "foreign": domain.foreign}
    drawn = {name: v for name, v in values.items() if len(v)}  # type: ignore[arg-type]
    line = (domain.threshold, "threshold") if math.isfinite(domain.threshold) else None
    rows: list[tuple[object, ...]] = [
        ("images of the kind that are turned away", domain.false_alarms, f"{domain.false_alarms.chance:.2f} promised")
    ]
    if domain.caught is not None and domain.auroc is not None:
        rows += [("foreign images that are turned away", domain.caught, "nothing is promised"),
                 ("AUROC, foreign against of the kind", domain.auroc, "chance 0.50")]  # fmt: skip
    return Section(
        "Is the image of this kind at all",
        f"Distance of the embedding to reference images ({domain.method}); beyond the threshold the answer is “out of "
        "domain”.",
        (
            Figure(distributions(drawn, xlabel="distance, larger is stranger", line=line), "Held-out images only."),  # type: ignore[arg-type]
            Table(("", "value", ""), tuple(rows)),
        ),
    )


def _go_on(file: str, calibration: Calibration) -> Section:
    if calibration.origin.space is None:
        line = f"chiasm calibrate --apply {file} --scores new_scores.csv --csv answers.csv"
    else:
        multi = " --multi" if calibration.origin.mode == "multi" else ""
        line = f"chiasm zero-shot images/ --calibration {file} --model MODEL --labels-file PROMPTS{multi}"
    return Section(
        "Go on",
        "The file knows the model and the prompts, or the labels, that it belongs to, and refuses others.",
        (Commands(line, "Calibrated probabilities, answers and “cannot tell” of new images."),),
    )


def _unmarked(number: Interval) -> Interval:
    """Return a coverage without what was promised, which is no chance level."""
    return Interval(number.value, number.low, number.high, number.n)


def summary_rows(scores: CalibrationScores) -> Sequence[tuple[object, ...]]:
    """Return the rows of the table that a terminal shows: label, AUROC, ECE, Brier score, sensitivity, coverage ..."""
    rows: list[tuple[object, ...]] = []
    pooled = scores.pooled
    sets = "" if scores.sets is None else f"{scores.sets.coverage.value:.3f}"
    unsure = "" if scores.by_sets is None else f"{scores.by_sets.undecided.value:.3f}"
    rows.append(("(pooled)", "", f"{pooled.before['ece'].value:.3f}", pooled.after["ece"], pooled.after["brier"], "", "",
                 sets, unsure))  # fmt: skip
    for f in scores.labels:
        reached = f.reached
        rows.append(
            (
                f.label,
                f"{f.auroc.value:.3f}",
                f"{f.errors.before['ece'].value:.3f}",
                f.errors.after["ece"],
                f.errors.after["brier"],
                "" if reached is None else reached.sensitivity,
                "" if reached is None else reached.specificity,
                "" if f.sets is None else f"{f.sets.coverage.value:.3f}",
                "" if f.by_sets is None else f"{f.by_sets.undecided.value:.3f}",
            )
        )
    return rows
