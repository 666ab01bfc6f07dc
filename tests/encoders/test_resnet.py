from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.errors import InputError

Make = Callable[..., Any]
RESNET: dict[str, Any] = {"kind": "resnet"}


def pixels(n: int = 3, size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize(
    ("shape", "side", "channels"),
    [
        ({}, 2, 512),
        ({"layers": (1, 1, 1, 1), "width": 24, "image_size": 96, "heads": None}, 3, 768),
        ({"layers": (1, 1, 2)}, 4, 256),
        ({"layers": (2,)}, 16, 64),
    ],
)
def test_feature_map_and_embedding_have_the_stated_shape(
    tiny: Make, shape: dict[str, Any], side: int, channels: int
) -> None:
    tower = tiny(image={**RESNET, **shape}).visual
    x = pixels(2, shape.get("image_size", 64))
    features = tower.forward_features(x)
    assert features.shape == (2, channels, side, side)
    assert torch.equal(tower.pool(features), tower(x))
    assert tower(x).shape == (2, 20)
    assert tower.patch_features(x).shape == (2, side, side, 20)


def test_attention_pool_is_plain_attention_of_the_mean(tiny: Make) -> None:
    """The pool is what PyTorch's own attention gives, in OpenAI's call."""
    pool = tiny(image=RESNET).visual.attnpool.double()
    features = torch.randn(3, 512, 2, 2, dtype=torch.float64)
    x = features.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + pool.positional_embedding[:, None]
    expected, _ = torch.nn.functional.multi_head_attention_forward(
        query=x[:1], key=x, value=x, embed_dim_to_check=512, num_heads=4, in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), bias_k=None, bias_v=None,
        add_zero_attn=False, dropout_p=0.0, out_proj_weight=pool.c_proj.weight, out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True, training=False, need_weights=False, q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    assert worst(pool(features), expected[0]) < 1e-12


def test_patch_features_average_to_the_embedding_under_mean_pooling(tiny: Make) -> None:
    tower = tiny(image={**RESNET, "pool": "mean"}).visual
    assert worst(tower.patch_features(pixels()).mean((1, 2)), tower(pixels())) < 1e-5


def test_patch_features_are_the_value_path(tiny: Make) -> None:
    """With one position that is also its mean, no positions and one key, the pool returns the value path itself."""
    pool = tiny(image=RESNET).visual.attnpool
    torch.nn.init.zeros_(pool.positional_embedding)
    features = torch.randn(3, 512, 1, 1).expand(3, 512, 2, 2)
    assert worst(pool.values(features)[:, 1, 0], pool(features)) < 1e-5


def test_grad_cam_can_reach_the_feature_map(tiny: Make) -> None:
    tower = tiny(image=RESNET).visual
    features = tower.forward_features(pixels(1))
    gradient = torch.autograd.grad(tower.pool(features).sum(), features)[0]
    assert gradient.shape == features.shape
    assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize("pool", ["attention", "mean"])
def test_an_image_does_not_depend_on_its_batch_in_eval_mode(tiny: Make, pool: str) -> None:
    tower = tiny(image={**RESNET, "pool": pool}).visual
    x = pixels(4)
    alone = torch.cat([tower(x[i : i + 1]) for i in range(4)])
    assert worst(alone, tower(x)) < 1e-4


@pytest.mark.parametrize("pool", ["attention", "mean"])
def test_gradient_reaches_every_parameter(tiny: Make, pool: str) -> None:
    tower = tiny(image={**RESNET, "pool": pool}).visual.train()
    tower(pixels()).pow(3).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_gradcheck_in_double_precision(tiny: Make) -> None:
    shape = {**RESNET, "image_size": 8, "width": 4, "layers": (1, 1), "heads": 2}
    tower = tiny(image=shape, dim=3).visual.double()
    x = pixels(1, 8, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(tower, (x,))


def test_blocks_start_as_identities_of_their_shortcut(make_config: Make) -> None:
    from chiasm.encoders.build import build_encoder_model

    tower: Any = build_encoder_model(make_config(image=RESNET), seed=0).visual
    block = tower.layer2[1]
    x = torch.randn(2, 128, 4, 4).relu()
    assert torch.equal(block(x), x)


def test_checkpointing_is_refused_because_of_batch_statistics(tiny: Make) -> None:
    tower = tiny(image=RESNET).visual
    tower.set_grad_checkpointing(False)
    with pytest.raises(InputError, match="counted twice"):
        tower.set_grad_checkpointing()


def test_wrong_shapes_are_refused(tiny: Make) -> None:
    with pytest.raises(InputError, match=r"expects \(batch, 3, 64, 64\)"):
        tiny(image=RESNET).visual(torch.zeros(2, 3, 32, 32))


def test_positions_start_as_configured() -> None:
    from dataclasses import replace

    import pytest

    from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
    from chiasm.encoders.build import build_encoder_model
    from chiasm.errors import ConfigError
    from chiasm.types import Preprocess

    plain = EncoderConfig(
        image=ImageTowerConfig(kind="resnet", image_size=64, width=16, layers=(1, 1, 1), heads=4),
        text=TextTowerConfig(width=32, layers=1, heads=2),
        projection=ProjectionConfig(dim=16),
        preprocess=Preprocess(size=64),
    )
    strong = replace(plain, image=replace(plain.image, position_std=1.0))
    states = [build_encoder_model(c, seed=0).state_dict() for c in (plain, strong)]
    name = "visual.attnpool.positional_embedding"
    assert 0.9 < float(states[1][name].std()) < 1.1
    assert float(states[0][name].std()) == pytest.approx(256**-0.5, rel=0.1)
    with pytest.raises(ConfigError, match=r"image\.position_std"):
        ImageTowerConfig(kind="vit", position_std=1.0)
