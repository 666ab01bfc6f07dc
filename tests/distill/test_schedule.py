"""When what happens: batches, rates and the weight of the text are functions of the step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.distill.recipe import FuseConfig, StageConfig
from chiasm.distill.schedule import Plan, derived_seed, kd_weight, learning_rate
from chiasm.errors import InputError

laws = settings(max_examples=25, deadline=None)


@laws
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 99), st.integers(0, 5))
def test_every_epoch_shows_each_row_once(rows, size, seed, warmup):
    plan = Plan.of(StageConfig(batch_size=size, epochs=3), rows, warmup=warmup)
    assert plan.steps == 3 * plan.per_epoch
    for epoch in range(3):
        start = warmup + epoch * plan.per_epoch
        seen = np.concatenate([plan.batch(s, seed=seed) for s in range(start, start + plan.per_epoch)])
        assert sorted(seen) == list(range(rows))


@laws
@given(st.integers(2, 40), st.integers(1, 9), st.integers(0, 99), st.integers(1, 7), st.integers(0, 20))
def test_a_warm_up_does_not_change_the_batches_after_it(rows, size, seed, warmup, step):
    plain = Plan.of(StageConfig(batch_size=size), rows)
    warm = Plan.of(StageConfig(batch_size=size), rows, warmup=warmup)
    np.testing.assert_array_equal(plain.batch(step, seed=seed), warm.batch(step + warmup, seed=seed))


def test_epochs_and_seeds_have_orders_of_their_own():
    plan = Plan.of(StageConfig(batch_size=10), 40)
    orders = [tuple(plan.batch(s, seed=seed)) for seed in (0, 1) for s in (0, 4)]
    assert len(set(orders)) == 4
    np.testing.assert_array_equal(plan.batch(3, seed=5), plan.batch(3, seed=5))


def test_full_batch_is_all_rows_and_one_step_an_epoch():
    plan = Plan.of(StageConfig(batch_size="full", epochs=7), 13)
    assert (plan.per_epoch, plan.steps) == (1, 7)
    np.testing.assert_array_equal(plan.batch(4, seed=3), np.arange(13))


def test_no_images_is_an_error():
    with pytest.raises(InputError, match="no image"):
        Plan.of(StageConfig(), 0)


def test_validations_fall_on_the_start_the_interval_and_the_end():
    plan = Plan.of(StageConfig(steps=25, eval_every=10), 8)
    assert [s for s in range(26) if plan.validates(s)] == [0, 10, 20, 25]
    ten_an_epoch = Plan.of(StageConfig(batch_size=1, epochs=1), 100)
    assert sum(ten_an_epoch.validates(s) for s in range(1, 101)) == 10
    assert not plan.validates(-3)


@laws
@given(st.integers(1, 50), st.floats(0.1, 10))
def test_weight_of_the_text_rises_falls_or_stays(steps, weight):
    found = {
        kind: [kd_weight(s, config=FuseConfig(kd_weight=weight, kd_schedule=kind), steps=steps) for s in range(steps)]
        for kind in ("constant", "rise", "fall")
    }
    assert found["constant"] == [weight] * steps
    if steps > 1:
        assert found["rise"][0] == 0
        assert found["rise"][-1] == pytest.approx(weight)
        assert found["fall"][0] == pytest.approx(weight)
        assert found["fall"][-1] == pytest.approx(0, abs=1e-12)
        np.testing.assert_allclose(found["rise"], np.linspace(0, weight, steps))
        cosine = [weight * (1 + math.cos(math.pi * s / (steps - 1))) / 2 for s in range(steps)]
        np.testing.assert_allclose(found["fall"], cosine, atol=1e-12)


@laws
@given(st.integers(1, 50))
def test_learning_rate_is_constant_or_a_falling_cosine(steps):
    constant = StageConfig(lr=0.5, schedule="constant")
    assert {learning_rate(s, config=constant, steps=steps) for s in range(steps)} == {0.5}
    rates = [learning_rate(s, config=StageConfig(lr=0.5), steps=steps) for s in range(steps)]
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_purposes_have_seeds_of_their_own():
    seeds = {derived_seed(s, *p) for s in (0, 1) for p in (("lora",), ("text",), ("step", 1), ("step", 2))}
    assert len(seeds) == 8
    assert derived_seed(3, "step", 4) == derived_seed(3, "step", 4)
