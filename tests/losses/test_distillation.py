"""Laws of distillation: what the distance is at its ends, whom it teaches and whom it must not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError
from chiasm.losses.distillation import (
    balanced_weights,
    classification,
    cosine_kd,
    logit_kd,
    mse_kd,
    ref_compat,
    relational_kd,
)

laws = settings(max_examples=20, deadline=None)
DISTANCES = (cosine_kd, mse_kd, relational_kd, logit_kd)


def draw(n, dim, seed, dtype=torch.float64):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@laws
@given(st.integers(1, 9), st.integers(2, 12), st.integers(0, 999), st.floats(1e-3, 1e3))
def test_cosine_is_0_along_the_target_2_against_it_and_1_across(n, dim, seed, scale):
    target = draw(n, dim, seed)
    assert float(cosine_kd(scale * target, target)) == pytest.approx(0, abs=1e-9)
    assert float(cosine_kd(-scale * target, target)) == pytest.approx(2, abs=1e-9)
    across = torch.zeros(n, dim, dtype=torch.float64)
    across[:, 0] = scale
    along = torch.zeros_like(across)
    along[:, 1] = 1
    assert float(cosine_kd(across, along)) == pytest.approx(1, abs=1e-12)


@laws
@given(st.integers(1, 9), st.integers(2, 12), st.integers(0, 999))
def test_squared_distance_of_unit_vectors_is_twice_the_cosine_distance(n, dim, seed):
    one, other = draw(n, dim, seed), draw(n, dim, seed + 1)
    torch.testing.assert_close(mse_kd(one, other), 2 * cosine_kd(one, other))


@laws
@given(st.integers(2, 9), st.integers(2, 8), st.integers(0, 999))
def test_relational_ignores_rotations_and_counts_pairs_once(n, dim, seed):
    one, other = draw(n, dim, seed), draw(n, dim, seed + 1)
    turn, _ = torch.linalg.qr(draw(dim, dim, seed + 2))
    torch.testing.assert_close(relational_kd(one @ turn, other), relational_kd(one, other))
    assert float(relational_kd(one, one @ turn)) == pytest.approx(0, abs=1e-12)
    a, b = F.normalize(one, dim=1), F.normalize(other, dim=1)
    pairs = [float(a[i] @ a[j] - b[i] @ b[j]) ** 2 for i in range(n) for j in range(n) if i != j]
    assert float(relational_kd(one, other)) == pytest.approx(sum(pairs) / len(pairs))


@laws
@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 999), st.floats(0.3, 5))
def test_logit_distance_is_the_divergence_times_the_squared_temperature(n, classes, seed, temperature):
    student, teacher = 3 * draw(n, classes, seed), 3 * draw(n, classes, seed + 1)
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    wanted = float((p * (p.log() - q.log())).sum(1).mean()) * temperature**2
    assert float(logit_kd(student, teacher, temperature)) == pytest.approx(wanted, abs=1e-12)
    assert float(logit_kd(teacher + 7, teacher, temperature)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_gradient_reaches_the_target(distance):
    predicted, target = draw(5, 4, 0).requires_grad_(), draw(5, 4, 1).requires_grad_()
    distance(predicted, target).backward()
    assert predicted.grad is not None
    assert float(predicted.grad.abs().sum()) > 0
    assert target.grad is None


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_are_right(distance):
    target = draw(4, 3, 1)
    mask = torch.tensor([True, False, True, True])
    predicted = draw(4, 3, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: distance(p, target, mask=mask), predicted)


@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_without_text_contribute_nothing(distance):
    predicted, target = draw(6, 4, 0).requires_grad_(), draw(6, 4, 1)
    mask = torch.tensor([True, False, True, False, True, False])
    target[~mask] = torch.nan
    loss = distance(predicted, target, mask=mask)
    loss.backward()
    assert (predicted.grad[~mask] == 0).all()
    assert torch.isfinite(predicted.grad).all()
    torch.testing.assert_close(loss, distance(predicted.detach()[mask], target[mask]))
    predicted.grad = None
    none = distance(predicted, target, mask=torch.zeros(6, dtype=torch.bool))
    none.backward()
    assert none.item() == 0
    assert (predicted.grad == 0).all()


def test_one_row_has_no_relation():
    predicted = draw(1, 3, 0).requires_grad_()
    relational_kd(predicted, draw(1, 3, 1)).backward()
    assert (predicted.grad == 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_wrong_shapes_are_refused(distance):
    with pytest.raises(InputError, match="share one shape"):
        distance(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(InputError, match="mask"):
        distance(torch.zeros(3, 4), torch.zeros(3, 4), mask=torch.ones(2, dtype=torch.bool))


def test_temperature_must_be_positive():
    with pytest.raises(InputError, match="temperature"):
        logit_kd(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)


@pytest.mark.parametrize(("classes", "floor"), [(2, 0.3133), (4, 0.7437), (9, 1.3720)])
def test_trap_softmax_twice_never_reaches_0(classes, floor):
    """The published code's loss of a perfect, certain answer; ours is 0."""
    labels = torch.arange(classes)
    certain = 1e4 * torch.eye(classes)
    assert float(classification(certain, labels)) == 0
    assert float(ref_compat(certain, labels)) == pytest.approx(floor, abs=5e-5)
    assert floor == pytest.approx(math.log(1 + (classes - 1) / math.e), abs=5e-5)


@laws
@given(st.integers(1, 9), st.integers(2, 5), st.integers(0, 99))
def test_classification_is_cross_entropy_of_logits(n, classes, seed):
    logits = 5 * draw(n, classes, seed)
    labels = torch.arange(n) % classes
    wanted = -logits.log_softmax(1)[torch.arange(n), labels].mean()
    torch.testing.assert_close(classification(logits, labels), wanted)
    if n >= 3:
        assert not torch.allclose(classification(logits.softmax(1), labels), wanted, atol=1e-3)


def test_class_weights_make_classes_equal_and_leave_out_absent_ones():
    labels = torch.tensor([0, 0, 0, 1])
    weights = balanced_weights(labels, 3)
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 2.0, 0.0]))
    logits = draw(4, 3, 0, torch.float32)
    per_row = F.cross_entropy(logits, labels, reduction="none")
    wanted = (per_row[:3].mean() + per_row[3]) / 2
    torch.testing.assert_close(classification(logits, labels, weights), wanted)
