"""The page of survival scores made by hand: every number stands on it, in its unit, and what is not known is a dash."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError
from chiasm.evaluate.page import Page, Table, render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.evaluate.survival_figures import auc_over_time, calibration_points, survival_curves
from chiasm.evaluate.survival_page import _choice, _p, _signed, _time, survival_page
from chiasm.evaluate.survival_scores import (
    NOTHING,
    CalibrationPoint,
    ModelScore,
    RiskGroup,
    SurvivalScores,
    _calibration,
    _grid,
    _risk_groups,
    _ticks,
    comparison_to_dict,
)
from chiasm.metrics.bootstrap import Comparison
from chiasm.metrics.concordance import usable_tau
from chiasm.metrics.survival import LogRank, kaplan_meier
from chiasm.tasks.survival import OutOfFold, SurvivalData
from chiasm.types import Interval

NAN = math.nan
CARD = RunCard("chiasm survival", {"images": "0123456789ab"}, {"images": 12}, "m@w.p/3", 7, settings={"folds": 3})


def interval(value: float, n: int = 12, chance: float | None = 0.5) -> Interval:
    return Interval(value, value - 0.011, value + 0.022, n, chance)


def model(start: float, columns: int = 3, chosen: tuple[dict[str, Any], ...] = ()) -> ModelScore:
    """Numbers that are all different: 0.x01, 0.x02, ..."""
    return ModelScore(
        columns, interval(start + 0.001), interval(start + 0.002), (interval(start + 0.003), interval(start + 0.004)),
        start + 0.005, interval(start + 0.006, chance=None), chosen,
    )  # fmt: skip


def group(name: str, times: list[float], events: list[int], at_risk: tuple[int, ...]) -> RiskGroup:
    return RiskGroup(name, kaplan_meier(times, events), at_risk, sum(events))


LOW = group("low risk", [4, 5, 6, 7, 8, 9], [0, 0, 1, 0, 0, 0], (6, 5))
HIGH = group("high risk", [1, 2, 3, 4, 5, 6], [1, 1, 1, 0, 1, 0], (6, 2))


def scores(**changes: Any) -> SurvivalScores:
    values: dict[str, Any] = {
        "method": "coxnet", "unit": "months", "patients": 12, "rows": 19, "events": 5,
        "follow_up": Interval(7.25, 6, 9, 12), "tau": 5.5, "grid": (2.0, 4.5),
        "models": {
            "image + clinical:age": model(0.7, 4, ({"alpha": 0.0421, "components": None}, {"alpha": 0.5, "components": 16})),
            "image": model(0.6), NOTHING: dataclasses.replace(model(0.2, 0), auc=()),
        },
        "gains": {"image": Comparison(interval(0.101, chance=None), 0.0321), NOTHING: Comparison(interval(-0.202), 0.0001)},
        "brier_gain": Comparison(Interval(-0.031, -0.04, -0.02, 12), 0.012), "ticks": (0.0, 5.0), "end": 8.0,
        "groups": (LOW, HIGH), "separation": LogRank(6.54, 1, 0.0105, {"0": 1.0, "1": 4.0}, {"0": 3.2, "1": 1.8}, 3),
        "horizon": 1.5,
        "calibration": (CalibrationPoint(0.123, interval(0.234, 5)), CalibrationPoint(0.456, interval(0.567, 7))),
        "warnings": ("few <b>events</b>",), "folds": 3,
        "first": OutOfFold(np.zeros(12), np.zeros(12, np.int64), np.array([1.5]), np.ones((12, 1)), np.zeros(12, np.int64)),
    }  # fmt: skip
    return SurvivalScores(**{**values, **changes})


def plain(page: Page) -> str:
    """Return the words of a page, without drawings and marks."""
    text = re.sub(r"<svg.*?</svg>", " ", render_page(page), flags=re.DOTALL)
    text = re.sub(r"<style>.*?</style>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text)))


def tables(page: Page) -> list[Table]:
    return [b for s in page.sections for b in s.blocks if isinstance(b, Table)]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawings out: they take most of the time of a page."""
    for name in ("survival_curves", "auc_over_time", "calibration_points", "interval_dots"):
        monkeypatch.setattr(f"chiasm.evaluate.survival_page.{name}", lambda *_, **__: "<svg></svg>")


def test_every_number_of_the_json_stands_on_the_page() -> None:
    found = scores()
    text = plain(survival_page(found, CARD))
    for name, m in found.models.items():
        assert name in text
        for number in (m.harrell, m.uno, m.brier, *m.auc):
            assert str(number) in text, f"{number} of {name}"
        assert f"{m.mean_auc:.3f}" in text
    for point in found.calibration:
        assert f"{point.observed.n} {point.predicted:.3f} {point.observed}" in text
    for gain in (*found.gains.values(), found.brier_gain):
        assert str(gain.difference) in text
    for words in ("12 (of 19 rows)", "5 (42% of patients", "7.25 months", "up to 5.5 months", "χ² = 6.5, 1 degree of freedom",
                  "p = 0.0", "Calibration at 1.5 months", "few <b>events</b>"):  # fmt: skip
        assert words in text, words
    assert "low risk 6 1 not reached" in text
    assert "high risk 6 4 3 months" in text
    assert "m@w.p/3" in text
    assert CARD.digest in text


def test_the_json_is_strict_and_has_all_parts() -> None:
    document = json.loads(json.dumps(scores().to_dict(), allow_nan=False))
    assert set(document) == {
        "method", "unit", "patients", "rows", "events", "tau", "horizon", "folds", "follow_up", "grid", "models", "gains",
        "brier_gain", "risk_groups", "log_rank", "calibration", "warnings",
    }  # fmt: skip
    assert document["models"]["image"]["harrell"] == {
        "value": 0.601,
        "low": 0.59,
        "high": 0.623,
        "n": 12,
        "chance": 0.5,
    }
    assert document["risk_groups"][1] == {
        "name": "high risk",
        "patients": 6,
        "events": 4,
        "median": HIGH.curve.median.to_dict(),
    }
    assert document["log_rank"]["expected"] == {"0": 3.2, "1": 1.8}
    assert [p["predicted"] for p in document["calibration"]] == [0.123, 0.456]
    assert document["gains"]["image"]["p"] == 0.0321


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"separation": None}, "All patients have one risk"),
        ({"separation": LogRank(NAN, 1, NAN, {}, {})}, "p not defined"),
        ({"separation": LogRank(30.0, 2, 1e-7, {}, {})}, "2 degrees of freedom, p < 0.001"),
        ({"follow_up": Interval(NAN, NAN, NAN, 12)}, "not reached (reverse"),
        ({"horizon": 0.4, "unit": "years"}, "Calibration at 0.4 years"),
        ({"horizon": 1234.6, "unit": "days"}, "Calibration at 1,235 days"),
        ({"tau": 2.46, "unit": "years"}, "up to 2.46 years"),
        ({"method": "forest"}, "A random survival forest on image"),
        ({"method": "own"}, "Own on image"),
        ({"brier_gain": Comparison(Interval(0.01, 0.0, 0.02, 9), 0.5)}, "no better than that"),
        ({"brier_gain": Comparison(Interval(-0.01, -0.02, 0.0, 9), NAN)}, "p not defined"),
        ({"calibration": (CalibrationPoint(0.5, Interval(NAN, NAN, NAN, 4)),)}, "4 0.500 –"),
        ({"patients": 12345, "rows": 23456}, "12,345 (of 23,456 rows)"),
    ],
)
def test_what_is_odd_is_said_in_words(changes: dict[str, Any], words: str) -> None:
    text = plain(survival_page(scores(**changes), CARD))
    assert words in text
    assert "nan" not in text.lower()


def test_hostile_names_are_escaped() -> None:
    hostile = "<script>alert(1)</script>$x_$&"
    found = scores(models={hostile: model(0.7), NOTHING: dataclasses.replace(model(0.2, 0), auc=())})
    page = render_page(survival_page(found, CARD, source=hostile))
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.usefixtures("undrawn")
def test_the_title_names_the_source_only_where_there_is_one() -> None:
    assert survival_page(scores(), CARD).title == "Survival from embeddings"
    assert survival_page(scores(), CARD, source="films").title == "Survival from films"


@pytest.mark.usefixtures("undrawn")
def test_only_features_have_auc_and_choices() -> None:
    every = tables(survival_page(scores(), CARD))
    over_time = next(t for t in every if t.columns[0] == "event until")
    assert over_time.columns == ("event until", "image + clinical:age", "image")
    assert [row[0] for row in over_time.rows] == ["2 months", "4.5 months"]
    assert [row[2] for row in over_time.rows] == list(scores().models["image"].auc)
    chosen = next(t for t in every if t.columns == ("features", "fold", "choice"))
    assert chosen.rows == (
        ("image + clinical:age", "1", "alpha 0.0421; components none"),
        ("image + clinical:age", "2", "alpha 0.5; components 16"),
    )


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.04, "years", "0.04 years"),
        (1.5, "years", "1.5 years"),
        (99.4, "months", "99.4 months"),
        (100.6, "days", "101 days"),
        (4321.0, "days", "4,321 days"),
        (NAN, "days", "not reached"),
        (math.inf, "days", "not reached"),
    ],
)
def test_times_keep_three_figures(value: float, unit: str, expected: str) -> None:
    assert _time(value, unit) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.0009, "< 0.001"), (0.001, "= 0.001"), (0.0456, "= 0.046"), (1.0, "= 1.000"), (NAN, "not defined")],
)
def test_p_values_in_words(p: float, expected: str) -> None:
    assert _p(p) == expected


@pytest.mark.parametrize(("value", "sign"), [(0.1, "+"), (0.0, "+"), (-0.1, "-")])
def test_differences_have_a_sign(value: float, sign: str) -> None:
    text = _signed(Interval(value, value - 1, value + 1, 3))
    assert text[0] == sign
    assert not text.startswith("+-")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"l1_ratio": 0.01}, "l1 ratio 0.01"),
        ({"weight_decay": [0.01, 1.0], "steps": [3, 12]}, "weight decay 0.01, 1; steps 3, 12"),
        ({"components": None}, "components none"),
        ({"penalty": "none"}, "penalty none"),
        ({"out_of_bag": 0.612345}, "out of bag 0.612"),
        ({}, ""),
    ],
)
def test_choices_in_words(chosen: dict[str, Any], expected: str) -> None:
    assert _choice(chosen) == expected


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (6.0, (0, 1, 2, 3, 4, 5, 6)),
        (10.0, (0, 2, 4, 6, 8, 10)),
        (7.0, (0, 2, 4, 6)),
        (1200.0, (0, 200, 400, 600, 800, 1000, 1200)),
        (1500.0, (0, 250, 500, 750, 1000, 1250, 1500)),
        (0.9, (0.0, 0.2, 0.4, 0.6, 0.8)),
    ],
)
def test_ticks_by_hand(longest: float, expected: tuple[float, ...]) -> None:
    assert _ticks(longest) == pytest.approx(expected)


@settings(max_examples=60)
@given(st.floats(1e-3, 1e5))
def test_ticks_are_few_round_and_within(longest: float) -> None:
    ticks = _ticks(longest)
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= 7
    assert ticks[-1] <= longest * (1 + 1e-9)
    assert np.diff(ticks) == pytest.approx(ticks[1])
    assert longest - ticks[-1] < ticks[1] * (1 + 1e-9), "no tick is missing at the end"


def data(time: list[float], event: list[int]) -> SurvivalData:
    n = len(time)
    return SurvivalData(
        np.zeros((n, 1)), np.array(time, float), np.array(event, bool), tuple(f"p{i}" for i in range(n)), rows=n
    )


def test_the_grid_begins_at_the_first_tenth_of_events_and_ends_at_tau() -> None:
    found = data(list(range(1, 22)), [1] * 20 + [0])
    tau = usable_tau(found.time, found.event)
    grid = _grid(found, tau)
    assert (len(grid), grid[0], grid[-1]) == (8, pytest.approx(2.9), 19.0)
    assert np.diff(grid) == pytest.approx(np.diff(grid)[0])
    with pytest.raises(InputError, match="too close together") as caught:
        _grid(data([5, 5, 5, 5, 9, 9], [1, 1, 1, 1, 0, 0]), 5.0)
    assert caught.value.hint


def test_risk_groups_by_hand() -> None:
    found = data([1, 2, 3, 4, 5, 6], [1, 1, 0, 1, 0, 0])
    low, high = _risk_groups(found, np.array([1, 1, 1, 0, 0, 0]), (0.0, 3.0, 6.0), 2)
    assert (low.name, low.events, low.at_risk) == ("low risk", 1, (3, 3, 1))
    assert (high.name, high.events, high.at_risk) == ("high risk", 2, (3, 1, 0))
    assert high.curve.median.value == 2
    three = _risk_groups(found, np.array([0, 2, 2, 0, 2, 2]), (0.0,), 3)
    assert [g.name for g in three] == ["low risk", "high risk"], "nobody fell into the middle"
    assert [g.name for g in _risk_groups(found, np.array([0, 1, 2, 3, 4, 4]), (0.0,), 5)][-1] == "risk 5 of 5"


def test_calibration_by_hand() -> None:
    found = data([1, 2, 3, 4, 9, 9, 9, 9], [1, 1, 1, 0, 1, 0, 0, 0])
    survival = np.array([0.2, 0.2, 0.2, 0.2, 0.9, 0.9, 0.9, 0.9])
    one, other = _calibration(found, survival, 5.0)
    assert (one.predicted, one.observed.value, one.observed.n) == (pytest.approx(0.1), 0.0, 4)
    assert math.isnan(other.observed.value), "three of four died and the last was lost before the horizon"
    earlier = _calibration(found, survival, 3.5)[1]
    assert (earlier.predicted, earlier.observed.value) == (pytest.approx(0.8), pytest.approx(0.75))
    assert earlier.observed.low <= earlier.observed.value <= earlier.observed.high
    same = _calibration(found, np.full(8, 0.5), 3.5)
    assert [(p.predicted, p.observed.n) for p in same] == [(0.5, 8)]


@pytest.mark.parametrize(("events", "points"), [(5, 2), (40, 2), (59, 2), (60, 3), (99, 4), (100, 5), (200, 5)])
def test_calibration_has_twenty_events_a_point(events: int, points: int) -> None:
    found = data(list(np.arange(1.0, 201.0)), [1] * events + [0] * (200 - events))
    assert len(_calibration(found, np.linspace(0.1, 0.9, 200), 50.0)) == points


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_calibration_ignores_the_order_of_patients_and_loses_nobody(seed: int) -> None:
    random = np.random.default_rng(seed)
    time, event, survival = random.exponential(5, 40) + 0.1, random.random(40) < 0.6, random.random(40)
    order = random.permutation(40)
    one = _calibration(data(list(time), list(event)), survival, 2.0)
    other = _calibration(data(list(time[order]), list(event[order])), survival[order], 2.0)
    assert sum(p.observed.n for p in one) == 40
    assert [p.observed.to_dict() for p in one] == [p.observed.to_dict() for p in other]
    assert [p.predicted for p in one] == pytest.approx([p.predicted for p in other])


@pytest.mark.parametrize(("p", "expected"), [(0.25, 0.25), (NAN, None)])
def test_comparisons_as_json(p: float, expected: float | None) -> None:
    found = comparison_to_dict(Comparison(Interval(0.1, NAN, NAN, 3), p))
    assert found == {"difference": {"value": 0.1, "low": None, "high": None, "n": 3, "chance": None}, "p": expected}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: calibration_points([CalibrationPoint(0.5, Interval(NAN, NAN, NAN, 4))]),
        lambda: calibration_points([CalibrationPoint(0.0, Interval(0.0, 0.0, 0.0, 4))]),
        lambda: auc_over_time({"a": [interval(0.6), Interval(NAN, NAN, NAN, 3)]}, [1, 2], unit="days"),
        lambda: survival_curves([LOW] * 5, (0.0, 5.0), unit="days", end=9.0),
        lambda: survival_curves([group("all", [3.0], [1], (1,))], (0.0,), unit="days", end=3.0),
    ],
    ids=["unknown", "zero", "nan", "five", "one patient"],
)  # fmt: skip
def test_drawings_of_little(draw: Any, recwarn: pytest.WarningsRecorder) -> None:
    svg = draw()
    assert svg.startswith("<svg")
    assert "nan" not in svg.lower()
    assert not recwarn.list


def test_a_group_that_is_not_known_leaves_no_dot() -> None:
    known = CalibrationPoint(0.4, interval(0.3))
    unknown, other = (CalibrationPoint(0.2, i) for i in (Interval(NAN, NAN, NAN, 4), interval(0.3)))
    assert calibration_points([known, unknown]) == calibration_points([known])
    assert calibration_points([known, other]) != calibration_points([known])
