"""The sum of two standardised maps: equal weight whatever their units, a place rather than a pixel, and a clear refusal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from chiasm.errors import InputError
from chiasm.explain import combined
from chiasm.explain.combined import SMOOTHING, can_combine, combined_maps
from chiasm.explain.methods import METHODS, explain, methods_for
from chiasm.testing import TinyEncoder


class Tower(torch.nn.Module):
    """Stands for an image tower; the maps come from the patched partners."""


@pytest.fixture
def partners(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    maps = {"own": torch.rand(2, 4, 4, generator=draw), "occlusion": torch.rand(2, 8, 8, generator=draw)}
    monkeypatch.setattr(combined, "natural_method", lambda visual: "layer_cam")
    monkeypatch.setitem(combined._PARTNERS, "layer_cam", lambda *_: maps["own"])
    monkeypatch.setattr(combined, "occlusion_maps", lambda *_: maps["occlusion"])
    return maps


def run(side: int = 32) -> np.ndarray:
    return combined_maps(Tower(), torch.zeros(2, 3, side, side), torch.zeros(2, 5)).numpy()


def test_the_sum_by_hand(partners: dict[str, torch.Tensor]) -> None:
    total = np.zeros((2, 32, 32))
    for one in partners.values():
        large = F.interpolate(one[:, None], size=(32, 32), mode="bilinear")[:, 0].numpy()
        total += (large - large.mean((1, 2), keepdims=True)) / large.std((1, 2), keepdims=True)
    sigma = SMOOTHING * 32
    expected = [gaussian_filter(m, sigma, mode="mirror", truncate=round(3 * sigma) / sigma) for m in total]
    assert run() == pytest.approx(np.array(expected), abs=1e-5)


@pytest.mark.parametrize(("scale", "shift"), [(1000.0, 0.0), (1e-3, 0.01), (1.0, -7.0)])
def test_units_do_not_matter(partners: dict[str, torch.Tensor], scale: float, shift: float) -> None:
    before = run()
    partners["own"] = partners["own"] * scale + shift
    assert run() == pytest.approx(before, abs=2e-3)


def test_a_flat_map_leaves_the_other_its_word(partners: dict[str, torch.Tensor]) -> None:
    partners["occlusion"] = torch.full((2, 8, 8), 3.0)
    alone = run()
    assert np.isfinite(alone).all()
    partners["occlusion"] = torch.zeros(2, 8, 8)
    assert run() == pytest.approx(alone, abs=1e-6)
    partners["own"] = torch.zeros(2, 4, 4)
    assert run() == pytest.approx(np.zeros((2, 32, 32)))


def test_both_must_agree_to_win(partners: dict[str, torch.Tensor]) -> None:
    own, occlusion = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    own[:, 1, 1], own[:, 6, 6] = 1.0, 0.9
    occlusion[:, 1, 6], occlusion[:, 6, 6] = 1.0, 0.9
    partners |= {"own": own, "occlusion": occlusion}
    for one in run():
        row, column = np.unravel_index(one.argmax(), one.shape)
        assert row // 4 == column // 4 == 6


def test_a_grid_is_never_finer_than_the_picture(partners: dict[str, torch.Tensor]) -> None:
    assert run(16).shape == (2, 16, 16)
    assert run(224).shape == (2, 64, 64)


def test_it_is_offered_where_it_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    encoder = TinyEncoder()
    visual = encoder.model.image_side()
    assert can_combine(visual) == ("combined" in methods_for(encoder))
    if can_combine(visual):
        heat = explain(encoder, Image.new("L", (50, 40), 90), "a nodule", method="combined")
        assert heat.method == "combined"
    assert "combined" in METHODS
    monkeypatch.setattr(combined, "natural_method", lambda _: "occlusion")
    assert not can_combine(visual)
    with pytest.raises(InputError, match="whose own map it adds to occlusion"):
        combined_maps(visual, torch.zeros(1, 3, 32, 32), torch.zeros(1, 4))
