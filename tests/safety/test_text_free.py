"""An exported classifier loads and predicts where nothing that handles text can be imported, and no corpus is there."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.classifier import VisionClassifier, load_classifier, save_classifier
from chiasm.deploy.cost import example_input
from chiasm.deploy.text_free import BLOCKED, TextBlocker, prove_text_free
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig
from chiasm.encoders.fold import fold_heads
from chiasm.encoders.heads import DistilledHeads, HeadsConfig
from chiasm.encoders.image_side import build_backbone
from chiasm.types import Preprocess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = ImageTowerConfig(kind="vit", image_size=16, width=16, layers=1, heads=2, patch_size=8)
    config = EncoderConfig(
        image=image, projection=ProjectionConfig(dim=8), preprocess=Preprocess(size=16), sides="image"
    )
    torch.manual_seed(0)
    heads = DistilledHeads(HeadsConfig(width=16, classes=2, text_dim=6))
    out = tmp_path_factory.mktemp("text") / "export"
    save_classifier(out, fold_heads(heads), classes=("a", "b"), tower=build_backbone(config), config=config)
    return out


def test_it_predicts_the_same_without_text_packages(folder: Path) -> None:
    proof = prove_text_free(folder, batch=3, seed=5)["torch"]
    assert proof.passed, proof.problem
    assert proof.asked_for == ()
    classifier = load_classifier(folder)
    wanted = classifier.logits(example_input(classifier, 3, seed=5)).double().numpy()
    assert proof.logits is not None
    assert np.abs(proof.logits - wanted).max() <= 1e-5


def test_an_image_file_is_classified_in_an_empty_world(folder: Path, tmp_path: Path) -> None:
    """Another working folder, no home, no cache, and every text package blocked before chiasm is imported."""
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "a.png")
    script = (
        "import sys\n"
        "from chiasm.deploy.text_free import TextBlocker, BLOCKED\n"
        "TextBlocker().install()\n"
        "from chiasm.classifier import load_classifier\n"
        "found = load_classifier(sys.argv[1]).predict([sys.argv[2]])\n"
        "assert found.probabilities.shape == (1, 2)\n"
        "assert not [m for m in sys.modules for b in BLOCKED if m == b or m.startswith(b + '.')]\n"
        "assert not [m for m in sys.modules if m.startswith('chiasm.') and ('token' in m or 'text' in m.split('.')[-1])"
        " if m != 'chiasm.deploy.text_free']\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "CHIASM_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "a.png")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_blocker_really_blocks(folder: Path, tmp_path: Path) -> None:
    """What needs a text package fails there: the proof can fail."""
    blocker = TextBlocker(["chiasm_blocked_example", "chiasm.data.wordpiece"])
    sys.meta_path.insert(0, blocker)
    try:
        with pytest.raises(ImportError, match="needs no text"):
            importlib.import_module("chiasm_blocked_example.inner")
        assert blocker.asked_for == {"chiasm_blocked_example"}
    finally:
        sys.meta_path.remove(blocker)
    config = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 8, "image_size": 16, "patch_size": 8}  # fmt: skip
    image = ImageTowerConfig(kind="huggingface", source="v", image_size=16, pool="mean", options={"config": config})
    encoder = EncoderConfig(
        image=image, projection=ProjectionConfig(dim=8), preprocess=Preprocess(size=16), sides="image"
    )
    heads = DistilledHeads(HeadsConfig(width=8, classes=2, text_dim=4))
    save_classifier(tmp_path, heads, classes=("a", "b"), tower=build_backbone(encoder), config=encoder)
    proof = prove_text_free(tmp_path, batch=2, seed=0)["torch"]
    assert not proof.passed
    assert "transformers" in proof.asked_for
    assert "transformers" in proof.problem


def test_blocking_too_late_is_refused() -> None:
    with pytest.raises(RuntimeError, match="imported already"):
        TextBlocker(["json"]).install()


def test_another_text_cannot_change_the_logits(tmp_path: Path) -> None:
    """The same weights after training on other targets: at test time there is nowhere to put a text."""
    torch.manual_seed(1)
    heads = DistilledHeads(HeadsConfig(width=5, classes=2, text_dim=4)).eval()
    classifier = VisionClassifier(None, heads, classes=("a", "b"))
    features = torch.randn(4, 5)
    before = classifier.logits(features)
    for texts in (torch.randn(4, 4), torch.zeros(4, 4)):  # the targets a training step would have seen
        with pytest.raises(TypeError):
            classifier(features, texts)
        assert torch.equal(classifier.logits(features), before)


def test_every_blocked_module_of_ours_exists() -> None:
    """A renamed module would silently no longer be blocked."""
    root = Path(__file__).parents[2] / "src"
    for name in BLOCKED:
        if name.startswith("chiasm."):
            path = root / Path(*name.split("."))
            assert path.is_dir() or path.with_suffix(".py").is_file(), name
