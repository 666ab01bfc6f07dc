"""Faster layouts change no result beyond rounding and survive saving."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from chiasm.checkpoints.containers import read_state_dict
from chiasm.testing import TinyEncoder
from chiasm.train.checkpoint import Position, load_checkpoint, save_checkpoint
from chiasm.train.machine import keep_freed_memory, prepare_for_training


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_layout_changes_no_result(kind: str, tmp_path: Path) -> None:
    encoder = TinyEncoder(0, kind=kind)
    side = encoder.config.image.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    before = encoder.encode_image(pixels).clone()
    state = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    prepare_for_training(encoder.model)
    torch.testing.assert_close(encoder.encode_image(pixels), before, rtol=1e-4, atol=1e-5)
    save_checkpoint(tmp_path / "c.safetensors", encoder.model, position=Position())
    load_checkpoint(tmp_path / "c.safetensors", encoder.model)
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert read_state_dict(tmp_path / "c.safetensors").tensors


def test_memory_is_kept_on_glibc() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
