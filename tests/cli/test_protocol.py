"""``chiasm zero-shot --protocol``: published protocols from the command line, with a small real model."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:protocol .* was published for:chiasm.tasks.protocol.ProtocolWarning"),
    pytest.mark.filterwarnings("ignore:.*longer than.*:chiasm.data.tokens.TruncationWarning"),
]


@pytest.fixture(scope="session")
def tiles(phantom_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms as tiles of four slides, each with one diagnosis."""
    with phantom_table.open() as file:
        rows = list(csv.DictReader(file))
    column = next(c for c in rows[0] if c.endswith("path") or c == "image")
    folder = tmp_path_factory.mktemp("tiles")
    with (folder / "tiles.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "slide", "patient_id", "diagnosis", "stain"])
        for k, row in enumerate(rows):
            image = phantom_table.parent / row[column]
            writer.writerow([image, f"s{k % 4}", f"p{k % 4}", "adeno" if k % 2 else "squamous", f"batch{k}"])
    return folder / "tiles.csv"


def test_the_list(chiasm: Run) -> None:
    text = chiasm("zero-shot", "--protocol", "list")
    assert "chexzero-chexpert14" in text
    assert "published, corrected" in text
    found = {p["name"]: p for p in chiasm("zero-shot", "--protocol", "list", "--json")}
    assert len(found["openai-imagenet"]["templates"]) == 80
    assert all(p["source"] and p["variants"]["published"] for p in found.values())


def test_a_protocol_with_prompts_of_its_own(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    record = chiasm(
        "zero-shot", "--table", phantom_table, "--protocol", "biomedclip-rsna", "--model", model_dir, "--json", "--out", out
    )  # fmt: skip
    assert (record["protocol"], record["variant"]) == ("biomedclip-rsna", "published")
    assert record["labels"] == ["normal lung", "pneumonia"]
    assert record["notes"]
    assert len(out.read_text().splitlines()) == 1 + len(record["images"])
    text = chiasm("zero-shot", "--table", phantom_table, "--protocol", "biovil-rsna", "--model", model_dir)
    assert "protocol biovil-rsna, variant published" in text
    assert "the softmax over the two cosines without a scale" in text


def test_pairs_without_a_scale_and_their_score(chiasm: Run, model_dir: Path, phantom_table: Path) -> None:
    record = chiasm(
        "zero-shot", "--table", phantom_table, "--protocol", "chexzero-chexpert14", "--variant", "corrected",
        "--labels", "effusion, nodule", "--truth", "*", "--model", model_dir, "--json",
    )  # fmt: skip
    assert (record["mode"], record["logit_scale"], record["logit_scale_source"]) == ("multi", 1.0, "protocol")
    assert record["prompts"]["labels"]["nodule"] == {"positive": ["nodule"], "negative": ["no nodule"]}
    assert all(0.1 < p < 0.9 for image in record["images"] for p in image["probabilities"].values())
    assert record["scores"]["macro_auroc"]["chance"] == 0.5


@pytest.mark.filterwarnings("ignore::chiasm.tasks.prompts.PromptWarning")
def test_all_labels_of_chexzero_run_as_published(chiasm: Run, model_dir: Path, phantom_table: Path) -> None:
    record = chiasm(
        "zero-shot", "--table", phantom_table, "--protocol", "chexzero-chexpert14", "--model", model_dir, "--json"
    )
    assert len(record["labels"]) == 14
    assert record["prompts"]["labels"]["No Finding"]["negative"] == ["no No Finding"]
    assert any("inverted" in note for note in record["notes"])


@pytest.mark.parametrize("protocol", ["medclip-chexpert5x200", "gloria-chexpert5x200"])
def test_attribute_lists_of_the_user(
    chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path, protocol: str
) -> None:
    lists = {
        c: {"severity": ["", "mild"], "subtype": [f"{c} {k}" for k in range(9)], "location": ["left"]}
        for c in ("a", "b")
    }
    (tmp_path / "constants.py").write_text(f"CHEXPERT_CLASS_PROMPTS = {lists!r}\n")
    words = ("zero-shot", "--table", phantom_table, "--protocol", protocol, "--model", model_dir)
    record = chiasm(*words, "--labels-file", tmp_path / "constants.py", "--json")
    drawn = 10 if protocol.startswith("medclip") else 5
    assert [len(p["positive"]) for p in record["prompts"]["labels"].values()] == [drawn, drawn]
    assert "the attribute lists are NOT the published ones" in record["notes"]
    if protocol.startswith("gloria"):
        assert any("global half" in note for note in record["notes"])
    text = chiasm(*words, code=1)
    assert "needs something of yours" in text
    assert "constants.py" in text


@pytest.mark.filterwarnings("ignore::chiasm.evaluate.scores.InvertedScoreWarning")
def test_slides(chiasm: Run, model_dir: Path, tiles: Path, tmp_path: Path) -> None:
    prompts = {"0": {"classnames": {"adeno": ["adenocarcinoma"], "squamous": ["squamous cell carcinoma"]}, "templates": ["CLASSNAME.", "an image of CLASSNAME."]}}  # fmt: skip
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    words = (
        "zero-shot", "--table", tiles, "--protocol", "conch-slides", "--labels-file", tmp_path / "prompts.json", "--model",
        model_dir,
    )  # fmt: skip
    record = chiasm(*words, "--truth", "diagnosis", "--out", tmp_path / "out.csv", "--json")
    assert list(record["by_tiles"]) == ["1", "5", "10", "50", "100"]
    for found in record["by_tiles"].values():
        assert [i["id"] for i in found["images"]] == ["s0", "s1", "s2", "s3"]
        assert found["scores"]["n"] == 4
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert {r["tiles"] for r in rows} == {"1", "5", "10", "50", "100"}
    assert "mean of the best 50 tiles" in chiasm(*words)
    assert "no truth of slides" in chiasm(*words, "--truth", "stain", code=1)


@pytest.mark.filterwarnings("ignore::chiasm.evaluate.scores.InvertedScoreWarning")
def test_validation_slides_choose_the_number_of_tiles(
    chiasm: Run, model_dir: Path, tiles: Path, tmp_path: Path
) -> None:
    with tiles.open() as file:
        rows = list(csv.DictReader(file))
    table = tmp_path / "split.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "split"])
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "split": "val" if row["slide"] in ("s0", "s1") else "test"})
    (tmp_path / "p.json").write_text('{"adeno": ["adenocarcinoma"], "squamous": ["squamous cell carcinoma"]}')
    words = (
        "zero-shot", "--table", table, "--protocol", "conch-slides", "--labels-file", tmp_path / "p.json", "--model",
        model_dir, "--truth", "diagnosis",
    )  # fmt: skip
    record = chiasm(*words, "--split", "test", "--choose-on", "val", "--json")
    validation = chiasm(*words, "--split", "val", "--json")["by_tiles"]
    by_j = {int(j): found["scores"]["balanced_accuracy"]["value"] for j, found in validation.items()}
    best = min(by_j, key=lambda j: (-by_j[j], j))
    assert list(record["by_tiles"]) == [str(best)]
    assert [i["id"] for i in record["by_tiles"][str(best)]["images"]] == ["s2", "s3"]
    assert any(
        f"{best} tiles were chosen on the slides of split `val`" in n for n in record["by_tiles"][str(best)]["notes"]
    )
    assert "lie in both splits" in chiasm(*words, "--choose-on", "val", code=1)
    assert "name `--truth`" in chiasm(*words[:-2], "--split", "test", "--choose-on", "val", code=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--protocol", "gloria-chexpert5x20"), "did you mean `gloria-chexpert5x200`"),
        (("--protocol", "biovil-rsna", "--variant", "corrected"), "no defect of it is known"),
        (("--variant", "corrected", "--labels", "a, b"), "belongs to `--protocol`"),
        (("--protocol", "openai-imagenet"), "needs something of yours"),
        (("--protocol", "openai-imagenet", "--labels", "a"), "the only label"),
        (("--protocol", "openai-imagenet", "--labels", "a, b", "--template", "x {}"), "templates of its own"),
        (("--protocol", "openai-imagenet", "--labels", "a, b", "--labels-file", "x.txt"), "one of the two"),
        (("--protocol", "plip", "--labels", "a, b"), "no templates"),
        (("--protocol", "conch-slides", "--labels-file", "PROMPTS"), "a row has none"),
        (("--protocol", "openai-imagenet", "--labels", "a, b", "--multi"), "needs negative prompts"),
    ],
)
def test_mistakes(
    chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "p.json").write_text('{"a": ["x"], "b": ["y"]}')
    filled = [tmp_path / "p.json" if w == "PROMPTS" else w for w in words]
    text = chiasm("zero-shot", "--table", phantom_table, *filled, "--model", model_dir, code=1)
    assert message in text
    assert "hint:" in text or "one of the two" in message


def renamed(model_dir: Path, folder: Path) -> Path:
    """The tiny model under another name, as a named model would be."""
    from chiasm.load import load, save_encoder

    encoder = load(model_dir)
    encoder.name = folder.name
    save_encoder(encoder, folder)
    return folder


def test_another_familys_model_is_warned_of(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    words = ("zero-shot", "--table", phantom_table, "--protocol", "biomedclip-rsna", "--model", model_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        text = chiasm(*words)
    assert "warning: protocol `biomedclip-rsna` was published for biomedclip" in text
    assert "the model is of another family" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "another family" not in chiasm(*words[:-1], renamed(model_dir, tmp_path / "biomedclip"))
