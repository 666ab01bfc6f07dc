"""The rule in made cases: each outcome, its words, and what must not be claimed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chiasm.evaluate.distill_verdict import MAIN_QUESTIONS, points, spoken_p, verdict
from chiasm.metrics.paired import SeedDifference, seed_difference
from chiasm.types import Interval

UP = (0.05, 0.06, 0.055, 0.052, 0.058)
DOWN = tuple(-x for x in UP)
FLAT = (0.01, -0.02, 0.015, -0.01, 0.0)


def difference(values: tuple[float, ...], joint: tuple[float, float] | None = None) -> SeedDifference:
    found = seed_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    return replace(found, patients=None if joint is None else Interval(found.value, *joint, 100))


def case(**changed: SeedDifference | None) -> dict[str, SeedDifference]:
    """Everything speaks for the text, but for what is changed (None: that arm was not run)."""
    base: dict[str, SeedDifference | None] = {
        "unimodal": difference(UP),
        "lambda0": difference(UP),
        "shuffled": difference(UP),
        "random_text": difference(UP),
    }
    found = {f"clip_it-{n}": d for n, d in (base | changed).items() if n != "shuffled_lambda0" and d is not None}
    extra = changed.get("shuffled_lambda0", difference(FLAT))
    return found | ({"shuffled-lambda0": extra} if extra is not None else {})


def test_text_helped() -> None:
    found = verdict(case(), values={"clip_it": 0.864})
    assert (found.outcome, found.headline) == ("helped", "Text helped")
    assert (
        "86.4 % balanced accuracy: +5.5 points [+5.0, +6.0], p < 0.001, against CLIP-IT without text" in found.sentence
    )
    assert "5 seeds, 95 % intervals" in found.sentence
    assert "shuffled reports (+5.5 points" in found.sentence


@pytest.mark.parametrize(
    ("changed", "outcome", "words"),
    [
        ({"lambda0": difference(FLAT)}, "not_the_text", "Over CLIP-IT without text it is only -0.1 points"),
        ({"shuffled": difference(FLAT)}, "not_the_text", "dealt out at random"),
        ({"random_text": difference(FLAT)}, "not_the_text", "which images share a report"),
        ({"shuffled": difference(DOWN)}, "not_the_text", "not shown to be above shuffled reports"),
        ({"shuffled": None, "shuffled_lambda0": None}, "cannot_say", "Shuffled reports were not run"),
        ({"random_text": None}, "helped", "Random vectors were not run"),
        ({"shuffled_lambda0": difference(UP)}, "helped", "Part of the gain needs no meaning"),
        ({"unimodal": difference(FLAT)}, "no_difference_shown", "makes up for what the additional heads cost"),
        ({"unimodal": difference(FLAT), "lambda0": difference(FLAT)}, "no_difference_shown", "less than about 1.8 points"),
        ({"lambda0": difference(DOWN)}, "hurt", "-5.5 points"),
        ({"lambda0": difference(DOWN), "unimodal": difference(DOWN)}, "hurt", "-5.5 points"),
        ({"unimodal": difference(DOWN)}, "worse_than_unimodal", "against images only"),
        ({"lambda0": None}, "cannot_say", "`clip_it` and `lambda0` were not run"),
        ({"lambda0": None, "unimodal": None}, "cannot_say", "`lambda0` and `unimodal` were not run"),
        ({"lambda0": difference((0.3,)), "unimodal": difference((0.3,))}, "cannot_say", "One seed proves nothing"),
        ({"lambda0": difference(()), "unimodal": difference(())}, "cannot_say", "no seed in common"),
    ],
)  # fmt: skip
def test_outcomes(changed: dict[str, SeedDifference | None], outcome: str, words: str) -> None:
    found = verdict(case(**changed))
    assert found.outcome == outcome
    assert words in found.sentence
    assert found.sentence.startswith(found.headline)
    assert "nan" not in found.sentence
    assert "diagnos" not in found.sentence.lower()
    assert ("Text helped" in found.sentence) == (outcome == "helped")


def test_other_patients_can_take_the_claim_back() -> None:
    """Sure over seeds, unsure over patients: the claim is about these patients only."""
    here = case(lambda0=difference(UP, (-0.02, 0.12)), unimodal=difference(UP, (0.01, 0.1)))
    found = verdict(here)
    assert found.outcome == "these_patients_only"
    assert "[-2.0, +12.0] against CLIP-IT without text" in found.sentence
    sure = verdict(case(lambda0=difference(UP, (0.02, 0.12)), unimodal=difference(UP, (0.01, 0.1))))
    assert sure.outcome == "helped"
    assert "With patients drawn anew as well, the intervals are [+2.0, +12.0]" in sure.sentence
    nothing = difference(UP, (float("nan"), float("nan")))  # one patient in the test set
    unknown = verdict(case(lambda0=nothing, unimodal=nothing))
    assert unknown.outcome == "these_patients_only"
    assert "too few patients" in unknown.sentence
    assert "nan" not in unknown.sentence


def test_corrected_p_values_decide_not_raw_ones() -> None:
    """The trap: p = 0.04 alone is not enough among five questions."""
    weak = difference((0.06, 0.012, 0.022, 0.065, 0.015))
    assert 0.025 < weak.p_raw < 0.05
    changed = {name.removeprefix("clip_it-"): weak for name in MAIN_QUESTIONS if name.startswith("clip_it")}
    found = verdict(case(**changed, shuffled_lambda0=weak))
    assert found.outcome == "no_difference_shown"
    # p values that somebody corrected for fewer questions do not pass.
    sneaky = {name: replace(d, p=d.p_raw) for name, d in case(**changed, shuffled_lambda0=weak).items()}
    assert verdict(sneaky) == found


def test_few_seeds_and_seeds_that_change_nothing_are_said() -> None:
    few = (0.05, 0.0501, 0.0502)
    found = verdict(case(**{n: difference(few) for n in ("unimodal", "lambda0", "shuffled", "random_text")}))
    assert found.outcome == "helped"
    assert "Only 3 seeds" in found.sentence
    same = verdict(case(**{n: difference((0.1,) * 5) for n in ("unimodal", "lambda0", "shuffled", "random_text")}))
    assert same.outcome == "no_difference_shown"
    assert "the seeds change nothing" in same.sentence


def test_numbers_in_words() -> None:
    assert points(0.0312) == "+3.1"
    assert points(-0.0312) == "-3.1"
    assert (spoken_p(0.0123), spoken_p(1e-9), spoken_p(float("nan"))) == ("p = 0.012", "p < 0.001", "p unknown")
