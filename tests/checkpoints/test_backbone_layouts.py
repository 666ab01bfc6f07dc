"""Key layouts of Swin, ConvNeXt, ResNet and transformers' ViT: every published dialect becomes one set of names.

Here names alone, without the peers; that the numbers agree, too, tests/parity shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chiasm.checkpoints import convnext, huggingface_vit, own_backbone, resnet, swin
from chiasm.checkpoints.layouts import LAYOUTS, find_layout
from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.encoders.classic_resnet import ClassicResNet
from chiasm.errors import CheckpointError

State = dict[str, Tensor]


def filled(model: nn.Module) -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        k: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }


def same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def substituted(state: State, *rules: tuple[str, str | Callable[[Any], str]]) -> State:
    result = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        result[new] = tensor
    return result


# Swin


@pytest.fixture(scope="module")
def swin_state() -> State:
    from transformers import SwinConfig, SwinModel

    return filled(SwinModel(SwinConfig(embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4, image_size=32)))


def timm_swin(state: State) -> State:
    plain = substituted(
        state,
        (r"^encoder\.layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample"),
        (r"^encoder\.", ""), (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^embeddings\.norm", "patch_embed.norm"), (r"^layernorm\.", "norm."),
        (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
        (r"attention\.relative_position_bias\.", "attn."), (r"attention\.o_proj", "attn.proj"),
    )  # fmt: skip
    result = {k: v for k, v in plain.items() if "attention." not in k}
    for name in [k for k in plain if "attention.q_proj" in k]:
        three = [plain[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
        result[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(three)
    return result


def test_swin_dialects(swin_state: State) -> None:
    timm = timm_swin(swin_state)
    microsoft = substituted(timm, (r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample"))
    microsoft |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(2), "head.weight": torch.zeros(2)}
    torchvision = substituted(
        timm,
        (r"^layers\.(\d+)\.downsample", lambda m: f"features.{2 * int(m[1])}"),
        (r"^layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}"),
        (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.3"),
        (r"^patch_embed\.proj", "features.0.0"), (r"^patch_embed\.norm", "features.0.2"),
    )  # fmt: skip
    old = substituted(
        swin_state,
        (r"attention\.(q|k|v)_proj", lambda m: f"attention.self.{ {'q': 'query', 'k': 'key', 'v': 'value'}[m[1]]}"),
        (r"attention\.o_proj", "attention.output.dense"), (r"attention\.relative_position_bias\.", "attention.self."),
        (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"), (r"^", "swin."),
    )  # fmt: skip
    for dialect in (timm, microsoft, torchvision, old, swin_state):
        assert swin.is_swin(dialect)
        assert find_layout(dialect) is LAYOUTS["swin"]
        same(swin.to_transformers(dialect), swin_state)
    wrapped = {f"module.{k}": v for k, v in timm.items()}
    same(swin.to_transformers(wrapped), swin_state)
    assert "surprise" in swin.to_transformers(timm | {"surprise": torch.zeros(1)})
    converted = LAYOUTS["swin"].convert(timm, {})
    assert all(k.startswith("visual.trunk.model.") for k in converted)


# ConvNeXt


def test_convnext_dialects() -> None:
    from transformers import ConvNextConfig, ConvNextModel

    state = filled(ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)))
    original = substituted(
        state,
        (r"^embeddings\.patch_embeddings", "downsample_layers.0.0"), (r"^embeddings\.layernorm", "downsample_layers.0.1"),
        (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
        (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1."), (r"layer_scale_parameter", "gamma"),
        (r"layernorm\.", "norm."),
    )  # fmt: skip
    timm = substituted(
        original,
        (r"^downsample_layers\.0\.", "stem."), (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."), (r"dwconv", "conv_dw"), (r"pwconv", "mlp.fc"),
        (r"^norm\.", "head.norm."),
    )  # fmt: skip
    torchvision = substituted(
        original,
        (r"^downsample_layers\.0\.", "features.0."),
        (r"^downsample_layers\.(\d+)\.", lambda m: f"features.{2 * int(m[1])}."),
        (r"^stages\.(\d+)\.", lambda m: f"features.{2 * int(m[1]) + 1}."),
        (r"dwconv", "block.0"), (r"(\d)\.norm\.", r"\1.block.2."), (r"pwconv1", "block.3"), (r"pwconv2", "block.5"),
        (r"^norm\.", "classifier.0."), (r"gamma", "layer_scale"),
    )  # fmt: skip
    torchvision = {k: v[:, None, None] if k.endswith("layer_scale") else v for k, v in torchvision.items()}
    convolutions = {k: v[..., None, None] if "mlp.fc" in k and v.ndim == 2 else v for k, v in timm.items()}
    heads = {"head.fc.weight": torch.zeros(1), "classifier.2.weight": torch.zeros(1), "head.bias": torch.zeros(1)}
    for dialect in (original, timm, torchvision, convolutions, state, {f"convnext.{k}": v for k, v in state.items()}):
        assert convnext.is_convnext(dialect)
        assert find_layout(dialect) is LAYOUTS["convnext"]
        same(convnext.to_transformers(dialect | heads), state)
    assert "surprise" in convnext.to_transformers(timm | {"surprise": torch.zeros(1)})
    assert not convnext.is_convnext({"stem.0.weight": torch.zeros(1)})


# ResNet


@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q.", "backbone.", "model.resnet."])
def test_resnet_prefixes_and_heads(prefix: str) -> None:
    state = filled(ClassicResNet((1, 1, 1, 1), width=8))
    file = {f"{prefix}{k}": v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    file |= {f"{prefix}fc.weight": torch.zeros(1), f"{prefix}fc.0.bias": torch.zeros(1)}
    assert find_layout(file) is LAYOUTS["torchvision_resnet"]
    same(resnet.to_trunk(file), state)
    config = own_backbone.infer_resnet(file, CATALOG.get("histo-resnet").config.to_dict())
    assert config["image"]["options"] == {"layers": [1, 1, 1, 1], "width": 8, "block": "bottleneck"}
    assert config["projection"]["dim"] == 256


def test_a_second_network_in_the_file_is_not_dropped() -> None:
    state = filled(ClassicResNet((1, 1), width=8, block="basic"))
    file = {f"module.encoder_q.{k}": v for k, v in state.items()}
    file |= {f"module.encoder_k.{k}": v for k, v in state.items()}
    assert any(k.startswith("module.encoder_k.") for k in resnet.to_trunk(file))


# transformers' ViT, and a user's own


def vit_state() -> State:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, image_size=32, patch_size=8
    )
    return filled(ViTModel(config))


def old_names(state: State) -> State:
    return substituted(
        state,
        (r"^layers\.", "encoder.layer."),
        (r"attention\.(q|k|v)_proj", lambda m: f"attention.attention.{ {'q': 'query', 'k': 'key', 'v': 'value'}[m[1]]}"),
        (r"attention\.o_proj", "attention.output.dense"), (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"), (r"^", "vit."),
    )  # fmt: skip


def test_vit_of_transformers_and_its_inferred_shape() -> None:
    new = vit_state()
    old = old_names(new) | {"classifier.weight": torch.zeros(2, 64)}
    declared = CATALOG.get("histo-vit").config.to_dict()
    converted = []
    for state in (new, old):
        assert find_layout(state) is LAYOUTS["huggingface_vit"]
        config = EncoderConfig.from_dict(own_backbone.infer_vit(state, declared))
        image = config.image
        assert (image.width, image.layers, image.heads, image.patch_size, image.image_size) == (64, 2, 1, 8, 32)
        assert (image.mlp_ratio, image.ln_eps, image.registers, image.layer_scale) == (1.5, 1e-12, 0, False)
        model = build_encoder_model(config, device="meta")
        converted.append(LAYOUTS["own_vit"].convert(state, config.to_dict()))
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in converted[-1].items()}
    same(converted[0], converted[1])
    q, v = new["layers.1.attention.q_proj.weight"], new["layers.1.attention.v_proj.weight"]
    joined = converted[0]["visual.transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(joined[:64], q)
    assert torch.equal(joined[128:], v)
    assert not any("pooler" in k for k in converted[0])


def test_what_cannot_be_a_vit_is_refused() -> None:
    state, declared = vit_state(), CATALOG.get("histo-vit").config.to_dict()
    image = {"image_size": 32, "patch_size": 8}
    with pytest.raises(CheckpointError, match="cannot be joined"):
        huggingface_vit.to_native({k: v for k, v in state.items() if k != "layers.0.attention.k_proj.bias"}, image)
    without = {k: v for k, v in state.items() if not k.startswith("layers.")}
    with pytest.raises(CheckpointError, match="blocks of the ViT are missing"):
        own_backbone.infer_vit(without, declared)
    narrow = {k: v[:48] if k == "embeddings.patch_embeddings.projection.weight" else v for k, v in state.items()}
    with pytest.raises(CheckpointError, match="no multiple of 64"):
        own_backbone.infer_vit(narrow, declared)
    flat = state | {"embeddings.patch_embeddings.projection.weight": torch.zeros(64, 3)}
    with pytest.raises(CheckpointError, match="should have 4 dimensions"):
        own_backbone.infer_vit(flat, declared)
