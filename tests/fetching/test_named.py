"""From a name to an encoder, a bundle and the doctor: a small model of the catalog whose source is a server here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from chiasm.bundle import write_bundle
from chiasm.cli.main import app
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG, CatalogEntry, WeightSource
from chiasm.errors import CheckpointError
from chiasm.load import load
from chiasm.testing import save_openai_archive
from chiasm.types import Preprocess

Register = Callable[..., CatalogEntry]
CONFIG = EncoderConfig(
    image=ImageTowerConfig(image_size=32, width=64, layers=1, heads=1, patch_size=16),
    text=TextTowerConfig(width=64, layers=1, heads=1),
    projection=ProjectionConfig(dim=16),
    preprocess=Preprocess(size=32),
)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    found = build_encoder_model(CONFIG, seed=0).state_dict()
    torch.manual_seed(0)
    return {k: v + 0.02 * torch.randn_like(v) if v.ndim else v for k, v in found.items()}


@pytest.fixture
def register() -> Iterator[Register]:
    names = []

    def add(name: str, weights: WeightSource, **more: Any) -> CatalogEntry:
        entry = CatalogEntry(name, CONFIG, weights=weights, description="A small model.", **more)
        CATALOG.add(name, entry)
        names.append(name)
        return entry

    yield add
    for name in names:
        del CATALOG._items[name]


def test_an_archive_by_name(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor], register: Register
) -> None:
    """As OpenAI's: a TorchScript archive whose checksum is known, cut once on its way."""
    data = save_openai_archive(state, tmp_path / "Tiny.pt").read_bytes()
    site.files["/clip/Tiny.pt"] = data
    site.cut_at["/clip/Tiny.pt"] = [len(data) // 2]
    source = WeightSource("a test", url=f"{site.address}/clip/Tiny.pt", sha256=hashlib.sha256(data).hexdigest())
    register("own/Tiny", source, licence="CC-BY-4.0", training_data="noise")
    encoder = load("own/Tiny")
    assert encoder.name == "own/Tiny"
    assert [h.get("Range", "") for _, h in site.asked] == ["", f"bytes={len(data) // 2}-"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load("own/Tiny").space == encoder.space

    done = write_bundle("own/Tiny", tmp_path / "bundle")
    assert (done.licence, done.space) == ("CC-BY-4.0", str(encoder.space))
    notice = (tmp_path / "bundle" / "NOTICE.txt").read_text()
    assert "Licence: CC-BY-4.0" in notice
    assert "Trained on: noise" in notice
    assert f"Fetched: sha256 {hashlib.sha256(data).hexdigest()}" in notice
    image = Image.effect_noise((40, 50), 40)
    assert np.array_equal(load(tmp_path / "bundle").encode([image]), encoder.encode([image]))

    runner = CliRunner()
    for expected in ("recorded", "from the vectors of"):  # the bundle has the same weights, so the same record
        model = "own/Tiny" if expected == "recorded" else str(tmp_path / "bundle")
        answer = runner.invoke(app, ["doctor", "--model", model, "--json"])
        assert answer.exit_code == 0, answer.output
        (check,) = (c for c in json.loads(answer.output)["checks"] if c["name"] == "self-test")
        assert check["state"] == "ok"
        assert expected in check["detail"]


def test_another_file_than_the_published_one_is_never_loaded(
    site: Any, tmp_path: Path, state: dict[str, Tensor], register: Register
) -> None:
    site.files["/Tiny.pt"] = save_openai_archive(state, tmp_path / "Tiny.pt").read_bytes()
    register("own/tiny", WeightSource("a test", url=f"{site.address}/Tiny.pt", sha256="0" * 64))
    with pytest.raises(CheckpointError, match="checksum differs"):
        load("own/tiny")
    assert not list((tmp_path / "home" / "models").glob("*.pt*"))


def test_what_must_be_asked_for_is_loaded_from_the_file_that_came(
    site: Any, tmp_path: Path, state: dict[str, Tensor], register: Register
) -> None:
    register("own/gated", WeightSource("a paper", ask="write to its authors"), gate="request", licence="none stated")
    with pytest.raises(CheckpointError, match="not on this machine") as caught:
        load("own/gated")
    assert "write to its authors (licence: none stated; handed out by its authors)" in str(caught.value.hint)
    torch.save(state, tmp_path / "from-them.pt")
    encoder = load("own/gated", pretrained=tmp_path / "from-them.pt")
    assert encoder.config.image.activation == "quick_gelu"  # the name says it, the file cannot
    write_bundle("own/gated", tmp_path / "bundle", pretrained=tmp_path / "from-them.pt")
    assert "Passing these weights on may not be allowed" in (tmp_path / "bundle" / "NOTICE.txt").read_text()
    assert not site.asked
