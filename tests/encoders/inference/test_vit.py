from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from chiasm.encoders.base import ImageTowerConfig
from chiasm.encoders.inference import packed, vit
from chiasm.encoders.inference.blocks import attend_one
from chiasm.encoders.inference.packed import NotPackable
from chiasm.encoders.inference.vit import PackedViT
from chiasm.encoders.vit import VisionTransformer
from chiasm.errors import InputError

Make = Callable[..., Any]
FORMS: dict[str, dict[str, Any]] = {
    "openai": {},
    "one block": {"layers": 1},
    "gelu": {"activation": "gelu"},
    "gelu by tanh": {"activation": "gelu_tanh"},
    "swiglu": {"activation": "swiglu"},
    "no ln_pre": {"pre_norm": False},
    "patch bias": {"patch_bias": True},
    "layer scale": {"layer_scale": True},
    "registers": {"registers": 3},
    "mean": {"pool": "mean"},
    "mean of all but class and registers": {"pool": "mean", "registers": 2},
    "no class token": {"pool": "mean", "class_token": False},
    "attention pool": {"pool": "attention", "width": 64},
    "siglip": {"pool": "map", "class_token": False, "pre_norm": False, "patch_bias": True, "activation": "gelu_tanh"},
    "dinov2": {"patch_bias": True, "pre_norm": False, "layer_scale": True, "registers": 4, "ln_eps": 1e-6,
               "activation": "swiglu"},
    "pixels that no patch covers": {"image_size": 37, "pool": "mean", "class_token": False},
    "siglip's 384 in patches of 14": {"image_size": 384, "patch_size": 14, "layers": 1, "pool": "map",
                                      "class_token": False},
}  # fmt: skip
LAW = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pixels(tower: VisionTransformer, batch: int = 3, seed: int = 3) -> torch.Tensor:
    side = tower.image_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def tower_of(tiny: Make, form: str = "openai", **changes: Any) -> VisionTransformer:
    tower = tiny(image={**FORMS[form], **changes}).visual
    assert isinstance(tower, VisionTransformer)
    return tower


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_it_gives_what_the_tower_gives(tiny: Make, form: str) -> None:
    tower = tower_of(tiny, form)
    x = pixels(tower)
    expected = tower(x)
    found = PackedViT(tower, dtype=torch.float32)(x)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    mixed = PackedViT(tower, dtype=torch.bfloat16)(x)
    assert mixed.dtype == torch.float32
    assert 1 - float(F.cosine_similarity(mixed, expected).min()) < 2e-4
    mean = expected.mean(0)
    assert 1 - float(F.cosine_similarity(mixed - mean, expected - mean).min()) < 2e-3


@pytest.mark.parametrize("form", ["openai", "mean", "siglip"])
@torch.inference_mode()
def test_without_packed_operators_it_gives_the_same(tiny: Make, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tower_of(tiny, form)
    x = pixels(tower)
    monkeypatch.setattr(packed, "can_pack", lambda dtype: False)
    torch.testing.assert_close(PackedViT(tower, dtype=torch.float32)(x), tower(x), rtol=1e-5, atol=1e-5)
    mixed = PackedViT(tower, dtype=torch.bfloat16)(x)
    assert mixed.dtype == torch.float32
    assert 1 - float(F.cosine_similarity(mixed, tower(x)).min()) < 2e-4


@LAW
@given(st.integers(1, 6), st.integers(0, 50))
def test_an_embedding_does_not_depend_on_its_neighbours(tiny: Make, batch: int, seed: int) -> None:
    tower = tower_of(tiny)
    x = pixels(tower, batch, seed)
    x[1::2] *= 0.01
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        form = PackedViT(tower, dtype=dtype)
        with torch.inference_mode():
            alone = torch.cat([form(image[None]) for image in x])
            assert float((form(x) - alone).abs().max() / alone.abs().max()) < bound


@torch.inference_mode()
def test_the_shortcut_of_class_token_pooling_is_wrong_under_mean_pooling(tiny: Make) -> None:
    tower = tower_of(tiny, "mean")
    form, x = PackedViT(tower, dtype=torch.float32), pixels(tower_of(tiny))
    assert not form._few
    expected = tower(x)
    wrong = PackedViT(tower_of(tiny, "openai"), dtype=torch.float32)
    wrong._tower = tower
    assert float((wrong(x) - expected).abs().max() / expected.abs().max()) > 1e-2


@torch.inference_mode()
def test_patches_are_cut_as_the_convolution_cuts_them(tiny: Make) -> None:
    """One pixel of one colour in one patch: a patch read in another order of axes lands elsewhere."""
    tower = tower_of(tiny)
    form = PackedViT(tower, dtype=torch.float32)
    for channel, row, column in ((0, 0, 0), (1, 3, 17), (2, 31, 8), (0, 9, 31)):
        x = torch.zeros(1, 3, 32, 32)
        x[0, channel, row, column] = 5.0
        torch.testing.assert_close(form._embed(x), tower._embed(x), rtol=1e-5, atol=1e-5)
    x = pixels(tower)
    turned = form._embed(x.transpose(2, 3))
    assert float((turned - tower._embed(x)).abs().max()) > 1e-2


@torch.inference_mode()
def test_images_with_gaps_in_memory_are_read_rightly(tiny: Make) -> None:
    tower = tower_of(tiny)
    form = PackedViT(tower, dtype=torch.float32)
    x = pixels(tower, 6)
    for view in (x[::2], x.to(memory_format=torch.channels_last), x.flip(3), x[:1].expand(3, -1, -1, -1)):
        torch.testing.assert_close(form(view), tower(view), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_no_images_give_no_rows_and_wrong_ones_are_refused(tiny: Make) -> None:
    form = PackedViT(tower_of(tiny), dtype=torch.float32)
    assert form(torch.zeros(0, 3, 32, 32)).shape == (0, 20)
    for wrong in (torch.zeros(2, 3, 31, 32), torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32)):
        with pytest.raises(InputError, match=r"the tower expects \(batch, 3, 32, 32\)"):
            form(wrong)
    with pytest.raises(InputError, match=r"pixels are torch\.uint8"):
        form(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@torch.inference_mode()
def test_the_tower_is_left_alone(tiny: Make) -> None:
    tower = tower_of(tiny, "layer scale")
    state = {k: v.clone() for k, v in tower.state_dict().items()}
    x = pixels(tower)
    kept = x.clone()
    for dtype in (torch.float32, torch.bfloat16):
        PackedViT(tower, dtype=dtype)(x)
    assert torch.equal(x, kept)
    assert all(torch.equal(state[k], v) for k, v in tower.state_dict().items())


class Adapted(nn.Linear):
    """A linear layer that does something more."""


def adapt(tower: VisionTransformer) -> None:
    block: Any = tower.transformer.resblocks[1]
    block.attn.out_proj = Adapted(32, 32)


def hook_inside(tower: VisionTransformer) -> None:
    block: Any = tower.transformer.resblocks[0]
    block.ln_1.register_forward_pre_hook(lambda *_: None)


def hook_outside(tower: VisionTransformer) -> None:
    tower.register_forward_hook(lambda *_: None)


def halve(tower: VisionTransformer) -> None:
    tower.bfloat16()


def wrap_patches(tower: VisionTransformer) -> None:
    class Other(nn.Conv2d):
        pass

    tower.conv1 = Other(3, 32, 8, 8, bias=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (adapt, "Adapted is not Linear"),
        (hook_inside, "a LayerNorm has hooks"),
        (hook_outside, "a VisionTransformer has hooks"),
        (halve, "weights are torch.bfloat16 on cpu"),
        (wrap_patches, "Other is not Conv2d"),
    ],
)
def test_a_tower_that_was_changed_is_refused(
    tiny: Make, change: Callable[[VisionTransformer], None], reason: str
) -> None:
    tower = tower_of(tiny)
    change(tower)
    with pytest.raises(NotPackable, match=reason):
        PackedViT(tower, dtype=torch.float32)


def test_a_subclass_may_do_something_else(tiny: Make) -> None:
    class Other(VisionTransformer):
        pass

    config = ImageTowerConfig(image_size=32, patch_size=8, width=32, layers=1, heads=4)
    with pytest.raises(NotPackable, match="Other is not VisionTransformer"):
        PackedViT(Other(config, 20), dtype=torch.float32)


@torch.inference_mode()
def test_the_last_block_computes_the_class_token_alone(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    inner = attend_one

    def count(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(query))
        return inner(query, *rest)

    monkeypatch.setattr(vit, "attend_one", count)
    for form, expected in (("openai", [3]), ("registers", [3]), ("mean", []), ("siglip", [])):
        seen.clear()
        tower = tower_of(tiny, form)
        PackedViT(tower, dtype=torch.float32)(pixels(tower))
        assert seen == expected, form
