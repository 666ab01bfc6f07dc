"""Two gloo processes must give the gradient of the one batch that they share."""

from __future__ import annotations

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
    gather_constants,
    gather_rows,
    join_group,
    local_slice,
    mean_over_ranks,
    no_sync,
    wrap,
)

TWO = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from conftest import ColourPairs, Ids, tiny_config
from chiasm.encoders.build import build_encoder_model
from chiasm.train.contrastive import ContrastiveTask, Pairs
from chiasm.train.distributed import Group, join_group, local_slice
from chiasm.train.loop import Loop
from chiasm.train.recipe import LossConfig, OptimConfig, RunConfig, TrainConfig

group = join_group("cpu")
assert (group.world, group.is_main) == (2, group.rank == 0)
batch = ColourPairs(24).batch(np.arange(24), np.random.default_rng(0))
part = local_slice(24, group)
mine = Pairs(batch.pixels[part], Ids(batch.tokens.ids[part], batch.tokens.lengths[part]), batch.keys[part])

def gradients(model):
    return {{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

for loss in (LossConfig("infonce"), LossConfig("siglip"), LossConfig("multi_positive"), LossConfig("infonce", tile=5)):
    for chunk in (None, 5):
        settings = TrainConfig(loss=loss, optim=OptimConfig(grad_cache_chunk=chunk))
        bias = -10.0 if loss.kind == "siglip" else None
        alone, shared = (build_encoder_model(tiny_config(bias=bias), seed=0) for _ in range(2))
        whole = ContrastiveTask(alone, config=settings, group=Group()).backward(batch)
        task = ContrastiveTask(shared, config=settings, group=group)
        value = task.backward(mine, weight=0.5, sync=False)
        value = task.backward(mine, weight=0.5, sync=True)
        values = torch.tensor([value]); torch.distributed.all_reduce(values)
        assert abs(float(values) / 2 - whole) < 1e-5 * whole, (float(values) / 2, whole)
        expected, got = gradients(alone), gradients(shared)
        assert expected.keys() == got.keys()
        top = max(float(g.abs().max()) for g in expected.values())
        error = max(float((got[n] - g).abs().max()) for n, g in expected.items()) / top
        assert error < 1e-5, (loss, chunk, error)

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
batch.pixels[20] = torch.nan
bad = Pairs(batch.pixels[part], mine.tokens, mine.keys)
assert np.isnan(task.backward(bad)), "a bad row of one process is seen by all"
torch.distributed.destroy_process_group()
print("equal")
"""


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = TWO.format(tests=str(Path(__file__).parent))
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", "last.safetensors", "results.jsonl"]


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_group("cpu") == current_group() == Group(0, 1)
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows, Group()) is rows
    assert gather_constants(rows, Group()) is rows
    assert mean_over_ranks(2.5, Group(), torch.device("cpu")) == 2.5
    model = torch.nn.Linear(2, 2)
    assert wrap(model, Group()) is model
    with no_sync(model):
        pass


def test_slices_cover_the_batch():
    parts = [local_slice(12, Group(r, 3)) for r in range(3)]
    assert [(p.start, p.stop) for p in parts] == [(0, 4), (4, 8), (8, 12)]
    with pytest.raises(ConfigError, match="use a multiple of 5"):
        local_slice(12, Group(0, 5))
