"""The pages of prompts from hand-written results: every number, every wording as text, every verdict by its interval."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from chiasm.evaluate.page import render_page
from chiasm.evaluate.prompts_page import ALIKE, _p, effects_page, search_page, tuning_page
from chiasm.evaluate.run_card import RunCard
from chiasm.evaluate.tuning_scores import Arm, TuningScores
from chiasm.io.manifest import to_json
from chiasm.metrics.compare import PairedTest
from chiasm.tasks.prompt_checks import PromptFault
from chiasm.tasks.prompt_choice import ProblemSearch, PromptSearch, Single
from chiasm.tasks.prompt_effects import OptionEffect, PromptEffects
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.train.prompt_tuning import TunedPrompts
from chiasm.train.prompt_writer import TuningConfig
from chiasm.types import Interval, Space

CARD = RunCard("chiasm prompts", {"images": "abc"}, {"images": 3}, "a table", 0)
HOSTILE = "<script>{} & $\\frac</script>"
LONG = "a frontal chest radiograph of an adult patient showing {} in the"


def number(value: float, chance: float | None = 0.5) -> Interval:
    return Interval(value, value - 0.041, value + 0.042, 80, chance)


def effect(option: str, alone: float | None, **changes: Any) -> OptionEffect:
    made = OptionEffect(
        "oedema", "template", option, option.replace("{}", "oedema"), None if alone is None else number(alone),
        None if alone is None else Interval(0.013, -0.004, 0.031, 80, 0.0), 0.37, 0.82, -1.24, 0.913,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


EFFECTS = PromptEffects(
    "multi", "auroc",
    (effect("a film with {}", 0.811), effect(f"{LONG} left lung", 0.622), effect(f"{LONG} right lung", 0.733),
     effect("no {}", 0.212, leave_one_out=Interval(-0.05, -0.08, -0.02, 80, 0.0)), effect(HOSTILE, None)),
    {"oedema": number(0.844)}, {"oedema": 0.678}, ("oedema", "effusion", "nodule"),
    ((1.0, 0.981, 0.3), (0.981, 1.0, 0.2), (0.3, 0.2, 1.0)), {"oedema": 0.955},
    (PromptFault("oedema", "denying positive", "no oedema", "say that it is there"),),
    1200, 600,
)  # fmt: skip


def shown(page: Any) -> str:
    return html.unescape(re.sub(r"<svg.*?</svg>", "", render_page(page), flags=re.DOTALL))


@pytest.fixture(autouse=True)
def dots(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What goes into the drawings, without the drawing."""
    calls: dict[str, Any] = {}

    def catch(name: str) -> Any:
        def drawing(values: Any, *others: Any, **options: Any) -> str:
            calls[name] = (values, others, options)
            return "<svg></svg>"

        return drawing

    for name in ("interval_dots", "arms_per_label", "cosine_matrix", "losses", "validation_against_test"):
        monkeypatch.setattr(f"chiasm.evaluate.prompts_page.{name}", catch(name))
    return calls


@pytest.mark.parametrize(
    "said",
    [
        "1,200 images of 600 patients, with the truth of each",
        "<td>a film with {}</td><td>a film with oedema</td><td>0.811 [0.770, 0.853]</td><td>+0.013 [-0.004, +0.031]</td>"
        "<td>37 %</td><td>0.82</td><td>-1.2</td><td>0.91</td>",
        "<td>0.212 [0.171, 0.254]</td><td>-0.050 [-0.080, -0.020]</td>",
        "Always saying the most frequent class scores 0.678",
        "Nearly the same direction: “effusion” and “oedema”.",
        "<td>oedema</td><td>0.955</td>",
        "Look here first",
        "<td>oedema</td><td>denying positive</td><td>no oedema</td><td>say that it is there</td>",
        "<td>oedema</td><td>template</td><td>no {}</td><td>0.212 [0.171, 0.254]</td></tr>",
        "AUROC, oedema",
        "not a medical device",
    ],
)
def test_what_the_page_of_effects_says(said: str) -> None:
    assert said in shown(effects_page(EFFECTS, CARD))


def test_options_that_begin_alike_are_dots_of_their_own(dots: dict[str, Any]) -> None:
    effects_page(EFFECTS, CARD)
    drawn = dots["interval_dots"][0]
    assert [v.value for v in drawn.values()] == [0.844, 0.811, 0.622, 0.733, 0.212]


def test_wordings_are_text() -> None:
    page = render_page(effects_page(EFFECTS, CARD))
    assert "<script" not in page
    assert html.escape(HOSTILE) in page


def test_without_a_truth_no_score_is_claimed() -> None:
    bare = tuple(
        dataclasses.replace(e, alone=None, leave_one_out=None, rank_correlation=math.nan) for e in EFFECTS.effects
    )
    page = effects_page(
        dataclasses.replace(EFFECTS, metric=None, effects=bare, ensemble={}, majority={}, faults=()), CARD
    )
    text = shown(page)
    assert "without a truth" in text
    assert page.key_numbers == ()
    assert "AUROC" not in text
    assert "<td>–</td><td>–</td><td>37 %</td><td>–</td>" in text
    assert "Look here first" not in text


@pytest.mark.parametrize(
    ("cosine", "told"), [(ALIKE - 0.001, False), (ALIKE + 0.001, True), (1.0, True), (-1.0, False)]
)
def test_labels_that_coincide_are_named(cosine: float, told: bool) -> None:
    two = dataclasses.replace(EFFECTS, labels=("a", "b"), cosines=((1.0, cosine), (cosine, 1.0)))
    assert ("Nearly the same direction: “b” and “a”" in shown(effects_page(two, CARD))) == told


@pytest.mark.parametrize(("value", "half", "told"), [(0.4, 0.05, True), (0.4, 0.15, False), (0.6, 0.05, False)])
def test_prompts_that_say_the_opposite_are_told(value: float, half: float, told: bool) -> None:
    found = {"oedema": Interval(value, value - half, value + half, 80, 0.5)}
    text = shown(effects_page(dataclasses.replace(EFFECTS, ensemble=found), CARD))
    assert ("the prompts say the opposite of the label" in text) == told


def paired(value: float, p: float) -> PairedTest:
    return PairedTest(0.8, 0.8 - value, Interval(value, value - 0.02, value + 0.02, 80, 0.0), p, p / 2,
                      "delong_clustered", "delong_clustered", 40)  # fmt: skip


def problem(name: str, value: float, p: float, **changes: Any) -> ProblemSearch:
    made = ProblemSearch(
        name, ("{}", "a film with {}"), {name: (name, "water")}, PromptSet((LabelPrompts(name, (name,)),)), 45, 21, True,
        number(value + 0.05), number(value), number(value), number(value - 0.04), paired(0.04, p),
        Interval(0.051, -0.012, 0.118, 160, 0.0), (0.611, 0.655, 0.699), 0.62, 7, {"{}": 0.44, "a film with {}": math.nan},
        (Single("{}", "template", 0.7, 0.566), Single("water", "synonym", 0.6, 0.777)),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


SEARCH = PromptSearch(
    "multi", "auroc", (problem("oedema", 0.822, 0.031), problem(HOSTILE, 0.733, 0.0002)), PromptSet((LabelPrompts("oedema", ("oedema",)),)), PromptSet((LabelPrompts("oedema", ("oedema",)),)),
    number(0.777), number(0.744), Interval(0.033, -0.011, 0.077, 80, 0.0), 0.145, 0.0512, 400, 380, 200, 190,
)  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        "400 images of 200 patients chose; 380 images of 190 others scored",
        "<td>oedema</td><td>{} | a film with {}</td><td>oedema, water</td><td>0.872 [0.831, 0.914]</td>"
        "<td>0.822 [0.781, 0.864]</td><td>0.782 [0.741, 0.824]</td><td>+0.040 [+0.020, +0.060]</td><td>0.031</td>",
        "<td>&lt; 0.001</td>",
        "<td>21 of 45</td><td>62 %</td><td>7</td><td>0.655 [0.611, 0.699]</td><td>+0.051 [-0.012, +0.118]</td>"
        "<td>0.566 to 0.777</td>",
        "Their median, mean over labels: 0.655",
        "<td>oedema</td><td>{}</td><td>44 %</td>",
        "The 200 patients that choose were drawn again",
        "p = 0.145",
        "score where chosen less score elsewhere",
    ],
)
def test_what_the_page_of_a_search_says(said: str) -> None:
    assert html.unescape(said) in shown(search_page(SEARCH, CARD))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.07, "The search helps"),
        (-0.01, 0.07, "No gain is shown"),
        (0.0, 0.07, "No gain is shown"),
        (-0.07, 0.0, "No gain is shown"),
        (-0.07, -0.01, "The search harms"),
        (math.nan, math.nan, "No gain is shown"),
    ],
)
def test_the_verdict_is_that_of_the_interval(low: float, high: float, said: str) -> None:
    found = dataclasses.replace(SEARCH, difference=Interval(0.03, low, high, 80, 0.0))
    text = shown(search_page(found, CARD))
    assert [v for v in ("The search helps", "The search harms", "No gain is shown") if v in text] == [said]


def test_a_search_without_redraws_claims_no_luck(dots: dict[str, Any]) -> None:
    nothing = (math.nan, math.nan, math.nan)
    bare = problem("oedema", 0.8, math.nan, reselected=nothing, winner_share=math.nan, winners=0, singles=(),
                   option_share={"{}": math.nan})  # fmt: skip
    text = shown(search_page(dataclasses.replace(SEARCH, problems=(bare,), p_value=math.nan), CARD))
    assert "<td>21 of 45</td><td>–</td><td>–</td><td>–</td>" in text
    assert "Their median" not in text
    assert "nan" not in text
    assert "validation_against_test" not in dots


def test_points_of_the_figure_are_validation_and_test(dots: dict[str, Any]) -> None:
    page = render_page(search_page(SEARCH, CARD))
    assert dots["validation_against_test"][0]["oedema"] == [(0.7, 0.566), (0.6, 0.777)]
    arms: Mapping[str, Any] = dots["arms_per_label"][0]
    assert list(arms) == ["oedema", HOSTILE]
    assert [arms["oedema"][k].value for k in ("chosen", "all prompts")] == pytest.approx([0.822, 0.782])
    assert "<script" not in page


def test_the_document_of_a_search_is_plain() -> None:
    document = json.loads(to_json(SEARCH.to_dict()))
    first = document["problems"][0]
    assert first["optimism"]["low"] == -0.012
    assert first["option_share"] == {"{}": 0.44, "a film with {}": None}
    assert first["singles"][1] == {"option": "water", "kind": "synonym", "validation": 0.6, "test": 0.777}
    assert document["prompts"]["labels"]


def tuned(**config: Any) -> TunedPrompts:
    directions = np.eye(4, dtype=np.float32)[:2]
    history = tuple({"train_loss": 1.0 / k, "validation_loss": 1.1 / k} for k in range(1, 4))
    return TunedPrompts(("a", "b"), ("a", "b"), TuningConfig(mode="multi", **config), {}, directions, -directions,
                        Space("toy", "w", "p", 4), 20.0, None, history, 2, (3000, 1000))  # fmt: skip


ARMS = (
    Arm("learned", number(0.812), {"a": number(0.821), "b": number(0.803)}),
    Arm("all prompts", number(0.755), {"a": number(0.764), "b": number(0.746)}),
)
TUNING = TuningScores(
    "multi", "macro AUROC", ARMS, {"all prompts": Interval(0.057, 0.012, 0.101, 80, 0.0)}, {"all prompts": 0.0123},
    {"all prompts": {"a": paired(0.057, 0.044), "b": paired(-0.031, math.nan)}}, None, 900, 450,
)  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        "scored on 900 images of 450 patients",
        "macro AUROC, learned",
        "p = 0.012",
        "<td>a</td><td>0.057 [0.037, 0.077]</td><td>0.022</td><td>0.044</td>",
        "<td>b</td><td>-0.031 [-0.051, -0.011]</td><td>–</td><td>–</td>",
        "3,000 images taught, 1,000 chose the epoch",
        "<td>positive</td><td>1</td><td><b>bold</b>, no</td>",
        "<td>positive</td><td>2</td><td>film</td>",
    ],
)
def test_what_the_page_of_learned_prompts_says(said: str) -> None:
    words = {"positive": [["<b>bold</b>", "no"], ["film"]]}
    page = tuning_page(tuned(), TUNING, words, CARD)
    assert said in shown(page)
    assert "<b>bold" not in render_page(page)
    values = [k.interval.value for k in page.key_numbers]
    assert values == [0.812, 0.755, 0.057]


@pytest.mark.parametrize(
    ("config", "said"),
    [({"vectors": 4}, "4 vectors that start as noise"), ({}, "vectors that start as “"),
     ({"vectors": 2, "class_specific": True}, "one set a class")],
)  # fmt: skip
def test_the_start_is_told(config: dict[str, Any], said: str) -> None:
    assert said in shown(tuning_page(tuned(**config), TUNING, {}, CARD))


def test_classes_have_their_majority_and_one_row_of_arms(dots: dict[str, Any]) -> None:
    arms = tuple(dataclasses.replace(a, per_label={}) for a in ARMS)
    classes = dataclasses.replace(
        TUNING, mode="single", metric="balanced accuracy", arms=arms, findings={}, majority=0.631
    )
    text = shown(tuning_page(tuned(), classes, {}, CARD))
    assert "right in 0.631 of the images" in text
    values, _, options = dots["arms_per_label"]
    assert list(values) == ["balanced accuracy"]
    assert options["xlabel"] == "balanced accuracy"
    assert dots["losses"][1] == (2,)
    json.dumps(classes.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("value", "alone", "equal"),
    [(0.5, "0.500", "= 0.500"), (0.0042, "0.004", "= 0.004"), (0.001, "0.001", "= 0.001"), (0.0009, "< 0.001", "< 0.001"),
     (0.0, "< 0.001", "< 0.001"), (1.0, "1.000", "= 1.000"), (math.nan, "–", "–")],
)  # fmt: skip
def test_p_values_are_never_nought(value: float, alone: str, equal: str) -> None:
    assert (_p(value), _p(value, equal=True)) == (alone, equal)
