"""A stage that was killed anywhere goes on to the same bits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from chiasm.distill.recipe import BackboneConfig, DistillData, DistillRecipe, FuseConfig, StageConfig, SyntheticConfig
from chiasm.distill.stages import Surroundings, run_arm
from chiasm.distill.synthetic import make_synthetic
from chiasm.encoders.base import LoraConfig
from chiasm.errors import TrainingError

SMALL = SyntheticConfig(train=20, test=4, reports=20, width=8, text_dim=5)
STAGE = {"steps": 5, "batch_size": 7, "lr": 1e-2, "eval_every": 2, "checkpoint_every": 1}


class Killed(Exception):
    pass


class KillAt:
    """A progress bar that dies after so many steps of one stage."""

    def __init__(self, stage, step):
        self.stage, self.left = stage, step

    def start(self, total, description):
        self.active = description == self.stage

    def advance(self, n=1, **fields):
        if self.active and fields:
            self.left -= 1
            if self.left == 0:
                raise Killed

    def finish(self):
        pass


@pytest.fixture(scope="module")
def drawn():
    return make_synthetic(SMALL, seed=0)


def make_recipe(lora=None, **fuse):
    return DistillRecipe(
        name="small", data=DistillData(synthetic=SMALL), unimodal=StageConfig(**STAGE), text=StageConfig(**STAGE),
        fuse=FuseConfig(**(STAGE | {"monitor": "val_ce"} | fuse)), backbone=BackboneConfig(lora=lora),
    )  # fmt: skip


RECIPES = {
    "batches": make_recipe(),
    "full": make_recipe(batch_size="full", schedule="constant"),
    "warm-up": make_recipe(kd_warmup_steps=3),
    "sgd": make_recipe(optimizer="sgd", clip_norm=0.5),
    "adamw": make_recipe(optimizer="adamw", kd_schedule="fall"),
    "adapters": make_recipe(lora=LoraConfig(rank=2, dropout=0.2), steps=3),
}


def same(one, other):
    assert one.state.keys() == other.state.keys()
    for name in one.state:
        assert torch.equal(one.state[name], other.state[name]), name
    assert (one.curve, one.best_step, one.metrics) == (other.curve, other.best_step, other.metrics)


@pytest.mark.parametrize("name", RECIPES)
def test_a_stage_killed_after_any_step_ends_alike(name, drawn, tmp_path):
    problem, sources = drawn
    recipe, pairs = RECIPES[name], sources.given["pairs"]
    whole = run_arm(problem, pairs, "clip_it", recipe, seed=0).final
    total = recipe.fuse.steps + recipe.fuse.kd_warmup_steps
    for step in range(1, total + 1):
        around = Surroundings(cache=tmp_path / str(step), progress=KillAt("fuse", step))
        with pytest.raises(Killed):
            run_arm(problem, pairs, "clip_it", recipe, seed=0, around=around)
        part = [p for p in around.cache.iterdir() if ".part" in p.name]
        assert len(part) == (1 if step > 1 else 0)  # the step that killed was not saved
        found = run_arm(problem, pairs, "clip_it", recipe, seed=0, around=Surroundings(cache=around.cache))
        assert found.unimodal.reused
        assert not found.final.reused
        same(found.final, whole)
        assert not [p for p in around.cache.iterdir() if ".part" in p.name]


def test_weights_that_were_best_before_the_kill_are_kept(drawn, tmp_path):
    problem, sources = drawn
    recipe, pairs = make_recipe(lr=3.0, schedule="constant"), sources.given["pairs"]
    whole = run_arm(problem, pairs, "clip_it", recipe, seed=0).final
    assert whole.best_step == 0, "nothing after the kill is better"
    with pytest.raises(Killed):
        run_arm(problem, pairs, "clip_it", recipe, seed=0,
                around=Surroundings(cache=tmp_path, progress=KillAt("fuse", 4)))  # fmt: skip
    same(run_arm(problem, pairs, "clip_it", recipe, seed=0, around=Surroundings(cache=tmp_path)).final, whole)


@pytest.mark.parametrize("stage", ["unimodal", "text"])
def test_the_other_stages_go_on_too(stage, drawn, tmp_path):
    problem, sources = drawn
    pairs, recipe = sources.given["pairs"], RECIPES["batches"]
    whole = run_arm(problem, pairs, "clip_it", recipe, seed=0)
    around = Surroundings(cache=tmp_path, progress=KillAt(stage, 4))
    with pytest.raises(Killed):
        run_arm(problem, pairs, "clip_it", recipe, seed=0, around=around)
    found = run_arm(problem, pairs, "clip_it", recipe, seed=0, around=Surroundings(cache=tmp_path))
    same(getattr(found, stage), getattr(whole, stage))
    same(found.final, whole.final)


def test_it_goes_on_instead_of_starting_anew(drawn, tmp_path):
    problem, sources = drawn
    recipe = RECIPES["batches"]
    with pytest.raises(Killed):
        run_arm(problem, sources.given["pairs"], "clip_it", recipe, seed=0,
                around=Surroundings(cache=tmp_path, progress=KillAt("fuse", 4)))  # fmt: skip
    counter = KillAt("fuse", 99)
    run_arm(problem, sources.given["pairs"], "clip_it", recipe, seed=0,
            around=Surroundings(cache=tmp_path, progress=counter))  # fmt: skip
    assert 99 - counter.left == 2  # steps 4 and 5


def test_damaged_files_are_made_again(drawn, tmp_path):
    problem, sources = drawn
    pairs, recipe, around = sources.given["pairs"], RECIPES["batches"], Surroundings(cache=tmp_path)
    whole = run_arm(problem, pairs, "clip_it", recipe, seed=0, around=around)
    content = whole.final.path.read_bytes()
    for damage in (b"", b"junk", content[: len(content) // 2], b"\xff" * 8 + content[8:]):
        whole.final.path.write_bytes(damage)
        whole.final.path.with_name(f"fuse-{whole.final.key}.part.safetensors").write_bytes(damage)
        found = run_arm(problem, pairs, "clip_it", recipe, seed=0, around=around)
        assert not found.final.reused
        same(found.final, whole.final)


def test_a_disk_that_cannot_be_written_is_said(drawn, tmp_path):
    (tmp_path / "file").write_text("")
    around = Surroundings(cache=tmp_path / "file")
    with pytest.raises(TrainingError, match="cannot be written"):
        run_arm(drawn[0], None, "unimodal", RECIPES["batches"], seed=0, around=around)


SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from chiasm.distill.recipe import BackboneConfig, DistillData, DistillRecipe, FuseConfig, StageConfig, SyntheticConfig
from chiasm.distill.stages import Surroundings, run_arm
from chiasm.distill.synthetic import make_synthetic

STAGE = dict(steps=5, batch_size=7, lr=1e-2, eval_every=2, checkpoint_every=1)
small = SyntheticConfig(train=20, test=4, reports=20, width=8, text_dim=5)
recipe = DistillRecipe(
    name="small", data=DistillData(synthetic=small), unimodal=StageConfig(**STAGE), text=StageConfig(**STAGE),
    fuse=FuseConfig(**STAGE, kd_warmup_steps=3),
)
problem, sources = make_synthetic(small, seed=0)

def train(cache, kill_at):
    calls = [0]
    def wrapped(call):
        def inner(*a, **k):
            for when in ("before", "after"):
                calls[0] += 1
                if calls[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if when == "before":
                    result = call(*a, **k)
            return result
        return inner
    real = os.replace, os.fsync
    os.replace, os.fsync = map(wrapped, real)
    found = run_arm(problem, sources.given["pairs"], "clip_it", recipe, seed=0, around=Surroundings(cache=cache)).final
    os.replace, os.fsync = real
    return found, calls[0]
"""

PARENT = """
import tempfile
from pathlib import Path
import safetensors.torch
# Slow lazy imports once, before forking.
torch.use_deterministic_algorithms(False)
warm = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], fused=True)
warm.zero_grad(); warm.step(); warm.state_dict()
def child(folder, kill_at):
    pid = os.fork()
    if pid == 0:
        # No backward pass ran in the parent, whose threads would not survive a fork.
        train(folder, kill_at)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
killed, kill_at = 0, 3
with tempfile.TemporaryDirectory() as base:
    base = Path(base)
    while True:
        folder = base / str(kill_at)
        code = child(folder, kill_at)
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        killed += 1
        kill_at += 17
    finished = sorted(p.name for p in folder.iterdir())
    wanted = [p.read_bytes() for p in sorted(folder.iterdir())]
    for other in range(3, kill_at, 17):
        assert child(base / str(other), -1) == 0
    import json
    from safetensors import safe_open
    def content(path):
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["chiasm"])
            header["position"].pop("seconds")
            return {n: file.get_tensor(n) for n in file.keys()}, header
    for other in range(3, kill_at, 17):
        names = sorted(p.name for p in (base / str(other)).iterdir())
        assert names == finished, (other, names)
        for name in names:
            (a, one), (b, two) = content(folder / name), content(base / str(other) / name)
            assert one == two, (other, name)
            assert all(torch.equal(a[n], b[n]) for n in a) and a.keys() == b.keys(), (other, name)
print("killed", killed)
"""


@pytest.mark.slow
def test_sigkill_in_the_middle_of_a_write_loses_nothing():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + PARENT], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 4
