"""CONCH's file loads and agrees with an independent implementation (tests/golden/make_conch.py); each trap fails it."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.encoders.base import Encoder, EncoderConfig, ProjectionConfig
from chiasm.encoders.catalog import CATALOG
from chiasm.encoders.models.conch import with_corrected_class_mask
from chiasm.errors import CheckpointError, ConfigError, InputError
from chiasm.load import load
from chiasm.types import Preprocess

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "conch.json").read_text())
make = runpy.run_path(str(GOLDEN / "make_conch.py"))
TOLERANCE = 1e-5


def small(image_size: int = 64) -> EncoderConfig:
    config, s = CATALOG.get("conch").config, make["SHAPE"]
    options = {
        "width": s["width"], "layers": s["layers"], "heads": s["heads"], "patch_size": 16,
        "output_dim": s["pool_dim"], "pool_heads": s["pool_heads"],
    }  # fmt: skip
    text = replace(
        config.text,
        context_length=s["context"],
        vocab_size=s["vocab_size"],
        width=s["text_width"],
        layers=s["text_layers"],
        heads=s["text_heads"],
    )
    return replace(
        config,
        image=replace(config.image, image_size=image_size, options=options),
        text=text,
        projection=ProjectionConfig(dim=s["pool_dim"]),
        tokenizer={**config.tokenizer, "context_length": s["context"]},
        preprocess=Preprocess(size=image_size),
    )


def probe(config: EncoderConfig) -> EncoderConfig:
    return replace(config, sides="image", projection=replace(config.projection, image="none"))


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Encoder]:
    """Write the file as it is published, then load it as a small CONCH."""

    def make_encoder(config: EncoderConfig | None = None, tensors: dict[str, Tensor] | None = None) -> Encoder:
        entry = replace(CATALOG.get("conch"), name="conch-small", config=config or small())
        monkeypatch.setitem(CATALOG._items, "conch-small", entry)
        torch.save(make["weights"]() if tensors is None else tensors, tmp_path / "pytorch_model.bin")
        return load(tmp_path, family="conch-small")

    return make_encoder


def error(ours: Tensor, expected: Any) -> float:
    theirs = expected if isinstance(expected, Tensor) else torch.tensor(expected)
    scale = torch.maximum(theirs.abs(), theirs.square().mean(1, keepdim=True).sqrt())
    return float(((ours - theirs).abs() / scale).max())


@pytest.mark.parametrize("size", [64, 32])
def test_images_agree(read: Callable[..., Encoder], size: int) -> None:
    encoder = read(small(size))
    assert error(encoder.encode_image(make["pixels"](size=size)), EXPECTED[f"image_{size}"]["embedded"]) <= TOLERANCE


def test_the_space_for_probes_agrees(read: Callable[..., Encoder]) -> None:
    encoder = read(probe(small()))
    assert encoder.logit_scale is None
    assert error(encoder.encode_image(make["pixels"]()), EXPECTED["image_64"]["pooled"]) <= TOLERANCE
    assert encoder.space != read().space
    with pytest.raises(InputError, match="no text side"):
        encoder.encode_text(make["ids"]())


def test_texts_agree(read: Callable[..., Encoder]) -> None:
    assert error(read().encode_text(make["ids"]()), EXPECTED["text"]) <= TOLERANCE
    corrected = read(with_corrected_class_mask(small()))
    assert error(corrected.encode_text(make["ids"]()), EXPECTED["text_corrected_mask"]) <= TOLERANCE
    assert float(corrected.logit_scale or 0) == pytest.approx(torch.tensor(4.0).exp().item())


@pytest.mark.parametrize(
    ("side", "trap"),
    [
        ("image", "eps"),
        ("image", "quick_gelu"),
        ("image", "no_final_norm"),
        ("image", "patches_only"),
        ("image", "mean_pool"),
        ("image", "no_projection"),
        ("image_32", "bicubic"),
        ("image_32", "antialias"),
        ("text", "corrected_mask"),
        ("text", "no_padding_mask"),
        ("text", "quick_gelu"),
        ("text", "end_of_text"),
    ],
)
def test_each_trap_fails_the_tolerance(read: Callable[..., Encoder], side: str, trap: str) -> None:
    w = make["weights"]()
    if side == "text":
        found = error(read().encode_text(make["ids"]()), make["encode_text"](w, make["ids"](), trap))
    else:
        size = 32 if side == "image_32" else 64
        pixels = make["pixels"](size=size)
        found = error(read(small(size)).encode_image(pixels), make["encode_image"](w, pixels, trap)["embedded"])
    assert found > 10 * TOLERANCE


def test_wrapped_and_half_precision_files_load(read: Callable[..., Encoder]) -> None:
    tensors = {f"module.{k}": v for k, v in make["weights"]().items()}
    encoder = read(tensors={"state_dict": tensors})  # type: ignore[dict-item]
    assert error(encoder.encode_text(make["ids"]()), EXPECTED["text"]) <= TOLERANCE
    halved = read(tensors={k: v.half() for k, v in make["weights"]().items()})
    assert halved.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj_contrast": None}, r"lack 1: `visual\.head\.weight`"),
        ({"visual.trunk.cls_token": None}, r"lack the image tower"),
        ({"visual.surprise": torch.ones(1)}, r"have besides 1: `visual\.surprise`"),
        ({"text.cls_emb": torch.ones(3)}, "other shapes"),
        ({"visual.attn_pool_contrast.query": None}, "not in the layout `conch`"),
    ],
)
def test_what_does_not_fit_is_refused(read: Callable[..., Encoder], change: dict[str, Any], message: str) -> None:
    tensors = {**make["weights"](), **change}
    with pytest.raises(CheckpointError, match=message):
        read(tensors={k: v for k, v in tensors.items() if v is not None})


def test_the_tokenizer_is_the_users_own(read: Callable[..., Encoder], tmp_path: Path) -> None:
    """A byte-level BPE file in the folder, with CONCH's special tokens; 127 ids, then the padding."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    with pytest.raises(InputError, match="no tokenizer at"):
        _ = read().tokenizer
    pieces = ["<pad>", "<start_of_text>", "<end_of_text>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    engine = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[]))
    engine.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.TemplateProcessing(
        single="<start_of_text> $A <end_of_text>", special_tokens=[("<start_of_text>", 1), ("<end_of_text>", 2)]
    )
    engine.save(str(tmp_path / "tokenizer.json"))
    encoder = read()
    tokens = encoder.tokenizer.encode(["Tumor.", "naïve", "a much longer text than that"])
    assert tokens.ids.shape == (3, 15)
    assert tokens.ids[0].tolist() == [1, *[pieces.index(c) for c in "Ġtumor."], 2, *[0] * 6]
    assert tokens.lengths.tolist() == [9, 8, 15]
    assert tokens.ids[2, -1] == 2
    assert tokens.truncated == (2,)
    assert error(encoder.encode_text(["Tumor."]), make["encode_text"](make["weights"](), tokens.ids[:1])) <= TOLERANCE


def test_impossible_options_are_refused() -> None:
    from chiasm.encoders.build import build_encoder_model

    for options, message in (
        ({"widht": 3}, "unknown field `image.options.widht`"),
        ({"layers": 0}, "must be at least 1"),
        ({"layers": "2"}, "must be of type int"),
        ({"output_dim": 32}, "must differ from the width"),
    ):
        config = small()
        image = replace(config.image, options={**config.image.options, **options})
        with pytest.raises(ConfigError, match=message):
            build_encoder_model(replace(config, image=image))


def test_padding_that_nothing_sees_may_be_there_or_not(read: Callable[..., Encoder]) -> None:
    """A batch is cut to its longest text and one more; the place for the class token may be there, but not a word."""
    ids = make["ids"]()
    for config, key in ((small(), "text"), (with_corrected_class_mask(small()), "text_corrected_mask")):
        encoder = read(config)
        for rows in ([0], [1, 2], [3], [4], [0, 4]):
            assert error(encoder.encode_text(ids[rows]), torch.tensor(EXPECTED[key])[rows]) <= TOLERANCE
        wider = torch.nn.functional.pad(ids, (0, 1))
        assert torch.equal(encoder.encode_text(wider), encoder.encode_text(ids))
        wider[0, -1] = 5
        with pytest.raises(InputError, match="at most 15"):
            encoder.encode_text(wider)
