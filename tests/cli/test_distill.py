"""``chiasm distill`` as users see it: numbers, verdict, JSON, and errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chiasm.cli.distill import read_plan
from chiasm.errors import ConfigError, InputError

RECIPE = """
name = "made_up"
[data.synthetic]
train = 40
test = 60
reports = 50
[unimodal]
steps = 8
batch_size = "full"
lr = 1e-2
[text]
steps = 8
batch_size = "full"
lr = 1e-2
[fuse]
steps = 6
batch_size = "full"
lr = 1e-2
kd_weight = 10.0
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "made_up.toml"
    path.write_text(RECIPE)
    return path


def test_a_run_tells_numbers_chance_and_how_to_go_on(chiasm, recipe, tmp_path):
    said = chiasm("distill", recipe, "--out", tmp_path / "run")
    assert "SYNTHETIC" in said
    assert "balanced_accuracy" in said
    assert "majority class alone" in said
    assert f"chiasm distill {recipe} --out {tmp_path / 'run'} --controls --resume" in said
    assert "chiasm classify" not in said, "made-up features are no images"
    record = chiasm("distill", recipe, "--out", tmp_path / "run", "--resume", "--json")
    assert set(record["metrics"]["auroc"]) == {"value", "low", "high", "n", "chance"}
    assert Path(record["model"]).is_dir()


def test_controls_print_the_json_that_is_promised(chiasm, recipe, tmp_path):
    words = ("distill", recipe, "--out", tmp_path / "run", "--controls", "--seeds", "2")
    found = chiasm(*words, "--json")
    assert list(found["arms"]) == [
        "unimodal", "unimodal_lora", "lambda0", "clip_it", "shuffled", "random_text", "prompt_text", "paired",
    ]  # fmt: skip
    for arm in found["arms"].values():
        assert set(arm["balanced_accuracy"]) == {"value", "low", "high"}
        assert 0 <= arm["balanced_accuracy"]["value"] <= 1
        assert {"auroc", "ece"} <= set(arm)
    for name in ("clip_it-unimodal", "clip_it-lambda0", "shuffled-lambda0"):
        assert set(found["differences"][name]) == {"value", "low", "high", "p"}
        assert -1 <= found["differences"][name]["value"] <= 1
    assert isinstance(found["verdict"], str)
    assert found["seeds"] == [0, 1]
    difference = (
        found["arms"]["clip_it"]["balanced_accuracy"]["value"]
        - (found["arms"]["lambda0"]["balanced_accuracy"]["value"])
    )
    assert found["differences"]["clip_it-lambda0"]["value"] == pytest.approx(difference)
    page = Path(found["page"]).read_text()
    assert "SYNTHETIC" in page
    assert str(tmp_path) not in page
    kept = json.loads((tmp_path / "run/controls.json").read_text())
    assert kept["arms"]["clip_it"]["n_seeds"] == 2
    assert (tmp_path / "run/arms/shuffled/seed-1/predictions.csv").is_file()
    said = chiasm(*words, "--resume")
    assert "verdict: " in said
    assert "clip_it-lambda0" in said
    assert "p (Holm)" in said


def test_chosen_arms_and_changed_fields(chiasm, recipe, tmp_path):
    found = chiasm(
        "distill", recipe, "--out", tmp_path, "--controls", "--seeds", "1", "--arms", "lambda0, clip_it", "--set",
        "fuse.steps=3", "--set", "seed=7", "--json",
    )  # fmt: skip
    assert set(found["arms"]) == {"lambda0", "clip_it"}
    assert found["seeds"] == [7]
    assert found["arms"]["clip_it"]["auroc"]["low"] is None, "one seed has no interval"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "no recipe was named"),
        (("absent.toml",), "recipe `absent.toml` does not exist"),
        (("RECIPE", "more"), "`more` means nothing beside a recipe"),
        (("RECIPE", "--contols"), "did you mean `--controls`"),
        (("RECIPE", "--set", "fuse.kd_wight=3"), "did you mean `fuse.kd_weight`"),
        (("RECIPE", "--set", "text.steps=0"), "`text.steps` must be at least 1"),
        (("RECIPE", "--arms", "clip_it"), "--arms goes with --controls"),
        (("RECIPE", "--controls", "--arms", "clipit"), "did you mean `clip_it`"),
        (("--ds", "pcan"), "did you mean `pcam`"),
        (("--ds", "pcam", "--modl", "UNI"), "did you mean `--model`"),
        (("--ds", "pcam", "--model", "UNY"), "UNI"),
        (("--lora_r", "many"), "`--lora-r` must be a whole number"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(chiasm, recipe, tmp_path, words, expected):
    said = chiasm("distill", *(recipe if w == "RECIPE" else w for w in words), "--out", tmp_path / "run", code=1)
    assert "error: " in said
    assert expected in said
    assert str(tmp_path) not in said
    assert not (tmp_path / "run").exists()


def test_the_options_of_the_reference_make_a_recipe():
    plan, command = read_plan(["--ds", "bach", "--model", "VITS_8", "--lora_r", "4", "--lora-alpha", "2"], ["seed=3"])
    assert plan.backbone.encoder == "kaiko-vits8"
    assert plan.backbone.lora is not None
    assert (plan.backbone.lora.rank, plan.backbone.lora.alpha) == (4, 2.0)
    assert plan.seed == 3
    assert command == "chiasm distill --ds bach --model VITS_8 --lora_r 4 --lora-alpha 2"
    _, hidden = read_plan(["--ds", "bach", "--root", "/home/me/patients/bach"], [])
    assert hidden == "chiasm distill --ds bach --root bach"
    with pytest.raises(ConfigError, match="seeed"):
        read_plan(["--ds", "bach"], ["seeed=3"])
    with pytest.raises(InputError, match="no recipe"):
        read_plan([], [])


def test_a_folder_with_another_run_is_left_alone(chiasm, recipe, tmp_path):
    chiasm("distill", recipe, "--out", tmp_path / "run")
    said = chiasm("distill", recipe, "--out", tmp_path / "run", code=1)
    assert "holds a run already" in said
    assert "hint: go on with `--resume`" in said
    said = chiasm("distill", recipe, "--out", tmp_path / "run", "--resume", "--set", "fuse.steps=5", code=1)
    assert "another recipe" in said


def test_an_interruption_says_how_to_go_on(chiasm, recipe, tmp_path, monkeypatch):
    from chiasm.distill import run as module

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_unimodal", stopped)
    said = chiasm("distill", recipe, "--out", tmp_path / "run", code=130)
    assert "`--resume` goes on" in said
    monkeypatch.undo()
    chiasm("distill", recipe, "--out", tmp_path / "run", "--resume")


def test_help_names_the_options(chiasm):
    said = chiasm("distill", "--help")
    for option in ("--controls", "--seeds", "--arms", "--resume", "--overwrite", "--set", "--json"):
        assert option in said
