from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.config import build, read_toml, to_toml
from chiasm.encoders.base import (
    EncoderConfig,
    ImageTowerConfig,
    LoraConfig,
    ProjectionConfig,
    TextTowerConfig,
)
from chiasm.errors import ConfigError
from chiasm.types import Preprocess

images = st.one_of(
    st.builds(
        ImageTowerConfig,
        kind=st.just("vit"),
        image_size=st.just(96),
        patch_size=st.sampled_from([8, 16, 32]),
        width=st.sampled_from([64, 128]),
        layers=st.integers(1, 24),
        activation=st.sampled_from(["gelu", "quick_gelu"]),
        pool=st.sampled_from(["auto", "cls", "mean", "attention"]),
        pre_norm=st.booleans(),
        ln_eps=st.floats(1e-8, 1e-2),
        freeze=st.booleans(),
        lora=st.none() | st.builds(LoraConfig, rank=st.integers(1, 9), targets=st.just(("c_fc",))),
    ),
    st.builds(
        ImageTowerConfig,
        kind=st.just("resnet"),
        image_size=st.just(96),
        width=st.sampled_from([16, 64]),
        layers=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
        pool=st.sampled_from(["auto", "mean"]),
    ),
    st.builds(
        ImageTowerConfig,
        kind=st.just("huggingface"),
        image_size=st.just(96),
        source=st.just("a/b"),
        options=st.dictionaries(st.text("abc", min_size=1), st.integers()),
    ),
)
encoders = st.builds(
    EncoderConfig,
    image=images,
    text=st.builds(TextTowerConfig, width=st.sampled_from([64, 512]), causal=st.just(True)),
    projection=st.builds(ProjectionConfig, dim=st.integers(1, 1024), hidden=st.none() | st.integers(1, 64)),
    logit_bias_init=st.none() | st.floats(-20, 0),
    preprocess=st.just(Preprocess(size=96)),
)


@given(encoders)
def test_json_and_toml_round_trips_are_the_identity(config: EncoderConfig) -> None:
    assert EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    import tomllib

    assert build(EncoderConfig, tomllib.loads(to_toml(config))) == config


@given(encoders, encoders)
def test_digest_is_equal_exactly_for_equal_configurations(a: EncoderConfig, b: EncoderConfig) -> None:
    assert (a.digest == b.digest) == (a == b)
    assert EncoderConfig.from_dict(a.to_dict()).digest == a.digest


def test_pooling_is_resolved_by_the_kind_of_tower() -> None:
    assert ImageTowerConfig().pool == "cls"
    assert ImageTowerConfig(kind="resnet", width=64, layers=(1, 1, 1, 1)).pool == "attention"
    assert ImageTowerConfig(kind="huggingface", source="x").pool == "none"
    assert TextTowerConfig().pool == "eot"
    assert TextTowerConfig(kind="huggingface", source="x").pool == "mean"


def test_heads_follow_the_rule_of_64_channels() -> None:
    assert ImageTowerConfig(width=1024, layers=24).pool_heads == 16
    rn50 = ImageTowerConfig(kind="resnet", width=64, layers=(3, 4, 6, 3))
    assert (rn50.pool_heads, rn50.final_channels, rn50.stride_px) == (32, 2048, 32)
    small = ImageTowerConfig(kind="resnet", width=24, layers=(1, 1, 1), image_size=96)
    assert (small.pool_heads, small.final_channels, small.stride_px) == (6, 384, 16)
    assert TextTowerConfig(width=768).attention_heads == 12


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"image": {"image_size": 225}}, "image.image_size"),
        ({"image": {"width": 0}}, "image.width"),
        ({"image": {"width": 32}}, "image.heads"),
        ({"image": {"heads": 5}}, "image.heads"),
        ({"image": {"layers": [1, 2]}}, "image.layers"),
        ({"image": {"layers": 0}}, "image.layers"),
        ({"image": {"pool": "none"}}, "image.pool"),
        ({"image": {"mlp_ratio": 0}}, "image.mlp_ratio"),
        ({"image": {"ln_eps": -1.0}}, "image.ln_eps"),
        ({"image": {"source": "x"}}, "image.source"),
        ({"image": {"options": {"a": 1}}}, "image.options"),
        ({"image": {"output_dim": 0}}, "image.output_dim"),
        ({"image": {"kind": "huggingface"}}, "image.source"),
        ({"image": {"kind": "resnet"}}, "image.layers"),
        ({"image": {"kind": "resnet", "width": 63, "layers": [1]}}, "image.width"),
        ({"image": {"kind": "resnet", "width": 64, "layers": [1, 1, 1, 1, 1]}}, "image.layers"),
        ({"image": {"kind": "resnet", "width": 64, "layers": [1, 0]}}, "image.layers"),
        ({"image": {"kind": "resnet", "width": 64, "layers": [1, 1], "image_size": 100}}, "image.image_size"),
        ({"image": {"kind": "resnet", "width": 64, "layers": [1, 1], "pool": "cls"}}, "image.pool"),
        ({"image": {"kind": "resnet", "width": 64, "layers": [1, 1], "heads": 7}}, "image.heads"),
        ({"text": {"context_length": 0}}, "text.context_length"),
        ({"text": {"heads": 7}}, "text.heads"),
        ({"text": {"pool": "cls"}}, "text.pool"),
        ({"text": {"source": "x"}}, "text.source"),
        ({"text": {"options": {"a": 1}}}, "text.options"),
        ({"text": {"mlp_ratio": -1.0}}, "text.mlp_ratio"),
        ({"text": {"kind": "python"}}, "text.source"),
        ({"projection": {"dim": 0}}, "projection.dim"),
        ({"projection": {"hidden": 0}}, "projection.hidden"),
        ({"projection": {"dropout": 1.0}}, "projection.dropout"),
        ({"logit_scale_init": 14.3}, "logit_scale_init"),
        ({"logit_scale_init": -0.1}, "logit_scale_init"),
        ({"preprocess": {"size": 256}}, "preprocess.size"),
        ({"tokenizer": {"kind": "clip", "context_length": 64}}, "tokenizer.context_length"),
        ({"image": {"lora": {"rank": 0}}}, "lora.rank"),
        ({"image": {"lora": {"alpha": 0.0}}}, "lora.alpha"),
        ({"image": {"lora": {"dropout": 1.0}}}, "lora.dropout"),
        ({"image": {"activation": "relu"}}, "image.activation"),
        ({"image": {"kind": "swin"}}, "image.kind"),
        ({"image": {"layers": "many"}}, "image.layers"),
    ],
)
def test_impossible_values_name_their_dotted_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EncoderConfig.from_dict(values)
    assert f"`{field}`" in caught.value.message


def test_a_typo_is_answered_with_the_name_that_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"unknown field `image.patchsize`; did you mean `image.patch_size`"):
        EncoderConfig.from_dict({"image": {"patchsize": 16}})


def test_the_default_is_openai_vit_b_32() -> None:
    config = EncoderConfig()
    assert config.is_native
    assert config.logit_scale_init == pytest.approx(math.log(1 / 0.07))
    assert (config.image.patch_size, config.image.activation, config.projection.dim) == (32, "quick_gelu", 512)


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EncoderConfig().image.width = 3  # type: ignore[misc]


def test_a_recipe_file_is_read(tmp_path: Any) -> None:
    path = tmp_path / "encoder.toml"
    path.write_text('[image]\nkind = "resnet"\nwidth = 24\nlayers = [1, 1, 1, 1]\n')
    assert EncoderConfig.from_dict(read_toml(path)).image.layers == (1, 1, 1, 1)


def test_declarations_do_not_import_torch() -> None:
    code = "import sys, chiasm.encoders.base as b; b.EncoderConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_face_is_reached_through_base() -> None:
    from chiasm.encoders import base, face

    assert base.Encoder is face.Encoder
    assert base.weights_digest is face.weights_digest
    with pytest.raises(AttributeError, match="no attribute"):
        _ = base.Encodr
