"""One entry for all maps: words, ensembles, opposites, batches; the map lies on the original image."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from chiasm.errors import InputError, UnknownName
from chiasm.explain.heatmap import overlay
from chiasm.explain.methods import METHODS, choose_method, explain, explain_batch, explain_words, words_of

Make = Callable[..., Any]


def spotted(x: int, y: int, size: tuple[int, int] = (96, 64), cell: int = 16) -> Image.Image:
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 1:] = 50
    pixels[y : y + cell, x : x + cell, 0] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_map_points_at_the_spot_on_the_original(
    seeing: Make, answer_with: Make, as_encoder: Make, pool: str
) -> None:
    model = seeing(pool)
    answer_with(model, F.one_hot(torch.tensor(5), 16).float())
    encoder = as_encoder(model)
    for x, y in ((16, 0), (64, 48), (48, 16)):  # the model sees the middle 64 × 64 pixels, halved
        image = spotted(x, y)
        for method in ("auto", "similarity", "occlusion"):
            found = explain(encoder, image, "anything", method=method)
            px, py = found.peak()
            assert x <= px < x + 16, method
            assert y <= py < y + 16, method
            assert found.image_size == (96, 64)
            assert found.view == (16.0, 0.0, 80.0, 64.0)
            assert overlay(image, found).size == image.size
    json.dumps(found.to_dict(), allow_nan=False)
    assert explain(encoder, spotted(16, 0), "anything").method == "attention"


def test_the_cosine_is_that_of_the_whole_image(random_tower: Make, as_encoder: Make) -> None:
    encoder = as_encoder(random_tower())
    image = spotted(16, 0)
    found = explain(encoder, image, "red spot")
    both = encoder.encode([image, "red spot"], normalize_embeddings=True)
    assert found.cosine == pytest.approx(float(both[0] @ both[1]), abs=1e-5)
    ensemble = explain(encoder, image, ["red spot", "a dot"])
    texts = encoder.encode(["red spot", "a dot"], normalize_embeddings=True)
    mean = texts.mean(0) / np.linalg.norm(texts.mean(0))
    assert ensemble.cosine == pytest.approx(float(both[0] @ mean), abs=1e-5)
    assert ensemble.text == "red spot / a dot"


def test_what_both_sides_share_drops_out(random_tower: Make, as_encoder: Make) -> None:
    encoder = as_encoder(random_tower())
    image = spotted(16, 0)
    same = explain(encoder, image, "red", method="similarity", against=["red"])
    np.testing.assert_allclose(same.values, 0, atol=1e-6)
    a, b = (explain(encoder, image, t, method="similarity") for t in ("red", "blue"))
    difference = explain(encoder, image, "red", method="similarity", against=["blue"])
    np.testing.assert_allclose(difference.values, a.values - b.values, atol=1e-5)
    assert difference.against == ("blue",)


def test_batches_equal_single_calls(random_tower: Make, as_encoder: Make) -> None:
    for kind in ("vit", "resnet"):
        encoder = as_encoder(random_tower(kind=kind))
        images = [spotted(16 * k, 8 * k) for k in range(4)] + [spotted(0, 0, (50, 90))]
        texts = ["a", "b", ["a", "b"], "a", "c"]
        whole = explain_batch(encoder, images, texts, batch_size=2)
        for image, text, found in zip(images, texts, whole, strict=True):
            single = explain(encoder, image, text)
            np.testing.assert_allclose(found.values, single.values, rtol=1e-3, atol=1e-6)
            assert found.image_size == image.size
            assert found.text == single.text
        assert np.array_equal(whole[0].values, explain_batch(encoder, images, texts, batch_size=2)[0].values)


def test_words_are_explained_one_by_one(random_tower: Make, as_encoder: Make) -> None:
    assert words_of("There is a left-sided effusion, and the effusion of 3 cm.") == ["left-sided", "effusion", "cm"]
    assert words_of("Ödem, Лёгкое") == ["Ödem", "Лёгкое"]
    encoder = as_encoder(random_tower())
    image = spotted(16, 0)
    found = explain_words(encoder, image, "a large left effusion")
    assert [w.text for w in found] == ["large", "left", "effusion"]
    np.testing.assert_allclose(found[1].values, explain(encoder, image, "left").values, rtol=1e-3, atol=1e-6)
    left_out = explain_words(encoder, image, "large left effusion", how="left out", method="similarity")
    expected = explain(encoder, image, "large left effusion", against=["large effusion"], method="similarity")
    np.testing.assert_allclose(left_out[1].values, expected.values, rtol=1e-4, atol=1e-6)
    assert left_out[1].text == "left"
    assert explain_words(encoder, image, "effusion", how="left out")[0].against == ()
    with pytest.raises(InputError, match="no word"):
        explain_words(encoder, image, "of the 3")
    with pytest.raises(UnknownName):
        explain_words(encoder, image, "left", how="both")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
def test_images_of_any_mode_and_shape(random_tower: Make, as_encoder: Make, mode: str) -> None:
    encoder = as_encoder(random_tower(kind="resnet"))
    for size in ((5, 300), (300, 5), (1, 1), (64, 64)):
        found = explain(encoder, Image.new("L", size, 90).convert(mode), "text")
        assert found.to_image_size().shape == (size[1], size[0])


def test_the_encoder_stays_as_it_was(random_tower: Make, as_encoder: Make) -> None:
    encoder = as_encoder(random_tower())
    encoder.model.train()
    encoder.model.visual.transformer.eval()
    before = [m.training for m in encoder.model.modules()]
    space = encoder.space
    for method in ("attention", "similarity", "occlusion"):
        explain(encoder, spotted(0, 0), "text", method=method)
    assert [m.training for m in encoder.model.modules()] == before
    assert encoder.space == space
    with pytest.raises(InputError):
        explain(encoder, spotted(0, 0), "text", method="grad_cam")
    assert [m.training for m in encoder.model.modules()] == before


def test_refusals(random_tower: Make, as_encoder: Make) -> None:
    encoder = as_encoder(random_tower())
    image = spotted(0, 0)
    with pytest.raises(UnknownName, match="did you mean `attention`"):
        explain(encoder, image, "a", method="atention")
    for text in ("", "  ", [], ["a", ""]):
        with pytest.raises(InputError, match="needs a text"):
            explain(encoder, image, text)
    with pytest.raises(InputError, match="2 texts"):
        explain_batch(encoder, [image], ["a", "b"])
    with pytest.raises(InputError, match="set against"):
        explain_batch(encoder, [image], ["a"], against=[])
    with pytest.raises(InputError, match="batch_size"):
        explain_batch(encoder, [image], ["a"], batch_size=0)
    assert explain_batch(encoder, [], []) == ()
    assert choose_method(encoder) == "attention"
    assert set(METHODS) == {"attention", "layer_cam", "grad_cam", "similarity", "biovil", "occlusion", "combined"}


def test_progress_is_told(random_tower: Make, as_encoder: Make) -> None:
    told: list[object] = []

    class Told:
        def start(self, total: int | None, description: str) -> None:
            told.append(total)

        def advance(self, n: int = 1, **fields: float | str) -> None:
            told.append(n)

        def finish(self) -> None:
            told.append("end")

    images = [spotted(0, 0)] * 3
    explain_batch(as_encoder(random_tower()), images, ["a"] * 3, batch_size=2, progress=Told())
    assert told == [3, 2, 1, "end"]
