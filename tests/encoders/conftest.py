"""Small native encoders with random weights, for tests of the towers and of what stands on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.dual import DualEncoder
from chiasm.types import Preprocess

VIT: dict[str, Any] = {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "heads": 4}
RESNET: dict[str, Any] = {"kind": "resnet", "image_size": 64, "width": 16, "layers": (1, 2, 1, 1), "heads": 4}
TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 100, "width": 24, "layers": 3, "heads": 3}


def tiny_config(
    image: dict[str, Any] | None = None, text: dict[str, Any] | None = None, dim: int = 20, **projection: Any
) -> EncoderConfig:
    """A configuration of a few thousand parameters; ``image`` and ``text`` change single fields."""
    base = RESNET if image and image.get("kind") == "resnet" else VIT
    tower = ImageTowerConfig(**{**base, **(image or {})})
    words = TextTowerConfig(**{**TEXT, **(text or {})})
    return EncoderConfig(
        image=tower,
        text=words,
        projection=ProjectionConfig(dim=dim, **projection),
        tokenizer={"kind": "clip", "context_length": words.context_length},
        preprocess=Preprocess(size=tower.image_size),
    )


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter and batch statistic its own random value, the one-dimensional ones too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("logit_scale") or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            elif name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.2 * noise)


def texts(lengths: list[int], *, context: int = 16, vocab: int = 100, seed: int = 0, pad: int = 0) -> torch.Tensor:
    """Random ids whose texts end with the largest id and are padded behind it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), context), pad)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, vocab - 1, (length,), generator=generator)
        ids[row, length - 1] = vocab - 1
    return ids


@pytest.fixture
def tiny() -> Callable[..., DualEncoder]:
    """A function that builds a randomised tiny model in eval mode: ``tiny(image={...}, text={...})``."""

    def make(*args: Any, seed: int = 0, **kwargs: Any) -> DualEncoder:
        torch.set_num_threads(1)
        model = build_encoder_model(tiny_config(*args, **kwargs), seed=seed)
        randomise(model, seed)
        return model.eval()

    return make


@pytest.fixture
def make_config() -> Callable[..., EncoderConfig]:
    return tiny_config


@pytest.fixture
def make_texts() -> Callable[..., torch.Tensor]:
    return texts


@pytest.fixture
def scramble() -> Callable[..., None]:
    return randomise
