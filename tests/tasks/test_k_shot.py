"""The k-shot protocol: no patient on two sides, one image a patient where possible, nested shots, a test set that stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError, LeakageError, UnknownName
from chiasm.metrics.classification import balanced_accuracy
from chiasm.tasks.k_shot import (
    Draws,
    Episode,
    class_prompts,
    draw_episodes,
    embedding_method,
    make_estimator,
    run_episodes,
)
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.types import Embeddings

Make = Callable[..., Embeddings]


def table(patients: int, *, rows_each: int = 2, classes: int = 2, seed: int = 0) -> tuple[list[int], list[str], Any]:
    """Return class, patient and test mark of each row; a patient may have rows of several classes."""
    random = np.random.default_rng(seed)
    names = [f"p{i:03d}" for i in range(patients) for _ in range(1 + int(random.integers(rows_each)))]
    labels = [int(n[1:]) % classes if random.random() < 0.8 else int(random.integers(classes)) for n in names]
    return labels, names, np.array([int(n[1:]) % 3 == 0 for n in names])


@settings(max_examples=40)
@given(patients=st.integers(24, 60), rows_each=st.integers(1, 4), classes=st.integers(2, 4), seed=st.integers(0, 999))
def test_laws_of_the_draws(patients: int, rows_each: int, classes: int, seed: int) -> None:
    labels, names, test = table(patients, rows_each=rows_each, classes=classes, seed=seed)
    try:
        draws = draw_episodes(labels, names, test, shots=(1, 2, 4, None), seeds=(0, 1, 5))
    except InputError as error:
        assert "test row" in str(error) or "patients" in str(error)  # noqa: PT017  # too small a table
        return
    owner = np.array(names)
    before: dict[int, Episode] = {}
    for episode in draws.episodes:
        sides = [set(owner[rows]) for rows in (episode.train, episode.validation, episode.test)]
        assert not sides[0] & sides[1]
        assert not (sides[0] | sides[1]) & sides[2]
        np.testing.assert_array_equal(episode.test, np.flatnonzero(test))
        k = episode.shots
        if k is None:
            assert len(episode.train) + len(episode.validation) == int((~test).sum())
            continue
        for rows in (episode.train, episode.validation):
            assert np.bincount(draws.truth[rows], minlength=classes).tolist() == [k] * classes
            assert len(set(rows.tolist())) == len(rows)
        if episode.seed in before:  # of a smaller k
            assert set(before[episode.seed].train) <= set(episode.train)
            assert set(before[episode.seed].validation) <= set(episode.validation)
        before[episode.seed] = episode
    for k in (1, 2, 4):
        assert (k in draws.shots) != (k in draws.left_out)


def test_one_image_a_patient_while_there_are_patients() -> None:
    names = [f"p{i:02d}" for i in range(24) for _ in range(3)]
    labels = [int(n[1:]) % 2 for n in names]
    test = np.array([int(n[1:]) >= 20 for n in names])  # 10 patients a class are left: 5 and 5
    draws = draw_episodes(labels, names, test, shots=(5, 15, 16), seeds=(0,))
    few, many = draws.episodes
    assert len({names[i] for i in few.train}) == 10  # five of each class, one image each
    assert len(many.train) == 30
    assert len({names[i] for i in many.train}) == 10  # filled up with their other images
    assert draws.left_out == {16: "a class has 15 images in its half of the patients, 16 are needed"}
    assert draws.pool_patients == {0: 10, 1: 10}


def test_seeds_differ_and_rows_may_be_shuffled() -> None:
    labels, names, test = table(60)
    draws = draw_episodes(labels, names, test, shots=(4,), seeds=(0, 1))
    one, other = draws.episodes
    assert set(one.train) != set(other.train)
    order = np.random.default_rng(3).permutation(len(labels))
    moved = draw_episodes([labels[i] for i in order], [names[i] for i in order], test[order], shots=(4,), seeds=(0,))
    assert {names[i] for i in one.train} == {names[order[i]] for i in moved.episodes[0].train}


def test_a_patient_in_support_and_test_is_impossible() -> None:
    labels, names, test = table(40)
    marked = test.copy()
    marked[np.flatnonzero(~test)[0]] = True  # one row of a pool patient who has others
    twice = next(i for i in np.flatnonzero(~test) if names.count(names[i]) > 1)
    marked = test.copy()
    marked[twice] = True
    with pytest.raises(LeakageError, match="1 patients are in both test and the rest") as error:
        draw_episodes(labels, names, marked)
    assert names[twice] not in str(error.value)
    rows = np.arange(3)
    for train, held, scored in ((rows, rows + 3, rows + 2), (rows, rows + 2, rows + 6), (rows, rows + 3, rows + 5)):
        with pytest.raises(LeakageError):
            Episode(0, 1, train, held, scored, tuple("abcdefghi"))


def test_rows_without_a_label_are_in_no_episode() -> None:
    labels, names, test = table(60)
    holes: list[Any] = list(labels)
    holes[4], holes[9], holes[0] = None, float("nan"), None
    draws = draw_episodes(holes, names, test, shots=(2, None), seeds=(0, 1))
    used = {int(i) for e in draws.episodes for rows in (e.train, e.validation, e.test) for i in rows}
    assert not used & {0, 4, 9}
    assert draws.truth[[0, 4, 9]].tolist() == [-1, -1, -1]


def test_hostile_tables() -> None:
    labels, names, test = table(40)
    with pytest.raises(InputError, match="must be 1 or more"):
        draw_episodes(labels, names, test, shots=(0,))
    with pytest.raises(InputError, match="there must be a seed"):
        draw_episodes(labels, names, test, seeds=())
    with pytest.raises(InputError, match="groups and"):
        draw_episodes(labels, names[1:], test)
    with pytest.raises(InputError, match="no test row has a label"):
        draw_episodes(labels, names, np.zeros(len(names), dtype=bool))
    with pytest.raises(InputError, match="holds 1 classes"):
        draw_episodes([0] * len(names), names, test)
    with pytest.raises(InputError, match="mix numbers and text"):
        draw_episodes(["a", *labels[1:]], names, test)
    with pytest.raises(InputError, match="class 2 of 2 has no test row"):
        draw_episodes([int(not t and i % 2) for i, t in enumerate(test)], names, test)
    rare = [0] * len(names)
    rare[int(np.flatnonzero(test)[0])] = rare[int(np.flatnonzero(~test)[0])] = 1
    with pytest.raises(InputError, match="1 patients outside the test set; two are needed"):
        draw_episodes(rare, names, test)
    with pytest.raises(InputError, match="no number of shots can be drawn"):
        draw_episodes(labels, names, test, shots=(500,))


def noise_and_truth(make: Make, n: int = 400) -> tuple[Embeddings, Draws]:
    """Return embeddings of two Gaussian classes in 30 dimensions of which one counts: what Bayes reaches is known."""
    random = np.random.default_rng(0)
    y = np.arange(n) % 2
    x = random.normal(size=(n, 30))
    x[:, 0] += 3.0 * (2 * y - 1)
    x = np.c_[x, np.full(n, 6.0)]  # a length of its own, so that unit norm loses little
    images = make(x)
    test = np.arange(n) >= n - 160
    draws = draw_episodes(y.tolist(), images.groups, test, shots=(1, 4, 40), seeds=range(4))
    return images, draws


def test_curves_rise_to_what_the_truth_allows(make: Make) -> None:
    images, draws = noise_and_truth(make)
    methods = {name: embedding_method(name, images, draws) for name in ("linear-probe", "prototypes")}
    answers = run_episodes(draws, methods)
    assert len(answers) == 2 * 3 * 4

    def mean(name: str, k: int) -> float:
        own = [a for a in answers if a.method == name and a.shots == k]
        return float(np.mean([balanced_accuracy(draws.truth[draws.test], a.probabilities.argmax(1)) for a in own]))

    for name in methods:
        assert mean(name, 1) < mean(name, 4) < mean(name, 40) + 0.005
        assert mean(name, 40) > 0.95  # Bayes: 0.9987 before unit norm
        assert mean(name, 1) > 0.6
    assert {a.validation for a in answers if a.shots == 4} == {8}
    assert all(a.chosen["C"] > 0 for a in answers if a.method == "linear-probe")


def test_labels_without_meaning_stay_at_chance(make: Make) -> None:
    """The trap of choosing on test rows: hyper-parameters, steps, methods. With random labels no curve may rise."""
    random = np.random.default_rng(1)
    images = make(random.normal(size=(600, 20)))
    draws = draw_episodes(
        random.integers(0, 2, 600).tolist(), images.groups, np.arange(600) >= 200, shots=(2, 16), seeds=range(4)
    )
    for answer in run_episodes(draws, {"linear-probe": embedding_method("linear-probe", images, draws)}):
        assert abs(balanced_accuracy(draws.truth[draws.test], answer.probabilities.argmax(1)) - 0.5) < 0.1


def test_no_method_is_shown_a_test_row(make: Make) -> None:
    """Test rows are made unusable where a method could look: the answers for one of them do not change."""
    images, draws = noise_and_truth(make, 240)
    spoiled = images.vectors.copy()
    spoiled[draws.test[1:]] = np.random.default_rng(5).normal(size=(len(draws.test) - 1, images.dim))
    other = make(spoiled)
    for name in ("linear-probe", "prototypes-centred"):
        one, two = (run_episodes(draws, {name: embedding_method(name, data, draws)}) for data in (images, other))
        for first, second in zip(one, two, strict=True):
            np.testing.assert_allclose(first.probabilities[0], second.probabilities[0], atol=1e-12)
            assert first.chosen == second.chosen


def test_costly_methods_answer_some_seeds(make: Make) -> None:
    _, draws = noise_and_truth(make, 240)

    def guess(episode: Episode) -> tuple[Any, Mapping[str, Any]]:
        return np.full((len(episode.test), 2), 0.5), {}

    answers = run_episodes(draws, {"guess": guess}, only={"guess": (0, 2)})
    assert {a.seed for a in answers} == {0, 2}
    with pytest.raises(InputError, match="gave probabilities of shape"):
        run_episodes(draws, {"bad": lambda e: (np.zeros((1, 2)), {})})


def test_names_of_methods() -> None:
    with pytest.raises(UnknownName, match="did you mean `tip-adapter`"):
        make_estimator("tip-adaptor")
    with pytest.raises(InputError, match="needs the texts"):
        make_estimator("tip-adapter")


def test_prompts_of_classes() -> None:
    named = PromptSet((LabelPrompts("Effusion", ("effusion",), ("no effusion",)), LabelPrompts("normal", ("normal",))))
    assert class_prompts(named, "finding", ["NORMAL", "effusion"]).names == ("NORMAL", "effusion")
    binary = class_prompts(named, "effusion", [0, 1])
    assert [label.positive for label in binary.labels] == [("no effusion",), ("effusion",)]
    assert class_prompts(named, "effusion", ["1.0", "0.0"]).labels[0].positive == ("effusion",)
    for column, classes in (("effusion", ["0", "1", "2"]), ("normal", [0, 1]), ("other", ["a", "normal"])):
        with pytest.raises(InputError, match="have no prompts"):
            class_prompts(named, column, classes)
