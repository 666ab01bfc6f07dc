"""The text encoders against transformers: folders with vocabularies, bare state dicts with many prefixes, the traps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chiasm.encoders.base import Encoder
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import CheckpointError
from chiasm.load import load

TIGHT = 1e-5
MISS = 10 * TIGHT
TEXTS = [
    "Small left pleural effusion.",
    "no",
    "Invasive ductal carcinoma, Grade 2, of the left breast; margins are free",
]
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
SMALL_T5: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,;", "left", "no", "Small", "small", "grade", "Grade", *LETTERS,
    *(f"##{c}" for c in LETTERS),
]  # fmt: skip


def randomise(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "embed" in name or "relative_attention_bias" in name or name.startswith("shared"):
                tensor.copy_(noise)
            elif tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            elif name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.2 * noise)
    return model.train(False)


def bert(vocabulary: int = len(VOCABULARY), *, megatron: bool = False) -> Any:
    from transformers import BertConfig, BertForPreTraining, MegatronBertConfig, MegatronBertForPreTraining

    config = {**SMALL, "vocab_size": vocabulary}
    if megatron:
        return randomise(MegatronBertForPreTraining(MegatronBertConfig(**config)))
    return randomise(BertForPreTraining(BertConfig(**config)))


def error(ours: Tensor, theirs: Tensor) -> float:
    scale = theirs.abs().clamp(min=float(theirs.pow(2).mean(1).sqrt().min()))
    return float(((ours - theirs).abs() / scale).max())


def masked_mean(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        hidden: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    inside = mask[..., None].float()
    return (hidden * inside).sum(1) / inside.sum(1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes an entry's declaration as small as the models of this file."""

    def shrink(name: str) -> None:
        entry = CATALOG.get(name)
        model = dict(entry.config.text.options["config"])
        model |= SMALL_T5 if model["model_type"] == "t5" else SMALL
        if "vocab_size" in model:
            model["vocab_size"] = len(VOCABULARY)
        text = replace(entry.config.text, options={"config": model})
        config = replace(entry.config, text=text, projection=replace(entry.config.projection, dim=64))
        monkeypatch.setitem(CATALOG._items, name, replace(entry, config=config))

    return shrink


def folder_of(path: Path, state: dict[str, Tensor], **tokenizer: Any) -> Path:
    path.mkdir()
    torch.save(state, path / "pytorch_model.bin")
    (path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    if tokenizer:
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return path


def theirs_of(folder: Path, model: Any) -> Tensor:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(str(folder))
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return masked_mean(model, batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("name", ["bioclinicalbert", "pubmedbert", "bluebert"])
@pytest.mark.parametrize("lower", [True, False])
def test_bert(name: str, lower: bool, small: Callable[[str], None], tmp_path: Path) -> None:
    small(name)
    model = bert()
    state = dict(model.state_dict())
    state["bert.embeddings.position_ids"] = torch.arange(512)[None]
    folder = folder_of(tmp_path / "model", state, do_lower_case=lower)
    encoder = load(folder, family=name)
    expected = theirs_of(folder, model.bert)
    assert error(encoder.encode_text(TEXTS), expected) <= TIGHT
    unmasked = unmasked_mean(encoder, model.bert)
    assert error(encoder.encode_text(TEXTS), unmasked) > MISS
    first = first_token(encoder, model.bert)
    assert error(encoder.encode_text(TEXTS), first) > MISS


def unmasked_mean(encoder: Encoder, model: Any) -> Tensor:
    tokens = encoder.tokenizer.encode(TEXTS)
    ids = tokens.ids[:, : int(tokens.lengths.max())]
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids).last_hidden_state.mean(1)
    return found


def first_token(encoder: Encoder, model: Any) -> Tensor:
    tokens = encoder.tokenizer.encode(TEXTS)
    mask = (torch.arange(tokens.ids.shape[1]) < tokens.lengths[:, None]).long()
    with torch.inference_mode():
        found: Tensor = model(input_ids=tokens.ids, attention_mask=mask).last_hidden_state[:, 0]
    return found


def test_lower_case_comes_from_the_file_else_is_taken_and_logged(
    small: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small("bioclinicalbert")
    state = dict(bert().state_dict())
    silent = folder_of(tmp_path / "silent", state)
    with caplog.at_level(logging.WARNING, logger="chiasm"):
        taken = load(silent, family="bioclinicalbert")
        taken.encode_text(["Small"])
    assert "does not say whether its tokenizer lower-cases" in caplog.text
    cased = load(folder_of(tmp_path / "cased", state, do_lower_case=False), family="bioclinicalbert")
    lower = load(folder_of(tmp_path / "lower", state, do_lower_case=True), family="bioclinicalbert")
    words = ["Small Grade", "Left"]
    assert taken.tokenizer.encode_ids(words) == lower.tokenizer.encode_ids(words)
    assert cased.tokenizer.encode_ids(words) != lower.tokenizer.encode_ids(words)
    assert torch.equal(taken.encode_text(words), lower.encode_text(words))
    assert error(cased.encode_text(words), lower.encode_text(words)) > MISS


@pytest.mark.parametrize(
    "prefix", ["", "bert.", "text_encoder.model.", "text_model.model.", "text.transformer.", "module.bert.", "module."]
)
def test_prefixes_and_the_names_of_tensorflow(prefix: str, small: Callable[[str], None], tmp_path: Path) -> None:
    small("bluebert")
    model = bert()
    state = {}
    for name, tensor in model.bert.state_dict().items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[f"{prefix}{old}"] = tensor
    state |= {f"{prefix}embeddings.token_type_ids": torch.zeros(1, 512).long(), "cls.predictions.bias": torch.zeros(9)}
    folder = folder_of(tmp_path / "model", state, do_lower_case=True)
    encoder = load(folder, family="bluebert")
    assert error(encoder.encode_text(TEXTS), theirs_of(folder, model.bert)) <= TIGHT
    with pytest.raises(CheckpointError, match=r"besides 1: `text\.transformer\.model\.encoder\.surprise`"):
        load(folder_of(tmp_path / "other", state | {f"{prefix}encoder.surprise": torch.zeros(1)}), family="bluebert")


def test_another_vocabulary_is_refused_where_the_name_fixes_it(small: Callable[[str], None], tmp_path: Path) -> None:
    small("pubmedbert")
    folder = folder_of(tmp_path / "model", dict(bert(len(VOCABULARY) + 4).state_dict()))
    with pytest.raises(CheckpointError, match=r"other shapes: `text\.transformer\.model\.embeddings\.word"):
        load(folder, family="pubmedbert")


def test_biomegatron_has_its_own_vocabulary_and_norms_before_the_layers(
    small: Callable[[str], None], tmp_path: Path
) -> None:
    small("biomegatron")
    model = bert(len(VOCABULARY) + 7, megatron=True)
    state = dict(model.state_dict())
    assert "bert.encoder.ln.weight" in state
    assert "bert.embeddings.LayerNorm.weight" not in state
    folder = folder_of(tmp_path / "model", state, do_lower_case=True)
    encoder = load(folder, family="biomegatron")
    assert error(encoder.encode_text(TEXTS), theirs_of(folder, model.bert)) <= TIGHT
    assert encoder.config.text.options["config"]["vocab_size"] == len(VOCABULARY) + 7
    with pytest.raises(CheckpointError, match="lack"):  # a BERT normalises behind its layers
        load(folder_of(tmp_path / "bert", dict(bert().state_dict())), family="biomegatron")
    without = {k: v for k, v in state.items() if not k.startswith("bert.encoder.ln.")}
    with pytest.raises(CheckpointError, match=r"encoder\.ln"):
        load(folder_of(tmp_path / "without", without), family="biomegatron")


def t5_folder(path: Path, state: dict[str, Tensor], vocabulary: int) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    path.mkdir()
    torch.save(state, path / "pytorch_model.bin")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, ".", ",", ";"]
    engine = Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2, byte_fallback=False))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert engine.get_vocab_size() <= vocabulary
    engine.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_t5(kind: str, small: Callable[[str], None], tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    small("t5-base")
    whole = randomise(T5ForConditionalGeneration(T5Config(**SMALL_T5, vocab_size=100, feed_forward_proj=kind)))
    state = {k: v for k, v in whole.state_dict().items() if k != "encoder.embed_tokens.weight"}
    assert any(k.startswith("decoder.") for k in state)
    folder = t5_folder(tmp_path / "model", state, 100)
    encoder = load(folder, family="t5-base")
    tokens = encoder.tokenizer.encode(TEXTS)
    assert tokens.ids[0, int(tokens.lengths[0]) - 1] == 1
    assert tokens.ids[1, -1] == 0
    mask = (torch.arange(tokens.ids.shape[1]) < tokens.lengths[:, None]).long()
    expected = masked_mean(whole.encoder, tokens.ids, mask)
    assert error(encoder.encode_text(TEXTS), expected) <= TIGHT
    flat = {k: torch.zeros_like(v) if "relative_attention_bias" in k else v for k, v in state.items()}
    assert error(load(t5_folder(tmp_path / "flat", flat, 100), family="t5-base").encode_text(TEXTS), expected) > MISS
    with torch.inference_mode():
        unmasked = whole.encoder(input_ids=tokens.ids).last_hidden_state.mean(1)
    assert error(encoder.encode_text(TEXTS), unmasked) > MISS
    without = {k: v for k, v in state.items() if "relative_attention_bias" not in k}
    with pytest.raises(CheckpointError, match="relative_attention_bias"):
        load(t5_folder(tmp_path / "without", without, 100), family="t5-base")
    twice = state | {"encoder.embed_tokens.weight": state["shared.weight"] + 1}
    with pytest.raises(CheckpointError, match="one word embedding"):
        load(t5_folder(tmp_path / "twice", twice, 100), family="t5-base")
