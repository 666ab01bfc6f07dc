"""Regions compared with words: BioViL's heat map on the image, GLoRIA's similarity through an encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from chiasm.errors import InputError, UnknownName
from chiasm.evaluate.local_similarity import has_local_features, heat_map_on_image, text_heat_map
from chiasm.explain.methods import explain
from chiasm.explain.similarity import biovil_maps, patch_text_maps
from chiasm.testing import TinyEncoder, make_test_images


@pytest.mark.parametrize(("width", "height"), [(700, 512), (512, 901), (1023, 611), (480, 480)])
def test_margins_and_cells_of_the_heat_map(width: int, height: int) -> None:
    values = np.random.default_rng(0).normal(size=(15, 15)).astype(np.float32)
    full = heat_map_on_image(values, (width, height), crop_px=480)
    assert full.shape == (height, width)
    side = int(480 * min(height, width) / 512)
    seen = np.isfinite(full)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert (len(rows), len(columns)) == (side, side)
    assert seen.sum() == side * side
    assert rows[0] == int(np.floor((height - side) / 2))
    assert height - 1 - rows[-1] == int(np.ceil((height - side) / 2))
    assert columns[0] == int(np.floor((width - side) / 2))
    assert width - 1 - columns[-1] == int(np.ceil((width - side) / 2))
    blurred = gaussian_filter(values, 1.5)
    for y, x in ((0, 0), (side // 2, side // 3), (side - 1, side - 1)):  # a nearest cell by its own formula
        assert full[rows[0] + y, columns[0] + x] == blurred[int(y * 15 / side), int(x * 15 / side)]
    assert np.abs(blurred - values).max() > 0.1  # the trap: without the blur


def test_bilinear_heat_maps_and_refusals() -> None:
    values = np.arange(9.0).reshape(3, 3)
    smooth = heat_map_on_image(values, (64, 64), crop_px=480, sigma=1e-6, interpolation="bilinear")
    blocks = heat_map_on_image(values, (64, 64), crop_px=480, sigma=1e-6)
    assert len(np.unique(blocks[np.isfinite(blocks)])) == 9
    assert len(np.unique(smooth[np.isfinite(smooth)])) > 100
    with pytest.raises(InputError):
        heat_map_on_image(values[0], (64, 64), crop_px=480)
    with pytest.raises(InputError):
        heat_map_on_image(values, (1, 1), crop_px=480)
    with pytest.raises(UnknownName):
        heat_map_on_image(values, (64, 64), crop_px=480, interpolation="cubic")  # type: ignore[arg-type]


def test_the_heat_map_of_an_encoder() -> None:
    encoder, image = TinyEncoder(), make_test_images(1)[0]
    prompts = ["a chest radiograph", "x"]
    full = text_heat_map(encoder, image, prompts)
    patches = F.normalize(encoder.patch_features(encoder.preprocess(image))[0], dim=-1)
    direction = F.normalize(encoder.encode_text(prompts).mean(0), dim=0)
    expected = heat_map_on_image((patches @ direction).numpy(), image.size, crop_px=32, resize_px=32)
    np.testing.assert_allclose(full, expected, atol=1e-6)
    assert full.shape == image.size[::-1]
    with pytest.raises(InputError, match="empty"):
        text_heat_map(encoder, image, " ")


def test_explain_knows_biovils_map() -> None:
    encoder, image = TinyEncoder(), make_test_images(1)[0]
    found = explain(encoder, image, "x", method="biovil")
    plain = explain(encoder, image, "x", method="similarity")
    np.testing.assert_allclose(found.values, gaussian_filter(plain.values, 1.5), atol=1e-6)
    assert np.abs(found.values - plain.values).max() > 1e-3
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
    maps = biovil_maps(encoder.model.image_side(), pixels, directions)
    for k, single in enumerate(patch_text_maps(encoder.model.image_side(), pixels, directions)):
        np.testing.assert_allclose(maps[k], gaussian_filter(single.numpy(), 1.5), atol=1e-6)
    assert biovil_maps(encoder.model.image_side(), pixels[:0], directions[:0]).shape == (0, 4, 4)


def test_a_plain_encoder_has_no_local_features() -> None:
    assert not has_local_features(TinyEncoder())
