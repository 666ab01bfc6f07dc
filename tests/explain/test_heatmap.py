"""Heat maps lie where the model looked: on the original image, through resize, crop and padding."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from chiasm.errors import InputError
from chiasm.explain.heatmap import HeatMap, colours, model_view, overlay
from chiasm.types import Preprocess


def heat(values: object, size: tuple[int, int], view: tuple[float, float, float, float] | None = None) -> HeatMap:
    return HeatMap(np.asarray(values), size, view or (0.0, 0.0, *map(float, size)), "similarity", "text")


def test_identity_at_the_image_own_resolution() -> None:
    values = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    np.testing.assert_allclose(heat(values, (9, 6)).to_image_size(), values, atol=1e-6)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 7), st.integers(1, 7))
def test_interpolation_stays_in_range_and_keeps_constants(width: int, height: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(width * height)
    found = heat(rng.normal(size=(rows, columns)), (width, height))
    full = found.to_image_size()
    assert full.shape == (height, width)
    assert full.min() >= found.values.min() - 1e-5
    assert full.max() <= found.values.max() + 1e-5
    flat = heat(np.full((rows, columns), 2.5), (width, height))
    assert flat.is_flat
    np.testing.assert_allclose(flat.to_image_size(), 2.5, rtol=1e-6)
    assert not flat.scaled().any()


def test_the_view_is_rounded_as_the_crop_is() -> None:
    even, down = (Preprocess(size=32, crop_rounding=r) for r in ("even", "down"))
    assert model_view(even, (35, 32))[0] == 2.0  # 1.5 to the even pixel
    assert model_view(down, (35, 32))[0] == 1.0


@given(
    width=st.integers(20, 400),
    height=st.integers(20, 400),
    resize=st.sampled_from(["shortest", "squash", "longest_pad"]),
    size=st.sampled_from([16, 32, 224]),
)
def test_the_view_is_the_whole_image_or_its_middle(width: int, height: int, resize: str, size: int) -> None:
    preprocess = Preprocess(size=size, resize=resize, crop="center" if resize == "shortest" else "none")  # type: ignore[arg-type]
    x0, y0, x1, y1 = model_view(preprocess, (width, height))
    scale = max(width, height) / size
    assert abs((x0 + x1) / 2 - width / 2) <= 1.5 * scale
    assert abs((y0 + y1) / 2 - height / 2) <= 1.5 * scale
    if resize == "squash":
        assert (x0, y0, x1, y1) == (0, 0, width, height)
    elif resize == "shortest":
        assert min(width, height) == pytest.approx(min(x1 - x0, y1 - y0), abs=1e-6)
        assert x0 >= -1e-9 or y0 >= -1e-9
    else:
        assert max(x1 - x0, y1 - y0) >= max(width, height) - 1e-6


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest_pad"])
@pytest.mark.parametrize("shape", [(300, 200), (150, 400), (96, 96), (333, 97)])
@pytest.mark.parametrize("cut_bottom", [0.0, 0.2])
def test_a_bright_spot_comes_back_to_its_place(resize: str, shape: tuple[int, int], cut_bottom: float) -> None:
    """Prepare an image as an encoder does, take its brightness as the map, and find the spot on the original again."""
    from chiasm.data.transforms import resize_and_crop

    width, height = shape
    x, y = width // 2 + min(shape) // 5, height // 2 - min(shape) // 5
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[y - 6 : y + 6, x - 6 : x + 6] = 255
    crop = "center" if resize == "shortest" else "none"
    preprocess = Preprocess(size=64, resize=resize, crop=crop, cut_bottom=cut_bottom)  # type: ignore[arg-type]
    prepared = np.asarray(resize_and_crop(Image.fromarray(pixels), preprocess).convert("L"), dtype=np.float32)
    found = heat(prepared, shape, model_view(preprocess, shape)).smoothed(1.0)
    peak_x, peak_y = found.peak()
    assert abs(peak_x - x) <= 4
    assert abs(peak_y - y) <= 4


def test_places_that_the_model_never_saw_have_the_least_value() -> None:
    view = model_view(Preprocess(size=32), (200, 100))
    assert view == (50.0, 0.0, 150.0, 100.0)
    full = heat([[1.0, 2.0], [3.0, 4.0]], (200, 100), view).to_image_size()
    assert (full[:, :50] == 1).all()
    assert (full[:, 150:] == 1).all()
    assert full[99, 149] == pytest.approx(4)
    assert heat([[1.0, 2.0], [3.0, 4.0]], (200, 100), view).peak()[0] < 150


def test_smoothing() -> None:
    values = np.zeros((7, 7))
    values[3, 3] = 1
    found = heat(values, (70, 70))
    blurred = found.smoothed(1.0)
    assert blurred.values.max() < 0.5
    assert blurred.peak()[0] in range(30, 40)
    assert found.smoothed(0) is found
    np.testing.assert_allclose(heat(np.ones((3, 5)), (5, 3)).smoothed(2.0).values, 1, rtol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1"])
def test_overlay(mode: str) -> None:
    image = Image.new("L", (40, 20), 100).convert(mode)
    found = heat([[0.0, 1.0]], (40, 20))
    drawn = overlay(image, found, alpha=1.0)
    assert (drawn.mode, drawn.size) == ("RGB", (40, 20))
    base = np.asarray(image.convert("RGB"))
    result = np.asarray(drawn)
    assert (result[:, :5] == base[:, :5]).all()  # cold places keep the image
    assert np.abs(result[:, -1].astype(int) - [252, 255, 164]).max() <= 1
    film = np.asarray(overlay(image, found, alpha=1.0, style="film"))
    assert np.abs(film[:, 0].astype(int) - [0, 0, 4]).max() <= 1
    assert (np.asarray(overlay(image, found, alpha=0.0)) == base).all()
    with pytest.raises(InputError, match="belongs to"):
        overlay(image.resize((41, 20)), found)
    with pytest.raises(InputError, match="alpha"):
        overlay(image, found, alpha=1.5)


def test_the_colours_grow_lighter() -> None:
    rgb = colours(np.linspace(0, 1, 50, dtype=np.float32))
    lightness = rgb @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match="shape"):
        heat(np.zeros(4), (2, 2))
    with pytest.raises(InputError, match="shape"):
        heat(np.zeros((0, 4)), (2, 2))
    with pytest.raises(InputError, match="1 of 4 values"):
        heat([[0.0, np.nan], [1.0, 2.0]], (2, 2))
    json.dumps(heat([[0.0, 1.0]], (4, 4)).to_dict(), allow_nan=False)
