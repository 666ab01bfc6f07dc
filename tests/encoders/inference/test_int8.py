from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.encoders.inference import int8
from chiasm.encoders.inference.int8 import QuantizedLinear, Rows, finish_rows, make_linear, quantize_rows
from chiasm.encoders.inference.packed import PackedLinear
from chiasm.encoders.inference.vit import PackedViT

Make = Callable[..., Any]
LAW = settings(max_examples=25, deadline=None)
ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The definition, in float64."""
    rows = x.abs().amax(1, keepdim=True) / 127
    channels = weight.abs().amax(1, keepdim=True) / 127
    sums = (x / rows).round().double() @ (weight / channels).round().double().T
    return sums * rows * channels.T + (0 if bias is None else bias)


@pytest.fixture(params=["compiled", "torch", "no oneDNN"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the ways to the same numbers."""
    if request.param == "compiled" and int8._library() is None:
        pytest.skip("int8_rows.c was not compiled here")
    if request.param != "compiled":
        monkeypatch.setattr(int8, "_library", lambda: None)
    if request.param == "no oneDNN":
        monkeypatch.setattr(int8, "can_multiply", lambda: False)
    name: str = request.param
    return name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_what_its_definition_says(way: str, activation: Any, bias: bool) -> None:
    x, weight = drawn(9, 70, seed=1) * drawn(9, 1), drawn(33, 70, seed=2)
    offset = drawn(33, seed=3) if bias else None
    found = QuantizedLinear(weight, offset, activation=activation)(x)
    assert isinstance(found, torch.Tensor)
    expected = ACTIVATIONS[activation](by_hand(x, weight, offset)).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    exact = ACTIVATIONS[activation](F.linear(x, weight, offset))
    assert 1e-5 < float((found - exact).abs().max() / exact.abs().max()) < 3e-2
    rows = QuantizedLinear(weight, offset, activation=activation, int8_result=True)(x)
    assert isinstance(rows, Rows)
    off = (rows.values * rows.scale[:, None] - expected).abs() / rows.scale[:, None]
    assert float(off.max()) < 0.51


def test_int8_rows_feed_the_next_layer(way: str) -> None:
    first = QuantizedLinear(drawn(40, 24), drawn(40), activation="silu", int8_result=True)
    second = QuantizedLinear(drawn(8, 40, seed=1), None)
    x = drawn(5, 24, seed=2)
    whole = QuantizedLinear(drawn(40, 24), drawn(40), activation="silu")(x)
    expected = second(whole)
    assert isinstance(expected, torch.Tensor)
    found = second(first(x))
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_few_rows_and_none(way: str, rows: int) -> None:
    x, weight, bias = drawn(rows, 16), drawn(7, 16, seed=1), drawn(7)
    for name in ACTIVATIONS:
        found = QuantizedLinear(weight, bias, activation=name)(x)  # type: ignore[arg-type]
        assert isinstance(found, torch.Tensor)
        assert found.shape == (rows, 7)
        quantized = QuantizedLinear(weight, bias, activation=name, int8_result=True)(x)  # type: ignore[arg-type]
        assert isinstance(quantized, Rows)
        assert quantized.values.shape == (rows, 7)
        assert quantized.scale.shape == (rows,)


@LAW
@given(st.integers(1, 20), st.integers(1, 90), st.integers(0, 99), st.floats(1e-6, 1e6))
def test_a_row_is_rounded_by_its_own_largest_value(n: int, width: int, seed: int, factor: float) -> None:
    x = drawn(n, width, seed=seed) * factor
    rows = quantize_rows(x)
    assert rows.values.dtype == torch.int8
    torch.testing.assert_close(rows.scale, x.abs().amax(1) / 127, rtol=1e-6, atol=1e-30)
    assert bool((rows.values.abs().amax(1) == 127).all())
    assert float(((rows.values * rows.scale[:, None] - x).abs() / rows.scale[:, None]).max()) < 0.501
    alone = [quantize_rows(row[None]) for row in x]
    assert torch.equal(torch.cat([r.values for r in alone]), rows.values)
    assert torch.equal(torch.cat([r.scale for r in alone]), rows.scale)


def test_ties_go_to_the_even_number(way: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.49]])
    assert quantize_rows(x).values.tolist() == [[127, 0, 2, 2, 0, -2, -126, 0]]


def test_zeros_and_what_is_no_number(way: str) -> None:
    x = drawn(5, 12)
    x[1], x[2, 3], x[3, 0], x[4, 1] = 0.0, float("nan"), float("inf"), float("-inf")
    bias = drawn(6, seed=4)
    found = QuantizedLinear(drawn(6, 12, seed=1), bias, activation="silu")(x)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found[1], F.silu(bias), rtol=1e-5, atol=1e-6)
    assert bool(found[:2].isfinite().all())
    assert bool(found[2:].isnan().all())
    assert bool(quantize_rows(x).scale[2:].isnan().all())


def test_very_large_and_very_small_arguments_of_the_activation(way: str) -> None:
    y = torch.tensor([[-1e30, -200.0, -88.0, -87.0, -1.0, -1e-20, 0.0, 1e-20, 1.0, 87.0, 200.0, 1e30]])
    found = finish_rows(y.clone(), torch.ones(1), None, activation="silu")
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, F.silu(y), rtol=1e-5, atol=1e-5 if way == "torch" else 1e-3)


def test_a_layer_of_one_huge_channel_keeps_the_others(way: str) -> None:
    """A scale an output: one output a million times as large as the others does not take their digits."""
    weight = drawn(6, 32)
    weight[2] *= 1e6
    x = drawn(4, 32, seed=1)
    found = QuantizedLinear(weight, None)(x)
    assert isinstance(found, torch.Tensor)
    exact = F.linear(x, weight)
    assert float(((found - exact).abs() / exact.abs().amax(0)).max()) < 0.05


def test_the_given_tensors_are_left_alone(way: str) -> None:
    x, weight, bias = drawn(4, 16), drawn(8, 16, seed=1), drawn(8)
    kept = [t.clone() for t in (x, weight, bias)]
    layer = QuantizedLinear(weight, bias, activation="relu")
    before = layer(x)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, bias), kept, strict=True))
    weight.zero_()
    bias.zero_()
    after = layer(x)
    assert isinstance(before, torch.Tensor)
    assert isinstance(after, torch.Tensor)
    assert torch.equal(before, after)


def test_rows_with_gaps_are_read_rightly(way: str) -> None:
    x = drawn(20, 16)
    layer = QuantizedLinear(drawn(8, 16, seed=1), None)
    for rows in (x[::2], x.T.contiguous().T, x.double()):
        found, expected = layer(rows), layer(rows.float().contiguous())
        assert isinstance(found, torch.Tensor)
        assert isinstance(expected, torch.Tensor)
        assert torch.equal(found, expected)


def test_the_type_chooses_the_layer() -> None:
    assert isinstance(make_linear(drawn(4, 4), None, dtype=torch.int8), QuantizedLinear)
    for dtype in (torch.float32, torch.bfloat16):
        assert isinstance(make_linear(drawn(4, 4), None, dtype=dtype, int8_result=True), PackedLinear)


def test_a_product_that_saturates_or_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(values: torch.Tensor, packed: Any, scale: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """u8 × s8 pairs in 16 bits, as processors without VNNI have it."""
        found: torch.Tensor = inner(values, packed, scale, zeros)
        return found.clamp(max=2.0 * 32767)

    def failing(*_: Any) -> torch.Tensor:
        raise RuntimeError("could not create a primitive")

    inner = int8._multiply
    try:
        for wrong in (saturating, failing):
            monkeypatch.setattr(int8, "_multiply", wrong)
            int8.can_multiply.cache_clear()
            assert not int8.can_multiply()
        monkeypatch.undo()
        monkeypatch.setattr(torch._C, "_has_mkldnn", False)
        int8.can_multiply.cache_clear()
        assert not int8.can_multiply()
    finally:
        int8.can_multiply.cache_clear()


def test_compiled_code_that_is_absent_foreign_or_wrong_is_not_used(tmp_path: Path) -> None:
    assert int8.load_library(tmp_path) is None
    suffix = EXTENSION_SUFFIXES[0]
    (tmp_path / f"_int8_rows{suffix}").write_bytes(b"no library")
    assert int8.load_library(tmp_path) is None
    built = [p for p in Path(int8.__file__).parent.glob("_int8_rows*") if p.suffix in (".so", ".pyd")]
    if not built:
        pytest.skip("int8_rows.c was not compiled here")
    shutil.copy(built[0], tmp_path / f"_int8_rows{suffix}")
    library = int8.load_library(tmp_path)
    assert library is not None
    assert int8._agrees(library)
    call = library.chiasm_int8_rows

    class Wrong:
        @staticmethod
        def chiasm_int8_rows(*arguments: Any) -> None:
            call(*arguments[:5], 0, *arguments[6:])  # activations ignored

    assert not int8._agrees(Wrong())  # type: ignore[arg-type]


def test_every_instruction_set_of_this_machine_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    library = int8._library()
    if library is None:
        pytest.skip("int8_rows.c was not compiled here")
    for widest in range(int8._widest() + 1):
        monkeypatch.setattr(int8, "_widest", lambda widest=widest: widest)
        assert int8._agrees(library), widest


@pytest.mark.parametrize(
    "form",
    [{}, {"activation": "gelu"}, {"activation": "swiglu"}, {"pool": "mean"}, {"registers": 2, "layer_scale": True},
     {"pool": "map", "class_token": False, "pre_norm": False, "patch_bias": True, "activation": "gelu_tanh"}],
)  # fmt: skip
@torch.inference_mode()
def test_a_tower_in_int8_is_near_the_tower(tiny: Make, way: str, form: dict[str, Any]) -> None:
    tower = tiny(image=form).visual
    x = drawn(6, 3, 32, 32, seed=5)
    expected, found = tower(x), PackedViT(tower, dtype=torch.int8)(x)
    assert found.dtype == torch.float32
    assert 1e-7 < 1 - float(F.cosine_similarity(found, expected).min()) < 3e-3


@torch.inference_mode()
def test_an_image_does_not_depend_on_the_contrast_of_its_neighbours(tiny: Make, way: str) -> None:
    form = PackedViT(tiny().visual, dtype=torch.int8)
    x = drawn(8, 3, 32, 32, seed=6)
    x[1::2] *= 100
    together = form(x)
    alone = torch.cat([form(image[None]) for image in x])
    assert 1 - float(F.cosine_similarity(together.double(), alone.double()).min()) < 1e-6
    assert torch.equal(together, form(x))  # the same every time
