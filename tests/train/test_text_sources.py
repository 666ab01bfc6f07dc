"""A recipe names its text tower as the catalog does, and trains it from that model's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from chiasm.errors import CheckpointError, ConfigError
from chiasm.load import load
from chiasm.train.recipe import load_recipe
from chiasm.train.run import train

RECIPE = """
[data]
phantoms = "chest"
patients = 40
validation = 0.2
[image]
image_size = 32
patch_size = 8
width = 32
layers = 1
heads = 2
[text]
kind = "huggingface"
source = "bioclinicalbert"
context_length = 300
freeze = true
[projection]
dim = 16
[tokenizer]
kind = "huggingface"
source = "emilyalsentzer/Bio_ClinicalBERT"
context_length = 300
[optim]
epochs = 1
batch_size = 16
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "home" / "models" / "bioclinicalbert"
    folder.mkdir(parents=True)
    return folder


def fill(folder: Path) -> BertModel:
    letters = [f"{p}{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789.,;:-()%/" for p in ("", "##")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    torch.manual_seed(3)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=len(vocabulary)
    )
    model = BertModel(config)
    model.save_pretrained(folder)
    return model


def test_the_weights_are_the_models(home: Path, tmp_path: Path) -> None:
    theirs = fill(home)
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    result = train(load_recipe(path), out=tmp_path / "run")
    trained = load(result.best_dir)
    found = trained.model.state_dict()["text.transformer.model.encoder.layer.0.attention.self.query.weight"]
    torch.testing.assert_close(found, theirs.state_dict()["encoder.layer.0.attention.self.query.weight"])
    assert str(tmp_path) not in str(trained.config.to_dict()["text"])
    assert trained.tokenizer.encode_ids("no")[0][0] == 2


def test_absent_files_and_other_models_say_so(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    (home / "weights.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lack `config\.json`"):
        train(load_recipe(path), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="no text encoder"):
        train(load_recipe(path, ["text.source=uni"]), out=tmp_path / "run")
    with pytest.raises(CheckpointError, match="`biomegatron` are not on this machine"):
        train(load_recipe(path, ["text.source=biomegatron"]), out=tmp_path / "run")
