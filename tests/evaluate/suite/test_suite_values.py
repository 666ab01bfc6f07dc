"""Laws of a suite's numbers: blind to the order of rows, to names of patients and findings, and to monotone changes."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, roc_auc_score

from chiasm.errors import InputError
from chiasm.evaluate.suite.comparisons import (
    GroupScore,
    ModelTest,
    best_model,
    compare_groups,
    compare_models,
    correct_groups,
)
from chiasm.evaluate.suite.figures import shade_of
from chiasm.evaluate.suite.results import (
    MEASURES,
    Number,
    TaskResult,
    interval_of,
    number_of,
    of_measure,
    score_answers,
)
from chiasm.metrics.bootstrap import holm
from chiasm.metrics.compare import PairedTest
from chiasm.types import Interval

QUICK = {"n_resamples": 5, "seed": 0}
NAN = math.nan


def scored(truth: Any, answers: Any, *, mode: str = "multi", groups: Any = None, names: Any = None) -> TaskResult:
    truth, answers = np.asarray(truth, dtype=float), np.asarray(answers, dtype=float)
    groups = [f"p{k}" for k in range(len(truth))] if groups is None else groups
    return score_answers(
        np.arange(len(truth)), truth, answers, groups, names or list("abcdef"[: truth.shape[1]]), mode=mode, **QUICK
    )


def random_case(seed: int, *, n: int = 40, labels: int = 3) -> tuple[np.ndarray, np.ndarray, list[str]]:
    random = np.random.default_rng(seed)
    truth = (random.random((n, labels)) < 0.5).astype(float)
    truth[:2] = [[0] * labels, [1] * labels]
    truth[random.random((n, labels)) < 0.1] = NAN
    truth[:2] = [[0] * labels, [1] * labels]
    return truth, np.round(random.normal(size=(n, labels)), 1), [f"p{k}" for k in random.integers(n // 2, size=n)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_numbers_equal_scikit_learn(seed: int) -> None:
    truth, answers, groups = random_case(seed)
    result = scored(truth, answers, groups=groups)
    each = []
    for k, name in enumerate("abc"):
        known = ~np.isnan(truth[:, k])
        t, a = truth[known, k], answers[known, k]
        each.append(roc_auc_score(t, a))
        assert result.numbers[f"auroc {name}"].value.value == pytest.approx(each[-1])
        assert result.numbers[f"auprc {name}"].value.value == pytest.approx(average_precision_score(t, a))
        assert result.numbers[f"auprc {name}"].value.chance == pytest.approx(t.mean())
        assert result.numbers[f"auprc {name}"].majority == pytest.approx(t.mean())
        assert result.numbers[f"auroc {name}"].value.n == known.sum()
    assert result.main.value.value == pytest.approx(np.mean(each))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_classes_equal_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    classes = np.append(np.arange(4), random.integers(4, size=26))
    answers = random.normal(size=(30, 4))
    truth = np.eye(4)[classes]
    truth[5] = NAN  # of no class: not labelled
    result = scored(truth, answers, mode="single")
    kept = np.arange(30) != 5
    said = answers.argmax(1)
    assert result.numbers["accuracy"].value.value == pytest.approx(accuracy_score(classes[kept], said[kept]))
    assert result.numbers["balanced accuracy"].value.value == pytest.approx(
        balanced_accuracy_score(classes[kept], said[kept])
    )
    assert result.numbers["accuracy"].majority == pytest.approx(np.bincount(classes[kept]).max() / 29)
    assert result.numbers["accuracy"].value.n == 29
    assert result.main.value.value == pytest.approx(roc_auc_score(truth[kept], answers[kept], average="macro"))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_order_of_rows_and_findings_and_names_of_patients_do_not_matter(seed: int) -> None:
    truth, answers, groups = random_case(seed)
    order, columns = np.random.default_rng(seed + 1).permutation(40), [2, 0, 1]
    plain = scored(truth, answers, groups=groups)
    mixed = scored(truth[order], answers[order], groups=[f"new {groups[k]}" for k in order])
    turned = scored(truth[:, columns], answers[:, columns], groups=groups, names=["c", "a", "b"])
    for name, number in plain.numbers.items():
        assert mixed.numbers[name].value.value == pytest.approx(number.value.value)
        assert turned.numbers[name].value.value == pytest.approx(number.value.value)
        assert turned.numbers[name].value.low == pytest.approx(number.value.low, nan_ok=True)
        assert mixed.numbers[name].majority == pytest.approx(number.majority)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_ranks_alone_count_and_turning_them_mirrors(seed: int) -> None:
    truth, answers, groups = random_case(seed)
    plain = scored(truth, answers, groups=groups)
    bent = scored(truth, np.exp(3 * answers) - 7, groups=groups)
    turned = scored(truth, -answers, groups=groups)
    for name, number in plain.numbers.items():
        assert bent.numbers[name].value == number.value
        if name.startswith("auroc"):
            assert turned.numbers[name].value.value == pytest.approx(1 - number.value.value)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_copies_of_rows_change_no_value_and_no_interval_of_the_same_patients(seed: int) -> None:
    truth, answers, groups = random_case(seed)
    plain = scored(truth, answers, groups=groups)
    twice = scored(np.tile(truth, (2, 1)), np.tile(answers, (2, 1)), groups=groups * 2)
    for name, number in plain.numbers.items():
        found = twice.numbers[name].value
        assert (found.value, found.low, found.high) == pytest.approx(
            (number.value.value, number.value.low, number.value.high), nan_ok=True
        )
        assert found.n == 2 * number.value.n


@pytest.mark.parametrize(
    ("truth", "n", "value"),
    [
        ([[1], [0], [NAN]], 2, 1.0),
        ([[1], [1], [1]], 3, NAN),  # one class: not defined, and no error
        ([[0], [0], [NAN]], 2, NAN),
        ([[NAN], [NAN], [NAN]], 0, NAN),
        ([[0], [0], [1]], 3, 0.0),
    ],
)
def test_thin_truth(truth: Any, n: int, value: float) -> None:
    result = scored(truth, [[3.0], [2.0], [1.0]])
    assert result.main.value.value == pytest.approx(value, nan_ok=True)
    assert result.main.value.n == n
    json.dumps(result.to_dict(), allow_nan=False)


def test_one_patient_has_a_value_and_no_interval() -> None:
    found = scored([[1], [0], [1], [0]], [[2.0], [1.0], [3.0], [0.0]], groups=["p"] * 4).main.value
    assert found.value == 1.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize("shape", [(6, 2), (6, 2, 3)])
def test_a_result_survives_its_files(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    truth = np.asarray([[1, 0], [0, 1], [NAN, 1], [1, 0], [0, 0], [1, 1]])
    result = dataclasses.replace(scored(truth, random.normal(size=shape)), notes=("é",), chosen={"k": 5})
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    with np.load(io.BytesIO(result.arrays()), allow_pickle=False) as arrays:
        again = TaskResult.read(values, dict(arrays))
    assert again.to_dict() == result.to_dict()
    for name in ("rows", "truth", "answers"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert again.main == result.main
    assert values["tested"] == 6


@pytest.mark.parametrize(
    "interval",
    [
        Interval(0.5, 0.4, 0.6, 9, 0.5),
        Interval(NAN, NAN, NAN, 0),
        Interval(0.5, NAN, NAN, 3, 0.0),
        Interval(1e-300, -1.0, 1.0, 1),
    ],
)
def test_an_interval_survives_json(interval: Interval) -> None:
    again = interval_of(json.loads(json.dumps(interval.to_dict(), allow_nan=False)))
    assert again.to_dict() == interval.to_dict()
    assert [math.isnan(x) for x in (again.value, again.low)] == [math.isnan(x) for x in (interval.value, interval.low)]


def test_numbers_of_json() -> None:
    assert number_of(3) == 3.0
    assert math.isnan(number_of(None))
    assert Number(Interval(0.5, NAN, NAN, 3), math.inf).to_dict()["majority"] is None
    assert Number(Interval(0.5, NAN, NAN, 3), 0.25, "lower").to_dict()["majority"] == 0.25
    assert Number(Interval(0.5, NAN, NAN, 3), 0.25, "lower").to_dict()["better"] == "lower"


def test_measures_by_hand() -> None:
    assert set(MEASURES) == {"auroc", "ece", "cindex", "hit"}
    time_event = np.asarray([[1.0, 1], [2, 1], [3, 0], [4, 1]])
    risks = np.asarray([[4.0], [1], [2], [3]])  # of the pairs (0,1) (0,2) (0,3) (1,2) (1,3): three agree
    groups = list("abcd")
    assert of_measure("cindex", time_event, risks, groups, **QUICK).value == pytest.approx(3 / 5)
    assert of_measure("cindex", time_event, -risks, groups, **QUICK).value == pytest.approx(2 / 5)
    hits = np.asarray([[1.0], [0], [0], [1]])
    found = of_measure("hit", np.zeros((4, 1)), hits, groups, **QUICK)
    assert (found.value, found.n, found.chance) == (0.5, 4, None)
    # Of 0.9 two in three are right, of 0.1 none: by the probability of the finding, as `chiasm calibrate` has it. By that
    # of the likelier answer all four would be in one bin, and errors of both sides would cancel out.
    sure = np.asarray([[0.9], [0.9], [0.9], [0.1]])
    ece = of_measure("ece", np.asarray([[1.0], [1], [0], [0]]), sure, groups, **QUICK)
    assert ece.value == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.1)
    assert [MEASURES[m].ranks for m in ("auroc", "cindex", "ece", "hit")] == [True, True, False, False]


def made_test(first: str, second: str, difference: float, p: float, finding: str = "") -> ModelTest:
    number = Interval(difference, NAN, NAN, 10, 0.0)
    test = PairedTest(0.5 + difference, 0.5, number, p, p, "permutation", "bootstrap", 10)
    return ModelTest("d", "t", finding, first, second, test, "family")


@pytest.mark.parametrize(
    ("tests", "lower", "best"),
    [
        ([("a", "b", 0.2, 0.01), ("a", "c", 0.1, 0.04), ("b", "c", 0.0, 1.0)], False, "a"),
        ([("a", "b", 0.2, 0.01), ("a", "c", 0.1, 0.05), ("b", "c", 0.0, 1.0)], False, None),  # 0.05 is not below 0.05
        ([("a", "b", -0.2, 0.01), ("a", "c", 0.1, 0.9), ("b", "c", 0.3, 0.02)], False, "b"),
        ([("a", "b", -0.2, 0.01), ("a", "c", 0.1, 0.9), ("b", "c", 0.3, 0.02)], True, None),
        ([("a", "b", -0.2, 0.01), ("a", "c", -0.2, 0.01), ("b", "c", 0.3, 0.02)], True, "a"),
        ([("a", "b", 0.2, NAN), ("a", "c", 0.2, 0.01), ("b", "c", 0.0, 1.0)], False, None),
        ([("a", "b", NAN, 0.01), ("a", "c", 0.2, 0.01), ("b", "c", 0.0, 1.0)], False, None),
        ([("a", "b", 0.2, 0.01)], False, None),  # c was never met
        ([], False, None),
    ],
)
def test_who_is_best(tests: Any, lower: bool, best: str | None) -> None:
    found = [made_test(*t) for t in tests]
    assert best_model(found, ["a", "b", "c"], alpha=0.05, lower=lower) == best
    of_finding = [made_test(a, b, 9.0, 1e-9, "f") for a, b, *_ in tests]  # a finding proves nothing of the whole
    assert best_model([*found, *of_finding], ["a", "b", "c"], alpha=0.05, lower=lower) == best


def group(column: str, name: str, p: float) -> GroupScore:
    number = Interval(0.5, NAN, NAN, 10)
    return GroupScore(column, name, 10, 10, number, number, p, NAN)


@pytest.mark.parametrize(
    ("rows", "corrected"),
    [
        ([], []),
        ([("sex", 0.01), ("sex", 0.01)], [0.01, 0.01]),  # two groups are one test
        ([("sex", 0.01), ("sex", 0.01), ("site", 0.02), ("site", 0.02)], [0.02, 0.02, 0.02, 0.02]),
        ([("age", 0.01), ("age", 0.02), ("age", 0.5)], [0.03, 0.04, 0.5]),
        ([("sex", 0.01), ("sex", 0.01), ("age", 0.001), ("age", 0.9), ("age", 0.5)], [0.03, 0.03, 0.004, 1.0, 1.0]),
        ([("age", NAN), ("age", 0.02), ("age", 0.5)], [NAN, 0.04, 0.5]),
        ([("age", NAN), ("age", NAN)], [NAN, NAN]),
    ],
)
def test_correction_by_hand(rows: list[tuple[str, float]], corrected: list[float]) -> None:
    found = correct_groups([group(c, str(k), p) for k, (c, p) in enumerate(rows)])
    assert [g.p for g in found] == pytest.approx(corrected, nan_ok=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_exchanging_two_models_turns_the_sign_and_nothing_else(seed: int) -> None:
    truth, first, groups = random_case(seed)
    second = np.random.default_rng(seed + 1).normal(size=first.shape)
    a, b = scored(truth, first, groups=groups), scored(truth, second, groups=groups)
    there = compare_models("d", "t", {"a": a, "b": b}, groups, n_permutations=20, seed=3)
    back = compare_models("d", "t", {"b": b, "a": a}, groups, n_permutations=20, seed=3)
    for x, y in zip(there, back, strict=True):
        assert x.test.difference.value == pytest.approx(-y.test.difference.value, nan_ok=True)
        assert x.test.p_raw == pytest.approx(y.test.p_raw, nan_ok=True)
    same = compare_models("d", "t", {"a": a, "b": a}, groups, n_permutations=20, seed=3)
    assert all(t.test.difference.value == 0 and not t.test.p_raw < 1 for t in same)


def test_three_models_are_three_pairs_corrected_together() -> None:
    truth, answers, groups = random_case(1, n=80)
    results = {m: scored(truth, answers + np.nan_to_num(truth) * k, groups=groups) for k, m in enumerate("abc")}
    found = compare_models("d", "t", results, groups, n_permutations=30, seed=0)
    main, named = [t for t in found if not t.finding], [t for t in found if t.finding]
    assert [(t.first, t.second) for t in main] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert {t.family for t in main} == {"3 pairs of models"}
    assert {t.family for t in named} == {"9 tests: each finding of 3 pairs of models"}
    for family in (main, named):
        assert [t.test.p for t in family] == pytest.approx(holm([t.test.p_raw for t in family]).tolist())
    assert compare_models("d", "t", {"a": results["a"]}, groups, n_permutations=30, seed=0) == ()
    apart = dataclasses.replace(results["b"], rows=results["b"].rows + 1000)
    assert compare_models("d", "t", {"a": results["a"], "b": apart}, groups, n_permutations=9, seed=0) == ()
    with pytest.raises(InputError, match="`a` and `b` are of different kinds"):
        compare_models(
            "d",
            "t",
            {"a": results["a"], "b": dataclasses.replace(results["b"], measure="hit")},
            groups,
            n_permutations=9,
            seed=0,
        )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_groups_are_blind_to_the_order_of_rows(seed: int) -> None:
    truth, answers, _ = random_case(seed, n=60)
    groups = [f"p{k // 2}" for k in range(60)]
    column = ["xyz"[(k // 2) % 3] for k in range(60)]
    order = np.random.default_rng(seed).permutation(60)
    options: dict[str, Any] = {"smallest": 4, **QUICK}
    plain = compare_groups(scored(truth, answers, groups=groups), "c", column, groups, **options)
    mixed_result = scored(truth[order], answers[order], groups=[groups[k] for k in order])
    mixed = compare_groups(mixed_result, "c", [column[k] for k in order], [groups[k] for k in order], **options)
    for a, b in zip(plain, mixed, strict=True):
        assert (a.group, a.n, a.patients, a.findings, a.suppressed) == (
            b.group,
            b.n,
            b.patients,
            b.findings,
            b.suppressed,
        )
        if a.value is not None and b.value is not None:
            assert a.value.value == pytest.approx(b.value.value)
        if a.difference is not None and b.difference is not None:
            assert a.difference.value == pytest.approx(b.difference.value)


@pytest.mark.parametrize(
    ("measure", "truth", "suppressed"),
    [
        ("cindex", [[5.0, 1]] * 8, ["", ""]),
        ("cindex", [[5.0, 0]] * 4 + [[5.0, 1]] * 4, ["fewer than 1 events", ""]),
        ("hit", [[0.0, 0]] * 8, ["", ""]),
    ],
)
def test_which_groups_are_too_small(measure: str, truth: Any, suppressed: list[str]) -> None:
    number = Number(Interval(0.5, NAN, NAN, 8))
    values = np.asarray(truth) + np.arange(8)[:, None] * [1.0, 0.0]
    result = TaskResult({"x": number}, "x", measure, np.arange(8), values, np.arange(8.0)[:, None])
    column = ["a"] * 4 + ["b"] * 4
    found = compare_groups(result, "c", column, list("stuvwxyz"), smallest=4, **QUICK)
    assert [g.suppressed for g in found] == suppressed
    one = compare_groups(result, "c", column, ["s"] * 4 + list("wxyz"), smallest=4, **QUICK)
    assert one[0].suppressed == "fewer than 4 patients"  # rows are no patients
    assert compare_groups(result, "c", [None] * 8, list("stuvwxyz"), smallest=2, **QUICK) == ()


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.99))
def test_shades_rise_with_the_number(first: float, second: float, chance: float) -> None:
    low, high = sorted((first, second))
    assert 0 <= shade_of(low, chance, lower=False) <= shade_of(high, chance, lower=False) <= 1
    assert 0 <= shade_of(high, None, lower=True) <= shade_of(low, None, lower=True) <= 1


def test_balanced_accuracy_is_set_against_the_classes_that_occur() -> None:
    result = scored(np.eye(4)[[0, 1, 0, 1]], np.eye(4)[[0, 1, 1, 2]], mode="single")  # nobody has classes c and d
    balanced = result.numbers["balanced accuracy"]
    assert balanced.value.value == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert (balanced.value.chance, balanced.majority) == (0.5, 0.5)
    assert result.numbers["accuracy"].value.chance == 0.25


def test_groups_stand_largest_first_then_by_name() -> None:
    truth, answers, _ = random_case(3, n=40)
    column = ["b"] * 8 + ["a"] * 8 + ["c"] * 20 + [None] * 4
    found = compare_groups(scored(truth, answers), "x", column, [f"p{k}" for k in range(40)], smallest=30, **QUICK)
    assert [g.group for g in found] == ["c", "a", "b"]
