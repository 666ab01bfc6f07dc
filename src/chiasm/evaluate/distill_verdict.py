"""Differences between arms to one plain statement: did the text help, did something else, or is nothing shown?

Comes in: paired differences of balanced accuracy, named ``more-less`` after their arms. Goes out: an outcome, a headline and
sentences with numbers in percentage points. The rule is fixed here, before any result is seen; nothing is tuned.

The rule, with "above" meaning: the mean over seeds is above 0, its Holm-corrected p is below 0.05, and the joint interval
over seeds and patients, where the seeds share a test set, lies above 0 (one that cannot be computed does not):

1. an arm that is needed is absent, or fewer than two seeds: ``cannot_say``;
2. CLIP-IT is below itself without text: ``hurt``; only below images only: ``worse_than_unimodal``;
3. CLIP-IT is above images only and above itself without text, and above shuffled reports and random vectors: ``helped``;
   not above one of the last two: ``not_the_text``; shuffled reports were not run: ``cannot_say``;
4. CLIP-IT is above images only, but not above itself without text: ``not_the_text``;
5. the intervals over seeds are above 0, the joint ones are not: ``these_patients_only``;
6. anything else: ``no_difference_shown``, with the size of what could have been seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from chiasm.metrics.paired import SeedDifference, correct

Outcome = Literal[
    "helped", "not_the_text", "these_patients_only", "no_difference_shown", "worse_than_unimodal", "hurt", "cannot_say"
]
_State = Literal["above", "above_here", "open", "below", "unknown"]

MAIN_QUESTIONS = (
    "clip_it-unimodal",
    "clip_it-lambda0",
    "clip_it-shuffled",
    "clip_it-random_text",
    "shuffled-lambda0",
)
"""The differences that the verdict rests on; their p values are corrected together, all others among themselves."""

ENOUGH_SEEDS = 5
FEW_GROUPS = 10

SPOKEN = {
    "unimodal": "images only",
    "unimodal_lora": "images only with LoRA",
    "lambda0": "CLIP-IT without text",
    "clip_it": "CLIP-IT",
    "shuffled": "shuffled reports",
    "random_text": "random vectors",
    "prompt_text": "class names as text",
    "paired": "the images' own reports",
    "label_leak": "the true label as text",
    "no_warm_start": "CLIP-IT with a cold text head",
    "late_fusion": "text at test time",
}
"""Arms as sentences, tables and figures call them."""


@dataclass(frozen=True)
class Verdict:
    """What the controls say about the text.

    Attributes:
        outcome: One of a fixed list, for programs.
        headline: A few words, for titles.
        reasons: Sentences with numbers in percentage points of balanced accuracy, the most important first.
    """

    outcome: Outcome
    headline: str
    reasons: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Everything that a reader must know: headline and reasons."""
        return " ".join([f"{self.headline}.", *self.reasons])


def verdict(
    differences: Mapping[str, SeedDifference],
    *,
    values: Mapping[str, float] | None = None,
    level: float = 0.95,
    questions: Sequence[str] = MAIN_QUESTIONS,
) -> Verdict:
    """Return what the differences say about the text; the rule stands at the head of this module.

    Args:
        differences: ``clip_it-lambda0`` and so on: differences of balanced accuracy, as fractions of 1.
        values: Arm -> balanced accuracy, for the sentence.
        level: 1 - α; corrected p values must be below α.
        questions: Differences whose p values are corrected together.
    """
    corrected = correct(differences, [questions])
    states = {name: _state(d, 1 - level) for name, d in corrected.items()}
    text, probe = states.get("clip_it-lambda0"), states.get("clip_it-unimodal")
    if text is None or probe is None:
        missing = " and ".join(f"`{n}`" for n in ("lambda0", "unimodal") if f"clip_it-{n}" not in states)
        return Verdict(
            "cannot_say",
            "Cannot say whether text helped",
            (f"The arms `clip_it` and {missing} were not run beside each other.",),
        )
    said = _Sentences(corrected, values or {}, level)
    if "unknown" in (text, probe):
        return Verdict("cannot_say", "Cannot say whether text helped", (said.one_seed(),))
    outcome, headline, reasons = _decide(states, text, probe, said)
    return Verdict(outcome, headline, (*reasons, *said.caveats()))


def _decide(
    states: Mapping[str, _State], text: _State, probe: _State, said: _Sentences
) -> tuple[Outcome, str, list[str]]:
    both = [said.against("lambda0", "unimodal")]
    if text == "below":
        return "hurt", "Text hurt", both
    if probe == "below":
        return "worse_than_unimodal", "CLIP-IT is worse than images only", both
    if text == "above" and probe == "above":
        reached = [c for c in ("shuffled", "random_text") if states.get(f"clip_it-{c}", "above") != "above"]
        if reached:
            return "not_the_text", "The gain is not shown to be the text's", both + [said.reached(c) for c in reached]
        if "clip_it-shuffled" not in states:
            return (
                "cannot_say",
                "Better, but it cannot be said whether the text is why",
                [*both, "Shuffled reports were not run, so any vectors might do as much."],
            )
        joint = [said.joint()] if said.has_joint() else []
        return "helped", "Text helped", [*both, *said.controls(states), *joint]
    if {text, probe} <= {"above", "above_here"}:
        return "these_patients_only", "Better on these test patients, not shown for others", [*both, said.joint()]
    if probe in ("above", "above_here"):
        return (
            "not_the_text",
            "The gain is not shown to be the text's",
            [said.against("unimodal"), said.without_text(), said.could_have_seen("lambda0")],
        )
    if text in ("above", "above_here"):
        return (
            "no_difference_shown",
            "No difference to images only shown",
            [
                said.against("unimodal"),
                said.could_have_seen("unimodal"),
                f"The text makes up for what the additional heads cost ({said.number('clip_it-lambda0')} over CLIP-IT "
                "without text), not more.",
            ],
        )
    return "no_difference_shown", "No difference shown", [*both, said.could_have_seen("lambda0")]


def _state(difference: SeedDifference, alpha: float) -> _State:
    if len(difference.seeds) < 2 or not math.isfinite(difference.p):
        return "unknown"
    if difference.p >= alpha:
        return "open"
    if difference.value < 0:
        return "below"
    joint = difference.patients
    return "above_here" if joint is not None and not joint.low > 0 else "above"  # NaN: too few patients to know


class _Sentences:
    """Sentences about differences, with numbers in percentage points."""

    def __init__(self, differences: Mapping[str, SeedDifference], values: Mapping[str, float], level: float) -> None:
        self.differences, self.values, self.level = differences, values, level

    @property
    def n_seeds(self) -> int:
        return min(len(self.differences[f"clip_it-{n}"].seeds) for n in ("lambda0", "unimodal"))

    def number(self, name: str) -> str:
        """A difference as ``+3.1 points [+1.0, +5.2], p = 0.012``."""
        d = self.differences[name]
        if not math.isfinite(d.low):
            return f"{points(d.value)} points"
        return f"{points(d.value)} points [{points(d.low)}, {points(d.high)}], {spoken_p(d.p)}"

    def against(self, *others: str) -> str:
        reached = self.values.get("clip_it", math.nan)
        start = f"CLIP-IT reaches {100 * reached:.1f} % balanced accuracy" if math.isfinite(reached) else "CLIP-IT"
        parts = " and ".join(f"{self.number(f'clip_it-{o}')}, against {SPOKEN[o]}" for o in others)
        how = f"{self.n_seeds} seeds, {100 * self.level:g} % intervals over seeds, p corrected by Holm"
        return f"{start}: {parts} ({how})."

    def one_seed(self) -> str:
        run = f"Run `--seeds {ENOUGH_SEEDS}` or more."
        if self.n_seeds == 0:
            return f"CLIP-IT and its controls have no seed in common. {run}"
        found = " and ".join(
            f"{points(self.differences[f'clip_it-{o}'].value)} points against {SPOKEN[o]}"
            for o in ("lambda0", "unimodal")
        )
        return f"One seed proves nothing: CLIP-IT stands at {found}. {run}"

    def reached(self, control: str) -> str:
        why = {
            "shuffled": "reports dealt out at random may do as much, so what they say is not shown to matter",
            "random_text": "which images share a report may matter, not what the report says",
        }[control]
        return f"But CLIP-IT is not shown to be above {SPOKEN[control]} ({self.number(f'clip_it-{control}')}): {why}."

    def controls(self, states: Mapping[str, _State]) -> list[str]:
        run = [c for c in ("shuffled", "random_text") if f"clip_it-{c}" in states]
        sentences = [
            "It is above "
            + " and ".join(f"{SPOKEN[c]} ({self.number(f'clip_it-{c}')})" for c in run)
            + ", so it is what the matched reports say that helps."
        ]
        if "random_text" not in run:
            sentences.append("Random vectors were not run: the grouping of images may be part of the gain.")
        if states.get("shuffled-lambda0") in ("above", "above_here"):
            sentences.append(
                f"Part of the gain needs no meaning: shuffled reports alone bring {self.number('shuffled-lambda0')} over "
                "CLIP-IT without text."
            )
        return sentences

    def without_text(self) -> str:
        return f"Over CLIP-IT without text it is only {self.number('clip_it-lambda0')}: not shown."

    def could_have_seen(self, other: str) -> str:
        d = self.differences[f"clip_it-{other}"]
        half = 100 * (d.high - d.low) / 2
        return (
            f"With {len(d.seeds)} seeds a difference to {SPOKEN[other]} of less than about {half:.1f} points could not "
            "have been shown."
        )

    def has_joint(self) -> bool:
        joint = (self.differences[f"clip_it-{o}"].patients for o in ("lambda0", "unimodal"))
        return all(d is not None and math.isfinite(d.low) for d in joint)

    def joint(self) -> str:
        if not self.has_joint():
            return "The test set has too few patients to say anything about others."
        found = [
            f"[{points(d.patients.low)}, {points(d.patients.high)}] against {SPOKEN[o]}"
            for o in ("lambda0", "unimodal")
            if (d := self.differences[f"clip_it-{o}"]).patients is not None
        ]
        return f"With patients drawn anew as well, the intervals are {' and '.join(found)}."

    def caveats(self) -> list[str]:
        sentences = []
        if self.n_seeds < ENOUGH_SEEDS:
            sentences.append(f"Only {self.n_seeds} seeds: run {ENOUGH_SEEDS} or more.")
        scatter = [o for o in ("lambda0", "unimodal") if self.differences[f"clip_it-{o}"].std < 1e-12]
        if scatter:
            sentences.append("The difference is the same with every seed: the seeds change nothing and prove little.")
        return sentences


def points(fraction: float) -> str:
    """Return a difference of rates in percentage points, with its sign: ``+3.1``."""
    return f"{100 * fraction:+.1f}"


def spoken_p(p: float) -> str:
    """Return a p value as text: ``p = 0.012``, ``p < 0.001`` or ``p unknown``."""
    if not math.isfinite(p):
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
