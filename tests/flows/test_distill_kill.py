"""A distillation that is killed, filled up or interrupted anywhere ends, after ``--resume``, with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"), pytest.mark.slow]

RECIPE = """
name = "killed"
[data]
phantoms = "tissue"
patients = 14
phantom_size = 32
label = "tumour"
validation = 0.25
test = 0.25
[pairing]
encoder = "./retriever"
phantom_reports = 8
top_k = 3
temperature = 0.1
[backbone]
lora = { rank = 2 }
augment = { preset = "histology" }
[backbone.image]
image_size = 32
patch_size = 16
width = 16
layers = 1
heads = 2
[unimodal]
steps = 4
batch_size = 8
checkpoint_every = 1
[text]
steps = 4
batch_size = 8
checkpoint_every = 2
[fuse]
steps = 4
batch_size = 8
checkpoint_every = 1
kd_warmup_steps = 1
"""

# One interpreter imports torch once and forks a child per attempt, so that many kills cost little.
SCRIPT = """
import json, os, resource, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from chiasm.errors import ChiasmError
from chiasm.distill.controls import run_controls
from chiasm.distill.recipe import load_distill_recipe
from chiasm.distill.run import distill
import chiasm.data.phantoms, chiasm.encoders.adapters, chiasm.load, safetensors.torch, chiasm.data.tokenizers, peft
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.zeros(2)
torch.optim.Adam([parameter], fused=True).step()

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
    for name in ("replace", "fsync"):
        setattr(os, name, wrapped(getattr(os, name)))

def die_after(seconds):
    def later():
        time.sleep(seconds); os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=later, daemon=True).start()

def child(out, how, value):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if how == "call": die_at_call(value)
    if how == "time": die_after(value)
    if how == "full": resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))
    code = 0
    try:
        recipe = load_distill_recipe(folder + "/recipe.toml")
        if out.startswith("controls"):
            run_controls(recipe, out=folder + "/" + out, seeds=2, arms=["clip_it"], resume=how != "first")
        else:
            distill(recipe, out=folder + "/" + out, resume=how != "first")
    except ChiasmError as error:
        print(json.dumps(str(error)), file=sys.stderr, flush=True)
        code = 71
    os._exit(code)

print(json.dumps([child(*attempt) for attempt in attempts]))
"""


KILLS = [("cut", "call", n) for n in (3, 14, 31, 45, 12)] + [("cut", "time", 0.3)]
ATTEMPTS = {
    "run": [("whole", "first", 0), *KILLS, ("cut", "full", 9_000), ("cut", "go on", 0)],
    "controls": [
        ("controls", "first", 0), *(("controls-cut", "call", n) for n in (30, 41)), ("controls-cut", "go on", 0),
    ],
    "full": [("full", "full", 3_000)],
    "full, later": [("full", "go on", 0)],
}  # fmt: skip


class Outcome(NamedTuple):
    folder: Path
    codes: dict[str, list[int]]
    errors: str


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All attempts, one after the other in one interpreter."""
    from chiasm.load import save_encoder
    from chiasm.testing import TinyEncoder

    folder = tmp_path_factory.mktemp("kill")
    save_encoder(TinyEncoder(0, context_length=64), folder / "retriever")
    (folder / "recipe.toml").write_text(RECIPE)
    every = [attempt for attempts in ATTEMPTS.values() for attempt in attempts]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(every)],
        capture_output=True, text=True, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    codes = iter(json.loads(done.stdout))
    return Outcome(folder, {name: [next(codes) for _ in found] for name, found in ATTEMPTS.items()}, done.stderr)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that must not differ; stages hold the seconds they took."""
    kept = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != "stages"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept} | {
        p.name: b"" for p in folder.glob("stages/*") if p.is_file()
    }


def test_a_run_survives_everything_bit_for_bit(outcome):
    codes = outcome.codes["run"]
    assert codes[0] == codes[-1] == 0, outcome.errors
    assert codes[1:-2].count(-9) >= 4, codes
    assert codes[-2] in (71, 0)
    assert contents(outcome.folder / "cut") == contents(outcome.folder / "whole")


def test_controls_survive_everything_bit_for_bit(outcome):
    codes = outcome.codes["controls"]
    assert codes[0] == codes[-1] == 0, outcome.errors
    assert codes[1:-1].count(-9) >= 2, codes
    assert contents(outcome.folder / "controls-cut") == contents(outcome.folder / "controls")


def test_a_full_disk_is_told_and_nothing_is_left_half_written(outcome):
    assert outcome.codes["full"] == [71], outcome.errors
    assert "free some space" in outcome.errors
    assert str(outcome.folder) not in outcome.errors
    assert outcome.codes["full, later"] == [0], outcome.errors
    assert not [p for p in (outcome.folder / "full").rglob("*.part") if p.is_file()]
