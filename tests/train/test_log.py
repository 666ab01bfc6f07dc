from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import MissingExtra
from chiasm.io.manifest import read_jsonl
from chiasm.train.log import RunLog, TensorBoardSink, WandbSink, open_log


class Heard:
    def __init__(self):
        self.records = []
        self.closed = False

    def write(self, kind, step, values):
        self.records.append((kind, step, dict(values)))

    def close(self):
        self.closed = True


def test_every_sink_hears_everything_and_is_closed_also_after_an_error():
    one, two = Heard(), Heard()

    def interrupted():
        with RunLog([one, two]) as log:
            log.write("train", 1, {"loss": 2.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert one.records == two.records == [("train", 1, {"loss": 2.0})]
    assert one.closed
    assert two.closed


def test_lines_are_json_also_for_numbers_that_json_lacks(tmp_path):
    with open_log(tmp_path, []) as log:
        log.write("train", 1, {"loss": float("nan"), "lr": 1e-3})
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line) == {"kind": "train", "step": 1, "loss": None, "lr": 1e-3}


@settings(deadline=None, max_examples=30)
@given(steps=st.lists(st.integers(1, 9), max_size=12), after=st.integers(0, 10), torn=st.booleans())
def test_resuming_drops_the_lines_of_later_steps_only(tmp_path_factory, steps, after, torn):
    folder = tmp_path_factory.mktemp("log")
    steps = sorted(steps)
    with open_log(folder, []) as log:
        for step in steps:
            log.write("train", step, {"loss": float(step)})
    path = folder / "results.jsonl"
    if torn:
        with path.open("ab") as file:
            file.write(b'{"kind": "train", "st')
    with open_log(folder, [], after=after) as log:
        log.write("train", after + 1, {"loss": 0.0})
    assert [r["step"] for r in read_jsonl(path)] == [s for s in steps if s <= after] + [after + 1]


def test_trackers_that_are_not_installed_are_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(MissingExtra) as caught:
            open_log(tmp_path, [name])
        assert caught.value.package == name
        assert "chiasm[track]" in str(caught.value)
    assert not (tmp_path / "results.jsonl").exists()
    with pytest.raises(MissingExtra):
        WandbSink(tmp_path, name="x", config={})
    with pytest.raises(MissingExtra):
        TensorBoardSink(tmp_path)


def test_tensorboard_holds_every_number_once_also_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, ["tensorboard"]) as log:
        for step in (1, 2, 3, 4):
            log.write("train", step, {"loss": float(step), "lr": 0.5})
        log.write("validation", 4, {"loss": 9.0})
    with open_log(tmp_path, ["tensorboard"], after=2) as log:
        log.write("train", 3, {"loss": 30.0, "lr": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/lr", "validation/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [e.value for e in events.Scalars("train/lr")] == [0.5, 0.5, 0.25]
    assert not events.Scalars("validation/loss"), "what came after the checkpoint is gone, as from results.jsonl"
    assert [r["step"] for r in read_jsonl(tmp_path / "results.jsonl")] == [1, 2, 3]


def test_wandb_goes_on_with_the_run_that_it_knows(tmp_path, monkeypatch):
    """A stand-in for the package, which starts a service of its own."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    def init(**options):
        calls.append(("init", options))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    with open_log(tmp_path, ["wandb"], run_name="pcam", config={"digest": "abc"}) as log:
        log.write("train", 3, {"loss": 2.0})
    (_, options), *rest = calls
    assert (options["id"], options["resume"], options["dir"]) == ("pcam-abc", "allow", str(tmp_path))
    assert options["config"] == {"digest": "abc"}
    assert rest == [("log", 3, {"train/loss": 2.0}), ("finish",)]


def test_the_extra_that_an_error_names_installs_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"tensorboard", "wandb"} <= set(extras["track"])
    pinned = (Path(__file__).parents[2] / "constraints.txt").read_text().lower()
    assert all(f"\n{name}==" in pinned for name in ("tensorboard", "wandb"))
