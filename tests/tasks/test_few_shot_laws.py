"""Laws that every few-shot method keeps: length, rotation, order of rows and names of classes do not matter; no hidden state."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group

from chiasm.tasks.few_shot import (
    FewShotClassifier,
    LinearProbe,
    Prototypes,
    ValidationRows,
    ZeroShotReference,
    class_means,
    class_weights,
)
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.tasks.text_adapters import CLIPAdapter, TextProbe, TipAdapter, TipAdapterF
from chiasm.tasks.zero_shot import TextClassifier
from chiasm.types import Space

DIM = 10
CLASSES = ("ill", "well")
Build = Callable[[Any], FewShotClassifier]
#: Name -> estimator from the texts' directions, with nothing left to choose.
METHODS: dict[str, Build] = {
    "linear-probe": lambda t: LinearProbe(C=3.0, tol=1e-9),
    "prototypes": lambda t: Prototypes(),
    "prototypes-centred": lambda t: Prototypes(center=True),
    "zero-shot": lambda t: ZeroShotReference(texts_of(t)),
    "tip-adapter": lambda t: TipAdapter(texts_of(t), alpha=2.0, beta=3.0),
    "text-probe": lambda t: TextProbe(texts_of(t), penalty=0.1),
}
TRAINED: dict[str, Build] = {
    "tip-adapter-f": lambda t: TipAdapterF(texts_of(t), alpha=2.0, beta=3.0, steps=8),
    "clip-adapter": lambda t: CLIPAdapter(texts_of(t), ratio=0.4, steps=8),
}


def texts_of(directions: Any, names: tuple[str, ...] = CLASSES) -> TextClassifier:
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    prompts = PromptSet(tuple(LabelPrompts(n, (n,)) for n in names))
    return TextClassifier(prompts, unit, None, Space("made", "0" * 12, "1" * 12, DIM), 5.0)


def data(seed: int, n: int = 24) -> tuple[Any, Any, Any, Any]:
    """Return vectors, class names, new vectors, and two text directions."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(2, DIM))
    y = np.arange(n) % 2
    x = centres[y] + random.normal(size=(n, DIM))
    return x, np.array(CLASSES)[y], random.normal(size=(9, DIM)), centres + random.normal(size=(2, DIM))


@pytest.mark.parametrize("name", [*METHODS, *TRAINED])
@settings(max_examples=5)
@given(seed=st.integers(0, 500))
def test_lengths_and_order_of_rows_do_not_matter(name: str, seed: int) -> None:
    build = (METHODS | TRAINED)[name]
    x, y, new, texts = data(seed)
    random = np.random.default_rng(seed)
    found = build(texts).fit(x, y).logits(new)
    order = random.permutation(len(x))
    other = build(texts).fit(random.uniform(0.1, 9, (len(x), 1))[order] * x[order], y[order])
    np.testing.assert_allclose(other.logits(4.0 * new), found, atol=2e-3)


@pytest.mark.parametrize("name", list(METHODS))
@settings(max_examples=5)
@given(seed=st.integers(0, 500))
def test_a_rotation_of_the_space_does_not_matter(name: str, seed: int) -> None:
    """Image and text vectors turned together: cosines stay, and so must all answers."""
    x, y, new, texts = data(seed)
    turn = ortho_group.rvs(DIM, random_state=seed)
    found = METHODS[name](texts).fit(x, y).logits(new)
    np.testing.assert_allclose(METHODS[name](texts @ turn).fit(x @ turn, y).logits(new @ turn), found, atol=2e-3)


@pytest.mark.parametrize("name", [*METHODS, *TRAINED])
def test_probabilities_and_saved_estimators(name: str) -> None:
    build = (METHODS | TRAINED)[name]
    x, y, new, texts = data(1)
    fitted = build(texts).fit(x, y, groups=[f"p{i // 2}" for i in range(len(x))])
    found = fitted.predict_proba(new)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert (found >= 0).all()
    assert fitted.predict(new).tolist() == [CLASSES[k] for k in found.argmax(axis=1)]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(new), found)
    assert fitted.validated_on_ == 0  # nothing was left to choose
    again = fitted.fit(x, y)  # a second fit starts anew
    np.testing.assert_array_equal(again.predict_proba(new), found)


def test_texts_are_found_by_name_not_by_place() -> None:
    x, y, new, texts = data(2)
    forward = TipAdapter(texts_of(texts), alpha=1.0, beta=1.0).fit(x, y)
    backward = TipAdapter(texts_of(texts[::-1], CLASSES[::-1]), alpha=1.0, beta=1.0).fit(x, y)
    shouting = TipAdapter(texts_of(texts, (" ILL ", "Well")), alpha=1.0, beta=1.0).fit(x, y)
    np.testing.assert_allclose(forward.logits(new), backward.logits(new))
    np.testing.assert_allclose(forward.logits(new), shouting.logits(new))


def test_binary_numbers_and_their_texts() -> None:
    x, _, new, texts = data(3)
    y = np.arange(len(x)) % 2
    found = ZeroShotReference(texts_of(texts, ("0", "1"))).fit(x, y)
    assert found.classes_.tolist() == [0, 1]
    assert set(found.predict(new).tolist()) <= {0, 1}


@given(st.lists(st.integers(0, 2), min_size=6, max_size=30).filter(lambda v: set(v) == {0, 1, 2}))
def test_weights_and_means_of_classes(labels: list[int]) -> None:
    y = np.array(labels)
    weights = class_weights(y, 3)
    assert weights.sum() == pytest.approx(1)
    for c in range(3):
        assert weights[y == c].sum() == pytest.approx(1 / 3)
    x = np.random.default_rng(0).normal(size=(len(y), 4))
    np.testing.assert_allclose(class_means(x, y, 3)[1], x[y == 1].mean(axis=0))


@pytest.mark.parametrize("name", ["linear-probe", "tip-adapter", "tip-adapter-f", "clip-adapter", "text-probe"])
def test_a_choice_leaves_a_trace(name: str) -> None:
    x, y, _, texts = data(4, n=40)
    held = ValidationRows(data(4, n=20)[0] + 0.1, data(4, n=20)[1])
    open_ones: dict[str, FewShotClassifier] = {
        "linear-probe": LinearProbe(),
        "tip-adapter": TipAdapter(texts_of(texts)),
        "tip-adapter-f": TipAdapterF(texts_of(texts), steps=10),
        "clip-adapter": CLIPAdapter(texts_of(texts), steps=10),
        "text-probe": TextProbe(texts_of(texts)),
    }
    fitted = open_ones[name].fit(x, y, validation=held)
    assert fitted.validated_on_ == 20
    assert all(v is not None for v in fitted.chosen_.values())
