"""Cells of a table to an outcome of patients: one case a line, and laws of the aggregation."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import ChiasmError, InputError
from chiasm.tasks.survival import (
    DAYS,
    SurvivalData,
    check_event_name,
    check_unit,
    event_flags,
    few_events,
    survival_data,
)
from chiasm.tasks.survival_models import component_candidates, log_partial_likelihood, stratified_folds

NAN = math.nan


@pytest.mark.parametrize(
    ("values", "event_is", "censored", "expected"),
    [
        ([1, 0, 1], 1, False, [1, 0, 1]),
        (["1", "0.0", "1.0"], 1, False, [1, 0, 1]),
        ([True, False, None], 1, False, [1, 0, NAN]),
        (["TRUE", "false", None], "true", False, [1, 0, NAN]),
        (["Dead", "alive", " dead "], "DEAD", False, [1, 0, 1]),
        (["Dead", "alive"], "alive", False, [0, 1]),
        ([2, 1, 2], 2, False, [1, 0, 1]),
        ([2, 1, 2], "2.0", False, [1, 0, 1]),
        ([1, 0, NAN], 1, True, [0, 1, NAN]),
        (["décédé", "vivant"], "Décédé", False, [1, 0]),
        ([1, 1], 1, False, [1, 1]),
    ],
)
def test_flags_by_hand(values: list[Any], event_is: object, censored: bool, expected: list[float]) -> None:
    np.testing.assert_array_equal(event_flags(values, event_is=event_is, censored=censored), expected)


@pytest.mark.parametrize(
    ("values", "event_is", "message"),
    [
        ([0, 1, 2], 1, "3 different values, expected two"),
        (["a", "b"], 1, "the value `1` does not occur in the event column, which has 2 different values"),
        ([0, 0], 1, "does not occur"),
        ([None, NAN], 1, "which has 0 different values"),
    ],
)
def test_flags_that_say_nothing(values: list[Any], event_is: object, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        event_flags(values, event_is=event_is)
    assert caught.value.hint
    assert "'a'" not in str(caught.value), "no cell of the table"


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0, 1]), min_size=2, max_size=20).filter(lambda v: len(set(v)) == 2))
def test_an_event_and_its_opposite_are_one(values: list[int]) -> None:
    opposite = [1 - v for v in values]
    assert event_flags(values) == event_flags(opposite, censored=True) == event_flags(opposite, event_is=0)


@pytest.mark.parametrize("name", ["censored", "Censorship", "is_CENSORED", "uncensored"])
def test_a_name_that_speaks_of_censoring_is_asked_about(name: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` sounds") as caught:
        check_event_name(name)
    assert f"--censored {name}" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["event", "dead", "status", "census_region"])
def test_other_names_pass(name: str) -> None:
    check_event_name(name)


@pytest.mark.parametrize(
    ("longest", "unit", "said"),
    [
        (365.25, "days", None),
        (200.0, "days", "the longest follow-up is 6.6 months if times are in days"),
        (12.0, "months", None),
        (11.0, "months", "11.0 months"),
        (1.0, "years", None),
        (0.5, "years", "6.0 months"),
        (90.0, "years", None),
        (1080.0, "months", None),
    ],
)
def test_units_that_may_be_right(longest: float, unit: str, said: str | None) -> None:
    found = check_unit([longest / 3, longest], unit)
    assert (found is None) == (said is None)
    assert said is None or said in str(found)


@pytest.mark.parametrize(
    ("longest", "unit", "message", "hint"),
    [
        (91.0, "years", "91 years: the times are not in years", "--unit months or --unit days"),
        (1100.0, "months", "92 years: the times are not in months", "--unit days"),
        (33_000.0, "days", "90 years: the times are not in days", "check the time column"),
        (5.0, "weeks", "unknown unit of time `weeks`", "one of days, months, years"),
    ],
)
def test_units_that_are_wrong(longest: float, unit: str, message: str, hint: str) -> None:
    with pytest.raises(ChiasmError, match=re.escape(message)) as caught:
        check_unit([1.0, longest], unit)
    assert caught.value.hint == hint


def test_a_year_has_as_many_days_in_every_unit() -> None:
    assert DAYS["years"] == pytest.approx(12 * DAYS["months"]) == pytest.approx(365.25 * DAYS["days"])


FEATURES = [[1.0, NAN], [3.0, NAN], [5.0, 7.0], [2.0, 4.0], [9.0, 9.0]]
PATIENTS = ["b", "b", "a", "a", "c"]


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean", [[3.5, 5.5], [2.0, NAN]]), ("max", [[5.0, 7.0], [3.0, NAN]])]
)
def test_rows_to_patients_by_hand(pooling: Any, expected: list[list[float]]) -> None:
    found = survival_data(
        FEATURES, PATIENTS, [4, None, 6, 6, None], [1, 1, None, 0, 1], pooling=pooling, names=["x", "y"]
    )
    assert found.patients == ("a", "b"), "c has no time"
    np.testing.assert_array_equal(found.features, expected)
    assert (found.time.tolist(), found.event.tolist(), found.rows, found.events) == ([6, 4], [False, True], 5, 1)
    only = found.select([1])
    assert (only.names, only.features.shape, only.patients) == (("y",), (2, 1), ("a", "b"))


def test_free_columns_follow_a_selection() -> None:
    found = survival_data(np.ones((2, 3)), "ab", [1, 2], [1, 0], names=("x", "y", "z"), free=(0, 2))
    assert found.select([2, 1]).free == (0,)
    assert found.select([1]).free == ()
    assert found.select([0, 2]).free == (0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": [1, 2, 6, 6, 3]}, "1 of 3 patients have rows that contradict each other in the time"),
        ({"time": [1, 2, 6, 5, 3]}, "2 of 3 patients"),
        ({"event": [1, 0, 0, 0, 1]}, "contradict each other in the event flag"),
        ({"time": ["x", 1, 2, 2, 1]}, "some values of the time are no numbers"),
        ({"time": [1, 1]}, "there are 2 values of the time for 5 rows"),
        ({"event": [1]}, "there are 1 values of the event flag for 5 rows"),
        ({"time": [None] * 5}, "no patient has both"),
        ({"event": [None] * 5}, "no patient has both"),
        ({"time": [0] * 5}, "times are missing, zero or negative"),
        ({"time": [-1] * 5}, "times are missing, zero or negative"),
        ({"event": [2, 2, 0, 0, 1]}, "event flags must be 0 (censored) or 1"),
        ({"patients": ["b", "b", None, "a", "c"]}, "some rows have no patient"),
        ({"patients": ["b"]}, "(1 rows, columns), got (5, 2)"),
        ({"features": np.ones(5)}, "(5 rows, columns), got (5,)"),
        ({"pooling": "median"}, "unknown pooling `median`"),
    ],
)
def test_what_is_no_outcome_is_refused(changes: dict[str, Any], message: str) -> None:
    given_ = {"features": FEATURES, "patients": PATIENTS, "time": [4, 4, 6, 6, 3], "event": [1, 1, 0, 0, 1]} | changes
    with pytest.raises(ChiasmError, match=re.escape(message)):
        survival_data(given_.pop("features"), given_.pop("patients"), given_.pop("time"), given_.pop("event"), **given_)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(8)), st.sampled_from(["mean", "max"]), st.integers(0, 1000))
def test_the_order_and_the_copies_of_rows_do_not_matter(order: list[int], pooling: Any, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(8, 3)).round(3)
    patients, time, event = list("aabbccdd"), np.array([1, 1, 2, 2, 3, 3, 4, 4.0]), np.array([1, 1, 0, 0, 1, 1, 0, 0])
    one = survival_data(x, patients, time, event, pooling=pooling)
    other = survival_data(x[order], [patients[i] for i in order], time[order], event[order], pooling=pooling)
    twice = survival_data(np.tile(x, (2, 1)), patients * 2, np.tile(time, 2), np.tile(event, 2), pooling=pooling)
    for found in (other, twice):
        np.testing.assert_allclose(found.features, one.features)
        assert (found.patients, found.time.tolist(), found.event.tolist()) == (
            one.patients, one.time.tolist(), one.event.tolist()
        )  # fmt: skip


@pytest.mark.parametrize(
    ("events", "columns", "penalised", "words"),
    [
        (60, 2, True, []),
        (49, 2, True, ["49 events: intervals will be wide"]),
        (60, 7, True, ["8.6 events for each of 7 columns", "the penalty has to do the rest"]),
        (60, 7, False, ["8.6 events for each of 7 columns", "expect overfitting"]),
        (10, 1000, True, ["10 events", "0.0 events for each of 1,000 columns"]),
        (50, 5, True, []),
    ],
)
def test_little_is_said(events: int, columns: int, penalised: bool, words: list[str]) -> None:
    flags = np.arange(100) < events
    data = SurvivalData(np.zeros((100, columns)), np.ones(100), flags, ("p",) * 100)
    text = " ".join(few_events(data, penalised))
    assert bool(text) == bool(words)
    for word in words:
        assert word in text


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 60), st.integers(2, 4), st.integers(0, 1000))
def test_folds_share_the_events(n: int, folds: int, seed: int) -> None:
    event = np.random.default_rng(seed).random(n) < 0.5
    if min(event.sum(), (~event).sum()) < 2 * folds:
        return
    place = stratified_folds(event, folds, seed)
    assert set(place) == set(range(folds))
    for part in (event, ~event):
        counts = np.bincount(place[part], minlength=folds)
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(place, stratified_folds(event, folds, seed))


@pytest.mark.parametrize(
    ("events", "n", "folds", "message"),
    [
        (3, 20, 2, "3 events are too few for 2 folds"),
        (9, 20, 5, "9 events are too few for 5"),
        (9, 20, 1, "needs two folds"),
    ],
)
def test_folds_that_cannot_be(events: int, n: int, folds: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stratified_folds(np.arange(n) < events, folds, 0)


@pytest.mark.parametrize(
    ("components", "width", "expected"),
    [("auto", 40, (None,)), ("auto", 41, (None, 16)), ((4, None), 3, (4, None)), ([8], 999, (8,))],
)
def test_candidates_of_components(components: Any, width: int, expected: tuple[int | None, ...]) -> None:
    assert component_candidates(components, width) == expected


@pytest.mark.parametrize(
    ("risk", "time", "event", "expected"),
    [
        ([0, 0, 0], [1, 2, 3], [1, 1, 1], -math.log(6)),
        ([0, 0, 0], [1, 2, 3], [1, 0, 0], -math.log(3)),
        ([0, 0], [1, 1], [1, 1], -2 * math.log(2)),
        ([math.log(2), 0], [1, 2], [1, 1], math.log(2 / 3)),
        ([5, 5], [2, 1], [0, 1], -math.log(2)),
        ([0, 0], [1, 2], [0, 0], 0.0),
    ],
)
def test_partial_likelihood_by_hand(risk: list[float], time: list[float], event: list[int], expected: float) -> None:
    columns = np.column_stack([risk, np.array(risk) + 700.0])
    found = log_partial_likelihood(columns.astype(float), np.array(time, float), np.array(event, bool))
    assert found == pytest.approx([expected, expected], abs=1e-9), "a constant cancels"
