"""timm's names of a ViT: what becomes of them, and what is refused. Parity with timm itself: tests/parity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.checkpoints.layouts import LAYOUTS, find_layout, read_parts
from chiasm.checkpoints.timm import is_timm_vit, plain_names, resize_positions, to_native
from chiasm.encoders.base import ImageTowerConfig
from chiasm.encoders.vit import VisionTransformer
from chiasm.errors import CheckpointError

WIDTH, PATCH, GRID = 16, 4, 4


def timm_state(*, registers: int = 0, scale: bool = False, class_position: bool = True) -> dict[str, Tensor]:
    """A ViT of two blocks with random weights under timm's names."""
    generator = torch.Generator().manual_seed(0)
    rows = GRID**2 + class_position
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, rows, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
    }  # fmt: skip
    if registers:
        shapes["reg_token"] = (1, registers, WIDTH)
    for n in range(2):
        b = f"blocks.{n}"
        for name, shape in {
            "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,), "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,),
            "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,),
            "attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,),
            "mlp.fc1.weight": (4 * WIDTH, WIDTH), "mlp.fc1.bias": (4 * WIDTH,),
            "mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,),
        }.items():  # fmt: skip
            shapes[f"{b}.{name}"] = shape
        if scale:
            shapes |= {f"{b}.ls1.gamma": (WIDTH,), f"{b}.ls2.gamma": (WIDTH,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def tower(**options: Any) -> VisionTransformer:
    config = ImageTowerConfig(
        image_size=PATCH * GRID, patch_size=PATCH, width=WIDTH, layers=2, heads=4, activation="gelu", pre_norm=False,
        ln_eps=1e-6, patch_bias=True, **options,
    )  # fmt: skip
    return VisionTransformer(config, None)


@pytest.mark.parametrize(
    "options", [{}, {"registers": 3, "class_position": False}, {"scale": True}], ids=["plain", "registers", "scale"]
)
def test_every_name_has_its_place(options: dict[str, Any]) -> None:
    state = timm_state(**options)
    native = to_native(state, {"image_size": PATCH * GRID, "patch_size": PATCH})
    model = tower(registers=options.get("registers", 0), layer_scale=options.get("scale", False))
    model.load_state_dict(native, strict=True)
    torch.testing.assert_close(model.transformer.resblocks[1].attn.in_proj_bias, state["blocks.1.attn.qkv.bias"])
    if not options.get("class_position", True):
        assert not model.positional_embedding[0].any()


def test_training_wraps_and_heads_are_dropped() -> None:
    state = {f"module.backbone.{k}": v for k, v in timm_state().items()}
    state |= {"module.head.mlp.0.weight": torch.zeros(2, 2), "mask_token": torch.zeros(1, WIDTH)}
    assert is_timm_vit(state)
    native = to_native(plain_names(state), {"image_size": PATCH * GRID, "patch_size": PATCH})
    tower().load_state_dict(native, strict=True)


def test_an_unknown_name_is_passed_on_for_the_strict_load() -> None:
    native = to_native(timm_state() | {"surprise": torch.zeros(1)}, {"image_size": 16, "patch_size": PATCH})
    with pytest.raises(RuntimeError, match="surprise"):
        tower().load_state_dict(native, strict=True)


def test_positions_are_resized_to_the_declared_input() -> None:
    native = to_native(timm_state(), {"image_size": 8 * PATCH, "patch_size": PATCH}, antialias=True)
    assert native["positional_embedding"].shape == (65, WIDTH)
    flat = torch.ones(17, 3)
    torch.testing.assert_close(resize_positions(flat, 7, antialias=True), torch.ones(50, 3))
    torch.testing.assert_close(resize_positions(flat, 7, antialias=False, offset=0.1), torch.ones(50, 3))
    with pytest.raises(CheckpointError, match="no square grid"):
        resize_positions(torch.ones(16, 3), 7, antialias=True)


def test_dino_samples_positions_at_a_grid_that_is_a_tenth_larger() -> None:
    """Its own rule, written out: row i lies at (i + ½) · side / (grid + 0.1) - ½, weights of Keys' cubic, a = -¾."""
    side, grid = 6, 4
    state = timm_state()
    state["pos_embed"] = torch.randn(1, side**2 + 1, WIDTH, generator=torch.Generator().manual_seed(3))
    found = resize_positions(state["pos_embed"][0], grid, antialias=False, offset=0.1)
    weights = torch.zeros(grid, side, dtype=torch.float64)
    for i in range(grid):
        place = (i + 0.5) * side / (grid + 0.1) - 0.5
        first = math.floor(place)
        for j in range(first - 1, first + 3):
            x = abs(place - j)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), side - 1)] += near if x <= 1 else far
    square = state["pos_embed"][0, 1:].double().reshape(side, side, WIDTH)
    expected = torch.einsum("ai,bj,ijw->abw", weights, weights, square).reshape(grid**2, WIDTH)
    torch.testing.assert_close(found[1:].double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(found[0], state["pos_embed"][0, 0])
    for wrong in ({"antialias": True}, {"antialias": False}):
        other = resize_positions(state["pos_embed"][0], grid, **wrong)
        assert float((other[1:] - expected).abs().max()) > 1e-2
    image = {"image_size": grid * PATCH, "patch_size": PATCH}
    converted = LAYOUTS["dino_vit"].convert(state, {"image": image})
    torch.testing.assert_close(converted["visual.positional_embedding"], found)


def test_reading_a_folder_and_a_foreign_file(tmp_path: Path) -> None:
    layout = LAYOUTS["timm_vit"]
    with pytest.raises(CheckpointError, match="lacks weights"):
        read_parts(tmp_path, layout)
    torch.save({"teacher": timm_state(), "student": timm_state(), "epoch": 3}, tmp_path / "dino.pth")
    assert set(read_parts(tmp_path, layout)) == set(timm_state())
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="not in the layout `timm_vit`"):
        read_parts(tmp_path / "x.pth", layout)
    assert find_layout(timm_state()) is layout
