from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chiasm.encoders.inference import packed
from chiasm.encoders.inference.packed import NotPackable, PackedLinear, can_pack, pack, require_plain

ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
LAW = settings(max_examples=25, deadline=None)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A torch without oneDNN's private operators."""

    def absent() -> tuple[Any, Any]:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(packed, "_operators", absent)
    can_pack.cache_clear()
    yield
    can_pack.cache_clear()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_linear_and_activation(activation: Any, dtype: torch.dtype, bound: float, bias: bool) -> None:
    x, weight = drawn(13, 24, seed=1), drawn(40, 24, seed=2)
    offset = drawn(40, seed=3) if bias else None
    layer = PackedLinear(weight, offset, dtype=dtype, activation=activation)
    found = layer(x)
    assert found.dtype == layer.dtype == dtype
    assert found.shape == (13, layer.out_features) == (13, 40)
    assert far(found, ACTIVATIONS[activation](F.linear(x, weight, offset))) < bound


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_without_the_operators_it_says_the_same(
    activation: Any, dtype: torch.dtype, bound: float, request: pytest.FixtureRequest
) -> None:
    x, weight, bias = drawn(9, 24), drawn(40, 24, seed=1), drawn(40, seed=2)
    fast = PackedLinear(weight, bias, dtype=dtype, activation=activation)(x)
    request.getfixturevalue("unpacked")
    assert not can_pack(dtype)
    layer = PackedLinear(weight, bias, dtype=dtype, activation=activation)
    assert not layer.packed
    assert layer(x).dtype == dtype
    assert far(layer(x), fast.float()) < bound


@LAW
@given(st.integers(0, 70), st.integers(1, 65), st.integers(1, 65), st.integers(0, 99))
def test_any_number_of_rows_goes_through_one_packing(rows: int, inputs: int, outputs: int, seed: int) -> None:
    x, weight, bias = drawn(rows, inputs, seed=seed), drawn(outputs, inputs, seed=seed + 1), drawn(outputs, seed=seed)
    found = PackedLinear(weight, bias, dtype=torch.float32)(x)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_no_rows_give_no_rows() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = PackedLinear(drawn(5, 8), None, dtype=dtype)(torch.zeros(0, 8))
        assert found.shape == (0, 5)
        assert found.dtype == dtype


def test_rows_with_gaps_and_views_are_read_rightly() -> None:
    x, weight, bias = drawn(20, 16), drawn(6, 16, seed=1), drawn(6, seed=2)
    layer = PackedLinear(weight, bias, dtype=torch.float32)
    for rows in (x[::2], x[3:11], drawn(16, 20).T, x.double()):
        torch.testing.assert_close(layer(rows), F.linear(rows.float(), weight, bias), rtol=1e-5, atol=1e-5)


def test_the_weight_is_copied() -> None:
    module = nn.Linear(8, 4)
    layer, x = pack(module, dtype=torch.float32), drawn(3, 8)
    before = layer(x)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    assert torch.equal(layer(x), before)
    assert float(before.abs().max()) > 0


def test_numbers_that_are_none_stay_visible() -> None:
    x = drawn(4, 16)
    x[2, 3] = float("nan")
    x[1, 0] = float("inf")
    found = PackedLinear(drawn(5, 16, seed=1), drawn(5), dtype=torch.float32, activation="gelu")(x)
    assert bool(found[2].isnan().all())
    assert bool(found[[0, 3]].isfinite().all())
    assert not bool(found[1].isfinite().all())


def test_only_a_plain_linear_layer_is_packed() -> None:
    class Adapted(nn.Linear):
        """What LoRA does: the class stays a Linear."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    with pytest.raises(NotPackable, match="Adapted is not Linear"):
        pack(Adapted(4, 4), dtype=torch.float32)
    with pytest.raises(NotPackable, match="Conv2d is not Linear"):
        pack(nn.Conv2d(1, 1, 1), dtype=torch.float32)
    for type_ in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(NotPackable, match=f"weights are {type_} on cpu"):
            pack(nn.Linear(4, 4, dtype=type_), dtype=torch.float32)
    with pytest.raises(NotPackable, match="on meta"):
        pack(nn.Linear(4, 4, device="meta"), dtype=torch.float32)


def test_a_parametrised_layer_is_not_packed() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(NotPackable, match="ParametrizedLinear is not Linear"):
        pack(module, dtype=torch.float32)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_with_hooks_is_not_packed_until_they_are_gone(hook: str) -> None:
    module = nn.Linear(4, 4)
    handle = getattr(module, hook)(lambda *_: None)
    with pytest.raises(NotPackable, match="a Linear has hooks"):
        require_plain(module, nn.Linear)
    handle.remove()
    require_plain(module, nn.Linear)


def test_operators_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    reorder, linear = packed._operators()
    wrong = {
        "another meaning": lambda *args: linear(*args) + 1e-3,
        "not a number": lambda *args: linear(*args) * float("nan"),
        "an activation ignored": lambda x, w, b, *_: linear(x, w, b, "none", [], ""),
    }
    try:
        for what, operator in wrong.items():
            monkeypatch.setattr(packed, "_operators", lambda operator=operator: (reorder, operator))
            can_pack.cache_clear()
            assert not can_pack(torch.float32), what
        for error in (RuntimeError, TypeError, NotImplementedError):

            def fail(*_: object, error: type[Exception] = error) -> None:
                raise error

            monkeypatch.setattr(packed, "_operators", lambda fail=fail: (reorder, fail))
            can_pack.cache_clear()
            assert not can_pack(torch.float32), error
        monkeypatch.undo()
        can_pack.cache_clear()
        monkeypatch.setattr(torch._C, "_has_mkldnn", False)
        assert not can_pack(torch.float32)
    finally:
        can_pack.cache_clear()


def test_bfloat16_adds_in_float32() -> None:
    """A thousand ones and then small numbers: a sum in bfloat16 would lose every one of them."""
    x = torch.cat([torch.ones(1, 256), torch.full((1, 4096), 2.0**-9)], 1)
    found = PackedLinear(torch.ones(1, 4352), None, dtype=torch.bfloat16)(x)
    assert float(found) == 264.0
