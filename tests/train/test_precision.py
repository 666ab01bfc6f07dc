"""In which precision a run trains: chosen once, written down, kept on resume, and never another one silently."""

from __future__ import annotations

import tomllib
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chiasm.checkpoints.native import read_model_dir
from chiasm.encoders.precision import VARIABLE
from chiasm.errors import CheckpointError, ConfigError
from chiasm.train import precision
from chiasm.train.checkpoint import load_checkpoint, read_position, save_checkpoint
from chiasm.train.contrastive import ContrastiveTask
from chiasm.train.distributed import Group
from chiasm.train.loop import LAST
from chiasm.train.precision import PrecisionWarning, arithmetic, settle_precision, training_precision
from chiasm.train.recipe import LossConfig, OptimConfig, Recipe, RunConfig, TrainConfig, load_recipe
from chiasm.train.run import train, train_contrastive
from chiasm.train.validation import Validation

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.fixture
def machine(monkeypatch):
    """Make a machine where bfloat16 pays, or does not; `auto` is then free."""

    def pretend(pays):
        monkeypatch.delenv(VARIABLE, raising=False)
        monkeypatch.setattr(precision, "bf16_pays", lambda device: pays and device == "cpu")

    return pretend


class Stop(BaseException):
    """Stands for whatever ends a run from outside."""


class Bell:
    def __init__(self, n):
        self.n = n

    def start(self, total, description):
        pass

    def advance(self, n=1, **fields):
        self.n -= bool(fields)
        if self.n == 0:
            raise Stop

    def finish(self):
        pass


def settings(**optim):
    optim = {"lr": 3e-3, "epochs": 3, "batch_size": 8, **optim}
    return TrainConfig(1, LossConfig(positives="none"), OptimConfig(**optim), RunConfig(save_every=2))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- what `auto` means


def test_auto_is_what_the_machine_runs_fast(machine):
    machine(True)
    assert training_precision("auto") == "bf16"
    machine(False)
    assert training_precision("auto") == "fp32"


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
def test_a_wish_is_a_wish(machine, wanted, pays):
    machine(pays)
    assert training_precision(wanted) == wanted


@pytest.mark.parametrize(("stated", "expected"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "bf16"), ("x", "bf16")])
def test_the_variable_decides_where_it_names_what_can_be_trained(machine, monkeypatch, stated, expected):
    machine(True)
    monkeypatch.setenv(VARIABLE, stated)
    assert training_precision("auto") == expected


@pytest.mark.parametrize("wrong", ["int8", "fp16", "BF16", ""])
def test_what_cannot_be_trained_is_refused(wrong):
    with pytest.raises(ConfigError, match="in which nothing can be trained") as caught:
        training_precision(wrong)
    assert "hint: one of: auto, fp32, bf16" in str(caught.value)


def test_the_recipe_refuses_it_too(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[data]\nphantoms = "chest"\n[optim]\nprecision = "int8"\n')
    with pytest.raises(ConfigError, match=r"optim\.precision"):
        load_recipe(path)


def test_arithmetic_is_autocast_or_nothing():
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with arithmetic("bf16", torch.device("cpu")):
        assert layer(x).dtype == torch.bfloat16
    with arithmetic("fp32", torch.device("cpu")):
        assert layer(x).dtype == torch.float32


def test_published_recipes_do_not_depend_on_the_machine():
    """Their numbers are in docs/lab-notes.md."""
    plans = [p for p in RECIPES if "\n[optim]\n" in p.read_text()]
    assert len(plans) >= 8
    assert not [p.name for p in plans if "precision" not in tomllib.loads(p.read_text())["optim"]]


# ---- settled once, the same everywhere


def test_settling_replaces_auto_only(machine, tmp_path):
    machine(True)
    assert settle_precision(OptimConfig(), "cpu") == OptimConfig(precision="bf16")
    for fixed in (OptimConfig(precision="fp32"), OptimConfig(precision="bf16")):
        assert settle_precision(fixed, "cpu", goes_on_from=tmp_path / "absent") is fixed
    assert settle_precision(OptimConfig(), "cpu", goes_on_from=tmp_path / "absent").precision == "bf16"


def test_the_first_process_decides(machine, monkeypatch):
    """A trial may end differently on two machines of one run."""
    machine(True)
    monkeypatch.setattr(precision, "of_main", lambda values, group: {"bf16": 0.0} if group.world > 1 else values)
    assert settle_precision(OptimConfig(), "cpu", group=Group(rank=1, world=2)).precision == "fp32"
    assert settle_precision(OptimConfig(), "cpu", group=Group()).precision == "bf16"


def test_task_and_validation_agree(machine, tiny, colour_pairs):
    source, config = colour_pairs(16), settings()
    machine(True)
    assert ContrastiveTask(tiny(), config=config).precision == "bf16"
    half = Validation(tiny().eval(), source, config=config)()["loss"]
    machine(False)
    assert ContrastiveTask(tiny(), config=config).precision == "fp32"
    full = Validation(tiny().eval(), source, config=config)()["loss"]
    assert half != full
    assert half == pytest.approx(full, rel=2e-2)


# ---- runs


def test_auto_trains_as_if_it_had_been_written_down(machine, tiny, colour_pairs, tmp_path):
    machine(True)
    auto, stated, other = tiny(), tiny(), tiny()
    train_contrastive(auto, colour_pairs(32), config=settings(), out=tmp_path / "a")
    train_contrastive(stated, colour_pairs(32), config=settings(precision="bf16"), out=tmp_path / "b")
    train_contrastive(other, colour_pairs(32), config=settings(precision="fp32"), out=tmp_path / "c")
    assert torch.equal(weights(auto), weights(stated))
    assert not torch.equal(weights(auto), weights(other))
    assert (tmp_path / "a" / LAST).read_bytes() == (tmp_path / "b" / LAST).read_bytes()
    assert read_position(tmp_path / "a" / LAST).precision == "bf16"
    assert read_position(tmp_path / "c" / LAST).precision == "fp32"


@pytest.mark.parametrize("pays", [True, False], ids=["bf16", "fp32"])
def test_resume_keeps_the_precision_bit_for_bit_where_the_machine_would_choose_the_other(
    machine, tiny, colour_pairs, tmp_path, pays
):
    machine(pays)
    whole = tiny()
    train_contrastive(whole, colour_pairs(32), config=settings(), out=tmp_path / "whole")
    with pytest.raises(Stop):
        train_contrastive(tiny(), colour_pairs(32), config=settings(), out=tmp_path / "cut", progress=Bell(5))
    machine(not pays)
    began, chosen = ("bf16", "fp32") if pays else ("fp32", "bf16")
    resumed = tiny()
    with pytest.warns(PrecisionWarning, match=f"began in {began} and goes on in it; .* would choose {chosen}"):
        train_contrastive(resumed, colour_pairs(32), config=settings(), out=tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert (tmp_path / "whole" / LAST).read_bytes() == (tmp_path / "cut" / LAST).read_bytes()


def test_resume_says_nothing_where_nothing_differs(machine, tiny, colour_pairs, tmp_path):
    machine(True)
    with pytest.raises(Stop):
        train_contrastive(tiny(), colour_pairs(32), config=settings(), out=tmp_path, progress=Bell(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_contrastive(tiny(), colour_pairs(32), config=settings(), out=tmp_path, resume=True)


def test_another_precision_on_resume_is_refused_by_name(tiny, colour_pairs, tmp_path):
    with pytest.raises(Stop):
        train_contrastive(tiny(), colour_pairs(32), config=settings(precision="fp32"), out=tmp_path, progress=Bell(3))
    before = (tmp_path / LAST).read_bytes()
    with pytest.raises(CheckpointError, match="trains in fp32, the recipe asks for bf16") as caught:
        train_contrastive(tiny(), colour_pairs(32), config=settings(precision="bf16"), out=tmp_path, resume=True)
    assert "hint: leave `optim.precision` at `auto`" in str(caught.value)
    assert (tmp_path / LAST).read_bytes() == before


def test_a_checkpoint_of_before_goes_on_in_float32(machine, tiny, colour_pairs, tmp_path):
    """Its file does not say in what it trained, and float32 was the default."""
    machine(False)
    with pytest.raises(Stop):
        train_contrastive(tiny(), colour_pairs(32), config=settings(), out=tmp_path, progress=Bell(3))
    model = tiny()
    optimizer_free = load_checkpoint(tmp_path / LAST, model)
    save_checkpoint(tmp_path / "old" / LAST, model, position=replace(optimizer_free, precision=""))
    machine(True)
    with pytest.warns(PrecisionWarning, match="began in fp32"):
        found = settle_precision(OptimConfig(), "cpu", goes_on_from=tmp_path / "old" / LAST)
    assert found.precision == "fp32"


def test_a_damaged_checkpoint_is_told(machine, tmp_path):
    machine(True)
    (tmp_path / LAST).write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        settle_precision(OptimConfig(), "cpu", goes_on_from=tmp_path / LAST)


def test_the_files_of_a_run_say_what_it_trained_in(machine, tmp_path):
    machine(True)
    values = {
        "name": "small", "data": {"phantoms": "chest", "patients": 12, "near_duplicates": False},
        "image": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "heads": 2},
        "text": {"width": 16, "layers": 1, "heads": 2}, "projection": {"dim": 8}, "tokenizer": {"compact": True},
        "optim": {"steps": 2, "batch_size": 4}, "run": {"select": "none"},
    }  # fmt: skip
    from chiasm.config import build

    recipe = build(Recipe, values)
    assert recipe.optim.precision == "auto"
    result = train(recipe, out=tmp_path)
    assert result.precision == "bf16"
    assert tomllib.loads((tmp_path / "recipe.toml").read_text())["optim"]["precision"] == "bf16"
    assert read_model_dir(tmp_path / "model").training["precision"] == "bf16"
    assert read_position(tmp_path / LAST).precision == "bf16"
    machine(False)
    again = train(load_recipe(tmp_path / "recipe.toml"), out=tmp_path / "again")
    assert again.precision == "bf16", "the resolved recipe repeats the run wherever it is started"


# ---- what bf16 may change


def gradients(model, batch, **optim):
    value = ContrastiveTask(model, config=settings(**optim)).backward(batch)
    return value, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("chunk", [None, 5])
def test_bf16_stays_within_its_bound_and_fp32_is_exact(tiny, colour_pairs, chunk):
    batch = colour_pairs(16).batch(np.arange(16), np.random.default_rng(0))
    double = tiny().double()
    wide = batch._replace(pixels=batch.pixels.double())
    true_loss, truth = gradients(double, wide, precision="fp32")
    loss, found = gradients(tiny(), batch, precision="fp32", grad_cache_chunk=chunk)
    assert loss == pytest.approx(true_loss, rel=1e-5)
    assert float((found - truth).norm() / truth.norm()) < 1e-5
    half_loss, half = gradients(tiny(), batch, precision="bf16", grad_cache_chunk=chunk)
    assert half_loss == pytest.approx(true_loss, rel=1e-2)
    assert 1e-5 < float((half - truth).norm() / truth.norm()) < 0.1
    assert half.dtype == torch.float32
