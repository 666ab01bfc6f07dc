"""The model of the tower benchmarks: ViT-B/32 with random weights that make both attention and MLP matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from chiasm.encoders.base import Encoder
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.models.openai import ARCHITECTURES


def make_encoder(side: Literal["image", "text"]) -> Encoder:
    """Return one side of it; attention's input weights and the first MLP weights are 1.5 times torch's draw."""
    config = replace(ARCHITECTURES["ViT-B-32-quickgelu"], sides=side)
    model = build_encoder_model(config, seed=0).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("attn.in_proj_weight", "mlp.c_fc.weight")):
                weight.mul_(1.5)
    return Encoder(model, config, name="random-ViT-B-32")
