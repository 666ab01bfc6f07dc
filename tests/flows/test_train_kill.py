"""A recipe that is killed, filled up or interrupted anywhere ends, after `resume`, with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chiasm.checkpoints.native import read_model_dir
from chiasm.io.manifest import read_jsonl
from chiasm.train.checkpoint import read_position

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

RECIPE = """
name = "killed"
[data]
phantoms = "tissue"
patients = 40
validation = 0.2
[augment]
preset = "histology"
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
context_length = 32
[projection]
dim = 16
image = "mlp"
dropout = 0.2
[tokenizer]
compact = true
[optim]
lr = 3e-3
epochs = 3
batch_size = 16
grad_cache_chunk = 6
[run]
log_every = 1
save_every = 1
select = "recall_at_5"
"""

# One interpreter imports torch once and forks a child per attempt, so that many kills cost little.
SCRIPT = """
import json, os, resource, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs in the background has it ignored
import torch
torch.set_num_threads(1)
from chiasm.errors import ChiasmError
from chiasm.train.recipe import load_recipe
from chiasm.train.run import train
import chiasm.data.phantoms, chiasm.encoders.adapters, chiasm.metrics.retrieval, safetensors.torch
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.zeros(2)
torch.optim.AdamW([parameter], fused=True).step()

folder, attempts = sys.argv[1], json.loads(sys.argv[2])

def die_at_call(number):
    calls = [0]
    def tick():
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
    def wrapped(f):
        def call(*a, **k):
            tick(); r = f(*a, **k); tick(); return r
        return call
    for name in ("replace", "fsync", "open", "write"):
        setattr(os, name, wrapped(getattr(os, name)))

def die_after(seconds):
    def later():
        time.sleep(seconds); os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=later, daemon=True).start()

class Interrupt:
    def __init__(self, n): self.n = n
    def start(self, *a): pass
    def finish(self): pass
    def advance(self, n=1, **fields):
        self.n -= bool(fields)
        if self.n == 0 and fields:
            os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)

def child(out, how, value):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    progress = None
    if how == "call": die_at_call(value)
    if how == "time": die_after(value)
    if how == "int": progress = Interrupt(value)
    if how == "full": resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))
    code = 0
    try:
        train(load_recipe(folder + "/recipe.toml"), out=out, resume=how != "first", progress=progress)
    except KeyboardInterrupt:
        code = 70
    except ChiasmError as error:
        print(json.dumps(str(error)), file=sys.stderr, flush=True)
        code = 71
    os._exit(code)

codes = [child(f"{folder}/{out}", how, value) for out, how, value in attempts]
print(json.dumps(codes))
"""


def run(folder: Path, attempts: list[tuple[str, str, float]]) -> tuple[list[int], str]:
    import json

    (folder / "recipe.toml").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(attempts)],
        capture_output=True, text=True, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


def contents(folder: Path) -> dict[str, object]:
    volatile = {"pairs_per_s", "seconds"}
    log = [{k: v for k, v in r.items() if k not in volatile} for r in read_jsonl(folder / "results.jsonl")]
    weights = [(folder / f).read_bytes() for f in ("last.safetensors", "best.safetensors", "model/model.safetensors")]
    return {
        "log": log,
        "weights": weights,
        "files": sorted(p.name for p in folder.rglob("*")),
        "training": read_model_dir(folder / "model").training,
    }


@pytest.mark.slow
def test_a_run_survives_everything_bit_for_bit(tmp_path):
    kills = [("cut", "call", n) for n in (2, 25, 61, 34, 118, 47)] + [("cut", "time", 0.4), ("cut", "time", 0.9)]
    attempts = [("whole", "first", 0), *kills, ("cut", "int", 2), ("cut", "full", 60_000), ("cut", "go on", 0)]
    codes, errors = run(tmp_path, attempts)
    assert codes[0] == codes[-1] == 0, errors
    assert codes[1:-3].count(-9) >= 5, codes
    assert codes[-3] in (70, 0), "Ctrl-C raises KeyboardInterrupt and nothing else"
    assert codes[-2] in (71, 0)
    assert str(tmp_path) not in errors
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before_it(tmp_path):
    limit = 10_000  # fewer bytes than a checkpoint, more than the log
    codes, errors = run(tmp_path, [("run", "int", 3), ("run", "full", limit)])
    assert codes == [70, 71]
    assert "last.safetensors" in errors or "best.safetensors" in errors
    assert "kept" in errors
    assert read_position(tmp_path / "run" / "last.safetensors").step == 2
    assert not list((tmp_path / "run").glob(".*.part"))
