"""Advice: overlap follows the training data, the ranking does not contradict its own facts, every model has a verdict."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chiasm.config import read_toml
from chiasm.encoders import advice as module
from chiasm.encoders.advice import (
    VERDICTS,
    advise,
    build_targets,
    describe_model,
    find_overlap,
    list_models,
    load_targets,
)
from chiasm.encoders.catalog import CATALOG
from chiasm.encoders.facts import load_datasets, load_facts
from chiasm.errors import ConfigError, UnknownName

ROOT = Path(__file__).parents[2]
TARGETS = ("chexpert", "mimic-cxr", "nih14", "tuberculosis", "pcam", "bach", "crc", "general", "natural")


@pytest.fixture
def values() -> dict[str, Any]:
    """A copy of the table that a test may spoil."""
    return copy.deepcopy(read_toml(str(module.files("chiasm.encoders.models") / "advice.toml")))


def verdicts(target: str) -> dict[str, str]:
    return {a.model: a.verdict for a in advise(target)}


def test_all_targets_are_there() -> None:
    assert tuple(load_targets()) == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_every_model_gets_a_verdict_with_a_reason(target: str) -> None:
    rows = advise(target)
    assert {r.model for r in rows} == set(load_facts())
    assert [r.rank for r in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        assert row.verdict in VERDICTS
        assert row.why.endswith(".")
        assert row.overlap.reason.endswith(".")
        assert all(f.source for f in row.figures)
    assert "[?]" not in json.dumps([r.to_dict() for r in rows])
    with pytest.raises(UnknownName, match="did you mean `chexpert`"):
        advise("chexprt")


@pytest.mark.parametrize(
    ("model", "data", "short"),
    [
        ("medclip-swin", "chexpert", "same data: images, labels"),
        ("medclip-swin", "mimic-cxr", "same data: images, texts, labels"),
        ("medclip-swin", "nih14", "none known"),
        ("gloria", "chexpert", "same data: images, texts"),
        ("gloria", "mimic-cxr", "same hospital"),  # its text tower read notes of that hospital
        ("bioclinicalbert", "mimic-cxr", "same hospital"),
        ("chexzero", "chexpert", "same data, to choose only"),
        ("chexzero", "mimic-cxr", "same data: images, texts"),
        ("chexzero", "nih14", "unknown"),  # through OpenAI's weights, from which it starts
        ("biovil", "nih14", "none known"),
        ("biomedclip", "pcam", "unknown"),
        ("conch", "crc", "unknown"),
        ("uni", "pcam", "none known"),
        ("kaiko-vitb8", "tcga-til", "same data: images"),  # a data set derived from another
        ("resnet50", "imagenet-1k", "same data: images, labels"),
        ("dinov2-vitl14", "imagenet-1k", "same data: images"),
        ("medclip-swin", "imagenet-1k", "same data: images, labels"),  # through Swin-T
        ("t5-base", "crc", "none known"),  # unlisted texts hide no images
        ("histo-vit", "crc", "unknown"),
    ],
)
def test_overlap(model: str, data: str, short: str) -> None:
    overlap = find_overlap(model, [data])
    assert overlap.short == short
    assert overlap.reason


def test_overlap_says_through_what() -> None:
    assert "starts from `bioclinicalbert`" in find_overlap("gloria", ["mimic-cxr"]).reason
    assert "`openai/ViT-B-32`, from which it starts" in find_overlap("plip", ["pcam"]).reason
    assert "only its validation images" in find_overlap("chexzero", ["chexpert"]).reason.lower()
    assert "no labels were used" in find_overlap("biovil", ["mimic-cxr"]).reason.lower()
    assert find_overlap("biovil", []).level == "unknown"


def test_the_starting_advice_is_corrected() -> None:
    """What clip-variants says of the usual advice: trained on the labels, wrong scope, another field."""
    chexpert, mimic, general = verdicts("chexpert"), verdicts("mimic-cxr"), verdicts("general")
    assert chexpert["chexzero"] == "recommended"
    assert {chexpert["medclip-swin"], chexpert["medclip-resnet"], mimic["medclip-swin"]} == {"not zero-shot"}
    assert chexpert["gloria"] == mimic["biovil"] == mimic["chexzero"] == "in-domain"
    assert mimic["gloria"] == "possible"
    assert general["biomedclip"] == "recommended"
    assert {general[m] for m in ("biovil", "gloria", "bioclip", "conch")} == {"wrong scope"}
    for target in TARGETS[:7]:
        assert verdicts(target)["bioclip"] == "wrong scope"
    assert "recommended" not in verdicts("tuberculosis").values()  # nobody published a figure
    order = [a.model for a in advise("natural")][:6]
    assert order[0] == "openai/ViT-L-14-336px"
    assert set(order[4:]) == {"openai/RN50", "openai/RN101"}


def test_figures_are_those_of_the_data_set() -> None:
    rows = {a.model: a for a in advise("chexpert")}
    assert rows["chexzero"].figures[0].value == 0.889
    assert {f.on for r in rows.values() for f in r.figures} == {"chexpert"}
    rows = {a.model: a for a in advise("nih14")}
    assert {f.on for f in rows["biomedclip"].figures} == {"rsna-pneumonia"}
    backbones = [a for a in advise("pcam") if a.verdict == "features" and a.figures]
    assert [a.figures[0].value for a in backbones] == sorted((a.figures[0].value for a in backbones), reverse=True)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_that_saw_the_data_is_recommended(target: str) -> None:
    for row in advise(target):
        if row.verdict in ("recommended", "possible"):
            assert row.overlap.level != "same data" or row.overlap.uses == ("selection",), row.model
        if "labels" in row.overlap.uses:
            assert row.verdict != "in-domain", row.model


@pytest.mark.parametrize(
    ("target", "model", "verdict", "message"),
    [
        ("chexpert", "medclip-swin", "possible", "was trained on the data"),
        ("chexpert", "gloria", "recommended", "was trained on the data"),
        ("chexpert", "medclip-swin", "in-domain", "learned the labels"),
        ("crc", "conch", "best", "must be|is `best`"),
        ("crc", "conk", "possible", "unknown model `conk`"),
    ],
)
def test_advice_against_the_facts_is_refused(
    values: dict[str, Any], target: str, model: str, verdict: str, message: str
) -> None:
    build_targets(values)
    for rank in values[target]["ranks"]:
        if rank["model"] == model or (model == "conk" and rank["model"] == "conch"):
            rank.update(model=model, verdict=verdict)
    with pytest.raises(ConfigError, match=message):
        build_targets(values)


def test_unknown_and_doubled_names_are_refused(values: dict[str, Any]) -> None:
    doubled = copy.deepcopy(values)
    doubled["crc"]["ranks"].append(doubled["crc"]["ranks"][0])
    with pytest.raises(ConfigError, match="ranks a model twice"):
        build_targets(doubled)
    values["crc"]["datasets"] = ["crc100"]
    with pytest.raises(ConfigError, match="unknown data set `crc100`"):
        build_targets(values)
    assert set(load_datasets()) >= {d for t in load_targets().values() for d in (*t.datasets, *t.related)}


def test_models_are_described_with_and_without_loading_code() -> None:
    names = list_models()
    assert len(names) == len(set(names))
    assert set(names) == set(load_facts()) | set(CATALOG.names())
    keys = set(describe_model("openai/RN50"))
    for name in names:
        value = json.loads(json.dumps(describe_model(name)))
        assert value["name"] == name
        assert value["loads"] == (CATALOG.find(name) is not None)
        assert value["licence"], name
        assert value["training_data"], name
        if not value["variant_of"]:
            assert set(value) == keys, name
    assert describe_model("ViT-B/32")["name"] == "openai/ViT-B-32"  # an alias
    with pytest.raises(UnknownName):
        describe_model("nobody")


def test_a_name_without_loading_code_has_empty_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CATALOG._items, "openai/RN50")
    value = describe_model("openai/RN50")
    assert not value["loads"]
    assert value["weights"] is None
    assert value["licence"] == "MIT"
    assert set(value) == set(describe_model("openai/RN101"))


def test_the_page_is_in_step() -> None:
    """`python tools/make_models_page.py` writes docs/models.md; correct the tables, not the page."""
    spec = importlib.util.spec_from_file_location("make_models_page", ROOT / "tools" / "make_models_page.py")
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = page.render()
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == text, "run tools/make_models_page.py"
    assert all(f"`{name}`" in text for name in load_facts())
    assert "[?]" not in text


def test_advice_is_light() -> None:
    code = "import sys, chiasm.encoders.advice as a; a.advise('chexpert'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
