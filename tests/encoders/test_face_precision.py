"""The face's use of the fast forms: when they are made, what they may differ by, and when the model itself runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from chiasm.encoders.adapters import apply_lora
from chiasm.encoders.base import Encoder
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.inference.engine import Engine
from chiasm.errors import ConfigError, InputError
from chiasm.testing import TEXTS, TinyEncoder

Make = Callable[..., Any]


@pytest.fixture
def encoder(scramble: Make) -> Encoder:
    torch.set_num_threads(1)
    made = TinyEncoder()
    scramble(made.model)
    return made


def pixels(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def truth(encoder: Encoder, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return encoder.model.encode_image(x)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return 1 - float(F.cosine_similarity(found, expected).min())


def test_float32_is_the_default_and_the_model_itself_stays_float32(encoder: Encoder) -> None:
    assert encoder.precision == "fp32"
    mixed = encoder.with_precision("bf16")
    assert mixed.precision == "bf16"
    x = pixels()
    assert 1e-7 < far(mixed.encode_image(x), truth(encoder, x)) < 2e-4
    assert 1e-8 < far(mixed.encode_text(list(TEXTS)), encoder.encode_text(list(TEXTS))) < 2e-4
    assert mixed.encode_image(x).dtype == mixed.encode_text("x").dtype == torch.float32
    assert torch.equal(truth(mixed, x), truth(encoder, x))


def test_another_precision_shares_the_weights_and_the_space(encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    other = encoder.with_precision("bf16")
    assert other.model is encoder.model
    assert other.config is encoder.config
    assert other.name == encoder.name
    assert other.space == encoder.space
    assert other.tokenizer is tokenizer
    assert encoder.precision == "fp32"


def test_fp16_becomes_bfloat16_and_auto_what_is_set(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder.with_precision("fp16").precision == "bf16"
    monkeypatch.setenv("CHIASM_PRECISION", "bf16")
    chosen = encoder.with_precision("auto")
    assert chosen.precision == "bf16"
    monkeypatch.setenv("CHIASM_PRECISION", "fp32")
    assert chosen.precision == "bf16"  # decided once
    assert chosen.to("cpu").precision == "fp32"  # and anew after a move
    with pytest.raises(ConfigError, match="precision `half` is not known"):
        encoder.with_precision("half")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_change_are_seen_at_the_next_call(encoder: Encoder, scramble: Make, precision: str) -> None:
    fast = encoder.with_precision(precision).prepare()
    x, bound = pixels(), {"fp32": 1e-6, "bf16": 1e-3}[precision]
    before = fast.encode_image(x)

    def changed_and_right() -> None:
        found = fast.encode_image(x)
        assert far(found, before) > 10 * bound
        assert far(found, truth(encoder, x)) < bound

    with torch.no_grad():
        encoder.model.visual.transformer.resblocks[0].mlp.c_fc.bias.add_(1.0)  # type: ignore[union-attr, operator, index]
    changed_and_right()
    other = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    other["visual.conv1.weight"] *= -1
    encoder.model.load_state_dict(other)
    changed_and_right()
    optimizer = torch.optim.SGD(encoder.model.parameters(), lr=5.0)
    torch.autograd.backward(encoder.model.encode_image(x, normalize=True).square().sum(0)[0])
    optimizer.step()
    changed_and_right()
    encoder.model.load_state_dict({k: v.clone() for k, v in other.items()}, assign=True)
    changed_and_right()
    scramble(encoder.model, 9)
    changed_and_right()


def test_an_unchanged_model_is_laid_out_once(encoder: Encoder) -> None:
    encoder.prepare()
    engine = encoder._engine
    assert engine is not None
    encoder.encode_image(pixels())
    encoder.encode_text("x")
    assert encoder._engine is engine
    encoder.to("cpu")
    same(encoder.encode_image(pixels()), truth(encoder, pixels()))
    assert encoder._engine is not engine


def test_one_question_does_not_wait_for_the_layout(encoder: Encoder) -> None:
    x = pixels(1)
    assert torch.equal(encoder.encode_image(x), truth(encoder, x))
    assert encoder._engine is None  # the model itself answered
    assert torch.equal(encoder.encode_image(x), truth(encoder, x))  # the same bits when asked again
    encoder.encode(["a film"])
    assert encoder._engine is None
    one = encoder.encode_text("a film")
    encoder.encode_image(pixels(2))
    assert encoder._engine is not None
    assert torch.equal(encoder.encode_text("a film"), one)  # a batch of images changes no bit of a single text
    encoder.encode_text(["a film", "b"])
    same(encoder.encode_text("a film"), one)
    same(encoder.encode_image(x), truth(encoder, x))
    many = TinyEncoder()
    many.encode_image(pixels(2))
    assert many._engine is not None
    prepared = TinyEncoder().prepare()
    assert prepared._engine is not None
    mixed = encoder.with_precision("bf16")
    mixed.encode_image(x)
    assert mixed._engine is not None  # the first vectors of a run have the precision of the others


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapted_tower_runs_as_it_is_and_says_why(encoder: Encoder, precision: str) -> None:
    from chiasm.encoders.base import LoraConfig

    visual: Any = encoder.model.visual
    apply_lora(visual, LoraConfig(rank=2))
    with torch.no_grad():
        for name, weight in visual.named_parameters():
            if "lora" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    fast = encoder.with_precision(precision)
    x = pixels()
    assert torch.equal(fast.encode_image(x), truth(encoder, x))
    plain = Engine(encoder.model, "fp32").plain
    assert set(plain) == {"image"}
    assert "is not" in plain["image"]


def test_a_hook_is_called_and_a_half_precision_tower_runs(encoder: Encoder) -> None:
    x, seen = pixels(), []
    block: Any = encoder.model.visual.transformer.resblocks[1]  # type: ignore[union-attr, index]
    handle = block.register_forward_hook(lambda *_: seen.append(1))
    assert "has hooks" in Engine(encoder.model, "bf16").plain["image"]
    encoder.encode_image(x)
    assert seen == [1]
    handle.remove()
    assert not Engine(encoder.model, "bf16").plain
    encoder.model.bfloat16()
    engine = Engine(encoder.model, "fp32")
    assert set(engine.plain) == {"image", "text"}
    assert "torch.bfloat16" in engine.plain["image"]
    assert encoder.encode_image(x).dtype == torch.bfloat16


def test_two_threads_at_once_get_what_one_gets(encoder: Encoder) -> None:
    x = pixels(6)
    for precision, bound in (("fp32", 1e-6), ("bf16", 1e-4)):
        fast = encoder.with_precision(precision)
        start = threading.Barrier(2)
        found: dict[int, list[torch.Tensor]] = {}

        def work(i: int, fast: Encoder = fast, start: threading.Barrier = start, found: Any = found) -> None:
            start.wait()
            found[i] = [fast.encode_image(x) for _ in range(5)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [0, 1]
        assert all(far(v, truth(encoder, x)) < bound for vectors in found.values() for v in vectors)


def test_an_ensemble_is_fast_member_by_member(make_config: Make, scramble: Make) -> None:
    import dataclasses

    config = dataclasses.replace(make_config(), members=2)
    model = build_encoder_model(config, seed=0).eval()
    scramble(model)
    ensemble = Encoder(model, config, name="two")
    x = pixels()
    same(ensemble.encode_image(x), truth(ensemble, x))
    same(ensemble.encode_image(x).norm(dim=1), torch.ones(3))
    assert not Engine(model, "fp32").plain
    assert 0 < far(ensemble.with_precision("bf16").encode_image(x), truth(ensemble, x)) < 2e-4
    member: Any = model.models()[1]  # type: ignore[operator]
    member.visual.transformer.resblocks[0].register_forward_hook(lambda *_: None)
    assert "has hooks" in Engine(model, "fp32").plain["image"]
    same(ensemble.encode_image(x), truth(ensemble, x))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_edges_are_those_of_the_model(encoder: Encoder, precision: str) -> None:
    fast = encoder.with_precision(precision).prepare()
    assert fast.encode_image(torch.zeros(0, 3, 32, 32)).shape == (0, fast.dim)
    assert fast.encode_image(pixels(1)[0]).shape == (1, fast.dim)
    torch.testing.assert_close(fast.encode_image(pixels(), normalize=True).norm(dim=1), torch.ones(3))
    with pytest.raises(InputError, match="the tower expects"):
        fast.encode_image(torch.zeros(1, 3, 16, 16))
    with pytest.raises(InputError, match=r"torch\.uint8"):
        fast.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    encoder.model.train()
    assert far(fast.encode_image(pixels()), truth(encoder, pixels())) < 2e-4
    assert not encoder.model.training


def test_a_hook_that_comes_late_is_called_and_one_that_goes_is_forgotten(encoder: Encoder) -> None:
    pixels = torch.randn(2, 3, *[encoder.preprocess_spec.size] * 2)
    before = encoder.encode_image(pixels)
    seen: list[int] = []
    handle = encoder.model.visual.transformer.resblocks[0].register_forward_hook(lambda *_: seen.append(1))
    try:
        encoder.encode_image(pixels)
        assert seen == [1]
    finally:
        handle.remove()
    assert torch.equal(encoder.encode_image(pixels), before)
    assert seen == [1]
