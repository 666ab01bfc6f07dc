"""Deletion and insertion on a tower whose truth is known, against a loop by hand, and with hostile input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from chiasm.errors import InputError, UnknownName
from chiasm.explain.curves import Curves, _filled, deletion_insertion
from chiasm.explain.heatmap import HeatMap
from chiasm.explain.methods import explain
from chiasm.explain.priors import centre_map, random_map
from chiasm.testing import TinyEncoder, make_test_images

Make = Callable[..., Any]


def red_spot(x: int, y: int, cell: int = 16) -> Image.Image:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[..., 1:] = 50
    pixels[y : y + cell, x : x + cell, 0] = 255
    return Image.fromarray(pixels)


def planted(image: Image.Image, x: int, y: int, method: str) -> HeatMap:
    values = np.zeros((4, 4), np.float32)
    values[y // 16, x // 16] = 1
    return HeatMap(values, image.size, (0.0, 0.0, 64.0, 64.0), method, "red")


def test_a_right_map_beats_random_centre_and_a_wrong_one(seeing: Make, answer_with: Make, as_encoder: Make) -> None:
    """The tower sees red only; the spot is in a corner, where neither chance nor the centre finds it."""
    model = seeing("cls")
    answer_with(model, F.one_hot(torch.tensor(5), 16).float())
    encoder = as_encoder(model)
    images = [red_spot(0, 0), red_spot(48, 48), red_spot(0, 48)]
    places = [(0, 0), (48, 48), (0, 48)]
    right = [planted(i, x, y, "right") for i, (x, y) in zip(images, places, strict=True)]
    wrong = [planted(i, 48 - x, 48 - y, "wrong") for i, (x, y) in zip(images, places, strict=True)]
    drawn = [explain(encoder, image, "red") for image in images]
    texts = ["red"] * 3
    for fill, least in (("mean", 0.02), ("blur", 1e-4)):  # a blurred spot is still red
        found = {
            name: deletion_insertion(encoder, images, texts, order, fill=fill, steps=16)
            for name, order in {
                "right": right,
                "wrong": wrong,
                "drawn": drawn,
                "random": "random",
                "centre": "centre",
            }.items()
        }
        for name in ("wrong", "random", "centre"):
            assert (found["right"].deletion_area < found[name].deletion_area - least).all(), (fill, name)
            assert (found["right"].insertion_area > found[name].insertion_area + least).all(), (fill, name)
        assert (found["drawn"].deletion_area < found["random"].deletion_area).all()


def test_the_curve_is_what_a_loop_by_hand_gives() -> None:
    encoder, image = TinyEncoder(1), make_test_images(1)[0]
    heat = explain(encoder, image, "a film", method="similarity")
    found = deletion_insertion(encoder, [image], ["a film"], [heat], fill="mean", steps=8)
    pixels = encoder.preprocess(image)
    value = F.interpolate(torch.from_numpy(heat.values)[None, None], (32, 32), mode="bilinear")[0, 0].flatten()
    text = encoder.encode_text("a film", normalize=True)[0]
    tie = np.random.default_rng(0).random(32 * 32)  # equal values: the border repeats its cell
    order = torch.tensor(sorted(range(32 * 32), key=lambda i: (-float(value[i]), tie[i])))
    for step in range(9):
        taken = pixels.clone().flatten(1)
        taken[:, order[: step * 128]] = 0
        cosine = float(encoder.encode_image(taken.view_as(pixels), normalize=True)[0] @ text)
        assert found.deletion[0, step] == pytest.approx(cosine, abs=1e-5)
    both = found.deletion[0]
    assert found.deletion_area[0] == pytest.approx(float((both[1:] + both[:-1]).sum() / 16))
    assert found.deletion[0, 0] == pytest.approx(found.insertion[0, -1], abs=1e-6)  # the whole image
    assert found.deletion[0, -1] == pytest.approx(found.insertion[0, 0], abs=1e-6)  # the filled one


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_the_area_of_a_flat_curve_is_its_height(heights: list[float]) -> None:
    rows = np.repeat(np.asarray(heights)[:, None], 6, axis=1)
    curves = Curves("m", rows, rows, "mean")
    np.testing.assert_allclose(curves.deletion_area, heights, atol=1e-12)
    assert curves.to_dict()["n"] == 4


def test_opposites_and_seeds() -> None:
    encoder, images = TinyEncoder(), make_test_images(2)
    plain = deletion_insertion(encoder, images, ["a", "b"], "random", seed=1, steps=4)
    again = deletion_insertion(encoder, images, ["a", "b"], "random", seed=1, steps=4)
    other = deletion_insertion(encoder, images, ["a", "b"], "random", seed=2, steps=4)
    assert np.array_equal(plain.deletion, again.deletion)
    assert not np.array_equal(plain.deletion, other.deletion)
    itself = deletion_insertion(encoder, images, ["a", "b"], "centre", against=[["a"], ["b"]], steps=4)
    np.testing.assert_allclose(itself.insertion, 0, atol=1e-6)  # a text set against itself


def test_the_blur_keeps_what_is_constant() -> None:
    pixels = torch.full((3, 32, 32), 0.7)
    assert torch.allclose(_filled(pixels, "blur"), pixels, atol=1e-5)
    noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert float(_filled(noise, "blur").std()) < 0.4 * float(noise.std())


def test_priors_lie_on_the_image() -> None:
    heat = centre_map((90, 60), text="x")
    assert heat.method == "centre"
    x, y = heat.peak()
    assert abs(x - 45) <= 1
    assert abs(y - 30) <= 1
    peaks = {random_map((90, 60), text="x", seed=s).peak() for s in range(6)}
    assert len(peaks) > 3


def test_refusals() -> None:
    encoder, images = TinyEncoder(), make_test_images(2)
    with pytest.raises(UnknownName, match="did you mean `blur`"):
        deletion_insertion(encoder, images, ["a"] * 2, "random", fill="blurr")  # type: ignore[arg-type]
    with pytest.raises(UnknownName):
        deletion_insertion(encoder, images, ["a"] * 2, "middle")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="equally many"):
        deletion_insertion(encoder, images, ["a"], "random")
    with pytest.raises(InputError, match="steps"):
        deletion_insertion(encoder, images, ["a"] * 2, "random", steps=0)
    swapped = [explain(encoder, images[1], "a"), explain(encoder, images[0], "a")]
    with pytest.raises(InputError, match="another size"):
        deletion_insertion(encoder, images, ["a"] * 2, swapped)
