"""What the towers do otherwise in training than written down plainly: the same numbers and the same gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.encoders import transformer
from chiasm.encoders.base import LoraConfig, TextTowerConfig
from chiasm.encoders.text import TextTransformer, text_features
from chiasm.encoders.transformer import Attention, QuickGELU, Transformer, fused_attention

SMALL = TextTowerConfig(context_length=12, vocab_size=40, width=32, layers=2, heads=4)


def relative(found, truth):
    return float(((found - truth).norm() / truth.norm()).detach())


def gradients_of(module, loss):
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def worst(found, truth):
    assert found.keys() == truth.keys()
    scale = max(float(g.abs().max()) for g in truth.values())
    return max(float((found[n] - truth[n]).abs().max()) for n in truth) / scale


# ---- QuickGELU


def plain_quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=20), st.floats(-5, 5))
def test_quick_gelu_and_its_derivative(values, upstream):
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    found, truth = QuickGELU()(x), plain_quick_gelu(again)
    found.backward(torch.full_like(found, upstream))
    truth.backward(torch.full_like(truth, upstream))
    assert torch.allclose(found, truth, rtol=1e-12, atol=1e-12)
    assert torch.allclose(x.grad, again.grad, rtol=1e-12, atol=1e-12)


def test_quick_gelu_may_be_differentiated_twice():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(QuickGELU(), (x,))
    assert torch.autograd.gradgradcheck(QuickGELU(), (x,))


def test_quick_gelu_leaves_its_input_and_its_type_alone():
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    kept = x.detach().clone()
    out = QuickGELU()(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(x, kept)
    with torch.no_grad():
        assert relative(QuickGELU()(x).float(), plain_quick_gelu(kept.float())) < 1e-2


def test_the_derivative_is_not_that_of_silu_or_gelu():
    """Cancelling one constant too many or too few is what this form invites."""
    x = torch.linspace(-3, 3, 31, dtype=torch.float64, requires_grad=True)
    QuickGELU()(x).sum().backward()
    for wrong in (F.silu, F.gelu, lambda t: F.silu(1.702 * t)):
        other = x.detach().clone().requires_grad_()
        wrong(other).sum().backward()
        assert float((x.grad - other.grad).abs().max()) > 1e-2


def test_a_recorded_quick_gelu_holds_plain_operations_only(monkeypatch):
    x = torch.randn(2, 4, requires_grad=True)
    trained = QuickGELU()(x)
    assert "ScaledSiLU" in type(trained.grad_fn).__name__
    assert "ScaledSiLU" not in type(QuickGELU()(x.detach()).grad_fn).__name__
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    recorded = QuickGELU()(x)
    assert "ScaledSiLU" not in type(recorded.grad_fn).__name__
    assert torch.equal(trained, recorded)


# ---- attention in float32 among bfloat16 numbers


def qkv(tokens, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, tokens, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def attended(tensors, **kw):
    for t in tensors:
        t.grad = None
    out = fused_attention(*tensors, **{"mask": None, "causal": False, **kw})
    out.backward(torch.ones_like(out))
    return out.detach(), [t.grad for t in tensors]


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_attention_is_nearer_to_the_truth_than_the_fused_bfloat16_kernel(causal, monkeypatch):
    halves = qkv(20, torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in halves]
    truth, true_gradients = attended(wide, causal=causal)
    found, gradients = attended(halves, causal=causal)
    monkeypatch.setattr(transformer, "FLOAT_TOKENS", 0)
    plain, plain_gradients = attended(halves, causal=causal)
    assert found.dtype == torch.bfloat16
    assert all(g.dtype == torch.bfloat16 for g in gradients)
    assert relative(found.double(), truth) <= relative(plain.double(), truth) + 1e-4
    for g, p, t in zip(gradients, plain_gradients, true_gradients, strict=True):
        assert relative(g.double(), t) <= relative(p.double(), t) + 1e-3


def test_float32_attention_is_the_kernel_itself():
    tensors = qkv(5, torch.float32)
    assert torch.equal(attended(tensors)[0], F.scaled_dot_product_attention(*tensors))


def test_autocast_does_not_undo_it():
    halves = qkv(6, torch.bfloat16)
    outside = attended(halves)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = attended(halves)[0]
    assert torch.equal(outside, inside)


def test_masks_are_kept(monkeypatch):
    halves = qkv(6, torch.bfloat16)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    assert relative(attended(halves, mask=mask)[0].float(), attended(halves, causal=True)[0].float()) < 1e-2
    assert relative(attended(halves, mask=mask)[0].float(), attended(halves)[0].float()) > 1e-2


# ---- the last block of the text tower makes one token


def make_text(config=SMALL, seed=0):
    tower = TextTransformer(config, 16)
    tower.init_weights(torch.Generator().manual_seed(seed))
    return tower


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), SMALL.context_length, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, 39, (length,), generator=generator)
        row[length - 1] = 39
    return ids, torch.tensor(lengths)


def in_full(tower, ids, lengths):
    """All tokens through all blocks, the full context."""
    x = tower.token_embedding(ids) + tower.positional_embedding
    x = tower.transformer(x, causal=tower.text_plan.causal)
    pool = tower.text_plan.pool
    rows = lengths - 1 if pool == "eot" else torch.full_like(lengths, ids.shape[1] - 1)
    return tower.ln_final(x[torch.arange(len(x)), rows]) @ tower.text_projection


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.booleans(), st.sampled_from(["eot", "last"]))
def test_one_token_is_the_full_block_with_its_gradients(lengths, causal, pool):
    tower = make_text(replace(SMALL, causal=causal, pool=pool))
    ids, lengths = texts(lengths)
    target = torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(2))
    found, truth = text_features(tower, ids, lengths), in_full(tower, ids, lengths)
    assert relative(found, truth) < 1e-5
    few = gradients_of(tower, (found * target).sum())
    all_of_them = gradients_of(tower, (in_full(tower, ids, lengths) * target).sum())
    assert worst(few, all_of_them) < 1e-5


def test_another_token_would_be_seen():
    tower = make_text()
    ids, lengths = texts([5, 9, 12])
    assert relative(text_features(tower, ids, lengths - 1), in_full(tower, ids, lengths)) > 1e-2


def test_the_token_does_not_see_what_follows_it():
    """Without the causal rule, the query of a short text would see padding and, in a damaged batch, other words."""
    tower = make_text()
    ids, lengths = texts([4, 12])
    changed = ids.clone()
    changed[0, 4:] = 7
    assert torch.equal(text_features(tower, ids, lengths)[0], text_features(tower, changed, lengths)[0])


def test_the_row_mode_with_a_mask_of_its_own():
    block = Transformer(16, 1, 2)
    block.init_weights(torch.Generator().manual_seed(0), scaled=True)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    mask |= torch.eye(7, dtype=torch.bool)
    rows = torch.tensor([0, 3, 6])
    full = block(x, mask=mask)[torch.arange(3), rows]
    assert relative(block(x, mask=mask, last="row", rows=rows)[:, 0], full) < 1e-6
    unmasked = block(x)[torch.arange(3), rows]
    assert relative(block(x, last="row", rows=rows)[:, 0], unmasked) < 1e-6
    assert relative(unmasked, full) > 1e-3, "the mask must matter for this test to say anything"


def test_the_first_token_is_row_zero():
    block = Transformer(16, 2, 2)
    block.init_weights(torch.Generator().manual_seed(0), scaled=False)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    rows = torch.zeros(3, dtype=torch.long)
    assert torch.allclose(block(x, last="first"), block(x, last="row", rows=rows), atol=1e-6)


def test_checkpointed_blocks_give_the_same_gradients():
    tower = make_text().train()
    ids, lengths = texts([3, 8, 11])
    plain = gradients_of(tower, text_features(tower, ids, lengths).square().sum())
    tower.set_grad_checkpointing()
    assert worst(gradients_of(tower, text_features(tower, ids, lengths).square().sum()), plain) < 1e-6


def test_checkpointed_blocks_under_autocast_repeat_what_they_did():
    tower = make_text().train()
    ids, lengths = texts([3, 8, 11])

    def half():
        with torch.autocast("cpu", torch.bfloat16):
            out = text_features(tower, ids, lengths)
        return gradients_of(tower, out.float().square().sum())

    plain = half()
    tower.set_grad_checkpointing()
    assert worst(half(), plain) < 1e-6
    full = gradients_of(tower, text_features(tower, ids, lengths).square().sum())
    assert 1e-5 < worst(plain, full) < 0.1


def test_frozen_blocks_get_no_gradient_and_pass_one_on():
    tower = make_text()
    tower.transformer.requires_grad_(False)
    ids, lengths = texts([3, 8])
    found = gradients_of(tower, text_features(tower, ids, lengths).square().sum())
    assert set(found) == {"token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias",
                          "text_projection"}  # fmt: skip
    assert float(found["token_embedding.weight"].abs().sum()) > 0


def test_adapted_blocks_train_their_adapters():
    from chiasm.encoders.image_side import adapt_tower

    tower = make_text()
    adapt_tower(tower, True, LoraConfig(rank=2), native=True)
    ids, lengths = texts([3, 8])
    found = gradients_of(tower, text_features(tower, ids, lengths).square().sum())
    assert found
    assert {n for n in found if "lora" not in n} == {"text_projection"}
    assert {n.split(".")[2] for n in found if "lora" in n} == {"0", "1"}


def test_an_unknown_row_is_refused_by_the_lengths():
    from chiasm.errors import InputError

    ids, _ = texts([3, 8])
    with pytest.raises(InputError, match="lengths run from 3 to 13"):
        text_features(make_text(), ids, torch.tensor([3, 13]))


def test_attention_in_row_mode_needs_rows():
    with pytest.raises(AssertionError):
        Attention(8, 2)(torch.zeros(1, 3, 8), mode="row")


def test_the_slope_that_can_be_differentiated_again_is_the_same() -> None:
    from chiasm.encoders.transformer import QuickGELU

    x = torch.linspace(-6, 6, 50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(QuickGELU(), x)
    assert torch.autograd.gradgradcheck(QuickGELU(), x)
    (plain,) = torch.autograd.grad(QuickGELU()(x).sum(), x)
    (again,) = torch.autograd.grad(QuickGELU()(x).sum(), x, create_graph=True)
    torch.testing.assert_close(again, plain)
