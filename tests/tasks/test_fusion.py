"""Fusion: what each modality says alone, what they say together, and what happens when one is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from chiasm.errors import InputError
from chiasm.tasks.fusion import (
    BlockScaler,
    EarlyFusion,
    LateFusion,
    SingleModality,
    compare_fusion,
    grouped_folds,
)
from chiasm.tasks.modalities import Modalities, encode_clinical, make_modalities
from chiasm.types import Embeddings, Space


def two_halves(n: int = 400, seed: int = 0, noise: float = 1.0) -> tuple[Modalities, np.ndarray, list[str], np.ndarray]:
    """Rows whose class depends on one number that only images show and one that only the table shows."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n))
    logit = 2 * (a + b)
    truth = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    image = np.column_stack([a, *rng.normal(size=(4, n)) * noise])
    table = np.column_stack([b, rng.normal(size=n) * noise])
    ids = tuple(str(i) for i in range(n))
    return Modalities({"image": image, "clinical": table}, ids), truth, [f"p{i // 2}" for i in range(n)], logit


def test_fusion_reaches_what_both_halves_allow_and_no_half_does() -> None:
    rows, truth, groups, logit = two_halves(500)
    run = compare_fusion(rows, truth, groups, repeats=1)
    found = {a: roc_auc_score(truth, p[:, 1]) for a, p in run.probabilities.items()}
    oracle = roc_auc_score(truth, logit)
    assert found["early fusion"] > oracle - 0.02
    assert found["late fusion"] > oracle - 0.035, "two half answers are rounder than one whole"
    assert max(found["image"], found["clinical"]) < oracle - 0.08
    assert run.weights == pytest.approx({"image": 0.5, "clinical": 0.5}, abs=0.15)


def test_noise_beside_a_signal_gets_little_weight_and_costs_little() -> None:
    rows, truth, groups, _ = two_halves(400, seed=3)
    rng = np.random.default_rng(1)
    noisy = Modalities({"image": rows.blocks["image"], "text": rng.normal(size=(400, 30))}, rows.ids)
    run = compare_fusion(noisy, truth, groups, repeats=1)
    found = {a: roc_auc_score(truth, p[:, 1]) for a, p in run.probabilities.items()}
    assert 0.4 < found["text"] < 0.6
    assert found["late fusion"] > found["image"] - 0.02
    assert run.weights["image"] > 0.8


def test_one_modality_is_a_logistic_regression_on_standardised_numbers() -> None:
    rows, truth, groups, _ = two_halves()
    model = SingleModality("image", penalties=(1.0,)).fit(rows, truth, groups)
    block = rows.blocks["image"]
    scaled = (block - block.mean(0)) / block.std(0) / math.sqrt(block.shape[1])
    expected = LogisticRegression(C=1.0, max_iter=2000).fit(scaled, truth).predict_proba(scaled)
    assert model.predict_proba(rows) == pytest.approx(expected, abs=1e-4)


def test_a_missing_modality_leaves_the_others_word() -> None:
    rows, truth, groups, _ = two_halves()
    late = LateFusion().fit(rows, truth, groups)
    alone = SingleModality("image").fit(rows, truth, groups)
    assert late.predict_proba(rows.without("clinical")) == pytest.approx(alone.predict_proba(rows), abs=1e-6)
    nothing = rows.without("clinical").without("image")
    assert late.predict_proba(nothing) == pytest.approx(np.tile(late.prior_, (len(rows), 1)))
    early = EarlyFusion().fit(rows, truth, groups)
    assert np.isfinite(early.predict_proba(nothing)).all()
    assert roc_auc_score(truth, early.predict_proba(rows.without("clinical"))[:, 1]) > 0.7


def test_rows_that_lack_a_modality_in_training_are_used_and_marked() -> None:
    rows, truth, groups, _ = two_halves()
    gaps = np.random.default_rng(0).random(len(rows)) < 0.4
    blocks = {n: b.copy() for n, b in rows.blocks.items()}
    blocks["clinical"][gaps] = np.nan
    run = compare_fusion(Modalities(blocks, rows.ids), truth, groups, repeats=1)
    found = {a: roc_auc_score(truth, p[:, 1]) for a, p in run.probabilities.items()}
    assert run.present["clinical"] == pytest.approx(1 - gaps.mean())
    assert min(found["early fusion"], found["late fusion"]) > found["image"] + 0.03
    assert set(np.unique(run.probabilities["clinical"][gaps].round(3)[:, 1])) <= set(run.priors[gaps].round(3)[:, 1])


def test_the_scaler_learns_from_present_rows_only_and_weighs_blocks_alike() -> None:
    rng = np.random.default_rng(2)
    wide, narrow = rng.normal(5, 3, size=(200, 100)), rng.normal(size=(200, 2))
    wide[:50] = np.nan
    for block in (wide, narrow):
        scaler = BlockScaler(components=500).fit(block)
        found = scaler.transform(block)
        here = ~np.isnan(block).all(axis=1)
        assert (found[:, -1] == ~here).all()
        assert (found[~here, :-1] == 0).all()
        assert (found[here, :-1] ** 2).sum(1).mean() == pytest.approx(1.0, abs=0.01)
    assert BlockScaler(components=8).fit(wide).transform(wide).shape == (200, 9)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_folds_keep_patients_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [f"p{g}" for g in rng.integers(0, 25, size=80)]
    numbers = rng.integers(0, 2, size=80)
    seen: list[int] = []
    for train, test in grouped_folds(numbers, groups, 3, seed):
        assert not {groups[i] for i in train} & {groups[i] for i in test}
        seen += test.tolist()
    assert len(seen) == len(set(seen))


def test_three_classes_and_repeatable_numbers() -> None:
    rows, _, groups, logit = two_halves(300)
    classes = np.digitize(logit, [-1.0, 1.0])
    one, two = (compare_fusion(rows, classes, groups, folds=3, repeats=1, seed=4) for _ in range(2))
    for arm, found in one.probabilities.items():
        assert found.sum(1) == pytest.approx(1.0)
        assert (found == two.probabilities[arm]).all()
    assert (one.probabilities["early fusion"].argmax(1) == classes).mean() > 0.6


def test_clinical_columns_become_numbers() -> None:
    block, names = encode_clinical({"age": ["61", 40, None, "?"], "sex": ["F", "M ", "unknown", "f"]})
    assert names == ("age", "sex=f", "sex=m")
    expected = [[61, 1, 0], [40, 0, 1], [math.nan] * 3, [math.nan, 1, 0]]
    assert np.array_equal(block, np.array(expected, dtype=float), equal_nan=True)


def test_sides_are_matched_by_id_whatever_their_order_or_space() -> None:
    def side(ids: str, modality: str, dim: int) -> Embeddings:
        vectors = np.array([[ord(i)] * dim for i in ids], dtype=np.float32)
        return Embeddings(vectors, tuple(ids), Space(modality, "w", "p", dim), modality, normalized=False)  # type: ignore[arg-type]

    found = make_modalities("abc", images=side("cb", "image", 2), texts=side("abc", "text", 3))
    assert found.blocks["image"][:, 0].tolist()[1:] == [98, 99]
    assert found.present("image").tolist() == [False, True, True]
    assert found.select([2, 0]).ids == ("c", "a")
    assert found.only("text").names == ("text",)
    with pytest.raises(InputError, match="none of the 1 rows"):
        make_modalities("z", images=side("ab", "image", 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: encode_clinical({"note": [f"w{i}" for i in range(20)]}), "20 different words"),
        (lambda: encode_clinical({"age": [None, "?"]}), "has no value"),
        (lambda: Modalities({}, ()), "no modality"),
        (lambda: Modalities({"image": np.zeros((2, 2))}, ("a",)), r"shape \(2, 2\) for 1 rows"),
        (lambda: Modalities({"image": np.array([[math.inf]])}, ("a",)), "infinite"),
        (lambda: LateFusion(weights="best"), "fitted or equal"),
        (lambda: EarlyFusion().set_params(penalty=3), "unknown parameter"),
        (lambda: EarlyFusion().fit(two_halves()[0], [1] * 400), "one class"),
        (lambda: EarlyFusion().fit(two_halves()[0], [1]), "1 classes for 400 rows"),
        (lambda: SingleModality("text").fit(two_halves()[0], two_halves()[1]), "no modality `text`"),
        (lambda: compare_fusion(two_halves(20)[0], [0, 1] + [0] * 18, list(range(20))), "`1` has 1 patients"),
    ],
)
def test_what_cannot_be_is_said(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


def test_a_model_of_other_modalities_refuses() -> None:
    rows, truth, groups, _ = two_halves()
    model = EarlyFusion().fit(rows, truth, groups)
    with pytest.raises(InputError, match="trained on image, clinical, got image"):
        model.predict_proba(rows.only("image"))


def test_rows_that_no_fold_predicts_are_not_passed_over() -> None:
    """Patients with rows of both classes: the draw may put all of class 1 into one fold, whose rows nobody predicts."""
    groups = [f"p{k}" for k in (1, 0, 2, 0, 0, 1, 1, 1, 2, 1, 1, 0, 0, 0, 2, 1)]
    numbers = np.array([1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1])
    rows = Modalities({"image": np.arange(32.0).reshape(16, 2)}, tuple(map(str, range(16))))
    with pytest.raises(InputError, match="10 of 16 rows were in no fold") as caught:
        compare_fusion(rows, numbers, groups, folds=2, repeats=1)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        (["1", "2.5", None], ("x",), [[1], [2.5], [math.nan]]),
        ([True, False, None], ("x",), [[1], [0], [math.nan]]),
        (["-3", " 4 ", "n/a"], ("x",), [[-3], [4], [math.nan]]),
        (["a", "B", "b"], ("x=a", "x=b"), [[1, 0], [0, 1], [0, 1]]),
        (["a", None, "NaN"], ("x=a",), [[1], [math.nan], [math.nan]]),
        (["III", "iii ", "IV"], ("x=iii", "x=iv"), [[1, 0], [1, 0], [0, 1]]),
        (["é", "É", "z"], ("x=z", "x=é"), [[0, 1], [0, 1], [1, 0]]),
        ([1, "high", 2], ("x=1", "x=2", "x=high"), [[1, 0, 0], [0, 0, 1], [0, 1, 0]]),
        ([math.inf, 1, 2], ("x=1", "x=2", "x=inf"), [[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    ],
)
def test_how_cells_become_numbers(values: list[object], names: tuple[str, ...], expected: list[list[float]]) -> None:
    block, found = encode_clinical({"x": values})  # type: ignore[dict-item]
    assert found == names
    assert np.array_equal(block, np.array(expected, dtype=float), equal_nan=True)


@given(st.integers(0, 10_000), st.permutations(range(12)))
@settings(max_examples=30, deadline=None)
def test_encoding_follows_the_order_of_rows(seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    columns = {"age": rng.integers(0, 9, 12).tolist(), "sex": ["f", *rng.choice(["f", "m", "?"], 11).tolist()]}
    block, names = encode_clinical(columns)
    turned, same = encode_clinical({n: [v[i] for i in order] for n, v in columns.items()})
    assert names == same
    assert np.array_equal(block[order], turned, equal_nan=True)


@given(st.integers(0, 10_000), st.floats(0.01, 100.0), st.floats(-50, 50))
@settings(max_examples=20, deadline=None)
def test_units_of_a_column_do_not_matter(seed: int, scale: float, shift: float) -> None:
    block = np.random.default_rng(seed).normal(size=(30, 3))
    block[::7] = np.nan
    one = BlockScaler().fit(block).transform(block)
    other = BlockScaler().fit(block * scale + shift).transform(block * scale + shift)
    assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("weights", ["fitted", "equal"])
def test_late_fusion_by_hand(weights: str) -> None:
    """Weighted means of the log probabilities of the models alone, made probabilities again."""
    rows, truth, groups, _ = two_halves(120)
    model = LateFusion(weights=weights, penalties=(1.0,)).fit(rows, truth, groups)
    logs = [np.log(model.models_[n].predict_proba(rows)) * model.weights_[n] for n in rows.names]
    mixed = np.exp(sum(logs))
    assert model.predict_proba(rows) == pytest.approx(mixed / mixed.sum(1, keepdims=True))
    assert sum(model.weights_.values()) == pytest.approx(1)
    if weights == "equal":
        assert set(model.weights_.values()) == {0.5}


def test_test_rows_shape_nothing() -> None:
    """Changing the numbers of one patient changes no prediction of a model that did not train on the patient."""
    rows, truth, groups, _ = two_halves(80)
    one = compare_fusion(rows, truth, groups, folds=2, repeats=1)
    folds = grouped_folds(truth, groups, 2, 0)
    blocks = {n: b.copy() for n, b in rows.blocks.items()}
    mine = [i for i, g in enumerate(groups) if g == groups[int(folds[0][1][0])]]
    for block in blocks.values():
        block[mine] += 100.0
    other = compare_fusion(Modalities(blocks, rows.ids), truth, groups, folds=2, repeats=1)
    rest = np.setdiff1d(folds[0][1], mine)
    for arm in one.probabilities:
        assert one.probabilities[arm][rest] == pytest.approx(other.probabilities[arm][rest])
