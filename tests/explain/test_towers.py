"""Maps of constructed towers peak where they must; the model is left as it was, whoever calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chiasm.encoders.dual import ProjectedImageTower
from chiasm.errors import InputError
from chiasm.explain.gradients import attention_relevance, grad_cam, layer_cam
from chiasm.explain.methods import METHODS
from chiasm.explain.occlusion import occlusion_maps
from chiasm.explain.similarity import patch_text_maps, patch_vectors
from chiasm.explain.towers import natural_method, quiet

Make = Callable[..., Any]
RED = F.one_hot(torch.tensor(5), 16).float()


def with_red_patch(row: int, column: int, size: int = 32, cell: int = 8) -> torch.Tensor:
    pixels = torch.full((1, 3, size, size), 0.2)
    pixels[0, 0] = 0
    pixels[0, 0, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 1
    return pixels


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 3), (3, 2)])
def test_attention_finds_what_the_tower_looks_at(seeing: Make, pool: str, row: int, column: int) -> None:
    found = attention_relevance(seeing(pool).visual, with_red_patch(row, column), RED[None])
    assert found.shape == (1, 4, 4)
    assert (found >= 0).all()
    assert int(found.argmax()) == row * 4 + column
    assert float(found.max() / found.sum()) > 0.9


def test_attention_that_does_not_matter_gives_nothing(seeing: Make) -> None:
    visual = seeing().visual
    with torch.no_grad():
        visual.transformer.resblocks[0].attn.out_proj.weight.zero_()
    assert not attention_relevance(visual, with_red_patch(1, 1), RED[None]).any()


def test_similarity_finds_the_patch(seeing: Make) -> None:
    found = patch_text_maps(seeing("mean").visual, with_red_patch(2, 1), RED[None])
    assert int(found.argmax()) == 2 * 4 + 1
    assert float(found.max()) <= 1 + 1e-5


def test_mean_pooled_embedding_is_the_mean_of_its_patches(random_tower: Make) -> None:
    visual = random_tower(pool="mean").visual
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    vectors = visual.patch_features(pixels)
    torch.testing.assert_close(vectors.mean((1, 2)), visual(pixels), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patch_vectors(visual, pixels).norm(dim=-1), torch.ones(2, 4, 4))


def test_grad_cam_is_the_closed_form_where_there_is_one(random_tower: Make) -> None:
    """With mean pooling and a linear layer the gradient is known, and Grad-CAM is CAM (Selvaraju et al. 2017, 3.1)."""
    visual = random_tower(kind="resnet", pool="mean").visual
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    with torch.no_grad():
        features = visual.forward_features(pixels)
        embedded = visual.pool(features)
        unit = F.normalize(embedded, dim=-1)
        pull = (directions - (directions * unit).sum(-1, keepdim=True) * unit) / embedded.norm(dim=-1, keepdim=True)
        weights = pull @ visual.fc.weight / (features.shape[2] * features.shape[3])
        expected = (weights[:, :, None, None] * features).sum(1).relu()
    torch.testing.assert_close(grad_cam(visual, pixels, directions), expected, rtol=1e-4, atol=1e-7)


def test_grad_cam_with_attention_pooling_follows_the_text(random_tower: Make) -> None:
    visual = random_tower(kind="resnet").visual
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    embedded = F.normalize(visual(pixels), dim=-1).detach()
    other = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(3)), dim=-1)
    a, b = grad_cam(visual, pixels, other), grad_cam(visual, pixels, -other)
    assert a.shape == (1, 4, 4)
    assert (a >= 0).all()
    assert not torch.allclose(a, b)
    assert float(grad_cam(visual, pixels, embedded).abs().max()) < 1e-5  # the cosine is 1: nothing can raise it


def test_layer_cam_weighs_every_place_by_its_own_gradient(random_tower: Make) -> None:
    """With mean pooling the gradient is the same everywhere, so LayerCAM is the closed form with weights cut at zero."""
    visual = random_tower(kind="resnet", pool="mean").visual
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    with torch.no_grad():
        features = visual.forward_features(pixels)
        embedded = visual.pool(features)
        unit = F.normalize(embedded, dim=-1)
        pull = (directions - (directions * unit).sum(-1, keepdim=True) * unit) / embedded.norm(dim=-1, keepdim=True)
        weights = (pull @ visual.fc.weight).relu() / (features.shape[2] * features.shape[3])
        expected = (weights[:, :, None, None] * features).sum(1)
    torch.testing.assert_close(layer_cam(visual, pixels, directions), expected, rtol=1e-4, atol=1e-7)
    attentive = random_tower(kind="resnet").visual
    assert not torch.allclose(layer_cam(attentive, pixels, directions), grad_cam(attentive, pixels, directions))
    with pytest.raises(InputError, match="`resnet` tower"):
        layer_cam(random_tower().visual, pixels[..., :32, :32], directions)


def test_occlusion_finds_the_half_that_counts(bright: type[nn.Module]) -> None:
    pixels = torch.full((2, 3, 32, 32), 0.2)
    pixels[0, :, :8, :8] = 1
    pixels[1, :, 16:24, 24:] = 1
    left, right = torch.zeros(2, 16)
    left[0], right[1] = 1, 1
    found = occlusion_maps(bright(), pixels, torch.stack([left, right]), stride_px=8, window_px=8)
    assert found.shape == (2, 4, 4)
    assert int(found[0].argmax()) == 0
    assert int(found[1].argmax()) == 2 * 4 + 3
    overlapping = occlusion_maps(bright(), pixels, torch.stack([left, right]), stride_px=4, window_px=8)
    assert divmod(int(overlapping[0].argmax()), 8)[0] in (0, 1)
    assert occlusion_maps(bright(), pixels, torch.stack([left, right])).shape == (2, 8, 8)
    for stride, window in ((5, 10), (8, 4), (0, 4), (8, 64)):
        with pytest.raises(InputError, match="occlusion needs"):
            occlusion_maps(bright(), pixels, torch.stack([left, right]), stride_px=stride, window_px=window)


def test_occlusion_equals_covering_by_hand(random_tower: Make) -> None:
    visual = random_tower().visual
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    direction = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    found = occlusion_maps(visual, pixels, direction, stride_px=16, window_px=16)
    with torch.no_grad():
        covered = pixels.clone()
        covered[0, :, 16:, :16] = 0
        cosines = [float((F.normalize(visual(p), dim=-1) * direction).sum()) for p in (pixels, covered)]
    assert float(found[0, 1, 0]) == pytest.approx(cosines[0] - cosines[1], abs=1e-6)


@pytest.mark.parametrize(
    ("method", "kind"), [("attention", "vit"), ("grad_cam", "resnet"), ("layer_cam", "resnet"), ("similarity", "vit")]
)
def test_nothing_of_the_model_changes(random_tower: Make, method: str, kind: str) -> None:
    model = random_tower(kind=kind)
    names = [n for n, _ in model.named_parameters()]
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 2 == 0)
    model.visual.train()
    next(model.visual.children()).eval()
    before = (
        {n: t.clone() for n, t in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
    )
    size = model.visual.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    directions = torch.eye(16)[:2]
    results = []
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context, quiet(model):
            results.append(METHODS[method](model.visual, pixels.clone(), directions.clone()).clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not results[2].requires_grad
    after = model.state_dict()
    assert all(torch.equal(before[0][n], after[n]) for n in before[0])
    assert before[1] == [p.requires_grad for p in model.parameters()]
    assert before[2] == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters()), names
    assert not pixels.requires_grad


def test_a_locked_tower_can_be_explained(random_tower: Make) -> None:
    for kind, method in (("vit", attention_relevance), ("resnet", grad_cam), ("resnet", layer_cam)):
        model = random_tower(kind=kind)
        size = model.visual.image_size
        pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        free = method(model.visual, pixels, torch.eye(16)[:1])
        model.requires_grad_(False)
        assert torch.equal(method(model.visual, pixels, torch.eye(16)[:1]), free)


def test_images_of_a_batch_do_not_see_each_other(random_tower: Make) -> None:
    for kind, method in (("vit", "attention"), ("resnet", "grad_cam"), ("resnet", "layer_cam"), ("vit", "similarity")):
        visual = random_tower(kind=kind).visual
        pixels = torch.rand(3, 3, visual.image_size, visual.image_size, generator=torch.Generator().manual_seed(0))
        directions = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
        whole = METHODS[method](visual, pixels, directions)
        single = torch.cat([METHODS[method](visual, pixels[k : k + 1], directions[k : k + 1]) for k in range(3)])
        np.testing.assert_allclose(whole.numpy(), single.numpy(), rtol=1e-3, atol=1e-5)


def test_methods_go_with_towers(random_tower: Make, bright: type[nn.Module]) -> None:
    vit, resnet = random_tower().visual, random_tower(kind="resnet").visual
    foreign = ProjectedImageTower(bright(), nn.Identity(), 16)
    behind = ProjectedImageTower(random_tower(pool="mean").visual, nn.Linear(16, 16), 16)
    assert natural_method(vit) == "attention"
    assert natural_method(resnet) == "layer_cam"
    assert natural_method(foreign) == "occlusion"
    patchy = bright()
    patchy.patch_tokens = lambda pixels: torch.ones(len(pixels), 2, 2, 16)
    with_patches = ProjectedImageTower(patchy, nn.Identity(), 16)
    assert patch_vectors(with_patches, torch.rand(1, 3, 32, 32)).shape == (1, 2, 2, 16)
    assert natural_method(with_patches) == "occlusion"  # a patch's vector need not speak of what lies there
    assert natural_method(behind) == "attention"
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for method in ("attention", "similarity", "occlusion"):
        assert METHODS[method](behind, pixels, torch.eye(16)[:1]).isfinite().all()
    with pytest.raises(InputError, match="`resnet` tower"):
        grad_cam(vit, pixels, RED[None])
    with pytest.raises(InputError, match="`vit` tower"):
        attention_relevance(resnet, torch.rand(1, 3, 64, 64), RED[None])
    with pytest.raises(InputError, match="no patch tokens"):
        patch_text_maps(foreign, pixels, RED[None])


def test_half_precision(random_tower: Make) -> None:
    for kind, method in (("vit", "attention"), ("resnet", "grad_cam"), ("resnet", "layer_cam"), ("vit", "similarity")):
        visual = random_tower(kind=kind).visual
        pixels = torch.rand(1, 3, visual.image_size, visual.image_size, generator=torch.Generator().manual_seed(0))
        full = METHODS[method](visual, pixels, torch.eye(16)[:1])
        half = METHODS[method](visual.bfloat16(), pixels.bfloat16(), torch.eye(16)[:1])
        assert half.dtype == torch.float32
        assert float(torch.corrcoef(torch.stack([full.flatten(), half.flatten()]))[0, 1]) > 0.9
