"""``chiasm few-shot`` on made stores: its words, its parts, its document, hostile names, and what must not matter."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.cli.few_shot import _check_methods, _parts, _shots
from chiasm.errors import ChiasmError
from chiasm.io.store import save_embeddings
from chiasm.tasks.few_shot import LinearProbe, Prototypes
from chiasm.tasks.k_shot import draw_episodes, embedding_method, run_episodes
from chiasm.types import Embeddings, Space

Run = Callable[..., Any]
SPACE = Space("tiny", "w1", "p1", 6)


def images_of(classes: tuple[Any, ...] = ("ill", "well"), patients: int = 60, **labels: Any) -> Embeddings:
    random = np.random.default_rng(0)
    number = np.repeat(np.arange(patients) % len(classes), 2)
    vectors = random.normal(size=(2 * patients, 6)) + 3 * np.eye(6)[number]
    parts = ["test" if p % 5 < 2 else "train" for p in range(patients) for _ in range(2)]
    return Embeddings(
        vectors.astype(np.float32), tuple(f"file{i}.png" for i in range(2 * patients)), SPACE, "image", normalized=False,
        patients=tuple(f"secret{i // 2}" for i in range(2 * patients)),
        labels={"state": tuple(classes[n] for n in number), "split": tuple(parts), **labels},
    )  # fmt: skip


@pytest.fixture
def run(chiasm: Run, tmp_path: Path) -> Run:
    def few_shot(images: Embeddings, *words: object, label: str = "state", code: int = 0) -> Any:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.store"
        save_embeddings(path, images)
        given_ = ("--methods", "prototypes", "--shots", "1,2", "--seeds", 2, "--resamples", 50)
        return chiasm("few-shot", "--store", path, "--label", label, *given_, *words, code=code)

    return few_shot


@pytest.mark.parametrize(
    ("text", "found"),
    [("1", (1,)), ("1,2", (1, 2)), (" 1 , all ", (1, None)), ("all", (None,)), ("2,1,2", (2, 1)), ("all,all,3", (None, 3)),
     ("16", (16,)), ("007", (7,))],
)  # fmt: skip
def test_shots_are_read(text: str, found: tuple[int | None, ...]) -> None:
    assert _shots(text) == found


@pytest.mark.parametrize("text", ["", "0", "-1", "1,", "1;2", "one", "1.5", "All", "1 2", "²", "9" * 5000])
def test_shots_that_are_none(text: str) -> None:
    with pytest.raises(ChiasmError, match="--shots must be numbers from 1") as raised:
        _shots(text)
    assert raised.value.hint == "--shots 1,2,4,8,16,all"


@pytest.mark.parametrize(
    ("wanted", "file", "model", "scratch", "message"),
    [
        (None, "p.json", "", False, "needs the model"),
        ([], None, "", False, "names none"),
        (["from-scratch"], None, "", True, "option of its own"),
        (["colour"], None, "", False, "option of its own"),
        (["svm"], None, "", False, "unknown few-shot method"),
        (["tip-adapter"], None, "", False, "needs the texts"),
        (["coop"], None, "m", False, "needs the texts"),
        (["prototypes", "zero-shot"], None, "m", False, "needs the texts"),
    ],
)
def test_methods_that_cannot_run(wanted: Any, file: str | None, model: str, scratch: bool, message: str) -> None:
    with pytest.raises(ChiasmError, match=message):
        _check_methods(wanted, None if file is None else Path(file), model, scratch, False)


@pytest.mark.parametrize(
    ("wanted", "file", "model", "scratch"),
    [(None, None, "", False), ([], None, "", True), (["prototypes"], None, "", False), (["coop"], "p.json", "m", False),
     (["tip-adapter", "linear-probe"], "p.json", "m", False), (None, "p.json", "m", True)],
)  # fmt: skip
def test_methods_that_can(wanted: Any, file: str | None, model: str, scratch: bool) -> None:
    _check_methods(wanted, None if file is None else Path(file), model, scratch, False)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 0.9), st.integers(0, 20))
def test_a_share_of_the_patients_is_the_test_set(share: float, seed: int) -> None:
    images = images_of()
    parts = _parts(images, "state", None, share, seed)
    of = {name: {g for g, p in zip(images.groups, parts, strict=True) if p == name} for name in ("test", "pool")}
    assert of["test"].isdisjoint(of["pool"])
    assert abs(len(of["test"]) - 60 * share) <= 2
    assert set(parts) == {"test", "pool"}


def test_a_named_split_is_the_test_set() -> None:
    images = images_of()
    parts = _parts(images, "state", "test", 0.3, 0)
    assert [p == "test" for p in parts] == [s == "test" for s in images.labels["split"]]
    assert _parts(images, "state", "train", 0.3, 5).count("test") == images.labels["split"].count("train")
    with pytest.raises(ChiasmError, match="no row has split `dev`") as raised:
        _parts(images, "state", "dev", 0.3, 0)
    assert raised.value.hint == "splits: test, train"


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ChiasmError, match="--test-share must lie between 0 and 1"):
        _parts(images_of(), "state", None, share, 0)


def test_the_document_has_a_fixed_form(run: Run) -> None:
    found = run(images_of(), "--test-split", "test", "--json")
    assert set(found) == {"classes", "chance", "majority_accuracy", "test_rows", "test_patients", "pool_patients",
                          "left_out", "curves", "reference", "contrasts", "page", "run_card"}  # fmt: skip
    assert (found["classes"], found["chance"], found["majority_accuracy"]) == (["ill", "well"], 0.5, 0.5)
    assert (found["test_rows"], found["test_patients"]) == (48, 24)
    assert found["pool_patients"] == {"ill": 18, "well": 18}
    assert [(c["method"], c["shots"], c["seeds"]) for c in found["curves"]] == [
        ("prototypes", 1, [0, 1]),
        ("prototypes", 2, [0, 1]),
    ]
    for curve in found["curves"]:
        assert (curve["train_rows"], curve["validation_rows"]) == (2 * curve["shots"], 2 * curve["shots"])
        number = curve["balanced_accuracy"]
        assert number["value"] == pytest.approx(np.mean(curve["per_seed"]))
        assert number["low"] <= number["value"] <= number["high"]
    assert found["contrasts"] == []


def test_the_numbers_are_those_of_the_estimators(run: Run) -> None:
    images = images_of()
    found = run(images, "--test-split", "test", "--json", "--methods", "prototypes,linear-probe", "--shots", "4")
    test = np.array([s == "test" for s in images.labels["split"]])
    draws = draw_episodes(images.labels["state"], images.groups, test, shots=(4,), seeds=(0, 1))
    classes = np.array(images.labels["state"])
    for curve in found["curves"]:
        for episode, score in zip(draws.episodes, curve["per_seed"], strict=True):
            made: Any = (
                Prototypes() if curve["method"] == "prototypes" else LinearProbe(C=curve["chosen"]["C"][episode.seed])
            )
            made.fit(images.select(episode.train), classes[episode.train])
            said, true = made.predict(images.select(episode.test)), classes[episode.test]
            assert score == pytest.approx(np.mean([(said[true == c] == c).mean() for c in made.classes_]))


def test_it_is_the_same_twice_and_another_seed_draws_other_shots(run: Run) -> None:
    def curves(*words: object) -> Any:
        return [(c["per_seed"], c["balanced_accuracy"]) for c in run(images_of(), "--json", *words)["curves"]]

    assert curves() == curves()
    assert run(images_of(), "--json", "--seed", 3)["curves"][0]["seeds"] == [3, 4]
    assert curves("--seed", 3) != curves()


def test_lengths_of_vectors_and_names_of_patients_do_not_matter(run: Run) -> None:
    images = images_of()
    scaled = Embeddings(images.vectors * 7, images.ids, SPACE, "image", normalized=False, patients=images.patients,
                        labels=images.labels)  # fmt: skip
    words = ("--test-split", "test", "--json")
    a, b = (run(i, *words)["curves"] for i in (images, scaled))
    assert [c["per_seed"] for c in a] == [c["per_seed"] for c in b]


def test_rows_without_a_label_take_no_part(run: Run) -> None:
    images = images_of()
    state = [None if i >= 100 else v for i, v in enumerate(images.labels["state"])]
    found = run(images_of(gaps=tuple(state)), "--test-split", "test", "--json", label="gaps")
    assert found["test_rows"] == sum(
        s == "test" and v is not None for s, v in zip(images.labels["split"], state, strict=True)
    )


def test_names_that_are_code_stay_names(run: Run, tmp_path: Path) -> None:
    names = ("<script>alert(1)</script>", "“é” & $\\frac")
    page = tmp_path / "p.html"
    found = run(images_of(names), "--json", "--out", page)
    text = page.read_text()
    assert set(found["classes"]) == set(names)
    assert "<script" not in text
    assert html.escape(names[0]) in text
    for hidden in ("secret", "file1"):
        assert hidden not in text
        assert hidden not in json.dumps(found)


@pytest.mark.parametrize(
    ("labels", "words", "message"),
    [
        ({"state": ("ill",) * 120}, (), "classes; a classifier needs two"),
        ({"state": (None,) * 120}, (), "no row has a label"),
        ({"state": ("ill",) * 119 + ("well",)}, (), ""),
        ({"state": (1, "a") * 60}, (), "mix numbers and text"),
        ({}, ("--shots", "40"), "no number of shots can be drawn"),
        ({}, ("--reference", "linear-probe"), "unknown reference method"),
        ({}, ("--test-split", "dev"), "no row has split `dev`"),
        ({}, ("--group", "person"), "person"),
        ({}, ("--floor",), "name no image file"),
        ({}, ("--from-scratch",), "name no image file"),
    ],
)
def test_stores_that_cannot_be_used(run: Run, labels: Any, words: tuple[str, ...], message: str) -> None:
    said = run(images_of(**labels), *words, code=1)
    assert message in said
    assert "Traceback" not in said
    assert "secret" not in said


@pytest.mark.parametrize("classes", [(0, 1), ("0", "1"), (False, True), ("é", "ß"), (1.5, 2.5)])
def test_classes_of_every_kind(classes: tuple[Any, ...]) -> None:
    images = images_of(classes)
    draws = draw_episodes(images.labels["state"], images.groups, [s == "test" for s in images.labels["split"]],
                          shots=(3,), seeds=(0,))  # fmt: skip
    (answer,) = run_episodes(draws, {"prototypes": embedding_method("prototypes", images, draws)})
    assert (answer.probabilities.argmax(axis=1) == draws.truth[draws.test]).mean() > 0.8
