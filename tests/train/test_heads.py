"""The neural Cox head: it learns what a line cannot, knows when there is nothing, comes back from disk bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from chiasm.errors import FileFormatError, InputError
from chiasm.metrics.concordance import harrell_statistic
from chiasm.metrics.survival import kaplan_meier, survival_target
from chiasm.train.heads import NeuralCox

QUICK = {"epochs": 60, "members": 2, "weight_decays": (0.01,)}


def cohort(seed, n=300, *, hazard):
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 4))
    died, lost = random.exponential(np.exp(-hazard(x))), random.exponential(2.0, n)
    return x, np.minimum(died, lost), died <= lost


def concordance(x, time, event, model):
    return float(harrell_statistic(time, event, model.predict(x))(np.ones((1, len(x))))[0])


@pytest.fixture(scope="module")
def curved():
    return cohort(0, 500, hazard=lambda x: 1.2 * (np.abs(x[:, 0]) - 0.8))


@pytest.fixture(scope="module")
def fitted(curved):
    x, time, event = curved
    return NeuralCox(**QUICK).fit(x, survival_target(time, event))


def test_it_learns_a_hazard_that_is_no_line(curved, fitted):
    x, time, event = curved
    line = NeuralCox(hidden=(), **QUICK).fit(x, survival_target(time, event))
    new = cohort(1, 500, hazard=lambda x: 1.2 * (np.abs(x[:, 0]) - 0.8))
    assert concordance(*new, fitted) > 0.62
    assert concordance(*new, line) < 0.56


def test_the_same_seed_gives_the_same_head_and_leaves_the_global_generator_alone(curved, fitted):
    x, time, event = curved
    before = torch.random.get_rng_state()
    again = clone(fitted).fit(x, survival_target(time, event))
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(again.predict(x), fitted.predict(x))
    other = NeuralCox(**QUICK, seed=5).fit(x, survival_target(time, event))
    assert not np.array_equal(other.predict(x), fitted.predict(x))


def test_on_noise_it_stops_near_the_beginning():
    x, time, event = cohort(2, hazard=lambda x: 0 * x[:, 0])
    model = NeuralCox(members=3).fit(x, survival_target(time, event))
    assert max(model.chosen_["steps"]) <= 15
    assert np.std(model.predict(x)) < 0.3


def test_the_network_of_the_best_step_is_kept():
    """Not the last one, which has learnt the training patients by heart."""
    from chiasm.losses.survival import cox_loss

    x, time, event = cohort(3, 120, hazard=lambda x: 0.5 * x[:, 0])
    model = NeuralCox(epochs=40, patience=40, hidden=(32,), dropout=0.0)
    model.median_, model.mean_, model.scale_ = np.zeros(4), np.zeros(4), np.ones(4)
    tensors = (torch.from_numpy(x).float(), torch.from_numpy(time), torch.from_numpy(event))
    held_out = torch.arange(120) % 3 == 0
    network, best, step = model._train(*tensors, held_out, 0.01, 0)
    with torch.no_grad():
        risk = network(tensors[0][held_out]).squeeze(1)
        assert float(cox_loss(risk, tensors[1][held_out], tensors[2][held_out])) == pytest.approx(best, abs=1e-6)
    assert step < 40


def test_probabilities_fall_from_one_and_their_mean_is_the_curve(curved, fitted):
    x, time, event = curved
    times = np.quantile(time, [0.0, 0.2, 0.4, 0.6, 0.8])
    survival = fitted.predict_survival(x, times)
    assert ((survival >= 0) & (survival <= 1)).all()
    assert (np.diff(survival, axis=1) <= 1e-12).all()
    np.testing.assert_allclose(survival.mean(0), kaplan_meier(time, event).at(times), atol=0.05)
    order = np.argsort(fitted.predict(x))
    assert (np.diff(survival[order, -1]) <= 1e-12).all()  # a higher risk is a lower probability
    with pytest.raises(InputError, match="no patient beyond"):
        fitted.predict_survival(x, [time.max() * 2])


def test_it_comes_back_from_disk_bit_for_bit(curved, fitted, tmp_path):
    x, time, _ = curved
    again = NeuralCox.load(fitted.save(tmp_path / "head"))
    np.testing.assert_array_equal(again.predict(x), fitted.predict(x))
    at = [float(np.median(time))]
    np.testing.assert_array_equal(again.predict_survival(x, at), fitted.predict_survival(x, at))
    assert again.chosen_ == fitted.chosen_
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == ["head.json", "head.safetensors"]


def test_missing_values_and_constant_columns_do_no_harm(curved):
    x, time, event = curved
    x = np.concatenate([x, np.full((len(x), 1), 7.0)], axis=1)
    x[::9, 1] = np.nan
    model = NeuralCox(**QUICK).fit(x, survival_target(time, event))
    assert np.isfinite(model.predict(x)).all()
    moved = x.copy()
    moved[:, 4] = 1e6
    np.testing.assert_array_equal(model.predict(moved), model.predict(x))


def test_held_out_patients_are_whole():
    from chiasm.train.heads import _held_out

    event = np.tile([True, True, False, False], 30)
    groups = np.arange(120) // 2
    for seed in range(5):
        held_out = _held_out(event, groups, 0.25, seed)
        assert not set(groups[held_out]) & set(groups[~held_out])
        assert 0.2 < event[held_out].mean() < 0.8


def test_hostile_input_is_refused(tmp_path, curved):
    x, time, event = curved
    with pytest.raises(NotFittedError):
        NeuralCox().predict(x)
    with pytest.raises(NotFittedError):
        NeuralCox().save(tmp_path / "x")
    with pytest.raises(InputError, match="too few"):
        NeuralCox().fit(x[:20], survival_target(time[:20], np.arange(20) < 3))
    with pytest.raises(InputError, match="shape"):
        NeuralCox().fit(x[:5], survival_target(time, event))
    with pytest.raises(FileFormatError, match=r"NeuralCox\.save"):
        NeuralCox.load(tmp_path)
    (tmp_path / "head.json").write_text("{}")
    (tmp_path / "head.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(FileFormatError):
        NeuralCox.load(tmp_path)


def test_a_column_without_any_value_does_no_harm_and_says_nothing(curved, recwarn):
    x, target = np.random.default_rng(0).normal(size=(60, 2)), survival_target(np.arange(1, 61), np.arange(60) % 2)
    x[:, 1] = np.nan
    found = NeuralCox(members=1, epochs=3).fit(x, target).predict(x)
    alone = NeuralCox(members=1, epochs=3).fit(np.column_stack([x[:, 0], np.zeros(60)]), target).predict(x)
    np.testing.assert_allclose(found, alone)
    assert not recwarn.list
