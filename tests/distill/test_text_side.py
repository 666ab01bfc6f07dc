"""Trained targets: they learn, their own loss anchors them, and a collapse does not go unseen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from chiasm.distill.recipe import DistillData, DistillRecipe, FuseConfig, StageConfig, SyntheticConfig
from chiasm.distill.stages import Surroundings, run_arm
from chiasm.distill.synthetic import make_synthetic
from chiasm.distill.text_side import TrainedText, effective_rank, target_variance
from chiasm.encoders.base import LoraConfig
from chiasm.errors import ConfigError, TrainingError

SMALL = SyntheticConfig(train=60, test=200, reports=60, width=16, text_dim=8, image_noise=3.0)
STAGE = {"steps": 20, "batch_size": "full", "lr": 1e-2, "schedule": "constant", "eval_every": 5}


class Words(nn.Module):
    """Text embeddings of rows through a layer that can be adapted."""

    def __init__(self, train, validation):
        super().__init__()
        self.register_buffer("train_text", torch.tensor(train))
        self.register_buffer("validation_text", torch.tensor(validation))
        self.layer = nn.Linear(train.shape[1], train.shape[1])
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(train.shape[1]))
            self.layer.bias.zero_()

    def forward(self, split, rows):
        return self.layer(getattr(self, f"{split}_text")[rows])


@pytest.fixture(scope="module")
def drawn():
    problem, sources = make_synthetic(SMALL, seed=0)
    pairs = sources.given["pairs"]

    # A cone, as the texts of a CLIP form one: every text has a large part in common.
    def in_cone(rows):
        rows = rows + np.array([1.5] + [0.0] * (rows.shape[1] - 1), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return problem, pairs, Words(in_cone(pairs.train), in_cone(pairs.validation))


def make_recipe(**fuse):
    options = STAGE | {"kd_weight": 2.0, "text_lora": LoraConfig(rank=8, alpha=16.0), "monitor": "none"} | fuse
    return DistillRecipe(
        name="small", data=DistillData(synthetic=SMALL), unimodal=StageConfig(**STAGE), text=StageConfig(**STAGE),
        fuse=FuseConfig(**options),
    )  # fmt: skip


def test_targets_learn_and_are_watched(drawn):
    problem, pairs, tower = drawn
    before = {n: t.clone() for n, t in tower.state_dict().items()}
    found = run_arm(problem, pairs, "clip_it", make_recipe(), seed=0, text_tower=tower).final
    ranks = [r["target_rank"] for r in found.curve]
    assert all(1.5 < r <= 8 for r in ranks)
    assert ranks[0] != ranks[-1]
    assert all(0 < r["target_variance"] < 1 for r in found.curve)
    assert all("train_anchor" in r for r in found.curve[1:])
    assert all(torch.equal(before[n], t) for n, t in tower.state_dict().items())
    assert all(n.startswith("heads.") for n in found.state)  # no text leaves the stage
    again = run_arm(problem, pairs, "clip_it", make_recipe(), seed=0, text_tower=tower).final
    assert all(torch.equal(found.state[n], again.state[n]) for n in found.state)


def test_without_the_anchor_targets_collapse_and_the_run_stops(drawn):
    """The only difference between the two runs is the text's own classification loss."""
    problem, pairs, tower = drawn
    options = {"steps": 400, "lr": 3e-2, "kd_weight": 10.0, "weight_decay": 0.0}
    with pytest.raises(TrainingError, match="collapsed") as caught:
        run_arm(problem, pairs, "clip_it", make_recipe(**options, text_anchor=0.0), seed=0, text_tower=tower)
    assert "text_anchor" in str(caught.value)
    found = run_arm(problem, pairs, "clip_it", make_recipe(**options, text_anchor=20.0), seed=0, text_tower=tower).final
    assert found.curve[-1]["target_variance"] > 0.1 * found.curve[0]["target_variance"]


def test_constant_targets_are_seen_at_once():
    constant = Words(np.ones((9, 4), np.float32), np.ones((3, 4), np.float32))
    with pytest.raises(TrainingError, match=r"hardly differ.* effective rank 1\.00 at the start") as caught:
        TrainedText(constant, LoraConfig(rank=2), rows=9, seed=0).watch()
    assert "text_anchor" not in str(caught.value), "that cannot help: nothing has collapsed"


def test_rank_and_variance_of_known_shapes():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 3)) == pytest.approx(1)
    assert target_variance(torch.ones(7, 3)) == pytest.approx(0)
    assert target_variance(torch.cat([torch.eye(3), -torch.eye(3)])) == pytest.approx(1)


def test_the_text_tower_must_be_given(drawn):
    with pytest.raises(ConfigError, match="text_lora"):
        run_arm(drawn[0], drawn[1], "clip_it", make_recipe(), seed=0)
    # Arms without a text do not ask for it.
    run_arm(drawn[0], None, "lambda0", make_recipe(), seed=0, text_dim=8)


class KilledAt:
    """A progress bar that dies in the fuse stage."""

    def __init__(self, step):
        self.left = step

    def start(self, total, description):
        self.active = description == "fuse"

    def advance(self, n=1, **fields):
        self.left -= self.active and bool(fields)
        if self.left == 0:
            raise KeyboardInterrupt

    def finish(self):
        pass


def test_adapters_of_the_text_go_on_bit_for_bit(drawn, tmp_path):
    problem, pairs, tower = drawn
    recipe = make_recipe(steps=8, batch_size=16, eval_every=2, checkpoint_every=1)
    whole = run_arm(problem, pairs, "clip_it", recipe, seed=0, text_tower=tower).final
    for step in (2, 5):
        around = Surroundings(cache=tmp_path / str(step), progress=KilledAt(step))
        with pytest.raises(KeyboardInterrupt):
            run_arm(problem, pairs, "clip_it", recipe, seed=0, text_tower=tower, around=around)
        again = Surroundings(cache=tmp_path / str(step))
        found = run_arm(problem, pairs, "clip_it", recipe, seed=0, text_tower=tower, around=again).final
        assert found.curve == whole.curve  # rank and variance of the targets included
        assert all(torch.equal(found.state[n], whole.state[n]) for n in whole.state)
