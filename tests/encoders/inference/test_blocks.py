from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chiasm.encoders.inference import blocks
from chiasm.encoders.inference.blocks import PackedBlock, attend_equal, attend_one, pack_blocks, split_heads
from chiasm.encoders.inference.packed import NotPackable, PackedLinear
from chiasm.encoders.transformer import Block, LayerNorm, Transformer

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh", "swiglu")
HEADS, WIDTH, TOKENS, BATCH = 4, 32, 7, 3
LAW = settings(max_examples=25, deadline=None)


def make_block(activation: Any = "quick_gelu", *, layer_scale: bool = False, seed: int = 0) -> Block:
    """A block all of whose weights differ, biases and norms included."""
    block = Block(
        WIDTH,
        HEADS,
        mlp_ratio=4.0,
        activation=activation,
        ln_eps=1e-5,
        layer_scale=layer_scale,  # type: ignore[arg-type]
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in block.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            scale = (1.5 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.3
            tensor.copy_(noise * scale + (1.0 if "ln_" in name and name.endswith("weight") else 0.0))
    return block


def tokens(seed: int = 5, *, batch: int = BATCH, count: int = TOKENS) -> torch.Tensor:
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(packed: PackedBlock, x: torch.Tensor) -> torch.Tensor:
    batch, count, width = x.shape
    rows = packed.all(x.reshape(-1, width), lambda qkv: attend_equal(qkv, batch, HEADS))
    return rows.view(batch, count, width)


def run_first(packed: PackedBlock, x: torch.Tensor) -> torch.Tensor:
    batch, count, width = x.shape
    rows = torch.arange(0, batch * count, count)
    return packed.few(x.reshape(-1, width), rows, lambda q, kv: attend_one(q, kv, batch, HEADS))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer_scale", [False, True])
@torch.inference_mode()
def test_a_packed_block_is_the_block(activation: str, layer_scale: bool) -> None:
    block, x = make_block(activation, layer_scale=layer_scale), tokens()
    expected = block(x)[0]
    torch.testing.assert_close(run(PackedBlock(block, dtype=torch.float32), x), expected, rtol=1e-5, atol=1e-5)
    first = run_first(PackedBlock(block, dtype=torch.float32, few=True), x)
    torch.testing.assert_close(first, expected[:, 0], rtol=1e-5, atol=1e-5)
    mixed = run(PackedBlock(block, dtype=torch.bfloat16), x)
    assert mixed.dtype == torch.float32  # the residual stream
    assert 1 - float(torch.cosine_similarity(mixed, expected, -1).min()) < 1e-4
    assert not torch.equal(mixed, expected)


@LAW
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_rows_know_only_their_own_group(batch: int, count: int, seed: int) -> None:
    packed = PackedBlock(make_block(seed=seed), dtype=torch.float32)
    x = tokens(seed, batch=batch, count=count)
    with torch.inference_mode():
        together = run(packed, x)
        for i in range(batch):
            torch.testing.assert_close(run(packed, x[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_residual_stream_of_mixed_precision_is_not_rounded() -> None:
    """With both branches silent the rows come out bit for bit."""
    block = make_block()
    for linear in (block.attn.out_proj, block.mlp.c_proj):
        linear.weight.zero_()
        linear.bias.zero_()
    x = tokens()
    assert torch.equal(run(PackedBlock(block, dtype=torch.bfloat16), x), x)


@torch.inference_mode()
def test_the_module_and_its_input_are_left_alone() -> None:
    block, x = make_block(layer_scale=True), tokens()
    state = {k: v.clone() for k, v in block.state_dict().items()}
    given_rows = x.clone()
    run(PackedBlock(block, dtype=torch.float32), x)
    run_first(PackedBlock(block, dtype=torch.float32, few=True), x)
    assert torch.equal(x, given_rows)
    assert all(torch.equal(state[k], v) for k, v in block.state_dict().items())


@pytest.mark.parametrize("mistake", ["fc1's bias not scaled", "fc2's bias scaled too", "fc2's weight not scaled back"])
@torch.inference_mode()
def test_half_a_folding_of_quick_gelu_is_seen(mistake: str) -> None:
    block, x = make_block(), tokens()
    expected = block(x)[0]
    fc, proj = block.mlp.c_fc, block.mlp.c_proj
    packed = PackedBlock(block, dtype=torch.float32)
    linear: dict[str, Any] = {"dtype": torch.float32}
    if mistake.startswith("fc1"):
        packed._fc = PackedLinear(fc.weight * 1.702, fc.bias, activation="silu", **linear)
    elif mistake.startswith("fc2's bias"):
        packed._proj = PackedLinear(proj.weight / 1.702, proj.bias / 1.702, **linear)
    else:
        packed._proj = PackedLinear(proj.weight, proj.bias, **linear)
    assert float((run(packed, x) - expected).abs().max()) > 1e-2


@torch.inference_mode()
def test_gelu_in_quick_gelus_place_is_seen() -> None:
    quick, plain = make_block("quick_gelu"), make_block("gelu")
    plain.load_state_dict(quick.state_dict())
    found = run(PackedBlock(plain, dtype=torch.float32), tokens())
    assert float((found - quick(tokens())[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
@torch.inference_mode()
def test_another_order_of_queries_keys_and_values_is_seen(order: tuple[int, ...]) -> None:
    block, x = make_block(), tokens()
    expected = block(x)[0]
    for parameter in (block.attn.in_proj_weight, block.attn.in_proj_bias):
        parts = [part.clone() for part in parameter.chunk(3)]
        parameter.copy_(torch.cat([parts[i] for i in order]))
    for found in (run(PackedBlock(block, dtype=torch.float32), x), block(x)[0]):
        assert float((found - expected).abs().max()) > 1e-2


@torch.inference_mode()
def test_attention_is_that_of_the_formula() -> None:
    qkv = torch.randn(BATCH * TOKENS, 3 * WIDTH, generator=torch.Generator().manual_seed(0))
    expected = torch.empty(BATCH, TOKENS, WIDTH)
    hidden = torch.empty(BATCH, TOKENS, WIDTH)
    size = WIDTH // HEADS
    for b in range(BATCH):
        q, k, v = qkv.view(BATCH, TOKENS, 3, HEADS, size)[b].unbind(1)
        for h in range(HEADS):
            scores = q[:, h] @ k[:, h].T / size**0.5
            at = slice(h * size, (h + 1) * size)
            expected[b, :, at] = scores.softmax(-1) @ v[:, h]
            later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
            hidden[b, :, at] = scores.masked_fill(later, float("-inf")).softmax(-1) @ v[:, h]
    found = attend_equal(qkv, BATCH, HEADS).view(BATCH, TOKENS, WIDTH)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    causal = attend_equal(qkv, BATCH, HEADS, causal=True).view(BATCH, TOKENS, WIDTH)
    torch.testing.assert_close(causal, hidden, rtol=1e-5, atol=1e-5)
    one = attend_one(qkv[::TOKENS, :WIDTH], qkv[:, WIDTH:], BATCH, HEADS)
    torch.testing.assert_close(one, expected[:, 0], rtol=1e-5, atol=1e-5)


def test_heads_are_views() -> None:
    qkv = torch.randn(6, 3 * WIDTH)
    parts = split_heads(qkv, 2, HEADS, 3)
    assert [tuple(p.shape) for p in parts] == [(2, HEADS, 3, WIDTH // HEADS)] * 3
    assert all(p.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for p in parts)


def half(block: Block) -> None:
    block.half()


def hooked(block: Block) -> None:
    block.mlp.register_forward_hook(lambda *_: None)


def adapted(block: Block) -> None:
    class LoRA(nn.Linear):
        pass

    block.mlp.c_fc = LoRA(WIDTH, 4 * WIDTH)


def foreign_norm(block: Block) -> None:
    block.ln_1 = nn.LayerNorm(WIDTH)  # type: ignore[assignment]


def foreign_activation(block: Block) -> None:
    block.mlp.gelu = nn.Mish()


def strange_gelu(block: Block) -> None:
    block.mlp.gelu = nn.GELU("tanh")
    block.mlp.gelu.approximate = "fast"


def foreign_scale(block: Block) -> None:
    block.ls_1 = nn.Dropout()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (half, "weights are torch.float16"),
        (hooked, "a MLP has hooks"),
        (adapted, "LoRA is not Linear"),
        (foreign_norm, "LayerNorm is not LayerNorm"),
        (foreign_activation, "Mish is not QuickGELU or GELU or SwiGLU"),
        (strange_gelu, "GELU by `fast`"),
        (foreign_scale, "Dropout is not Identity or LayerScale"),
    ],
)
def test_what_is_not_chiasms_own_is_refused(change: Callable[[Block], None], reason: str) -> None:
    block = make_block()
    change(block)
    with pytest.raises(NotPackable, match=reason):
        PackedBlock(block, dtype=torch.float32)


def test_only_the_last_block_is_packed_for_chosen_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(blocks, "PackedBlock", lambda block, *, dtype, few: seen.append(few))
    pack_blocks(Transformer(WIDTH, 3, HEADS), dtype=torch.float32, few=True)
    pack_blocks(Transformer(WIDTH, 2, HEADS), dtype=torch.float32, few=False)
    assert seen == [False, False, True, False, False]
    with pytest.raises(NotPackable, match="Linear is not Transformer"):
        pack_blocks(nn.Linear(2, 2), dtype=torch.float32, few=True)
    assert LayerNorm is not nn.LayerNorm
