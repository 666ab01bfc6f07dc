"""The recipes whose captions come from labels: they keep to their training rows, and the split by patient holds."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.tasks.prompt_files import load_prompts
from chiasm.train.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SCRIPT = ROOT / "examples" / "split_by_patient.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("split_by_patient", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["pcam", "pneumonia"])
@pytest.mark.parametrize("kind", ["prompts", "prompts_scratch"])
def test_nothing_is_learnt_or_chosen_on_the_rows_that_are_reported(name: str, kind: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}_{kind}.toml")
    assert recipe.data.train_splits == ("train",)
    assert recipe.data.validation_splits == ()
    assert recipe.data.validation > 0
    assert recipe.data.leakage == "drop"
    assert recipe.run.select == "text_choice_accuracy"
    assert recipe.image is not None
    assert recipe.image.freeze == (kind == "prompts")


@pytest.mark.parametrize("name", ["pcam", "pneumonia"])
def test_prompts_say_what_the_captions_said(name: str) -> None:
    """Zero-shot here means new images, not new words: the classes and their words are those of the recipe."""
    prompts = load_prompts(RECIPES / f"{name}_prompts.json")
    for kind in ("prompts", "prompts_scratch"):
        (words,) = load_recipe(RECIPES / f"{name}_{kind}.toml").data.words.values()
        assert set(prompts.names) == set(words)


def test_no_pneumonia_recipe_names_a_file_or_a_size_as_input() -> None:
    for path in RECIPES.glob("pneumonia_*.toml"):
        texts = load_recipe(path).data.texts
        assert all("{subtype}" in t for t in texts)
        assert not any(hole in t for t in texts for hole in ("{image}", "{source_path}", "{orig_"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1), min_size=1))
def test_a_patient_is_on_one_side_whatever_else_is_in_the_table(patients: list[str]) -> None:
    fold_of = script().fold_of
    for patient in patients:
        assert fold_of(patient) == int(hashlib.md5(patient.encode()).hexdigest(), 16) % 5


def test_the_table_gains_a_split_and_absolute_paths(tmp_path: Path) -> None:
    table, out = tmp_path / "data" / "metadata.csv", tmp_path / "new" / "table.csv"
    table.parent.mkdir()
    rows = [{"image": f"images/{i}.jpg", "patient": f"p{i // 3}", "label": str(i % 2)} for i in range(60)]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    counts = script().split_table(table, out, patient="patient")
    with out.open(newline="") as file:
        made = list(csv.DictReader(file))
    assert [(r["patient"], r["label"]) for r in made] == [(r["patient"], r["label"]) for r in rows]
    assert [Path(r["image"]) for r in made] == [(table.parent / r["image"]).resolve() for r in rows]
    assert counts["test"] + counts["train"] == 60
    assert counts["test"] > 0
    assert counts["train"] > 0
    sides = {side: {r["patient"] for r in made if r["split"] == side} for side in ("train", "test")}
    assert not sides["train"] & sides["test"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na.jpg,1\n", "no column `patient`"),
        ("image,patient,split\na.jpg,p1,train\n", "`split` already"),
        ("image,patient\na.jpg,\n", "has no `patient`"),
    ],
)
def test_a_table_that_cannot_be_split_is_refused(tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "t.csv"
    table.write_text(text)
    command = [sys.executable, str(SCRIPT), str(table), "--patient", "patient", "--out", str(tmp_path / "out.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out.csv").exists()
