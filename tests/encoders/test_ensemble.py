"""Models side by side: cosines are the mean of the members', and everything that holds for one encoder holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chiasm.checkpoints import native
from chiasm.cli.inputs import load_encoder
from chiasm.embed import embed_images, embed_texts, embed_to_store
from chiasm.encoders.base import Encoder, EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.encoders.models.chexzero import PREPROCESS
from chiasm.errors import CheckpointError, ConfigError, InputError
from chiasm.io.clip_retrieval import read_clip_retrieval, write_clip_retrieval
from chiasm.io.store import StoreMetadata, open_store, save_embeddings
from chiasm.load import load, save_encoder
from chiasm.tasks.aggregation import split_members
from chiasm.testing import TEXTS, TinyEncoder, check_encoder, make_test_images
from chiasm.types import Preprocess, Sample

#: OpenAI's layout, for which 64 channels are one head.
CONFIG = EncoderConfig(
    image=ImageTowerConfig(image_size=32, patch_size=16, width=64, layers=1),
    text=TextTowerConfig(width=64, layers=1),
    projection=ProjectionConfig(dim=24),
    preprocess=Preprocess(size=32),
)


def files(folder: Path, count: int = 3) -> list[Path]:
    """Bare state dicts of one kind, as CheXzero's are."""
    paths = [folder / f"best_{i}.pt" for i in range(count)]
    for i, path in enumerate(paths):
        torch.save(build_encoder_model(CONFIG, seed=i).state_dict(), path)
    return paths


@pytest.fixture
def ensemble(tmp_path: Path) -> Encoder:
    return load(files(tmp_path), family="openai")


def test_it_is_an_encoder(ensemble: Encoder) -> None:
    assert ensemble.members == 3
    assert ensemble.dim == 3 * 24
    assert ensemble.name == "ensemble-x3"
    check_encoder(ensemble)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_declared_ensembles_keep_the_laws(kind: str) -> None:
    config = replace(TinyEncoder(0, kind=kind).config, members=2)
    check_encoder(Encoder(build_encoder_model(config, seed=0), config, name="two"))


def test_cosines_are_the_mean_of_the_members(ensemble: Encoder, tmp_path: Path) -> None:
    images = make_test_images(3)
    members = [load(path, family="openai") for path in files(tmp_path)]

    def cosines(encoder: Encoder) -> NDArray[np.float32]:
        return encoder.similarity(embed_images(encoder, images), embed_texts(encoder, list(TEXTS)))

    each = [cosines(member) for member in members]
    together = cosines(ensemble)
    np.testing.assert_allclose(together, np.mean(each, axis=0), atol=1e-6)
    pixels = torch.stack([ensemble.preprocess(image) for image in images])
    vectors = ensemble.encode_image(pixels)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    parts = split_members(vectors.numpy(), 3)
    for member, part in zip(members, parts, strict=True):
        np.testing.assert_allclose(part, member.encode_image(pixels, normalize=True).numpy(), atol=1e-6)
    scales = [member.logit_scale or 0.0 for member in members]
    assert ensemble.logit_scale == pytest.approx(np.mean(scales))
    assert ensemble.space.dim == 72
    assert ensemble.space != load(files(tmp_path)[::-1], family="openai").space


def test_embeddings_and_stores_say_how_many(ensemble: Encoder, tmp_path: Path) -> None:
    images = embed_images(ensemble, make_test_images(2))
    texts = embed_texts(ensemble, list(TEXTS))
    assert images.members == texts.members == 3
    assert images.select([0]).members == 3
    save_embeddings(tmp_path / "store", images, texts)
    assert open_store(tmp_path / "store").read("image").members == 3
    write_clip_retrieval([images], tmp_path / "folder")
    found = read_clip_retrieval(tmp_path / "folder").images
    assert found is not None
    assert found.members == 3
    path = tmp_path / "image.png"
    make_test_images(1)[0].save(path)
    embed_to_store(ensemble, [Sample("a", path)], tmp_path / "other", modalities=("image",))
    assert open_store(tmp_path / "other").metadata.members == 3


def test_one_model_leaves_no_trace_in_a_store() -> None:
    one = embed_texts(TinyEncoder(0), ["a"])
    metadata = StoreMetadata.of(one)
    assert "members" not in metadata.to_dict()
    assert StoreMetadata.from_dict(metadata.to_dict()).members == 1
    assert "members" not in CONFIG.to_dict()


def test_a_saved_ensemble_comes_back(ensemble: Encoder, tmp_path: Path) -> None:
    again = load(save_encoder(ensemble, tmp_path / "saved"))
    assert again.space == ensemble.space
    assert again.members == 3
    with pytest.raises(InputError, match="cannot hold another"):
        load([tmp_path / "saved", files(tmp_path)[0]], family="openai")


def test_what_is_no_ensemble_is_refused(tmp_path: Path) -> None:
    first, second, _ = files(tmp_path)
    assert load([first], family="openai").members == 1
    other = tmp_path / "other.pt"
    wide = replace(CONFIG, projection=ProjectionConfig(dim=32))
    torch.save(build_encoder_model(wide, seed=0).state_dict(), other)
    for names, message in (
        ([], "at least two models, got 0"),
        ([first, second, first], "the same model twice"),
        ([first, other], "must be of one kind; `other` differs from `best_0`"),
    ):
        with pytest.raises(InputError, match=message):
            load(names, family="openai")
    with pytest.raises(InputError, match="several were given"):
        load([first, second], pretrained=other)
    with pytest.raises(CheckpointError, match="does not exist"):
        load([first, tmp_path / "absent.pt"], family="openai")
    with pytest.raises(ConfigError, match="must be at least 2"):
        replace(CONFIG, members=1)


def test_it_is_not_trained_and_not_looked_into_as_one(ensemble: Encoder) -> None:
    with pytest.raises(InputError, match="cannot be trained"):
        ensemble.model(torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long))
    with pytest.raises(InputError, match="no single image tower"):
        ensemble.model.image_side()
    ensemble.model.train()
    assert all(m.training for m in ensemble.model.modules())
    ensemble.encode("a")
    assert not any(m.training for m in ensemble.model.modules())


def test_a_folder_of_several_files_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CheXzero's ten files lie in one folder: one of them, or a list."""
    small = replace(CATALOG.get("chexzero"), config=replace(CONFIG, preprocess=replace(PREPROCESS, size=32)))
    monkeypatch.setitem(CATALOG._items, "chexzero", small)
    paths = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds 3 weight files: `best_0\.pt`, `best_1\.pt`"):
        load(tmp_path, family="chexzero")
    ensemble = load(paths, family="chexzero")
    assert ensemble.name == "chexzero-x3"
    assert ensemble.preprocess_spec.second_resize == "bicubic_tensor"
    check_encoder(ensemble)


def test_commands_take_a_pattern(tmp_path: Path) -> None:
    files(tmp_path)
    options = {"device": "cpu", "family": "openai", "allow_code": False}
    assert load_encoder(str(tmp_path / "best_*.pt"), **options).members == 3  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no file fits"):
        load_encoder(str(tmp_path / "worst_*.pt"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "value"),
    [(("members",), 10**9), (("image", "options", "layers"), 10**9), (("image", "options", "width"), 10**9)],
)
def test_a_folder_that_states_a_giant_is_refused_at_once(tmp_path: Path, path: tuple[str, ...], value: int) -> None:
    options = {"width": 32, "layers": 1, "heads": 4, "patch_size": 8, "output_dim": 16, "pool_heads": 4}
    image = ImageTowerConfig(kind="named", source="conch", image_size=32, options=options)
    config = replace(TinyEncoder(0).config, image=image)
    save_encoder(Encoder(build_encoder_model(config, seed=0), config, name="named"), tmp_path)
    file = tmp_path / native.DESCRIPTION_FILE
    description = json.loads(file.read_text())
    place = description["config"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="the model states"):
        load(tmp_path)
