"""A bare backbone is never guessed; the error names those that it could be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from chiasm.encoders.fitting import fitting_hint, fitting_models
from chiasm.errors import CheckpointError
from chiasm.load import load


def vit(width: int, patch: int, layers: int, *, registers: int = 0, grid: int = 14) -> dict[str, Tensor]:
    """Names and shapes of a ViT of timm, in memory that is shared."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width), "pos_embed": (1, grid**2 + (not registers), width),
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    if registers:
        shapes["reg_token"] = (1, registers, width)
    for n in range(layers):
        shapes |= {
            f"blocks.{n}.mlp.fc1.weight": (4 * width, width), f"blocks.{n}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{n}.attn.qkv.weight": (3 * width, width),
        }  # fmt: skip
        if registers:
            shapes[f"blocks.{n}.ls1.gamma"] = (width,)
    return {k: torch.zeros(1).expand(s) for k, s in shapes.items()}


def test_shapes_narrow_the_choice() -> None:
    assert fitting_models(vit(384, 16, 12)) == ["kaiko-vits16", "dino-vits16", "lunit-vits16", "histo-vit"]
    assert fitting_models(vit(768, 8, 12, grid=28)) == ["kaiko-vitb8", "dino-vitb8", "histo-vit"]
    assert fitting_models(vit(1024, 14, 24, registers=4, grid=37)) == ["kaiko-vitl14", "dinov2-vitl14-reg", "histo-vit"]
    assert fitting_models(vit(64, 16, 2)) == ["histo-vit"]
    assert fitting_models({"x": torch.zeros(1)}) == []
    assert fitting_hint({"x": torch.zeros(1)}) is None


def test_load_refuses_to_guess(tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in vit(64, 16, 1).items()}
    torch.save(state, tmp_path / "some.pth")
    with pytest.raises(CheckpointError, match="`family=` one of `histo-vit`"):
        load(tmp_path / "some.pth")
