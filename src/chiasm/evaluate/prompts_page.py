"""Effects, searches and learning of prompts to pages: what a wording does, what a choice is worth, what was luck.

In: what ``tasks.prompt_effects``, ``tasks.prompt_search`` and ``train.prompt_tuning`` return, with a run card. Out: a
:class:`~chiasm.evaluate.page.Page`. Nothing of a patient is on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import chiasm
from chiasm.evaluate.figures import interval_dots
from chiasm.evaluate.page import Block, Figure, KeyNumber, Note, Page, Section, Table
from chiasm.evaluate.prompts_figures import (
    arms_per_label,
    cosine_matrix,
    losses,
    short,
    validation_against_test,
)
from chiasm.evaluate.run_card import RunCard
from chiasm.evaluate.tuning_scores import TuningScores
from chiasm.tasks.prompt_choice import PromptSearch
from chiasm.tasks.prompt_effects import OptionEffect, PromptEffects
from chiasm.train.prompt_tuning import TunedPrompts
from chiasm.types import Interval

METRIC_NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
}
#: Cosine of two labels' directions above which they are said to coincide.
ALIKE = 0.97


def effects_page(effects: PromptEffects, card: RunCard) -> Page:
    """Return the page of ``chiasm prompts explain``."""
    metric = METRIC_NAMES.get(effects.metric or "", "")
    suspicious = effects.faults or effects.inverted or effects.inverted_options
    sections = [_faults(effects)] if suspicious else []
    problems = list(dict.fromkeys(e.problem for e in effects.effects))
    for name in problems:
        sections.append(_effects_of(name, effects, metric))
    sections.append(_directions(effects))
    key = [
        KeyNumber(f"{metric}, {name}", score, "plain ensemble") for name, score in list(effects.ensemble.items())[:5]
    ]
    known = "with the truth of each" if effects.metric else "without a truth: only how answers move is known"
    return Page(
        "What each prompt does",
        f"{effects.rows:,} images of {effects.patients:,} patients, {known}.",
        tuple(key),
        (*sections, card.section()),
        _footer(),
    )


def search_page(search: PromptSearch, card: RunCard) -> Page:
    """Return the page of ``chiasm prompts search``."""
    metric = METRIC_NAMES[search.metric]
    whole = f"mean {metric}" if len(search.problems) > 1 else metric
    reselected = [p.reselected[1] for p in search.problems if math.isfinite(p.reselected[1])]
    key = (
        KeyNumber(f"{whole}, chosen prompts", search.test, "patients that chose nothing"),
        KeyNumber(f"{whole}, all prompts", search.test_plain, "the plain ensemble, same patients"),
        KeyNumber("gain", _bare(search.difference), f"p {_p(search.p_value, equal=True)}"),
        KeyNumber("optimism", _plain(search.optimism, search.choose_rows), "score where chosen less score elsewhere"),
    )
    found = search.difference
    verdict = (
        "The search helps: the whole interval of the gain lies above 0."
        if found.low > 0
        else "The search harms: the whole interval of the gain lies below 0. Use all prompts."
        if found.high < 0
        else "No gain is shown: the interval of the gain holds 0. The plain ensemble is the safer choice."
    )
    singles = {p.name: [(s.validation, s.test) for s in p.singles] for p in search.problems}
    arms = {p.name: {"chosen": p.test, "all prompts": p.test_plain} for p in search.problems}
    blocks: list[Block] = [
        Note(verdict),
        Figure(
            arms_per_label(arms, xlabel=metric),
            f"{metric} on {search.test_patients:,} patients that chose nothing, with 95 % intervals.",
        ),
    ]
    if any(singles.values()):
        blocks.append(
            Figure(
                validation_against_test(singles, metric=metric),
                "Every template and every name on its own. Far from the dashed line, the patients that choose mislead.",
            )
        )
    sections = (
        Section("What the choice is worth", "The chosen prompts beside the plain ensemble of all.", tuple(blocks)),
        Section("What was chosen", "On the patients that choose, label by label.", (_chosen(search, metric),)),
        Section(
            "How much of it is luck",
            f"The {search.choose_patients:,} patients that choose were drawn again with replacement, and the search run anew.",
            (_luck(search, reselected), _shares(search)),
        ),
        card.section(),
    )
    return Page(
        "A search for prompts",
        f"{search.choose_rows:,} images of {search.choose_patients:,} patients chose; {search.test_rows:,} images of "
        f"{search.test_patients:,} others scored.",
        key,
        sections,
        _footer(),
    )


def tuning_page(
    tuned: TunedPrompts, scores: TuningScores, words: Mapping[str, Sequence[Sequence[str]]], card: RunCard
) -> Page:
    """Return the page of ``chiasm prompts tune``."""
    key = [KeyNumber(f"{scores.metric}, {arm.name}", arm.whole, f"{scores.patients:,} patients") for arm in scores.arms]
    key += [
        KeyNumber(f"gain over {name}", _bare(d), f"p {_p(scores.p_values[name], equal=True)}")
        for name, d in scores.differences.items()
    ]
    arms = {label: {a.name: a.per_label[label] for a in scores.arms} for label in scores.arms[0].per_label}
    drawn = arms or {scores.metric: {a.name: a.whole for a in scores.arms}}
    blocks: list[Block] = [
        Figure(
            arms_per_label(drawn, xlabel="AUROC" if arms else scores.metric),
            f"On {scores.patients:,} patients that taught nothing, with 95 % intervals.",
        )
    ]
    for other, tests in scores.findings.items():
        rows = tuple(
            (
                label,
                t.difference,
                _p(t.p_raw),
                _p(t.p),
            )
            for label, t in tests.items()
        )
        blocks.append(Table(("label", f"learned less {other}", "p", "p, Holm"), rows, "Paired, on the same patients."))
    if scores.majority is not None:
        blocks.append(Note(f"Always saying the most frequent class is right in {scores.majority:.3f} of the images."))
    learned: list[Block] = []
    if len(tuned.history) > 1:
        learned.append(
            Figure(
                losses(tuned.history, tuned.best_epoch), "The epoch with the lowest loss on held-out patients is kept."
            )
        )
    near_rows = tuple(
        (side, k + 1, ", ".join(near)) for side, vectors in words.items() for k, near in enumerate(vectors)
    )
    if near_rows:
        learned.append(
            Table(
                ("side", "vector", "nearest token"),
                near_rows,
                "Nearness explains nothing: learned vectors lie between words.",
            )
        )
    config = tuned.config
    start = (
        f"{config.vectors} vectors that start as noise"
        if config.vectors
        else "vectors that start as " + " / ".join(f"“{s}”" for s in config.starts)
    )
    intro = f"{start}{', one set a class' if config.class_specific else ''}; {tuned.rows[0]:,} images taught, {tuned.rows[1]:,} chose the epoch."
    return Page(
        "Learned prompts",
        f"Vectors in front of the class name, learned through the frozen text tower; scored on {scores.rows:,} images of "
        f"{scores.patients:,} patients.",
        tuple(key),
        (
            Section("What learning is worth", "The learned prompts beside prompts in words.", tuple(blocks)),
            Section("What was learned", intro, tuple(learned)),
            card.section(),
        ),
        _footer(),
    )


def _footer() -> tuple[str, ...]:
    return (f"chiasm {chiasm.__version__}.", "Research and teaching only; not a medical device.")


def _bare(value: Interval) -> Interval:
    """Return a difference without its chance, which is 0."""
    return Interval(value.value, value.low, value.high, value.n)


def _p(value: float, *, equal: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{'= ' * equal}{value:.3f}"


def _plain(value: float, n: int) -> Interval:
    return Interval(value, math.nan, math.nan, n)


def _faults(effects: PromptEffects) -> Section:
    blocks: list[Block] = []
    if effects.inverted:
        named = ", ".join(f"“{name}”" for name in effects.inverted)
        text = f"The whole interval of {named} lies below chance: the prompts say the opposite of the label."
        blocks.append(Note(text, "warning"))
    if effects.faults:
        rows = tuple((f.label, f.kind, f.text, f.advice) for f in effects.faults)
        blocks.append(Table(("label", "suspicion", "prompt", "instead"), rows))
    if effects.inverted_options:
        found = tuple((e.problem, e.kind, e.option, str(e.alone)) for e in effects.inverted_options)
        caption = "Alone, these say the opposite of their label to this model; without them the ensemble may be better."
        blocks.append(Table(("label", "kind", "option", "alone"), found, caption))
    return Section(
        "Look here first", "Prompts that say, or seem to say, something else than their label.", tuple(blocks)
    )


def _effects_of(name: str, effects: PromptEffects, metric: str) -> Section:
    found = effects.of(name)
    blocks: list[Block] = []
    drawn = {"all together": effects.ensemble[name]} if name in effects.ensemble else {}
    for e in found:
        if e.alone is not None:
            name_of = short(f"{e.kind}: {e.option}")
            while name_of in drawn:  # two options that begin alike stay two dots
                name_of += "′"
            drawn[name_of] = e.alone
    if len(drawn) > 1:
        blocks.append(
            Figure(
                interval_dots(drawn, xlabel=f"{metric} of each option alone"), f"{name}: 95 % intervals over patients."
            )
        )
    columns = (
        "kind",
        "option",
        "such as",
        "alone",
        "loss without it",
        "answers changed",
        "rank correlation",
        "logit shift",
        "cosine",
    )
    blocks.append(Table(columns, tuple(_row(e) for e in found), "Changes are against the ensemble of all options. "
                        "“Loss without it” above 0: the option helps the ensemble."))  # fmt: skip
    most = effects.majority.get(name)
    if most is not None:
        blocks.append(Note(f"Always saying the most frequent class scores {most:.3f}."))
    return Section(
        name, "Each template and each name on its own, and what the ensemble loses without it.", tuple(blocks)
    )


def _row(e: OptionEffect) -> tuple[object, ...]:
    def number(value: float, digits: int = 2) -> str:
        return f"{value:.{digits}f}" if math.isfinite(value) else "–"

    alone = "–" if e.alone is None else str(e.alone)
    lost = "–" if e.leave_one_out is None else _signed(e.leave_one_out)
    return (
        e.kind,
        e.option,
        e.example,
        alone,
        lost,
        f"{100 * e.changed:.0f} %",
        number(e.rank_correlation),
        number(e.shift, 1),
        number(e.cosine),
    )


def _signed(value: Interval) -> str:
    if not math.isfinite(value.value):
        return "–"
    text = f"{value.value:+.3f}"
    return f"{text} [{value.low:+.3f}, {value.high:+.3f}]" if math.isfinite(value.low) else text


def _directions(effects: PromptEffects) -> Section:
    blocks: list[Block] = []
    names = effects.labels
    if len(names) > 1:
        blocks.append(Figure(cosine_matrix(effects.cosines, names), "Cosines between the labels' positive directions."))
        alike = [
            f"“{names[i]}” and “{names[j]}”"
            for i in range(len(names))
            for j in range(i)
            if effects.cosines[i][j] > ALIKE
        ]
        if alike:
            blocks.append(
                Note(f"Nearly the same direction: {'; '.join(alike[:6])}. No image can tell them apart.", "warning")
            )
    if effects.negative_cosines:
        rows = tuple((name, f"{value:.3f}") for name, value in effects.negative_cosines.items())
        blocks.append(
            Table(("label", "cosine of presence with absence"), rows, "Near 1: the model hardly hears the negation.")
        )
    return Section("Directions", "How far apart the labels lie in the space, whatever the images.", tuple(blocks))


def _chosen(search: PromptSearch, metric: str) -> Table:
    rows = []
    for p in search.problems:
        names = (
            "; ".join(f"{', '.join(n)}" for n in p.synonyms.values())
            if len(p.synonyms) == 1
            else "; ".join(f"{k}: {', '.join(n)}" for k, n in p.synonyms.items())
        )
        p_value = _p(p.difference.p)
        rows.append(
            (
                p.name,
                " | ".join(p.templates),
                names,
                str(p.validation),
                str(p.test),
                str(p.test_plain),
                _signed(p.difference.difference),
                p_value,
            )
        )
    columns = (
        "label",
        "templates",
        "names",
        f"{metric} where chosen",
        "on others",
        "all prompts, on others",
        "gain",
        "p, Holm",
    )
    return Table(columns, tuple(rows), "A label whose patients that choose are all of one kind keeps all prompts.")


def _luck(search: PromptSearch, reselected: Sequence[float]) -> Table:
    rows = []
    for p in search.problems:
        spread = [s.test for s in p.singles if math.isfinite(s.test)]
        around = (
            f"{p.reselected[1]:.3f} [{p.reselected[0]:.3f}, {p.reselected[2]:.3f}]"
            if math.isfinite(p.reselected[1])
            else "–"
        )
        rows.append(
            (
                p.name,
                f"{p.tried:,} of {p.candidates:,}",
                "–" if not math.isfinite(p.winner_share) else f"{100 * p.winner_share:.0f} %",
                p.winners or "–",
                around,
                _signed(p.optimism),
                f"{min(spread):.3f} to {max(spread):.3f}" if spread else "–",
            )
        )
    columns = (
        "label",
        "choices tried",
        "same winner",
        "winners",
        "winners on others",
        "optimism",
        "single options on others",
    )
    caption = "“Winners on others”: median, 5th and 95th percentile over the redraws."
    if reselected:
        caption += f" Their median, mean over labels: {sum(reselected) / len(reselected):.3f}."
    return Table(columns, tuple(rows), caption)


def _shares(search: PromptSearch) -> Table:
    rows = [
        (p.name, option, f"{100 * share:.0f} %")
        for p in search.problems
        for option, share in p.option_share.items()
        if math.isfinite(share)
    ]
    return Table(
        ("label", "option", "among the winners"), tuple(rows), "How often the winner of a redraw has the option."
    )
