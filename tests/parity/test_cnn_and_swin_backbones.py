"""ResNet, ConvNeXt and Swin against torchvision, timm and transformers, in every key layout they are published in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import CheckpointError
from chiasm.load import load

pytestmark = pytest.mark.peer

TIGHT = 1e-5
#: Batch norms with random statistics amplify the order of additions.
WITH_BATCH_NORM = 1e-4
SIZE = 64
SWIN: dict[str, Any] = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": SIZE}
CONVNEXT: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_stages": 4}


def randomise(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or name.endswith("attn_mask"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif "bias_table" in name or name.endswith(("gamma", "layer_scale", "layer_scale_parameter")):
                tensor.copy_(noise)
            elif tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            elif name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.2 * noise)
    return model.eval()


def error(ours: Tensor, theirs: Tensor) -> float:
    scale = theirs.abs().clamp(min=float(theirs.pow(2).mean(1).sqrt().min()))
    return float(((ours - theirs).abs() / scale).max())


def pixels() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))


def shrunk(config: EncoderConfig, options: dict[str, Any], dim: int) -> EncoderConfig:
    stated = config.image.options.get("config")
    whole = {"config": {**stated, **options}} if stated else options
    return replace(
        config,
        image=replace(config.image, image_size=SIZE, options=whole),
        projection=replace(config.projection, dim=dim),
        preprocess=replace(config.preprocess, size=SIZE),
    )


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Encoder]:
    def read(name: str, state: Any, options: dict[str, Any], dim: int) -> Encoder:
        entry = CATALOG.get(name)
        monkeypatch.setitem(CATALOG._items, name, replace(entry, config=shrunk(entry.config, options, dim)))
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
        torch.save(state, path)
        found = load(name, pretrained=path)
        monkeypatch.setitem(CATALOG._items, name, entry)
        return found

    return read


def features(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(pixels())
        return found


# ResNet


def torchvision_resnet(*layers: int, basic: bool = False) -> Any:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    return randomise(ResNet(BasicBlock if basic else Bottleneck, list(layers)))


def test_resnet_of_torchvision_and_timm(loaded: Callable[..., Encoder]) -> None:
    import timm

    theirs = torchvision_resnet(1, 2, 1, 1)
    state = theirs.state_dict()
    theirs.fc = nn.Identity()
    shape = {"layers": [1, 2, 1, 1]}
    encoder = loaded("resnet50", state, shape, 2048)
    assert error(encoder.encode_image(pixels()), features(theirs)) <= WITH_BATCH_NORM
    other = timm.create_model("resnet50", layers=(1, 2, 1, 1), num_classes=0)
    other.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    assert error(encoder.encode_image(pixels()), features(other.eval())) <= WITH_BATCH_NORM
    bare = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert torch.equal(loaded("resnet50", bare, shape, 2048).encode_image(pixels()), encoder.encode_image(pixels()))


def test_resnet_with_other_statistics_or_a_stride_elsewhere_misses(loaded: Callable[..., Encoder]) -> None:
    theirs = torchvision_resnet(1, 2, 1, 1)
    state = theirs.state_dict()
    theirs.fc = nn.Identity()
    fresh = {k: torch.ones_like(v) if k.endswith("running_var") else v for k, v in state.items()}
    encoder = loaded("resnet50", fresh, {"layers": [1, 2, 1, 1]}, 2048)
    assert error(encoder.encode_image(pixels()), features(theirs)) > 10 * WITH_BATCH_NORM
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):  # the first version of ResNet-50
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    encoder = loaded("resnet50", state, {"layers": [1, 2, 1, 1]}, 2048)
    assert error(encoder.encode_image(pixels()), features(theirs)) > 10 * WITH_BATCH_NORM


def test_lunit_and_a_users_own(loaded: Callable[..., Encoder], tmp_path: Path) -> None:
    """Lunit's file is a trunk without ``fc``; MoCo's has a prefix and a second network; a ResNet-18 tells its shape."""
    theirs = torchvision_resnet(1, 1, 1, 1)
    theirs.fc = nn.Identity()
    expected = features(theirs)
    encoder = loaded("lunit-resnet50", dict(theirs.state_dict()), {"layers": [1, 1, 1, 1]}, 2048)
    assert error(encoder.encode_image(pixels()), expected) <= WITH_BATCH_NORM
    small = torchvision_resnet(1, 2, 1, 1, basic=True)
    names = {f"module.encoder_q.{k}": v for k, v in small.state_dict().items()}
    torch.save({"state_dict": names, "epoch": 3}, tmp_path / "own.pth.tar")
    own = load(tmp_path / "own.pth.tar", family="histo-resnet")
    small.fc = nn.Identity()
    big = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        assert error(own.encode_image(big), small(big)) <= WITH_BATCH_NORM
    assert own.dim == 512
    names |= {f"module.encoder_k.{k}": v for k, v in small.state_dict().items()}
    torch.save({"state_dict": names}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"encoder_k"):
        load(tmp_path / "two.pth", family="histo-resnet")


# ConvNeXt


def convnexts() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Layout -> (a model that computes the expected features, its file)."""
    import timm
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from transformers import ConvNextConfig, ConvNextForImageClassification

    dims = CONVNEXT["hidden_sizes"]
    blocks = [CNBlockConfig(a, b, n) for a, b, n in zip(dims, [*dims[1:], None], CONVNEXT["depths"], strict=True)]
    vision = randomise(ConvNeXt(blocks, num_classes=3))
    torchvision_file = dict(vision.state_dict())
    vision.classifier = nn.Sequential(vision.classifier[0], nn.Flatten(1))
    image = randomise(timm.create_model("convnext_tiny", depths=(1, 2, 1, 1), dims=tuple(dims), num_classes=3))
    timm_file = dict(image.state_dict())
    image.reset_classifier(0)
    whole = randomise(ConvNextForImageClassification(ConvNextConfig(**CONVNEXT, layer_norm_eps=1e-6)))
    return {
        "torchvision": (vision, torchvision_file),
        "timm": (image, timm_file),
        "original": (image, {"model": original_convnext(timm_file)}),
        "transformers": (lambda x: whole.convnext(x).pooler_output, dict(whole.state_dict())),
    }  # fmt: skip


def original_convnext(names: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names written as facebookresearch/ConvNeXt writes them."""
    result = {}
    for name, tensor in names.items():
        new = re.sub(r"^stem\.", "downsample_layers.0.", name)
        new = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", new)
        new = new.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        new = new.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        result[new] = tensor
    assert "downsample_layers.1.0.weight" in result
    assert "stages.1.1.pwconv2.bias" in result
    return result


@pytest.mark.parametrize("layout", ["torchvision", "timm", "original", "transformers"])
def test_convnext(layout: str, loaded: Callable[..., Encoder]) -> None:
    theirs, state = convnexts()[layout]
    encoder = loaded("convnext-tiny", state, CONVNEXT, 32)
    assert error(encoder.encode_image(pixels()), features(theirs)) <= TIGHT
    plain = state.get("model", state)
    without = {k: torch.ones_like(v) if k.endswith(("gamma", "layer_scale", "layer_scale_parameter")) else v
               for k, v in plain.items()}  # fmt: skip
    assert error(loaded("convnext-tiny", without, CONVNEXT, 32).encode_image(pixels()), features(theirs)) > 10 * TIGHT
    with pytest.raises(CheckpointError, match="besides"):
        loaded("convnext-tiny", plain | {"stages.0.odd": torch.zeros(1)}, CONVNEXT, 32)


# Swin


def swins() -> dict[str, tuple[Any, dict[str, Any]]]:
    import timm
    from torchvision.models.swin_transformer import SwinTransformer
    from transformers import SwinConfig, SwinModel

    vision = randomise(SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=3))
    torchvision_file = dict(vision.state_dict())
    vision.head = nn.Identity()
    image = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=32, depths=(2, 2), num_heads=(2, 4), img_size=SIZE, window_size=4,
        num_classes=3,
    )  # fmt: skip
    randomise(image)
    timm_file = dict(image.state_dict())
    image.reset_classifier(0)
    model = randomise(SwinModel(SwinConfig(**SWIN)))
    new = dict(model.state_dict())
    return {
        "torchvision": (vision, torchvision_file),
        "timm": (image, timm_file),
        "microsoft": (image, {"model": microsoft_swin(timm_file)}),
        "transformers 5": (lambda x: model(x).pooler_output, new),
        "transformers 4": (lambda x: model(x).pooler_output, old_swin(new)),
    }  # fmt: skip


def microsoft_swin(names: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in names.items():
        new = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        result[new.replace("head.fc.", "head.")] = tensor
    result["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    result["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    assert "layers.0.downsample.reduction.weight" in result
    return result


def old_swin(names: dict[str, Tensor]) -> dict[str, Tensor]:
    renames = (
        ("attention.q_proj", "attention.self.query"), ("attention.k_proj", "attention.self.key"),
        ("attention.v_proj", "attention.self.value"), ("attention.o_proj", "attention.output.dense"),
        ("attention.relative_position_bias.relative", "attention.self.relative"), ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )  # fmt: skip
    result = {}
    for name, tensor in names.items():
        new = f"swin.{name}"
        for a, b in renames:
            new = new.replace(a, b)
        result[new] = tensor
    result["swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.zeros(16, 16).long()
    result["classifier.weight"] = torch.zeros(3, 64)
    return result


@pytest.mark.parametrize("layout", ["torchvision", "timm", "microsoft", "transformers 5", "transformers 4"])
def test_swin(layout: str, loaded: Callable[..., Encoder]) -> None:
    theirs, state = swins()[layout]
    encoder = loaded("swin-tiny", state, SWIN, 64)
    expected = features(theirs)
    assert error(encoder.encode_image(pixels()), expected) <= TIGHT
    plain = state.get("model", state)
    flat = {k: torch.zeros_like(v) if "bias_table" in k else v for k, v in plain.items()}
    assert error(loaded("swin-tiny", flat, SWIN, 64).encode_image(pixels()), expected) > 10 * TIGHT
    if layout in ("timm", "microsoft"):
        mixed = {re.sub(r"^layers\.[01]\.downsample", "layers.5.downsample", k): v for k, v in plain.items()}
        with pytest.raises(CheckpointError, match="lack"):
            loaded("swin-tiny", mixed, SWIN, 64)
    fused = {k: torch.cat([v.chunk(3)[i] for i in (1, 2, 0)]) if ".qkv." in k else v for k, v in plain.items()}
    if any(".qkv." in k for k in plain):
        assert error(loaded("swin-tiny", fused, SWIN, 64).encode_image(pixels()), expected) > 10 * TIGHT


# Pixels


@pytest.mark.parametrize("name", ["resnet50", "convnext-tiny", "swin-tiny"])
@pytest.mark.parametrize("size", [(317, 411), (231, 224), (640, 257)])
def test_pixels(name: str, size: tuple[int, int]) -> None:
    from torchvision import models

    from chiasm.data.transforms import image_transform

    weights = {
        "resnet50": models.ResNet50_Weights.IMAGENET1K_V2,
        "convnext-tiny": models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1,
        "swin-tiny": models.Swin_T_Weights.IMAGENET1K_V1,
    }[name]
    entry = CATALOG.get(name)
    assert entry.weights is not None
    assert entry.weights.url == weights.url
    coarse = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    expected = weights.transforms()(image)
    found = image_transform(entry.config.preprocess)(image)
    assert float((found - expected).abs().max()) <= 1e-6
    for other in ("uni", "kaiko-vits8"):
        wrong = image_transform(CATALOG.get(other).config.preprocess)(image)
        assert float((wrong - expected).abs().mean()) > 1e-2
