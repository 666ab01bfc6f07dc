"""Constructed towers in which the right map is known, and small random encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.dual import DualEncoder
from chiasm.encoders.face import Encoder
from chiasm.types import Preprocess

settings.register_profile("untimed", deadline=None)  # first calls import and compile
settings.load_profile("untimed")

VIT: dict[str, Any] = {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 4}
RESNET: dict[str, Any] = {"kind": "resnet", "image_size": 64, "width": 8, "layers": (1, 1, 1), "heads": 4}
#: Pixels stay what they are, so that tests can paint in them.
PLAIN = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def config_of(**image: Any) -> EncoderConfig:
    tower = ImageTowerConfig(**{**(RESNET if image.get("kind") == "resnet" else VIT), **image})
    return EncoderConfig(
        image=tower,
        text=TextTowerConfig(context_length=16, vocab_size=49408, width=16, layers=1, heads=2),
        projection=ProjectionConfig(dim=16),
        tokenizer={"kind": "clip", "context_length": 16},
        preprocess=Preprocess(size=tower.image_size, mean=PLAIN.mean, std=PLAIN.std),
    )


def random_model(**image: Any) -> DualEncoder:
    model = build_encoder_model(config_of(**image), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and not name.endswith("logit_scale"):
                noise = torch.randn(tensor.shape, generator=generator)
                if name.endswith("running_var"):
                    tensor.copy_(0.5 + noise.abs())
                elif tensor.ndim > 1:
                    tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
                else:
                    tensor.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


def seeing_model(pool: str = "cls") -> DualEncoder:
    """A ViT that looks for red: the class token attends to red patches, which write one direction into the embedding.

    Channel 0 of a token is its redness, channel 1 marks the class token; the only block copies redness to channel 2.
    """
    model = build_encoder_model(config_of(layers=1, heads=1, pool=pool, pre_norm=False, width=32), seed=0)
    tower: Any = model.visual
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.zero_()
        tower.conv1.weight[0, 0] = 1 / 64
        tower.conv1.weight[3, 1] = 1 / 64
        tower.class_embedding[1] = 1
        tower.positional_embedding[1:, 4] = 1
        block = tower.transformer.resblocks[0]
        block.ln_1.weight.fill_(1)
        tower.ln_post.weight.fill_(1)
        block.attn.in_proj_weight[0, 1] = 6  # queries: the class token asks
        block.attn.in_proj_weight[32, 0] = 6  # keys: red answers
        if pool == "mean":
            block.attn.in_proj_weight[0, 4] = 6
        block.attn.in_proj_weight[64 + 2, 0] = 1  # values: redness
        block.attn.out_proj.weight.copy_(torch.eye(32))
        tower.proj[2, 5] = 1
        tower.proj[0, 5] = 1 if pool == "mean" else 0
        tower.proj[1, 6] = 1
        tower.proj[4, 7] = 1
    return model.eval()


def say(model: DualEncoder, direction: Tensor) -> None:
    """Make the text tower answer every text with one direction."""
    part: Any = model
    with torch.no_grad():
        part.ln_final.weight.zero_()
        part.ln_final.bias.copy_(direction)
        part.text_projection.copy_(torch.eye(16))


class Bright(nn.Module):
    """A tower without patches: two numbers, the light in the left and in the right half."""

    output_dim = 16

    def forward(self, pixels: Tensor) -> Tensor:
        left, right = pixels.mean((1, 2)).chunk(2, dim=-1)
        out = torch.zeros(len(pixels), 16)
        out[:, 0], out[:, 1], out[:, 2] = left.mean(-1), right.mean(-1), 0.2
        return out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def random_tower() -> Callable[..., DualEncoder]:
    return random_model


@pytest.fixture(scope="session")
def seeing() -> Callable[..., DualEncoder]:
    return seeing_model


@pytest.fixture(scope="session")
def bright() -> type[nn.Module]:
    return Bright


@pytest.fixture(scope="session")
def answer_with() -> Callable[..., None]:
    return say


@pytest.fixture(scope="session")
def as_encoder() -> Callable[[DualEncoder], Encoder]:
    return lambda model: Encoder(model, model.config, name="made")
