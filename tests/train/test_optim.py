from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chiasm.errors import ConfigError
from chiasm.train.optim import (
    is_decayed,
    learning_rate,
    make_optimizer,
    parameter_groups,
    part_of,
    set_learning_rate,
    warmup_steps,
)
from chiasm.train.recipe import OptimConfig


def by_name(groups):
    return {n: g for g in groups for n in g["names"]}


def test_decay_falls_on_matrices_only(tiny):
    model = tiny(bias=-10.0)
    groups = by_name(parameter_groups(model, OptimConfig(weight_decay=0.3)))
    assert set(groups) == {n for n, _ in model.named_parameters()}
    decayed = {n for n, g in groups.items() if g["weight_decay"]}
    assert {"visual.conv1.weight", "visual.proj", "text_projection"} <= decayed
    assert any(n.endswith("in_proj_weight") for n in decayed)
    for name in groups.keys() - decayed:
        shape = dict(model.named_parameters())[name].ndim
        assert shape < 2 or "embedding" in name, name
    for name in ("logit_scale", "logit_bias", "token_embedding.weight", "positional_embedding", "visual.ln_pre.bias"):
        assert name not in decayed
    assert all(g["weight_decay"] in (0.0, 0.3) for g in groups.values())


def test_embeddings_are_tables_whatever_they_are_called():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(5, 4)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(3, 3))
            self.mix = nn.Linear(4, 4)

    groups = by_name(parameter_groups(Odd(), OptimConfig(weight_decay=0.1)))
    assert [n for n, g in groups.items() if g["weight_decay"]] == ["mix.weight"]
    assert not is_decayed("x.weight", nn.Parameter(torch.zeros(3)))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("visual.conv1.weight", "image"), ("visual.trunk.layer.lora_A.weight", "image"), ("visual.proj", "projection"),
        ("visual.head.0.weight", "projection"), ("visual.attnpool.c_proj.weight", "projection"),
        ("transformer.resblocks.0.ln_1.weight", "text"), ("text.transformer.x", "text"),
        ("text.proj.weight", "projection"),
        ("text_projection", "projection"), ("logit_scale", "scale"), ("module.logit_bias", "scale"),
        ("module.visual.projector", "image"),
    ],
)  # fmt: skip
def test_parts_follow_the_key_layout(name, part):
    assert part_of(name) == part


def test_factors_scale_the_rate_and_zero_locks(tiny):
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(image_lr_factor=0.0, text_lr_factor=0.1, projection_lr_factor=2.0))
    set_learning_rate(optimizer, 1e-3)
    groups = by_name(optimizer.param_groups)
    assert "visual.conv1.weight" not in groups
    assert not model.visual.conv1.weight.requires_grad
    assert model.visual.proj.requires_grad
    assert groups["visual.proj"]["lr"] == pytest.approx(2e-3)
    assert groups["ln_final.weight"]["lr"] == pytest.approx(1e-4)
    assert groups["logit_scale"]["lr"] == pytest.approx(1e-3)


def test_nothing_to_train_is_an_error():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing is left to train"):
        make_optimizer(model, OptimConfig())


@settings(deadline=None)
@given(
    total=st.integers(1, 400),
    fraction=st.floats(0, 1),
    floor=st.floats(0, 1),
    lr=st.floats(1e-6, 1.0),
)
def test_schedule_rises_then_falls_and_lands(total, fraction, floor, lr):
    config = OptimConfig(lr=lr, warmup_fraction=fraction, final_lr_fraction=floor)
    rates = [learning_rate(s, config=config, total_steps=total) for s in range(total)]
    warm = warmup_steps(config, total)
    assert all(0 <= r <= lr * (1 + 1e-9) for r in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert all(a >= b - 1e-12 for a, b in zip(rates[warm:], rates[warm + 1 :], strict=False))
    if warm:
        assert math.isclose(rates[warm - 1], lr)
    if total - warm > 1:
        assert math.isclose(rates[warm], lr)
        assert math.isclose(rates[-1], lr * floor, abs_tol=lr * 1e-9)


def test_constant_schedule_and_counted_warmup():
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(s, config=config, total_steps=8) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_steps(OptimConfig(warmup_steps=100), 10) == 10
