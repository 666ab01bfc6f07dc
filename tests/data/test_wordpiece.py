"""A bare vocabulary of BERT's gives transformers' ids, and no code of the folder is asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from chiasm.data.tokenizers import make_tokenizer
from chiasm.data.wordpiece import is_bert_folder, read_bert_folder
from chiasm.errors import ConfigError, FileFormatError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "no",
    "pneumo",
    "##nia",
    ".",
    ",",
    "-",
    "left",
    "e",
    "cafe",
    "café",
    "Left",
    "##s",
    "漢",
]
TEXTS = ["No pneumonia.", "left-lefts, cafe", "Café CAFÉ Left", "xyz", "", "漢漢 no\u200b \t[MASK] no", "no" * 120]


def write(folder: Path, **config: object) -> Path:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("lower", [True, False])
def test_ids_are_those_of_transformers(tmp_path: Path, lower: bool) -> None:
    from transformers import BertTokenizer

    write(tmp_path, do_lower_case=lower, tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["code.X", None]})
    ours = make_tokenizer({"kind": "huggingface", "source": str(tmp_path), "context_length": 300})
    theirs = BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=lower)
    assert ours.encode_ids(TEXTS) == [theirs(text)["input_ids"] for text in TEXTS]


def test_lower_case_is_the_default_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="chiasm"):
        content = read_bert_folder(write(tmp_path))
    assert content["normalizer"]["lowercase"] is True
    assert "does not say whether its tokenizer lower-cases" in caplog.text


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    assert not is_bert_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    assert not is_bert_folder(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    assert not is_bert_folder(tmp_path)
    assert is_bert_folder(write(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert not is_bert_folder(tmp_path)


def test_a_piece_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("no\n")
    with pytest.raises(FileFormatError, match="twice"):
        read_bert_folder(tmp_path)


def test_too_long_is_cut_or_refused(tmp_path: Path) -> None:
    write(tmp_path, do_lower_case=True)
    spec = {"kind": "huggingface", "source": str(tmp_path), "context_length": 8}
    assert make_tokenizer(spec).encode(["no " * 20]).truncated == (0,)
    with pytest.raises(ConfigError, match="too_long"):
        make_tokenizer({**spec, "too_long": "shout"})
    again = make_tokenizer(make_tokenizer({**spec, "too_long": "refuse", "clean": "end_marks"}).to_dict())
    assert again.to_dict()["too_long"] == "refuse"
    assert again.encode_ids("no.") == [[2, 5, 3]]
