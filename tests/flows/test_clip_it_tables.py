"""The script that makes the tables of the CLIP-IT recipes, and the recipes that read them."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from chiasm.distill.recipe import load_distill_recipe
from chiasm.train.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def read(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clip_it_tables", ROOT / "examples" / "clip_it_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_phantoms_share_no_patient(script: ModuleType, tmp_path: Path) -> None:
    script.write_phantoms(tmp_path, patients=3, test_patients=3, report_patients=4, size_px=32)
    rows = read(tmp_path / "table.csv")
    sides = {side: {r["patient"] for r in rows if r["split"] == side} for side in ("train", "test")}
    assert all(sides.values())
    assert not sides["train"] & sides["test"]
    assert all((tmp_path / r["image"]).is_file() for r in rows)
    assert {r["label"] for r in rows} <= {"no tumour", "low grade", "high grade"}
    reports = [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(reports) == 4
    assert all(set(r) == {"id", "text"} and r["text"] for r in reports)  # no class beside a report


def test_seeds_of_phantoms_differ(script: ModuleType) -> None:
    assert len({0, *script.SEEDS.values()}) == len(script.SEEDS) + 1  # 0 is the retriever from scratch


def test_retrievers_do_not_read_the_set_that_they_serve(script: ModuleType, tmp_path: Path) -> None:
    for name, labels in (("lc25000_lung", ("lung_aca", "lung_n")), ("pcam_subset", ("0", "1"))):
        (tmp_path / name).mkdir()
        lines = [f"images/{i}.png,{label},tile-{i},train" for i, label in enumerate(labels)]
        text = "image,label,source_tile_group,split\n" + "\n".join(lines) + "\n"
        (tmp_path / name / "metadata.csv").write_text(text, encoding="utf-8")
    for what, foreign in (("pcam", "pcam_subset"), ("lung", "lc25000_lung")):
        out = tmp_path / what
        arguments = [f"retriever-{what}", "--data", str(tmp_path), "--out", str(out), "--patients", "2", "--size", "32"]
        assert script.main(arguments) == 0
        rows = read(out / "table.csv")
        assert len(rows) > 2
        assert not any(foreign in r["image"] for r in rows)


@pytest.mark.parametrize("name", ["tissue", "pcam", "lung", "chest"])
def test_recipes_of_retrievers_are_valid(name: str) -> None:
    assert load_recipe(ROOT / "recipes" / f"clip_it_retriever_{name}.toml").name == f"clip_it_retriever_{name}"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("clip_it_real_*.toml")), ids=lambda p: p.stem)
def test_recipes_on_real_images_are_valid(path: Path) -> None:
    recipe = load_distill_recipe(path)
    assert recipe.data.label_noise == 0
    assert recipe.name == path.stem
    assert recipe.pairing.encoder is not None
    assert "retr_" in recipe.pairing.encoder
