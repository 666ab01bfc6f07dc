"""Tests between models are those of ``metrics.compare``; groups are what one gets by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import InputError
from chiasm.evaluate.suite.comparisons import GroupScore, best_model, compare_groups, compare_models, correct_groups
from chiasm.evaluate.suite.results import TaskResult, mean_auroc_statistic, of_measure, score_answers
from chiasm.metrics.bootstrap import holm
from chiasm.metrics.classification import accuracy, auroc, macro_auroc, majority_baseline
from chiasm.metrics.compare import compare_auroc, compare_findings, compare_metric
from chiasm.types import Interval

OPTIONS = {"n_resamples": 50, "seed": 1}
ROWS = 90


def made(seed: int, *, labels: int = 2, runs: int = 0, mode: str = "multi", strength: float = 1.0) -> TaskResult:
    truth = (np.random.default_rng(0).random((ROWS, labels)) < 0.4).astype(float)
    if mode == "single":
        truth = np.eye(labels)[np.random.default_rng(0).integers(labels, size=ROWS)]
    else:
        truth[3, 0] = np.nan
    shape = (ROWS, labels, runs) if runs else (ROWS, labels)
    noise = np.random.default_rng(seed).normal(size=shape)
    signal = np.nan_to_num(truth) * strength
    scores = noise + (signal[:, :, None] if runs else signal)
    names = [f"f{k}" for k in range(labels)]
    return score_answers(np.arange(ROWS), truth, scores, patients(), names, mode=mode, **OPTIONS)


def patients() -> list[str]:
    return [f"p{i // 2}" for i in range(ROWS)]


def test_numbers_are_those_of_the_metrics() -> None:
    result = made(1)
    assert result.main.value.value == pytest.approx(macro_auroc(result.truth, result.answers).value)
    assert result.numbers["auroc f1"].value.value == pytest.approx(auroc(result.truth[:, 1], result.answers[:, 1]))
    assert result.numbers["auprc f0"].value.n == ROWS - 1
    single = made(1, labels=3, mode="single")
    classes, said = single.truth.argmax(1), single.answers.argmax(1)
    assert single.numbers["accuracy"].value.value == pytest.approx(accuracy(classes, said))
    assert single.numbers["accuracy"].majority == pytest.approx(majority_baseline(classes))
    assert single.numbers["accuracy"].value.chance == pytest.approx(1 / 3)


def test_of_two_classes_the_first_is_the_finding() -> None:
    result = made(1, mode="single")
    assert result.findings == ("f0",)
    assert result.answers.shape == (ROWS, 1)
    assert {"auroc", "auprc", "accuracy", "balanced accuracy"} == set(result.numbers)


def test_runs_are_averaged() -> None:
    result = made(1, runs=3)
    one_by_one = [macro_auroc(result.truth, result.answers[:, :, k]).value for k in range(3)]
    assert result.main.value.value == pytest.approx(np.mean(one_by_one))
    # Each draw by itself, then the mean: averaging the answers first would make an ensemble, which is better.
    of_finding = [auroc(result.truth[:, 1], result.answers[:, 1, k]) for k in range(3)]
    assert result.numbers["auroc f1"].value.value == pytest.approx(np.mean(of_finding))
    single = made(1, runs=5, labels=3, mode="single", strength=0.5)
    said = single.answers.argmax(1)
    shares = [accuracy(single.truth.argmax(1), said[:, k]) for k in range(5)]
    assert single.numbers["accuracy"].value.value == pytest.approx(np.mean(shares))
    other = made(2, runs=3)
    tests = compare_models("d", "t", {"a": result, "b": other}, patients(), n_permutations=20, seed=1)
    assert tests[1].test.difference.value == pytest.approx(
        result.numbers["auroc f0"].value.value - other.numbers["auroc f0"].value.value
    )


def test_paired_tests_equal_the_metrics_called_directly() -> None:
    a, b, c = made(1), made(2), made(3, strength=3.0)
    found = compare_models("d", "t", {"a": a, "b": b, "c": c}, patients(), n_permutations=50, seed=1)
    main = {(t.first, t.second): t.test for t in found if not t.finding}
    assert list(main) == [("a", "b"), ("a", "c"), ("b", "c")]
    direct = [
        compare_metric(mean_auroc_statistic, x.truth, x.answers, y.answers, patients(), ranks=True, **OPTIONS)
        for x, y in ((a, b), (a, c), (b, c))
    ]
    assert [t.p_raw for t in main.values()] == [d.p_raw for d in direct]
    assert [t.difference for t in main.values()] == [d.difference for d in direct]
    assert [t.p for t in main.values()] == pytest.approx(holm([d.p_raw for d in direct]))
    # Every finding of every pair is one family.
    named = [t for t in found if t.finding]
    assert len(named) == 6
    assert all(t.family == "6 tests: each finding of 3 pairs of models" for t in named)
    assert [t.test.p for t in named] == pytest.approx(holm([t.test.p_raw for t in named]))
    columns = {f"f{k}": a.truth[:, k] for k in range(2)}
    of_pair = compare_findings(
        columns, *({f"f{k}": r.answers[:, k] for k in range(2)} for r in (a, b)), patients(), **OPTIONS
    )
    for t in named[:2]:
        assert t.test.p_raw == of_pair[t.finding].p_raw
        assert t.test.test == "delong_clustered"


def test_a_test_and_a_group_survive_their_file() -> None:
    import json

    from chiasm.evaluate.suite.comparisons import ModelTest

    a, b = made(1), made(2)
    for found in compare_models("d", "t", {"a": a, "b": b}, patients(), n_permutations=50, seed=1):
        values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert (values["first"], values["second"]) == ("a", "b")  # names, not values
        assert ModelTest.from_dict(values).to_dict() == found.to_dict()
        assert values["difference"]["value"] == pytest.approx(values["first_value"] - values["second_value"])
    column: list[str | None] = ["x"] * 40 + ["y"] * 44 + ["z"] * 6
    for group in compare_groups(a, "site", column, patients(), smallest=10, **OPTIONS):
        assert (
            GroupScore.from_dict(json.loads(json.dumps(group.to_dict(), allow_nan=False))).to_dict() == group.to_dict()
        )


def test_one_finding_is_tested_by_delong() -> None:
    a, b = made(1, mode="single"), made(2, mode="single")
    (found,) = compare_models("d", "t", {"a": a, "b": b}, patients(), n_permutations=50, seed=1)
    direct = compare_auroc(a.truth[:, 0], a.answers[:, 0], b.answers[:, 0], patients(), **OPTIONS)
    assert found.test.p_raw == direct.p_raw
    assert found.test.test == "delong_clustered"
    assert found.test.p == direct.p_raw  # one pair: nothing to correct


def test_rows_that_one_model_lacks_are_left_out_for_both() -> None:
    from dataclasses import replace

    a, b = made(1, mode="single"), made(2, mode="single")
    kept = np.arange(10, ROWS)
    less = replace(b, rows=b.rows[kept], truth=b.truth[kept], answers=b.answers[kept])
    (found,) = compare_models("d", "t", {"a": a, "b": less}, patients(), n_permutations=50, seed=1)
    direct = compare_auroc(a.truth[kept, 0], a.answers[kept, 0], less.answers[:, 0], patients()[10:], **OPTIONS)
    assert found.test.p_raw == direct.p_raw
    assert found.test.difference.n == ROWS - 10
    with pytest.raises(InputError, match="different kinds"):
        compare_models("d", "t", {"a": a, "b": replace(b, measure="ece")}, patients(), n_permutations=5, seed=1)


def test_a_best_model_needs_every_test() -> None:
    results = {"weak": made(1, strength=0.0), "strong": made(2, strength=6.0), "other": made(3, strength=0.2)}
    found = compare_models("d", "t", results, patients(), n_permutations=200, seed=1)
    assert best_model(found, list(results), alpha=0.05) == "strong"
    assert best_model(found, list(results), alpha=1e-9) is None
    assert best_model(found, ["strong"], alpha=0.05) is None  # nothing to be better than
    alike = {"a": made(1), "b": made(2), "c": made(3)}
    found = compare_models("d", "t", alike, patients(), n_permutations=200, seed=1)
    assert best_model(found, list(alike), alpha=0.05) is None
    found = compare_models("d", "t", results, patients(), n_permutations=200, seed=1)
    assert best_model(found, list(results), alpha=0.05, lower=True) != "strong"


def test_groups_by_hand() -> None:
    result = made(4, mode="single")
    column = ["m" if i % 4 < 2 else "f" for i in range(ROWS)]  # patients stay whole
    column[0] = column[1] = None  # type: ignore[list-item]
    found = {g.group: g for g in compare_groups(result, "sex", column, patients(), smallest=4, **OPTIONS)}
    for name in ("m", "f"):
        rows = [i for i in range(ROWS) if column[i] == name]
        value = auroc(result.truth[rows, 0], result.answers[rows, 0])
        group = found[name]
        assert group.value is not None
        assert group.value.value == pytest.approx(value)
        assert (group.n, group.patients) == (len(rows), len({patients()[i] for i in rows}))
        assert group.value.low <= value <= group.value.high
    m, f = found["m"], found["f"]
    assert m.value is not None
    assert f.value is not None
    assert m.difference is not None
    assert f.difference is not None
    assert m.difference.value == pytest.approx(m.value.value - f.value.value)
    assert m.difference.value == pytest.approx(-f.difference.value)
    assert m.p_raw == f.p_raw
    # Two groups are one test, so nothing is corrected.
    corrected = correct_groups([m, f])
    assert [g.p for g in corrected] == [m.p_raw, m.p_raw]


def test_small_groups_show_no_number() -> None:
    result = made(4, mode="single")
    column: list[str | None] = ["big"] * (ROWS - 6) + ["tiny"] * 6
    big, tiny = compare_groups(result, "site", column, patients(), smallest=10, **OPTIONS)
    assert (tiny.group, tiny.suppressed) == ("tiny", "fewer than 10 patients")
    assert (tiny.n, tiny.patients, tiny.value, tiny.difference) == (None, None, None, None)
    assert big.value is not None
    assert big.difference is None  # the rest would give the small group away
    assert math.isnan(big.p_raw)
    one_sided: list[str | None] = ["pos" if t else "neg" for t in result.truth[:, 0]]
    both = compare_groups(result, "x", one_sided, patients(), smallest=4, **OPTIONS)
    assert all("on both sides" in g.suppressed for g in both)


def test_a_group_without_a_finding_is_compared_on_the_other_findings() -> None:
    result = made(5, labels=3)
    inside = np.arange(ROWS) < 40
    result.truth[inside, 2] = 0  # never in the first group
    column = ["a" if i else "b" for i in inside]
    a, b = sorted(compare_groups(result, "site", column, patients(), smallest=4, **OPTIONS), key=lambda g: g.group)
    assert (a.findings, b.findings) == (2, 2)
    assert a.value is not None
    by_hand = np.mean([auroc(result.truth[inside, k], result.answers[inside, k]) for k in (0, 1)])
    assert a.value.value == pytest.approx(by_hand)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_correction_over_many_groups_is_holm(p_values: list[float]) -> None:
    number = Interval(0.5, 0.4, 0.6, 10)
    rows = [GroupScore("c", str(i), 10, 10, number, number, p, math.nan) for i, p in enumerate(p_values)]
    rows = [*rows, GroupScore("c", "x", None, None, None, None, math.nan, math.nan, suppressed="small"),
            GroupScore("c", "y", None, None, None, None, math.nan, math.nan, suppressed="small")]  # fmt: skip
    assert [g.p for g in correct_groups(rows)[:-2]] == pytest.approx(holm(p_values).tolist())
    assert math.isnan(correct_groups(rows)[-1].p)


def test_calibration_of_several_findings_is_the_mean_of_each() -> None:
    from chiasm.metrics.calibration import expected_calibration_error

    random = np.random.default_rng(0)
    given, truth = random.random((60, 2)), (random.random((60, 2)) < 0.3).astype(float)
    mine = of_measure("ece", truth, given, [str(i) for i in range(60)], n_resamples=20, seed=0)
    single = [
        expected_calibration_error(truth[:, k].astype(int).tolist(), given[:, k], of="positive") for k in range(2)
    ]
    assert mine.value == pytest.approx(np.mean(single))
    classes = given / given.sum(1, keepdims=True)
    one = np.eye(2)[random.integers(2, size=60)]
    top = of_measure("ece", one, classes, [str(i) for i in range(60)], n_resamples=20, seed=0)
    assert top.value == pytest.approx(expected_calibration_error(one.argmax(1).tolist(), classes))
