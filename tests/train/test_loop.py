from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.errors import CheckpointError, ConfigError, InputError, TrainingError
from chiasm.io.manifest import read_jsonl
from chiasm.train.checkpoint import read_position
from chiasm.train.contrastive import ContrastiveTask
from chiasm.train.distributed import Group
from chiasm.train.loop import Loop, Plan, ordered_batches
from chiasm.train.recipe import LossConfig, OptimConfig, RunConfig, TrainConfig
from chiasm.types import Preprocess


def config(**kw):
    run = {"save_every": 2, "log_every": 1, **kw.pop("run", {})}
    optim = {"lr": 3e-3, "epochs": 3, "batch_size": 8, **kw}
    return TrainConfig(seed=1, loss=LossConfig(positives="none"), optim=OptimConfig(**optim), run=RunConfig(**run))


def train(model, source, out, settings, *, resume=False, validate=None, progress=None):
    loop = Loop(ContrastiveTask(model, config=settings), source, config=settings, out=out, validate=validate)
    return loop.run(resume=resume, progress=progress)


class Stop(BaseException):
    """Stands for whatever ends a run from outside."""


class Bell:
    """A progress that raises after ``n`` steps."""

    def __init__(self, n, error):
        self.n, self.error, self.seen = n, error, []

    def start(self, total, description):
        self.total = total

    def advance(self, n=1, **fields):
        self.seen.append((n, fields))
        if fields:
            self.n -= 1
            if self.n == 0:
                raise self.error

    def finish(self):
        self.finished = True


def same_weights(a, b):
    return all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def test_the_loss_goes_down(tiny, colour_pairs, tmp_path):
    result = train(tiny(), colour_pairs(64), tmp_path, config(epochs=12, run={"save_every": 0}))
    lines = read_jsonl(tmp_path / "results.jsonl")
    losses = [r["loss"] for r in lines if r["kind"] == "train"]
    assert result.steps == len(losses) == 96
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])
    assert {"step", "lr", "grad_norm", "epoch", "logit_scale", "pairs_per_s", "seconds"} <= lines[0].keys()
    assert result.best.exists()
    assert (tmp_path / "last.safetensors").exists()


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2}, {"grad_cache_chunk": 3}, {"precision": "bf16"}],
    ids=["plain", "accumulate", "gradcache", "bf16"],
)
@pytest.mark.parametrize("stop", [1, 5])
def test_resume_is_bit_identical(tiny, colour_pairs, tmp_path, settings, stop):
    source, settings = colour_pairs(44), config(**settings)
    whole = tiny()
    train(whole, source, tmp_path / "whole", settings)
    with pytest.raises(Stop):
        train(tiny(), source, tmp_path / "cut", settings, progress=Bell(stop, Stop()))
    torch.manual_seed(1234)  # the state of the caller's generator must not matter
    resumed = tiny()
    train(resumed, source, tmp_path / "cut", settings, resume=True)
    assert same_weights(whole, resumed)
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    steps = [r["step"] for r in read_jsonl(tmp_path / "cut" / "results.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "every step is logged once"


def test_resume_keeps_the_layout_of_convolutions(colour_pairs, tmp_path):
    """Fused AdamW walks parameter, gradient and state by address: states of another layout would be mixed up."""
    towers = EncoderConfig(
        ImageTowerConfig(kind="resnet", width=8, layers=(1, 1), heads=2, image_size=16),
        TextTowerConfig(context_length=4, vocab_size=64, width=16, layers=1, heads=2), ProjectionConfig(dim=8),
        tokenizer={"kind": "clip", "context_length": 4}, preprocess=Preprocess(size=16),
    )  # fmt: skip

    def make():
        return build_encoder_model(towers, seed=0).to(memory_format=torch.channels_last)

    source, settings = colour_pairs(32), config()
    whole, cut = make(), make()
    train(whole, source, tmp_path / "whole", settings)
    with pytest.raises(Stop):
        train(make(), source, tmp_path / "cut", settings, progress=Bell(4, Stop()))
    train(cut, source, tmp_path / "cut", settings, resume=True)
    assert same_weights(whole, cut)
    assert all(a.stride() == b.stride() for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_seeds_and_threads(tiny, colour_pairs, tmp_path):
    source = colour_pairs(40)
    models = []
    for i, workers in enumerate((0, 1, 3)):
        model = tiny()
        train(model, source, tmp_path / str(i), config(run={"workers": workers}))
        models.append(model)
    assert same_weights(models[0], models[1])
    assert same_weights(models[0], models[2])


def test_the_callers_generator_is_left_alone(tiny, colour_pairs, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = tiny()
    train(model, colour_pairs(16), tmp_path, config(epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_ctrl_c_keeps_the_last_checkpoint_and_says_nothing(tiny, colour_pairs, tmp_path, capfd):
    bell = Bell(5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), colour_pairs(32), tmp_path, config(), progress=bell)
    assert read_position(tmp_path / "last.safetensors").step == 4
    assert bell.finished
    assert capfd.readouterr() == ("", "")


class Poisoned:
    def __init__(self, source, at, value):
        self.source, self.at, self.value, self.calls = source, at, value, 0

    def __len__(self):
        return len(self.source)

    def batch(self, indices, rng):
        pairs = self.source.batch(indices, rng)
        self.calls += 1
        if self.calls == self.at:
            pairs.pixels[0, 0, 0, 0] = self.value
        return pairs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_the_checkpoint_kept(tiny, colour_pairs, tmp_path, value):
    model = tiny()
    source = Poisoned(colour_pairs(32), 4, value)
    with pytest.raises(
        TrainingError, match=r"the loss is not a number at step 4; the checkpoint of step 2 is kept"
    ) as e:
        train(model, source, tmp_path, config(run={"workers": 0}))
    assert "optim.lr" in e.value.hint
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert read_position(tmp_path / "last.safetensors").step == 2


def test_a_gradient_that_is_no_number_stops(tiny, colour_pairs, tmp_path):
    model = tiny()
    model.visual.proj.register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainingError, match="the gradient is not a number at step 1; no checkpoint"):
        train(model, colour_pairs(32), tmp_path, config())


def test_resuming_another_run_is_refused(tiny, colour_pairs, tmp_path):
    train(tiny(), colour_pairs(16), tmp_path, config(epochs=1))
    with pytest.raises(CheckpointError, match="another recipe or other data"):
        train(tiny(), colour_pairs(16), tmp_path, config(epochs=1, lr=1e-4), resume=True)
    with pytest.raises(CheckpointError):
        train(tiny(), colour_pairs(24), tmp_path, config(epochs=1), resume=True)


def test_resuming_a_finished_run_trains_no_further(tiny, colour_pairs, tmp_path):
    first = train(tiny(), colour_pairs(16), tmp_path, config())
    before = (tmp_path / "last.safetensors").read_bytes()
    again = train(tiny(), colour_pairs(16), tmp_path, config(), resume=True)
    assert (again.steps, again.best_step) == (first.steps, first.best_step)
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_resume_without_a_checkpoint_starts(tiny, colour_pairs, tmp_path):
    assert train(tiny(), colour_pairs(16), tmp_path, config(), resume=True).steps == 6


def test_selection_keeps_the_best_and_patience_ends(tiny, colour_pairs, tmp_path):
    scores = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.9])
    settings = config(epochs=6, run={"patience": 3, "select": "recall_at_1"})
    result = train(tiny(), colour_pairs(16), tmp_path, settings, validate=lambda: {"recall_at_1": next(scores)})
    assert result.stopped_early
    assert result.metrics == {"recall_at_1": 0.5}
    assert result.best_step == 4
    assert result.steps == 10
    position = read_position(tmp_path / "best.safetensors")
    assert (position.step, position.best) == (4, 0.5)


def test_selection_of_a_loss_takes_the_lowest_and_nan_never_wins(tiny, colour_pairs, tmp_path):
    scores = iter([float("nan"), 2.0, 1.0])
    settings = config(run={"select": "loss"})
    result = train(tiny(), colour_pairs(16), tmp_path, settings, validate=lambda: {"loss": next(scores)})
    assert result.metrics == {"loss": 1.0}
    with pytest.raises(ConfigError, match="validation did not return"):
        train(tiny(), colour_pairs(16), tmp_path, settings, validate=lambda: {"recall": 1.0})


def test_too_few_rows(tiny, colour_pairs, tmp_path):
    with pytest.raises(InputError, match="too few"):
        train(tiny(), colour_pairs(1), tmp_path, config())


@hypothesis_settings(deadline=None)
@given(rows=st.integers(2, 60), batch=st.integers(2, 30), start=st.integers(0, 12), seed=st.integers(0, 3))
def test_batches_depend_on_their_number_only(rows, batch, start, seed):
    class Rows:
        def __len__(self):
            return rows

        def batch(self, indices, rng):
            return [*indices.tolist(), int(rng.integers(1 << 30))]

    settings = TrainConfig(optim=OptimConfig(batch_size=batch))
    plan = Plan.of(rows, settings, Group())
    take = plan.per_epoch + 3

    def first(n, begin):
        stream = ordered_batches(Rows(), plan, seed=seed, start=begin, workers=0, group=Group())
        return [next(stream) for _ in range(n)]

    everything = first(start + take, 0)
    assert first(take, start) == everything[start:]
    epoch = [i for b in everything[: plan.per_epoch] for i in b[:-1]]
    assert len(set(epoch)) == len(epoch) == plan.per_epoch * plan.batch_size
    assert all(len(b) == plan.batch_size + 1 for b in everything)


def test_ranks_share_a_batch_without_overlap():
    class Rows:
        def __len__(self):
            return 24

        def batch(self, indices, rng):
            return indices.tolist()

    settings = TrainConfig(optim=OptimConfig(batch_size=8))
    whole = Plan.of(24, settings, Group())
    single = next(ordered_batches(Rows(), whole, seed=0, start=1, workers=0, group=Group()))
    parts = [
        next(ordered_batches(Rows(), Plan.of(24, settings, g), seed=0, start=1, workers=0, group=g))
        for g in (Group(0, 2), Group(1, 2))
    ]
    assert parts[0] + parts[1] == single
    with pytest.raises(ConfigError, match="cannot share evenly"):
        next(ordered_batches(Rows(), whole, seed=0, start=0, workers=0, group=Group(0, 3)))


KILL = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from conftest import ColourPairs, tiny_config
from chiasm.encoders.build import build_encoder_model
from chiasm.train.contrastive import ContrastiveTask
from chiasm.train.loop import Loop
from chiasm.train.recipe import LossConfig, OptimConfig, RunConfig, TrainConfig
import chiasm.train.checkpoint as checkpoint

out, kills = sys.argv[1], [int(k) for k in sys.argv[2:]]
settings = TrainConfig(
    optim=OptimConfig(lr=3e-3, steps=5, batch_size=8, accumulate=2), run=RunConfig(save_every=1, log_every=1, workers=1)
)

def train(folder, resume, kill_at):
    calls = [0]
    def tick():
        # Every system call that a checkpoint makes is a place to die at, before it and after it.
        calls[0] += 1
        if calls[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    real = dict(replace=os.replace, fsync=os.fsync, open=os.open)
    def wrapped(f):
        def call(*a, **k):
            tick(); r = f(*a, **k); tick(); return r
        return call
    for name, f in real.items():
        setattr(os, name, wrapped(f))
    model = build_encoder_model(tiny_config(), seed=0)
    Loop(ContrastiveTask(model, config=settings), ColourPairs(40), config=settings, out=folder).run(resume=resume)

def child(*a):
    pid = os.fork()
    if pid == 0:
        train(*a)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

# Lazy imports once, before forking; no backward pass, whose threads would not survive a fork.
import safetensors.torch
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.zeros(2)
torch.optim.AdamW([parameter], fused=True).step()
with torch.random.fork_rng(devices=[]):
    build_encoder_model(tiny_config(), seed=0)

assert child(out + "/whole", False, 0) == 0
codes = [child(out + "/cut", True, k) for k in kills]
codes.append(child(out + "/cut", True, 0))
print(codes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_any_call_then_resume_is_bit_identical(tmp_path):
    script = KILL.format(tests=str(Path(__file__).parent))
    kills = [1, 9, 14, 22, 3, 18, 27, 5, 33, 12]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), *map(str, kills)],
        capture_output=True, text=True, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    codes = [int(c) for c in done.stdout.strip("[]\n").split(",")]
    assert codes[-1] == 0
    assert codes.count(-9) >= 5, codes
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for name in ("last.safetensors", "best.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())
    volatile = {"pairs_per_s", "seconds"}
    lines = [
        [{k: v for k, v in r.items() if k not in volatile} for r in read_jsonl(f / "results.jsonl")]
        for f in (whole, cut)
    ]
    assert lines[0] == lines[1]
