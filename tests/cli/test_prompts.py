"""``chiasm prompts``: every action from a table to JSON and a page, what it saves is used again, clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.cli.prompts import make_grid, read_truth
from chiasm.data.phantoms import make_chest_phantoms
from chiasm.errors import UnknownName
from chiasm.load import load
from chiasm.train.prompt_tuning import load_prompts
from chiasm.types import Embeddings, Space

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chest_phantoms(30, seed=3, size_px=32).save(tmp_path_factory.mktemp("films"))


@pytest.fixture
def words(table: Path, model_dir: Path) -> tuple[object, ...]:
    return ("--table", table, "--model", model_dir, "--labels", "effusion, cardiomegaly", "--multi", "--truth", "*",
            "--resamples", 20)  # fmt: skip


def test_list_shows_templates_and_names(chiasm: Run) -> None:
    found = chiasm("prompts", "list", "--json")
    assert {"chest", "ct", "fundus"} <= set(found["templates"])
    assert found["templates"]["chest"]["negated"][3] == "there is no {}"
    assert "pleural effusion" in found["synonyms"]["chest"]["effusion"]
    assert "a chest x-ray showing no {}" in chiasm("prompts", "list")


@pytest.mark.filterwarnings("ignore:.*texts are longer")  # the tiny model spells most words by letter
def test_explain(chiasm: Run, words: tuple[object, ...], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = chiasm("prompts", "explain", *words, "--template", "chest", "--synonyms", "chest", "--out", page, "--json")
    options = [e["option"] for e in found["effects"] if e["problem"] == "effusion"]
    assert "pleural effusion" in options
    assert "findings: {}" in options
    assert set(found["ensemble"]) == {"effusion", "cardiomegaly"}
    assert found["run_card"]["settings"]["metric"] == "auroc"
    assert "not a medical device" in page.read_text()
    without = [w for k, w in enumerate(words) if w not in ("--truth", "*")]
    said = chiasm("prompts", "explain", *without)
    assert "answers changed" in said


def test_search_saves_what_zero_shot_reads(
    chiasm: Run, words: tuple[object, ...], table: Path, model_dir: Path, tmp_path: Path
) -> None:
    saved, page = tmp_path / "chosen.json", tmp_path / "page.html"
    common = ("prompts", "search", *words, "--template", "{}", "--template", "findings: {}", "--redraws", 3)
    found = chiasm(*common, "--save", saved, "--out", page, "--json")
    assert json.loads(saved.read_text()) == found["prompts"]
    assert found["choose_patients"] + found["test_patients"] == 30
    assert found["run_card"]["split"]
    again = chiasm("zero-shot", "--table", table, "--model", model_dir, "--labels-file", saved, "--multi", "--json")
    assert again["labels"] == ["effusion", "cardiomegaly"]
    assert "gain" in chiasm(*common)
    assert "How much of it is luck" in page.read_text()


def test_tune_saves_prompts_that_know_their_space(
    chiasm: Run, words: tuple[object, ...], model_dir: Path, tmp_path: Path
) -> None:
    folder, page = tmp_path / "learned", tmp_path / "page.html"
    found = chiasm("prompts", "tune", *words, "--epochs", 2, "--save", folder, "--out", page, "--json")
    assert list(found["arms"]) == ["learned", "all prompts", "starting words"]
    tuned = load_prompts(folder, space=load(model_dir).space)
    assert tuned.labels == ("effusion", "cardiomegaly")
    table = words[words.index("--table") + 1]
    zero_shot = ("zero-shot", "--table", table, "--model", model_dir, "--labels-file", folder)
    asked = chiasm(*zero_shot, "--json")
    assert asked["mode"] == "multi", "as they were learned"
    assert asked["labels"] == ["effusion", "cardiomegaly"]
    again = chiasm(*zero_shot, "--multi", "--json")["images"][0]["probabilities"]
    assert again == asked["images"][0]["probabilities"]
    plain = chiasm("zero-shot", "--table", table, "--model", model_dir, "--labels", "effusion, cardiomegaly", "--multi",
                   "--json")  # fmt: skip
    assert plain["images"][0]["probabilities"] != again
    assert "learned prompts have no template" in chiasm(*zero_shot, "--template", "a {}", code=1)
    assert "What learning is worth" in page.read_text()
    chiasm("prompts", "tune", *words, "--epochs", 1, "--save", folder)  # its own folder may be written again
    assert "holds other things" in chiasm("prompts", "tune", *words, "--epochs", 1, "--save", tmp_path, code=1)
    assert page.exists()
    said = chiasm("prompts", "tune", *words, "--epochs", 1, "--shots", 2, "--vectors", 3)
    assert "images taught" in said
    assert "starting words" not in said


def test_classes_that_exclude_each_other(chiasm: Run, table: Path, model_dir: Path) -> None:
    words = ("--table", table, "--model", model_dir, "--labels", "left, right", "--truth", "effusion_side",
             "--resamples", 10, "--seed", 1, "--json")  # fmt: skip
    found = chiasm("prompts", "search", *words, "--template", "{}", "--template", "on the {}", "--redraws", 0)
    assert found["metric"] == "balanced_accuracy"
    assert found["problems"][0]["candidates"] == 3


def test_a_file_of_whole_prompts_is_taken_apart(chiasm: Run, words: tuple[object, ...], tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(
        json.dumps({"effusion": {"positive": ["fluid", "effusion"], "negative": ["no fluid", "no effusion"]}})
    )
    given = [w if w != "effusion, cardiomegaly" else file for w in words]
    given[given.index("--labels")] = "--labels-file"
    found = chiasm("prompts", "explain", *given, "--json")
    assert [e["option"] for e in found["effects"]] == ["fluid", "effusion"]


def test_clear_refusals(chiasm: Run, words: tuple[object, ...], table: Path, model_dir: Path, tmp_path: Path) -> None:
    def said(*given: object) -> str:
        return str(chiasm("prompts", *given, code=1))

    assert "did you mean `search`" in said("serch")
    assert "needs the truth" in said("search", "--labels", "a", "--table", table, "--model", model_dir)
    assert "belong together" in said("search", *words, "--choose-on", "train")
    assert "no label column `split`" in said("search", *words, "--choose-on", "a", "--test-on", "b")
    assert "metric of mode" in said("search", *words, "--metric", "accuracy")
    assert "--labels or --labels-file" in said("explain", "--table", table, "--model", model_dir)
    (tmp_path / "file").write_text("x")
    assert "is a file" in said("tune", *words, "--save", tmp_path / "file")


def test_a_store_of_another_model_is_refused(
    chiasm: Run, words: tuple[object, ...], table: Path, model_dir: Path, tmp_path: Path
) -> None:
    from chiasm.load import save_encoder
    from chiasm.testing import TinyEncoder

    store, other = tmp_path / "store", tmp_path / "other"
    chiasm("embed", table, "--model", model_dir, "--out", store, "--modality", "image")
    save_encoder(TinyEncoder(5), other)
    rest = list(words[4:])
    found = chiasm("prompts", "explain", "--store", store, "--model", model_dir, *rest, "--json")
    assert found["rows"] > 30
    assert "two spaces" in chiasm("prompts", "explain", "--store", store, "--model", other, *rest, code=1)


@pytest.mark.parametrize(
    ("labels", "template", "synonyms", "multi", "expected"),
    [
        (
            "a, b",
            None,
            None,
            False,
            ["{}", "{}.", "an image of {}", "a medical image showing {}", "this is {}", "findings: {}"],
        ),
        ("a, b", ["see {}"], None, True, ["see {}"]),
        ("a, b", ["{}", "see {}", "{}"], None, False, ["{}", "see {}", "{}"]),
        ("a, b", None, None, True, ["{}", "evidence of {}", "there is {}", "{} is present"]),
    ],
)
def test_names_become_wordings(
    labels: str, template: list[str] | None, synonyms: str | None, multi: bool, expected: list[str]
) -> None:
    grid = make_grid(labels, None, template, synonyms, multi=multi)
    assert grid.names == ("a", "b")
    assert list(grid.labels[0].templates) == list(dict.fromkeys(expected))
    assert all((v.negative is not None) == multi for v in grid.labels[0].variants)


def test_synonyms_of_files_and_shipped_ones_are_joined(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"classnames": {"effusion": ["water", "effusion"]}}))
    grid = make_grid(None, file, ["{}"], "chest", multi=False)
    assert grid.labels[0].synonyms[:2] == ("water", "effusion")
    assert "pleural fluid" in grid.labels[0].synonyms
    with pytest.raises(UnknownName, match="kind of synonyms"):
        make_grid(None, file, ["{}"], "toes", multi=False)


def test_truth_of_a_column_of_names_or_of_several() -> None:
    images = Embeddings(
        np.eye(4, dtype=np.float32), ("1", "2", "3", "4"), Space("e", "w", "p", 4), "image",
        labels={"finding": ("A|b", "b", "c", None), "a": (1, 0, None, 0), "b": (0, 1, 1, 0)},
    )  # fmt: skip
    assert read_truth(images, "finding", ("a", "b"), "multi") == {"a": (1, 0, 0, None), "b": (1, 1, 0, None)}
    assert read_truth(images, "finding", ("a", "b"), "single") == [None, "b", None, None]
    assert read_truth(images, "*", ("a", "b"), "multi") == {"a": (1, 0, None, 0), "b": (0, 1, 1, 0)}
    assert read_truth(images, "*", ("a", "b"), "single") == ["a", "b", "b", None]
