from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from chiasm.encoders.transformer import Attention, Transformer


def stack(layers: int = 2) -> Transformer:
    model = Transformer(16, layers, 4).double()
    model.init_weights(torch.Generator().manual_seed(0), scaled=False)
    return model


def tokens(n: int = 6) -> Tensor:
    return torch.randn(3, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_pytorchs_own(causal: bool) -> None:
    ours = Attention(16, 4).double()
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = tokens()
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1) if causal else None
    expected, expected_weights = theirs(x, x, x, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(ours(x, causal=causal)[0], expected)
    out, weights = ours(x, causal=causal, mode="weights")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)


def test_the_first_token_alone_is_the_first_of_all() -> None:
    model, x = stack(), tokens()
    torch.testing.assert_close(model(x, last="first"), model(x)[:, :1])


@pytest.mark.parametrize("causal", [False, True])
def test_attending_is_running(causal: bool) -> None:
    model, x = stack(3), tokens()
    out, weights = model.attend(x, causal=causal)
    torch.testing.assert_close(out, model(x, causal=causal))
    assert [tuple(w.shape) for w in weights] == [(3, 4, 6, 6)] * 3
    assert bool((weights[0].triu(1) == 0).all()) is causal


def test_permuting_tokens_permutes_the_output() -> None:
    """Without a mask the transformer knows no order; positions are the embedding's business."""
    model, x = stack(), tokens()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(model(x[:, order]), model(x)[:, order])


def test_checkpointing_is_for_training_only() -> None:
    model = stack()
    model.set_grad_checkpointing()
    x = tokens()
    expected = model.eval()(x)
    torch.testing.assert_close(model.train()(x), expected)
    assert model(x).requires_grad
