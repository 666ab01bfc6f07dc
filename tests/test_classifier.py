"""A vision classifier is the same before and after the disk, refuses what does not fit, and runs nothing from a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chiasm.checkpoints import native
from chiasm.classifier import VisionClassifier, find_classifier, is_classifier, load_classifier, save_classifier
from chiasm.encoders.adapters import apply_lora
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, LoraConfig, ProjectionConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.fold import fold_heads
from chiasm.encoders.heads import DistilledHeads, HeadsConfig
from chiasm.encoders.image_side import build_backbone
from chiasm.errors import CheckpointError, ConfigError, InputError
from chiasm.io.manifest import RejectLog
from chiasm.types import Preprocess

CLASSES = ("benign", "tumour")
SIDE = 16
VIT = ImageTowerConfig(kind="vit", image_size=SIDE, width=16, layers=1, heads=2, patch_size=8)


def encoder(image: ImageTowerConfig = VIT, dim: int = 12, **projection: Any) -> EncoderConfig:
    return EncoderConfig(
        image=image,
        projection=ProjectionConfig(dim=dim, **projection),
        preprocess=Preprocess(size=image.image_size),
        sides="image",
    )


def heads(width: int = 16, **options: Any) -> DistilledHeads:
    torch.manual_seed(3)
    made = DistilledHeads(HeadsConfig(width=width, classes=2, text_dim=10, **options))
    if options.get("standardize", True):
        made.norm.fit(torch.randn(50, width) * 2 + 1)
    return made.eval()


def pixels(n: int = 3) -> Tensor:
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = encoder()
    save_classifier(
        tmp_path / "c", heads(), classes=CLASSES, tower=build_backbone(config), config=config, label="tissue"
    )
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("config", "projected", "width"),
    [
        (encoder(), False, 16),
        (encoder(), True, 12),
        (encoder(replace(VIT, pool="mean", registers=2, layer_scale=True, pre_norm=False)), False, 16),
        (encoder(replace(VIT, class_token=False, pool="map", activation="gelu_tanh")), False, 16),
        (encoder(ImageTowerConfig(kind="resnet", image_size=32, width=8, layers=(1, 1), pool="mean")), False, 64),
        (encoder(ImageTowerConfig(kind="resnet", image_size=32, width=8, layers=(1, 1), pool="mean")), True, 12),
    ],
    ids=["vit", "vit projected", "dino-like", "siglip-like", "resnet", "resnet projected"],
)
def test_a_classifier_comes_back_bit_by_bit(tmp_path: Path, config: EncoderConfig, projected: bool, width: int) -> None:
    tower = build_backbone(config, projected=projected, seed=4).eval()
    made = VisionClassifier(tower, heads(width), classes=CLASSES, config=config, projected=projected)
    save_classifier(
        tmp_path / "run" / "model", made.heads, classes=CLASSES, tower=tower, config=config, projected=projected,
        label="tissue", temperature=1.7, facts={"data": "made up", "bad": float("nan")}, name="mine",
    )  # fmt: skip
    again = load_classifier(tmp_path / "run")
    x = torch.randn(3, 3, config.image.image_size, config.image.image_size)
    assert torch.equal(again.logits(x), made.logits(x))
    assert (again.classes, again.label, again.temperature, again.name) == (CLASSES, "tissue", 1.7, "mine")
    assert again.facts == {"data": "made up", "bad": None}
    assert again.config is not None
    assert not again.config.has_text
    expected = (made.logits(x).double() / 1.7).softmax(1).numpy()
    np.testing.assert_allclose(again.probabilities(x), expected)
    described = (tmp_path / "run" / "model" / "classifier.json").read_text()
    assert "tokenizer" not in described
    assert "context_length" not in described


def test_the_image_side_of_a_whole_encoder_is_taken(tmp_path: Path) -> None:
    config = replace(encoder(), sides="both")
    model = build_encoder_model(replace(config, text=replace(config.text, width=8, layers=1, heads=1, vocab_size=50)))
    save_classifier(tmp_path, heads(), classes=CLASSES, tower=model, config=model.config)
    found = load_file(tmp_path / "model.safetensors")
    assert {name.partition(".")[0] for name in found} == {"tower", "heads"}
    assert not any("token" in name or "text_projection" in name or name.endswith("tower.proj") for name in found)
    with torch.inference_mode():
        whole = model.eval().encode_image(pixels()) / 1  # the projection of what the classifier sees
        again = load_classifier(tmp_path)
        assert again.tower is not None
        torch.testing.assert_close(again.tower(pixels()) @ model.visual.proj, whole)


def test_adapters_stay_apart_until_they_are_merged(tmp_path: Path) -> None:
    config = encoder(replace(VIT, freeze=True))
    lora = LoraConfig(rank=2, alpha=4)
    tower = apply_lora(build_backbone(config), lora).eval()
    for name, parameter in tower.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    with pytest.raises(InputError, match="adapters that its configuration does not state"):
        save_classifier(tmp_path, heads(), classes=CLASSES, tower=tower, config=config)
    config = replace(config, image=replace(config.image, lora=lora))
    save_classifier(tmp_path, heads(), classes=CLASSES, tower=tower, config=config)
    again = load_classifier(tmp_path)
    assert any("lora_" in name for name in again.state_dict())
    made = VisionClassifier(tower, heads(), classes=CLASSES, config=config)
    assert torch.equal(again.logits(pixels()), made.logits(pixels()))


def test_a_classifier_of_features_needs_no_image(tmp_path: Path) -> None:
    save_classifier(tmp_path, heads(width=7), classes=CLASSES)
    again = load_classifier(tmp_path)
    assert again.preprocess is None
    features = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    found = again.predict(features)
    assert found.probabilities.shape == (5, 2)
    assert set(found.best) <= set(CLASSES)
    np.testing.assert_allclose(found.probabilities, again.probabilities(features))
    with pytest.raises(InputError, match="knows no image"):
        again.predict([tmp_path / "a.png"])
    with pytest.raises(InputError, match=r"shape \(5, 6\)"):
        again.predict(features[:, :6])


def test_folded_heads_are_stored_folded(tmp_path: Path) -> None:
    config = encoder()
    tower = build_backbone(config).eval()
    folded = fold_heads(heads(text_length=None))
    save_classifier(tmp_path, folded, classes=CLASSES, tower=tower, config=config)
    assert "folded" in json.loads((tmp_path / "classifier.json").read_text())["config"]
    whole = VisionClassifier(tower, heads(text_length=None), classes=CLASSES, config=config)
    torch.testing.assert_close(load_classifier(tmp_path).logits(pixels()), whole.logits(pixels()), rtol=0, atol=1e-5)


def test_images_are_read_in_order_and_bad_ones_are_counted(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(paths[-1])
    classifier = load_classifier(folder)
    whole = classifier.predict(paths, batch_size=2)
    assert whole.ids == tuple(str(p) for p in paths)
    assert np.allclose(whole.probabilities.sum(1), 1)
    one = classifier.predict([Image.open(paths[3])])
    np.testing.assert_allclose(one.probabilities[0], whole.probabilities[3], atol=1e-6)
    paths[2].write_bytes(b"no image")
    with pytest.raises(InputError, match="row 2"):
        classifier.predict(paths)
    rejects = RejectLog()
    kept = classifier.predict(paths, rejects=rejects)
    assert len(kept) == 4
    assert len(rejects) == 1
    np.testing.assert_allclose(kept.probabilities, whole.probabilities[[0, 1, 3, 4]], atol=1e-6)
    with pytest.raises(InputError, match="none of 1 images"):
        classifier.predict([paths[2]], rejects=RejectLog())
    with pytest.raises(InputError, match="takes images"):
        classifier.predict(np.zeros((2, 16)))


def test_what_does_not_fit_is_refused() -> None:
    config = encoder()
    tower = build_backbone(config)
    with pytest.raises(InputError, match="3 class names for 2 logits"):
        VisionClassifier(tower, heads(), classes=("a", "b", "c"), config=config)
    with pytest.raises(InputError, match="must be there once"):
        VisionClassifier(tower, heads(), classes=("a", "a"), config=config)
    with pytest.raises(InputError, match="gives 16 numbers an image, the heads take 12"):
        VisionClassifier(tower, heads(12), classes=CLASSES, config=config)
    with pytest.raises(InputError, match="belong together"):
        VisionClassifier(tower, heads(), classes=CLASSES)
    with pytest.raises(InputError, match="temperature"):
        VisionClassifier(tower, heads(), classes=CLASSES, config=config, temperature=0.0)


def edit(folder: Path, change: Any) -> None:
    file = folder / "classifier.json"
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format="chiasm-encoder"), "no description of a chiasm classifier"),
        (lambda v: v.update(version=99), "format version 99"),
        (lambda v: v.pop("weights"), "lacks the name"),
        (lambda v: v["weights"].update(sha256="0" * 64), "damaged or belongs to another"),
        (lambda v: v["config"].pop("heads"), "incomplete"),
        (lambda v: v["config"].pop("classes"), "incomplete"),
        (lambda v: v["config"].update(classes=["one"]), "1 class names"),
        (lambda v: v["config"].update(classes=7), "incomplete"),
        (lambda v: v["config"].update(temperature=-1.0), "temperature"),
        (lambda v: v["config"].update(temperature="x"), "incomplete"),
        (lambda v: v["config"].update(heads=[1]), "incomplete"),
        (lambda v: v["config"].update(tower=3), "incomplete"),
        (lambda v: v["config"].update(tower=None), "neither tower nor heads"),
        (lambda v: v["config"]["heads"].update(width=10**12), "do not fit"),
        (lambda v: v["config"]["heads"].update(text_dim=2**62), "sizes that cannot be|do not fit|impossible"),
        (lambda v: v["config"]["heads"].update(kind=1), "impossible configuration: unknown field"),
        (lambda v: v["config"].update(folded={"width": 16, "classes": 2, "vision": [2] * 10**4}), "no classifier"),
        (lambda v: v["config"]["tower"]["image"].update(layers=3000), "states 3000 layers"),
        (lambda v: v["config"]["tower"]["image"].update(width=32), "do not fit"),
        (lambda v: v["config"]["tower"]["image"].update(lora={"rank": 10**9}), "adapters of rank"),
        (lambda v: v["config"]["tower"]["image"].update(unknown=1), "impossible configuration"),
    ],
)  # fmt: skip
def test_contradicting_files_have_named_errors(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load_classifier(folder)
    assert str(folder.parent) not in str(caught.value)


def test_foreign_and_torn_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        load_classifier(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="lacks"):
        load_classifier(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["text.token_embedding.weight"] = torch.zeros(3, 3)
    save_file(tensors, weights)
    edit(folder, lambda v: v["weights"].update(sha256=native._sha256(weights)))
    with pytest.raises(CheckpointError, match="neither tower nor heads"):
        load_classifier(folder)


def test_code_that_a_file_names_is_not_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_tower.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    image = {"kind": "python", "source": "evil_tower:make", "image_size": SIDE}
    edit(folder, lambda v: v["config"]["tower"].update(image=image))
    with pytest.raises(ConfigError, match="not run without permission"):
        load_classifier(folder)


def test_writing_replaces_all_or_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_classifier(folder).logits(pixels())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "_write_text", full)
    with pytest.raises(CheckpointError, match="the classifier cannot be written"):
        save_classifier(folder, heads(width=4), classes=CLASSES)
    assert torch.equal(load_classifier(folder).logits(pixels()), before)


def test_where_a_classifier_is_looked_for(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "model")
    assert find_classifier(run) == find_classifier(run / "model") == run / "model"
    assert find_classifier(run / "model" / "classifier.json") == run / "model"
    assert is_classifier(run)
    assert not is_classifier(tmp_path)
    with pytest.raises(CheckpointError, match="holds no classifier"):
        find_classifier(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_classifier(tmp_path / "absent")
    (tmp_path / "broken off" / "stages").mkdir(parents=True)
    (tmp_path / "broken off" / "recipe.toml").write_text("")
    with pytest.raises(CheckpointError, match="`broken off` has no classifier yet") as caught:
        find_classifier(tmp_path / "broken off")
    assert "--resume" in str(caught.value)
    native.save_model_dir(tmp_path / "encoder", {"a": torch.zeros(1)}, name="e", config={})
    with pytest.raises(CheckpointError, match="holds an encoder"):
        find_classifier(tmp_path / "encoder")


def test_an_encoder_is_not_looked_for_in_a_classifier(folder: Path) -> None:
    from chiasm.load import load

    with pytest.raises(CheckpointError, match="a vision classifier, not an encoder") as caught:
        load(folder)
    assert "classify" in str(caught.value)
