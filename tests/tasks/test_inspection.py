"""Inspection: the five steps are the numbers of NumPy, and the winner is the winner of zero-shot."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from chiasm.errors import InputError, SpaceMismatch
from chiasm.tasks.inspection import inspect

Make = Callable[..., Any]
RNG = np.random.default_rng(0)
IMAGE, TEXTS = RNG.normal(size=(1, 16)) * 4, RNG.normal(size=(3, 16)) * 7


def test_every_number(make: Make) -> None:
    found = inspect(make(IMAGE, logit_scale=30.0), make(TEXTS, "text", texts=("x", "y", "z"), logit_scale=30.0))
    cosines = TEXTS @ IMAGE[0] / np.linalg.norm(TEXTS, axis=1) / np.linalg.norm(IMAGE)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-6)
    np.testing.assert_allclose(found.logits, 30 * cosines, atol=1e-4)
    np.testing.assert_allclose(found.probabilities, np.exp(30 * cosines) / np.exp(30 * cosines).sum(), rtol=1e-4)
    assert found.image.norm_before == pytest.approx(np.linalg.norm(IMAGE), rel=1e-6)
    assert found.image.norm_after == pytest.approx(1, abs=1e-6)
    assert found.image.shape == (16,)
    np.testing.assert_allclose(found.texts[1].first, TEXTS[1, :8], rtol=1e-6)
    np.testing.assert_allclose(
        np.array(found.texts[1].first_after) * found.texts[1].norm_before, found.texts[1].first, rtol=1e-5
    )
    assert found.winner == "xyz"[int(cosines.argmax())]
    assert found.sigmoids is None
    assert not found.already_normalized


def test_the_steps_read_well(make: Make) -> None:
    found = inspect(make(IMAGE), make(TEXTS, "text", texts=("x", None, "z")))
    steps = found.steps()
    assert [title for title, _ in steps] == ["Embed the image", "Embed 3 texts", "Normalise", "Compare", "Softmax"]
    assert f"{found.image.first[0]:+.4f}" in steps[0][1][1]
    assert f"norm of the image: {found.image.norm_before:.4f} → 1.0000" in steps[2][1]
    assert "the model has none, so 100" in steps[3][1][0]
    assert f"`{found.winner}`" in steps[4][1][1]
    assert found.logit_scale_source == "fallback"
    assert found.rows()[0] == ("x", found.cosines[0], found.logits[0], found.probabilities[0])
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {"shape", "first", "norm_before", "norm_after", "cosine", "logit", "probability"} <= set(values["texts"][0])
    assert values["texts"][1]["name"] == "r1"
    one = inspect(make(IMAGE).normalize(), make(TEXTS[:1], "text"), logit_scale=2.0).steps()
    assert one[1][0] == "Embed the text"
    assert "came normalised" in one[2][1][-1]


def test_sigmoid_models_show_both(make: Make) -> None:
    found = inspect(make(IMAGE), make(TEXTS, "text", logit_scale=10.0, logit_bias=-2.0))
    assert found.sigmoids is not None
    np.testing.assert_allclose(found.sigmoids, 1 / (1 + np.exp(-np.array(found.logits))))
    np.testing.assert_allclose(found.logits, 10 * np.array(found.cosines) - 2)
    assert "sigmoid" in found.to_dict()["texts"][0]
    assert "bias -2.000" in found.steps()[3][1][0]
    assert "sigmoid" in found.steps()[4][1][-1]


def test_refusals(make: Make) -> None:
    image, texts = make(IMAGE), make(TEXTS, "text")
    with pytest.raises(InputError, match="one image"):
        inspect(make(np.eye(16)[:2]), texts)
    with pytest.raises(InputError, match="no text"):
        inspect(image, texts.select([]))
    with pytest.raises(InputError, match="expected an image and texts"):
        inspect(image, image)
    with pytest.raises(SpaceMismatch):
        inspect(image, make(TEXTS, "text", name="other"))
    assert inspect(image.normalize(), texts).already_normalized
