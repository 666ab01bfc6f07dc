from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, LoraConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.dual import ProjectedImageTower, ProjectedTextTower
from chiasm.errors import ConfigError
from chiasm.types import Preprocess

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("image", "text_width", "dim", "keys", "parameters"),
    [
        ({"patch_size": 32}, 512, 512, 302, 151_277_313),
        ({"patch_size": 16}, 512, 512, 302, 149_620_737),
        ({"width": 1024, "layers": 24, "patch_size": 14}, 768, 768, 446, 427_616_513),
        ({"width": 1024, "layers": 24, "patch_size": 14, "image_size": 336}, 768, 768, 446, 427_944_193),
        ({"kind": "resnet", "width": 64, "layers": (3, 4, 6, 3)}, 512, 1024, 489, 102_007_137),
        ({"kind": "resnet", "width": 64, "layers": (3, 4, 23, 3)}, 512, 512, 795, 119_688_033),
    ],
    ids=["ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "RN50", "RN101"],
)
def test_the_six_official_models_have_their_keys_and_sizes(
    image: dict[str, Any], text_width: int, dim: int, keys: int, parameters: int
) -> None:
    tower = ImageTowerConfig(**image)
    config = EncoderConfig(
        image=tower,
        text=TextTowerConfig(width=text_width),
        projection=ProjectionConfig(dim=dim),
        preprocess=Preprocess(size=tower.image_size),
    )
    model = build_encoder_model(config, device="meta")
    assert len(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())


def test_vit_b_32_has_the_published_names_and_shapes() -> None:
    shapes = {
        name: tuple(t.shape) for name, t in build_encoder_model(EncoderConfig(), device="meta").state_dict().items()
    }
    block = {
        "attn.in_proj_weight": (2304, 768), "attn.in_proj_bias": (2304,), "attn.out_proj.weight": (768, 768),
        "attn.out_proj.bias": (768,), "ln_1.weight": (768,), "ln_1.bias": (768,), "ln_2.weight": (768,),
        "ln_2.bias": (768,), "mlp.c_fc.weight": (3072, 768), "mlp.c_fc.bias": (3072,), "mlp.c_proj.weight": (768, 3072),
        "mlp.c_proj.bias": (768,),
    }  # fmt: skip
    expected = {
        "positional_embedding": (77, 512), "text_projection": (512, 512), "logit_scale": (),
        "visual.class_embedding": (768,), "visual.positional_embedding": (50, 768), "visual.proj": (768, 512),
        "visual.conv1.weight": (768, 3, 32, 32), "visual.ln_pre.weight": (768,), "visual.ln_pre.bias": (768,),
        "visual.ln_post.weight": (768,), "visual.ln_post.bias": (768,), "token_embedding.weight": (49408, 512),
        "ln_final.weight": (512,), "ln_final.bias": (512,),
        **{f"visual.transformer.resblocks.{i}.{k}": v for i in range(12) for k, v in block.items()},
        **{
            f"transformer.resblocks.{i}.{k}": tuple(n // 3 * 2 for n in v)
            for i in range(12) for k, v in block.items()
        },
    }  # fmt: skip
    assert shapes == expected


def test_rn50_has_the_published_names() -> None:
    config = EncoderConfig(
        image=ImageTowerConfig(kind="resnet", width=64, layers=(3, 4, 6, 3)), projection=ProjectionConfig(dim=1024)
    )
    names = build_encoder_model(config, device="meta").state_dict()
    for name, shape in {
        "visual.conv1.weight": (32, 3, 3, 3),
        "visual.bn3.running_var": (64,),
        "visual.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "visual.layer1.0.downsample.1.num_batches_tracked": (),
        "visual.layer4.2.conv3.weight": (2048, 512, 1, 1),
        "visual.attnpool.positional_embedding": (50, 2048),
        "visual.attnpool.c_proj.weight": (1024, 2048),
    }.items():
        assert tuple(names[name].shape) == shape


@pytest.mark.parametrize("image", [{}, {"pool": "attention"}, {"pool": "mean", "pre_norm": False}, {"kind": "resnet"}])
def test_weights_are_finite_and_depend_on_the_seed_alone(make_config: Make, image: dict[str, Any]) -> None:
    config = make_config(image=image)
    torch.manual_seed(0)
    first = build_encoder_model(config, seed=5).state_dict()
    torch.randn(17)
    second, other = build_encoder_model(config, seed=5).state_dict(), build_encoder_model(config, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim > 1)
    assert all(bool(t.isfinite().all()) for t in first.values())


def test_no_parameter_is_left_as_the_allocator_gave_it(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is drawn or set: memory filled with NaN before the draw shows none after it."""
    real = nn.Module.to_empty

    def poisoned(self: nn.Module, **kwargs: Any) -> nn.Module:
        real(self, **kwargs)
        with torch.no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
        return self

    monkeypatch.setattr(nn.Module, "to_empty", poisoned)
    for image in ({}, {"pool": "attention"}, {"kind": "resnet"}, {"kind": "resnet", "pool": "mean"}):
        for name, tensor in build_encoder_model(make_config(image=image), seed=0).state_dict().items():
            assert bool((tensor >= -6).all()), name


def test_building_does_not_disturb_the_global_generator(make_config: Make) -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    build_encoder_model(make_config(), seed=8)
    assert torch.equal(torch.randn(3), expected)


def test_without_a_seed_the_global_generator_decides(make_config: Make) -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build_encoder_model(make_config()).visual.proj.detach()  # type: ignore[union-attr, return-value]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_init_follows_openais_scheme() -> None:
    config = EncoderConfig(
        image=ImageTowerConfig(image_size=64, patch_size=16, width=256, layers=2),
        text=TextTowerConfig(vocab_size=2000, width=128, layers=4),
        projection=ProjectionConfig(dim=256),
        preprocess=Preprocess(size=64),
    )
    state = build_encoder_model(config, seed=0).state_dict()
    for name, std in {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": 128**-0.5,
        "transformer.resblocks.1.attn.in_proj_weight": 128**-0.5,
        "transformer.resblocks.1.attn.out_proj.weight": 128**-0.5 * 8**-0.5,
        "transformer.resblocks.1.mlp.c_fc.weight": 256**-0.5,
        "transformer.resblocks.1.mlp.c_proj.weight": 128**-0.5 * 8**-0.5,
        "visual.positional_embedding": 256**-0.5,
        "visual.proj": 256**-0.5,
        "visual.transformer.resblocks.0.attn.in_proj_weight": (2 / (4 * 256)) ** 0.5,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (3 * 256) ** -0.5,
        "visual.conv1.weight": (3 * 768) ** -0.5,
    }.items():
        assert float(state[name].std()) == pytest.approx(std, rel=0.05), name
    assert float(state["transformer.resblocks.0.attn.in_proj_bias"].abs().max()) == 0
    assert float(state["visual.ln_pre.weight"].min()) == 1


def test_mlp_projections_stand_behind_native_towers(make_config: Make, make_texts: Make) -> None:
    model = build_encoder_model(make_config(), seed=0)
    assert not isinstance(model.visual, ProjectedImageTower)
    config = dataclasses.replace(make_config(), projection=ProjectionConfig(dim=20, image="mlp", text="mlp"))
    model = build_encoder_model(config, seed=0)
    assert isinstance(model.visual, ProjectedImageTower)
    assert isinstance(model.text, ProjectedTextTower)
    assert model.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, 20)
    assert model.encode_text(make_texts([4, 9])).shape == (2, 20)
    assert model.patch_features(torch.randn(2, 3, 32, 32)).shape == (2, 4, 4, 20)
    model.set_grad_checkpointing()
    meta = build_encoder_model(config, device="meta")
    assert {k: v.shape for k, v in meta.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_no_projection_needs_towers_of_the_right_width(make_config: Make) -> None:
    base = make_config(text={"width": 32, "heads": 4})
    config = dataclasses.replace(base, projection=ProjectionConfig(dim=32, image="none", text="none"))
    model = build_encoder_model(config, seed=0)
    assert "visual.proj" not in model.state_dict()
    assert "text_projection" not in model.state_dict()
    assert model.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    wrong = dataclasses.replace(base, projection=ProjectionConfig(dim=40, image="none"))
    with pytest.raises(ConfigError, match="wants 40 dimensions, the tower gives 32"):
        build_encoder_model(wrong, seed=0)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_locked_native_tower_trains_its_projection_alone(make_config: Make, kind: str) -> None:
    model = build_encoder_model(make_config(image={"kind": kind, "freeze": True}, text={"freeze": True}), seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {"visual.proj"} if kind == "vit" else {"visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias"}
    assert trained == {*head, "text_projection", "logit_scale"}


def test_lora_on_native_towers_starts_as_the_tower_itself_and_trains(make_config: Make, make_texts: Make) -> None:
    lora = LoraConfig(rank=2, alpha=4.0, targets=("c_fc", "c_proj", "out_proj"))
    plain = build_encoder_model(make_config(), seed=3).eval()
    model = build_encoder_model(make_config(image={"lora": lora}, text={"lora": lora}), seed=3).eval()
    pixels, ids = torch.randn(2, 3, 32, 32), make_texts([4, 9])
    torch.testing.assert_close(model.encode_image(pixels), plain.encode_image(pixels))
    torch.testing.assert_close(model.encode_text(ids), plain.encode_text(ids))
    out = model.train()(pixels, ids)
    (out["image_features"] @ out["text_features"].T).trace().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {"visual.proj", "text_projection"} <= trained
    assert all("lora" in n for n in trained - {"visual.proj", "text_projection", "logit_scale"})
    assert any("lora" in n and n.startswith("visual") for n in trained)
    assert any("lora" in n and n.startswith("transformer") for n in trained)


def test_foreign_towers_are_refused_on_the_meta_device(make_config: Make) -> None:
    config = dataclasses.replace(
        make_config(), image=ImageTowerConfig(kind="python", source="a:b", image_size=32, patch_size=8)
    )
    with pytest.raises(ConfigError, match="`meta` device"):
        build_encoder_model(config, device="meta")
