"""Prompt search: it equals the plain classifier on the same texts, never chooses on what it scores, and admits luck."""

from __future__ import annotations

import dataclasses
import json
import warnings
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import ChiasmError, InputError, LeakageError, SpaceMismatch, UnknownName
from chiasm.metrics.classification import auroc, balanced_accuracy
from chiasm.tasks.prompt_grid import ALL_CLASSES, GridVectors, PromptGrid, make_problems
from chiasm.tasks.prompt_search import search_prompts, split_patients
from chiasm.tasks.prompts import LabelPrompts, PromptSet, PromptWarning
from chiasm.tasks.zero_shot import build_classifier, classify
from chiasm.types import Embeddings, Space

SPACE = Space("toy", "abc", "def", 16)
NAMES = {"effusion": ("effusion", "pleural fluid"), "oedema": ("oedema",)}


def embed_text(texts: list[str]) -> Embeddings:
    """Give every text a direction of its own, by its letters."""
    rows = [np.random.default_rng(list(t.encode())).normal(size=16) for t in texts]
    return Embeddings(np.asarray(rows), tuple(texts), SPACE, "text", normalized=False, logit_scale=20.0)


def toy_images(n: int = 120, *, seed: int = 0, per_patient: int = 2) -> Embeddings:
    vectors = np.random.default_rng(seed).normal(size=(n, 16))
    return Embeddings(
        vectors,
        tuple(f"i{k}" for k in range(n)),
        SPACE,
        "image",
        normalized=False,
        patients=tuple(f"p{k // per_patient}" for k in range(n)),
    )


def informed(good: str, *, n: int = 240, strength: float = 2.0, seed: int = 0) -> tuple[Embeddings, list[int]]:
    """Images of which the positive ones lie towards one text only."""
    images = toy_images(n, seed=seed)
    truth = np.random.default_rng(seed + 1).integers(0, 2, n)
    towards = embed_text([good]).normalize().vectors[0]
    return dataclasses.replace(images, vectors=images.vectors + strength * truth[:, None] * towards), truth.tolist()


@pytest.fixture
def grid() -> GridVectors:
    return PromptGrid.from_templates(NAMES, ("{}", "a film with {}", "there is {}")).embed(embed_text)


@pytest.mark.parametrize("pairs", [True, False])
@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_a_choice_scores_what_its_classifier_scores(pairs: bool, seed: int) -> None:
    vectors = PromptGrid.from_templates(NAMES, ("{}", "a film with {}"), pairs=pairs).embed(embed_text)
    images = toy_images(20, seed=seed)
    rng = np.random.default_rng(seed)
    for number, problem in enumerate(make_problems(images, vectors, mode="multi")):
        pick = tuple(
            frozenset(rng.choice(len(a.options), rng.integers(1, len(a.options) + 1), replace=False).tolist())
            for a in problem.axes
        )
        prompts = vectors.grid.prompts(problem.chosen(pick))
        plain = classify(images, build_classifier(prompts, embed_text), mode="multi" if pairs else "single")
        expected = plain.cosines[:, number].astype(float)
        if plain.negative_cosines is not None:
            expected = expected - plain.negative_cosines[:, number]
        np.testing.assert_allclose(problem.scores(pick)[:, 0], expected, atol=1e-5)


def test_classes_answer_as_the_classifier_does(grid: GridVectors) -> None:
    images = toy_images(40)
    (problem,) = make_problems(images, grid, mode="single")
    predicted = classify(images, grid.classifier()).predicted
    assert [grid.grid.names[int(k)] for k in problem.answers(problem.everything)] == list(predicted)


def test_a_grid_is_the_prompt_set_of_the_same_words() -> None:
    templates = ("a film with {}", "there is {}")
    grid = PromptGrid.from_templates(NAMES, templates, pairs=True)
    made = PromptSet.from_pairs(NAMES, templates)
    assert [(p.positive, p.negative) for p in grid.prompts().labels] == [(p.positive, p.negative) for p in made.labels]
    default = PromptGrid.from_templates(["oedema"], pairs=True).prompts()
    assert default.labels == PromptSet.from_pairs(["oedema"]).labels
    with pytest.warns(PromptWarning, match="itself a negation"):
        normal = PromptGrid.from_templates(["No Finding"], pairs=True)
    assert "no abnormality" in normal.prompts().labels[0].positive


def test_a_given_set_is_taken_apart_text_by_text() -> None:
    prompts = PromptSet((LabelPrompts("a", ("x", "y"), ("not x", "not y")), LabelPrompts("b", ("u", "v"), ("w",))))
    first, second = PromptGrid.from_prompts(prompts).labels
    assert first.select(["y"], ["a"]) == LabelPrompts("a", ("y",), ("not y",))
    assert second.select(["u"], ["b"]) == LabelPrompts("b", ("u",), ("w",))
    with pytest.raises(InputError, match="any_of"):
        PromptGrid.from_prompts(PromptSet((LabelPrompts("a", ("x", "y"), (), (("x",), ("y",))),)))


def test_the_informative_template_is_found_and_holds_on_other_patients() -> None:
    vectors = PromptGrid.from_templates(["oedema"], ("{}", "noise {}", "a film with {}", "grain {}")).embed(embed_text)
    images, truth = informed("a film with oedema")
    choose, test = split_patients(images)
    found = search_prompts(images, vectors, {"oedema": truth}, choose=choose, test=test, redraws=20, n_resamples=200)
    (problem,) = found.problems
    assert "a film with {}" in problem.templates
    assert problem.option_share["a film with {}"] > 0.9
    assert problem.test.value > problem.test_plain.value + 0.02
    assert found.difference.low > 0
    assert found.prompts.labels[0].positive[0] != ""
    singles = {s.option: s.test for s in problem.singles}
    assert max(singles, key=lambda name: singles[name]) == "a film with {}"
    assert singles["a film with {}"] == pytest.approx(
        auroc(np.asarray(truth)[test], classify(images, vectors.classifier(PromptSet((LabelPrompts("oedema", ("a film with oedema",)),))), mode="single").cosines[test, 0]),
        abs=1e-6,
    )  # fmt: skip


def test_no_signal_is_reported_as_luck() -> None:
    templates = tuple(f"word{k} {{}}" for k in range(6))
    vectors = PromptGrid.from_templates(["oedema"], templates).embed(embed_text)
    optimism, tests, shares = [], [], []
    for seed in range(6):
        images = toy_images(120, seed=seed)
        truth = np.random.default_rng(seed + 50).integers(0, 2, 120)
        choose, test = split_patients(images, seed=seed)
        found = search_prompts(
            images, vectors, {"oedema": truth.tolist()}, choose=choose, test=test, redraws=20, n_resamples=50
        )
        optimism.append(found.optimism)
        tests.append(found.test.value)
        shares.append(found.problems[0].winner_share)
    assert np.mean(optimism) > 0.08
    assert abs(np.mean(tests) - 0.5) < 0.08
    assert np.mean(shares) < 0.6


def test_the_winner_never_scores_less_than_the_plain_ensemble_where_it_was_chosen() -> None:
    vectors = PromptGrid.from_templates(NAMES, tuple(f"w{k} {{}}" for k in range(4))).embed(embed_text)
    for seed in range(4):
        images = toy_images(80, seed=seed)
        truth = {n: np.random.default_rng(seed).integers(0, 2, 80).tolist() for n in NAMES}
        choose, test = split_patients(images, seed=seed)
        options = {"choose": choose, "test": test, "redraws": 0, "n_resamples": 20}
        greedy = search_prompts(images, vectors, truth, strategy="greedy", **options)
        whole = search_prompts(images, vectors, truth, strategy="exhaustive", **options)
        for a, b in zip(greedy.problems, whole.problems, strict=True):
            assert a.validation_plain.value <= a.validation.value + 1e-9 <= b.validation.value + 2e-9
            assert b.tried == b.candidates
            assert a.tried <= b.tried


def test_exhaustive_is_the_best_of_all_subsets() -> None:
    vectors = PromptGrid.from_templates(["oedema"], ("{}", "b {}", "c {}")).embed(embed_text)
    images, truth = informed("b oedema", n=60, strength=0.7)
    choose, test = split_patients(images)
    (problem,) = make_problems(images, vectors, mode="multi")
    best = 0.0
    for chosen in product([0, 1], repeat=3):
        if any(chosen):
            pick = (frozenset(np.flatnonzero(chosen).tolist()), frozenset([0]))
            best = max(best, auroc(np.asarray(truth)[choose], problem.answers(pick)[choose]))
    found = search_prompts(images, vectors, {"oedema": truth}, choose=choose, test=test, redraws=0, n_resamples=20)
    assert found.problems[0].validation.value == pytest.approx(best)
    assert found.problems[0].candidates == 7


def test_test_rows_do_not_change_the_choice() -> None:
    vectors = PromptGrid.from_templates(NAMES, ("{}", "b {}", "c {}")).embed(embed_text)
    images = toy_images(80)
    truth = np.random.default_rng(0).integers(0, 2, 80)
    choose, test = split_patients(images)
    changed = truth.copy()
    changed[test] = 1 - changed[test]
    options = {"choose": choose, "test": test, "redraws": 3, "n_resamples": 20}
    first = search_prompts(images, vectors, dict.fromkeys(NAMES, truth.tolist()), **options)
    second = search_prompts(images, vectors, dict.fromkeys(NAMES, changed.tolist()), **options)
    assert first.prompts == second.prompts
    assert first.test.value == pytest.approx(1 - second.test.value)


def test_classes_choose_together(grid: GridVectors) -> None:
    images = toy_images(80)
    truth = np.random.default_rng(0).choice(list(NAMES), 80).tolist()
    choose, test = split_patients(images)
    found = search_prompts(images, grid, truth, choose=choose, test=test, mode="single", redraws=5, n_resamples=50)
    (problem,) = found.problems
    assert problem.name == ALL_CLASSES
    assert problem.candidates == 7 * 3
    predicted = classify(images.select(test), grid.classifier(found.prompts)).predicted
    assert problem.test.value == pytest.approx(balanced_accuracy([truth[k] for k in test], list(predicted)))
    assert found.metric == "balanced_accuracy"
    accuracy = search_prompts(
        images, grid, truth, choose=choose, test=test, mode="single", metric="accuracy", redraws=0, n_resamples=20
    )
    assert accuracy.problems[0].majority is not None


def test_the_same_seed_gives_the_same_result_and_json_is_plain(grid: GridVectors) -> None:
    images = toy_images(60)
    truth = {n: np.random.default_rng(3).integers(0, 2, 60).tolist() for n in NAMES}
    choose, test = split_patients(images)
    options = {"choose": choose, "test": test, "redraws": 10, "n_resamples": 50, "metric": "auprc"}
    first = search_prompts(images, grid, truth, **options)
    assert first.to_dict() == search_prompts(images, grid, truth, **options).to_dict()
    json.dumps(first.to_dict())


def test_a_label_without_both_classes_keeps_the_plain_ensemble(grid: GridVectors) -> None:
    images = toy_images(40)
    choose, test = split_patients(images)
    truth = {"effusion": [0] * 40, "oedema": [k % 2 for k in range(40)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = search_prompts(images, grid, truth, choose=choose, test=test, redraws=2, n_resamples=20)
    assert not found.problems[0].searched
    assert found.problems[0].prompts.labels[0] == grid.grid.prompts().labels[0]
    assert np.isfinite(found.test.value)
    assert found.optimism == pytest.approx(found.problems[1].optimism.value)


def test_wrong_input_is_refused(grid: GridVectors) -> None:
    images = toy_images(20)
    truth = {n: [0, 1] * 10 for n in NAMES}
    good = {"choose": list(range(10)), "test": list(range(10, 20)), "redraws": 0, "n_resamples": 5}
    cases: list[tuple[dict[str, object], type[ChiasmError], str]] = [
        ({"test": list(range(9, 20))}, LeakageError, "1 patients are among"),
        ({"choose": []}, InputError, "no row may choose"),
        ({"test": [25]}, InputError, "must lie in 0 to 19"),
        ({"metric": "accuracy"}, UnknownName, "metric of mode"),
        ({"strategy": "magic"}, UnknownName, "strategy"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            search_prompts(images, grid, truth, **{**good, **change})
    with pytest.raises(InputError, match="`oedema` has no truth"):
        search_prompts(images, grid, {"effusion": [0, 1] * 10}, **good)
    with pytest.raises(InputError, match="19 truth values for 20"):
        search_prompts(images, grid, {n: [0] * 19 for n in NAMES}, **good)
    with pytest.raises(InputError, match="one column of class names"):
        search_prompts(images, grid, truth, mode="single", **good)
    with pytest.raises(InputError, match="1 classes of the truth"):
        search_prompts(images, grid, ["secret"] * 20, mode="single", **good)
    with pytest.raises(InputError, match="all zero"):
        search_prompts(dataclasses.replace(images, vectors=images.vectors * 0), grid, truth, **good)
    other = dataclasses.replace(images, space=dataclasses.replace(SPACE, weights="other"))
    with pytest.raises(SpaceMismatch):
        search_prompts(other, grid, truth, **good)
    wide = PromptGrid.from_templates(["oedema"], tuple(f"w{k} {{}}" for k in range(17))).embed(embed_text)
    with pytest.raises(InputError, match="131071 choices"):
        search_prompts(images, wide, truth, strategy="exhaustive", **good)
    with pytest.raises(InputError, match="one class alone"):
        make_problems(images, wide, mode="single")


def test_the_order_of_rows_does_not_matter() -> None:
    vectors = PromptGrid.from_templates(NAMES, ("{}", "b {}", "c {}")).embed(embed_text)
    images = toy_images(60)
    truth = {n: np.random.default_rng(k).integers(0, 2, 60) for k, n in enumerate(NAMES)}
    choose, test = split_patients(images)
    order = np.random.default_rng(5).permutation(60)
    place = np.argsort(order)
    options = {"redraws": 5, "n_resamples": 30}
    first = search_prompts(
        images, vectors, {n: t.tolist() for n, t in truth.items()}, choose=choose, test=test, **options
    )
    second = search_prompts(
        images.select(order),
        vectors,
        {n: t[order].tolist() for n, t in truth.items()},
        choose=place[choose],
        test=place[test],
        **options,
    )
    assert first.prompts == second.prompts
    assert first.test.value == pytest.approx(second.test.value)
    assert first.difference.low == pytest.approx(second.difference.low)
    assert [p.winner_share for p in first.problems] == pytest.approx([p.winner_share for p in second.problems])


def test_of_equal_choices_the_largest_ensemble_wins() -> None:
    """Where every choice tells the patients apart, nothing speaks for leaving one out."""
    vectors = PromptGrid.from_templates(["oedema"], ("{}", "film {}")).embed(embed_text)
    towards = embed_text(["oedema", "film oedema"]).normalize().vectors.sum(0)
    truth = np.arange(40) % 2
    images = dataclasses.replace(
        toy_images(40), vectors=0.01 * toy_images(40).vectors + (2 * truth[:, None] - 1) * towards
    )
    choose, test = split_patients(images)
    for strategy in ("exhaustive", "greedy"):
        found = search_prompts(
            images, vectors, {"oedema": truth.tolist()}, choose=choose, test=test, strategy=strategy, redraws=4, n_resamples=20,
        )  # fmt: skip
        assert found.prompts == vectors.grid.prompts()
        assert found.problems[0].winner_share == 1.0
        assert found.difference.value == 0.0
        assert found.problems[0].difference.p_raw == 1.0


def test_shares_of_options_and_winners_agree() -> None:
    vectors = PromptGrid.from_templates(["oedema"], ("{}", "b {}", "c {}", "d {}")).embed(embed_text)
    images = toy_images(60)
    truth = np.random.default_rng(2).integers(0, 2, 60).tolist()
    choose, test = split_patients(images)
    (found,) = search_prompts(
        images, vectors, {"oedema": truth}, choose=choose, test=test, redraws=40, n_resamples=20
    ).problems
    assert set(found.option_share) == {"{}", "b {}", "c {}", "d {}"}
    assert 1.0 <= sum(found.option_share.values()) <= 4.0
    assert min(found.option_share[t] for t in found.templates) >= found.winner_share
    assert 1 <= found.winners <= 15
    low, middle, high = found.reselected
    assert low <= middle <= high


def test_a_gain_by_luck_is_seldom_called_significant() -> None:
    """Twenty searches without any signal: the difference of winner and ensemble is tested on rows that chose nothing."""
    vectors = PromptGrid.from_templates(["oedema"], tuple(f"w{k} {{}}" for k in range(4))).embed(embed_text)
    called = 0
    for seed in range(20):
        images = toy_images(80, seed=seed)
        truth = np.random.default_rng(seed + 99).integers(0, 2, 80).tolist()
        choose, test = split_patients(images, seed=seed)
        found = search_prompts(images, vectors, {"oedema": truth}, choose=choose, test=test, redraws=0, n_resamples=100)
        called += found.difference.low > 0
    assert called <= 3


def test_a_class_name_for_each_row_also_tells_labels_apart() -> None:
    vectors = PromptGrid.from_templates(NAMES, ("{}", "b {}")).embed(embed_text)
    images = toy_images(40)
    classes = ["effusion" if k % 3 else "oedema" for k in range(40)]
    columns = {n: [int(c == n) for c in classes] for n in NAMES}
    choose, test = split_patients(images)
    options = {"choose": choose, "test": test, "redraws": 0, "n_resamples": 20}
    assert search_prompts(images, vectors, classes, **options).prompts == search_prompts(images, vectors, columns, **options).prompts  # fmt: skip
