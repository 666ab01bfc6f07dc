from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.encoders.transformer import QuickGELU
from chiasm.encoders.vit import VisionTransformer
from chiasm.errors import InputError

Make = Callable[..., Any]


def pixels(n: int = 3, size: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def test_patch_embedding_is_the_convolution(tiny: Make) -> None:
    tower = tiny().visual
    x = pixels()
    expected = tower.conv1(x).flatten(2).transpose(1, 2)
    tower.ln_pre = torch.nn.Identity()
    got = tower._embed(x)[:, 1:] - tower.positional_embedding[1:]
    assert worst(got, expected) < 1e-5


def test_class_token_shortcut_is_exact_in_value_and_gradient(tiny: Make) -> None:
    tower: VisionTransformer = tiny().visual.double()
    x = pixels(dtype=torch.float64)
    weights = torch.randn(3, 20, dtype=torch.float64)

    def run(full: bool) -> tuple[Tensor, list[Tensor]]:
        out = tower.forward_features(x).pooled if full else tower(x)
        return out, list(torch.autograd.grad((out * weights).sum(), list(tower.parameters())))

    (short, short_grads), (full, full_grads) = run(False), run(True)
    assert worst(short, full) < 1e-13
    for a, b in zip(short_grads, full_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_shortcut_computes_the_class_token_alone(tiny: Make) -> None:
    tower = tiny().visual
    x = tower._embed(pixels())
    assert tower.transformer(x, last="first").shape == (3, 1, 32)
    assert tower.transformer(x).shape == (3, 17, 32)


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_other_poolings_see_every_patch(tiny: Make, pool: str) -> None:
    tower = tiny(image={"pool": pool}).visual
    x = pixels(1).requires_grad_()
    tower(x).square().sum().backward()
    assert x.grad is not None
    patches = F.unfold(x.grad, 8, stride=8)
    assert bool((patches.abs().sum(1) > 0).all())


@pytest.mark.parametrize("pool", ["cls", "mean", "attention"])
@pytest.mark.parametrize("mode", ["tokens", "values", "auto"])
def test_patch_features_have_the_shape_of_the_grid(tiny: Make, pool: str, mode: str) -> None:
    tower = tiny(image={"pool": pool}).visual
    assert tower.patch_features(pixels(2), mode).shape == (2, 4, 4, 20)


def test_patch_features_average_to_the_embedding_under_mean_pooling(tiny: Make) -> None:
    tower = tiny(image={"pool": "mean"}).visual
    x = pixels()
    assert worst(tower.patch_features(x).mean((1, 2)), tower(x)) < 1e-5


def test_tokens_mode_is_the_projected_patch_tokens(tiny: Make) -> None:
    tower = tiny().visual
    x = pixels()
    tokens = tower.forward_features(x).tokens[:, 1:]
    expected = (tower.ln_post(tokens) @ tower.proj).reshape(3, 4, 4, 20)
    assert worst(tower.patch_features(x, "tokens"), expected) < 1e-6


def test_values_mode_is_a_last_block_that_attends_to_itself(tiny: Make) -> None:
    tower = tiny().visual
    x = pixels()
    blocks = tower.transformer.resblocks
    hidden = tower._embed(x)
    for block in blocks[:-1]:
        hidden = block(hidden)[0]
    last = blocks[-1]
    with torch.no_grad():  # a sequence of one token sees itself alone
        alone = [last(hidden[:, i : i + 1])[0] for i in range(1, hidden.shape[1])]
        expected = (tower.ln_post(torch.cat(alone, 1)) @ tower.proj).reshape(3, 4, 4, 20)
    assert worst(tower.patch_features(x, "values"), expected) < 1e-5


def test_patch_features_stand_on_their_patch(tiny: Make) -> None:
    """Each row and column belongs to its place: with one block, changing one patch changes only its own value."""
    tower = tiny(image={"layers": 1}).visual
    x = pixels(1)
    changed = x.clone()
    changed[:, :, 8:16, 24:32] += 1.0
    difference = (tower.patch_features(x, "values") - tower.patch_features(changed, "values")).abs().sum(-1)[0].detach()
    assert difference[1, 3] > 1e-3
    difference[1, 3] = 0
    assert float(difference.max()) == 0


def test_attention_weights_are_probabilities_inside_the_graph(tiny: Make) -> None:
    tower = tiny().visual
    features = tower.forward_features(pixels(2), return_attention=True)
    assert len(features.attentions) == 3
    for weights in features.attentions:
        assert weights.shape == (2, 4, 17, 17)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 17))
    gradients = torch.autograd.grad(features.pooled.square().sum(), features.attentions)
    assert all(float(g.abs().sum()) > 0 for g in gradients)
    assert worst(features.pooled, tower(pixels(2))) < 1e-5
    assert tower.forward_features(pixels(2)).attentions == ()


@pytest.mark.parametrize("pool", ["cls", "mean", "attention"])
def test_an_image_does_not_depend_on_its_batch(tiny: Make, pool: str) -> None:
    tower = tiny(image={"pool": pool}).visual
    x = pixels(5)
    together = tower(x)
    alone = torch.cat([tower(x[i : i + 1]) for i in range(5)])
    assert worst(alone, together) < 1e-5
    order = torch.tensor([3, 1, 4, 0, 2])
    assert worst(tower(x[order]), together[order]) < 1e-5


@pytest.mark.parametrize("pool", ["cls", "mean", "attention"])
def test_gradient_reaches_every_parameter(tiny: Make, pool: str) -> None:
    tower = tiny(image={"pool": pool}).visual.train()
    tower(pixels()).pow(3).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_gradcheck_in_double_precision(tiny: Make) -> None:
    tower = tiny(image={"image_size": 4, "patch_size": 2, "width": 4, "heads": 2, "layers": 2}, dim=3).visual.double()
    x = pixels(1, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(tower, (x,))
    names, values = zip(*tower.named_parameters(), strict=True)

    def with_weights(*weights: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(tower, dict(zip(names, weights, strict=True)), (x.detach(),))
        return out

    assert torch.autograd.gradcheck(with_weights, values, fast_mode=True)


def test_checkpointing_changes_no_gradient(tiny: Make) -> None:
    tower = tiny().visual.train()
    plain = torch.autograd.grad(tower(pixels()).square().sum(), list(tower.parameters()))
    tower.set_grad_checkpointing()
    saved = torch.autograd.grad(tower(pixels()).square().sum(), list(tower.parameters()))
    for a, b in zip(plain, saved, strict=True):
        assert torch.equal(a, b)


def test_quick_gelu_is_its_formula_and_not_gelu() -> None:
    x = torch.linspace(-8, 8, 401, dtype=torch.float64)
    torch.testing.assert_close(QuickGELU()(x), x * torch.sigmoid(1.702 * x), rtol=1e-12, atol=1e-14)
    assert float((QuickGELU()(x) - F.gelu(x)).abs().max()) > 1e-2


def test_half_precision_norm_is_computed_in_float32(tiny: Make) -> None:
    norm = tiny().visual.ln_post
    x = torch.randn(4, 32) * 100
    got = norm.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    expected = F.layer_norm(x.bfloat16().float(), (32,), norm.weight.float(), norm.bias.float(), norm.eps)
    assert torch.equal(got, expected.bfloat16())


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3, 31, 32), torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 64, 64)]
)
def test_wrong_shapes_are_refused(tiny: Make, bad: Tensor) -> None:
    with pytest.raises(InputError, match=r"expects \(batch, 3, 32, 32\)"):
        tiny().visual(bad)


def test_integer_pixels_are_refused(tiny: Make) -> None:
    with pytest.raises(InputError, match="floating point"):
        tiny().visual(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_empty_batch(tiny: Make) -> None:
    model = tiny()
    assert model.visual(torch.zeros(0, 3, 32, 32)).shape == (0, 20)
    assert model.visual.patch_features(torch.zeros(0, 3, 32, 32)).shape == (0, 4, 4, 20)


def test_bf16_autocast_stays_close(tiny: Make) -> None:
    tower = tiny().visual
    with torch.inference_mode():
        exact = tower(pixels())
        with torch.autocast("cpu", torch.bfloat16):
            rough = tower(pixels())
    cosine = F.cosine_similarity(rough.float(), exact)
    assert float(cosine.min()) > 0.999
