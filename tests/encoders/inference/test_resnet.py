from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chiasm.encoders.base import Encoder, ImageTowerConfig
from chiasm.encoders.ensemble import EnsembleModel
from chiasm.encoders.inference import conv
from chiasm.encoders.inference.conv import PackedConv, can_convolve, folded
from chiasm.encoders.inference.engine import Engine, image_form
from chiasm.encoders.inference.packed import NotPackable
from chiasm.encoders.inference.resnet import PackedClassicResNet, PackedModifiedResNet, resnet_form
from chiasm.encoders.named import build_named_tower
from chiasm.errors import InputError

Make = Callable[..., Any]
RESNET: dict[str, Any] = {"kind": "resnet"}
FORMS: dict[str, dict[str, Any]] = {
    "attention": {},
    "mean": {"pool": "mean"},
    "two stages": {"layers": (1, 2)},
    "odd map": {"layers": (1, 1, 1, 1), "width": 24, "image_size": 96, "heads": None},
}
NAMED: dict[str, dict[str, Any]] = {
    "classic_resnet": {"layers": [1, 2, 1, 1], "width": 8},
    "basic": {"layers": [2, 1, 1], "width": 8, "block": "basic"},
    "gloria": {"layers": [1, 1, 2], "width": 8, "output_dim": 12, "upsample": 75},
    "biovil": {"layers": [1, 1, 1], "width": 8, "output_dim": 12},
    "biovil-t": {"layers": [1, 1, 1], "width": 8, "output_dim": 12, "temporal": True, "temporal_dim": 16},
}
LAW = settings(max_examples=20, deadline=None)


def pixels(batch: int = 3, side: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def far(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found.float() - expected).abs().max() / expected.abs().max())


def angle(found: Tensor, expected: Tensor) -> float:
    return 1 - float(F.cosine_similarity(found, expected).min())


def named(name: str, scramble: Make) -> nn.Module:
    torch.manual_seed(0)
    source = {"basic": "classic_resnet", "biovil-t": "biovil"}.get(name, name)
    config = ImageTowerConfig(kind="named", source=source, image_size=64, options=NAMED[name])
    tower = build_named_tower(config).eval()
    scramble(tower)
    return tower


@pytest.fixture
def no_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A torch without oneDNN's private operators."""

    def absent(*arguments: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_convolution_weight'")

    monkeypatch.setattr(conv, "_reordered", absent)
    can_convolve.cache_clear()
    yield
    can_convolve.cache_clear()


# one convolution


@LAW
@given(
    kernel=st.sampled_from([1, 3, 7]), stride=st.integers(1, 2), groups=st.sampled_from([1, 2]), seed=st.integers(0, 99),
    side=st.integers(7, 20), usual=st.integers(7, 64), bias=st.booleans(), affine=st.booleans(),
)  # fmt: skip
def test_folding_is_convolution_and_batch_norm(
    kernel: int, stride: int, groups: int, seed: int, side: int, usual: int, bias: bool, affine: bool
) -> None:
    torch.manual_seed(seed)
    plain = nn.Conv2d(4, 6, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
    norm = nn.BatchNorm2d(6, affine=affine, eps=1e-3).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(1e-3, 2)
    with torch.inference_mode():
        x = torch.randn(2, 4, side, side)
        expected = norm(plain(x))
        shortcut = torch.randn_like(expected)
        fast = PackedConv(plain, norm, side=usual, dtype=torch.float32)
        assert far(fast(x), expected) < 1e-5
        assert fast(x).is_contiguous(memory_format=torch.channels_last)
        fast = PackedConv(plain, norm, side=usual, dtype=torch.float32, relu=True)
        last = shortcut.clone().contiguous(memory_format=torch.channels_last)
        assert far(fast(x, last), (expected + shortcut).relu()) < 1e-5
        mixed = PackedConv(plain, norm, side=usual, dtype=torch.bfloat16)
        assert mixed(x).dtype == torch.bfloat16
        assert far(mixed(x), expected) < 2e-2


def test_folding_without_eps_or_in_the_wrong_axis_would_be_seen() -> None:
    """What the bounds are for: each mistake misses them by orders of magnitude."""
    torch.manual_seed(0)
    plain, norm = nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6).eval()
    norm.running_var.uniform_(1e-4, 2e-4)
    norm.running_mean.normal_()
    with torch.inference_mode():
        x = torch.randn(2, 6, 9, 9)
        expected = norm(plain(x))
        weight, bias = folded(plain, norm)
        assert bias is not None
        assert far(F.conv2d(x, weight, bias), expected) < 1e-5
        scale = norm.running_var.rsqrt()
        assert far(F.conv2d(x, plain.weight * scale[:, None, None, None], bias), expected) > 1e-3
        good = (norm.running_var + norm.eps).rsqrt()
        assert far(F.conv2d(x, plain.weight * good[None, :, None, None], bias), expected) > 1e-2
        assert far(F.conv2d(x, weight.permute(1, 0, 2, 3), bias), expected) > 1e-2


def test_statistics_are_folded_in_double_precision() -> None:
    """A shift that all but cancels the mean: in float32 the bias would lose what lies below the mean's last bit."""
    plain, norm = nn.Conv2d(1, 50, 1, bias=False), nn.BatchNorm2d(50).eval()
    with torch.inference_mode():
        norm.running_mean.uniform_(0.5, 1)
        norm.running_var.fill_(1e-6)
        mean, deviation = norm.running_mean, (norm.running_var + norm.eps).sqrt()
        exact_mean = mean.double() / (norm.running_var.double() + norm.eps).sqrt()
        norm.bias.copy_(exact_mean + 1e-4)
        exact = norm.bias.double() - exact_mean
        _, bias = folded(plain, norm)
        assert bias is not None
        assert far(bias, exact) < 1e-6
        assert far(norm.bias - mean / deviation, exact) > 1e-2


def test_what_cannot_be_folded_is_refused() -> None:
    plain = nn.Conv2d(4, 4, 3)
    for wrong in (nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1)):
        with pytest.raises(NotPackable, match="padded"):
            folded(wrong.eval(), None)
    for norm in (nn.BatchNorm2d(4).train(), nn.BatchNorm2d(4, track_running_stats=False).eval()):
        with pytest.raises(NotPackable, match="statistics of its batch"):
            folded(plain, norm)
    with pytest.raises(NotPackable, match="GroupNorm"):
        folded(plain, nn.GroupNorm(2, 4))
    with pytest.raises(NotPackable, match="ConvTranspose2d"):
        folded(nn.ConvTranspose2d(4, 4, 3), None)
    with pytest.raises(NotPackable, match=r"float16"):
        folded(plain.half(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_without_onednn_the_answer_is_the_same(tiny: Make, dtype: torch.dtype, request: Any) -> None:
    tower = tiny(image=RESNET).visual
    x = pixels()
    fast = PackedModifiedResNet(tower, dtype=dtype)(x)
    request.getfixturevalue("no_operators")
    assert not can_convolve(dtype)
    slow = PackedModifiedResNet(tower, dtype=dtype)
    assert not slow._steps[0].packed
    assert far(slow(x), fast) < (1e-5 if dtype == torch.float32 else 5e-2)


def test_an_operator_that_counts_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = conv._convolved
    monkeypatch.setattr(conv, "_convolved", lambda *a: real(*a) * 1.001)
    can_convolve.cache_clear()
    assert not can_convolve(torch.float32)
    monkeypatch.undo()
    can_convolve.cache_clear()


# towers


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_clip_resnet(tiny: Make, form: str) -> None:
    shape = {**RESNET, **FORMS[form]}
    tower = tiny(image=shape).visual
    for batch in (1, 3):
        x = pixels(batch, shape.get("image_size", 64))
        expected = tower(x)
        found = PackedModifiedResNet(tower, dtype=torch.float32)(x)
        assert found.shape == expected.shape
        assert far(found, expected) < 1e-5
        mixed = PackedModifiedResNet(tower, dtype=torch.bfloat16)(x)
        assert mixed.dtype == torch.float32
        assert angle(mixed, expected) < 1e-3  # random weights, wide open: each block doubles what went wrong before it


@pytest.mark.parametrize("name", NAMED)
@torch.inference_mode()
def test_he_resnet_and_what_stands_on_it(scramble: Make, name: str) -> None:
    tower = named(name, scramble)
    x = pixels()
    expected = tower(x)
    form = resnet_form(tower, torch.float32)
    assert far(form(x), expected) < 1e-5
    assert far(form(x[:1]), expected[:1]) < 1e-5
    assert torch.equal(form(x), form(x))  # nothing that is kept is overwritten
    mixed = resnet_form(tower, torch.bfloat16)(x)
    assert mixed.dtype == torch.float32
    assert angle(mixed, expected) < 1e-3


@torch.inference_mode()
def test_the_pixels_and_the_weights_are_left_as_they_were(tiny: Make) -> None:
    tower = tiny(image={**RESNET, "layers": (2,)}).visual
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    x = pixels()
    PackedModifiedResNet(tower, dtype=torch.bfloat16)(x)
    PackedModifiedResNet(tower, dtype=torch.float32)(x)
    assert torch.equal(x, pixels())
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


@torch.inference_mode()
def test_any_size_where_the_tower_takes_any(scramble: Make) -> None:
    tower: Any = named("classic_resnet", scramble)
    tower.image_size = None
    form = PackedClassicResNet(tower, side=64, dtype=torch.float32)
    for side in (33, 64, 70):
        assert far(form(pixels(2, side)), tower(pixels(2, side))) < 1e-5


@torch.inference_mode()
def test_empty_batches_and_wrong_sizes_are_as_in_the_tower(tiny: Make, scramble: Make) -> None:
    for tower in (tiny(image=RESNET).visual, *(named(name, scramble) for name in NAMED)):
        form = resnet_form(tower, torch.bfloat16)
        assert form(pixels(0)).shape == tower(pixels(0)).shape == (0, tower.output_dim)
        assert form(pixels(0)).dtype == torch.float32
        with pytest.raises(InputError) as plain:
            tower(pixels(2, 63))
        with pytest.raises(InputError) as fast:
            form(pixels(2, 63))
        assert str(plain.value) == str(fast.value)


@LAW
@given(side=st.integers(1, 6), heads=st.sampled_from([1, 2, 4]), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_attention_of_one_query_needs_no_keys(side: int, heads: int, batch: int, seed: int) -> None:
    """The query through the key matrix, and the weighted mean through the value matrix, are what the pool computes."""
    from chiasm.encoders.inference.resnet import _AttentionPool
    from chiasm.encoders.resnet import AttentionPool2d

    torch.manual_seed(seed)
    pool = AttentionPool2d(side, 16, heads, 5).eval()
    nn.init.normal_(pool.positional_embedding)
    with torch.inference_mode():
        maps = torch.randn(batch, 16, side, side) * 3
        fast = _AttentionPool(pool, torch.float32)
        assert far(fast(maps), pool(maps)) < 1e-5
        assert far(fast(maps.contiguous(memory_format=torch.channels_last)), pool(maps)) < 1e-5


# what is not a plain ResNet runs as it is


def test_hooks_adapters_and_training_are_refused(tiny: Make, scramble: Make) -> None:
    tower = tiny(image=RESNET).visual
    for part in (tower, tower.bn1, tower.layer2[0].conv2, tower.layer2, tower.attnpool.k_proj, tower.attnpool):
        handle = part.register_forward_hook(lambda *a: None)
        with pytest.raises(NotPackable, match="hooks"):
            PackedModifiedResNet(tower, dtype=torch.float32)
        handle.remove()
    tower.layer1[0].bn2.train()
    with pytest.raises(NotPackable, match="statistics of its batch"):
        PackedModifiedResNet(tower, dtype=torch.float32)
    tower.eval()
    tower.layer1[0].bn2 = nn.Identity()
    with pytest.raises(NotPackable, match="Identity"):
        PackedModifiedResNet(tower, dtype=torch.float32)
    adapted = tiny(image=RESNET).visual
    adapted.attnpool.v_proj.__class__ = type("LoraLinear", (nn.Linear,), {})  # as adapters put in its place
    with pytest.raises(NotPackable, match="LoraLinear"):
        PackedModifiedResNet(adapted, dtype=torch.float32)
    with pytest.raises(NotPackable, match="no ResNet"):
        resnet_form(nn.Linear(2, 2), torch.float32)
    biovil: Any = named("biovil", scramble)
    biovil.projector[2] = nn.GELU()
    with pytest.raises(NotPackable, match="GELU"):
        resnet_form(biovil, torch.float32)


def test_a_subclass_of_a_resnet_is_another_tower(tiny: Make) -> None:
    from chiasm.encoders.resnet import ModifiedResNet

    class Doubled(ModifiedResNet):
        def pool(self, features: Tensor) -> Tensor:
            return 2 * super().pool(features)

    tower = tiny(image=RESNET).visual
    tower.__class__ = Doubled
    with pytest.raises(NotPackable):
        resnet_form(tower, torch.float32)


# in an encoder


def encoder_of(tiny: Make, precision: str = "fp32") -> Encoder:
    model = tiny(image=RESNET)
    return Encoder(model, model.config, name="tiny", precision=precision)


def test_an_encoder_uses_it_and_sees_weights_change_in_place(tiny: Make) -> None:
    encoder = encoder_of(tiny).prepare()
    x = pixels()
    assert far(encoder.encode_image(x), encoder.model.encode_image(x).detach()) < 1e-5
    engine = Engine(encoder.model, "bf16")
    assert "image" not in engine.plain
    visual: Any = encoder.model.visual
    with torch.no_grad():
        visual.layer1[0].bn1.running_mean += 0.5  # a buffer, not a parameter
    changed = encoder.encode_image(x)
    assert far(changed, encoder.model.encode_image(x).detach()) < 1e-5
    with torch.no_grad():
        visual.conv2.weight.mul_(1.2)
    assert far(encoder.encode_image(x), changed) > 1e-4
    assert far(encoder.encode_image(x), encoder.model.encode_image(x).detach()) < 1e-5


def test_patch_features_and_gradients_go_through_the_module(tiny: Make) -> None:
    encoder = encoder_of(tiny, "bf16").prepare()
    plain = encoder.model.patch_features(pixels()).detach()
    assert torch.equal(encoder.patch_features(pixels()), plain)
    visual: Any = encoder.model.visual
    features = visual.forward_features(pixels(1))
    assert torch.autograd.grad(visual.pool(features).sum(), features)[0].abs().sum() > 0


@torch.inference_mode()
def test_an_ensemble_of_resnets(tiny: Make) -> None:
    members = [tiny(image=RESNET, seed=seed) for seed in (0, 1)]
    from dataclasses import replace

    model = EnsembleModel(members, replace(members[0].config, members=2)).eval()
    x = pixels()
    assert far(image_form(model, torch.float32)(x), model.encode_image(x)) < 1e-5


def test_a_prior_image_is_compared_by_the_model(scramble: Make) -> None:
    """The fast form stands for "no prior image"; with one, the answer differs and comes from the module."""
    tower: Any = named("biovil-t", scramble)
    with torch.inference_mode():
        alone = resnet_form(tower, torch.float32)(pixels())
        assert far(alone, tower(pixels(), pixels(seed=1))) > 1e-3
        tower.missing_previous.add_(1)
        assert far(resnet_form(tower, torch.float32)(pixels()), alone) > 1e-3
        assert far(resnet_form(tower, torch.float32)(pixels()), tower(pixels())) < 1e-5
