"""BioViL's two files in one folder, what is refused in them, and the laws of its towers. Parity: tests/parity."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.encoders.biovil import sine_positions
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import CheckpointError, ConfigError, InputError
from chiasm.load import load

BERT: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 24, "vocab_size": 20, "positions": 24}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "pneumonia", ".", "!", "?", "left", "##sided"]
NAMES = {
    "visual.trunk.backbone.": "image.encoder.encoder.",
    "visual.trunk.squeeze.": "image.encoder.backbone_to_vit.",
    "visual.trunk.pooler.": "image.encoder.vit_pooler.",
    "visual.trunk.missing_previous": "image.encoder.missing_previous_emb",
    "visual.trunk.projector.": "image.projector.model.",
    "text.transformer.": "text.",
}


def small(name: str) -> EncoderConfig:
    config = CATALOG.get(name).config
    options = {"layers": [1, 1, 1, 1], "width": 4, "temporal_dim": 16, "temporal_heads": 4, "temporal_layers": 2}
    return replace(
        config,
        image=replace(config.image, image_size=96, options={**config.image.options, **options}),
        text=replace(config.text, context_length=24, options={**config.text.options, **BERT}),
        tokenizer={**config.tokenizer, "context_length": 24},
        preprocess=replace(config.preprocess, size=96, resize_size=100),
    )


def published(config: EncoderConfig, vocabulary: int = len(WORDS)) -> dict[str, Tensor]:
    """Drawn weights under the published names, with what the files hold besides."""
    text = replace(config.text, options={**config.text.options, "vocab_size": vocabulary})
    model = build_encoder_model(replace(config, text=text), seed=3)
    tensors = {}
    for name, tensor in model.state_dict().items():
        prefix = next(p for p in NAMES if name.startswith(p))
        tensors[NAMES[prefix] + name.removeprefix(prefix)] = tensor
    return tensors | {
        "image.encoder.encoder.fc.weight": torch.ones(10, 3),
        "image.encoder.encoder.fc.bias": torch.ones(10),
        "text.cls.predictions.bias": torch.ones(4),
        "text.bert.embeddings.position_ids": torch.arange(24)[None],
    }


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Encoder]:
    def make(name: str = "biovil", change: dict[str, Tensor | None] | None = None, file: str = "") -> Encoder:
        config = small(name)
        monkeypatch.setitem(CATALOG._items, "small", replace(CATALOG.get(name), name="small", config=config))
        tensors = {k: v for k, v in {**published(config), **(change or {})}.items() if v is not None}
        for prefix, target in (("image.", "biovil_image_x.pt"), ("text.", "pytorch_model.bin")):
            part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            torch.save(part, tmp_path / target)
        (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CXRBertTokenizer"}))
        return load(tmp_path / file, family="small")

    return make


@pytest.mark.parametrize("name", ["biovil", "biovil-t"])
def test_a_folder_of_two_files_loads(read: Callable[..., Encoder], name: str) -> None:
    encoder = read(name)
    expected = build_encoder_model(
        replace(small(name), text=replace(small(name).text, options={**encoder.config.text.options})), seed=3
    ).eval()
    x = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode_image(x), expected.encode_image(x), rtol=1e-5, atol=1e-5)
    patches = encoder.patch_features(x, normalize=False)
    assert patches.shape == (2, 3, 3, 128)
    torch.testing.assert_close(patches.mean((1, 2)), encoder.encode_image(x))
    assert encoder.logit_scale is None
    assert encoder.config.text.options["vocab_size"] == len(WORDS)  # the file's, not the catalog's


def test_the_prior_image_counts_only_where_it_can(read: Callable[..., Encoder]) -> None:
    x, before = torch.rand(2, 3, 96, 96), torch.rand(2, 3, 96, 96)
    encoder = read("biovil-t")
    alone, both = encoder.encode_image(x), encoder.encode_image(x, prior=before)
    assert not torch.allclose(alone, both)
    one = encoder.encode_image(x[:1], prior=before[:1])
    torch.testing.assert_close(one, both[:1], rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="prior images have shape"):
        encoder.encode_image(x, prior=before[:1])
    with pytest.raises(InputError, match="takes no prior image"):
        read("biovil").encode_image(x, prior=before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image.projector.model.3.bias": None}, r"lack 1: `visual\.trunk\.projector\.3\.bias`"),
        ({"image.encoder.surprise": torch.ones(1)}, r"have besides 1: `image\.encoder\.surprise`"),
        ({"image.encoder.vit_pooler.norm_post.bias": torch.ones(16)}, "have besides 1"),
        ({"text.cls_projection_head.LayerNorm.weight": torch.ones(3)}, "other shapes"),
        ({"text.cls_projection_head.dense_to_hidden.weight": None}, "not in the layout `biovil`"),
    ],
)
def test_what_does_not_fit_is_refused(
    read: Callable[..., Encoder], change: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read("biovil", change)


def test_one_file_of_the_two_is_not_enough(read: Callable[..., Encoder], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is one of 2 parts of this model"):
        read("biovil", file="biovil_image_x.pt")
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="lacks weights"):
        load(tmp_path, family="small")


def test_prompts_lose_their_end_marks_and_long_texts_are_refused(read: Callable[..., Encoder]) -> None:
    encoder = read()
    same = encoder.encode_text(["No pneumonia.", "no pneumonia!?", "no pneumonia"])
    assert torch.equal(same[0], same[2])
    assert torch.equal(same[1], same[2])
    assert encoder.tokenizer.encode_ids("No. pneumonia.") == [[2, 5, 7, 6, 3]]
    with pytest.raises(InputError, match=r"holds the special token `\[SEP\]`"):
        encoder.encode_text("no [SEP] pneumonia")
    assert encoder.encode_text("no [MASK]").shape == (1, 128)
    with pytest.raises(InputError, match="text 1 is longer than 24 tokens"):
        encoder.encode_text(["no", "no " * 30])


def test_cxr_bert_alone(read: Callable[..., Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = read()
    config = replace(small("biovil"), sides="text")
    monkeypatch.setitem(CATALOG._items, "small", replace(CATALOG.get("cxr-bert"), name="small", config=config))
    for place in (tmp_path, tmp_path / "pytorch_model.bin"):
        alone = load(place, family="small")
        torch.testing.assert_close(
            alone.encode_text("no pneumonia"), both.encode_text("no pneumonia"), rtol=1e-5, atol=1e-5
        )
        with pytest.raises(InputError, match="no image side"):
            alone.encode_image(torch.rand(1, 3, 96, 96))


def test_sine_positions_tell_every_place_apart() -> None:
    code = sine_positions(3, 5, 16)
    assert code.shape == (15, 16)
    assert float(code.abs().max()) <= 1
    assert float(torch.cdist(code, code).add(torch.eye(15) * 9).min()) > 0.1
    grid = code.reshape(3, 5, 16)
    assert torch.equal(grid[:, :1, :8].expand(-1, 5, -1), grid[..., :8])  # half of the channels hold the row
    assert torch.equal(grid[:1, :, 8:].expand(3, -1, -1), grid[..., 8:])  # half the column


def test_impossible_options_are_refused() -> None:
    config = small("biovil-t")
    impossible: list[dict[str, Any]] = [{"temporal_dim": 18}, {"temporal": 1}, {"layers": []}]
    for options in impossible:
        image = replace(config.image, options={**config.image.options, **options})
        with pytest.raises(ConfigError):
            build_encoder_model(replace(config, image=image))
