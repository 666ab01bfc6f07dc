"""Projections, locks and low-rank adapters: they start as the tower itself, train alone, and merge exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chiasm.encoders.adapters import (
    FusedLora,
    apply_lora,
    freeze,
    has_lora,
    make_projection,
    merge_lora,
    trainable_parameters,
)
from chiasm.encoders.base import LoraConfig
from chiasm.encoders.dual import DualEncoder
from chiasm.encoders.transformer import Attention
from chiasm.errors import ConfigError

Tiny = Callable[..., DualEncoder]


def disturb(module: nn.Module, seed: int = 1) -> None:
    """Give the adapters weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


class Convolutions(nn.Module):
    """A tower of mostly convolutions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.second = nn.Conv2d(16, 24, 3, stride=2)
        self.norm = nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.depthwise(self.first(x))))
        return self.head(self.norm(x).mean((2, 3)))


@settings(max_examples=20, deadline=None)
@given(in_dim=st.integers(2, 9), out_dim=st.integers(1, 9), hidden=st.none() | st.integers(1, 7), drop=st.booleans())
def test_projections_have_the_right_shape(in_dim: int, out_dim: int, hidden: int | None, drop: bool) -> None:
    x = torch.randn(2, 4, in_dim)  # patches go through as well as single vectors
    assert make_projection("linear", in_dim, out_dim)(x).shape == (2, 4, out_dim)
    mlp = make_projection("mlp", in_dim, out_dim, hidden, 0.5 if drop else 0.0)
    assert mlp(x).shape == (2, 4, out_dim)
    assert set(mlp.state_dict()) == {"0.weight", "2.weight"}  # open_clip's names, whatever the dropout
    assert mlp.state_dict()["0.weight"].shape[0] == (hidden if hidden else (in_dim + out_dim) // 2)
    assert make_projection("none", in_dim, in_dim)(x) is x


def test_projection_none_needs_equal_widths() -> None:
    with pytest.raises(ConfigError, match="the tower has 3 and the joint space 4"):
        make_projection("none", 3, 4)


def test_freeze_stops_everything() -> None:
    model = Convolutions().train()
    before = model.norm.running_mean.clone()
    freeze(model)(torch.randn(4, 3, 8, 8))
    assert not trainable_parameters(model)
    assert torch.equal(model.norm.running_mean, before)


@pytest.mark.parametrize("side", ["vit", "resnet", "text"])
def test_lora_starts_as_the_tower_trains_alone_and_merges_exactly(tiny: Tiny, side: str) -> None:
    model = tiny(image={"kind": "resnet" if side == "resnet" else "vit"})
    tower: nn.Module = model.transformer if side == "text" else model.visual
    size = 64 if side == "resnet" else 32
    x = torch.randn(2, 6, 24) if side == "text" else torch.randn(2, 3, size, size)
    plain, names = tower(x), set(tower.state_dict())
    assert apply_lora(tower, LoraConfig(rank=3, alpha=6.0)) is tower
    assert has_lora(tower)
    torch.testing.assert_close(tower(x), plain, rtol=0, atol=1e-6)
    assert all("lora_" in name for name in trainable_parameters(tower))
    tower(x).square().sum().backward()
    assert all(p.grad is None for n, p in tower.named_parameters() if "lora_" not in n)
    assert any(float(p.grad.abs().sum()) > 0 for n, p in tower.named_parameters() if "lora_B" in n)
    disturb(tower)
    adapted = tower(x).detach()
    assert float((adapted - plain.detach()).abs().max()) > 1e-2
    merge_lora(tower)
    assert set(tower.state_dict()) == names
    assert not has_lora(tower)
    torch.testing.assert_close(tower(x), adapted, rtol=1e-5, atol=1e-5)
    assert not trainable_parameters(tower)


def test_fused_update_equals_three_separate_ones() -> None:
    """What peft gives to separate query, key and value layers, on one matrix."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    fused = Attention(8, 2)
    for parameter in fused.parameters():
        nn.init.normal_(parameter)
    apply_lora(fused_tower := nn.Sequential(fused), LoraConfig(rank=2, alpha=6.0, targets=("in_proj_weight",)))
    disturb(fused_tower)
    update = fused.parametrizations["in_proj_weight"][0]
    assert isinstance(update, FusedLora)
    separate = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "qkv"})
    weights = fused.parametrizations["in_proj_weight"].original.chunk(3)
    for name, weight in zip("qkv", weights, strict=True):
        separate[name].weight.data.copy_(weight)
    inject_adapter_in_model(PeftConfig(r=2, lora_alpha=6, target_modules=["q", "k", "v"]), separate)
    x = torch.randn(5, 8)
    outputs = []
    for i, name in enumerate("qkv"):
        layer = separate[name]
        layer.lora_A["default"].weight.data.copy_(update.lora_A[i])
        layer.lora_B["default"].weight.data.copy_(update.lora_B[i])
        outputs.append(layer(x))
    torch.testing.assert_close(x @ fused.in_proj_weight.T, torch.cat(outputs, 1), rtol=1e-5, atol=1e-5)


def test_merging_a_fused_matrix_is_exact_to_1e_6() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.1)
    tower = nn.Sequential(attention)
    apply_lora(tower, LoraConfig(rank=2, dropout=0.5))
    disturb(tower)
    x = torch.randn(3, 5, 16)
    adapted = tower.eval()[0](x)[0].detach()
    merge_lora(tower.train())  # dropout must not enter the merged weights
    assert float((tower[0](x)[0] - adapted).abs().max() / adapted.abs().max()) <= 1e-6
    assert type(tower[0]) is Attention


def test_a_copy_and_its_original_are_merged_one_after_the_other() -> None:
    """Merging one of them took the adapted matrix from the other, whose class was the same."""
    torch.manual_seed(0)
    tower = nn.Sequential(Attention(16, 2))
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.1)
    apply_lora(tower, LoraConfig(rank=2))
    disturb(tower)
    twin = copy.deepcopy(tower).eval()
    x = torch.randn(3, 5, 16)
    adapted = tower.eval()[0](x)[0].detach()
    for one in (twin, tower):
        torch.testing.assert_close(merge_lora(one)[0](x)[0], adapted)
        assert type(one[0]) is Attention


def test_convolutions_are_adapted_where_they_carry_the_tower() -> None:
    model = Convolutions().eval()
    x = torch.randn(2, 3, 8, 8)
    plain = model(x)
    apply_lora(model, LoraConfig(rank=2))
    adapted = {n.split(".lora_")[0] for n in trainable_parameters(model)}
    assert adapted == {"first", "second", "head"}  # not the grouped one
    torch.testing.assert_close(model(x), plain)
    disturb(model)
    after = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), after, rtol=1e-5, atol=1e-5)


def test_a_patch_embedding_is_adapted_alone_when_it_is_named(tiny: Tiny) -> None:
    tower = freeze(tiny().visual)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = tower(pixels)
    apply_lora(tower, LoraConfig(rank=2, targets=("conv1", "projection")))
    adapted = {name for name, _ in tower.named_parameters() if "lora_" in name}
    assert {name.split(".lora_")[0] for name in adapted} == {"conv1"}
    torch.testing.assert_close(tower(pixels), before, rtol=1e-5, atol=1e-5)  # a convolution now, a product before
    disturb(tower)
    changed = tower(pixels)
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(merge_lora(tower)(pixels), changed, rtol=1e-5, atol=1e-5)


def test_dropout_of_the_fused_update_is_for_training_only() -> None:
    torch.manual_seed(0)
    update = FusedLora(torch.randn(12, 4), LoraConfig(rank=2, dropout=0.5))
    update.lora_B.data.normal_()
    weight = torch.randn(12, 4)
    update.eval()
    assert torch.equal(update(weight), update(weight))
    update.train()
    assert not torch.equal(update(weight), update(weight))


def test_layers_inside_torchs_own_attention_are_left_alone(tiny: Tiny) -> None:
    """``nn.MultiheadAttention`` reads the weights past any wrapper, so an adapter there would have no effect."""
    model = tiny(image={"pool": "attention"})
    apply_lora(model.visual, LoraConfig(rank=1))
    assert not any(name.startswith("attn_pool") for name in trainable_parameters(model.visual))


def test_refusals(tiny: Tiny) -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=r"no layer of the tower ends in one of `lora\.targets` = q_proj, nothing"):
        apply_lora(model.visual, LoraConfig(targets=("q_proj", "nothing")))
    with pytest.raises(ConfigError, match="nothing to adapt"):
        apply_lora(nn.Sequential(nn.ReLU()), LoraConfig())
    apply_lora(model.visual, LoraConfig(rank=1, targets=("c_fc",)))
    with pytest.raises(ConfigError, match="has low-rank adapters already"):
        apply_lora(model.visual, LoraConfig(rank=1))
    assert merge_lora(nn.Linear(2, 2)) is not None  # nothing to merge is no error
