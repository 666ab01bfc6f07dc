"""Each command on a real small model: what it prints, its JSON, and what it says when something is wrong."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Run = Callable[..., Any]
pytestmark = [
    # A model that was never trained cuts reports and scores some labels below one half; both are told, not raised.
    pytest.mark.filterwarnings("default::chiasm.data.tokens.TruncationWarning"),
    pytest.mark.filterwarnings("default::chiasm.evaluate.scores.InvertedScoreWarning"),
]


def first_image(table: Path) -> Path:
    return sorted((table.parent / "images").glob("*.png"))[0]


def test_inspect_shows_five_steps(chiasm: Run, model_dir: Path, phantom_table: Path) -> None:
    image = first_image(phantom_table)
    text = chiasm("inspect", image, "left effusion", "no effusion", "--model", model_dir)
    assert all(f"{i}. " in text for i in range(1, 6))
    assert "winner: " in text
    record = chiasm("inspect", image, "left effusion", "no effusion", "--model", model_dir, "--json")
    assert abs(sum(t["probability"] for t in record["texts"]) - 1) < 1e-6


def test_zero_shot_single_label(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    text = chiasm(
        "zero-shot", first_image(phantom_table), "--labels", "normal, effusion", "--model", model_dir, "--out", out
    )
    assert "normal" in text
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1


def test_zero_shot_scores_itself(chiasm: Run, model_dir: Path, phantom_table: Path) -> None:
    record = chiasm(
        "zero-shot", "--table", phantom_table, "--labels", "effusion, nodule", "--multi", "--truth", "*", "--model",
        model_dir, "--json",
    )  # fmt: skip
    assert set(record["scores"]["per_label"]) == {"effusion", "nodule"}
    macro = record["scores"]["macro_auroc"]
    assert set(macro) == {"value", "low", "high", "n", "chance"}
    assert macro["chance"] == 0.5


def test_zero_shot_reads_one_column_of_class_names(chiasm: Run, model_dir: Path, phantom_table: Path) -> None:
    record = chiasm(
        "zero-shot", "--table", phantom_table, "--labels", "left, right", "--truth", "effusion_side", "--model", model_dir,
        "--json",
    )  # fmt: skip
    assert record["scores"]["n"] <= 16
    assert record["scores"]["balanced_accuracy"]["chance"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--labels", "a, b"), "give images or a table"),
        (("--table", "TABLE"), "give --labels or --labels-file"),
        (("--table", "TABLE", "--labels", "a, b", "--truth", "nope"), "no label column `nope`"),
        (("--table", "TABLE", "--labels", "a, b", "--truth", "effusion_side"), "label `a` does not occur"),
        (("--table", "TABLE", "--labels", "a, b", "--split", "test"), "no row has split `test`"),
        (("missing.png", "--labels", "a, b"), "image `missing.png` does not exist"),
    ],
)
def test_mistakes_are_named(
    chiasm: Run, model_dir: Path, phantom_table: Path, words: tuple[str, ...], message: str
) -> None:
    filled = [str(phantom_table) if w == "TABLE" else w for w in words]
    text = chiasm("zero-shot", *filled, "--model", model_dir, code=1)
    assert "error: " in text
    assert message in text
    assert "hint: " in text or "does not exist" in text
    assert str(phantom_table.parent) not in text


def test_retrieval_measures_and_searches(chiasm: Run, model_dir: Path, phantom_table: Path) -> None:
    record = chiasm("retrieval", "--table", phantom_table, "--model", model_dir, "--json")
    assert 0 <= record["text_to_image"]["recall_at_10"]["value"] <= 1
    assert record["image_to_text"]["recall_at_10"]["chance"] > 0
    found = chiasm("retrieval", "left effusion", "--table", phantom_table, "--model", model_dir, "-k", 3, "--json")
    assert len(found["queries"][0]["hits"]) == 3
    by_image = chiasm("retrieval", first_image(phantom_table), "--table", phantom_table, "--model", model_dir)
    assert "rank" in by_image


@pytest.mark.filterwarnings("ignore::chiasm.data.tokens.TruncationWarning")
def test_placeholders_are_left_out_of_retrieval(chiasm: Run, model_dir: Path, phantom_table: Path) -> None:
    words = ("retrieval", "--table", phantom_table, "--model", model_dir, "--json")
    everything = chiasm(*words)["text_to_image"]["corpus_size"]
    kept = chiasm(*words, "--drop-text", "EFFUSION")["text_to_image"]["corpus_size"]
    assert 0 < kept < everything
    assert "matches the texts of all" in chiasm(*words, "--drop-text", ".", code=1)
    assert "no regular expression" in chiasm(*words, "--drop-text", "(", code=1)


def test_embed_then_search_the_store(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    record = chiasm(
        "embed", phantom_table, "--out", store, "--model", model_dir, "--layout", "clip-retrieval", "--json"
    )
    assert record["added"]["image"] == record["added"]["text"] > 0
    assert (store / "clip-retrieval" / "img_emb" / "img_emb_0.npy").exists()
    again = chiasm("embed", phantom_table, "--out", store, "--model", model_dir, "--json")
    assert again["added"] == {"image": 0, "text": 0}
    found = chiasm("retrieval", "left effusion", "--store", store, "--model", model_dir, "--json")
    assert found["corpus_size"] == record["added"]["image"]
    folder = store / "clip-retrieval"
    assert chiasm("retrieval", "left effusion", "--store", folder, "--model", model_dir, "--json") == found
    (folder / "chiasm.json").unlink()  # as clip-retrieval itself writes it: taken as the model's
    assert chiasm("retrieval", "left effusion", "--store", folder, "--model", model_dir, "--json") == found
    assert "does not say which encoder" in chiasm("retrieval", "--store", folder, code=1)


def test_embed_tells_its_speed_and_goes_on_in_the_precision_of_the_store(
    chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path
) -> None:
    words = ("embed", phantom_table, "--out", tmp_path / "store", "--model", model_dir)
    record = chiasm(*words, "--modality", "image", "--precision", "bf16", "--workers", 1, "--json")
    assert record["precision"] == "bf16"
    assert record["threads"]["decoding"] == 1
    assert record["threads"]["model"] >= 1
    assert record["per_second"]["image"] > 0
    refused = chiasm(*words, "--precision", "fp32", code=1)
    assert "holds vectors computed in bf16, the encoder computes in fp32" in refused
    assert "hint: go on with precision bf16, or choose another folder" in refused
    more = chiasm(*words, "--json")
    assert (more["precision"], more["present"]["image"]) == ("bf16", record["added"]["image"])
    assert set(more["per_second"]) == {"text"}
    assert "images added (" in chiasm(*words, "--precision", "bf16")
    plain = chiasm(*words[:2], "--out", tmp_path / "other", *words[4:], "--precision", "fp32")
    assert " a second; " in plain
    assert "fp32, " in plain


def test_two_spaces_are_refused(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    from chiasm.load import save_encoder
    from chiasm.testing import TinyEncoder

    other = tmp_path / "other"
    save_encoder(TinyEncoder(1), other)
    store = tmp_path / "store"
    chiasm("embed", phantom_table, "--out", store, "--model", model_dir, "--modality", "image")
    text = chiasm("retrieval", "x", "--store", store, "--model", other, code=1)
    assert "their similarity has no meaning" in text


def test_explain_writes_an_overlay(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "heat.png"
    image = first_image(phantom_table)
    record = chiasm("explain", image, "left effusion", "--model", model_dir, "--out", out, "--json")
    with Image.open(out) as drawn, Image.open(image) as original:
        assert drawn.size == original.size
    assert 0 <= record["peak_px"][0] < record["width_px"]


def test_models_and_doctor(chiasm: Run, model_dir: Path) -> None:
    names = {m["name"] for m in chiasm("models", "--json")}
    assert {"openai/ViT-B-32", "openai/RN50"} <= names
    assert "ViT" in chiasm("models", "openai/ViT-B-32")
    assert "did you mean" in chiasm("models", "openai/ViT-B-3", code=1)
    report = chiasm("doctor", "--model", model_dir, "--json")
    assert {c["name"] for c in report["checks"]} >= {"space", "finite", "logit scale", "spread of images"}


def test_absent_model_says_what_to_do(chiasm: Run, phantom_table: Path) -> None:
    text = chiasm("zero-shot", first_image(phantom_table), "--labels", "a, b", "--model", "biomedclp", code=1)
    assert "error: " in text
    assert "hint: " in text
    text = chiasm("zero-shot", first_image(phantom_table), "--labels", "a, b", code=1)
    assert "--model" in text


def test_train_from_a_recipe(chiasm: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        """
name = "tiny"
[data]
phantoms = "chest"
patients = 16
validation = 0.25
[image]
kind = "resnet"
image_size = 32
width = 8
layers = [1, 1]
heads = 2
[text]
width = 32
layers = 1
heads = 2
[projection]
dim = 16
[preprocess]
size = 32
[tokenizer]
kind = "clip"
compact = true
[optim]
epochs = 1
batch_size = 8
"""
    )
    record = chiasm("train", recipe, "--out", tmp_path / "run", "--set", "optim.lr=1e-3", "--json")
    assert record["steps"] >= 1
    assert "model" in record["best_dir"]
    text = chiasm("train", recipe, "--out", tmp_path / "run", code=1)
    assert "holds a run already" in text
    typo = chiasm("train", recipe, "--out", tmp_path / "b", "--set", "optim.lrr=1", code=1)
    assert "did you mean `optim.lr`" in typo


def test_answers_say_in_which_precision_they_were_worked_out(
    chiasm: Callable[..., Any], model_dir: Path, phantom_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("zero-shot", first_image(phantom_table), "--labels", "normal, effusion", "--model", model_dir)
    assert chiasm(*words, "--json")["precision"] == "fp32"  # what `auto` is in the tests
    assert chiasm(*words, "--precision", "bf16", "--json")["precision"] == "bf16"
    assert " in bf16, logit scale" in chiasm(*words, "--precision", "bf16")
    assert "one of: auto, fp32, bf16, int8" in chiasm(*words, "--precision", "BF16", code=1)
    store = tmp_path / "store"
    chiasm("embed", phantom_table, "--out", store, "--model", model_dir, "--modality", "image", "--precision", "bf16")
    found = chiasm("retrieval", "effusion", "--store", store, "--model", model_dir, "--json")
    assert found["precision"] == {"query": "fp32", "corpus": "bf16"}
    card = chiasm("retrieval", "--store", store, "--relevant-by", "effusion", "--json")["run_card"]
    assert card["model"].endswith(" in bf16")
    monkeypatch.setenv("CHIASM_PRECISION", "bf16")
    assert chiasm(*words, "--json")["precision"] == "bf16"
    assert chiasm(*words, "--precision", "fp32", "--json")["precision"] == "fp32"
    monkeypatch.setenv("CHIASM_PRECISION", "fp8")
    assert "precision `fp8` is not known (CHIASM_PRECISION names it)" in chiasm(*words, code=1)
