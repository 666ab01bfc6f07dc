"""Few-shot scores to a page: the curves, the numbers, who beats the reference, the rule of the draws, the run card."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from chiasm.evaluate.few_shot_figures import learning_curves
from chiasm.evaluate.few_shot_scores import Contrast, FewShotScores, shots_name
from chiasm.evaluate.page import Commands, Figure, KeyNumber, Note, Page, Section, Table
from chiasm.evaluate.run_card import RunCard
from chiasm.types import Interval

WHAT_THEY_ARE = {
    "linear-probe": "logistic regression on the vectors, C chosen on validation patients",
    "prototypes": "nearest class mean by cosine; chooses nothing",
    "prototypes-centred": "the same after taking the common mean off",
    "zero-shot": "texts alone; learns nothing",
    "tip-adapter": "texts plus a cache of the shots (Zhang et al. 2022), α and β chosen on validation patients",
    "tip-adapter-f": "the same with trained keys; the step chosen on validation patients",
    "clip-adapter": "a residual bottleneck on the vector (Gao et al. 2021); ratio and step chosen on validation patients",
    "text-probe": "a linear probe that begins at the texts (after LP++, Huang et al. 2024)",
    "coop": "learned prompts (Zhou et al. 2022): their vectors from the shots, the epoch chosen on validation patients",
    "from-scratch": "a small CNN without pretraining, on the images themselves; learns from shots and validation rows",
    "colour": "six colour numbers and the nearest centroid: the floor",
}


def few_shot_page(scores: FewShotScores, card: RunCard, *, label: str) -> Page:
    """Return the page.

    Args:
        scores: From :func:`chiasm.evaluate.few_shot_scores.score_few_shot`.
        card: Of the run.
        label: Name of the column of classes.
    """
    sections = [_curves(scores), _numbers(scores)]
    if scores.contrasts:
        sections.append(_compared(scores))
    sections += [_rule(scores), _details(scores), _next(), card.section()]
    return Page(
        title="Few-shot classification",
        subtitle=f"“{label}”, {len(scores.classes)} classes, from a few labelled images a class. One test set of "
        f"{scores.test_rows:,} images of {scores.test_patients:,} patients, who are in nothing else.",
        key_numbers=_key_numbers(scores),
        sections=tuple(sections),
        footer=("Research and teaching only; not a medical device.",),
    )


def _key_numbers(scores: FewShotScores) -> tuple[KeyNumber, ...]:
    found: list[KeyNumber] = []
    k = max((s for s in scores.shots if s is not None), default=scores.shots[-1])
    for method in (scores.reference, *(m for m in ("zero-shot", "from-scratch", "colour") if m in scores.methods)):
        points = [p for p in scores.points if p.method == method and p.shots == k]
        if points and method not in [n.name for n in found]:
            note = "balanced accuracy, " + ("texts alone" if method == "zero-shot" else _shots(k))
            found.append(KeyNumber(method, points[0].balanced_accuracy, note))
    majority = Interval(scores.majority, np.nan, np.nan, scores.test_rows)
    return (*found, KeyNumber("majority", majority, "accuracy; its balanced accuracy is chance"))


def _shots(k: int | None) -> str:
    return "all rows" if k is None else f"{k} a class"


def _curves(scores: FewShotScores) -> Section:
    return Section(
        "Learning curves",
        "Mean over seeds; the band is the 95 % interval over test patients and seeds drawn anew together. "
        "Seeds draw other shots; the test set stays.",
        (Figure(learning_curves(scores), "Balanced accuracy over the number of labelled images a class.", wide=True),),
    )


def _numbers(scores: FewShotScores) -> Section:
    found = {(p.method, p.shots): p.balanced_accuracy for p in scores.points}
    rows = [(m, *[found.get((m, k), "–") for k in scores.shots]) for m in scores.methods]
    caption = (
        f"Chance and the majority's answer: {scores.chance:.3f} (the majority's plain accuracy is {scores.majority:.3f}). "
        "Brackets: 95 % over test patients and seeds."
    )
    known = [(m, WHAT_THEY_ARE.get(m, "")) for m in scores.methods]
    return Section(
        "Balanced accuracy",
        "Mean over seeds on the test set, by images a class to learn from.",
        (
            Table(("method", *[str(shots_name(k)) for k in scores.shots]), tuple(rows), caption),
            Table(("method", "what it is"), tuple(known)),
        ),
    )


def _details(scores: FewShotScores) -> Section:
    rows = []
    for p in scores.points:
        spread = f"{np.std(p.per_seed, ddof=1):.3f}" if len(p.per_seed) > 1 else "–"
        over = (
            f"{p.over_seeds.low:.3f} to {p.over_seeds.high:.3f}"
            if np.isfinite(p.over_seeds.low) and p.over_seeds.n > 2
            else "–"
        )
        chosen = "; ".join(f"{name} {_summary(v)}" for name, v in p.chosen.items())
        rows.append((shots_name(p.shots), p.method, p.auroc, f"{p.accuracy:.3f}", over, spread, len(p.seeds), chosen))
    columns = ("shots", "method", "AUROC", "accuracy", "t interval", "sd", "seeds", "chosen (times)")
    return Section(
        "Details",
        "AUROC with its interval over patients and seeds; Student's t interval of balanced accuracy over seeds alone and "
        "their standard deviation; what was chosen on validation patients. Choices that jump from seed to seed say that "
        "the validation rows are too few to choose well.",
        (Table(columns, tuple(rows), f"Chance: AUROC 0.5; majority: accuracy {scores.majority:.3f}."),),
    )


def _compared(scores: FewShotScores) -> Section:
    def row(c: Contrast) -> tuple[object, ...]:
        d = c.difference
        both = d.patients
        interval = "–" if both is None or not np.isfinite(both.low) else f"{both.low:+.3f} to {both.high:+.3f}"
        p = "–" if not np.isfinite(d.p) else f"{d.p:.3f}" if d.p >= 0.001 else "< 0.001"
        return (shots_name(c.shots), c.method, f"{d.value:+.3f}", interval, p, len(d.seeds), c.verdict)

    columns = ("shots", "method", "difference", "95 %, patients and seeds", "p (Holm)", "seeds", "verdict")
    return Section(
        f"Against {scores.reference}",
        "Balanced accuracy of each method less that of the reference, on the same shots and the same test images.",
        (
            Table(columns, tuple(row(c) for c in scores.contrasts)),
            Note(
                "p is of the paired t test over seeds, corrected by Holm for all rows of this table. “Better” or “worse” "
                "is said only where p is below 0.05 and the interval over patients and seeds excludes 0."
            ),
        ),
    )


def _rule(scores: FewShotScores) -> Section:
    pool = ", ".join(f"{name}: {n:,}" for name, n in scores.pool_patients.items())
    rows: list[tuple[object, ...]] = []
    for k in scores.shots:
        points = [p for p in scores.points if p.shots == k]
        rows.append((shots_name(k), f"{points[0].train:,.0f}", f"{points[0].validation:,.0f}", scores.test_rows))
    notes = [
        Note(
            "k shots are one image of each of k patients a class, and as many validation images come from k other patients: "
            "the only rows on which a hyper-parameter or a step is chosen. Further images of the same patients are used only "
            "where a class has too few patients. “All” uses every row outside the test set, a fifth of the patients as validation."
        )
    ]
    notes += [Note(f"{k} shots were left out: {why}.", "warning") for k, why in scores.left_out.items()]
    return Section(
        "How the rows were drawn",
        f"No patient is in two of support, validation and test. Patients outside the test set, a class: {pool}.",
        (Table(("shots", "rows to learn from", "rows to choose on", "test rows"), tuple(rows)), *notes),
    )


def _summary(values: tuple[Any, ...]) -> str:
    counts = Counter(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)
    shown = counts.most_common(3)
    text = ", ".join(f"{name} (×{n})" for name, n in shown)
    return text + (f", {len(counts) - len(shown)} others" if len(counts) > len(shown) else "")


def _next() -> Section:
    code = (
        "from chiasm.tasks.few_shot import LinearProbe\n\n"
        "probe = LinearProbe().fit(images, labels, groups=patients)   # C chosen on held-back patients\n"
        "probabilities = probe.predict_proba(new_images)"
    )
    return Section("Use one", "Every method is an estimator on embeddings.", (Commands(code),))
