"""AUROC, AUPRC and accuracies: equal to scikit-learn, honest about gaps, ties and single classes."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from chiasm.errors import InputError
from chiasm.metrics.classification import (
    MissingClassWarning,
    accuracy,
    accuracy_interval,
    auprc,
    auprc_interval,
    auroc,
    auroc_interval,
    balanced_accuracy,
    balanced_accuracy_interval,
    chance_level,
    macro_auroc,
    macro_auroc_interval,
    macro_f1,
    majority_baseline,
    multiclass_auroc,
)
from chiasm.metrics.labels import as_binary, as_classes, is_labelled, is_missing
from chiasm.metrics.weighted import macro_f1_statistic, multiclass_auroc_statistic

laws = settings(max_examples=60, deadline=None)
#: Few distinct scores, so that ties are common.
coarse = st.integers(-3, 3).map(float)
fine = st.floats(-1e6, 1e6)
scored = st.lists(st.tuples(st.integers(0, 1), st.one_of(coarse, fine)), min_size=2, max_size=60)


def columns(rows):
    truth, score = (np.array(c) for c in zip(*rows, strict=True))
    return truth, score


@laws
@given(scored)
def test_auroc_and_auprc_are_those_of_scikit_learn(rows):
    truth, score = columns(rows)
    assume(0 < truth.sum() < len(truth))
    assert auroc(truth, score) == pytest.approx(sk.roc_auc_score(truth, score), abs=1e-12)
    assert auprc(truth, score) == pytest.approx(sk.average_precision_score(truth, score), abs=1e-12)


@laws
@given(scored)
def test_auroc_is_the_share_of_ordered_pairs(rows):
    truth, score = columns(rows)
    ones, zeros = score[truth == 1], score[truth == 0]
    assume(len(ones) and len(zeros))
    wins = (ones[:, None] > zeros).mean() + 0.5 * (ones[:, None] == zeros).mean()
    assert auroc(truth, score) == pytest.approx(wins, abs=1e-12)


@laws
@given(scored)
def test_only_the_order_of_scores_counts(rows):
    truth, score = columns(rows)
    assume(0 < truth.sum() < len(truth))
    ranks = np.unique(score, return_inverse=True)[1]
    for stretched in (ranks * 1.0, np.exp(ranks / 10), ranks.astype(np.float32) - 5):
        assert auroc(truth, stretched) == pytest.approx(auroc(truth, score), abs=1e-12)
        assert auprc(truth, stretched) == pytest.approx(auprc(truth, score), abs=1e-12)
    assert auroc(truth, -score) == pytest.approx(1 - auroc(truth, score), abs=1e-12)
    assert auroc(1 - truth, score) == pytest.approx(1 - auroc(truth, score), abs=1e-12)


@laws
@given(scored, st.integers(0, 2**31))
def test_order_of_rows_and_rows_without_a_label_do_not_matter(rows, seed):
    truth, score = columns(rows)
    assume(0 < truth.sum() < len(truth))
    order = np.random.default_rng(seed).permutation(len(truth) + 3)
    gaps = np.concatenate([truth.astype(object), [None, math.nan, None]])[order]
    more = np.concatenate([score, [1e9, -1e9, 0.0]])[order]
    assert auroc(gaps, more) == pytest.approx(auroc(truth, score), abs=1e-12)
    assert auprc(list(gaps), more) == pytest.approx(auprc(truth, score), abs=1e-12)


@laws
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcde")), min_size=1, max_size=50))
def test_accuracies_are_those_of_scikit_learn(rows):
    truth, predicted = (list(c) for c in zip(*rows, strict=True))
    assert accuracy(truth, predicted) == pytest.approx(sk.accuracy_score(truth, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about classes that are only predicted
        expected = sk.balanced_accuracy_score(truth, predicted)
    assert balanced_accuracy(truth, predicted) == pytest.approx(expected)
    assert accuracy([*truth, None], [*predicted, "a"]) == pytest.approx(accuracy(truth, predicted))


def test_missing_prediction_is_wrong():
    assert accuracy(["a", "b"], ["a", None]) == 0.5
    assert balanced_accuracy([0, 0, 1], [0, math.nan, 1]) == 0.75


def test_known_values():
    assert auroc([0, 0, 1, 1], [1, 2, 3, 4]) == 1.0
    assert auroc([0, 0, 1, 1], [1, 1, 1, 1]) == 0.5
    assert auroc([True, False], [-math.inf, math.inf]) == 0.0
    assert auprc([0, 1, 1, 0], [1, 1, 1, 1]) == 0.5
    assert auprc([1, 0], [1, 2]) == 0.5
    assert balanced_accuracy([0] * 98 + [1] * 2, [0] * 100) == 0.5
    assert majority_baseline([0] * 98 + [1] * 2) == 0.98
    assert majority_baseline(["a", None, "b", "b"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("truth", [[1, 1], [0, 0], [None, None], [], [1, None]])
def test_one_class_has_no_auroc(truth):
    assert math.isnan(auroc(truth, [0.0] * len(truth)))
    interval = auroc_interval(truth, [0.0] * len(truth), list(range(len(truth))))
    assert math.isnan(interval.value)
    assert math.isnan(interval.low)
    assert interval.n == sum(t is not None for t in truth)


def test_auprc_needs_a_positive():
    assert math.isnan(auprc([0, 0], [1, 2]))
    assert auprc([1, 1], [1, 2]) == 1.0
    assert math.isnan(accuracy([None], ["a"]))
    assert math.isnan(balanced_accuracy([], []))
    assert math.isnan(majority_baseline([None]))


def test_macro_auroc_skips_one_class_labels_and_says_so():
    truth = np.array([[0, 1, 1, np.nan], [1, 1, 0, np.nan], [0, 1, np.nan, np.nan], [1, 1, 1, np.nan]])
    score = np.array([[0.1, 0, 0.2, 0], [0.9, 0, 0.8, 0], [0.2, 0, 0.5, 0], [0.8, 0, 0.9, 0]])
    macro = macro_auroc(truth, score)
    assert macro.skipped == 2
    assert macro.per_label[0] == 1.0
    assert macro.per_label[2] == 0.5
    assert np.isnan([macro.per_label[1], macro.per_label[3]]).all()
    assert macro.value == 0.75
    interval = macro_auroc_interval(truth, score, list("abcd"))
    assert interval.value == macro.value
    assert interval.n == 4
    nothing = macro_auroc(np.ones((3, 2)), np.ones((3, 2)))
    assert math.isnan(nothing.value)
    assert nothing.skipped == 2


def test_chance_levels():
    labels = [1, 0, 0, None, 0]
    assert chance_level(labels, "auroc") == chance_level(labels, "macro_auroc") == 0.5
    assert chance_level(labels, "auprc") == 0.25
    assert chance_level(["a", "b", "c", None], "accuracy") == pytest.approx(1 / 3)
    assert chance_level(["a", "b", "b"], "balanced_accuracy") == 0.5
    assert math.isnan(chance_level([None], "auprc"))
    assert math.isnan(chance_level([None], "accuracy"))
    with pytest.raises(InputError, match="unknown metric `f1`"):
        chance_level(labels, "f1")


def test_guessing_reaches_chance():
    """The printed chance is what answers without information reach on average."""
    random = np.random.default_rng(0)
    truth = (random.random(4000) < 0.2).astype(int)
    score = random.random(4000)
    assert auroc(truth, score) == pytest.approx(chance_level(truth, "auroc"), abs=0.04)
    assert auprc(truth, score) == pytest.approx(chance_level(truth, "auprc"), abs=0.03)
    guess = random.integers(0, 2, 4000)
    assert accuracy(truth, guess) == pytest.approx(chance_level(truth, "accuracy"), abs=0.03)
    assert balanced_accuracy(truth, guess) == pytest.approx(chance_level(truth, "balanced_accuracy"), abs=0.04)


def test_intervals_hold_value_count_and_chance():
    random = np.random.default_rng(1)
    truth = random.integers(0, 2, 120).astype(object)
    score = random.random(120) + 0.6 * (truth == 1)
    truth[5] = None
    patients = [f"p{i // 3}" for i in range(120)]
    known = truth != None  # noqa: E711 (element by element)
    for interval, value, chance in (
        (auroc_interval(truth, score, patients), auroc(truth, score), 0.5),
        (auprc_interval(truth, score, patients), auprc(truth, score), truth[known].mean()),
        (accuracy_interval(truth, list(score > 0.8), patients), accuracy(truth, list(score > 0.8)), 0.5),
        (balanced_accuracy_interval(truth, list(score > 0.8), patients), None, 0.5),
    ):
        assert interval.n == 119
        assert interval.low < interval.value < interval.high
        assert interval.chance == pytest.approx(chance)
        if value is not None:
            assert interval.value == pytest.approx(value)
    again = auroc_interval(truth, score, patients, seed=0, n_resamples=1000)
    assert again == auroc_interval(truth, score, patients)
    wider = auroc_interval(truth, score, patients, level=0.99)
    assert wider.low <= again.low
    assert wider.high >= again.high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc([0, 2], [0, 1]), "1 of 2 are something else"),
        (lambda: auroc([0, -1], [0, 1]), "uncertain"),
        (lambda: auroc(["yes", "no"], [0, 1]), "got text"),
        (lambda: auroc([0, 1], [0, math.nan]), "1 of 2 scores are NaN"),
        (lambda: auroc([0, 1], [0, 1, 2]), r"scores of shape \(3,\) for labels of shape \(2,\)"),
        (lambda: auroc([[0, 1]], [[0, 1]]), "one value a row"),
        (lambda: macro_auroc([0, 1], [0, 1]), "rows, labels"),
        (lambda: macro_auroc_interval([0, 1], [0, 1], ["p", "q"]), "rows, labels"),
        (lambda: accuracy(["a"], ["a", "b"]), "different lengths: 1, 2"),
        (lambda: accuracy(["a"], [1]), "mix numbers and text"),
        (lambda: auroc_interval([0, 1], [0, 1], ["p"]), "different lengths: 2, 2, 1"),
        (lambda: auroc_interval([0, 1], [0, 1], ["p", None]), "1 of 2 rows have no group"),
        (lambda: auroc_interval([0, 1], [0, 1], ["p", "q"], level=95), "between 0 and 1"),
        (lambda: auroc_interval([0, 1], [0, 1], ["p", "q"], n_resamples=0), "at least 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_labels_as_people_store_them():
    assert np.array_equal(as_binary([True, 0, None, 1.0, math.nan]), [1, 0, math.nan, 1, math.nan], equal_nan=True)
    assert as_binary(np.array([[0, 1]], dtype=np.int8)).dtype == np.float64
    first, second = as_classes(["b", None, "a"], ["a", "c", math.nan])
    assert first.tolist() == [1, -1, 0]
    assert second.tolist() == [0, 2, -1]
    assert as_classes(np.array(["x", "y"]))[0].tolist() == [0, 1]
    assert is_labelled([None, 0, "", math.nan, np.float32("nan")]).tolist() == [False, True, True, False, False]
    assert is_missing(np.float64("nan"))
    assert not is_missing("nan")


@laws
@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(30, 60))
def test_f1_and_auroc_of_several_classes_are_those_of_scikit_learn(seed, classes, n):
    random = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(classes), random.integers(0, classes, n)])
    probabilities = random.dirichlet(np.ones(classes), len(truth)).round(1) + 1e-3  # ties
    probabilities /= probabilities.sum(1, keepdims=True)
    predicted = probabilities.argmax(1)
    assert macro_f1(truth, predicted) == pytest.approx(sk.f1_score(truth, predicted, average="macro"))
    assert balanced_accuracy(truth, predicted) == pytest.approx(sk.balanced_accuracy_score(truth, predicted))
    expected = sk.roc_auc_score(truth, probabilities[:, 1] if classes == 2 else probabilities, multi_class="ovr")
    assert multiclass_auroc(truth, probabilities) == pytest.approx(expected)


def test_a_missing_class_gives_nan_and_a_warning_no_crash():
    probabilities = np.full((4, 3), 1 / 3)
    with pytest.warns(MissingClassWarning, match="1 of 3 classes"):
        assert math.isnan(multiclass_auroc([0, 1, 1, None], probabilities))
    with pytest.warns(MissingClassWarning):
        assert math.isnan(multiclass_auroc([1, 1], [0.3, 0.4]))
    with pytest.warns(MissingClassWarning):
        assert math.isnan(multiclass_auroc([None, None], [0.3, 0.4]))
    assert np.isnan(multiclass_auroc_statistic([0, 1, 1, None], probabilities)(np.ones((2, 4)))).all()
    # A resample that lost a class averages the others.
    statistic = multiclass_auroc_statistic([0, 1, 2, 2], np.eye(3)[[0, 1, 2, 2]])
    assert statistic(np.array([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])).tolist()[:2] == [1.0, 1.0]
    assert np.isnan(statistic(np.array([[1.0, 0, 0, 0]]))).all()


def test_f1_counts_classes_that_are_only_predicted_and_leaves_out_unlabelled_rows():
    assert macro_f1([0, 0, None], [0, 1, 2]) == pytest.approx(sk.f1_score([0, 0], [0, 1], average="macro"))
    assert macro_f1([0, 1], [None, 1]) == pytest.approx(0.5)
    assert math.isnan(macro_f1([None], [1]))
    assert np.isnan(macro_f1_statistic([0], [0])(np.zeros((1, 1)))).all()
