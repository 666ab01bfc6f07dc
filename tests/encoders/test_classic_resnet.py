from __future__ import annotations

import pytest
import torch

from chiasm.encoders.base import ImageTowerConfig
from chiasm.encoders.classic_resnet import ClassicResNet
from chiasm.encoders.named import build_named_tower
from chiasm.errors import ConfigError, InputError


def tower(**options: object) -> ClassicResNet:
    config = ImageTowerConfig(kind="named", source="classic_resnet", image_size=64, options=options)
    built = build_named_tower(config)
    assert isinstance(built, ClassicResNet)
    return built


def test_the_default_is_resnet_50_without_classifier() -> None:
    with torch.device("meta"):
        model = ClassicResNet()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032 - 2_049_000
    assert len(model.state_dict()) == 318
    assert (model.output_dim, model.channels) == (2048, (256, 512, 1024, 2048))
    with torch.device("meta"):
        small = ClassicResNet((2, 2, 2, 2), block="basic")
    assert sum(p.numel() for p in small.parameters()) == 11_689_512 - 513_000


@pytest.mark.parametrize(("block", "factor"), [("bottleneck", 4), ("basic", 1)])
def test_maps_of_all_stages(block: str, factor: int) -> None:
    model = tower(layers=[1, 2, 1, 1], width=8, block=block).eval()
    pixels = torch.randn(2, 3, 64, 64)
    maps = model.feature_maps(pixels)
    assert [tuple(m.shape[1:]) for m in maps] == [(8 * factor * 2**i, 16 >> i, 16 >> i) for i in range(4)]
    assert torch.allclose(model(pixels), model.patch_tokens(pixels).mean((1, 2)), atol=1e-6)
    assert model(pixels[:0]).shape == (0, model.output_dim)


def test_checkpointing_leaves_the_gradients() -> None:
    torch.manual_seed(0)
    model = tower(layers=[1, 1], width=8).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    pixels = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(pixels).pow(2).sum().backward()
        gradients.append(model.conv1.weight.grad.clone())  # type: ignore[union-attr]
    assert torch.allclose(gradients[0], gradients[1])


def test_impossible_shapes() -> None:
    with pytest.raises(ConfigError, match=r"image\.options\.block"):
        tower(block="wide")
    with pytest.raises(ConfigError, match="one to four stages"):
        tower(layers=[1, 1, 1, 1, 1])
    with pytest.raises(ConfigError, match=r"image\.options\.depth"):
        tower(depth=50)
    with pytest.raises(InputError, match="expects"):
        tower(layers=[1], width=8)(torch.zeros(1, 3, 32, 32))
