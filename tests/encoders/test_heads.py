"""The heads of CLIP-IT: what enters the logits, what each loss teaches, and how many weights there are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.encoders.heads import DistilledHeads, FeatureNorm, HeadsConfig, extra_multiplications, extra_parameters
from chiasm.errors import ConfigError
from chiasm.losses.distillation import classification, cosine_kd

laws = settings(max_examples=15, deadline=None)
kinds = st.sampled_from(["linear", "mlp"])


@pytest.fixture
def heads() -> DistilledHeads:
    torch.manual_seed(0)
    return DistilledHeads(HeadsConfig(width=6, classes=3, text_dim=5, hidden=4)).double()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_logits_are_the_formula(heads, features):
    out = heads(features)
    predicted = heads.distill(features)
    text = heads.text(3.0 * predicted / predicted.norm(dim=1, keepdim=True))
    logits = torch.cat([heads.vision(features), text], 1) @ heads.fusion.weight.T + heads.fusion.bias
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(out.text, predicted)
    torch.testing.assert_close(out.text_logits, text)


def test_text_teaches_h_d_alone(heads, features):
    target = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    cosine_kd(heads(features).text, target).backward()
    taught = {n.split(".")[0] for n, p in heads.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert taught == {"distill"}
    assert target.grad is None


def test_without_weight_on_the_text_the_gradient_is_that_of_cross_entropy(heads, features):
    labels, target = torch.arange(7) % 3, torch.randn(7, 5, dtype=torch.float64)
    out = heads(features)
    with_text = torch.autograd.grad(
        classification(out.logits, labels) + 0.0 * cosine_kd(out.text, target), list(heads.parameters())
    )
    plain = torch.autograd.grad(F.cross_entropy(heads(features).logits, labels), list(heads.parameters()))
    for one, other in zip(with_text, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_every_weight_learns(heads, features):
    F.cross_entropy(heads(features).logits, torch.arange(7) % 3).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads.parameters())


def test_a_detached_text_branch_hides_h_d_from_cross_entropy(features):
    heads = DistilledHeads(HeadsConfig(width=6, classes=3, text_dim=5, detach_text=True)).double()
    out = heads(features)
    F.cross_entropy(out.logits, torch.arange(7) % 3).backward(retain_graph=True)
    assert all(p.grad is None for p in heads.distill.parameters())
    cosine_kd(out.text, torch.ones(7, 5, dtype=torch.float64)).backward()
    assert all(p.grad is not None for p in heads.distill.parameters())


@pytest.mark.parametrize(("length", "moves"), [(3.0, False), (None, True)])
def test_trap_cosine_leaves_the_length_free(features, length, moves):
    """A longer prediction has the same distance; only a fixed length keeps it from changing the class."""
    heads = DistilledHeads(HeadsConfig(width=6, classes=3, text_dim=5, text_length=length)).double()
    before = heads(features)
    with torch.no_grad():
        heads.distill.weight.mul_(10)
        heads.distill.bias.mul_(10)
    after = heads(features)
    target = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(cosine_kd(after.text, target), cosine_kd(before.text, target))
    assert moves != torch.allclose(after.logits, before.logits)


@laws
@given(st.integers(1, 30), st.integers(2, 6), st.integers(1, 20), st.none() | st.integers(1, 9), kinds, kinds)
def test_parameters_are_counted(width, classes, text_dim, hidden, distill, text):
    config = HeadsConfig(width=width, classes=classes, text_dim=text_dim, hidden=hidden, distill=distill, text=text)
    fused = sum(p.numel() for p in DistilledHeads(config).parameters())
    alone = sum(p.numel() for p in DistilledHeads(HeadsConfig(width=width, classes=classes, fused=False)).parameters())
    assert fused - alone == extra_parameters(config)
    matrices = [p for n, p in DistilledHeads(config).named_parameters() if p.ndim == 2 and not n.startswith("vision")]
    assert sum(p.numel() for p in matrices) == extra_multiplications(config)


@pytest.mark.parametrize(("width", "count"), [(1024, 788_492), (768, 657_420), (384, 460_812)])
def test_published_overheads(width, count):
    assert extra_parameters(HeadsConfig(width=width, classes=2)) == count


@laws
@given(
    st.integers(1, 9), st.integers(2, 5), st.integers(1, 9), st.none() | st.floats(0.5, 9), kinds, st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_configuration_survives_json(width, classes, text_dim, length, kind, fused, standardize):
    config = HeadsConfig(
        width=width, classes=classes, text_dim=text_dim, text_length=length, text=kind, fused=fused,
        standardize=standardize,
    )  # fmt: skip
    assert HeadsConfig.from_dict(config.to_dict()) == config


def test_norm_makes_features_standard_and_spares_constants(features):
    values = torch.cat([5 + 3 * features, torch.full((7, 1), 2.0)], dim=1)
    norm = FeatureNorm(7).double()
    norm.fit(values)
    found = norm(values)
    torch.testing.assert_close(found.mean(0), torch.zeros(7, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        found[:, :6].std(0, unbiased=False), torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert (found[:, 6] == 0).all()


@pytest.mark.parametrize(
    ("field", "value"), [("width", 0), ("classes", 1), ("text_dim", 0), ("hidden", 0), ("text_length", 0.0)]
)
def test_impossible_shapes_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        HeadsConfig(**{"width": 4, "classes": 2, field: value})
