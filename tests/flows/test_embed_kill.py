"""Embed images into a store, stop by kill -9 and Ctrl-C at random moments, go on: nothing lost, doubled or different."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chiasm.io.store import open_store
from chiasm.types import Modality

ROWS = 144
MODALITIES: tuple[Modality, ...] = ("image", "text")

#: The tiny real encoder, slow enough that a kill falls into the work.
RUN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs in the background has it ignored
import torch
torch.set_num_threads(1)
from chiasm import embed
from chiasm.datasets import load_table
from chiasm.encoders.base import Encoder
from chiasm.testing import TinyEncoder

class Slow(Encoder):
    def encode_image(self, pixels, normalize=False):
        time.sleep(0.002 * len(pixels))
        return super().encode_image(pixels, normalize)
    def encode_text(self, tokens, normalize=False):
        time.sleep(0.03)
        return super().encode_text(tokens, normalize)

tiny = TinyEncoder()
slow = Slow(tiny.model, tiny.config, name="slow")
embed.CHUNK_ROWS, embed.SORTED_BATCHES = 24, 3
class Tell:
    def start(self, total, description): print(description, total, flush=True)
    def advance(self, n=1, **fields): print("at", n, flush=True)
    def finish(self): pass
for path in sys.argv[2:]:
    done = embed.embed_to_store(slow, load_table(sys.argv[1]), path, batch_size=8, progress=Tell())
    print(done.sentence(), flush=True)
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    yy, xx = np.mgrid[:32, :32]
    rows = ["image,caption,patient_id"]
    (tmp_path / "images").mkdir()
    for i in range(ROWS):
        cx, cy, r = rng.uniform(8, 24), rng.uniform(8, 24), rng.uniform(3, 9)
        disc = 150 * ((xx - cx) ** 2 + (yy - cy) ** 2 < r * r) + rng.normal(50, 10, (32, 32))
        Image.fromarray(np.clip(disc, 0, 255).astype(np.uint8)).save(tmp_path / "images" / f"{i:03d}.png")
        rows.append(f"images/{i:03d}.png,disc {int(cx)} {i} px,p{i // 3}")
    (tmp_path / "images" / "017.png").write_bytes(b"torn")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "table.csv"


@pytest.mark.slow
def test_stopped_runs_resume_to_the_same_store(table: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, str(script), str(table), str(tmp_path / "store")]
    seed = random.SystemRandom().randrange(10**6)  # a new moment every time; shown when the test fails
    draw = random.Random(seed)
    for stage, batches, stop in (("images", 12, signal.SIGKILL), ("texts", 4, signal.SIGINT)):
        left, seen = draw.randrange(batches), ""
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            left -= line.startswith("at") if f"embedding {stage}" in seen else 0
            seen += line
            if left < 0:
                time.sleep(draw.uniform(0, 0.03))
                process.send_signal(stop)
                break
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == -stop, f"seed {seed}\n{errors}"
    stored = open_store(tmp_path / "store").count()
    assert f"interrupted: {stored} of {2 * ROWS} rows are stored; the same command goes on from there" in errors
    partly = {m: open_store(tmp_path / "store").read(m) for m in MODALITIES}
    assert len(partly["image"]) + len(partly["text"]) < 2 * ROWS - 1, f"seed {seed}"
    done = subprocess.run(
        [*command, str(tmp_path / "whole")], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert "1 row rejected" in done
    assert str(tmp_path) not in done
    for modality, part in partly.items():
        whole, resumed = (open_store(tmp_path / name).read(modality) for name in ("whole", "store"))
        assert len(whole) == (ROWS - 1 if modality == "image" else ROWS)
        for name in ("ids", "texts", "paths", "patients"):
            assert getattr(resumed, name) == getattr(whole, name), f"{name}, seed {seed}"
        np.testing.assert_array_equal(resumed.vectors, whole.vectors, err_msg=f"seed {seed}")
        assert part.ids == whole.ids[: len(part)]  # what a kill leaves is whole and right
        np.testing.assert_array_equal(part.vectors, whole.vectors[: len(part)])
