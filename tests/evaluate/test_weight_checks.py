"""What the doctor says of weights before they are a model, and of vectors that were recorded once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chiasm.checkpoints.huggingface import to_huggingface
from chiasm.encoders.base import Encoder, EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import CheckpointError
from chiasm.evaluate.doctor import Check, examine_model
from chiasm.evaluate.self_test import check_self_test, record_path
from chiasm.evaluate.weight_checks import check_weights, fit_of, fitting_entries
from chiasm.load import load, save_encoder
from chiasm.testing import TinyEncoder, save_openai_archive
from chiasm.types import Preprocess


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The smallest CLIP in OpenAI's layout, all numbers moved away from zero."""
    config = EncoderConfig(
        image=ImageTowerConfig(image_size=32, width=64, layers=1, patch_size=16),
        text=TextTowerConfig(width=64, layers=1),
        projection=ProjectionConfig(dim=16),
        preprocess=Preprocess(size=32),
    )
    found = build_encoder_model(config, seed=0).state_dict()
    torch.manual_seed(0)
    return {k: v + 0.02 * torch.randn_like(v) if v.ndim else v for k, v in found.items()}


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {c.name: c for c in checks}


def on_meta(name: str) -> dict[str, Tensor]:
    return build_encoder_model(CATALOG.get(name).config, device="meta", draw=False).state_dict()


def test_keys_cannot_tell_families_apart() -> None:
    found = fitting_entries(on_meta("openai/ViT-B-32"))
    assert {"openai/ViT-B-32", "quiltnet-b-32"} <= set(found)
    assert "openai/ViT-B-16" not in found
    assert {"openai/ViT-L-14"} <= set(fitting_entries(on_meta("openai/ViT-L-14"))) - {"openai/ViT-L-14-336px"}


def test_what_is_missing_and_what_is_too_much_is_counted_and_named() -> None:
    tensors = on_meta("openai/ViT-B-32")
    del tensors["visual.ln_post.weight"], tensors["text_projection"]
    tensors["extra.weight"] = torch.empty(2, device="meta")
    tensors["visual.proj"] = torch.empty(768, 256, device="meta")
    fit = fit_of(CATALOG.get("openai/ViT-B-32"), tensors)
    assert fit is not None
    assert fit.missing == ("text_projection", "visual.ln_post.weight")
    assert fit.unexpected == ("extra.weight",)
    assert fit.shapes == ("visual.proj",)
    assert "2 missing: `text_projection`" in str(fit)
    assert not fit.is_exact
    assert fit_of(CATALOG.get("uni"), tensors) is None  # another layout


def test_a_folder_of_chiasm_passes_and_is_recorded(tmp_path: Path, home: Path) -> None:
    save_encoder(TinyEncoder(0), tmp_path / "model")
    found = by_name(examine_model(tmp_path / "model", precision="int8"))
    assert "phantoms" in found.pop("int8").detail
    assert {c.state for c in found.values()} == {"ok"}, found
    assert "safetensors" in found["container"].detail
    assert "encoder.json" in found["family"].detail
    assert "recorded" in found["self-test"].detail
    (record,) = (home / "selftest").iterdir()
    assert record.stem == TinyEncoder(0).space.weights
    again = by_name(examine_model(tmp_path / "model"))["self-test"]
    assert again.state == "ok"
    assert float(again.detail.split()[0]) < 1e-6  # seven digits are kept


def test_a_bare_file_must_be_told_whose_it_is(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "bare.pt")
    checks = by_name(examine_model(tmp_path / "bare.pt"))
    assert checks["container"].detail.startswith("PyTorch's zip archive: ")
    assert checks["number types"].detail.startswith(f"{len(state)} float16")
    assert checks["key layout"].detail.startswith("openai")
    assert checks["family"].state == "wrong"
    assert "--family" in str(checks["family"].hint)
    assert checks["load"].state == "wrong"
    told = by_name(examine_model(tmp_path / "bare.pt", family="openai"))
    assert told["family"].state == "ok"
    assert "quick_gelu" in told["family"].detail
    assert told["self-test"].state == "ok"


def test_the_wrong_activation_is_caught_by_the_recorded_vectors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """The negative test: the same file under another family loads, but is not what was recorded."""
    torch.save(state, tmp_path / "bare.pt")
    assert by_name(examine_model(tmp_path / "bare.pt", family="openai"))["self-test"].state == "ok"
    wrong = by_name(examine_model(tmp_path / "bare.pt", family="open_clip"))["self-test"]
    assert wrong.state == "wrong"
    assert float(wrong.detail.split()[0]) >= 10 * 1e-4
    assert "activation quick_gelu (image), quick_gelu (text) then" in str(wrong.hint)
    assert by_name(examine_model(tmp_path / "bare.pt", family="openai"))["self-test"].state == "ok"


@pytest.mark.parametrize("field", ["interpolation", "mean"])
def test_other_preprocessing_is_caught(state: dict[str, Tensor], tmp_path: Path, field: str) -> None:
    torch.save(state, tmp_path / "bare.pt")
    encoder = load(tmp_path / "bare.pt", family="openai")
    assert check_self_test(encoder, verified=True).state == "ok"
    changed = {"interpolation": "bilinear", "mean": (0.5, 0.5, 0.5)}[field]
    other = load(tmp_path / "bare.pt", family="openai")
    other.config = replace(other.config, preprocess=replace(other.config.preprocess, **{field: changed}))
    found = check_self_test(other, verified=True)
    assert found.state == "wrong"
    assert "preprocessing" in str(found.hint)


def test_only_what_passed_is_recorded(home: Path) -> None:
    encoder = TinyEncoder(0)
    assert check_self_test(encoder, verified=False).state == "note"
    assert not record_path(encoder).exists()
    with torch.no_grad():
        encoder.model.visual.proj.fill_(float("nan"))
    assert check_self_test(encoder, verified=True).state == "note"
    assert not record_path(encoder).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"vectors": {"images": ["x"]}}', '{"version": 99}'])
def test_a_damaged_record_is_a_note(content: str) -> None:
    encoder = TinyEncoder(0)
    record_path(encoder).parent.mkdir(parents=True)
    record_path(encoder).write_text(content)
    found = check_self_test(encoder, verified=True)
    assert found.state == "note"
    assert "damaged" in found.detail
    assert record_path(encoder).read_text() == content


def test_a_record_of_another_model_is_wrong() -> None:
    encoder = TinyEncoder(0)
    check_self_test(encoder, verified=True)
    value = json.loads(record_path(encoder).read_text())
    assert set(value["vectors"]) == {"images", "texts"}
    assert np.shape(value["vectors"]["images"]) == (3, encoder.dim)
    value["vectors"]["images"] = [[1.0]]
    record_path(encoder).write_text(json.dumps(value))
    assert "another shape" in check_self_test(encoder, verified=True).detail


def test_damaged_numbers_and_matrices_of_zeros(tmp_path: Path, state: dict[str, Tensor]) -> None:
    bad = dict(state)
    bad["visual.proj"] = torch.full_like(bad["visual.proj"], float("nan"))
    torch.save(bad, tmp_path / "nan.pt")
    found = by_name(check_weights(tmp_path / "nan.pt", family="openai"))["weights"]
    assert (found.state, "`visual.proj`" in found.detail) == ("wrong", True)
    bad["visual.proj"] = torch.zeros_like(bad["visual.proj"])
    torch.save(bad, tmp_path / "zero.pt")
    assert by_name(check_weights(tmp_path / "zero.pt", family="openai"))["weights"].state == "note"


def test_what_lies_in_the_working_folder_is_not_looked_at(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state, tmp_path / "other.pt")
    monkeypatch.chdir(tmp_path)
    for model in ("absent.pt", "~nobody-of-that-name/x", "a\0b"):
        assert check_weights(model) == []
    assert check_weights("plip", pretrained="absent") == []


def test_members_of_an_ensemble_are_looked_at_one_by_one(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "a.pt")
    torch.save({k: v * 1.01 if v.ndim else v for k, v in state.items()}, tmp_path / "b.pt")
    members = [tmp_path / "a.pt", tmp_path / "b.pt"]
    found = by_name(examine_model(members, family="openai"))
    assert {c.state for c in found.values() if c.name != "near copies"} == {"ok"}, found
    torch.save(state | {"visual.proj": state["visual.proj"] * float("nan")}, tmp_path / "b.pt")
    found = by_name(examine_model(members, family="openai"))
    assert found["weights"].state == "ok"
    assert found["weights of `b.pt`"].state == "wrong"


@pytest.mark.parametrize("sides", ["image", "text"])
def test_a_backbone_passes_too(tmp_path: Path, sides: Literal["image", "text"]) -> None:
    """Without the other side there are neither its vectors nor a scale, and nothing is missed."""
    config = EncoderConfig(
        image=ImageTowerConfig(image_size=32, width=64, layers=1, patch_size=16),
        text=TextTowerConfig(width=64, layers=1),
        projection=ProjectionConfig(dim=64, image="none", text="none"),
        preprocess=Preprocess(size=32),
        sides=sides,
        scale="none",
    )
    save_encoder(Encoder(build_encoder_model(config, seed=0), config, name="backbone"), tmp_path / "model")
    found = by_name(examine_model(tmp_path / "model"))
    assert {c.state for c in found.values() if c.name != "near copies"} == {"ok"}, found
    assert ("spread of texts" in found, "preprocessing" in found) == (sides == "text", sides == "image")
    assert "without one" in found["logit scale"].detail
    vectors = json.loads(next((tmp_path / "home" / "selftest").iterdir()).read_text())["vectors"]
    assert set(vectors) == {f"{sides}s"}


def test_weights_of_another_model_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "tiny.pt")
    checks = by_name(examine_model(tmp_path / "tiny.pt", family="openai/ViT-B-32"))
    assert checks["keys"].state == "wrong"
    assert "missing" in checks["keys"].detail
    assert checks["load"].state == "wrong"
    by_path = by_name(examine_model("openai/ViT-B-32", pretrained=tmp_path / "tiny.pt"))
    assert by_path["keys"].state == "wrong"


def test_other_containers_and_layouts_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_openai_archive(state, tmp_path / "script.pt")
    checks = by_name(check_weights(tmp_path / "script.pt"))
    assert "TorchScript" in checks["container"].detail
    assert "OpenAI" in checks["family"].detail
    torch.save(to_huggingface(state), tmp_path / "theirs.bin", _use_new_zipfile_serialization=False)
    checks = by_name(check_weights(tmp_path / "theirs.bin", family="openai"))
    assert "older stream" in checks["container"].detail
    assert "CLIPModel" in checks["key layout"].detail
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    checks = by_name(check_weights(tmp_path / "linear.pt"))
    assert checks["key layout"].state == "note"
    assert "fit no model" in checks["family"].detail
    with pytest.raises(CheckpointError, match="does not exist"):
        examine_model(tmp_path / "absent.pt")
