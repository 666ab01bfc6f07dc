"""Cox's partial likelihood: its definition, both kinds of ties, its gradient, its laws, and the peer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import InputError, UnknownName
from chiasm.losses.survival import cox_loss

laws = settings(max_examples=25, deadline=None)


def patients(seed, n=12, distinct=5):
    """Log risks, times with many ties, flags."""
    random = np.random.default_rng(seed)
    event = random.random(n) < 0.6
    event[0] = True
    return random.normal(size=n), random.integers(1, distinct + 1, n).astype(float), event


def by_definition(risk, time, event, ties):
    """Sum over event times; Efron takes l/d of the tied events out of the risk set at step l."""
    total = 0.0
    for t in np.unique(time[event]):
        tied = event & (time == t)
        at_risk, own = np.exp(risk[time >= t]).sum(), np.exp(risk[tied]).sum()
        for step in range(tied.sum()):
            share = step / tied.sum() if ties == "efron" else 0.0
            total += math.log(at_risk - share * own)
        total -= risk[tied].sum()
    return total


def loss_of(risk, time, event, **settings):
    return cox_loss(torch.tensor(risk), torch.tensor(time), torch.tensor(event), **settings)


@laws
@given(st.integers(0, 10_000), st.sampled_from(["breslow", "efron"]), st.integers(1, 12))
def test_it_is_its_definition(seed, ties, distinct):
    risk, time, event = patients(seed, distinct=distinct)
    expected = by_definition(risk, time, event, ties)
    assert float(loss_of(risk, time, event, ties=ties, reduction="sum")) == pytest.approx(expected, abs=1e-10)
    assert float(loss_of(risk, time, event, ties=ties)) == pytest.approx(expected / event.sum(), abs=1e-10)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_the_gradient_is_right(ties):
    risk, time, event = patients(3)
    given_risk = torch.tensor(risk, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda r: cox_loss(r, torch.tensor(time), torch.tensor(event), ties=ties), (given_risk,)
    )


@laws
@given(st.integers(0, 10_000), st.floats(-30, 30), st.sampled_from(["breslow", "efron"]))
def test_only_differences_of_risk_and_the_order_of_times_count(seed, shift, ties):
    risk, time, event = patients(seed)
    value = float(loss_of(risk, time, event, ties=ties))
    assert float(loss_of(risk + shift, time, event, ties=ties)) == pytest.approx(value, abs=1e-9)
    assert float(loss_of(risk, time**2 * 7, event, ties=ties)) == pytest.approx(value, abs=1e-12)
    order = np.random.default_rng(seed).permutation(len(risk))
    assert float(loss_of(risk[order], time[order], event[order], ties=ties)) == pytest.approx(value, abs=1e-9)


def test_without_ties_both_forms_agree_and_with_ties_efron_is_smaller():
    risk, _, event = patients(1)
    distinct = np.arange(1.0, 13)
    one, other = (float(loss_of(risk, distinct, event, ties=t)) for t in ("breslow", "efron"))
    assert one == pytest.approx(other, abs=1e-12)
    tied = np.repeat([1.0, 2.0], 6)
    one, other = (float(loss_of(risk, tied, np.ones(12, bool), ties=t)) for t in ("breslow", "efron"))
    assert other < one


def test_efron_lies_near_the_exact_likelihood_of_ties():
    # Exact: the mean over all orders in which the tied events may have come.
    risk = np.array([0.3, -0.2, 0.5, 0.0, 0.1])
    time, event = np.array([1.0, 1, 1, 2, 2]), np.array([1, 1, 1, 0, 0], bool)
    orders = []
    for order in itertools.permutations(range(3)):
        left, likelihood = list(range(5)), 1.0
        for k in order:
            likelihood *= math.exp(risk[k]) / sum(math.exp(risk[j]) for j in left)
            left.remove(k)
        orders.append(likelihood)
    exact = -math.log(np.mean(orders))
    efron, breslow = (float(loss_of(risk, time, event, ties=t, reduction="sum")) for t in ("efron", "breslow"))
    assert abs(efron - exact) < 0.03
    assert abs(breslow - exact) > 0.3


def test_the_minimum_is_scikit_survivals_cox_model():
    linear = pytest.importorskip("sksurv.linear_model", reason="the extra `survival` is not installed")
    from chiasm.metrics.survival import survival_target

    random = np.random.default_rng(0)
    x = random.normal(size=(150, 3))
    time = np.ceil(random.exponential(np.exp(-x @ [0.8, -0.5, 0.0])) * 8)  # many ties
    event = random.random(150) < 0.7
    for ties, other in (("breslow", "efron"), ("efron", "breslow")):
        theirs = linear.CoxPHSurvivalAnalysis(ties=ties, tol=1e-14).fit(x, survival_target(time, event)).coef_
        weights = torch.tensor(theirs, requires_grad=True)

        def slope(form, weights=weights):
            loss = cox_loss(torch.tensor(x) @ weights, torch.tensor(time), torch.tensor(event), ties=form)
            return float(torch.autograd.grad(loss, weights)[0].abs().max())

        assert slope(ties) < 1e-6
        assert slope(other) > 1e-3  # the other form has its minimum elsewhere


def test_extreme_risks_give_finite_numbers_and_gradients():
    risk = torch.tensor([900.0, -900.0, 0.0, 5.0], requires_grad=True)
    for ties in ("breslow", "efron"):
        loss = cox_loss(risk, torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([1, 1, 1, 0]), ties=ties)
        (gradient,) = torch.autograd.grad(loss, risk)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
    half = cox_loss(risk.half(), torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([1, 1, 1, 0]))
    assert half.dtype == torch.float32


def test_without_an_event_there_is_nothing_to_learn():
    risk = torch.ones(4, requires_grad=True)
    loss = cox_loss(risk, torch.arange(4.0), torch.zeros(4))
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(risk.grad.abs().sum()) == 0


def test_hostile_input_is_refused():
    risk = torch.zeros(3)
    with pytest.raises(InputError, match="one shape"):
        cox_loss(risk, torch.ones(2), torch.ones(3))
    with pytest.raises(InputError, match="one shape"):
        cox_loss(torch.zeros(3, 1), torch.ones(3, 1), torch.ones(3, 1))
    with pytest.raises(UnknownName, match="efron"):
        cox_loss(risk, torch.ones(3), torch.ones(3), ties="efrom")
    with pytest.raises(UnknownName):
        cox_loss(risk, torch.ones(3), torch.ones(3), reduction="max")
