"""What a suite keeps on disk: vectors of colours by hand, sentences once, files that change, cells that are damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chiasm.errors import InputError, UnknownName
from chiasm.evaluate.run_card import RunCard
from chiasm.evaluate.suite.cells import CellOutcome, cell_key, read_cell, write_cell
from chiasm.evaluate.suite.questions import question_digest, read_question
from chiasm.evaluate.suite.results import score_answers
from chiasm.evaluate.suite.rows import DataRows
from chiasm.evaluate.suite.settings import DataEntry, ModelEntry, Suite, TaskEntry
from chiasm.evaluate.suite.tasks import FewShotSettings, NeighbourSettings, SurvivalSettings
from chiasm.evaluate.suite.vectors import (
    ModelVectors,
    _fingerprint,
    _read_array,
    _read_identity,
    colour_vectors,
    lookup,
    no_text_tower,
)
from chiasm.types import Embeddings, Sample, Space

SPACE = Space("made", "w", "p", 4)
COLOURS = Space("colours", "none", "mean-std-32px", 6)


def rows_of(paths: list[Path | None], **fields: Any) -> DataRows:
    samples = tuple(Sample(f"s{k}", path, labels={"days": k}) for k, path in enumerate(paths))
    digests = {name: name for name in ("images", "texts", "rows", "truth", "parts")}
    made = DataRows(
        "films",
        DataEntry(source="x"),
        samples,
        (),
        ("test",) * len(paths),
        np.zeros((len(paths), 1)),
        "multi",
        {},
        digests,
    )
    return dataclasses.replace(made, **fields)


def test_colours_by_hand(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (255, 0, 51)).save(tmp_path / "a.png")
    half = np.zeros((64, 64, 3), np.uint8)
    half[:32] = 255
    Image.fromarray(half).save(tmp_path / "b.png")
    Image.new("L", (9, 9), 102).save(tmp_path / "c.png")
    (tmp_path / "broken.png").write_text("no image")
    paths = [tmp_path / n for n in ("a.png", "broken.png", "b.png", "absent.png", "c.png")]
    found = colour_vectors(rows_of([*paths]), COLOURS)
    assert found.ids == ("s0", "s2", "s4")  # what cannot be read is absent
    np.testing.assert_allclose(found.vectors[0], [1, 0, 0.2, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(found.vectors[1], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5], atol=0.02)
    np.testing.assert_allclose(found.vectors[2], [0.4, 0.4, 0.4, 0, 0, 0], atol=1e-5)
    assert not found.normalized
    with pytest.raises(InputError, match="no image of data set `films` can be read") as caught:
        colour_vectors(rows_of([tmp_path / "absent.png"]), COLOURS)
    assert str(tmp_path) not in str(caught.value)


def test_sentences_are_found_by_their_text() -> None:
    known = Embeddings(np.eye(3, 4, dtype=np.float32), ("0", "1", "2"), SPACE, "text", texts=("a", "b", "c"))
    embed = lookup(known)
    found = embed(["c", "a", "c"])
    np.testing.assert_array_equal(found.vectors, np.eye(3, 4)[[2, 0, 2]])
    assert found.ids == ("0", "1", "2")
    with pytest.raises(InputError, match="2 of 3 prompts were not embedded"):
        embed(["a", "x", "y"])


@pytest.mark.parametrize(
    ("write", "readable"),
    [
        (lambda p: np.save(p, np.ones((2, 4), np.float32)), True),
        (lambda p: np.save(p, np.ones((4, 2), np.float32)), False),
        (lambda p: np.save(p, np.full((2, 4), np.nan, np.float32)), False),
        (lambda p: np.save(p, np.asarray([[object()]], dtype=object), allow_pickle=True), False),
        (lambda p: p.write_bytes(b""), False),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01"), False),
        (lambda p: None, False),
    ],
)
def test_a_damaged_array_is_no_array(tmp_path: Path, write: Any, readable: bool) -> None:
    write(tmp_path / "v.npy")
    assert (_read_array(tmp_path / "v.npy", (2, 4)) is not None) == readable


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"space": {}}', '{"space": 3, "has_text": true}', '{"more": 1}']
)
def test_a_damaged_identity_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "i.json").write_text(text)
    assert _read_identity(tmp_path / "i.json") is None
    assert _read_identity(tmp_path / "absent.json") is None


def test_a_model_is_known_by_its_files(tmp_path: Path) -> None:
    import os

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"1234")
    before = _fingerprint(str(folder), None)
    assert before == _fingerprint(str(folder), None)
    assert before != _fingerprint(str(folder), "openai")
    os.utime(folder / "weights.bin", ns=(1, 1))
    touched = _fingerprint(str(folder), None)
    assert touched != before
    (folder / "config.json").write_text("{}")
    assert _fingerprint(str(folder), None) not in (before, touched)
    assert _fingerprint("no-such-model", None) is None


def suite_of(**fields: Any) -> Suite:
    return Suite({"a": ModelEntry(floor="colours")}, {"films": DataEntry(source="x")}, {"prototype": {}}, **fields)


def test_floors_have_no_sentences(tmp_path: Path) -> None:
    vectors = ModelVectors("a", ModelEntry(floor="colours"), suite_of(), tmp_path)
    assert vectors.space == COLOURS
    assert not vectors.has_text
    for ask in (lambda: vectors.sentences(["x"]), lambda: vectors.texts(rows_of([None]))):
        with pytest.raises(InputError, match="model `a` has no text tower") as caught:
            ask()
        assert "linear_probe, knn, prototype and few_shot work without one" in str(caught.value.hint)
    assert no_text_tower("a").message == caught.value.message


def test_a_store_has_the_patients_of_the_suite_not_its_own(tmp_path: Path) -> None:
    paths: list[Path | None] = []
    for k in range(3):
        Image.new("RGB", (8, 8), (80 * k, 0, 0)).save(tmp_path / f"{k}.png")
        paths.append(tmp_path / f"{k}.png")
    rows = rows_of(paths)
    vectors = ModelVectors("a", ModelEntry(floor="colours"), suite_of(), tmp_path / "run")
    assert not vectors.is_stored(rows, "image")
    first = vectors.images(rows)
    assert vectors.is_stored(rows, "image")
    assert first.groups == ("s0", "s1", "s2")
    named = dataclasses.replace(rows, samples=tuple(dataclasses.replace(s, patient="p") for s in rows.samples))
    second = vectors.images(named)
    assert second.groups == ("p", "p", "p")
    np.testing.assert_array_equal(first.vectors, second.vectors)
    assert vectors.embedded == [("films", "image")]  # once
    other = dataclasses.replace(rows, digests={**rows.digests, "images": "changed"})
    assert vectors.path(other) != vectors.path(rows)
    vectors.images(other)
    assert len(vectors.embedded) == 2


KEYED = {
    "suite": suite_of(), "rows": rows_of([None, None]), "task": TaskEntry("t", "few_shot", FewShotSettings()), "space": SPACE,
    "prompts": "p",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({}, False),
        ({"suite": suite_of(seed=1)}, True),
        ({"suite": suite_of(n_resamples=7)}, True),
        (
            {"suite": suite_of(alpha=0.01, n_permutations=5, name="b", smallest_group=3, device="cuda", batch_size=1)},
            False,
        ),
        ({"space": dataclasses.replace(SPACE, weights="other")}, True),
        ({"space": dataclasses.replace(SPACE, dim=5)}, True),
        ({"prompts": "q"}, True),
        ({"prompts": None}, True),
        ({"task": TaskEntry("another name", "few_shot", FewShotSettings())}, False),
        ({"task": TaskEntry("t", "few_shot", FewShotSettings(shots=9))}, True),
        ({"task": TaskEntry("t", "knn", NeighbourSettings())}, True),
        ({"rows": rows_of([None, None], digests={**KEYED["rows"].digests, "truth": "x"})}, True),  # type: ignore[attr-defined]
        ({"rows": rows_of([None, None], digests={**KEYED["rows"].digests, "parts": "x"})}, True),  # type: ignore[attr-defined]
        ({"rows": rows_of([None, None], digests={**KEYED["rows"].digests, "rows": "x"})}, True),  # type: ignore[attr-defined]
        ({"rows": rows_of([None, None], mode="single")}, True),
        ({"rows": rows_of([None, None], subgroups={"sex": ("F", "M")})}, False),
    ],
)
def test_a_cell_is_named_by_what_it_depends_on(changes: dict[str, Any], other: bool) -> None:
    assert (cell_key(**KEYED) != cell_key(**{**KEYED, **changes})) == other  # type: ignore[arg-type]


def test_the_columns_of_a_task_are_in_the_name_of_its_cell() -> None:
    task = TaskEntry("t", "survival", SurvivalSettings("days", "event"))
    later = dataclasses.replace(
        KEYED["rows"],
        samples=tuple(dataclasses.replace(s, labels={"days": 99}) for s in KEYED["rows"].samples),  # type: ignore[attr-defined, type-var]
    )
    keys = [cell_key(**{**KEYED, "task": task, "rows": rows}) for rows in (KEYED["rows"], later)]  # type: ignore[arg-type]
    assert keys[0] != keys[1]
    plain = [cell_key(**{**KEYED, "rows": rows}) for rows in (KEYED["rows"], later)]  # type: ignore[arg-type]
    assert plain[0] == plain[1]


@pytest.mark.parametrize(
    "damage", ["none", "no json", "no arrays", "half json", "half arrays", "no card", "a field too many"]
)
def test_a_cell_is_whole_or_absent(tmp_path: Path, damage: str) -> None:
    random = np.random.default_rng(0)
    truth = np.tile([[1.0, 0.0], [0.0, 1.0]], (5, 1))
    result = score_answers(np.arange(10), truth, random.normal(size=(10, 2)), [str(k) for k in range(10)], ["a", "b"],
                           mode="multi", n_resamples=5, seed=0)  # fmt: skip
    card = RunCard("chiasm evaluate", {"images": "0"}, {"images": 10}, "made", 0)
    write_cell(tmp_path, "k", result, card)
    json_file, arrays = tmp_path / "cells" / "k.json", tmp_path / "cells" / "k.npz"
    values = json.loads(json_file.read_text())
    if damage == "no json":
        json_file.unlink()
    elif damage == "no arrays":
        arrays.unlink()
    elif damage == "half json":
        json_file.write_text(json_file.read_text()[:40])
    elif damage == "half arrays":
        arrays.write_bytes(arrays.read_bytes()[:60])
    elif damage == "no card":
        json_file.write_text(json.dumps({"result": values["result"]}))
    elif damage == "a field too many":
        json_file.write_text(json.dumps({**values, "card": {**values["card"], "mood": "good"}}))
    found = read_cell(tmp_path, "k")
    assert (found is None) == (damage != "none")
    if found is not None:
        assert found[0].to_dict() == result.to_dict()
        assert found[1] == card
        assert found[1].digest == values["card"]["digest"]


def test_a_failed_cell_says_why_and_nothing_else() -> None:
    failed = CellOutcome("m", "d", "t", "", None, None, "no text tower").to_dict()
    assert failed == {
        "model": "m",
        "data": "d",
        "task": "t",
        "key": "",
        "cached": False,
        "state": "failed",
        "reason": "no text tower",
    }


def entry(**fields: Any) -> DataEntry:
    return DataEntry(source="x", **{"labels": ("nodule", "mass"), "truth": "*", **fields})


def test_a_question_has_one_set_of_sentences_a_label_in_its_order() -> None:
    question = read_question(entry())
    assert list(question.prompts.names) == ["nodule", "mass"]
    assert question.mode == "multi"
    assert all(label.negative for label in question.prompts.labels)
    single = read_question(entry(truth="kind"))
    assert single.mode == "single"
    assert not any(label.negative for label in single.prompts.labels)
    with pytest.raises(InputError, match="no labels to ask for"):
        read_question(DataEntry(source="x"))


def test_prompts_of_a_file_are_taken_by_name_and_in_the_order_of_the_suite(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"Mass": ["a mass", "masses"], "nodule": ["a nodule"], "other": ["x"]}))
    question = read_question(entry(truth="kind", prompts=str(path)))
    assert [label.positive for label in question.prompts.labels] == [("a nodule",), ("a mass", "masses")]
    turned = read_question(entry(truth="kind", prompts=str(path), labels=("mass", "nodule")))
    assert [label.positive for label in turned.prompts.labels] == [("a mass", "masses"), ("a nodule",)]
    assert question_digest(question) != question_digest(turned)
    assert question_digest(question) == question_digest(read_question(entry(truth="kind", prompts=str(path))))
    path.write_text(json.dumps({"Mass": ["a mass", "masses."], "nodule": ["a nodule"]}))
    assert question_digest(question) != question_digest(read_question(entry(truth="kind", prompts=str(path))))
    with pytest.raises(UnknownName, match="unknown label `pneumonia`"):
        read_question(entry(truth="kind", prompts=str(path), labels=("pneumonia", "mass")))
