"""What tells that a model changed: optimizers of every kind, replaced modules, hooks that move, weights that move."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chiasm.encoders.base import Encoder
from chiasm.encoders.inference.engine import Engine
from chiasm.encoders.weights import structure_key, weights_key
from chiasm.testing import TinyEncoder

Make = Callable[..., Any]
FUSED = [{"fused": True}, {"foreach": True}, {"foreach": False}]


@pytest.fixture
def encoder(scramble: Make) -> Encoder:
    torch.set_num_threads(1)
    made = TinyEncoder()
    scramble(made.model)
    return made


def pixels(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return 1 - float(F.cosine_similarity(found, expected).min())


def right(encoder: Encoder) -> bool:
    """Whether the fast form gives what the model itself gives now."""
    x = pixels()
    with torch.inference_mode():
        return far(encoder.encode_image(x), encoder.model.encode_image(x)) < 1e-6


@pytest.mark.parametrize("kind", FUSED, ids=lambda k: "-".join(map(str, k.items())))
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_a_step_of_any_optimizer_is_seen(encoder: Encoder, kind: dict[str, bool], name: str) -> None:
    x, model = pixels(), encoder.model
    before, space = encoder.encode_image(x), encoder.space
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, **kind)
    torch.autograd.backward(model.encode_image(x).square().mean())
    untouched = weights_key(model.transformer)  # type: ignore[arg-type]
    optimizer.step()
    assert right(encoder)
    assert far(encoder.encode_image(x), before) > 1e-5
    assert encoder.space != space
    assert weights_key(model.transformer) == untouched  # type: ignore[arg-type]  # without gradients nothing changed


def test_a_scaled_fused_step_is_seen_and_an_old_graph_is_refused(encoder: Encoder) -> None:
    x, model = pixels(), encoder.model
    assert right(encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    loss = model.encode_image(x).square().mean()
    torch.autograd.backward(loss, retain_graph=True)
    optimizer.step()
    assert right(encoder)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as with every other optimizer
        torch.autograd.backward(loss)


def test_types_there_and_back_are_seen() -> None:
    layer = nn.Linear(64, 64)
    exact, key = layer.weight.detach().clone(), weights_key(layer)
    layer.half()
    assert weights_key(layer) != key
    assert [entry[2] for entry in weights_key(layer)] == [torch.float16] * 2
    layer.float()
    assert not torch.equal(layer.weight, exact)


def test_modules_without_weights_count(encoder: Encoder) -> None:
    x = pixels()
    before = encoder.encode_image(x)
    block: Any = encoder.model.visual.transformer.resblocks[0]  # type: ignore[union-attr, index]
    block.mlp.gelu = nn.GELU("tanh")
    assert right(encoder)
    assert far(encoder.encode_image(x), before) > 1e-7
    block.mlp.gelu = nn.ReLU()  # has no fast form
    assert right(encoder)


def test_a_hook_that_moves_is_called(encoder: Encoder) -> None:
    """As many hooks as before, elsewhere."""
    image: Any = encoder.model.visual.transformer.resblocks[0]  # type: ignore[union-attr, index]
    text: Any = encoder.model.transformer.resblocks[0]  # type: ignore[union-attr, index]
    seen: list[str] = []
    handle = image.register_forward_hook(lambda *_: seen.append("image"))
    encoder.prepare().encode_image(pixels())
    handle.remove()
    text.register_forward_pre_hook(lambda *_: seen.append("text"))
    encoder.encode_text(["a", "b"])
    assert seen == ["image", "text"]
    key = structure_key(encoder.model)
    text._forward_pre_hooks.clear()
    assert structure_key(encoder.model) != key


@pytest.mark.parametrize(
    "part", ["visual.ln_post", "visual.transformer.resblocks.0", "visual.transformer.resblocks.1.mlp.c_fc"]
)
def test_a_forward_that_somebody_put_there_is_called(encoder: Encoder, part: str) -> None:
    encoder.prepare()
    module, seen = encoder.model.get_submodule(part), []
    usual = type(module).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return usual(self, *args, **kwargs)

    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    encoder.encode_image(pixels())
    assert seen == [1]
    if part != "visual.ln_post":  # which fast forms call as it is
        assert "a forward of its own" in Engine(encoder.model, "fp32").plain["image"]


def test_a_part_in_training_mode_is_switched_back(make_config: Make, scramble: Make, tiny: Make) -> None:
    model = tiny(image={"kind": "resnet"})
    encoder = Encoder(model, model.config, name="tiny")
    x = torch.randn(3, 3, model.config.image.image_size, model.config.image.image_size)
    expected = encoder.encode_image(x)
    statistics = model.visual.bn1.running_mean.clone()
    model.visual.train()
    assert not model.training
    torch.testing.assert_close(encoder.encode_image(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.visual.bn1.running_mean, statistics)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
def test_an_encoder_can_be_copied_and_sent(encoder: Encoder, copied: Callable[[Encoder], Encoder]) -> None:
    x = pixels()
    expected = encoder.encode_image(x)
    other = copied(encoder)
    assert other._engine is None
    assert other.space == encoder.space
    torch.testing.assert_close(other.encode_image(x), expected)
    with torch.no_grad():
        other.model.logit_scale.add_(1.0)  # type: ignore[union-attr]
        other.model.visual.conv1.weight.mul_(-1)  # type: ignore[union-attr, operator]
    assert right(other)
    torch.testing.assert_close(encoder.encode_image(x), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_nothing_is_written_and_training_goes_on(encoder: Encoder, precision: str) -> None:
    """Neither the caller's pixels nor the weights are touched, and nothing made for inference stays in the model."""
    fast = encoder.with_precision(precision).prepare()
    x = pixels(64)
    kept, weights = x.clone(), {k: v.clone() for k, v in encoder.model.state_dict().items()}
    fast.encode_image(x)
    fast.encode_text(["a film", "a longer text of a film"])
    assert torch.equal(x, kept)
    assert all(torch.equal(v, weights[k]) for k, v in encoder.model.state_dict().items())
    assert not any(t.is_inference() for t in (*encoder.model.parameters(), *encoder.model.buffers()))
    torch.autograd.backward(encoder.model.train().encode_image(x[:2]).square().mean())
    assert all(p.grad is not None for p in encoder.model.visual.parameters())  # type: ignore[union-attr]


def test_the_precision_follows_the_device_of_a_shared_model(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another encoder of the same weights may have moved them."""
    half = encoder.with_precision("fp16")
    monkeypatch.setattr(type(encoder.model), "device", property(lambda _: torch.device("cuda")))
    found: list[str] = [half.precision]
    monkeypatch.undo()
    found.append(half.precision)
    assert found == ["fp16", "bf16"]
    assert half.encode_image(pixels()).dtype == torch.float32
