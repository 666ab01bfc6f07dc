"""OpenAI's layout: shapes tell the configuration, and what they cannot tell is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chiasm.checkpoints.openai import config_from_state_dict, is_openai_layout, tidy
from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.errors import CheckpointError

Make = Callable[..., dict[str, Tensor]]


def test_vit_configuration(openai_vit: Make) -> None:
    config = EncoderConfig.from_dict(config_from_state_dict(openai_vit(), activation="quick_gelu"))
    assert (config.image.kind, config.image.image_size, config.image.patch_size) == ("vit", 24, 8)
    assert (config.image.width, config.image.layers, config.image.heads) == (64, 2, 1)
    assert (config.text.width, config.text.layers, config.text.heads) == (128, 3, 2)
    assert (config.text.context_length, config.projection.dim) == (77, 16)
    assert config.image.activation == config.text.activation == "quick_gelu"
    assert config.preprocess.size == 24
    gelu = config_from_state_dict(openai_vit(), activation="gelu")
    assert gelu["image"]["activation"] == gelu["text"]["activation"] == "gelu"


@pytest.mark.parametrize(("stages", "size"), [((1, 1, 1, 1), 64), ((2, 1), 32)])
def test_every_native_model_describes_itself(stages: tuple[int, ...], size: int) -> None:
    """The configuration read off a built model's state dict builds the same model."""
    values = {
        "image": {"kind": "resnet", "image_size": size, "width": 16, "layers": list(stages)},
        "text": {"width": 64, "layers": 1},
        "preprocess": {"size": size},
        "logit_bias_init": -10.0,
    }
    model = build_encoder_model(EncoderConfig.from_dict(values), device="meta")
    tensors = {k: v if v.ndim else torch.tensor(-10.0) for k, v in model.state_dict().items()}
    found = EncoderConfig.from_dict(config_from_state_dict(tensors, activation="quick_gelu"))
    assert found.image.layers == stages
    assert found.logit_bias_init == -10
    again = build_encoder_model(found, device="meta").state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in tensors.items()}


def test_tidy_drops_only_what_is_listed(openai_vit: Make) -> None:
    plain = openai_vit()
    extras = {"input_resolution": torch.tensor(24), "context_length": torch.tensor(77), "vocab_size": torch.tensor(1)}
    masks = {"transformer.resblocks.0.attn_mask": torch.zeros(77, 77), "attn_mask": torch.zeros(77, 77)}
    found = tidy(plain | extras | masks | {"logit_scale": torch.tensor([4.0]), "surprise": torch.zeros(1)})
    assert set(found) == {*plain, "surprise"}
    assert found["logit_scale"].shape == ()


def test_custom_text_layout_of_open_clip(openai_vit: Make) -> None:
    plain = openai_vit()
    custom = {k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in plain.items()}
    assert is_openai_layout(custom)
    assert set(tidy(custom)) == set(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_projection": None}, "lack `text_projection`"),
        ({"ln_final.weight": None}, None),  # left to the strict load
        ({"token_embedding.weight": torch.zeros(1000, 128)}, "49408"),
        ({"visual.positional_embedding": torch.zeros(9, 64)}, "not square"),
        ({"visual.positional_embedding": torch.zeros(1, 64)}, "not square"),
        ({"visual.conv1.weight": torch.zeros(64, 3, 8, 4)}, "not square"),
        ({"visual.conv1.weight": torch.zeros(48, 3, 8, 8)}, "no multiple of 64"),
        ({"visual.conv1.weight": torch.zeros(0, 3, 8, 8)}, "expected 4 dimensions"),
        ({"positional_embedding": torch.zeros(77)}, "expected 2 dimensions"),
        ({"transformer.resblocks.9.ln_1.weight": torch.zeros(128)}, "have gaps"),
    ],
)  # fmt: skip
def test_impossible_weights(openai_vit: Make, change: dict[str, Tensor | None], message: str | None) -> None:
    tensors = {k: v for k, v in (openai_vit() | change).items() if v is not None}
    if message is None:
        config_from_state_dict(tensors, activation="gelu")
        return
    with pytest.raises(CheckpointError, match=message):
        config_from_state_dict(tensors, activation="gelu")
