"""Boxes to vectors: each way equals its own derivation; boxes that cannot be used are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from chiasm.errors import InputError, UnknownName
from chiasm.explain.regions import embed_regions, scale_box
from chiasm.testing import TinyEncoder, make_test_images
from chiasm.types import Box


def test_each_way_by_hand() -> None:
    encoder = TinyEncoder(2)
    image = make_test_images(1)[0].resize((64, 64))
    box = Box(16, 0, 48, 32)  # columns 1 and 2, rows 0 and 1 of the 4 × 4 patches
    crop = encoder.encode_image(encoder.preprocess(image.crop((16, 0, 48, 32))), normalize=True)[0]
    np.testing.assert_allclose(embed_regions(encoder, [image], [box], how="crop").vectors[0], crop, atol=1e-5)
    patches = encoder.patch_features(encoder.preprocess(image))[0]
    mean = F.normalize(patches[0:2, 1:3].mean((0, 1)), dim=0)
    np.testing.assert_allclose(embed_regions(encoder, [image], [box], how="patches").vectors[0], mean, atol=1e-5)
    pixels = torch.zeros(3, 32, 32)
    pixels[:, 0:16, 8:24] = encoder.preprocess(image)[:, 0:16, 8:24]
    covered = encoder.encode_image(pixels, normalize=True)[0]
    found = embed_regions(encoder, [image], [box], how="cover")
    np.testing.assert_allclose(found.vectors[0], covered, atol=1e-5)
    assert found.space == encoder.space
    assert found.normalized


@pytest.mark.parametrize("how", ["crop", "cover"])
def test_the_whole_image_is_the_whole_image(how: str) -> None:
    encoder, image = TinyEncoder(), make_test_images(1)[0]
    whole = Box(0, 0, *image.size)
    found = embed_regions(encoder, [image], [whole], how=how)  # type: ignore[arg-type]
    direct = encoder.encode_image(encoder.preprocess(image), normalize=True)[0]
    np.testing.assert_allclose(found.vectors[0], direct, atol=1e-5)


def test_a_part_of_a_cell_counts_in_part() -> None:
    encoder, image = TinyEncoder(), make_test_images(1)[0].resize((64, 64))
    patches = encoder.patch_features(encoder.preprocess(image))[0]
    found = embed_regions(encoder, [image], [Box(0, 0, 24, 16)], how="patches").vectors[0]
    expected = F.normalize(patches[0, 0] + 0.5 * patches[0, 1], dim=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ids_patients_and_batches() -> None:
    encoder, images = TinyEncoder(), make_test_images(3) * 12
    boxes = [Box(2, 3, 30, 40)] * 36
    found = embed_regions(encoder, images, boxes, patients=[f"p{k}" for k in range(36)])
    assert found.ids[:2] == ("0", "1")
    assert found.groups[35] == "p35"
    np.testing.assert_allclose(found.vectors[0], found.vectors[33], atol=1e-5)
    assert scale_box(Box(1, 2, 3, 4, "a"), (10, 10), (20, 30)) == Box(2, 6, 6, 12, "a")


def test_refusals() -> None:
    encoder, images = TinyEncoder(), make_test_images(1)
    for box, what in (
        (Box(5, 5, 5, 9), "x0 < x1"),
        (Box(900, 0, 950, 9), "outside"),
        (Box(0, 0, float("nan"), 4), "x0 < x1"),
    ):
        with pytest.raises(InputError, match=what):
            embed_regions(encoder, images, [box])
    with pytest.raises(UnknownName):
        embed_regions(encoder, images, [Box(0, 0, 9, 9)], how="mask")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs its box"):
        embed_regions(encoder, images, [])
    wide = images[0].resize((200, 40))  # the model sees the middle 40 × 40
    with pytest.raises(InputError, match="leaves out"):
        embed_regions(encoder, [wide], [Box(0, 0, 20, 20)], how="patches")
    assert len(embed_regions(encoder, [wide], [Box(0, 0, 20, 20)], how="crop")) == 1
