"""What is said about models: every figure has a source, every key is known, and the entries agree with it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest

from chiasm.config import read_toml
from chiasm.encoders import facts as module
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.encoders.entry import CatalogEntry
from chiasm.encoders.facts import (
    ModelFacts,
    build_datasets,
    build_facts,
    find_facts,
    find_original,
    join_facts,
    load_datasets,
    load_facts,
)
from chiasm.errors import ConfigError

FACTS = load_facts()
#: Every model that the mission names.
NAMED = {
    *("openai/ViT-B-32", "openai/ViT-B-16", "openai/ViT-L-14", "openai/ViT-L-14-336px", "openai/RN50", "openai/RN101"),
    *("biomedclip", "medclip-swin", "medclip-resnet", "biovil", "biovil-t", "gloria", "chexzero", "bioclip", "plip"),
    *("quiltnet-b-32", "quiltnet-b-16", "quiltnet-b-16-pmb", "conch", "uni", "uni2-h", "cxr-bert", "medclip-2d"),
    *("kaiko-vits8", "kaiko-vits16", "kaiko-vitb8", "kaiko-vitb16", "kaiko-vitl14", "histo-resnet", "histo-vit"),
    *("dino-vits8", "dino-vits16", "dino-vitb8", "dino-vitb16", "dinov2-vits14", "dinov2-vitb14", "dinov2-vitl14"),
    *("dinov2-vits14-reg", "dinov2-vitb14-reg", "dinov2-vitl14-reg", "lunit-resnet50", "lunit-vits16", "phikon"),
    *("resnet50", "convnext-tiny", "swin-tiny", "bioclinicalbert", "pubmedbert", "bluebert", "biomegatron", "t5-base"),
}


@pytest.fixture
def values() -> dict[str, Any]:
    """A copy of the table that a test may spoil."""
    return copy.deepcopy(read_toml(str(module.files("chiasm.encoders.models") / "facts.toml")))


def test_every_named_model_is_there() -> None:
    assert set(FACTS) == NAMED


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_model_says_what_a_user_must_know(name: str) -> None:
    facts = FACTS[name]
    assert facts.good_for
    assert facts.not_for
    assert facts.licence_source
    assert len(facts.licence) <= 28, "the table of the terminal shows it"
    assert facts.released or not facts.figures
    assert facts.trained_on or not facts.released
    if facts.released:
        assert facts.dim
        assert (facts.image_size_px > 0) == (facts.kind != "text")
        assert bool(facts.tokenizer) == (facts.kind != "image")
    for figure in facts.figures:
        assert figure.source
        assert figure.on in load_datasets()
        assert figure.metric
        assert facts.kind == "both" or figure.kind != "zero-shot", "zero-shot needs both towers"
    json.dumps(facts.to_dict())


def test_nothing_unconfirmed_is_printed() -> None:
    """Figures that the specification could not confirm: MedCLIP's and GLoRIA's own tables, BioViL's RSNA scores."""
    for name in ("medclip-swin", "medclip-resnet", "biovil", "biovil-t", "gloria"):
        assert not [f for f in FACTS[name].figures if f.kind == "zero-shot"], name
    assert "[?]" not in json.dumps({n: f.to_dict() for n, f in FACTS.items()})


def test_inverted_no_finding_is_told() -> None:
    scores = {f.task.split(" (95 %")[0]: f.value for f in FACTS["chexzero"].figures}
    assert scores["CheXpert test, no finding (template inverted)"] == 0.07
    five = ("atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion")
    mean = sum(scores[f"CheXpert test, {finding}"] for finding in five) / 5
    assert round(mean, 3) == scores["CheXpert test, mean of five findings"]


@pytest.mark.parametrize("entry", list(CATALOG.entries()), ids=lambda e: e.name)
def test_entries_agree_with_the_facts(entry: CatalogEntry) -> None:
    """Facts are written from papers and repositories, entries from code: they must tell one story."""
    original = find_original(entry.name)
    facts = FACTS[original or entry.name]
    assert entry.licence == facts.licence
    assert entry.gate == facts.gate
    assert entry.training_data == facts.training
    if original is not None:
        assert not entry.figures
        assert entry.description
        return
    assert entry.figures == facts.figures
    assert entry.description == facts.description
    assert entry.config.sides == facts.kind
    assert entry.dim == facts.dim
    if facts.kind != "text":
        assert entry.image_size_px == facts.image_size_px
    if facts.kind != "image" and facts.context:
        assert entry.config.text.context_length == facts.context
    if facts.gate != "open":
        assert entry.weights is not None
        assert entry.weights.ask


@pytest.mark.parametrize("name", sorted(n for n in FACTS if n in CATALOG and FACTS[n].parameters))
def test_sizes_are_those_of_the_models(name: str) -> None:
    """Counted on models without memory; towers of transformers and `named` ones need memory and are counted elsewhere."""
    config = CATALOG.get(name).config
    kinds = {config.image.kind} if config.has_image else set()
    kinds |= set() if not config.has_text or config.text.is_native else {"foreign"}
    assert CATALOG.get(name).parameters == FACTS[name].parameters
    if kinds <= {"vit", "resnet"}:
        model = build_encoder_model(config, device="meta")
        assert sum(p.numel() for p in model.parameters()) == FACTS[name].parameters


def test_a_plug_in_keeps_its_own_facts() -> None:
    entry = CatalogEntry("somebody/else", CATALOG.get("openai/RN50").config, licence="theirs", training_data="theirs")
    assert join_facts(entry) is entry
    assert find_facts("somebody/else") is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: v["conch"].update(licens="x"), "did you mean `conch.licence`"),
        (lambda v: v["conch"].pop("licence"), "missing field `conch.licence`"),
        (lambda v: v["conch"]["trained_on"][0].update(data="conchpairs"), "unknown data set `conchpairs`"),
        (lambda v: v["conch"]["figures"][0].update(on="crc100k"), "unknown data set `crc100k`"),
        (lambda v: v["conch"]["figures"][0].update(source=" "), "has no source"),
        (lambda v: v["conch"]["figures"][0].update(value=79.1), "is no fraction"),
        (lambda v: v["conch"].update(description="maybe [?]"), "nobody confirmed"),
        (lambda v: v["conch"].update(ask=""), "where to ask"),
        (lambda v: v["plip"].update(starts_from=["openai/ViT-B/32"]), "unknown model"),
        (lambda v: v["plip"].update(gate="closed"), "`plip.gate` is `closed`"),
        (lambda v: v["uni"].update(text_tower="BERT"), "kind and text tower"),
        (lambda v: v["uni"].update(kind="text"), "kind and image tower"),
    ],
)
def test_a_wrong_table_is_refused(values: dict[str, Any], spoil: Any, message: str) -> None:
    build_facts(values, load_datasets())
    spoil(values)
    with pytest.raises(ConfigError, match=message):
        build_facts(values, load_datasets())


def test_a_data_set_of_unknown_origin_is_refused() -> None:
    with pytest.raises(ConfigError, match="derived from the unknown data set `b`"):
        build_datasets({"a": {"name": "A", "about": "x", "derived_from": ["b"]}})


def test_every_data_set_is_of_use() -> None:
    used = {t.data for f in FACTS.values() for t in f.trained_on} | {f.on for m in FACTS.values() for f in m.figures}
    origins = {o for d in load_datasets().values() for o in d.derived_from}
    advised = {"nih14", "montgomery", "shenzhen", "bach"}
    assert set(load_datasets()) == used | origins | advised


def test_facts_are_light() -> None:
    code = "import sys, chiasm.encoders.facts as f; f.load_facts(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_facts_are_frozen() -> None:
    with pytest.raises(AttributeError):
        FACTS["conch"].licence = "MIT"  # type: ignore[misc]
    assert isinstance(FACTS["conch"], ModelFacts)
