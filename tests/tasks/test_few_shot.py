"""Few-shot estimators: equal to scikit-learn at the chosen C, choices on validation patients only, hostile input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.neighbors import NearestCentroid

from chiasm.errors import InputError, LeakageError, SpaceMismatch
from chiasm.tasks.few_shot import LinearProbe, Prototypes, ValidationRows, best_of, quality
from chiasm.types import Embeddings

Make = Callable[..., Embeddings]


def clouds(n: int, *, dim: int = 12, classes: int = 3, seed: int = 0, noise: float = 0.6) -> tuple[Any, Any]:
    """Return n unit vectors around one direction a class, and their classes."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    y = np.arange(n) % classes
    x = centres[y] + noise * np.sqrt(dim) / 2 * random.normal(size=(n, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True), y


@pytest.mark.parametrize(("n", "dim", "classes"), [(60, 12, 3), (24, 200, 2), (30, 90, 5)])
def test_linear_probe_is_scikit_learns_logistic_regression(n: int, dim: int, classes: int) -> None:
    x, y = clouds(n, dim=dim, classes=classes)
    held, y_held = clouds(n, dim=dim, classes=classes, seed=1)
    probe = LinearProbe(Cs=(0.1, 1, 10, 100, 1000), tol=1e-8).fit(3.0 * x, y, validation=ValidationRows(held, y_held))
    peer = LogisticRegression(C=probe.chosen_["C"], class_weight="balanced", tol=1e-8, max_iter=20000).fit(x, y)
    np.testing.assert_allclose(probe.predict_proba(held), peer.predict_proba(held), atol=2e-5)
    np.testing.assert_allclose(probe.coef_, peer.coef_, atol=2e-3 * max(1.0, np.abs(peer.coef_).max()))
    assert probe.converged_


def test_the_chosen_c_is_the_best_on_validation_rows() -> None:
    x, y = clouds(30, dim=40, noise=1.4)
    held, y_held = clouds(90, dim=40, seed=1, noise=1.4)
    grid = (0.01, 1.0, 100.0, 1e4)
    chosen = LinearProbe(Cs=grid, tol=1e-8).fit(x, y, validation=ValidationRows(held, y_held)).chosen_["C"]
    found = {c: quality(LinearProbe(C=c, tol=1e-8).fit(x, y).logits(held), y_held) for c in grid}
    assert found[chosen] >= max(found.values(), key=lambda q: (q[0], q[1] - 1e-6))
    assert chosen != LinearProbe(Cs=grid).fit(x, y, validation=ValidationRows(-held, y_held)).chosen_["C"]


@settings(max_examples=15)
@given(st.integers(0, 1000))
def test_prototypes_are_the_nearest_centroid_of_unit_vectors(seed: int) -> None:
    x, y = clouds(40, seed=seed)
    new, _ = clouds(30, seed=seed + 1)
    ours = Prototypes().fit(x, y)
    means = NearestCentroid().fit(x, y).centroids_
    by_hand = (new @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(axis=1)
    np.testing.assert_array_equal(ours.predict(new), by_hand)
    np.testing.assert_allclose(ours.predict_proba(new).sum(axis=1), 1)


def test_centring_takes_off_what_all_vectors_share() -> None:
    x, y = clouds(200, noise=1.0)
    shift = np.zeros(12)
    shift[0] = 30.0
    new, truth = clouds(300, seed=3, noise=1.0)
    centred = Prototypes(center=True).fit(x + shift, y)
    assert (centred.predict(new + shift) == truth).mean() > (Prototypes().fit(x, y).predict(new) == truth).mean() - 0.05


def test_patients_on_both_sides_are_refused() -> None:
    x, y = clouds(30)
    patients = [f"p{i}" for i in range(30)]
    held = ValidationRows(x[:6], y[:6], ["p3", "q1", "q2", "q3", "q4", "q5"])
    with pytest.raises(LeakageError, match="1 patients are in both training and validation"):
        LinearProbe().fit(x, y, patients, validation=held)


def test_the_inner_choice_keeps_patients_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clouds(60)
    patients = np.array([f"p{i % 15}" for i in range(60)])
    seen: list[Any] = []
    search = LinearProbe._search

    def spy(self: LinearProbe, x_fit: Any, y_fit: Any, x_held: Any, y_held: Any) -> Any:
        rows = [
            {patients[int(np.flatnonzero(np.isclose(x, r).all(axis=1))[0])] for r in part} for part in (x_fit, x_held)
        ]
        seen.append(rows)
        return search(self, x_fit, y_fit, x_held, y_held)

    monkeypatch.setattr(LinearProbe, "_search", spy)
    probe = LinearProbe().fit(x, y, patients)
    ((fit, held),) = seen
    assert held
    assert not fit & held
    assert len(fit | held) == 15
    assert probe.validated_on_ == sum(p in held for p in patients)
    # After the choice all rows are used.
    again = LinearProbe(C=probe.chosen_["C"]).fit(x, y)
    np.testing.assert_array_equal(probe.coef_, again.coef_)


def test_they_are_scikit_learn_estimators() -> None:
    x, y = clouds(60)
    names = np.array(["a", "b", "c"])[y]
    probe = LinearProbe(C=3.0, tol=1e-3)
    assert clone(probe).get_params() == probe.get_params()
    scores = cross_val_score(probe, x, names, groups=np.arange(60) // 2, cv=GroupKFold(5))
    assert scores.mean() > 0.8
    assert probe.fit(x, names).classes_.tolist() == ["a", "b", "c"]
    assert probe.predict(x[:3]).tolist() == ["a", "b", "c"]
    assert Prototypes().fit(x, names).score(x, names) > 0.8


def test_every_class_weighs_alike() -> None:
    x, y = clouds(300, classes=2, dim=3, noise=1.6)
    rows = np.r_[np.flatnonzero(y == 0), np.flatnonzero(y == 1)[:15]]
    new, truth = clouds(400, classes=2, dim=3, seed=5, noise=1.6)
    found = LinearProbe(C=1.0).fit(x[rows], y[rows]).predict(new)
    recalls = [(found[truth == c] == c).mean() for c in (0, 1)]
    assert abs(recalls[0] - recalls[1]) < 0.2


def test_embeddings_carry_space_and_patients(make: Make) -> None:
    x, y = clouds(30)
    patients = tuple(f"p{i // 2}" for i in range(30))
    images = make(x, patients=patients)
    probe = Prototypes().fit(images, y)
    assert probe.predict(make(x)).shape == (30,)
    with pytest.raises(SpaceMismatch, match="two spaces"):
        probe.predict(make(x, name="another"))
    with pytest.raises(InputError, match="image embeddings"):
        Prototypes().fit(make(x, "text"), y)
    with pytest.raises(LeakageError):
        LinearProbe().fit(images, y, validation=ValidationRows(make(x[1:4], patients=patients[1:4]), y[1:4]))


def test_hostile_input() -> None:
    x, y = clouds(12)
    with pytest.raises(InputError, match="2 of 12 rows have no label"):
        Prototypes().fit(x, [None, float("nan"), *y[2:].tolist()])
    with pytest.raises(InputError, match="one class"):
        Prototypes().fit(x, np.zeros(12))
    with pytest.raises(InputError, match="11 labels for 12"):
        Prototypes().fit(x, y[1:])
    with pytest.raises(InputError, match="mix numbers and text"):
        Prototypes().fit(x, ["a", *y[1:].tolist()])
    with pytest.raises(InputError, match="no direction"):
        Prototypes().fit(np.r_[x[1:], np.zeros((1, 12))], y)
    with pytest.raises(InputError, match="is not fitted"):
        Prototypes().predict(x)
    with pytest.raises(InputError, match="5 dimensions, the method was fitted on 12"):
        Prototypes().fit(x, y).predict(x[:, :5])
    with pytest.raises(InputError, match="too few to hold some of every class back"):
        LinearProbe().fit(x[:4], y[:4], ["a", "a", "b", "c"])
    with pytest.raises(InputError, match="class that no training row has"):
        LinearProbe().fit(x, y, validation=ValidationRows(x[:2], [7, 8], ["q", "r"]))
    with pytest.raises(InputError, match="C must be positive"):
        LinearProbe(Cs=(0.0, 1.0)).fit(x, y)


def test_an_optimiser_that_stops_early_says_so() -> None:
    x, y = clouds(60, noise=1.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not LinearProbe(C=1e4, max_iter=1, tol=1e-9).fit(x, y).converged_


def test_quality_prefers_accuracy_then_log_loss_then_the_first() -> None:
    truth = np.array([0, 0, 0, 1])
    right = np.array([[2.0, 0], [2, 0], [2, 0], [0, 2]])
    surer, wrong = 2 * right, right[:, ::-1]
    assert quality(right, truth)[0] == 1
    assert quality(np.array([[2.0, 0]] * 4), truth)[0] == 0.5  # the majority is worth chance
    assert best_of([quality(z, truth) for z in (wrong, right, surer, surer)]) == 2
