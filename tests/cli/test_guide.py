"""`chiasm guide`: frames and a page, CLIPScore of a table and of a store, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Run = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("default::chiasm.data.tokens.TruncationWarning")


def test_a_picture_follows_its_text(chiasm: Run, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    found = chiasm(
        "guide", "large left effusion", "--model", model_dir, "--out", out, "--steps", "12", "--cutouts", "2", "--frames",
        "3", "--lr", "0.05", "--json",
    )  # fmt: skip
    frames = sorted(out.glob("step_*.png"))
    assert [f.name for f in frames] == ["step_00000.png", "step_00004.png", "step_00008.png", "step_00012.png"]
    with Image.open(frames[-1]) as last, Image.open(frames[0]) as start:
        assert last.size == (32, 32)
        assert last.tobytes() != start.tobytes()
    assert found["gains"]["large left effusion"] > 0
    assert sorted(found["followed"][1].split()) == ["effusion", "large", "left"]  # the control: another order
    html = (out / "index.html").read_text()
    assert "no medical evidence" in html
    assert json.loads((out / "guidance.json").read_text())["note"].startswith("This picture")
    again = chiasm(
        "guide", "large left effusion", "--model", model_dir, "--out", tmp_path / "again", "--steps", "12", "--cutouts", "2",
        "--frames", "3", "--lr", "0.05", "--json",
    )  # fmt: skip
    assert again["losses"] == found["losses"]
    assert again["run_card"]["digest"] == found["run_card"]["digest"]


def test_it_starts_from_an_image(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    image = sorted((phantom_table.parent / "images").glob("*.png"))[0]
    text = chiasm(
        "guide", "nodule", "--start", image, "--stay", "20", "--against", "normal", "--control", "effusion", "--model",
        model_dir, "--out", tmp_path / "o", "--steps", "2", "--cutouts", "1", "--frames", "1",
    )  # fmt: skip
    assert "control" in text
    assert "no medical evidence" in text
    with Image.open(tmp_path / "o" / "step_00002.png") as made:
        assert made.size == (48, 48)


def test_clip_score_of_a_table_and_of_a_store(
    chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path
) -> None:
    page = tmp_path / "s.html"
    found = chiasm("guide", "--score", "--table", phantom_table, "--model", model_dir, "--out", page, "--json")
    assert set(found["clip_score"]) == {"value", "low", "high", "n", "chance"}
    assert found["clip_score"]["n"] == len(found["scores"])
    assert found["wins"]["chance"] == 0.5
    html = page.read_text()
    assert "texts of other patients" in html
    store = tmp_path / "store"
    chiasm("embed", phantom_table, "--out", store, "--model", model_dir)
    stored = chiasm("guide", "--score", "--store", store, "--json")
    assert stored["clip_score"]["value"] == pytest.approx(found["clip_score"]["value"], abs=1e-4)
    assert "own text wins" in chiasm("guide", "--score", "--store", store)


def test_refusals(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    model = ("--model", model_dir)
    file = tmp_path / "file"
    file.write_text("x")
    for words, said in (
        (("guide", *model), "shall fit"),
        (("guide", "a", *model), "--out DIR"),
        (("guide", "a", "--out", file, *model), "is a file"),
        (("guide", "a", "--table", phantom_table, "--out", tmp_path / "o", *model), "--score"),
        (("guide", "a", "--score", "--table", phantom_table, *model), "make pictures"),
        (("guide", "--score", *model), "one of the two"),
        (("guide", "--score", "--table", phantom_table, "--out", "x.png", *model), "no page"),
        (("guide", " ", "--out", tmp_path / "o", *model), "empty"),
    ):
        text = chiasm(*words, code=1)
        assert said in text, words
        assert "hint: " in text or "error: " in text
