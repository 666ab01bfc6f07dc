"""Features of a locked tower: right, computed once, found by content, never stale."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.config import build
from chiasm.distill.backbone import Backbone, ImagePool, chosen_augment, image_digests, open_backbone
from chiasm.distill.data import open_images
from chiasm.distill.experiment import Experiment
from chiasm.distill.recipe import BackboneConfig, DistillData
from chiasm.errors import ChiasmError, ConfigError, UnknownName
from chiasm.train.images import file_images

from .conftest import TOWER


def tower(**changes: object) -> BackboneConfig:
    return build(BackboneConfig, {"image": {**TOWER, **changes}})


def pool(table: Path, cache: Path, **options: object) -> ImagePool:
    images = open_images(DistillData(source=str(table), label="tumour"), cache=cache)
    return ImagePool(images.table, folder=cache, **options)


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("image-*.npy")}


def test_features_are_the_towers_own_output_computed_once(phantom_table, tmp_path):
    backbone = open_backbone(tower(), seed=0)
    images = pool(phantom_table, tmp_path / "cache", batch_size=8)
    rows = np.arange(len(images.table))[::2]
    made = images.features(backbone, rows)
    pixels, _ = file_images(images.table, backbone.preprocess, augment=None)(rows, None)
    with torch.no_grad():
        assert np.allclose(made, backbone.tower(pixels).numpy(), atol=1e-5)
    assert made.shape == (len(rows), backbone.width) == (len(rows), 16)
    kept = files(tmp_path / "cache")
    again = pool(phantom_table, tmp_path / "cache", batch_size=8).features(open_backbone(tower(), seed=0), rows)
    assert again.tobytes() == made.tobytes()
    assert files(tmp_path / "cache") == kept
    images.features(open_backbone(tower(), seed=1), rows)
    assert len(files(tmp_path / "cache")) == len(kept) + 1, "other weights, other file"


def test_bits_do_not_depend_on_what_was_asked_before(phantom_table, tmp_path):
    backbone = open_backbone(tower(), seed=0)
    rows = np.arange(5, 25)
    first = pool(phantom_table, tmp_path / "a", batch_size=8)
    first.features(backbone, np.arange(17))
    assert first.features(backbone, rows).tobytes() == pool(
        phantom_table, tmp_path / "b", batch_size=8
    ).features(backbone, rows).tobytes()  # fmt: skip


def test_images_are_known_by_their_content(phantom_table, tmp_path):
    backbone = open_backbone(tower(), seed=0)
    rows = np.arange(12)
    cache = tmp_path / "cache"
    pool(phantom_table, cache).features(backbone, rows)
    kept = files(cache)
    copy = tmp_path / "elsewhere"
    shutil.copytree(phantom_table.parent, copy)
    pool(copy / "table.csv", cache).features(backbone, rows)
    assert files(cache) == kept, "a copy is the same images"
    changed = sorted((copy / "images").glob("*.png"))[0]
    first = open_images(DistillData(source=str(copy / "table.csv"), label="tumour")).table.samples[0].image
    assert first is not None
    Image.new("RGB", (32, 32), (9, 9, 9)).save(first)
    os.utime(changed, (1, 1))
    pool(copy / "table.csv", cache).features(backbone, rows)
    assert len(files(cache)) == len(kept) + 1, "a changed image is another one"


def test_arrays_and_members_of_files_have_digests_too(phantom_table, tmp_path):
    drawn = open_images(DistillData(phantoms="tissue", patients=10, phantom_size=32, label="fat"))
    digests = image_digests(drawn.table, folder=tmp_path)
    assert len(set(digests)) == len(drawn)
    assert digests == image_digests(drawn.table, folder=tmp_path)
    h5py = pytest.importorskip("h5py")
    from chiasm.datasets.images import open_image_path
    from chiasm.train.pairs import PairTable
    from chiasm.train.texts import RenderedText
    from chiasm.types import Sample

    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3)).astype(np.uint8)
    samples = tuple(Sample(id=str(i), image=tmp_path / "x.h5" / "x" / str(i)) for i in range(3))
    assert open_image_path(samples[0].image).size == (8, 8)
    table = PairTable(samples, (RenderedText((), ""),) * 3)
    assert len(set(image_digests(table, folder=tmp_path))) == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_threads_prepare_images_as_the_recipe_says(
    phantom_recipe, phantom_table, tmp_path, workers, monkeypatch
):
    sizes = set()

    class Counted(ThreadPoolExecutor):
        def __init__(self, threads, **options):
            sizes.add(threads)
            super().__init__(threads, **options)

    for module in ("distill.backbone", "train.images", "train.sources"):
        monkeypatch.setattr(f"chiasm.{module}.ThreadPoolExecutor", Counted)
    data = {
        "source": str(phantom_table),
        "phantoms": None,
        "patients": None,
        "phantom_size": None,
        "phantom_seed": None,
    }
    experiment = Experiment(phantom_recipe(data=data, run={"workers": workers}), cache=tmp_path)
    experiment.pool.contents  # noqa: B018 - it is what reads files
    backbone = experiment.backbone(0)
    experiment.pool.features(backbone, [0, 1])
    experiment.pool.pixels(backbone, None)(np.array([0, 1]), None)
    assert sizes == {workers}


def test_adapters_that_fit_no_layer_are_told_before_anything_is_trained(phantom_recipe, tmp_path):
    experiment = Experiment(phantom_recipe(backbone={"lora": {"targets": ["absent"]}}), cache=tmp_path)
    with pytest.raises(ConfigError, match=r"`lora.targets` = absent"):
        experiment.prepare(0)


def test_a_loaded_tower_is_the_same_for_all_seeds(retriever_dir, phantom_table, tmp_path):
    config = BackboneConfig(encoder=str(retriever_dir))
    plain, joint = (
        open_backbone(config, seed=0),
        open_backbone(BackboneConfig(str(retriever_dir), projected=True), seed=0),
    )
    assert plain.digest == open_backbone(config, seed=1).digest
    assert plain.digest != joint.digest
    assert (plain.width, joint.width) == (32, 24)
    images = pool(phantom_table, tmp_path)
    from chiasm.load import load

    pixels, _ = file_images(images.table, joint.preprocess, augment=None)(np.arange(4), None)
    expected = load(retriever_dir).encode_image(pixels).numpy()
    assert np.allclose(images.features(joint, np.arange(4)), expected, atol=1e-5)
    assert not plain.tower.training
    assert not any(p.requires_grad for p in plain.tower.parameters())
    assert open_backbone(tower(), seed=0).digest != open_backbone(tower(), seed=1).digest


def test_pixels_are_augmented_only_when_there_is_a_generator(phantom_table, tmp_path):
    backbone = open_backbone(tower(), seed=0)
    images = pool(phantom_table, tmp_path)
    augment = chosen_augment(build(BackboneConfig, {"image": TOWER, "augment": {"preset": "histology"}}))
    assert chosen_augment(tower()) is None
    rows = np.array([3, 1])
    make = images.pixels(backbone, augment)
    plain, _ = file_images(images.table, backbone.preprocess, augment=None)(rows, None)
    assert torch.equal(make(rows, None), plain)
    assert images.pixels(open_backbone(tower(), seed=1), augment) is make, "seeds share what was decoded"
    drawn = make(rows, np.random.default_rng(0))
    assert not torch.equal(drawn, plain)
    assert torch.equal(drawn, make(rows, np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "backbone.encoder"),
        ({"image": TOWER, "projected": True}, "projected"),
        ({"encoder": "no-such-model"}, "no-such-model"),
        ({"encoder": "./absent/model"}, "does not exist"),
        ({"encoder": "${CHIASM_NOT_SET}/model"}, "CHIASM_NOT_SET"),
        ({"image": TOWER, "preprocess": {"sizee": 3}}, "backbone.preprocess.sizee"),
        ({"image": TOWER, "preprocess": {"size": 64}}, "preprocess.size"),
    ],
)
def test_backbones_that_cannot_be_are_errors(config, words):
    with pytest.raises(ChiasmError, match=words.replace("$", r"\$")):
        open_backbone(build(BackboneConfig, config), seed=0)


def test_augmentation_with_a_typo_is_an_error():
    with pytest.raises(UnknownName, match="did you mean `histology`"):
        chosen_augment(build(BackboneConfig, {"image": TOWER, "augment": {"preset": "histologie"}}))
    assert isinstance(open_backbone(tower(), seed=0), Backbone)
