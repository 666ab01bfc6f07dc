"""`chiasm classify` and `chiasm export --vision-only`: what they print, and what they say to bad input."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.classifier import VisionClassifier, load_classifier, save_classifier
from chiasm.deploy.cost import example_input
from chiasm.deploy.onnx import write_onnx
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig
from chiasm.encoders.heads import DistilledHeads, HeadsConfig
from chiasm.encoders.image_side import build_backbone
from chiasm.types import Preprocess

Run = Callable[..., Any]
CLASSES = ("benign", "in situ", "invasive", "normal")
FACTS = {
    "data": "drawn shapes",
    "balanced_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 30, "chance": 0.25},
    "note": "Its labels were made noisy on purpose.",
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = ImageTowerConfig(kind="resnet", image_size=32, width=8, layers=(1, 1), pool="mean")
    config = EncoderConfig(
        image=image, projection=ProjectionConfig(dim=8), preprocess=Preprocess(size=32), sides="image"
    )
    torch.manual_seed(0)
    heads = DistilledHeads(HeadsConfig(width=64, classes=4, text_dim=8))
    folder = tmp_path_factory.mktemp("runs") / "bach"
    save_classifier(
        folder / "model", heads, classes=CLASSES, tower=build_backbone(config), config=config, facts=FACTS,
        name="shapes", label="tissue",
    )  # fmt: skip
    return folder


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / "images" / f"{i}.png" for i in range(3)]
    paths[0].parent.mkdir()
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(path)
    return paths


def test_people_see_classes_quality_and_its_limits(chiasm: Run, run_folder: Path, images: list[Path]) -> None:
    out = chiasm("classify", run_folder, *images, "--top", 2)
    lines = out.splitlines()
    assert lines[0].split() == ["image", "best", "second"]
    assert sum(line.strip().startswith(("0.png", "1.png", "2.png")) for line in lines) == 3
    assert "shapes: tissue, 4 classes, trained on drawn shapes" in out
    assert "balanced accuracy on its test images: 0.500 [0.400, 0.600] (n = 30), chance 0.250" in out
    assert "noisy on purpose" in out
    assert "not a medical device" in out
    assert "diagnos" not in out.lower()


def test_machines_get_everything(chiasm: Run, run_folder: Path, images: list[Path], tmp_path: Path) -> None:
    found = chiasm("classify", run_folder / "model", images[0].parent, "--json", "--csv", tmp_path / "out.csv")
    assert found["classes"] == list(CLASSES)
    assert found["facts"] == FACTS
    assert found["rejected"] == 0
    expected = load_classifier(run_folder).predict(images)
    for row, image in enumerate(found["images"]):
        np.testing.assert_allclose(image["probabilities"], expected.probabilities[row], atol=1e-6)
        assert image["top"][0]["class"] == image["best"] == expected.best[row]
        assert len(image["top"]) == 3
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["best"] for r in rows] == list(expected.best)
    assert float(rows[1]["probability_in situ"]) == pytest.approx(expected.probabilities[1, 1], abs=1e-6)


def test_a_table_of_images_is_classified(chiasm: Run, run_folder: Path, images: list[Path]) -> None:
    table = images[0].parent / "t.csv"
    table.write_text("id,image,split\n" + "".join(f"s{i},{p.name},{'ab'[i % 2]}\n" for i, p in enumerate(images)))
    found = chiasm("classify", run_folder, "--table", table, "--split", "a", "--json")
    assert [i["id"] for i in found["images"]] == ["s0", "s2"]


def test_unreadable_images_are_counted_and_only_all_of_them_are_fatal(
    chiasm: Run, run_folder: Path, images: list[Path]
) -> None:
    images[1].write_bytes(b"no image")
    found = chiasm("classify", run_folder, *images, "--json")
    assert found["rejected"] == 1
    assert sum(found["reasons"].values()) == 1
    assert len(found["images"]) == 2
    out = chiasm("classify", run_folder, images[1], code=1)
    assert "none of 1 images can be read" in out
    assert "hint:" in out
    assert str(images[1].parent) not in out


def test_a_classifier_without_facts_says_so(chiasm: Run, run_folder: Path, images: list[Path], tmp_path: Path) -> None:
    plain = load_classifier(run_folder)
    save_classifier(tmp_path / "plain", plain.heads, classes=CLASSES, tower=plain.tower, config=plain.config)
    assert "was not recorded" in chiasm("classify", tmp_path / "plain", images[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give images or a table"),
        (("absent.png",), "image `absent.png` does not exist"),
        (("--onnx", "IMAGE"), "holds no `model.onnx`"),
        (("--device", "warp", "IMAGE"), "unknown device `warp`"),
    ],
)
def test_bad_input_has_an_error_and_a_hint(
    chiasm: Run, run_folder: Path, images: list[Path], words: tuple[str, ...], message: str
) -> None:
    out = chiasm("classify", run_folder, *(images[0] if w == "IMAGE" else w for w in words), code=1)
    assert message in out
    assert "hint:" in out


def test_what_is_no_classifier_is_told(chiasm: Run, model_dir: Path, images: list[Path], tmp_path: Path) -> None:
    assert "holds an encoder, not a classifier" in chiasm("classify", model_dir, images[0], code=1)
    assert "`absent` does not exist" in chiasm("classify", tmp_path / "absent", images[0], code=1)
    heads = DistilledHeads(HeadsConfig(width=5, classes=2, text_dim=4))
    save_classifier(tmp_path / "features", heads, classes=("a", "b"))
    assert "trained on features and knows no image" in chiasm("classify", tmp_path / "features", images[0], code=1)
    chiasm("classify", code=2)
    chiasm("classify", model_dir, images[0], "--top", 0, code=2)


@pytest.mark.slow
def test_onnx_gives_the_same(chiasm: Run, run_folder: Path, images: list[Path], tmp_path: Path) -> None:
    plain = load_classifier(run_folder)
    folder = save_classifier(tmp_path / "graph", plain.heads, classes=CLASSES, tower=plain.tower, config=plain.config)
    write_onnx(plain, folder, example=example_input(plain, 2))
    by_torch, by_graph = (chiasm("classify", folder, *images, "--json", *w) for w in ((), ("--onnx",)))
    for one, other in zip(by_torch["images"], by_graph["images"], strict=True):
        np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=1e-5)
        assert one["best"] == other["best"]


def test_export_vision_only_writes_what_classify_reads(
    chiasm: Run, run_folder: Path, images: list[Path], tmp_path: Path
) -> None:
    out = chiasm("export", run_folder, "--vision-only", tmp_path / "small", "--no-onnx")
    assert "shapes is in" in out
    assert "text packages and modules blocked" in out
    assert "counted and formula agree" in out
    before, after = (chiasm("classify", f, *images, "--json") for f in (run_folder, tmp_path / "small"))
    for one, other in zip(before["images"], after["images"], strict=True):
        np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=1e-5)
    assert before["facts"] == after["facts"]
    assert "not empty" in chiasm("export", run_folder, "--vision-only", tmp_path / "small", code=1)


def test_export_asks_for_one_form_or_the_other(chiasm: Run, run_folder: Path, model_dir: Path, tmp_path: Path) -> None:
    chiasm("export", model_dir, code=2)
    chiasm("export", model_dir, "--to", "chiasm", code=2)
    chiasm("export", run_folder, "--vision-only", tmp_path / "a", "--to", "chiasm", code=2)
    chiasm("export", run_folder, "--vision-only", tmp_path / "a", "--out", tmp_path / "b", code=2)
    assert "holds an encoder" in chiasm("export", model_dir, "--vision-only", tmp_path / "a", code=1)
    assert not list(tmp_path.iterdir())


def test_a_tower_of_code_needs_permission(
    chiasm: Run, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_tower.py").write_text(
        "import torch\n"
        "class Mean(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.mix = torch.nn.Linear(3, 6)\n"
        "    def forward(self, pixels):\n"
        "        return self.mix(pixels.mean((2, 3)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    image = ImageTowerConfig(kind="python", source="their_tower:Mean", image_size=16)
    config = EncoderConfig(
        image=image, projection=ProjectionConfig(dim=6), preprocess=Preprocess(size=16), sides="image"
    )
    heads = DistilledHeads(HeadsConfig(width=6, classes=2, text_dim=4))
    made = VisionClassifier(build_backbone(config, allow_code=True), heads, classes=("a", "b"), config=config)
    save_classifier(tmp_path / "c", heads, classes=made.classes, tower=made.tower, config=replace(config))
    refused = chiasm("classify", tmp_path / "c", images[0], code=1)
    assert "not run without permission" in refused
    found = chiasm("classify", tmp_path / "c", images[0], "--allow-code", "--json")
    assert len(found["images"]) == 1
