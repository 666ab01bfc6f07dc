from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chiasm.checkpoints.native import read_model_dir
from chiasm.config import read_toml
from chiasm.data.tokens import TruncationWarning
from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.errors import CheckpointError, ConfigError, FileFormatError, InputError, MissingExtra, TrainingError
from chiasm.io.manifest import read_jsonl
from chiasm.train.recipe import OptimConfig, RunConfig, TrainConfig, load_recipe
from chiasm.train.run import train, train_contrastive

PHANTOMS = """
seed = 1
[data]
phantoms = "chest"
patients = 60
validation = 0.2
[augment]
preset = "chest"
[image]
image_size = 32
patch_size = 8
width = 32
layers = 1
heads = 2
[text]
width = 32
layers = 1
heads = 2
context_length = 77
[projection]
dim = 16
[tokenizer]
compact = true
[optim]
lr = 3e-3
epochs = 4
batch_size = 32
[run]
log_every = 1
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(PHANTOMS)
    return lambda *overrides: load_recipe(path, overrides)


def rebuilt(folder):
    """The model of a folder, built from nothing but the folder."""
    saved = read_model_dir(folder)
    config = EncoderConfig.from_dict(saved.config)
    model = build_encoder_model(config, seed=99)
    model.load_state_dict(saved.tensors)
    return model.eval(), saved


def test_phantoms_to_a_model_folder(recipe, tmp_path):
    result = train(recipe(), out=tmp_path / "run")
    lines = read_jsonl(tmp_path / "run" / "results.jsonl")
    losses = [r["loss"] for r in lines if r["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert result.best_dir == tmp_path / "run" / "model"
    assert 0 < result.metrics["recall_at_10"] <= 1
    assert result.steps == len(losses)
    model, saved = rebuilt(result.best_dir)
    assert saved.name == "tiny"
    assert saved.training["validation"] == dict(result.metrics)
    assert saved.training["best_step"] == result.best_step
    assert model.config.text.vocab_size < 2000
    assert len(saved.config["tokenizer"]["keep"]) > 0
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"model", "recipe.toml", "results.jsonl", "rejected.jsonl", "data.json", "best.safetensors"} <= files
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data == result.data
    assert data["train"]["pairs"] > 3 * data["validation"]["pairs"] > 0
    resolved = load_recipe(tmp_path / "run" / "recipe.toml")
    assert read_toml(result.best_dir / "recipe.toml") == read_toml(tmp_path / "run" / "recipe.toml")
    assert resolved.augment["rotate_deg"] == 8.0
    assert resolved.digest == recipe().digest or resolved.augment != recipe().augment


def test_the_saved_weights_are_those_of_the_best_step(recipe, tmp_path):
    result = train(recipe("run.select=loss"), out=tmp_path / "run")
    best = load_file(tmp_path / "run" / "best.safetensors")
    saved = read_model_dir(result.best_dir).tensors
    for name, tensor in saved.items():
        assert torch.equal(tensor, best[f"model/{name}"]), name


def test_a_seed_decides_everything(recipe, tmp_path):
    weights = []
    for i, seed in enumerate((1, 1, 2)):
        result = train(recipe(f"seed={seed}", "optim.epochs=1"), out=tmp_path / str(i))
        weights.append(read_model_dir(result.best_dir).tensors)
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert any(not torch.equal(weights[0][n], weights[2][n]) for n in weights[0])


def test_a_folder_that_holds_a_run_is_not_overwritten_by_mistake(recipe, tmp_path):
    short = recipe("optim.epochs=1")
    train(short, out=tmp_path / "run")
    before = (tmp_path / "run" / "last.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        train(short, out=tmp_path / "run")
    again = train(short, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == before
    assert again.metrics
    with pytest.raises(CheckpointError, match="another recipe"):
        train(recipe("optim.epochs=1", "image.width=48"), out=tmp_path / "run", resume=True)
    train(recipe("optim.epochs=1", "seed=5"), out=tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "last.safetensors").read_bytes() != before
    with pytest.raises(ConfigError, match=r"names no `run\.out`"):
        train(short)
    train(recipe("optim.epochs=1", f'run.out="{tmp_path / "named"}"'))
    assert (tmp_path / "named" / "model").is_dir()


@pytest.mark.parametrize(
    "overrides",
    [
        ('loss.kind="siglip"',),
        ('loss.kind="multi_positive"', 'loss.positives="group"'),
        ("optim.grad_cache_chunk=8", "optim.accumulate=2"),
        ('optim.precision="bf16"', 'loss.positives="none"'),
        ("data.validation=0.0", "run.select=none"),
        ('image={kind="resnet", image_size=32, width=8, layers=[1, 1], heads=2}',),
        ("optim.image_lr_factor=0.0",),
    ],
    ids=lambda o: o[0],
)
def test_variants_of_the_recipe_train(recipe, tmp_path, overrides):
    result = train(recipe("optim.epochs=1", "data.patients=30", *overrides), out=tmp_path / "run")
    model, _ = rebuilt(result.best_dir)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert (model.logit_bias is not None) == ("siglip" in overrides[0])
    assert bool(result.metrics) == ("validation" not in overrides[0])


LOCKED = ("image.freeze=true", "text.freeze=true", "run.views=2")


def test_locked_towers_train_on_cached_features(recipe, tmp_path):
    folder = f'run.feature_cache="{tmp_path / "cache"}"'
    first = train(recipe(*LOCKED, folder), out=tmp_path / "a")
    files = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert sum(n.startswith("image-") for n in files) == 2
    assert sum(n.startswith("text-") for n in files) == 2
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    train(recipe(*LOCKED, folder, "optim.lr=1e-3"), out=tmp_path / "b")
    assert stamps == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    plain = train(recipe(*LOCKED, "run.cache_features=false"), out=tmp_path / "c")
    assert not (tmp_path / "c" / "features").exists()
    model, _ = rebuilt(first.best_dir)
    start = build_encoder_model(model.config, seed=1)
    assert torch.equal(model.visual.conv1.weight, start.visual.conv1.weight)
    assert not torch.equal(model.visual.proj, start.visual.proj)
    assert plain.metrics["loss"] == pytest.approx(first.metrics["loss"], rel=0.2)


def test_adapters_are_merged_into_the_model_that_is_saved(recipe, tmp_path):
    result = train(recipe("optim.epochs=2", "image.lora={rank=2}", "text.freeze=true"), out=tmp_path / "run")
    model, saved = rebuilt(result.best_dir)
    assert not any("lora" in n or "parametrizations" in n for n in saved.tensors)
    assert model.config.image.lora is None
    before = build_encoder_model(model.config, seed=1)
    name = "transformer.resblocks.0.attn.in_proj_weight"
    assert not torch.equal(model.visual.state_dict()[name], before.visual.state_dict()[name])


def table(folder, n=40):
    rng = np.random.default_rng(0)
    rows = ["filepath,title,patient_id,kind"]
    for i in range(n):
        pixels = rng.integers(0, 60, (40, 36), np.uint8)
        pixels[: 20 if i % 2 else 40, :18] += 150
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f"{i}.png,number {i},p{i // 2},{i % 2}")
    (folder / "table.csv").write_text("\n".join(rows))


def test_a_table_with_label_templates_and_a_broken_image(recipe, tmp_path):
    table(tmp_path)
    (tmp_path / "7.png").write_bytes(b"\x89PNG broken")
    values = [
        "data.patients=2", 'data.source="table.csv"', 'data.texts=["{kind} on the left", "we see {kind}"]',
        'data.words={kind={"0"=["a pillar", "a bar"], "1"=["a block"]}}', "data.near_duplicates=false",
        "run.select=text_choice_accuracy", 'loss.kind="multi_positive"', "text.context_length=48",
    ]  # fmt: skip
    text = PHANTOMS.replace('phantoms = "chest"', "")
    (tmp_path / "tiny.toml").write_text(text)
    with pytest.warns(UserWarning, match="texts say left or right"):
        result = train(recipe(*values, "augment.horizontal_flip=true", "optim.epochs=1"), out=tmp_path / "warned")
    for i, mode in enumerate(("auto", "never")):
        out = tmp_path / str(i)
        result = train(recipe(*values, "optim.epochs=20", f'data.in_memory="{mode}"'), out=out)
        assert result.metrics["text_choice_accuracy"] > 0.9
        assert [r["id"] for r in read_jsonl(out / "rejected.jsonl")] == ["7.png"]
        assert "7.png" not in (out / "results.jsonl").read_text()
    with pytest.raises(FileFormatError, match="is not an image"):
        train(recipe(*values, 'data.on_bad_row="fail"'), out=tmp_path / "strict")


@pytest.mark.parametrize("memory", ["auto", "never"])
def test_webdataset_shards(recipe, tmp_path, memory):
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as archive:
            for i in range(20 * shard, 20 * shard + 20):
                png = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (40, 36), np.uint8)).save(png, "PNG")
                content = {
                    "png": png.getvalue(),
                    "txt": f"number {i}".encode(),
                    "json": b'{"patient_id": %d}' % (i // 2),
                }
                if i == 7:
                    content["png"] = content["png"][:60]
                for suffix, value in content.items():
                    member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    member.size = len(value)
                    archive.addfile(member, io.BytesIO(value))
    (tmp_path / "tiny.toml").write_text(PHANTOMS.replace('phantoms = "chest"', 'source = "part-{0..1}.tar"'))
    values = ("data.near_duplicates=false", f'data.in_memory="{memory}"', "optim.epochs=1", "optim.batch_size=8")
    result = train(recipe("data.patients=2", *values), out=tmp_path / "run")
    model, _ = rebuilt(result.best_dir)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    pairs = [result.data[side] for side in ("train", "validation")]
    assert sum(side["pairs"] for side in pairs) == 40
    assert sum(side["groups"] for side in pairs) == 20
    assert len(read_jsonl(tmp_path / "run" / "rejected.jsonl")) == 1, "the image that is cut off"


def test_texts_that_lose_their_ends_are_told(recipe, tmp_path):
    with pytest.warns(TruncationWarning, match="distinct texts are longer than 8 tokens") as caught:
        result = train(recipe("optim.epochs=1", "data.patients=30", "text.context_length=8"), out=tmp_path / "run")
    assert str(caught[0].message).startswith(f"{result.data['truncated_texts']} ")
    assert json.loads((tmp_path / "run" / "data.json").read_text())["truncated_texts"] > 0


def test_starting_from_a_model(recipe, tmp_path):
    pytest.importorskip("chiasm.load")
    first = train(recipe("optim.epochs=1"), out=tmp_path / "a")
    path = tmp_path / "more.toml"
    keep = (
        "seed = 1\n[data]\nphantoms = 'chest'\npatients = 30\nvalidation = 0.2\n[optim]\nepochs = 1\nbatch_size = 16\n"
    )
    path.write_text(f'start = "{first.best_dir}"\n{keep}')
    second = train(load_recipe(path), out=tmp_path / "b")
    old, new = read_model_dir(first.best_dir), read_model_dir(second.best_dir)
    assert old.config == new.config
    assert any(not torch.equal(old.tensors[n], new.tensors[n]) for n in old.tensors)


def test_missing_trackers_are_named(recipe, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match="`wandb` is not installed"):
        train(recipe("optim.epochs=1", 'run.log=["wandb"]'), out=tmp_path / "w")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingExtra, match="`tensorboard` is not installed"):
        train(recipe("optim.epochs=1", 'run.log=["tensorboard"]'), out=tmp_path / "t")


def test_tensorboard_events(recipe, tmp_path):
    train(recipe("optim.epochs=1", 'run.log=["tensorboard"]'), out=tmp_path / "run")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_too_high_a_rate_ends_in_an_error_not_in_nan(recipe, tmp_path):
    with pytest.raises(TrainingError, match="is not a number"):
        train(recipe("optim.lr=1e30", "optim.warmup_fraction=0.0", "optim.clip_norm=1e30"), out=tmp_path / "run")
    for path in (tmp_path / "run").glob("*.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(path).values() if t.is_floating_point())


def test_any_source_trains(tiny, colour_pairs, tmp_path):
    config = TrainConfig(optim=OptimConfig(lr=3e-3, epochs=6, batch_size=8), run=RunConfig(select="recall_at_1"))
    model = tiny()
    result = train_contrastive(
        model, colour_pairs(64), config=config, out=tmp_path, validation=colour_pairs(16, seed=3)
    )
    assert result.metrics["recall_at_1"] > 0.5
    assert not model.training
    best = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(t, best[f"model/{n}"]) for n, t in model.state_dict().items())
