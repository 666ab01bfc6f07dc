"""Thresholds, bands, verdicts and what they reach, on tables small enough to be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score

from chiasm.errors import InputError
from chiasm.tasks.conformal import PredictionSets, SplitConformal, patient_quantile, score_sets
from chiasm.tasks.operating_point import (
    Band,
    Decisions,
    OperatingPoint,
    choose_band,
    choose_threshold,
    decide,
    decide_by_sets,
    reached,
)

#: Ten of each side: positives score 1, 2 ... 10, negatives 0.5, 1.5 ... 9.5.
POSITIVE, NEGATIVE = [float(i) for i in range(1, 11)], [i + 0.5 for i in range(10)]
SCORES, TRUTH = np.array(POSITIVE + NEGATIVE), np.array([1] * 10 + [0] * 10)


@pytest.mark.parametrize(
    ("aim", "wanted", "conservative", "threshold", "sensitivity", "specificity"),
    [
        ("sensitivity", 1.0, False, 1.0, 1.0, 0.1),
        ("sensitivity", 0.95, False, 1.0, 1.0, 0.1),  # a half row may not be missed
        ("sensitivity", 0.9, False, 2.0, 0.9, 0.2),
        ("sensitivity", 0.8, False, 3.0, 0.8, 0.3),
        ("sensitivity", 0.5, False, 6.0, 0.5, 0.6),
        ("sensitivity", 0.1, False, 10.0, 0.1, 1.0),
        ("sensitivity", 0.9, True, 1.0, 1.0, 0.1),  # floor(0.1 x 11) - 1 = 0 missed
        ("sensitivity", 0.8, True, 2.0, 0.9, 0.2),  # floor(0.2 x 11) - 1 = 1
        ("sensitivity", 0.5, True, 5.0, 0.6, 0.5),  # floor(0.5 x 11) - 1 = 4
        ("specificity", 1.0, False, 10.0, 0.1, 1.0),
        ("specificity", 0.9, False, 9.0, 0.2, 0.9),
        ("specificity", 0.5, False, 5.0, 0.6, 0.5),
        ("specificity", 0.9, True, 10.0, 0.1, 1.0),
        ("specificity", 0.8, True, 9.0, 0.2, 0.9),
    ],
)
def test_a_threshold_by_hand(
    aim: str, wanted: float, conservative: bool, threshold: float, sensitivity: float, specificity: float
) -> None:
    options: dict[str, Any] = {aim: wanted, "conservative": conservative}
    found = choose_threshold(SCORES, TRUTH, **options)
    assert found == OperatingPoint(threshold, aim, wanted, sensitivity, specificity, 10, 10, conservative)  # type: ignore[arg-type]
    assert OperatingPoint.from_dict(found.to_dict()) == found
    assert recall_score(TRUTH, threshold <= SCORES) == pytest.approx(sensitivity)
    assert recall_score(1 - TRUTH, threshold > SCORES) == pytest.approx(specificity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a sensitivity or a specificity"),
        ({"sensitivity": 0.9, "specificity": 0.9}, "either a sensitivity or a specificity"),
        ({"sensitivity": 0.0}, r"must lie in \(0, 1\]"),
        ({"sensitivity": 1.01}, r"must lie in \(0, 1\]"),
        ({"specificity": -1}, r"must lie in \(0, 1\]"),
        ({"specificity": math.nan}, r"must lie in \(0, 1\]"),
        ({"sensitivity": 0.9, "min_rows": 11}, "needs 11 rows of that side, got 10"),
        ({"sensitivity": 0.95, "conservative": True}, "10 rows cannot promise"),
        ({"sensitivity": 1.0, "conservative": True}, "10 rows cannot promise"),
    ],
)
def test_thresholds_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_threshold(SCORES, TRUTH, **options)


@pytest.mark.parametrize("wanted", [0.8, 0.9, 0.95, 0.99])
def test_the_hint_of_a_conservative_choice_is_enough(wanted: float) -> None:
    """As many rows as the hint says are accepted, one fewer is refused."""
    enough = math.ceil(1 / (1 - wanted) - 1 - 1e-9)
    for rows, fine in ((enough, True), (enough - 1, False)):
        scores, truth = np.arange(2.0 * rows), np.repeat([0, 1], rows)
        if fine:
            assert choose_threshold(scores, truth, sensitivity=wanted, conservative=True, min_rows=1).threshold == rows
        else:
            with pytest.raises(InputError, match="cannot promise") as raised:
                choose_threshold(scores, truth, sensitivity=wanted, conservative=True, min_rows=1)
            assert raised.value.hint == f"at least {enough} are needed"


@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=20, max_size=60), st.floats(0.05, 1.0), st.integers(0, 9))
def test_the_two_aims_are_mirror_images(values: list[int], wanted: float, seed: int) -> None:
    truth = np.random.default_rng(seed).permutation(np.arange(len(values)) % 2)
    by_rule_in = choose_threshold(values, truth, specificity=wanted, min_rows=1)
    by_rule_out = choose_threshold(-np.array(values), 1 - truth, sensitivity=wanted, min_rows=1)
    assert by_rule_in.specificity == by_rule_out.sensitivity
    assert by_rule_in.sensitivity == by_rule_out.specificity
    assert by_rule_in.specificity >= wanted - 1e-9


@pytest.mark.parametrize(
    ("low", "high", "codes"),
    [
        (0.2, 0.6, [0, -1, -1, 1, 1, -1]),
        (0.6, 0.6, [0, 0, 0, 1, 1, -1]),
        (-math.inf, math.inf, [-1] * 6),
        (0.0, 0.0, [1, 1, 1, 1, 1, -1]),
        (2.0, 2.0, [0, 0, 0, 0, 0, -1]),
    ],
)
def test_verdicts_begin_at_the_bounds(low: float, high: float, codes: list[int]) -> None:
    found = decide([0.1, 0.2, 0.5999, 0.6, 1.0, math.nan], Band(low, high))
    assert found.codes.tolist() == codes
    words = {1: "positive", 0: "negative", -1: "cannot tell"}
    assert found.answers == tuple(words[c] for c in codes)
    assert found.undecided == pytest.approx(codes.count(-1) / 6)
    if low == high:
        assert decide([0.1, 0.2, 0.5999, 0.6, 1.0, math.nan], low).codes.tolist() == codes


@pytest.mark.parametrize(("low", "high"), [(0.6, 0.2), (math.nan, 0.5), (0.5, math.nan)])
def test_bands_that_are_none(low: float, high: float) -> None:
    with pytest.raises(InputError, match="from low to high"):
        Band(low, high)


@pytest.mark.parametrize(
    ("sensitivity", "specificity", "low", "high"),
    [(0.9, 0.9, 2.0, 9.0), (0.8, 0.7, 3.0, 7.0), (0.5, 0.5, 5.5, 5.5), (0.1, 0.9, 9.5, 9.5), (0.1, 0.1, 5.5, 5.5)],
)
def test_a_band_by_hand(sensitivity: float, specificity: float, low: float, high: float) -> None:
    """Where one line reaches both aims the band has no width and lies in the middle."""
    found = choose_band(SCORES, TRUTH, sensitivity=sensitivity, specificity=specificity)
    assert (found.low, found.high) == (low, high)
    verdicts = decide(SCORES, found).codes
    assert (verdicts[TRUTH == 1] != 0).mean() >= sensitivity
    assert (verdicts[TRUTH == 0] != 1).mean() >= specificity


def test_what_is_reached_by_hand_and_by_scikit_learn() -> None:
    codes = np.array([1, 1, 0, -1, 0, 0, 1, -1, 1], dtype=np.int8)
    truth: Any = [1, 1, 1, 1, 0, 0, 0, 0, None]
    found = reached(Decisions(codes), truth, list("abcdefghi"), n_resamples=20)
    assert found.sensitivity.value == pytest.approx(2 / 3)
    assert found.specificity.value == pytest.approx(2 / 3)
    assert found.ppv.value == pytest.approx(2 / 3)
    assert found.npv.value == pytest.approx(2 / 3)
    assert found.undecided.value == pytest.approx(2 / 8)
    assert (found.sensitivity.n, found.specificity.n, found.ppv.n, found.npv.n, found.undecided.n) == (3, 3, 3, 3, 8)
    kept = [0, 1, 2, 4, 5, 6]
    said, true = codes[kept], [truth[i] for i in kept]
    assert found.ppv.value == pytest.approx(precision_score(true, said))
    assert found.npv.value == pytest.approx(precision_score(true, said, pos_label=0))


@pytest.mark.parametrize(
    ("codes", "truth", "defined"),
    [
        ([1, 1], [1, 1], {"sensitivity", "ppv", "undecided"}),
        ([0, 0], [1, 1], {"sensitivity", "npv", "undecided"}),
        ([-1, -1], [1, 0], {"undecided"}),
        ([0, 1], [0, 0], {"specificity", "npv", "ppv", "undecided"}),
    ],
)
def test_a_side_without_rows_is_no_number(codes: list[int], truth: list[int], defined: set[str]) -> None:
    found = reached(Decisions(np.array(codes, dtype=np.int8)), truth, ["a", "b"], n_resamples=20).to_dict()
    assert {name for name, number in found.items() if number["value"] is not None} == defined


@pytest.mark.parametrize(
    ("truth", "groups", "message"),
    [([1], ["a", "b"], "2 decisions"), ([1, 0], ["a"], "1 groups"), ([None, math.nan], ["a", "b"], "no row is labelled"),
     ([[1, 0]], ["a", "b"], "truth of shape")],
)  # fmt: skip
def test_decisions_that_cannot_be_judged(truth: Any, groups: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        reached(Decisions(np.array([1, 0], dtype=np.int8)), truth, groups)


@pytest.mark.parametrize(
    ("members", "code"), [((True, False), 0), ((False, True), 1), ((True, True), -1), ((False, False), -1)]
)
def test_a_set_decides_alone(members: tuple[bool, bool], code: int) -> None:
    assert decide_by_sets([members]).codes.tolist() == [code]
    sets = PredictionSets(np.array([members]), 0.1, np.array([not any(members)]))
    assert sets.codes.tolist() == [code]
    assert sets.sizes.tolist() == [sum(members)]


@pytest.mark.parametrize(
    ("scores", "groups", "alpha", "kind", "wanted"),
    [
        ([1, 2, 3, 4], "abcd", 0.5, "weights", 3.0),  # ceil(5 x 0.5) = third
        ([1, 2, 3, 4], "abcd", 0.2, "weights", 4.0),
        ([1, 2, 3, 4], "abcd", 0.19, "weights", math.inf),  # four patients are too few
        ([1, 2, 3, 4], "aabb", 0.5, "weights", 3.0),  # 1.5 of 2 patients: 0.5 + 0.5 + 0.5
        ([1, 2, 3, 4], "aabb", 0.4, "weights", 4.0),
        ([1, 2, 3, 4], "aabb", 0.5, "worst", 4.0),
        ([1, 9, 3, 4], "aabb", 0.5, "worst", 9.0),
        ([1, 2, 3, 4], "aabb", 0.5, "rows", 3.0),
        ([1, 1, 1, 9], "aaab", 0.4, "weights", 9.0),
        ([1, 1, 1, 9], "aaab", 0.7, "weights", 1.0),
        ([], "", 0.5, "weights", math.inf),
    ],
)
def test_the_quantile_of_patients_by_hand(
    scores: list[float], groups: str, alpha: float, kind: Any, wanted: float
) -> None:
    assert patient_quantile(scores, list(groups), alpha, per_patient=kind) == wanted


def test_one_row_a_patient_makes_all_ways_one() -> None:
    random = np.random.default_rng(0)
    scores, groups = random.normal(size=50), [f"p{i}" for i in range(50)]
    ways: list[Any] = ["weights", "one", "worst", "rows"]
    assert len({patient_quantile(scores, groups, 0.1, per_patient=way) for way in ways}) == 1


def test_sets_by_hand() -> None:
    """Classes at 0.2 and 0.7: threshold 0.4 of the strangeness 1 - p lets in what has at least 0.6."""
    p, truth = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]], [0, 0, 1, 1]
    made = SplitConformal(0.2).fit(p, truth, list("abcd"))
    assert made.thresholds_.tolist() == pytest.approx([0.4])
    sets = made.predict([[0.6, 0.4], [0.5, 0.5], [0.1, 0.9]])
    assert sets.members.tolist() == [[True, False], [False, False], [False, True]]
    assert sets.was_empty.tolist() == [False, True, False]
    found = score_sets(sets, [0, 1, 0], ["x", "x", "y"], n_resamples=20)
    assert found.coverage.value == pytest.approx((0.5 + 0) / 2)  # patients alike: one of two images, none of one
    assert found.empty.value == pytest.approx(0.25)
    assert found.size.value == pytest.approx((0.5 + 1) / 2)
    assert [c.value for c in found.per_class] == pytest.approx([0.5, 0.0])
    assert SplitConformal.from_dict(made.to_dict()).predict([[0.6, 0.4]]).members.tolist() == [[True, False]]
