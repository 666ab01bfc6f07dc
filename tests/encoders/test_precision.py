from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from chiasm.encoders import precision
from chiasm.encoders.inference import packed
from chiasm.encoders.precision import PRECISIONS, VARIABLE, bf16_pays, resolve_precision
from chiasm.errors import ConfigError


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    bf16_pays.cache_clear()
    yield
    bf16_pays.cache_clear()


def test_what_is_asked_for_is_what_is_meant() -> None:
    for name in ("fp32", "bf16", "int8"):
        assert resolve_precision(name) == name
    assert resolve_precision("bf16", "cuda") == "bf16"
    assert resolve_precision("fp32", torch.device("cuda", 1)) == "fp32"
    assert set(PRECISIONS) == {"auto", "fp32", "bf16", "int8"}


def test_half_precision_on_a_cpu_is_bfloat16() -> None:
    assert resolve_precision("fp16") == "bf16"
    assert resolve_precision("fp16", "cuda") == resolve_precision("fp16", "mps") == "fp16"


@pytest.mark.parametrize("wrong", ["fp8", "float32", "", "FP32", "int4"])
def test_an_unknown_one_is_refused_with_those_that_are_known(wrong: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve_precision(wrong)
    assert refusal.value.message == f"precision `{wrong}` is not known"
    assert refusal.value.hint == "one of: auto, fp32, bf16, int8"


def test_int8_on_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision `int8` runs on the CPU, the encoder is on `cuda:1`") as refusal:
        resolve_precision("int8", "cuda:1")
    assert refusal.value.hint == "use `bf16` there"


def test_auto_is_what_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, meaning in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "bf16")):
        monkeypatch.setenv(VARIABLE, value)
        assert resolve_precision("auto") == meaning
        assert resolve_precision("int8") == "int8"  # whoever asks for one gets that one
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ConfigError, match=f"precision `fast` is not known .{VARIABLE} names it"):
        resolve_precision("auto")


@pytest.mark.parametrize(
    ("gains", "expected", "rounds"), [([1.4], "bf16", 1), ([1.2, 0.9, 1.31], "bf16", 3), ([1.2, 1.29, 0.03], "fp32", 3)]
)
def test_auto_is_bfloat16_where_one_round_of_three_shows_that_it_pays(
    monkeypatch: pytest.MonkeyPatch, gains: list[float], expected: str, rounds: int
) -> None:
    trials: list[object] = []

    def timed(plain: packed.PackedLinear, fast: packed.PackedLinear, x: torch.Tensor) -> float:
        assert (plain.dtype, fast.dtype) == (torch.float32, torch.bfloat16)
        trials.append(x)
        return gains[len(trials) - 1]

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(packed, "can_pack", lambda dtype: True)
    monkeypatch.setattr(precision, "_gain", timed)
    assert resolve_precision("auto") == expected
    monkeypatch.setenv(VARIABLE, "auto")
    assert resolve_precision("auto") == expected
    assert len(trials) == rounds  # the second time nothing is tried


def test_auto_is_never_int8_and_fp32_where_nothing_can_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(packed, "can_pack", lambda dtype: False)
    assert not bf16_pays("cpu")
    assert resolve_precision("auto") == "fp32"
    assert not bf16_pays("mps")
    assert resolve_precision("auto", "mps") == "fp32"


def test_the_trial_runs() -> None:
    assert bf16_pays("cpu") in (True, False)


def test_a_trial_calls_both_in_turn_and_compares_the_shortest_calls_but_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    lasting = {"plain": iter([0.1, *[9.0] * 9, 6.0]), "fast": iter([0.1, 2.0, *[9.0] * 9])}
    clock = [0.0]

    def layer(name: str):
        def call(x: torch.Tensor) -> torch.Tensor:
            order.append(name)
            clock[0] += next(lasting[name])
            return x

        return call

    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    assert precision._gain(layer("plain"), layer("fast"), torch.zeros(1)) == pytest.approx(3.0)
    assert order == ["plain", "fast"] * 11


def test_a_gpu_says_itself_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_precision("auto", "cuda") == "bf16"
    bf16_pays.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_precision("auto", "cuda") == "fp32"
