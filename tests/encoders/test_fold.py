"""Folding: equal logits wherever it is done, and not done where it would not be equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chiasm.encoders.fold import LARGEST_OFFSET, FoldedConfig, FoldedHeads, fold_heads
from chiasm.encoders.heads import DistilledHeads, HeadsConfig, extra_multiplications, extra_parameters
from chiasm.errors import ConfigError

KINDS = st.sampled_from(["linear", "mlp"])
TOLERANCE = 1e-5

CONFIGS = st.builds(
    HeadsConfig,
    width=st.integers(1, 40),
    classes=st.integers(2, 9),
    text_dim=st.integers(2, 24),
    hidden=st.none() | st.integers(1, 24),
    vision=KINDS,
    distill=KINDS,
    text=KINDS,
    text_length=st.none() | st.sampled_from([1.0, 3.0]),
    standardize=st.booleans(),
    fused=st.booleans(),
)


def trained(config: HeadsConfig, *, seed: int = 0, offset: float = 2.0) -> DistilledHeads:
    """Heads with drawn weights and the statistics of drawn features."""
    torch.manual_seed(seed)
    heads = DistilledHeads(config)
    if config.standardize:
        heads.norm.fit(features(config, seed + 1, offset))
    return heads.eval()


def features(config: HeadsConfig, seed: int, offset: float = 2.0, n: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(config.width, generator=generator) + 0.5
    return torch.randn(n, config.width, generator=generator) * spread + offset


@given(config=CONFIGS, seed=st.integers(0, 100))
def test_folded_heads_give_the_same_logits(config: HeadsConfig, seed: int) -> None:
    heads = trained(config, seed=seed)
    before = {k: v.clone() for k, v in heads.state_dict().items()}
    folded = fold_heads(heads)
    x = features(config, seed + 7)
    with torch.no_grad():
        whole, short = heads(x).logits, folded(x)
        exact = heads.double()(x.double()).logits
    assert torch.allclose(whole, short, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.allclose(short.double(), exact, rtol=TOLERANCE, atol=TOLERANCE)
    assert all(torch.equal(before[k], v.to(before[k].dtype)) for k, v in heads.state_dict().items())
    assert sum(p.numel() for p in folded.parameters()) <= sum(p.numel() for p in heads.parameters())


def layers(heads: FoldedHeads) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in heads.modules() if isinstance(m, nn.Linear)]


BASE = HeadsConfig(width=384, classes=2, text_length=None)


def test_the_two_layers_of_the_specification_become_one() -> None:
    folded = fold_heads(trained(BASE))
    assert layers(folded) == [(384, 2), (384, 512), (512, 2)]
    assert folded.config.kept == ()
    assert folded.config.multiplications == 384 * 512 + 512 * 2 + 384 * 2
    # `h_d` (D x 512) and `h_t`'s first layer (512 x 512) would cost 512 x 512 more
    assert extra_multiplications(BASE) + 384 * 2 - folded.config.multiplications == 512 * 512 + 2 * 2 * 2


def test_all_linear_heads_are_one_layer() -> None:
    assert layers(fold_heads(trained(replace(BASE, text="linear")))) == [(384, 2)]
    assert layers(fold_heads(trained(replace(BASE, fused=False)))) == [(384, 2)]


def test_an_mlp_before_the_text_head_keeps_its_first_layer() -> None:
    folded = fold_heads(trained(replace(BASE, distill="mlp", hidden=20)))
    assert layers(folded) == [(384, 2), (384, 20), (20, 20), (20, 2)]


def test_a_narrow_text_embedding_stays_for_it_has_fewer_weights() -> None:
    config = replace(BASE, text_dim=4, hidden=64)
    folded = fold_heads(trained(config))
    assert layers(folded) == [(384, 2), (384, 4), (4, 64), (64, 2)]
    assert folded.config.between == ("nothing", "leaky_relu")
    assert "more weights" in folded.config.kept[0]


def test_a_predicted_embedding_of_fixed_length_stays_and_is_told() -> None:
    config = replace(BASE, width=16, text_dim=8, text_length=3.0)
    folded = fold_heads(trained(config))
    assert layers(folded) == [(16, 2), (16, 8), (8, 8), (8, 2)]
    assert folded.config.between == ("normalize", "leaky_relu")
    assert "fixed length" in folded.config.kept[0]


def test_folding_through_the_length_would_be_wrong() -> None:
    """Why that is not folded: forgetting the length misses the logits by far more than the tolerance."""
    config = replace(BASE, width=16, text_dim=8, text_length=3.0)
    heads = trained(config)
    wrong = DistilledHeads(replace(config, text_length=None)).eval()
    wrong.load_state_dict(heads.state_dict())
    x = features(config, 5)
    with torch.no_grad():
        assert (fold_heads(wrong)(x) - heads(x).logits).abs().max() > 10 * TOLERANCE
        assert (fold_heads(heads)(x) - heads(x).logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_a_far_mean_is_subtracted_first(offset: float) -> None:
    """Multiplied out, float32 would lose the difference of two large numbers."""
    config = replace(BASE, width=16, text_dim=8)
    heads = trained(config, offset=offset)
    folded = fold_heads(heads)
    assert folded.config.centred
    assert "deviations from 0" in folded.config.kept[0]
    x = features(config, 3, offset)
    with torch.no_grad():
        assert torch.allclose(folded(x), heads(x).logits, rtol=TOLERANCE, atol=TOLERANCE)
    near = trained(config, offset=0.1)
    assert float((near.norm.mean * near.norm.scale).abs().max()) < LARGEST_OFFSET
    assert not fold_heads(near).config.centred


def test_the_declaration_comes_back() -> None:
    for config in (BASE, replace(BASE, text_length=2.0), replace(BASE, fused=False)):
        found = fold_heads(trained(config)).config
        assert FoldedConfig.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": ()}, "no classifier"),
        ({"vision": (3,)}, "end in 2"),
        ({"text": (0, 2)}, "end in 2"),
        ({"text": (4, 2)}, "must have 1 entries"),
        ({"vision": (2,) * 99}, "no classifier"),
    ],
)
def test_impossible_declarations_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(FoldedConfig(width=3, classes=2, vision=(2,)), **change)


@pytest.mark.parametrize("classes", [2, 4, 9])
@pytest.mark.parametrize("width", [1024, 768, 384])
def test_the_extra_heads_cost_what_the_specification_says(width: int, classes: int) -> None:
    """``512 D + 512 + 512² + 512 + 512 C + C + 2 C² + C`` weights (specification, 2.7)."""
    config = HeadsConfig(width=width, classes=classes)
    with torch.device("meta"):
        fused, alone = DistilledHeads(config), DistilledHeads(replace(config, fused=False))
    extra = sum(p.numel() for p in fused.parameters()) - sum(p.numel() for p in alone.parameters())
    formula = 512 * width + 512 + 512**2 + 512 + 512 * classes + classes + 2 * classes**2 + classes
    assert extra == extra_parameters(config) == formula
    biases = 512 + 512 + classes + classes
    assert extra_multiplications(config) == formula - biases
    if classes == 2:
        assert formula == {1024: 788_492, 768: 657_420, 384: 460_812}[width]
