"""Heat maps against boxes: by hand, against chance, and on maps without structure."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError
from chiasm.metrics.localization import box_mask, chance_pointing, contrast_to_noise, iou_at_threshold, pointing_game
from chiasm.types import Box

laws = settings(max_examples=60, deadline=None)


@st.composite
def boxes_in(draw, width, height):
    x0, y0 = draw(st.floats(0, width - 0.5)), draw(st.floats(0, height - 0.5))
    return Box(x0, y0, x0 + draw(st.floats(0.1, width)), y0 + draw(st.floats(0.1, height)))


def test_pixels_of_a_box_by_hand():
    mask = box_mask([Box(1, 0, 3, 2)], 3, 4)
    assert mask.astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    # Centres at 0.5, 1.5 ...: the near edge is inside, the far edge outside.
    assert box_mask([Box(0.5, 0, 1.5, 1)], 1, 3).tolist() == [[True, False, False]]
    assert box_mask([Box(0.6, 0.6, 0.7, 0.7)], 2, 2).sum() == 1
    assert box_mask([Box(1.9, 0.1, 1.95, 0.2)], 2, 2).tolist() == [[False, True], [False, False]]
    assert box_mask([Box(-5, -5, 1, 99)], 2, 2).tolist() == [[True, False], [True, False]]


def test_tolerance_is_a_distance():
    mask = box_mask([Box(2, 2, 3, 3)], 5, 5, tolerance_px=1.0)
    # Centres at most 1 from the box: half a pixel to each side and to each corner.
    assert mask.astype(int).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    assert box_mask([Box(2, 2, 3, 3)], 5, 5, tolerance_px=0.6).sum() == 5


@laws
@given(st.data(), st.integers(1, 12), st.integers(1, 12))
def test_masks_are_never_empty_and_grow(data, height, width):
    first, second = data.draw(boxes_in(width, height)), data.draw(boxes_in(width, height))
    small, both = box_mask([first], height, width), box_mask([first, second], height, width)
    assert small.any()
    assert (both >= small).all()
    assert np.array_equal(both, small | box_mask([second], height, width))
    assert (box_mask([first], height, width, tolerance_px=2.0) >= small).all()


@laws
@given(st.data(), st.integers(1, 10), st.integers(1, 10))
def test_pointing_game_over_all_pixels_is_chance(data, height, width):
    """A map whose maximum is a random pixel scores, on average, exactly chance; so does a map without structure."""
    boxes = [data.draw(boxes_in(width, height))]
    expected = chance_pointing(boxes, height, width)
    scores = []
    for pixel in range(height * width):
        heat = np.zeros(height * width)
        heat[pixel] = 1
        scores.append(pointing_game(heat.reshape(height, width), boxes))
    assert set(scores) <= {0.0, 1.0}
    assert np.mean(scores) == pytest.approx(expected)
    assert pointing_game(np.full((height, width), 0.3), boxes) == pytest.approx(expected)


@laws
@given(st.data(), st.floats(0.1, 10), st.floats(-5, 5))
def test_brightness_and_contrast_of_the_map_do_not_matter(data, gain, shift):
    heat = np.random.default_rng(data.draw(st.integers(0, 99))).random((6, 7))
    boxes = [data.draw(boxes_in(7, 6))]
    assert pointing_game(gain * heat + shift, boxes) == pointing_game(heat, boxes)
    # 0.43 lies on no pixel's share of the range, so that rounding cannot move one over the threshold.
    assert iou_at_threshold(gain * heat + shift, boxes, threshold=0.43) == iou_at_threshold(heat, boxes, threshold=0.43)
    a, b = contrast_to_noise(gain * heat + shift, boxes), contrast_to_noise(heat, boxes)
    assert a == pytest.approx(b, rel=1e-6, nan_ok=True)


@laws
@given(st.data())
def test_a_perfect_map(data):
    boxes = [data.draw(boxes_in(8, 8))]
    mask = box_mask(boxes, 8, 8)
    assert pointing_game(mask, boxes) == 1.0
    assert iou_at_threshold(mask, boxes, threshold=0.5) == 1.0 or mask.all()
    if mask.all():
        assert math.isnan(contrast_to_noise(mask, boxes))
    else:
        assert contrast_to_noise(mask, boxes) == math.inf
        assert contrast_to_noise(~mask, boxes) == -math.inf
        assert contrast_to_noise(~mask, boxes, absolute=True) == math.inf
        assert pointing_game(~mask, boxes) == 0.0


def test_overlap_by_hand():
    heat = np.array([[0.0, 0.5, 1.0, 0.2]])
    box = [Box(2, 0, 4, 1)]
    assert iou_at_threshold(heat, box, threshold=0.5) == pytest.approx(1 / 3)
    assert iou_at_threshold(heat, box, threshold=0.1) == pytest.approx(2 / 3)
    assert iou_at_threshold(10 * heat, box, threshold=6, relative=False) == 0.5
    assert iou_at_threshold(heat, box, threshold=2, relative=False) == 0.0
    assert iou_at_threshold(np.full((1, 4), 0.1), box) == 0.0


def test_contrast_by_hand():
    heat = np.array([[1.0, 3.0, 5.0, 9.0]])
    # Means 7 and 2, variances 4 and 1.
    assert contrast_to_noise(heat, [Box(2, 0, 4, 1)]) == pytest.approx(5 / math.sqrt(5))
    assert contrast_to_noise(heat, [Box(0, 0, 2, 1)]) == pytest.approx(-5 / math.sqrt(5))
    assert contrast_to_noise(np.full((3, 3), 0.1), [Box(0, 0, 2, 1)]) == 0.0


def test_a_box_over_the_whole_map_has_no_contrast():
    assert math.isnan(contrast_to_noise(np.arange(9.0).reshape(3, 3), [Box(0, 0, 3, 3)]))


def test_equal_maxima_are_shared_out():
    heat = np.array([[1.0, 1.0, 1.0, 0.0]])
    assert pointing_game(heat, [Box(0, 0, 1, 1)]) == pytest.approx(1 / 3)


def test_images_without_boxes_are_left_out():
    heat = np.ones((3, 3))
    for score in (
        pointing_game(heat, []),
        iou_at_threshold(heat, []),
        contrast_to_noise(heat, []),
        chance_pointing([], 3, 3),
    ):
        assert math.isnan(score)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pointing_game(np.ones(3), []), "height, width"),
        (lambda: pointing_game(np.ones((0, 3)), []), "height, width"),
        (lambda: iou_at_threshold(np.array([[np.nan, 1]]), []), "1 of 2 pixels"),
        (lambda: iou_at_threshold(np.ones((2, 2)), [], threshold=math.nan), "threshold"),
        (lambda: box_mask([Box(1, 0, 1, 2)], 4, 4), "x0 < x1"),
        (lambda: box_mask([Box(0, 0, math.nan, 2)], 4, 4), "x0 < x1"),
        (lambda: box_mask([Box(9, 9, 12, 12)], 4, 4), "outside the image of 4 × 4"),
        (lambda: box_mask([], 0, 4), "no pixels"),
        (lambda: box_mask([], 4, 4, tolerance_px=-1), "tolerance of -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
