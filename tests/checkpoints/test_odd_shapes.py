"""Tensors of any shape under known names end in an error about the file, never in one of torch's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.errors import CheckpointError
from chiasm.load import load

VIT = (
    "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "reg_token", "norm.weight",
    "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "blocks.0.ls1.gamma",
)  # fmt: skip
SWIN = ("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight", "layers.1.downsample.norm.weight", "norm.bias")
CONVNEXT = (
    "stem.0.weight",
    "stages.0.blocks.0.conv_dw.weight",
    "stages.0.blocks.0.gamma",
    "stages.0.blocks.0.mlp.fc1.weight",
)
RESNET = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.0.bn2.weight", "layer1.0.bn2.running_var")
BERT = (
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.position_embeddings.weight",
    "bert.encoder.ln.weight",
)
T5 = ("shared.weight", "encoder.embed_tokens.weight", "encoder.block.0.layer.0.SelfAttention.q.weight")
HUGGING_FACE = (
    "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings", "embeddings.cls_token",
    "layers.0.attention.q_proj.weight", "layers.0.attention.k_proj.weight", "layers.0.attention.v_proj.weight",
)  # fmt: skip
CASES: dict[str, tuple[str, ...]] = {
    "histo-vit": VIT, "kaiko-vits16": VIT, "dinov2-vits14": VIT, "phikon": HUGGING_FACE, "swin-tiny": SWIN,
    "convnext-tiny": CONVNEXT, "histo-resnet": RESNET, "biomegatron": BERT, "t5-base": T5,
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_any_shapes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:  # building a whole foreign tower is not what is tried here
        raise CheckpointError("it came as far as building")

    monkeypatch.setattr("chiasm.load.filled_model", never)
    rng = random.Random(7)
    for number in range(40):
        state: dict[str, Tensor] = {
            key: torch.zeros([rng.choice([0, 1, 2, 3, 64]) for _ in range(rng.randint(0, 4))])
            for key in CASES[name]
            if rng.random() < 0.97
        }
        path = tmp_path / f"{number}.pth"
        torch.save(state, path)
        with pytest.raises(CheckpointError):
            load(path, family=name)
