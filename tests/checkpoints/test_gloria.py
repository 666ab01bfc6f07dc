"""GLoRIA's Lightning checkpoint loads and agrees with an independent implementation (tests/golden/make_gloria.py)."""

from __future__ import annotations

import json
import runpy
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.data.tokens import Tokens
from chiasm.encoders.base import Encoder
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import CheckpointError, ConfigError, InputError
from chiasm.load import load
from chiasm.losses.local import attention_similarity, peer_word_counts

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "gloria.json").read_text())
make = runpy.run_path(str(GOLDEN / "make_gloria.py"))
TOLERANCE = 1e-4  # of the ResNet; texts: 1e-5


def word_piece() -> dict[str, Any]:
    """A WordPiece tokenizer with the fixture's pieces, as ``tokenizer.json`` states it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {piece: i for i, piece in enumerate(make["PIECES"])}
    engine = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return dict(json.loads(engine.to_str()))


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    """The whole checkpoint: its configuration and callbacks are objects of packages that are not here."""
    module = types.ModuleType("omegaconf.dictconfig")

    class DictConfig:
        def __init__(self) -> None:
            self.content = {"model": {"gloria": {"temp1": 4.0}}}

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    module.DictConfig = DictConfig  # type: ignore[attr-defined]
    sys.modules.update({"omegaconf": types.ModuleType("omegaconf"), "omegaconf.dictconfig": module})
    return {
        "epoch": 11, "global_step": 1000, "pytorch-lightning_version": "1.1.4", "state_dict": state,
        "hyper_parameters": DictConfig(), "callbacks": {DictConfig: {"best": 1.0}}, "optimizer_states": [],
        "lr_schedulers": [],
    }  # fmt: skip


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Encoder]:
    """Write the Lightning checkpoint as it is published, then load it as a small GLoRIA."""

    def make_encoder(tensors: dict[str, Tensor] | None = None) -> Encoder:
        entry = CATALOG.get("gloria")
        config = entry.config
        options = {**make["RESNET"], "output_dim": make["DIM"], "upsample": make["UPSAMPLE"]}
        tokenizer = {k: v for k, v in config.tokenizer.items() if k != "source"}
        config = replace(
            config,
            image=replace(config.image, image_size=64, options=options),
            text=replace(config.text, context_length=make["SLOTS"], options=make["BERT"]),
            projection=replace(config.projection, dim=make["DIM"]),
            tokenizer={**tokenizer, "context_length": make["SLOTS"], "tokenizer": word_piece()},
            preprocess=replace(config.preprocess, size=64),
        )
        monkeypatch.setitem(CATALOG._items, "small", replace(entry, name="small", aliases=(), config=config))
        path = tmp_path / "chexpert_resnet50.ckpt"
        try:
            torch.save(lightning(make["weights"]() if tensors is None else tensors), path)
        finally:
            for name in ("omegaconf", "omegaconf.dictconfig"):
                sys.modules.pop(name, None)
        return load(path, family="small")

    return make_encoder


def error(ours: Tensor, expected: Any) -> float:
    theirs = expected if isinstance(expected, Tensor) else torch.tensor(expected)
    scale = torch.maximum(theirs.abs(), theirs.square().mean(-1, keepdim=True).sqrt())
    return float(((ours - theirs).abs() / scale).max())


def parts(encoder: Encoder) -> tuple[Tensor, Tensor, Tensor]:
    """Regions, words and the number of words."""
    tokens = encoder.tokenizer.encode(make["TEXTS"])
    visual, text = encoder.model.visual, encoder.model.text
    with torch.inference_mode():
        regions = visual.trunk.image_locals(make["pixels"]())  # type: ignore[union-attr]
        words, counts = text.transformer.word_features(tokens.ids, tokens.mask)  # type: ignore[union-attr]
    return regions, words, counts


def test_images_and_regions_agree(read: Callable[..., Encoder]) -> None:
    encoder = read()
    assert encoder.logit_scale is None
    assert error(encoder.encode_image(make["pixels"]()), EXPECTED["image"]) <= TOLERANCE
    regions, *_ = parts(encoder)
    assert error(regions[0].flatten(1)[:, ::5], EXPECTED["regions_of_the_first"]) <= TOLERANCE
    patches = encoder.patch_features(make["pixels"](), normalize=False)
    assert torch.equal(patches, regions.permute(0, 2, 3, 1))


def test_texts_and_words_agree(read: Callable[..., Encoder]) -> None:
    encoder = read()
    texts = make["TEXTS"]
    assert encoder.tokenizer.encode_ids([texts[0]]) == [make["row_of"](texts[0])]
    tokens = encoder.tokenizer.encode(texts)
    assert error(encoder.encode_text(tokens), EXPECTED["text"]) <= 1e-5
    _, words, counts = parts(encoder)
    assert counts.tolist() == make["word_counts"]()
    assert words.shape == (3, make["SLOTS"], make["DIM"])
    assert error(words[0, :5], torch.tensor(EXPECTED["words_of_the_first"])[:5]) <= 1e-5
    assert not words[0, 5:].any()


def test_padding_changes_neither_texts_nor_words(read: Callable[..., Encoder]) -> None:
    encoder = read()
    tokens = encoder.tokenizer.encode(make["TEXTS"])
    longest = int(tokens.lengths.max())
    short = Tokens(tokens.ids[:, :longest], tokens.lengths)
    assert error(encoder.encode_text(short), EXPECTED["text"]) <= 1e-5
    text = encoder.model.text.transformer  # type: ignore[union-attr]
    with torch.inference_mode():
        words, counts = text.word_features(short.ids, short.mask)
    assert error(words[0, :5], torch.tensor(EXPECTED["words_of_the_first"])[:5]) <= 1e-5
    assert counts.tolist() == make["word_counts"]()


def test_the_local_similarity_agrees(read: Callable[..., Encoder]) -> None:
    regions, words, counts = parts(read())
    assert error(attention_similarity(regions, words, counts), EXPECTED["local"]) <= TOLERANCE
    train = attention_similarity(regions, words, counts + 1, first=0, pool="sum")
    assert error(train, EXPECTED["local_train"]) <= TOLERANCE


def test_the_published_count_of_words_is_reproduced_by_name(read: Callable[..., Encoder]) -> None:
    regions, words, _ = parts(read())
    counted = peer_word_counts(make["TEXTS"], make["SLOTS"])
    assert counted.tolist() == [7, 1, 18]
    peer = attention_similarity(regions, words, counted)
    assert error(peer, EXPECTED["local_peer"]) <= TOLERANCE
    assert error(peer, EXPECTED["local"]) > 10 * TOLERANCE


@pytest.mark.parametrize("trap", ["no_upsample", "corners", "max_pool", "no_bias"])
def test_each_image_trap_fails_the_tolerance(read: Callable[..., Encoder], trap: str) -> None:
    theirs, _ = make["encode_image"](make["weights"](), make["pixels"](), trap)
    assert error(read().encode_image(make["pixels"]()), theirs) > 10 * TOLERANCE


@pytest.mark.parametrize("trap", ["last_layer", "mean_layers", "mean_words", "mean_tokens"])
def test_each_text_trap_fails_the_tolerance(read: Callable[..., Encoder], trap: str) -> None:
    encoder = read()
    theirs, _ = make["encode_text"](make["weights"](), make["TEXTS"], trap)
    assert error(encoder.encode_text(encoder.tokenizer.encode(make["TEXTS"])), theirs) > 1e-3


def test_words_that_are_not_put_together_fail_the_tolerance(read: Callable[..., Encoder]) -> None:
    _, words, _ = parts(read())
    _, apart = make["encode_text"](make["weights"](), make["TEXTS"], "no_grouping")
    assert error(words[2, :4], apart[2, :4]) > 1e-3


@pytest.mark.parametrize("trap", ["with_cls", "no_word_softmax"])
def test_each_trap_of_the_attention_fails_the_tolerance(read: Callable[..., Encoder], trap: str) -> None:
    regions, words, counts = parts(read())
    theirs = make["local"](regions, words, make["word_counts"](), trap)
    assert error(attention_similarity(regions, words, counts), theirs) > 10 * TOLERANCE


def test_the_vocabulary_must_be_known(read: Callable[..., Encoder]) -> None:
    tower = read().model.text.transformer  # type: ignore[union-attr]
    ids = torch.tensor([[2, 5, 3]])
    with pytest.raises(InputError, match="does not know which ids continue a word"):
        tower.word_features(ids, torch.ones_like(ids))


def test_other_files_are_refused(read: Callable[..., Encoder]) -> None:
    whole = make["weights"]()
    with pytest.raises(CheckpointError, match="surprise"):
        read({**whole, "gloria.surprise": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"layer3\.1\.conv2"):
        read({k: v for k, v in whole.items() if "layer3.1.conv2" not in k})
    with pytest.raises(CheckpointError, match="not in the layout `gloria`"):
        read({k: v for k, v in whole.items() if "local_embedder" not in k})
    lean = {k: v for k, v in whole.items() if not k.endswith(("position_ids", "num_batches_tracked"))}
    assert error(read(lean).encode_image(make["pixels"]()), EXPECTED["image"]) <= TOLERANCE


def test_impossible_shapes_are_named() -> None:
    from chiasm.encoders.named import build_named_tower

    config = CATALOG.get("gloria").config
    with pytest.raises(ConfigError, match="at least two stages"):
        build_named_tower(replace(config.image, options={"layers": [1]}))
    with pytest.raises(ConfigError, match="last_layers"):
        build_named_tower(replace(config.text, options={**make["BERT"], "layers": 1, "last_layers": 4}))
    with pytest.raises(ConfigError, match="reads at most 30"):
        build_named_tower(replace(config.text, options=make["BERT"]))
