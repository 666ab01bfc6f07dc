"""An export is the same classifier, smaller, without text, all or nothing; and what its proof says is so."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chiasm import export_vision
from chiasm.classifier import VisionClassifier, load_classifier
from chiasm.deploy.cost import example_input
from chiasm.encoders.adapters import has_lora, merge_lora
from chiasm.encoders.base import ImageTowerConfig, LoraConfig
from chiasm.encoders.fold import FoldedHeads
from chiasm.encoders.heads import DistilledHeads, HeadsConfig
from chiasm.errors import CheckpointError, InputError
from chiasm.export_vision import TOLERANCE, VisionExport, export_vision_only

Make = Callable[..., VisionClassifier]
Save = Callable[[VisionClassifier, Path], Path]


def test_an_export_gives_the_training_models_logits(run_folder: Path, exported: VisionExport) -> None:
    trained, small = load_classifier(run_folder), load_classifier(exported.directory)
    assert trained.tower is not None
    assert small.tower is not None
    assert has_lora(trained.tower)
    assert not has_lora(small.tower)
    assert isinstance(small.heads, FoldedHeads)
    inputs = example_input(trained, 6, seed=9)
    wanted = trained.logits(inputs)
    assert (small.logits(inputs) - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))
    assert (small.classes, small.label, small.temperature, small.facts) == (
        trained.classes, trained.label, trained.temperature, trained.facts
    )  # fmt: skip
    np.testing.assert_allclose(small.probabilities(inputs), trained.probabilities(inputs), atol=1e-5)


def test_merged_adapters_are_unmerged_adapters(make: Make) -> None:
    classifier = make(lora=LoraConfig(rank=3, alpha=6))
    inputs = example_input(classifier, 4)
    apart = classifier.logits(inputs)
    assert classifier.tower is not None
    merge_lora(classifier.tower)
    together = classifier.logits(inputs)
    assert (apart - together).abs().max() <= TOLERANCE * max(1.0, float(apart.abs().max()))


def test_the_proof_says_what_was_measured(exported: VisionExport) -> None:
    proof = json.loads((exported.directory / "PROOF.json").read_text())
    assert exported.agrees
    assert exported.needs_no_text
    assert proof["agreement"]["agrees"] is True
    assert proof["agreement"]["torch"] == exported.difference <= TOLERANCE
    assert proof["agreement"]["training_model_one_by_one"] == exported.rounding <= TOLERANCE
    assert proof["agreement"]["onnx"] == exported.onnx_difference <= TOLERANCE
    assert proof["cost"]["agrees"] is True
    assert proof["cost"]["parameters"] - proof["cost"]["unimodal_parameters"] == proof["cost"]["formula_parameters"]
    assert proof["text"]["torch"]["passed"] is proof["text"]["onnx"]["passed"] is True
    assert proof["text"]["torch"]["asked_for"] == []
    assert "transformers" in proof["text"]["torch"]["blocked"]
    assert proof["text"]["tensors"]["other"] == 0
    assert proof["not_folded"] == list(exported.kept)
    assert "fixed length" in exported.kept[0]
    found = sum(t.numel() for t in load_file(exported.directory / "model.safetensors").values())
    assert found == proof["cost"]["exported_parameters"]
    text = "\n".join(exported.sentences())
    assert "not folded" in text
    assert "ONNX: loads and predicts" in text
    assert text in (exported.directory / "README.txt").read_text()


def test_nothing_of_a_text_is_in_the_folder(exported: VisionExport) -> None:
    """No text tower, no targets, no tokenizer, no recipe: and no argument that could take a text."""
    assert sorted(p.name for p in exported.directory.iterdir()) == [
        "PROOF.json", "README.txt", "classifier.json", "model.onnx", "model.safetensors", "onnx.json",
    ]  # fmt: skip
    names = load_file(exported.directory / "model.safetensors")
    assert {n.partition(".")[0] for n in names} == {"tower", "heads"}
    for word in ("token_embedding", "text_projection", "lora_", "logit_scale", "distill", "target"):
        assert not any(word in name for name in names), word
    described = json.loads((exported.directory / "classifier.json").read_text())["config"]
    assert set(described["tower"]) == {"image", "projection", "preprocess", "sides"}
    for method in (VisionClassifier.forward, VisionClassifier.logits, VisionClassifier.probabilities):
        assert list(inspect.signature(method).parameters) == ["self", "inputs"]
    assert "text" not in inspect.signature(VisionClassifier.predict).parameters


def test_without_a_fixed_length_everything_folds(make: Make, save_run: Save, tmp_path: Path) -> None:
    run = save_run(make(text_length=None), tmp_path / "run")
    export = export_vision_only(run, tmp_path / "out", onnx=False)
    assert export.kept == ()
    assert export.onnx_difference is None
    assert export.onnx_text_free is None
    assert export.agrees
    assert export.cost.exported_parameters < export.cost.parameters
    assert sorted(export.files) == ["PROOF.json", "README.txt", "classifier.json", "model.safetensors"]


@pytest.mark.slow
def test_a_tower_of_transformers_says_that_its_torch_form_needs_a_text_package(
    make: Make, save_run: Save, tmp_path: Path
) -> None:
    config = {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    image = ImageTowerConfig(kind="huggingface", source="c", image_size=32, pool="mean", options={"config": config})
    export = export_vision_only(save_run(make(image), tmp_path / "run"), tmp_path / "out")
    assert not export.text_free.passed
    assert "transformers" in export.text_free.asked_for
    assert export.onnx_text_free is not None
    assert export.onnx_text_free.passed
    assert export.needs_no_text
    assert any("does NOT load without text packages" in s for s in export.sentences())


def test_a_classifier_of_features_is_exported_too(save_run: Save, tmp_path: Path) -> None:
    heads = DistilledHeads(HeadsConfig(width=6, classes=2, text_dim=5))
    run = save_run(VisionClassifier(None, heads, classes=("a", "b")), tmp_path / "run")
    export = export_vision_only(run, tmp_path / "out", onnx=False)
    assert export.text_free.passed
    assert export.agrees
    assert export.proof["tower"] == "none"
    readme = (export.directory / "README.txt").read_text()
    assert "chiasm classify" not in readme, "it knows no image"
    assert "load_classifier" in readme


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    run_folder: Path, exported: VisionExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="is an export already"):
        export_vision_only(exported.directory, tmp_path / "twice", onnx=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        export_vision_only(run_folder, tmp_path / "full")
    with pytest.raises(CheckpointError, match="does not exist"):
        export_vision_only(tmp_path / "absent", tmp_path / "out")
    monkeypatch.setattr(export_vision, "fold_heads", _crooked)
    with pytest.raises(CheckpointError, match="gives other logits than the training model"):
        export_vision_only(run_folder, tmp_path / "out", onnx=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]  # nothing half-made was left behind


def _crooked(heads: DistilledHeads) -> FoldedHeads:
    """Heads folded through the normalisation, which is not exact."""
    from dataclasses import replace

    from chiasm.encoders.fold import fold_heads

    wrong = DistilledHeads(replace(heads.config, text_length=None)).eval()
    wrong.load_state_dict(heads.state_dict())
    return fold_heads(wrong)


@pytest.mark.slow
def test_a_kill_leaves_no_folder_that_looks_whole(run_folder: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys; from chiasm import export_vision as e\n"
        "e.prove_text_free = lambda *a, **k: os._exit(9)\n"
        f"e.export_vision_only({str(run_folder)!r}, {str(tmp_path / 'out')!r}, onnx=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), check=False)
    assert done.returncode == 9
    assert not (tmp_path / "out").exists()
    export = export_vision_only(run_folder, tmp_path / "out", onnx=False)  # and the same command works again
    assert export.agrees
    assert torch.is_tensor(load_classifier(tmp_path / "out").logits(example_input(load_classifier(run_folder), 1)))
