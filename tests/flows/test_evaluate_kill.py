"""Run a suite, stop it by kill -9 and Ctrl-C at random moments, go on: the cells are those of an undisturbed run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

#: The command in a process of its own, slow enough that a kill falls into the work.
RUN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch
torch.set_num_threads(1)
from chiasm.encoders.base import Encoder
real = Encoder.encode_image
def slow(self, pixels, normalize=False):
    time.sleep(0.01 * len(pixels))
    return real(self, pixels, normalize)
Encoder.encode_image = slow
from chiasm.evaluate.suite import run
write = run.write_cell
def slow_write(*words):
    time.sleep(0.1)
    write(*words)
run.write_cell = slow_write
from chiasm.cli.main import app
app(sys.argv[1:])
"""
SUITE = """
n_resamples = 20
n_permutations = 20
near_duplicates = false
[models.one]
source = "one"
[models.two]
source = "two"
[data.films]
source = "films/table.csv"
labels = ["cardiomegaly", "effusion"]
truth = "*"
fractions = { train = 0.5, test = 0.5 }
[tasks.zero_shot]
[tasks.prototype]
[tasks.retrieval]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from chiasm.data.phantoms import make_chest_phantoms
    from chiasm.load import save_encoder
    from chiasm.testing import TinyEncoder

    for seed, name in enumerate(("one", "two")):
        save_encoder(TinyEncoder(seed), tmp_path / name)
    (tmp_path / "films").mkdir()
    make_chest_phantoms(50, seed=2, size_px=32).save(tmp_path / "films")
    (tmp_path / "suite.toml").write_text(SUITE)
    return tmp_path


def start(folder: Path, out: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", RUN, "evaluate", str(folder / "suite.toml"), "--out", str(folder / out), "--json"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder: Path, out: str) -> dict[str, Any]:
    process = start(folder, out)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(printed)
    return found


def plain(document: dict[str, Any]) -> list[Any]:
    dropped = ("cached", "run_card")
    return [{k: v for k, v in c.items() if k not in dropped} for c in document["cells"]] + document["tests"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_suite_goes_on(folder: Path, how: signal.Signals) -> None:
    whole = finish(folder, "whole")
    times = random.Random(int(how))
    stopped = 0
    for _ in range(6):
        process = start(folder, "killed")
        # Past the imports, which leave nothing behind that could be resumed.
        began = time.monotonic()
        while not (folder / "killed" / "settings.json").exists() and time.monotonic() - began < 60:
            time.sleep(0.05)
        time.sleep(times.uniform(0.2, 3.0))
        if process.poll() is None:
            process.send_signal(how)
            stopped += 1
        process.communicate(timeout=60)
    assert stopped
    rest = finish(folder, "killed")
    assert plain(rest) == plain(whole)
    assert not list((folder / "killed").rglob("*.tmp"))
    assert finish(folder, "killed")["embedded"] == []
