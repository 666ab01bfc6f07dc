"""A small trained classifier with adapters, and its export, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chiasm.classifier import VisionClassifier, save_classifier
from chiasm.encoders.adapters import apply_lora
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, LoraConfig, ProjectionConfig
from chiasm.encoders.heads import DistilledHeads, HeadsConfig
from chiasm.encoders.image_side import build_backbone
from chiasm.export_vision import VisionExport, export_vision_only
from chiasm.types import Preprocess

CLASSES = ("benign", "in situ", "invasive")
FACTS = {
    "data": "drawn shapes",
    "balanced_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 30, "chance": 1 / 3},
    "note": "Its labels were made noisy on purpose.",
}
VIT = ImageTowerConfig(kind="vit", image_size=32, width=32, layers=2, heads=2, patch_size=8)


def make_classifier(
    image: ImageTowerConfig = VIT, *, lora: LoraConfig | None = None, seed: int = 0, **heads: Any
) -> VisionClassifier:
    """A classifier as a run leaves it: drawn weights, adapters apart, statistics of features in the heads."""
    config = EncoderConfig(
        image=image, projection=ProjectionConfig(dim=24), preprocess=Preprocess(size=image.image_size), sides="image"
    )
    tower = build_backbone(config, seed=seed).eval()
    torch.manual_seed(seed)
    if lora is not None:
        apply_lora(tower, lora)
        config = replace(config, image=replace(image, lora=lora))
        for name, parameter in tower.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    width = int(tower.output_dim)
    head = DistilledHeads(HeadsConfig(**{"width": width, "classes": 3, "text_dim": 48, **heads}))
    head.norm.fit(torch.randn(60, width) + 1)
    return VisionClassifier(
        tower, head, classes=CLASSES, config=config, label="tissue", temperature=1.5, facts=FACTS, name="small"
    ).eval()


def save(classifier: VisionClassifier, folder: Path) -> Path:
    """Write it as a run does, into ``model/``."""
    save_classifier(
        folder / "model", classifier.heads, classes=classifier.classes, tower=classifier.tower,
        config=classifier.config, label=classifier.label, temperature=classifier.temperature, facts=classifier.facts,
        name=classifier.name, recipe='name = "small"\n',
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def make() -> Callable[..., VisionClassifier]:
    return make_classifier


@pytest.fixture(scope="session")
def save_run() -> Callable[[VisionClassifier, Path], Path]:
    return save


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_classifier(lora=LoraConfig(rank=2, alpha=4)), tmp_path_factory.mktemp("distill") / "run")


@pytest.fixture(scope="session")
def exported(run_folder: Path) -> VisionExport:
    return export_vision_only(run_folder, run_folder.parent / "export")
