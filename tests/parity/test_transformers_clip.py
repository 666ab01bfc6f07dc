"""The native towers against ``transformers.CLIPModel`` with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.dual import DualEncoder
from chiasm.types import Preprocess

LIMIT = 1e-5
EOT = 119


def peer(activation: str, dim: int = 40) -> Any:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={
            "vocab_size": 120, "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3,
            "num_attention_heads": 3, "max_position_embeddings": 20, "hidden_act": activation, "eos_token_id": EOT,
            "bos_token_id": 118, "pad_token_id": EOT,
        },
        vision_config={
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 48, "patch_size": 16, "hidden_act": activation,
        },
        projection_dim=dim,
    )  # fmt: skip
    torch.manual_seed(3)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "logit_scale":
                noise = torch.randn_like(p)
                p.copy_(noise * (1.5 / p[0].numel()) ** 0.5 if p.ndim > 1 else noise * 0.2 + name.endswith("weight"))
    return model


def to_native(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' keys to OpenAI's, joining q, k and v."""
    tops = {
        "logit_scale": "logit_scale",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    }
    norms = {
        "text_model.final_layer_norm": "ln_final",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }
    inner = {
        "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    result = {
        "visual.proj": theirs["visual_projection.weight"].T,
        "text_projection": theirs["text_projection.weight"].T,
    }
    for name, value in theirs.items():
        stem, _, kind = name.rpartition(".")
        if name in tops:
            result[tops[name]] = value
        elif stem in norms:
            result[f"{norms[stem]}.{kind}"] = value
        elif ".encoder.layers." in name:
            tower, _, rest = name.partition(".encoder.layers.")
            number, _, part = rest.partition(".")
            prefix = ("visual." if tower == "vision_model" else "") + f"transformer.resblocks.{number}."
            module = part.rpartition(".")[0]
            if module in inner:
                result[f"{prefix}{inner[module]}.{kind}"] = value
            elif module == "self_attn.q_proj":
                parts = [theirs[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                result[f"{prefix}attn.in_proj_{kind}"] = torch.cat(parts)
    return result


def native(theirs: Any, activation: Any, dim: int = 40, **image: Any) -> DualEncoder:
    config = EncoderConfig(
        image=ImageTowerConfig(
            image_size=48, patch_size=16, width=64, layers=3, heads=4, activation=activation, **image
        ),
        text=TextTowerConfig(context_length=20, vocab_size=120, width=48, layers=3, heads=3, activation=activation),
        projection=ProjectionConfig(dim=dim),
        tokenizer={"kind": "clip", "context_length": 20},
        preprocess=Preprocess(size=48),
    )
    model = build_encoder_model(config, seed=0)
    model.load_state_dict(to_native(theirs.state_dict()), strict=image.get("pre_norm", True))
    return model.eval()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 48, 48, generator=generator)
    ids = torch.full((4, 20), EOT)  # transformers pads with the end-of-text token
    for row, length in enumerate((2, 7, 11, 15)):
        ids[row, : length - 1] = torch.randint(1, EOT - 1, (length - 1,), generator=generator)
    return pixels, ids


def errors(ours: DualEncoder, theirs: Any) -> tuple[float, float]:
    pixels, ids = inputs()
    with torch.inference_mode():
        pairs = (
            (ours.encode_image(pixels), theirs.get_image_features(pixel_values=pixels)),
            (ours.encode_text(ids), theirs.get_text_features(input_ids=ids)),
        )
    found = []
    for mine, output in pairs:
        their = getattr(output, "pooler_output", output)  # a plain tensor before transformers 5
        found.append(float((mine - their).abs().max() / their.abs().max()))
    return found[0], found[1]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_both_towers_match(activation: str) -> None:
    theirs = peer(activation)
    image_error, text_error = errors(native(theirs, activation), theirs)
    assert image_error <= LIMIT
    assert text_error <= LIMIT


def test_the_wrong_activation_fails_the_tolerance() -> None:
    theirs = peer("quick_gelu")
    image_error, text_error = errors(native(theirs, "gelu"), theirs)
    assert min(image_error, text_error) > 10 * LIMIT


@pytest.mark.parametrize("wrong", [{"pre_norm": False}, {"pool": "mean"}])
def test_the_wrong_image_setting_fails_the_tolerance(wrong: dict[str, Any]) -> None:
    theirs = peer("gelu")
    assert errors(native(theirs, "gelu", **wrong), theirs)[0] > 10 * LIMIT


@pytest.mark.parametrize(
    ("trap", "key", "side"),
    [
        ("transposed", "visual.proj", 0),
        ("dropped", "visual.proj", 0),
        ("transposed", "text_projection", 1),
        ("dropped", "text_projection", 1),
        ("query and key swapped", "visual.transformer.resblocks.1.attn.in_proj_weight", 0),
        ("query and key swapped", "transformer.resblocks.1.attn.in_proj_weight", 1),
        ("norms swapped", "visual.ln_pre.weight", 0),
    ],
)
def test_a_wrong_line_in_the_table_of_names_fails_the_tolerance(trap: str, key: str, side: int) -> None:
    """What the strict load cannot see: the tensors are those of the file, and their shapes fit."""
    theirs = peer("quick_gelu", dim=(64, 48)[side])
    ours = native(theirs, "quick_gelu", dim=(64, 48)[side])
    assert errors(ours, theirs)[side] <= LIMIT
    tensor = dict(ours.named_parameters())[key].data
    right = tensor.clone()
    if trap == "transposed":
        tensor.copy_(right.T)
    elif trap == "dropped":
        tensor.copy_(torch.eye(len(right)))
    elif trap == "norms swapped":
        tensor.copy_(ours.get_parameter("visual.ln_post.weight"))
    else:
        width = len(right) // 3
        tensor.copy_(torch.cat([right[width : 2 * width], right[:width], right[2 * width :]]))
    assert errors(ours, theirs)[side] > 10 * LIMIT
