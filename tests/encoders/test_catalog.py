"""The catalog: its configurations are those of the published models, its facts have sources, its names are found."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import ARCHITECTURES, CATALOG, CatalogEntry, with_gelu
from chiasm.errors import ConfigError, UnknownName

#: Sizes of the official files, counted with OpenAI's own code: parameters, names in the state dict, dimensions.
OFFICIAL = {
    "openai/ViT-B-32": (151_277_313, 302, 512),
    "openai/ViT-B-16": (149_620_737, 302, 512),
    "openai/ViT-L-14": (427_616_513, 446, 768),
    "openai/ViT-L-14-336px": (427_944_193, 446, 768),
    "openai/RN50": (102_007_137, 489, 1024),
    "openai/RN101": (119_688_033, 795, 512),
}


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_configurations_build_the_official_models(name: str) -> None:
    entry = CATALOG.get(name)
    model = build_encoder_model(entry.config, device="meta")
    parameters, names, dim = OFFICIAL[name]
    assert sum(p.numel() for p in model.parameters()) == parameters == entry.parameters
    assert len(model.state_dict()) == names
    assert entry.dim == dim
    assert entry.config.text.activation == "quick_gelu"
    assert model.state_dict()["token_embedding.weight"].shape == (49408, entry.config.text.width)


@pytest.mark.parametrize("entry", list(CATALOG.entries()), ids=lambda e: e.name)
def test_entries_are_plain_values(entry: CatalogEntry) -> None:
    value = json.loads(json.dumps(entry.to_dict()))
    assert value["name"] == entry.name
    assert "[?]" not in json.dumps(value)
    assert EncoderConfig.from_dict(json.loads(json.dumps(entry.config.to_dict()))) == entry.config
    assert all(f.source and 0 < f.value < 1 for f in entry.figures)
    assert entry.weights is None or entry.weights.source


def test_all_six_of_openai_are_there() -> None:
    assert set(CATALOG.names()) >= set(OFFICIAL)
    assert {n for n in CATALOG.names() if n.startswith("openai/")} == set(OFFICIAL)


@pytest.mark.parametrize("entry", [CATALOG.get(n) for n in sorted(OFFICIAL)], ids=lambda e: e.name)
def test_every_fact_has_a_source(entry: CatalogEntry) -> None:
    assert entry.licence
    assert entry.description
    assert entry.training_data
    assert all(f.source and 0 < f.value < 1 for f in entry.figures)
    assert entry.figures
    assert entry.weights is not None
    assert entry.weights.url.startswith("https://openaipublic.azureedge.net/clip/models/")
    assert entry.weights.url.split("/")[-2] == entry.weights.sha256
    assert len(bytes.fromhex(entry.weights.sha256)) == 32


def test_digests_and_names_are_unique() -> None:
    entries = list(CATALOG.entries())
    digests = [e.weights.sha256 for e in entries if e.weights and e.weights.sha256]
    assert len(set(digests)) == len(digests)
    names = [n for e in entries for n in (e.name, *e.aliases)]
    assert len(names) == len(set(names))
    assert not set(names) & set(ARCHITECTURES)  # a name with weights is never one without


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("ViT-B/32", "openai/ViT-B-32"),
        ("openai/ViT-B/16", "openai/ViT-B-16"),
        ("ViT-L/14@336px", "openai/ViT-L-14-336px"),
        ("openai/ViT-L-14-336", "openai/ViT-L-14-336px"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert CATALOG.get(alias).name == name


def test_unknown_names_get_a_suggestion() -> None:
    for wrong, meant in (("openai/ViT-B32", "openai/ViT-B-32"), ("RN-50", "RN50"), ("ViT-L-14-quickgel", "ViT-L-14-quickgelu")):  # fmt: skip
        with pytest.raises(UnknownName, match=f"did you mean `{meant}`"):
            CATALOG.get(wrong)
    with pytest.raises(ConfigError, match="registered twice"):
        CATALOG.add("openai/RN50", CATALOG.get("openai/RN50"))


def test_architectures_are_open_clips() -> None:
    """Without a suffix GELU, with it QuickGELU; apart from that one shape."""
    assert set(ARCHITECTURES) == {
        f"{n}{s}" for n in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "RN50", "RN101") for s in ("", "-quickgelu")
    }  # fmt: skip
    for name, config in ARCHITECTURES.items():
        activations = {config.image.activation, config.text.activation}
        assert activations == ({"quick_gelu"} if name.endswith("-quickgelu") else {"gelu"})
        assert with_gelu(ARCHITECTURES[f"{name.removesuffix('-quickgelu')}-quickgelu"]) == with_gelu(config)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("openai/ViT-B-32", "quick_gelu"), ("openai/RN50", "relu"), ("uni", "gelu"), ("conch", None), ("cxr-bert", None)],
)
def test_an_activation_is_stated_only_where_it_is_known(name: str, activation: str | None) -> None:
    assert CATALOG.get(name).to_dict()["activation"] == activation


def test_the_catalog_is_light() -> None:
    code = "import sys, chiasm.encoders.catalog; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_model_of_the_catalog_runs_at_its_size() -> None:
    """The smallest of them, whole: one image and one text go through (weights drawn in place, no file)."""
    config = CATALOG.get("openai/ViT-B-32").config
    model = build_encoder_model(config, device="meta").to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
        assert model.encode_image(torch.zeros(1, 3, 224, 224)).shape == (1, 512)
        ids = torch.tensor([[49406, 320, 49407]])
        assert model.encode_text(ids).shape == (1, 512)
