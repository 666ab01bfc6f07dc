"""Hubness and label agreement: known cases, scikit-learn's numbers, nulls that hold what they promise."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError
from chiasm.metrics.pairing import count_images, hubness, label_agreement, mutual_information, quantiles


def test_loads() -> None:
    assert count_images([0, 2, 2, -1], 4).tolist() == [1, 0, 2, 0]
    assert count_images([[0, 1], [1, -1]], 2).tolist() == [1, 2]
    assert count_images([], 3).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="corpus of 2"):
        count_images([2], 2)


def test_even_and_uneven_loads() -> None:
    even = hubness([5, 5, 5, 5])
    assert (even.used, even.max_load, even.gini, even.entropy, even.effective) == (4, 5, 0, 2, 4)
    assert np.isnan(even.skewness)
    assert even.to_dict()["skewness"] is None
    one = hubness([0] * 99 + [100])
    assert (one.used, one.top_share, one.entropy, one.effective) == (1, 1, 0, 1)
    assert hubness([1] * 197 + [10, 20, 173]).top_share == pytest.approx(193 / 400), "1 % of 200 reports are two"
    assert one.gini == pytest.approx(0.99)
    assert one.skewness > 5
    none = hubness([0, 0])
    assert (none.images, none.used) == (0, 0)
    json.dumps(none.to_dict(), allow_nan=False)
    for wrong in ([], [-1, 2], [[1]]):
        with pytest.raises(InputError):
            hubness(wrong)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(any), st.randoms())
def test_hubness_does_not_depend_on_order_and_is_in_range(loads: list[int], random: object) -> None:
    found = hubness(loads)
    mixed = hubness(sorted(loads))
    assert found.gini == pytest.approx(mixed.gini)
    assert found.entropy == pytest.approx(mixed.entropy)
    assert 0 <= found.gini < 1
    assert 0 <= found.entropy <= np.log2(len(loads)) + 1e-9
    assert found.effective <= found.used + 1e-9
    pairs = np.abs(np.subtract.outer(loads, loads)).sum() / (2 * len(loads) * sum(loads))  # Gini's definition
    assert found.gini == pytest.approx(pairs)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 6))
def test_mutual_information_is_that_of_scikit_learn(seed: int, a: int, b: int) -> None:
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, a, 40), rng.integers(0, b, 40)
    table = np.zeros((a, b))
    np.add.at(table, (x, y), 1)
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert mutual_information(table) == pytest.approx(normalized_mutual_info_score(x, y), abs=1e-12)
        assert mutual_information(table) == pytest.approx(mutual_information(table.T), abs=1e-12)


def test_one_report_for_all_agrees_with_nothing() -> None:
    found = label_agreement([3] * 10, ["a", "b"] * 5, permutations=50)
    assert found.nmi.value == 0
    assert found.adjusted == 0
    assert found.p_value == 1


def test_agreement_beside_its_null() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    told = label_agreement(labels * 10 + rng.integers(0, 10, 300), labels.tolist())
    assert told.adjusted > 0.4
    assert 0 < told.p_value < 0.005, "so many permutations cannot show less than one in so many"
    assert told.purity.value == 1
    assert told.nmi.value > told.nmi.high >= told.nmi.chance
    many = label_agreement(rng.integers(0, 200, 300), labels.tolist())
    assert many.nmi.value > 0.1, "many reports agree by chance"
    assert abs(many.adjusted) < 0.05
    assert many.p_value > 0.01
    assert many.purity.value > 0.7, "and look pure"
    json.dumps(many.to_dict(), allow_nan=False)


def test_images_of_one_patient_are_no_agreement() -> None:
    # Every patient has a report and a label, unrelated; ten images each repeat them.
    hits = {"grouped": 0, "single": 0}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        report, label = np.repeat(rng.integers(0, 3, 20), 10), np.repeat(rng.integers(0, 2, 20), 10).tolist()
        patients = np.repeat(np.arange(20), 10).tolist()
        grouped = label_agreement(report, label, groups=patients, permutations=99)
        assert grouped.permuted == "patients"
        single = label_agreement(report, label, permutations=99)
        assert single.permuted == "images"
        hits["grouped"] += grouped.p_value <= 0.05
        hits["single"] += single.p_value <= 0.05
    assert hits["grouped"] <= 5
    assert hits["single"] >= 15


def test_unlabelled_and_unpaired_images_are_left_out() -> None:
    found = label_agreement([0, 1, -1, 0, 1], ["a", "b", "a", None, "b"], permutations=20)
    assert found.nmi.n == 3
    assert found.nmi.value == pytest.approx(1)
    with pytest.raises(InputError, match="needs two"):
        label_agreement([0, -1], ["a", "b"])
    with pytest.raises(InputError, match="labels"):
        label_agreement([0, 1], ["a"])


def test_quantiles() -> None:
    assert quantiles([1, 2, 3, np.nan], (0.5,)) == {"p50": 2}
    assert np.isnan(quantiles([], (0.5,))["p50"])
