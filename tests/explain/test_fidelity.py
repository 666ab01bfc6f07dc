"""The randomised-weights check: it passes methods that follow the weights and fails those that do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from chiasm.errors import InputError
from chiasm.explain import methods
from chiasm.explain.fidelity import (
    FidelityReport,
    randomisation_check,
    rank_correlation,
    shuffle_weights,
    structural_similarity,
)

Make = Callable[..., Any]


def pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)) for _ in range(n)]


@given(st.integers(0, 1000))
def test_similarities_of_maps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 9, 7)).astype(np.float32)
    assert rank_correlation(a, a) == pytest.approx(1)
    assert rank_correlation(a, np.exp(a)) == pytest.approx(1)  # only the order counts
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, b) == pytest.approx(rank_correlation(b, a))
    assert structural_similarity(a, a) == pytest.approx(1)
    assert structural_similarity(a, 3 * a + 2) == pytest.approx(1, abs=1e-5)
    assert -1 <= structural_similarity(a, b) < 0.95
    flat = np.ones((9, 7), dtype=np.float32)
    assert rank_correlation(a, flat) == 0
    assert np.isfinite(structural_similarity(a, flat))


def test_rank_correlation_agrees_with_scipy() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 8, 8)).astype(np.float32)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic)


def test_shuffling_keeps_the_values_and_the_original(random_tower: Make) -> None:
    visual = random_tower(kind="resnet").visual
    before = {n: t.clone() for n, t in visual.state_dict().items()}
    other = shuffle_weights(visual, 0)
    assert all(torch.equal(before[n], t) for n, t in visual.state_dict().items())
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor.flatten().sort().values, before[name].flatten().sort().values)
    assert not torch.equal(other.conv3.weight, visual.conv3.weight)
    again = shuffle_weights(visual, 0)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), again.parameters(), strict=True))


def test_a_method_that_follows_the_weights_passes(seeing: Make, answer_with: Make, as_encoder: Make) -> None:
    model = seeing("mean")
    answer_with(model, torch.eye(16)[5])
    report = randomisation_check(as_encoder(model), pictures(6), ["red"] * 6, method="similarity", seeds=(0, 1))
    assert len(report.rank_correlation) == 12
    assert report.passes
    assert report.to_dict()["n"] == 12
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_method_that_only_shows_the_image_fails(random_tower: Make, as_encoder: Make) -> None:
    methods.METHODS["edges"] = lambda visual, pixels, directions: pixels.mean(1).diff(dim=-1).abs()
    try:
        report = randomisation_check(as_encoder(random_tower()), pictures(3), ["a"] * 3, method="edges")
    finally:
        del methods.METHODS["edges"]
    assert report.mean_rank_correlation == pytest.approx(1)
    assert report.mean_structural_similarity == pytest.approx(1)
    assert not report.passes


def test_gradient_methods_run_and_repeat(random_tower: Make, as_encoder: Make) -> None:
    for kind in ("vit", "resnet"):
        encoder = as_encoder(random_tower(kind=kind))
        first = randomisation_check(encoder, pictures(3), ["a", "b", ["a", "c"]], batch_size=2)
        again = randomisation_check(encoder, pictures(3), ["a", "b", ["a", "c"]], batch_size=2)
        assert first == again
        assert first.method == {"vit": "attention", "resnet": "layer_cam"}[kind]


def test_refusals(random_tower: Make, as_encoder: Make) -> None:
    encoder = as_encoder(random_tower())
    for images, texts in (([], []), (pictures(2), ["a"])):
        with pytest.raises(InputError, match="as many texts as images"):
            randomisation_check(encoder, images, texts)
    with pytest.raises(InputError, match="seed"):
        randomisation_check(encoder, pictures(1), ["a"], seeds=())
    assert FidelityReport("x", (0.9, -0.9), (0.1, 0.1), (0,)).mean_rank_correlation == pytest.approx(0.9)
