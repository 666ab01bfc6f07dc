"""Two gloo processes must give the gradient of the one batch that they share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chiasm.errors import ConfigError
from chiasm.train.distributed import (
    Group,
    current_group,
    finish_gradients,
    gather_constants,
    gather_rows,
    is_sharded,
    join_group,
    local_slice,
    mean_over_ranks,
    no_sync,
    of_main,
    spread_like,
    wait_for_all,
    whole,
    wrap,
)

HEAD = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from conftest import ColourPairs, Ids, tiny_config
from chiasm.encoders.build import build_encoder_model
from chiasm.train.contrastive import ContrastiveTask, Pairs
from chiasm.train.distributed import Group, is_sharded, join_group, local_slice, of_main, whole
from chiasm.train.loop import Loop
from chiasm.train.recipe import LossConfig, OptimConfig, RunConfig, TrainConfig

group = join_group("cpu")
assert (group.world, group.is_main) == (2, group.rank == 0)
batch = ColourPairs(24).batch(np.arange(24), np.random.default_rng(0))
part = local_slice(24, group)
mine = Pairs(batch.pixels[part], Ids(batch.tokens.ids[part], batch.tokens.lengths[part]), batch.keys[part])

def gradients(model):
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}

def check_gradients(loss, chunk, **run):
    settings = TrainConfig(loss=loss, optim=OptimConfig(grad_cache_chunk=chunk), run=RunConfig(**run))
    bias = -10.0 if loss.kind == "siglip" else None
    alone, shared = (build_encoder_model(tiny_config(bias=bias), seed=0) for _ in range(2))
    expected = ContrastiveTask(alone, config=settings, group=Group()).backward(batch)
    task = ContrastiveTask(shared, config=settings, group=group)
    assert is_sharded(shared) == bool(run)
    value = task.backward(mine, weight=0.5, sync=False)
    value = task.backward(mine, weight=0.5, sync=True)
    values = torch.tensor([value])
    torch.distributed.all_reduce(values)
    assert abs(float(values) / 2 - expected) < 1e-5 * expected, (float(values) / 2, expected)
    expected, got = gradients(alone), gradients(shared)
    assert expected.keys() == got.keys()
    top = max(float(g.abs().max()) for g in expected.values())
    error = max(float((got[n] - g).abs().max()) for n, g in expected.items()) / top
    assert error < 1e-5, (loss, chunk, error)
    return task
"""

COPIES = (
    HEAD
    + """
for loss in (LossConfig("infonce"), LossConfig("siglip"), LossConfig("multi_positive"), LossConfig("infonce", tile=5)):
    for chunk in (None, 5):
        task = check_gradients(loss, chunk)

class Foreign(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build_encoder_model(tiny_config(bias=-10.0), seed=0)
        self.pooler = torch.nn.Linear(3, 3)
    def forward(self, *inputs):
        return self.inner(*inputs)

settings = TrainConfig(loss=LossConfig("siglip"))
foreign = Foreign()
ContrastiveTask(foreign, config=settings, group=group).backward(mine)
alone = build_encoder_model(tiny_config(bias=-10.0), seed=0)
ContrastiveTask(alone, config=settings, group=Group()).backward(batch)
for name, gradient in gradients(alone).items():
    assert torch.allclose(gradients(foreign.inner)[name], gradient, rtol=1e-4, atol=1e-6), name

settings = TrainConfig(optim=OptimConfig(batch_size=12, epochs=2, accumulate=2), run=RunConfig(save_every=1, workers=1))
model = build_encoder_model(tiny_config(), seed=0)
task = ContrastiveTask(model, config=settings, group=group)
Loop(task, ColourPairs(48), config=settings, out=sys.argv[1]).run()
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
both = [torch.empty_like(weights) for _ in range(2)]
torch.distributed.all_gather(both, weights)
assert torch.equal(*both), "both processes must hold the same weights"
assert of_main({"loss": float(group.rank)}, group) == {"loss": 0.0}
batch.pixels[20] = torch.nan
bad = Pairs(batch.pixels[part], mine.tokens, mine.keys)
assert np.isnan(task.backward(bad)), "a bad row of one process is seen by all"
torch.distributed.destroy_process_group()
print("equal")
"""
)


PARTS = (
    HEAD
    + """
from chiasm.checkpoints.native import read_model_dir
from chiasm.train.checkpoint import load_checkpoint
from chiasm.progress import SilentProgress
from chiasm.train.loop import LAST
from chiasm.train.recipe import load_recipe
from chiasm.train.run import train

for loss in (LossConfig("siglip"), LossConfig("multi_positive")):
    for chunk in (None, 5):
        task = check_gradients(loss, chunk, shard=True)
layer = task.model.transformer.resblocks[0].mlp.c_fc.weight
assert layer.to_local().numel() == layer.numel() // 2, "each process holds half"

class StopAt(SilentProgress):
    def __init__(self, step):
        self.left = step
    def advance(self, n=1, **fields):
        self.left -= bool(fields)
        if fields and not self.left:
            raise KeyboardInterrupt

def trained(stop=0, resume=False, shard=True):
    optim = OptimConfig(batch_size=12, steps=6, clip_norm=0.05)
    settings = TrainConfig(optim=optim, run=RunConfig(save_every=1, workers=0, shard=shard))
    model = build_encoder_model(tiny_config(), seed=0)
    task = ContrastiveTask(model, config=settings, group=group)
    validate = lambda: {"recall_at_10": 0.5, "rank": float(group.rank)}
    loop = Loop(task, ColourPairs(48), config=settings, out=sys.argv[1] + f"/{shard}", validate=validate)
    try:
        assert loop.run(resume=resume, progress=StopAt(stop)).metrics["rank"] == 0.0
    except KeyboardInterrupt:
        return {}
    return {n: whole(p).detach().clone() for n, p in model.named_parameters()}

straight, copies = trained(), trained(shard=False)
for name, value in copies.items():
    assert torch.allclose(straight[name], value, rtol=1e-4, atol=2e-5), name
plain = build_encoder_model(tiny_config(), seed=1)
load_checkpoint(sys.argv[1] + "/True/" + LAST, plain)  # a checkpoint holds whole tensors
assert all(torch.equal(p, straight[n]) for n, p in plain.named_parameters())
assert trained(stop=4) == {}
torch.distributed.barrier()
again = trained(resume=True)
assert all(torch.equal(value, again[name]) for name, value in straight.items()), "bit for bit"
recipe = load_recipe(sys.argv[1] + "/recipe.toml")
result = train(recipe, out=sys.argv[1] + "/run")
tensors = read_model_dir(result.best_dir).tensors
assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
torch.distributed.destroy_process_group()
print("equal")
"""
)


def run_two(script, folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(Path(__file__).parent)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**env, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        results = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (out, err) in zip(children, results, strict=True):
        assert child.returncode == 0, err[-3000:]
        assert out.strip().endswith("equal")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    run_two(COPIES, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", "last.safetensors", "results.jsonl"]


RECIPE = """
[data]
phantoms = "tissue"
patients = 12
validation = 0.3
[image]
image_size = 32
patch_size = 16
width = 16
layers = 2
heads = 2
[text]
width = 16
layers = 1
heads = 2
freeze = true
[projection]
dim = 8
[tokenizer]
compact = true
[optim]
epochs = 1
batch_size = 8
projection_lr_factor = 0.0
[run]
shard = true
"""


@pytest.mark.slow
def test_two_processes_that_share_the_weights_equal_one(tmp_path):
    """FSDP2: gradients of the whole batch, exact resume, whole checkpoints, a model folder that anybody loads."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    run_two(PARTS, tmp_path)
    saved = json.loads((tmp_path / "run" / "model" / "encoder.json").read_text())
    assert saved["training"]["steps"] > 0


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    """No GPU here: the calls are taken down instead."""
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    join_group("cuda")
    join_group("cuda:0")
    join_group("cpu")
    assert calls == [1, "nccl", "nccl", "gloo"]


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_group("cpu") == current_group() == Group(0, 1)
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows, Group()) is rows
    assert gather_constants(rows, Group()) is rows
    assert mean_over_ranks(2.5, Group(), torch.device("cpu")) == 2.5
    model = torch.nn.Linear(2, 2)
    assert wrap(model, Group()) is wrap(model, Group(), shard=True) is model
    assert of_main({"loss": 1.0}, Group()) == {"loss": 1.0}
    assert not is_sharded(model)
    assert spread_like(rows, model.weight) is whole(rows) is rows
    finish_gradients(model, Group())
    wait_for_all(Group())
    with no_sync(model):
        pass


def test_slices_cover_the_batch():
    parts = [local_slice(12, Group(r, 3)) for r in range(3)]
    assert [(p.start, p.stop) for p in parts] == [(0, 4), (4, 8), (8, 12)]
    with pytest.raises(ConfigError, match="use a multiple of 5"):
        local_slice(12, Group(0, 5))
