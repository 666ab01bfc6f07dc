"""A folder embedded in int8: the check on its first images is part of what the run reports."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.embed import embed_to_store
from chiasm.encoders.inference import gate
from chiasm.encoders.inference.gate import UncheckedPrecisionWarning
from chiasm.errors import PrecisionRefused
from chiasm.io.store import open_store
from chiasm.testing import TinyEncoder
from chiasm.types import Sample


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pictures(folder: Path, count: int) -> list[Sample]:
    draw, samples = np.random.default_rng(0), []
    for i in range(count):
        Image.fromarray(draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        samples.append(Sample(id=f"s{i}", image=folder / f"{i}.png"))
    return samples


def test_a_run_in_int8_says_how_far_off_it_was(tmp_path: Path) -> None:
    samples = pictures(tmp_path, 70)
    encoder = TinyEncoder()
    quantized = encoder.with_precision("int8")
    quantized.check_precision([Path(str(s.image)) for s in samples])
    done = embed_to_store(quantized, samples, tmp_path / "s", modalities=("image",))
    assert (done.precision, open_store(tmp_path / "s").metadata.precision) == ("int8", "int8")
    told: Any = done.to_dict()["precision_check"]
    assert (told["images"], told["complete"], told["passed"]) == (64, True, True)
    assert 0 < told["cos_error"] < told["cos_error_allowed"]
    assert "int8 was compared with float32 on 64 images: 1 - cosine at most" in done.sentence()
    exact = embed_to_store(encoder, samples, tmp_path / "p", modalities=("image",))
    assert exact.to_dict()["precision_check"] is None
    assert "compared" not in exact.sentence()
    ours, theirs = (open_store(tmp_path / name).read("image").vectors for name in ("s", "p"))
    assert 1e-7 < float((1 - (ours * theirs).sum(1)).max()) < 5e-4


def test_few_images_are_told_and_a_refusal_stores_nothing(tmp_path: Path) -> None:
    samples = pictures(tmp_path, 3)
    encoder = TinyEncoder()
    with pytest.warns(UncheckedPrecisionWarning, match="on 3 images so far"):
        few = embed_to_store(encoder.with_precision("int8"), samples, tmp_path / "s", modalities=("image",))
    told: Any = few.to_dict()["precision_check"]
    assert (told["images"], told["complete"]) == (3, False)
    tower: Any = encoder.model.visual
    with torch.no_grad():
        for block in tower.transformer.resblocks:
            block.ln_1.weight[3] *= 3000
            block.attn.in_proj_weight[:, 3] = 0.0
    with pytest.raises(PrecisionRefused, match="int8 does not suit this encoder and these images: of 3 images"):
        embed_to_store(encoder.with_precision("int8"), samples, tmp_path / "r", modalities=("image",))
    assert open_store(tmp_path / "r").count() == 0


def test_a_run_of_many_small_batches_gives_no_warning(tmp_path: Path) -> None:
    """The check is complete in the third batch: nothing is left to say."""
    samples = pictures(tmp_path, 70)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = embed_to_store(
            TinyEncoder().with_precision("int8"), samples, tmp_path / "s", modalities=("image",), batch_size=30
        )
    assert done.added == {"image": 70}
    told: Any = done.precision_check
    assert (told["images"], told["complete"]) == (64, True)
    assert open_store(tmp_path / "s").read("image").ids == tuple(s.id for s in samples)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_late_refusal_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """Refused at the 64th image, around the mean: the vectors of the first 63 must not stay behind."""
    monkeypatch.setattr(gate, "ALLOWED_CENTRED", -1.0)
    samples = pictures(tmp_path, 70)
    quantized = TinyEncoder().with_precision("int8")
    for _ in range(2):  # nor does it help to go on
        with pytest.raises(PrecisionRefused, match="of 64 images"):
            embed_to_store(quantized, samples, tmp_path / "s", modalities=("image",), batch_size=batch_size)
        assert open_store(tmp_path / "s").count() == 0
