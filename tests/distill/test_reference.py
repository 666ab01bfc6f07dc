"""The options of the published script: names, defaults, what they become, and the page that lists them."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chiasm.config import build, to_mapping, to_toml
from chiasm.distill.recipe import DistillRecipe, load_distill_recipe
from chiasm.distill.reference import (
    BY_NAME,
    MODELS,
    OPTIONS,
    backbone_of,
    notes_on,
    parse_reference,
    recipe_from_reference,
)
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import ChiasmError, ConfigError, UnknownName

ROOT = Path(__file__).parents[2]
#: Defaults of the published script, as read in it.
PUBLISHED = {
    "model": "UNI", "ds": "pcam", "monitor": "val_loss", "mod": "min", "learner": "late_fusion_kd", "dir": "output",
    "output": "train_with_text", "run": "run1", "sd": 0, "batch": 64, "delta": 5, "lora_r": 16, "lora_alpha": 8,
    "lora_dropout": 0.0, "worker": 8, "patience": 5, "clip": 0.5, "val_int": 0.1, "lr": 1e-3, "weight_decay": 1e-4,
    "ep": 1, "log": 1, "early": False, "lora_text": 1, "lora_vision": 1, "kd_layers": 1, "scheduler": 0, "no_lin": False,
    "chkpnt": False, "wandb": False,
}  # fmt: skip


def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_clip_it_pages", ROOT / "tools" / "make_clip_it_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def recipe_of(words: str) -> DistillRecipe:
    return recipe_from_reference(parse_reference(words.split()))


def test_defaults_are_the_reference_s_but_for_the_text_tower() -> None:
    assert {o.name: o.default for o in OPTIONS if o.origin == "reference"} == PUBLISHED | {"lora_text": 0}
    assert {o.name for o in OPTIONS if o.origin != "reference"} == {
        "lam", "val_every", "ref_compat", "root", "reports", "pairs", "encoder", "device",
    }  # fmt: skip
    assert BY_NAME["lam"].default == 1.0


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    recipe = recipe_of("--ds pcam --model UNI --lora_r 16 --lora_alpha 4")
    assert recipe == recipe_of("--ds=pcam --model=UNI --lora-r=16 --lora-alpha=4")
    assert (recipe.backbone.encoder, recipe.pairing.encoder, recipe.pairing.tissue) == ("uni", "conch", "breast")
    assert recipe.backbone.lora is not None
    assert (recipe.backbone.lora.rank, recipe.backbone.lora.alpha) == (16, 4.0)
    assert recipe.data.source == "pcam:${CHIASM_DATA}/pcam"
    assert recipe.fuse.text_lora is None
    assert (recipe.fuse.epochs, recipe.fuse.batch_size, recipe.fuse.lr, recipe.fuse.clip_norm) == (1.0, 64, 1e-3, 0.5)
    assert (recipe.fuse.monitor, recipe.fuse.patience, recipe.fuse.kd_weight) == ("none", 0, 1.0)
    assert recipe.run.out == "output/train_with_text"
    assert read_back(recipe, tmp_path) == recipe


def read_back(recipe: DistillRecipe, folder: Path) -> DistillRecipe:
    path = folder / "again.toml"
    path.write_text(to_toml(recipe))
    return load_distill_recipe(path)


def leaf(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = None if values is None else getattr(values, part)
    return values


#: A value of every option that must change the field which the table names.
CHANGED = {
    "ds": "crc", "model": "VITS_8", "run": "run3", "dir": "d", "output": "o", "batch": 8, "lr": 0.1, "ep": 3.0,
    "worker": 2, "val_int": 0.2, "clip": 0.0, "weight_decay": 0.5, "scheduler": 1, "lora_r": 2, "lora_alpha": 3.0,
    "lora_dropout": 0.5, "lora_text": 1, "lora_vision": 0, "no_lin": True, "sd": 7, "lam": 10.0, "kd_layers": 2,
    "learner": "late_fusion", "wandb": True, "chkpnt": True, "early": True, "val_every": 9, "ref_compat": True,
    "root": "r", "reports": "x.txt", "pairs": "p", "encoder": "plip", "device": "cuda",
}  # fmt: skip
WITH_EARLY = {"patience": 2, "delta": 0.25}


@pytest.mark.parametrize("name", [o.name for o in OPTIONS])
def test_every_option_sets_its_field(name: str, tmp_path: Path) -> None:
    option = BY_NAME[name]
    if name in WITH_EARLY:
        before, after = {"early": True}, {"early": True, name: WITH_EARLY[name]}
    elif name == "monitor":
        before, after = {"chkpnt": True}, {"chkpnt": True, "monitor": "val_acc", "mod": "max"}
    elif not option.field:
        assert name in ("mod", "log")
        return
    else:
        before, after = {}, {name: CHANGED[name]}
    old, new = recipe_from_reference(before), recipe_from_reference(after)
    assert leaf(old, option.field) != leaf(new, option.field)
    back = read_back(new, tmp_path)
    assert build(DistillRecipe, to_mapping(new)) == new
    assert leaf(back, option.field) == leaf(new, option.field) or name in ("root", "reports", "pairs")  # made absolute
    if not option.is_switch:
        for flag in (option.flag, f"--{name}"):  # hyphens and underscores
            assert parse_reference([flag, str(after[name])]) == {name: after[name]}
            assert parse_reference([f"{flag}={after[name]}"]) == {name: after[name]}
        assert (
            recipe_from_reference({option.flag: str(after[name])} | {k: v for k, v in after.items() if k != name})
            == new
        )


def test_parts_that_hang_together() -> None:
    assert recipe_of("--early --delta 0").fuse.monitor == "val_loss"
    assert recipe_of("--no-lin").backbone.lora is not None
    assert recipe_of("--no-lin --lora-vision 0").backbone.lora is None
    plain, odd = recipe_of(""), recipe_of("--ref-compat")
    assert (odd.heads.text_length, odd.heads.standardize, odd.fuse.warm_start_text) == (None, False, False)
    assert (plain.heads.text_length, plain.heads.standardize, plain.fuse.warm_start_text) == (3.0, True, True)
    assert recipe_of("--ds bach").unimodal.lr == 0.000625
    assert recipe_of("--ds crc").pairing.tissue == "colo"
    assert recipe_of("--pairs p").pairing.reports is None
    assert recipe_of("--pairs p").pairing.tissue is None
    assert (recipe_of("--learner late_fusion --lam 5").fuse.kd_weight, recipe_of("--lam 5").fuse.kd_weight) == (
        0.0,
        5.0,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora-rank 3", r"`--lora-rank` is no option of the reference; did you mean `--lora-r`\?"),
        ("--ep many", "`--ep` must be a number, got `many`"),
        ("--lora-r 1.5", "`--lora-r` must be a whole number"),
        ("--ep", "option --ep: expected one argument"),
        ("--ds camelyon", "unknown value of `--ds` `camelyon`"),
        ("--lora-text 2", "unknown value of `--lora-text` `2`"),
        ("--mod max", "`--monitor val_loss` is better when it is min, `--mod` says max"),
        ("--monitor val_acc", "is better when it is max"),
        ("--model UNO", r"unknown backbone `UNO`; did you mean `UNI`\?"),
        ("--val-int 1.5", r"`data\.validation` must be in \[0, 1\)"),
        ("--pairs p --reports r", "exclude each other"),
        ("recipe.toml", "`recipe.toml` is no option"),
        ("---ds pcam", "no option of the reference"),
    ],
)
def test_what_is_refused(words: str, message: str) -> None:
    with pytest.raises(ChiasmError, match=message):
        recipe_of(words)


def test_wrong_types_in_a_mapping_are_refused() -> None:
    for options in ({"early": 1}, {"batch": True}, {"batch": 1.5}, {"lora-rr": 1}):
        with pytest.raises(ConfigError):
            recipe_from_reference(options)


def test_backbones(tmp_path: Path) -> None:
    for key, name in MODELS.items():
        assert backbone_of(key) == name
        assert CATALOG.get(name).name == name
    assert backbone_of("dino-s16" if "dino-s16" in CATALOG.names() else "phikon")
    assert backbone_of(str(tmp_path)) == str(tmp_path)
    with pytest.raises(UnknownName) as caught:
        backbone_of("RESNET999")
    assert all(key in (caught.value.hint or "") for key in MODELS)


def test_traps_are_told() -> None:
    assert notes_on({}) == ()
    assert "stops after 6 validations" in notes_on({"early": True})[0]
    assert notes_on({"early": True, "delta": 0.0}) == ()
    assert len(notes_on({"--ref-compat": True, "learner": "late_fusion", "val-int": 0.2})) == 3
    assert notes_on({"ds": "bach", "val_int": 0.2}) == ()


def test_the_page_lists_the_table() -> None:
    text = (ROOT / "docs" / "reference" / "clip-it-options.md").read_text(encoding="utf-8")
    assert text == pages().options_page(), "run tools/make_clip_it_pages.py"
    listed = re.findall(r"^\| `(--[\w-]+)`", text, re.MULTILINE)
    assert listed == [o.flag for o in OPTIONS]
    assert all(len(o.here) > 10 for o in OPTIONS)


def test_relative_folders_of_a_named_data_set_start_at_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[data]\nsource = "bach-clip-it:here"\n[backbone]\nencoder = "uni"\n')
    assert load_distill_recipe(path).data.source == f"bach-clip-it:{tmp_path / 'here'}"
    for source in ("pcam:${CHIASM_DATA}/pcam", f"pcam:{tmp_path}"):
        assert load_distill_recipe(path, [f"data.source='{source}'"]).data.source == source
    assert load_distill_recipe(path, ["data.source='pcam:here'"]).data.source == f"pcam:{tmp_path / 'here'}"


# --- the recipes of the published settings -------------------------------------------------------------------------------


def published() -> list[dict[str, str]]:
    """The table of the repository's long README, with the p-values that were computed from it elsewhere."""
    with (ROOT / "tests" / "distill" / "clip_it_published.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def recipe_path(row: dict[str, str]) -> Path:
    return ROOT / "recipes" / f"clip_it_{row['data']}_{row['model'].replace('_', '').lower()}.toml"


def test_there_is_a_recipe_for_every_published_number() -> None:
    paths = {recipe_path(row) for row in published()}
    assert len(paths) == 18
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize("row", published(), ids=lambda row: f"{row['data']}-{row['model']}")
def test_a_recipe_loads_and_states_what_was_published(row: dict[str, str]) -> None:
    path = recipe_path(row)
    recipe = load_distill_recipe(path)
    assert recipe.name == path.stem
    options = {"ds": row["data"], "model": row["model"], "lora_alpha": 4, "reports": "tcga:${CHIASM_TCGA}"}
    expected = recipe_from_reference(options)
    assert replace(expected, name=recipe.name, description=recipe.description, run=recipe.run) == recipe
    head = path.read_text(encoding="utf-8").partition("\nname = ")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    numbers = re.search(
        r"frozen probe (\S+) ± (\S+)   CLIP-IT (\S+) ± (\S+)   gain (\S+)   Welch's t-test on these: p = (\S+)", head
    )
    assert numbers is not None
    probe, probe_std, clip_it, clip_it_std, gain, p = (float(n) for n in numbers.groups())
    assert [probe, probe_std, clip_it, clip_it_std] == [
        float(row[k]) for k in ("probe", "probe_std", "clip_it", "clip_it_std")
    ]
    assert gain == pytest.approx(clip_it - probe, abs=1e-9)
    if row["welch_p"]:
        assert p == pytest.approx(float(row["welch_p"]), abs=0.006 if p >= 0.02 else 0.0006)
    else:
        assert gain < 0
        assert p > 0.05
    flat = " ".join(head.replace("#", " ").split())
    for words in (
        "NOT REPRODUCED HERE",
        "How solid: Three runs each",
        "no control without the text",
        "chiasm distill recipes/",
    ):
        assert words in flat
    assert ("this difference is not significant" in flat) == (p >= 0.05)
    for needed in (recipe.backbone.encoder, "`conch`, after an agreement", "CC-BY-NC-ND-4.0", "https://zenodo.org/"):
        assert str(needed) in flat


def test_recipes_are_what_the_tool_writes() -> None:
    for path, text in pages().files().items():
        assert path.read_text(encoding="utf-8") == text, "run tools/make_clip_it_pages.py"


def test_the_comparison_with_the_reference_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "reference" / "clip-it-vs-reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:src|examples|recipes)/[\w./-]+)`", text))
    assert len(named) > 25
    assert not [name for name in named if not (ROOT / name).exists()]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 50
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}
    assert "[?]" not in text
