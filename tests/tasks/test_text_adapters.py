"""Adapters that start from texts: the published formulas, gradients by finite differences, torch's AdamW, zero-shot limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from chiasm.errors import InputError, SpaceMismatch
from chiasm.tasks.few_shot import ValidationRows, ZeroShotReference, class_weights, quality
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.tasks.text_adapters import (
    AdamW,
    CLIPAdapter,
    TextProbe,
    TipAdapter,
    TipAdapterF,
    adapter_loss,
    cache_logits,
    cache_loss,
)
from chiasm.tasks.zero_shot import TextClassifier, classify
from chiasm.types import Embeddings, Space

Make = Callable[..., Embeddings]
NAMES = ("aca", "normal", "scc")
ADAPTERS = (TipAdapter, TipAdapterF, CLIPAdapter, TextProbe)
#: Arguments at which each adapter must be zero-shot classification.
AT_REST: dict[Any, dict[str, Any]] = {
    TipAdapter: {"alpha": 0.0, "beta": 1.0},
    TipAdapterF: {"alpha": 0.0, "beta": 1.0, "steps": 3},
    CLIPAdapter: {"ratio": 0.0, "steps": 3},
    TextProbe: {"penalty": 1e9},
}


def space(dim: int = 16, name: str = "made") -> Space:
    return Space(name, "0" * 12, "1" * 12, dim)


def texts_of(directions: Any, names: tuple[str, ...] = NAMES, *, scale: float = 20.0, name: str = "made") -> Any:
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    prompts = PromptSet(tuple(LabelPrompts(n, (n,)) for n in names))
    return TextClassifier(prompts, unit.astype(np.float32), None, space(unit.shape[1], name), scale)


def problem(n: int, *, seed: int = 0, gap: float = 0.8, noise: float = 0.8, dim: int = 16) -> tuple[Any, Any, Any]:
    """Return vectors, class names, and texts that point near the classes but not at them (``gap``)."""
    random, fixed = np.random.default_rng(seed), np.random.default_rng(7)
    centres = fixed.normal(size=(3, dim))
    texts = texts_of(centres + gap * fixed.normal(size=(3, dim)))
    y = np.arange(n) % 3
    x = centres[y] + noise * random.normal(size=(n, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True), np.array(NAMES)[y], texts


def test_tip_adapter_is_the_published_formula() -> None:
    x, y, texts = problem(12)
    new = problem(9, seed=1)[0]
    alpha, beta = 1.7, 3.5
    found = TipAdapter(texts, alpha=alpha, beta=beta).fit(x, y).logits(new)
    for i, f in enumerate(new):  # equations 3 to 6, one number at a time
        for k in range(3):
            clip = 20.0 * float(f @ texts.positive[k].astype(float))
            cache = sum(
                np.exp(-beta * (1 - float(f @ key))) for key, name in zip(x, y, strict=True) if name == NAMES[k]
            )
            assert found[i, k] == pytest.approx(clip + alpha * cache, rel=1e-6)


def test_tip_adapter_searches_the_whole_grid() -> None:
    x, y, texts = problem(24, noise=1.2)
    held, y_held, _ = problem(60, seed=1, noise=1.2)
    codes = np.array([NAMES.index(n) for n in y_held])
    alphas, betas = (0.0, 0.5, 2.0, 8.0), (1.0, 4.0, 10.0)
    chosen = TipAdapter(texts, alphas=alphas, betas=betas).fit(x, y, validation=ValidationRows(held, y_held)).chosen_
    every = {
        (a, b): quality(TipAdapter(texts, alpha=a, beta=b).fit(x, y).logits(held), codes) for a in alphas for b in betas
    }
    assert every[chosen["alpha"], chosen["beta"]] == max(every.values())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_at_rest_they_are_zero_shot(adapter: Any, make: Make) -> None:
    x, y, texts = problem(12)
    images = make(x)
    zero = classify(images, texts)
    found = adapter(texts, **AT_REST[adapter]).fit(images, y)
    np.testing.assert_allclose(found.predict_proba(images), zero.probabilities, atol=2e-5)
    reference = ZeroShotReference(texts).fit(images, y)
    np.testing.assert_allclose(reference.logits(images), zero.logits, atol=1e-4)
    assert reference.predict(images).tolist() == list(zero.predicted)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_on_validation_rows_they_are_never_below_zero_shot(adapter: Any) -> None:
    for seed in range(3):
        x, y, texts = problem(6, seed=seed, gap=0.3, noise=1.5)
        held, y_held, _ = problem(9, seed=seed + 50, gap=0.3, noise=1.5)
        codes = np.array([NAMES.index(n) for n in y_held])
        found = adapter(texts).fit(x, y, validation=ValidationRows(held, y_held))
        zero = quality(ZeroShotReference(texts).fit(x, y).logits(held), codes)
        assert quality(found.logits(held), codes) >= (zero[0], zero[1] - 1e-3)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_they_learn_what_texts_do_not_say(adapter: Any) -> None:
    """Texts that point elsewhere, sixteen shots: better than zero-shot by far."""
    x, y, texts = problem(48, gap=2.5)
    held, y_held, _ = problem(48, seed=1, gap=2.5)
    new, truth, _ = problem(300, seed=2, gap=2.5)
    zero = ZeroShotReference(texts).fit(x, y).score(new, truth)
    found = adapter(texts).fit(x, y, validation=ValidationRows(held, y_held))
    assert found.score(new, truth) > zero + 0.1
    assert found.chosen_
    assert found.validated_on_ == 48
    again = clone(found).fit(x, y, validation=ValidationRows(held, y_held))
    np.testing.assert_array_equal(again.logits(new), found.logits(new))  # nothing is drawn without a seed


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_gradient_of_the_keys(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, keys = random.normal(size=(7, 5)), random.normal(size=(4, 5))
    values, base = np.eye(3)[[0, 1, 2, 0]], random.normal(size=(7, 3))
    y = random.permutation(np.arange(7) % 3)
    options = {"alpha": 1.3, "beta": 0.7, "weights": class_weights(y, 3)}

    def loss(k: Any) -> float:
        return cache_loss(x, y, k, values, base, **options)[0]

    np.testing.assert_allclose(
        cache_loss(x, y, keys, values, base, **options)[1], numeric(loss, keys), atol=1e-6, rtol=1e-4
    )


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_gradients_of_the_adapter(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, texts = random.normal(size=(6, 8)), random.normal(size=(3, 8))
    layers = (random.normal(size=(8, 2)), random.normal(size=(2, 8)))
    y = np.arange(6) % 3
    options = {"ratio": 0.6, "scale": 3.0, "weights": class_weights(y, 3)}
    found = adapter_loss(x, y, layers, texts, **options)[1]

    def first(one: Any) -> float:
        return adapter_loss(x, y, (one, layers[1]), texts, **options)[0]

    def second(two: Any) -> float:
        return adapter_loss(x, y, (layers[0], two), texts, **options)[0]

    np.testing.assert_allclose(found[0], numeric(first, layers[0]), atol=2e-5, rtol=1e-3)
    np.testing.assert_allclose(found[1], numeric(second, layers[1]), atol=2e-5, rtol=1e-3)


def numeric(loss: Callable[[Any], float], at: Any, step: float = 1e-6) -> Any:
    """Return the gradient by central differences."""
    found = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        shifted = [at.copy(), at.copy()]
        shifted[0][place] += step
        shifted[1][place] -= step
        found[place] = (loss(shifted[0]) - loss(shifted[1])) / (2 * step)
    return found


def test_adamw_is_torchs() -> None:
    random = np.random.default_rng(0)
    start = random.normal(size=(3, 4))
    ours, theirs = start, torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimiser = AdamW((start.shape,), rate=0.01, decay=0.1, steps=20)
    peer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(peer, 20)
    for _ in range(20):
        gradient = random.normal(size=(3, 4))
        (ours,) = optimiser.update((ours,), (gradient,))
        theirs.grad = torch.from_numpy(gradient)
        peer.step()
        schedule.step()
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-9)


def test_text_probe_minimises_its_objective_and_nears_a_probe() -> None:
    x, y, texts = problem(60, noise=1.4)
    probe = TextProbe(texts, penalty=0.01).fit(x, y)
    codes = np.array([NAMES.index(n) for n in y])
    weights = class_weights(codes, 3)

    def objective(w: Any, alphas: Any) -> float:
        logits = x @ (w + alphas[:, None] * texts.positive).T
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(60), codes]
        return float(weights @ losses + 0.005 * ((w**2).sum() + ((alphas - 20) ** 2).sum()))

    w = probe.coef_ - probe.alphas_[:, None] * texts.positive
    best = objective(w, probe.alphas_)
    random = np.random.default_rng(0)
    for _ in range(50):
        assert objective(w + 0.02 * random.normal(size=w.shape), probe.alphas_ + 0.02 * random.normal(size=3)) > best
    assert objective(np.zeros_like(w), np.full(3, 20.0)) > best


def test_unequal_shots_weigh_alike_in_the_cache() -> None:
    x, y, texts = problem(12)
    rows = [0, 1, 2, 3, 6, 9]  # four of one class, one of each other
    one = TipAdapter(texts, alpha=1.0, beta=1.0).fit(x[rows], y[rows])
    np.testing.assert_allclose(one.values_.sum(axis=0), 2.0)


def test_spaces_and_classes_are_checked(make: Make) -> None:
    x, y, texts = problem(12)
    foreign = texts_of(np.eye(3, 16), name="another")
    for adapter in ADAPTERS:
        with pytest.raises(SpaceMismatch, match="no meaning"):
            adapter(foreign).fit(make(x), y)
    with pytest.raises(InputError, match="1 classes have no text, 1 labels"):
        TipAdapter(texts_of(np.eye(3, 16), ("aca", "normal", "other"))).fit(x, y)
    with pytest.raises(InputError, match="16 dimensions, the texts 8"):
        TipAdapter(texts_of(np.eye(3, 8))).fit(x, y)
    with pytest.raises(InputError, match="ratios"):
        CLIPAdapter(texts, ratios=(2.0,)).fit(x, y)
    with pytest.raises(InputError, match="positive"):
        TextProbe(texts, penalties=(0.0,)).fit(x, y)


def test_cache_logits_fall_with_distance() -> None:
    keys, values = np.eye(2), np.eye(2)
    near = cache_logits(np.array([[1.0, 0.0]]), keys, values, beta=5.0)
    assert near[0, 0] == 1
    assert near[0, 1] == pytest.approx(np.exp(-5))
