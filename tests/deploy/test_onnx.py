"""The graph gives the classifier's logits for any batch, whatever the tower."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.classifier import VisionClassifier, load_classifier
from chiasm.deploy import onnx as graphs
from chiasm.deploy.cost import example_input
from chiasm.deploy.onnx import OPSET, load_onnx, write_onnx
from chiasm.encoders.base import ImageTowerConfig
from chiasm.encoders.heads import DistilledHeads, HeadsConfig
from chiasm.errors import CheckpointError, InputError, MissingExtra
from chiasm.export_vision import VisionExport

SWIN = {
    "model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
    "window_size": 4,
}  # fmt: skip
#: A native ViT is in the export that all tests share, a ConvNeXt of transformers in `test_export_vision`.
TOWERS = {
    "clip resnet": ImageTowerConfig(kind="resnet", image_size=32, width=8, layers=(1, 1), heads=2),
    "classic resnet": ImageTowerConfig(
        kind="named", source="classic_resnet", image_size=32, options={"layers": (1, 1), "width": 8}
    ),
    "swin": ImageTowerConfig(kind="huggingface", source="s", image_size=64, pool="mean", options={"config": SWIN}),
    "efficientnet": ImageTowerConfig(
        kind="python",
        source="chiasm.encoders.pretrained_demo:efficientnet_lite0_levels",
        image_size=32,
        options={"pretrained": False},
    ),
}


def compare(classifier: VisionClassifier, folder: Path) -> None:
    graph = load_onnx(folder, threads=1)
    for batch in (1, 2, 5):
        inputs = example_input(classifier, batch, seed=batch)
        wanted = classifier.logits(inputs).numpy()
        limit = 1e-5 * max(1.0, float(np.abs(wanted).max()))
        assert np.abs(graph.logits(inputs.numpy()) - wanted).max() <= limit
        assert np.abs(graph.probabilities(inputs.numpy()) - classifier.probabilities(inputs)).max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TOWERS))
def test_every_kind_of_tower_becomes_a_graph(
    name: str, make: Callable[..., VisionClassifier], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if name == "efficientnet":
        pytest.importorskip("efficientnet_lite_pytorch")
    classifier = make(TOWERS[name])
    write_onnx(classifier, tmp_path, example=example_input(classifier, 2))
    assert capfd.readouterr() == ("", "")
    compare(classifier, tmp_path)


def test_features_become_a_graph(tmp_path: Path) -> None:
    heads = DistilledHeads(HeadsConfig(width=9, classes=2, text_dim=8)).eval()
    classifier = VisionClassifier(None, heads, classes=("a", "b"), temperature=3.0)
    write_onnx(classifier, tmp_path, example=example_input(classifier, 2))
    compare(classifier, tmp_path)
    with pytest.raises(InputError, match="knows no image"):
        load_onnx(tmp_path).predict([tmp_path / "a.png"])


def test_an_export_classifies_images_as_the_torch_form_does(exported: VisionExport, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    graph, classifier = load_onnx(exported.directory), load_classifier(exported.directory)
    compare(classifier, exported.directory)
    found, wanted = graph.predict(paths), classifier.predict(paths)
    assert found.ids == wanted.ids
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-5)
    assert (graph.classes, graph.label, graph.facts) == (classifier.classes, classifier.label, classifier.facts)
    with pytest.raises(InputError, match=r"takes \(batch, 3, 32, 32"):
        graph.logits(np.zeros((1, 3, 16, 16), np.float32))


def test_the_graph_states_what_it_is(exported: VisionExport) -> None:
    import onnx

    model = onnx.load(exported.directory / "model.onnx")
    onnx.checker.check_model(model)
    assert [o.version for o in model.opset_import if not o.domain] == [OPSET]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # a name, not a number: any batch
    assert [o.name for o in model.graph.output] == ["logits", "probabilities"]
    declared = json.loads((exported.directory / "onnx.json").read_text())
    assert declared["input"] == {"name": "pixels", "shape": ["batch", 3, 32, 32], "dtype": "float32"}
    assert declared["preprocess"]["size"] == 32


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.onnx", b"nonsense", "damaged or of a newer ONNX"),
        ("onnx.json", b"{}", "no declaration"),
        ("onnx.json", b'{"format": "chiasm-classifier-onnx", "version": 1}', "incomplete"),
        ("onnx.json", b"[", "not JSON"),
        ("model.onnx", None, "holds no `model.onnx`"),
    ],
)
def test_damaged_graphs_have_named_errors(
    exported: VisionExport, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    for name in ("model.onnx", "onnx.json"):
        (tmp_path / name).write_bytes((exported.directory / name).read_bytes())
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_onnx(tmp_path)


def test_an_absent_exporter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Any) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(MissingExtra, match=r"chiasm\[export\]"):
        write_onnx(make(), tmp_path, example=torch.zeros(2, 3, 32, 32))
    assert not list(tmp_path.iterdir())
