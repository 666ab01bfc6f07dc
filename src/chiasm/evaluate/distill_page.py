"""The page of an experiment with controls: a verdict, what each arm is, numbers, differences, and how to do it again.

Comes in: :class:`~chiasm.evaluate.distill_scores.ControlScores` and facts about the run. Goes out: a ``Page`` that a
reader understands without having read the paper; ``evaluate.page.save_page`` writes it as one file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from chiasm.evaluate.control_figures import difference_rows, reliability_panels, seed_dots
from chiasm.evaluate.distill_scores import ControlScores
from chiasm.evaluate.distill_verdict import MAIN_QUESTIONS, SPOKEN, points
from chiasm.evaluate.page import Block, Commands, Figure, KeyNumber, Note, Page, Section, Table
from chiasm.metrics.paired import SeedDifference
from chiasm.types import Interval

MEANINGS: dict[str, tuple[str, str]] = {
    "unimodal": (
        "A linear classifier on the features of a backbone that does not change. It sees images and labels only.",
        "How far one gets without any of this.",
    ),
    "unimodal_lora": (
        "The same, and the backbone is adapted a little (low-rank updates), for as many steps as CLIP-IT gets.",
        "Is it the adaptation of the backbone?",
    ),
    "lambda0": (
        "All layers and steps of CLIP-IT, but nothing is learnt from text (its weight λ is 0).",
        "Is it the additional layers and steps?",
    ),
    "clip_it": (
        "While training, each image also learns to predict the vector of a report that a model of images and texts finds "
        "most similar to it. The report was written about somebody else.",
        "The method itself.",
    ),
    "shuffled": (
        "The same reports, dealt out to the training images at random.",
        "Would any text do?",
    ),
    "random_text": (
        "The same pairs, but each report's vector is replaced by a random one: images that share a report still share a "
        "target, which says nothing.",
        "Is it the grouping of images, and not what the reports say?",
    ),
    "prompt_text": (
        "Instead of reports one sentence a class, such as “an image of tumour”, matched without looking at labels.",
        "Do class names do as well as reports?",
    ),
    "paired": (
        "Each image's own report, which CLIP-IT does not need.",
        "How much better could the pairs be?",
    ),
    "label_leak": (
        "The sentence of the image's true label.",
        "For comparison only: the label leaks into the text.",
    ),
    "no_warm_start": ("CLIP-IT with a text head that starts at random.", "Does the text stage matter?"),
    "late_fusion": ("A classifier that reads the report at test time, too.", "What text itself would give."),
}
"""Arm -> what is trained, which question it answers."""

ANSWERS = (
    ("balanced_accuracy", "balanced accuracy, %"),
    ("auroc", "AUROC"),
    ("accuracy", "accuracy, %"),
    ("macro_f1", "macro F1"),
)
PROBABILITIES = (
    ("ece", "ECE, %"),
    ("ece_debiased", "ECE debiased, %"),
    ("brier", "Brier score"),
    ("log_loss", "log loss"),
)
PERCENT = frozenset({"balanced_accuracy", "accuracy", "ece", "ece_debiased"})

READING = (
    ("balanced accuracy", "The share of right answers in each class, averaged over classes; rare classes count as much as "
     "common ones."),
    ("AUROC", "The chance that the classifier ranks a random sample of a class above a random one of another class; 0.5 is "
     "guessing. With more than two classes the mean of one class against the rest."),
    ("ECE", "Expected calibration error: how far the confidence of answers lies from the share of right ones, on average. "
     "0 is honest. Small test sets look worse than they are; the debiased number takes a part of that off."),
    ("Brier score, log loss", "Errors of the probabilities themselves; lower is better. Chance: giving every sample the "
     "shares of the classes."),
    ("seed", "One training from start to end, with its own random numbers. Two arms are compared seed by seed, because a "
     "seed shares order of images and held-out part between arms."),
    ("interval over seeds", "Where the mean would lie if everything were done again with many other seeds (t interval)."),
    ("seeds and patients", "Where it would lie with other patients in the test set as well: both are drawn anew together. With few "
     "seeds it may be the narrower of the two: believe the wider one."),
    ("p, corrected", "How often a difference at least this large would be seen if there were none; corrected by Holm's method "
     "for the number of questions asked (those of the verdict together, all others together)."),
    ("Wilcoxon", "The same from ranks alone. With five seeds it cannot fall below 0.062, whatever the gain."),
)  # fmt: skip


def render_control_page(
    scores: ControlScores,
    *,
    facts: Mapping[str, str],
    command: str,
    title: str = "Did the text help?",
    about: Mapping[str, str] | None = None,
) -> Page:
    """Compose the page of an experiment with controls.

    Args:
        scores: What was found.
        facts: What it was computed from, name -> value: data, digests, versions, machine. Printed as they are, so they
            must hold no path or name that tells about patients.
        command: Shell lines that compute everything again.
        title: Heading of the page.
        about: Arm -> what was trained, where it differs from :data:`MEANINGS`, or for other arms.

    Returns:
        The page; ``chiasm.evaluate.page.save_page`` writes it.
    """
    seeds = f"{len(scores.seeds)} seed{'s' if len(scores.seeds) != 1 else ''}"
    patients = f" of {_range(scores.n_groups)} patients" if scores.n_groups != scores.n_test else ""
    return Page(
        title=title,
        subtitle=(
            f"{scores.verdict.headline}. {len(scores.arms)} ways of training, {seeds}, {_range(scores.n_test)} test "
            f"samples{patients}."
        ),
        key_numbers=_key_numbers(scores),
        sections=(
            _verdict(scores),
            _arms(scores, about or {}),
            _differences(scores),
            _numbers(scores),
            _calibration(scores),
            _reading(scores),
            _origin(scores, facts),
            Section("Do it again", "The same seeds give the same numbers.", (Commands(command),)),
        ),
        footer=("Computed by chiasm. Research software: not for use on patients.",),
    )


def _key_numbers(scores: ControlScores) -> tuple[KeyNumber, ...]:
    """Three arms and the two differences that decide; the template says 95 %, so other levels go without bounds."""

    def bounded(number: Interval) -> Interval:
        if math.isclose(scores.level, 0.95):
            return number
        return Interval(number.value, math.nan, math.nan, number.n, number.chance)

    keys = [
        KeyNumber(f"balanced accuracy, {SPOKEN[arm]}", bounded(scores.arms[arm].numbers["balanced_accuracy"].interval))
        for arm in ("clip_it", "lambda0", "unimodal")
        if arm in scores.arms
    ]
    for name, text in (("clip_it-lambda0", "the text's part"), ("clip_it-unimodal", "whole gain")):
        found = scores.differences["balanced_accuracy"].get(name)
        if found is not None:
            more, less = _sides(name, scores)
            number = Interval(found.value, found.low, found.high, len(found.seeds))
            keys.append(KeyNumber(f"{text}: {more} less {less}", bounded(number)))
    return tuple(k for k in keys if math.isfinite(k.interval.value))


def _verdict(scores: ControlScores) -> Section:
    tone = "plain" if scores.verdict.outcome == "helped" else "warning"
    dots = {
        SPOKEN.get(arm, arm): (
            _scaled(found.numbers["balanced_accuracy"].interval),
            [100 * v for v in found.numbers["balanced_accuracy"].per_seed],
        )
        for arm, found in scores.arms.items()
    }
    blocks: list[Block] = [
        Note(" ".join([f"{scores.verdict.headline}.", *scores.verdict.reasons[:1]]), tone),
        *([Note(" ".join(scores.verdict.reasons[1:]))] if scores.verdict.reasons[1:] else []),
        *(Note(f"{note[0].upper()}{note[1:]}.") for note in scores.notes),
        Figure(
            seed_dots(dots, xlabel="balanced accuracy on the test set, %", chance=100 * scores.chance,
                      emphasis=(SPOKEN["clip_it"],)),
            f"Dot: mean over seeds. Bar: {100 * scores.level:g} % interval over seeds. Rings: single seeds. "
            f"Dashed: what guessing reaches ({100 * scores.chance:.1f} %). Always giving the most frequent class would "
            f"have an accuracy of {100 * scores.majority:.1f} % and the balanced accuracy of guessing.",
            wide=True,
        ),
    ]  # fmt: skip
    return Section(
        "Verdict",
        "In training, each image was matched with a report about somebody else, and the classifier also learnt to predict what "
        "that report says. In use it sees an image only. Is it better for it, and is the text the reason?",
        tuple(blocks),
    )


def _arms(scores: ControlScores, about: Mapping[str, str]) -> Section:
    rows = []
    for arm, found in scores.arms.items():
        trained, question = MEANINGS.get(arm, ("", ""))
        rows.append((SPOKEN.get(arm, arm), arm, about.get(arm, trained), question, str(len(found.seeds))))
    return Section(
        "What each arm is",
        "All arms share images, labels, held-out part and number of steps, so that a difference between two has one cause.",
        (Table(("arm", "name in files", "what is trained", "the question it answers", "seeds"), tuple(rows)),),
    )


def _differences(scores: ControlScores) -> Section:
    found = scores.differences["balanced_accuracy"]
    if not found:
        return Section("Differences", "No two arms can be compared.", ())
    names = {name: _spoken(name, scores) for name in found}
    alpha = 1 - scores.level
    shown = [names[n] for n, d in found.items() if math.isfinite(d.p) and d.p < alpha]
    rows = tuple(
        (
            names[n],
            points(d.value) if math.isfinite(d.value) else "not defined",
            _bounds(d.low, d.high),
            _p(d.p),
            _p(d.p_wilcoxon),
            *([_joint(d)] if scores.same_test_set else []),
            str(len(d.seeds)),
        )
        for n, d in found.items()
    )
    deciding = sum(n in MAIN_QUESTIONS for n in found)
    smallest = min((d.smallest_p_wilcoxon for d in found.values() if d.seeds), default=math.nan)
    thin = "Thin line with ends: seeds and patients drawn anew together. " if scores.same_test_set else ""
    return Section(
        "Differences",
        "One arm less another, seed by seed, in percentage points of balanced accuracy.",
        (
            Figure(
                difference_rows(
                    {names[n]: d for n, d in found.items()},
                    xlabel="difference of balanced accuracy, percentage points",
                    shown=shown,
                ),
                f"Right of the line: the first is better. Bar: {100 * scores.level:g} % interval over seeds. {thin}Rings: "
                f"single seeds. In colour: corrected p below {alpha:.2g}; grey: not shown.",
                wide=True,
            ),
            Table(
                ("difference", "points", "over seeds", "p corrected", "Wilcoxon's p",
                 *(["seeds and patients"] if scores.same_test_set else []), "seeds"),
                rows,
                f"The first {deciding} decide the verdict and are corrected together, the others among themselves. Wilcoxon's p "
                f"cannot be below {_p(smallest)} with so many seeds. A difference that is not shown may still exist: its "
                "interval says how large it could be.",
            ),
        ),
    )  # fmt: skip


def _numbers(scores: ControlScores) -> Section:
    return Section(
        "How often the answers are right",
        f"Means over seeds with {100 * scores.level:g} % intervals over seeds; higher is better.",
        (_table(scores, ANSWERS),),
    )


def _table(scores: ControlScores, columns: Sequence[tuple[str, str]]) -> Table:
    rows = []
    for arm, found in scores.arms.items():
        cells = [_cell(found.numbers[metric].interval, metric in PERCENT) for metric, _ in columns]
        rows.append((SPOKEN.get(arm, arm), *cells))
    first = next(iter(scores.arms.values()))
    chances = [_chance(first.numbers[metric].chance, metric in PERCENT) for metric, _ in columns]
    return Table(("arm", *(text for _, text in columns)), (*rows, ("without information", *chances)))


def _calibration(scores: ControlScores) -> Section:
    curves = {SPOKEN.get(arm, arm): found.reliability for arm, found in scores.arms.items()}
    return Section(
        "Can the probabilities be believed?",
        "If a classifier is 80 % sure, 80 % of such answers should be right: then points lie on the dashed diagonal. Below it, "
        "the classifier is too sure; above it, it could be surer. In the table lower is better.",
        (
            Figure(
                reliability_panels(curves),
                "Ten groups of equally many answers, by confidence (the largest probability), all seeds together. Bars: "
                f"{100 * scores.level:g} % intervals, patients drawn anew.",
                wide=True,
            ),
            _table(scores, PROBABILITIES),
        ),
    )


def _reading(scores: ControlScores) -> Section:
    known = [row for row in READING if scores.same_test_set or row[0] != "seeds and patients"]
    return Section("How to read the numbers", "", (Table(("word", "what it means"), tuple(known)),))


def _origin(scores: ControlScores, facts: Mapping[str, str]) -> Section:
    own = {
        "seeds": ", ".join(map(str, scores.seeds)),
        "test samples a seed": _range(scores.n_test),
        "patients a seed (samples where unknown)": _range(scores.n_groups),
        "classes": str(scores.n_classes),
        "test set": "the same for all seeds" if scores.same_test_set else "another for each seed",
        "resamples of patients": str(scores.n_resamples) if scores.same_test_set else "none",
        "digest of the test sets": scores.digests["test_sets"],
        "digest of all predictions": scores.digests["predictions"],
    }
    rows = tuple((name, value) for name, value in {**facts, **own}.items())
    return Section("What it was computed from", "", (Table(("what", "value"), rows),))


def _sides(name: str, scores: ControlScores) -> tuple[str, str]:
    """Return the two arms of a difference as a reader says them; arm names may hold a hyphen."""
    for more in scores.arms:
        less = name.removeprefix(f"{more}-")
        if less != name and less in scores.arms:
            return SPOKEN.get(more, more), SPOKEN.get(less, less)
    return name, ""


def _spoken(name: str, scores: ControlScores) -> str:
    more, less = _sides(name, scores)
    return f"{more} − {less}" if less else more


def _scaled(number: Interval) -> Interval:
    chance = None if number.chance is None else 100 * number.chance
    return Interval(100 * number.value, 100 * number.low, 100 * number.high, number.n, chance)


def _cell(number: Interval, percent: bool) -> str:
    if not math.isfinite(number.value):
        return "not defined"
    if not percent:
        return str(number)
    text = f"{100 * number.value:.1f}"
    return text if not math.isfinite(number.low) else f"{text} [{100 * number.low:.1f},\u00a0{100 * number.high:.1f}]"


def _chance(chance: float | None, percent: bool) -> str:
    if chance is None or not math.isfinite(chance):
        return ""
    return f"{100 * chance:.1f}" if percent else f"{chance:.3f}"


def _bounds(low: float, high: float) -> str:
    return f"[{points(low)},\u00a0{points(high)}]" if math.isfinite(low) else "one seed has none"


def _joint(difference: SeedDifference) -> str:
    joint = difference.patients
    if joint is None:
        return "in the scatter of seeds"
    return f"[{points(joint.low)},\u00a0{points(joint.high)}]" if math.isfinite(joint.low) else "too few patients"


def _p(p: float) -> str:
    if not math.isfinite(p):
        return ""
    return "<\u00a00.001" if p < 0.001 else f"{p:.3f}"


def _range(bounds: Sequence[int]) -> str:
    low, high = bounds
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
