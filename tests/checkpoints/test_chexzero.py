"""CheXzero's files load and agree with an independent implementation (tests/golden/make_chexzero.py); traps fail it."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.encoders.base import Encoder, ProjectionConfig
from chiasm.encoders.catalog import CATALOG
from chiasm.encoders.models.openai import with_gelu
from chiasm.errors import CheckpointError
from chiasm.load import load

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "chexzero.json").read_text())
make = runpy.run_path(str(GOLDEN / "make_chexzero.py"))
TOLERANCE = 1e-5


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Encoder]:
    """Write the plain state dict in mixed precision as it is published, then load it as a small CheXzero."""

    def make_encoder(tensors: dict[str, Tensor] | None = None, *, gelu: bool = False) -> Encoder:
        entry, s, t = CATALOG.get("chexzero"), make["SHAPE"], make["TEXT"]
        config = with_gelu(entry.config) if gelu else entry.config
        image = replace(
            config.image,
            **{k: s[k] for k in ("image_size", "patch_size", "width", "layers", "heads")},
        )
        config = replace(
            config,
            image=image,
            text=replace(config.text, **{k: t[k] for k in ("width", "layers", "heads")}),
            projection=ProjectionConfig(dim=s["dim"]),
            preprocess=replace(config.preprocess, size=s["image_size"]),
        )
        monkeypatch.setitem(CATALOG._items, "small", replace(entry, name="small", aliases=(), config=config))
        path = tmp_path / "best_64_5e-05_original_22000_0.864.pt"
        torch.save(make["weights"]() if tensors is None else tensors, path)
        return load(path, family="small")

    return make_encoder


def error(ours: Tensor, expected: Any) -> float:
    theirs = expected if isinstance(expected, Tensor) else torch.tensor(expected)
    scale = torch.maximum(theirs.abs(), theirs.square().mean(-1, keepdim=True).sqrt())
    return float(((ours - theirs).abs() / scale).max())


def pixels(encoder: Encoder) -> Tensor:
    return torch.stack([encoder.preprocess(p) for p in make["pictures"]()])


def prompts(template: str) -> list[str]:
    return [template.format(label) for label in make["LABELS"]]


def test_pictures_and_prompts_agree(read: Callable[..., Encoder]) -> None:
    encoder = read()
    ours = pixels(encoder)
    theirs = torch.stack([make["prepare"](p) for p in make["pictures"]()])
    assert float((ours - theirs).abs().max()) <= 2e-6
    assert error(encoder.encode_image(ours), EXPECTED["image"]) <= TOLERANCE
    texts = [*prompts("{}"), *prompts("no {}")]
    assert torch.equal(encoder.tokenizer.encode(texts).ids, make["ids"]())
    assert error(encoder.encode_text(texts), EXPECTED["text"]) <= TOLERANCE
    assert encoder.model.dtype == torch.float32


def test_the_published_probabilities_agree_and_hug_one_half(read: Callable[..., Encoder]) -> None:
    encoder = read()
    image, yes, no = encoder.encode_image(pixels(encoder)), *map(encoder.encode_text, (prompts("{}"), prompts("no {}")))
    ours = make["probabilities"](image, yes, no)
    assert error(ours, EXPECTED["probabilities"]) <= TOLERANCE
    scaled = make["probabilities"](image, yes, no, encoder.logit_scale)
    assert error(scaled, EXPECTED["probabilities"]) > 1e-2
    assert float((ours - 0.5).abs().max()) < float((scaled - 0.5).abs().max())


@pytest.mark.parametrize("trap", ["openai", "rounded", "bicubic", "antialias", "corner", "unit_range"])
def test_each_trap_of_the_preprocessing_fails_the_tolerance(read: Callable[..., Encoder], trap: str) -> None:
    encoder = read()
    theirs = torch.stack([make["prepare"](p, trap) for p in make["pictures"]()])
    ours = pixels(encoder)
    assert float((ours - theirs).abs().max()) > 1e-2
    assert error(encoder.encode_image(ours), make["encode_image"](make["weights"](), theirs)) > 1e-3


def test_gelu_fails_the_tolerance(read: Callable[..., Encoder]) -> None:
    encoder = read(gelu=True)
    assert error(encoder.encode_image(pixels(encoder)), EXPECTED["image"]) > 1e-3
    assert error(encoder.encode_text(prompts("{}")), torch.tensor(EXPECTED["text"])[:2]) > 1e-3


def test_the_family_must_be_said(read: Callable[..., Encoder], tmp_path: Path) -> None:
    """Its keys and shapes are those of OpenAI's ViT-B/32."""
    read()
    (path,) = tmp_path.glob("*.pt")
    with pytest.raises(CheckpointError, match="bare state dict") as caught:
        load(path)
    assert "family" in str(caught.value.hint)


def test_other_files_are_refused(read: Callable[..., Encoder]) -> None:
    whole = make["weights"]()
    with pytest.raises(CheckpointError, match="surprise"):
        read({**whole, "surprise": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"visual\.proj"):
        read({k: v for k, v in whole.items() if k != "visual.proj"})
    read({**whole, "input_resolution": torch.tensor(64), "context_length": torch.tensor(77)})


def test_the_declaration() -> None:
    config = CATALOG.get("chexzero").config
    assert (config.image.activation, config.text.activation) == ("quick_gelu", "quick_gelu")
    assert config.projection.dim == 512
    assert config.preprocess.mean[0] * 255 == pytest.approx(101.48761)
    assert config.preprocess.std[0] * 255 == pytest.approx(83.43944)
    assert config.preprocess.digest != CATALOG.get("openai/ViT-B-32").config.preprocess.digest
