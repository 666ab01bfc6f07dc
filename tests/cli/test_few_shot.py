"""``chiasm few-shot``: from a table or a store to curves, JSON and a page; texts add methods; clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chiasm.data.phantoms import make_chest_phantoms

Run = Callable[..., Any]
FAST = ("--shots", "1,all", "--seeds", 2, "--resamples", 60)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chest_phantoms(44, seed=5, size_px=32).save(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def store(table: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from chiasm.cli.main import app

    out = tmp_path_factory.mktemp("store") / "s"
    words = ["embed", str(table), "--out", str(out), "--model", str(model_dir), "--modality", "image", "--json"]
    assert CliRunner().invoke(app, words).exit_code == 0
    return out


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.json"
    path.write_text(
        json.dumps({"labels": {"effusion": {"positive": ["pleural effusion"], "negative": ["no pleural effusion"]}}})
    )
    return path


def test_a_table_with_texts(chiasm: Run, table: Path, model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = chiasm("few-shot", "--table", table, "--model", model_dir, "--label", "effusion", "--labels-file", prompts,
                   *FAST, "--floor", "--out", page, "--json")  # fmt: skip
    methods = {p["method"] for p in found["curves"]}
    assert methods == {
        "linear-probe", "prototypes", "prototypes-centred", "zero-shot", "tip-adapter", "tip-adapter-f", "clip-adapter",
        "text-probe", "colour",
    }  # fmt: skip
    assert found["chance"] == 0.5
    assert {p["shots"] for p in found["curves"]} == {1, "all"}
    assert all(p["balanced_accuracy"]["chance"] == 0.5 for p in found["curves"])
    assert {c["method"] for c in found["contrasts"]} == methods - {"linear-probe"}
    zero = [p for p in found["curves"] if p["method"] == "zero-shot"]
    assert len({p["balanced_accuracy"]["value"] for p in zero}) == 1
    card = found["run_card"]
    assert card["prompts"]
    assert card["split"]
    assert card["settings"]["label"] == "effusion"
    text = page.read_text()
    assert "Learning curves" in text
    assert "chest-" not in text  # no id of a patient
    again = chiasm("few-shot", "--table", table, "--model", model_dir, "--label", "effusion", "--labels-file", prompts,
                   *FAST, "--floor", "--json")  # fmt: skip
    assert again["run_card"]["digest"] == card["digest"]
    for one, two in zip(found["curves"], again["curves"], strict=True):
        assert one | {"seconds": 0} == two | {"seconds": 0}


def test_a_store_without_a_model(chiasm: Run, store: Path) -> None:
    said = chiasm(
        "few-shot", "--store", store, "--label", "cardiomegaly", *FAST, "--methods", "linear-probe,prototypes"
    )
    assert "linear-probe" in said
    assert "chance 0.500" in said
    assert "tip-adapter" not in said


def test_from_scratch_beside_a_store(chiasm: Run, store: Path) -> None:
    found = chiasm("few-shot", "--store", store, "--label", "cardiomegaly", "--shots", "2", "--seeds", 2, "--methods",
                   "prototypes", "--from-scratch", "--scratch-seeds", 1, "--scratch-size", 16, "--scratch-epochs", 1,
                   "--resamples", 50, "--json")  # fmt: skip
    scratch = next(p for p in found["curves"] if p["method"] == "from-scratch")
    assert scratch["seeds"] == [0]
    assert found["reference"] == "prototypes"


def test_the_test_set_can_be_named(chiasm: Run, tmp_path: Path, model_dir: Path, table: Path) -> None:
    import pandas as pd

    frame = pd.read_csv(table)
    patients = sorted(frame["patient_id"].unique())
    frame["split"] = ["test" if p in patients[:14] else "train" for p in frame["patient_id"]]
    frame.to_csv(table.parent / "split.csv", index=False)
    words = ("few-shot", "--table", table.parent / "split.csv", "--model", model_dir, "--label", "effusion",
             "--shots", "1", "--seeds", 2, "--methods", "prototypes", "--resamples", 50)  # fmt: skip
    found = chiasm(*words, "--test-split", "test", "--json")
    assert found["test_patients"] == 14
    assert "no row has split `validation`" in chiasm(*words, "--test-split", "validation", code=1)
    # A split that cuts through a patient is refused, not scored.
    shared = frame["patient_id"].value_counts().index[0]
    rows = frame.index[frame["patient_id"] == shared]
    frame.loc[rows, "split"] = ["test", *["train"] * (len(rows) - 1)]
    frame.to_csv(table.parent / "cut.csv", index=False)
    said = chiasm(*words[:2], table.parent / "cut.csv", *words[3:], "--test-split", "test", code=1)
    assert "1 patients are in both test and the rest" in said
    assert str(shared) not in said


def test_texts_of_another_model_are_refused(chiasm: Run, store: Path, prompts: Path, tmp_path: Path) -> None:
    from chiasm.load import save_encoder
    from chiasm.testing import TinyEncoder

    save_encoder(TinyEncoder(1), tmp_path / "other")
    said = chiasm("few-shot", "--store", store, "--model", tmp_path / "other", "--label", "effusion", "--labels-file",
                  prompts, "--shots", "1", "--seeds", 1, code=1)  # fmt: skip
    assert "their similarity has no meaning" in said


def test_refusals_come_before_the_work(chiasm: Run, store: Path, prompts: Path) -> None:
    base = ("few-shot", "--store", store, "--label", "effusion")
    for words, message in (
        (("--shots", "0,2"), "--shots must be numbers from 1"),
        (("--shots", "two"), "--shots must be numbers from 1"),
        (("--methods", "tip-adapter"), "needs the texts of the classes"),
        (("--methods", "from-scratch"), "has an option of its own"),
        (("--methods", " , "), "--methods names none"),
        (("--labels-file", prompts), "--labels-file needs the model"),
        (("--test-share", "1.5"), "--test-share must lie between 0 and 1"),
        (("--shots", "900"), "no number of shots can be drawn"),
    ):
        assert message in chiasm(*base, *words, code=1)
    assert "did you mean `prototypes`" in chiasm(*base, "--methods", "prototype", code=1)
    assert "no label column `x`" in chiasm("few-shot", "--store", store, "--label", "x", code=1)
    assert "no column of labels was named" in chiasm("few-shot", "--store", store, code=1)


def test_learned_prompts_run_where_they_are_named(
    chiasm: Run, table: Path, model_dir: Path, prompts: Path, store: Path
) -> None:
    words = ("few-shot", "--store", store, "--label", "effusion", "--shots", "1", "--seeds", 1, "--resamples", 60)
    texts = ("--model", model_dir, "--labels-file", prompts)
    found = chiasm(*words, *texts, "--methods", "zero-shot,coop", "--json")
    assert {p["method"] for p in found["curves"]} == {"zero-shot", "coop"}
    said = chiasm(*words, "--methods", "coop", code=1)
    assert "`coop` needs the texts of the classes" in said
