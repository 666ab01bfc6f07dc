"""Thresholds that reach what was asked, the answer "cannot tell", and what both reach on other patients."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError
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

laws = settings(max_examples=60, deadline=None)


def rows(seed, n=400, digits=2):
    random = np.random.default_rng(seed)
    truth = (random.random(n) < 0.4).astype(float)
    truth[:30] = np.arange(30) % 2
    return np.round(truth + random.normal(size=n), digits), truth


@laws
@given(st.integers(0, 2**31), st.floats(0.05, 1), st.integers(0, 2))
def test_thresholds_reach_the_aim_and_no_better_one_does(seed, wanted, digits):
    scores, truth = rows(seed, 80, digits)
    point = choose_threshold(scores, truth, sensitivity=wanted)
    assert point.sensitivity >= wanted - 1e-9
    higher = scores[scores > point.threshold]
    if len(higher):
        assert (scores[truth == 1] >= higher.min()).mean() < wanted
    point = choose_threshold(scores, truth, specificity=wanted)
    assert point.specificity >= wanted - 1e-9
    lower = scores[scores < point.threshold]
    if len(lower):
        assert (scores[truth == 0] < lower.max()).mean() < wanted
    assert OperatingPoint.from_dict(json.loads(json.dumps(point.to_dict()))) == point


@laws
@given(st.integers(0, 2**31), st.booleans())
def test_the_line_moves_with_the_aim(seed, conservative):
    scores, truth = rows(seed)
    aims = (0.5, 0.7, 0.9, 0.95)
    lines = [choose_threshold(scores, truth, sensitivity=a, conservative=conservative).threshold for a in aims]
    assert lines == sorted(lines, reverse=True)
    lines = [choose_threshold(scores, truth, specificity=a, conservative=conservative).threshold for a in aims]
    assert lines == sorted(lines)


@pytest.mark.parametrize("aim", ["sensitivity", "specificity"])
def test_a_conservative_threshold_keeps_its_word_on_average(aim):
    """The plain one promises too much: with 40 positives it expects to miss 5 of 41 new ones."""
    random = np.random.default_rng(0)
    reached_by = {True: [], False: []}
    for _ in range(1500):
        side = random.normal(size=40)
        scores, truth = np.concatenate([side, random.normal(size=15)]), np.repeat([1.0, 0.0], [40, 15])
        if aim == "specificity":
            truth = 1 - truth
        for conservative, found in reached_by.items():
            line = choose_threshold(scores, truth, **{aim: 0.9}, conservative=conservative).threshold
            below = 0.5 * math.erfc(-line / math.sqrt(2))
            found.append(1 - below if aim == "sensitivity" else below)
    assert 0.9 - 0.004 <= np.mean(reached_by[True]) <= 0.93
    assert np.mean(reached_by[False]) < np.mean(reached_by[True]) - 0.01


def test_what_a_threshold_reaches_on_test_patients():
    point = choose_threshold(*rows(1, 2000), sensitivity=0.9)
    scores, truth = rows(2, 2000)
    truth[:100] = np.nan
    found = reached(decide(scores, point), truth, np.arange(2000) // 2)
    assert found.sensitivity.value == np.mean(scores[truth == 1] >= point.threshold)
    assert found.specificity.value == np.mean(scores[truth == 0] < point.threshold)
    assert found.ppv.value == np.mean(truth[(scores >= point.threshold) & ~np.isnan(truth)])
    assert found.sensitivity.low < 0.9 < found.sensitivity.high
    assert (found.sensitivity.n, found.undecided.value) == (int((truth == 1).sum()), 0)
    assert found.to_dict()["npv"]["n"] == int((scores[~np.isnan(truth)] < point.threshold).sum())


def test_a_band_abstains_and_errs_less():
    band = choose_band(*rows(3, 2000), sensitivity=0.95, specificity=0.95)
    scores, truth = rows(4, 2000)
    doubtful, sure = decide(scores, band), decide(scores, (band.low + band.high) / 2)
    assert set(doubtful.answers) == {"positive", "negative", "cannot tell"}
    with_doubt, without = (reached(d, truth, np.arange(2000), n_resamples=200) for d in (doubtful, sure))
    assert with_doubt.undecided.value == doubtful.undecided > 0.3
    assert with_doubt.ppv.value > without.ppv.value
    assert with_doubt.npv.value > without.npv.value
    # The promise is about all rows: few with the finding are ruled out, few without it ruled in.
    assert (doubtful.codes[truth == 1] == 0).mean() == pytest.approx(0.05, abs=0.02)
    assert (doubtful.codes[truth == 0] == 1).mean() == pytest.approx(0.05, abs=0.02)


def test_a_band_of_a_perfect_score_has_no_width():
    truth = np.repeat([0.0, 1.0], 50)
    band = choose_band(truth, truth)
    assert band.low == band.high
    assert decide(truth, band).codes.tolist() == truth.tolist()


def test_conformal_sets_decide_only_alone():
    found = decide_by_sets([[True, False], [False, True], [True, True], [False, False]])
    assert found.answers == ("negative", "positive", "cannot tell", "cannot tell")
    assert decide([math.nan, 2.0], 1.0).answers == ("cannot tell", "positive")
    assert math.isnan(Decisions(np.zeros(0, np.int8)).undecided)


def test_what_cannot_be_chosen():
    scores, truth = rows(5, 60)
    with pytest.raises(InputError, match="either"):
        choose_threshold(scores, truth)
    with pytest.raises(InputError, match="either"):
        choose_threshold(scores, truth, sensitivity=0.9, specificity=0.9)
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        choose_threshold(scores, truth, sensitivity=95)
    with pytest.raises(InputError, match="needs 10 rows"):
        choose_threshold(scores, np.where(np.cumsum(truth) < 5, truth, 0), sensitivity=0.9)
    with pytest.raises(InputError, match="cannot promise") as caught:
        choose_threshold(scores, truth, sensitivity=0.99, conservative=True)
    assert "at least 99" in str(caught.value)
    with pytest.raises(InputError, match="label by label"):
        choose_threshold(np.zeros((4, 2)), np.zeros((4, 2)), sensitivity=0.9)
    with pytest.raises(InputError, match="low to high"):
        Band(1.0, 0.0)
    with pytest.raises(InputError, match="nothing to compare"):
        reached(decide(scores, 0.0), np.full(60, np.nan), range(60))
    with pytest.raises(InputError, match="groups"):
        reached(decide(scores, 0.0), truth, range(3))
    with pytest.raises(InputError, match="one value a row"):
        decide(np.zeros((2, 2)), 0.0)
    with pytest.raises(InputError, match=r"\(rows, 2\)"):
        decide_by_sets([[True]])
