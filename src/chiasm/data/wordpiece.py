"""BERT's tokenizer from a bare ``vocab.txt``, as the folders of many medical BERTs hold it.

In: a folder. Out: the content of a ``tokenizer.json``. Such folders may name a tokenizer class of their own, which would
be code from the hub; what it does is always BERT's, so nothing of it is run.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from chiasm.errors import FileFormatError

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_log = logging.getLogger("chiasm")


def is_bert_folder(folder: Path) -> bool:
    """Return whether a folder holds BERT's vocabulary and no ready ``tokenizer.json``."""
    file = folder / "vocab.txt"
    if not file.is_file() or (folder / "tokenizer.json").is_file():
        return False
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        return False
    return set(_SPECIAL) <= {line.rstrip("\r") for line in lines}


def read_bert_folder(folder: Path) -> dict[str, Any]:
    """Return the content of the ``tokenizer.json`` that a folder with ``vocab.txt`` stands for.

    Lower case is what ``tokenizer_config.json`` says (``do_lower_case``), else BERT's default, which is yes, and the
    log says so: Bio_ClinicalBERT's vocabulary is cased, but its users all relied on that default.

    Raises:
        FileFormatError: A piece stands in two lines.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    pieces = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise FileFormatError("`vocab.txt` holds a piece twice")
    stated = _stated(folder)
    lower = stated.get("do_lower_case")
    if not isinstance(lower, bool):
        _log.warning("`%s` does not say whether its tokenizer lower-cases; it is taken to do so", folder.name)
        lower = True
    accents = stated.get("strip_accents")
    engine = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    engine.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=stated.get("tokenize_chinese_chars") is not False,
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=lower,
    )
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ends
    )
    engine.decoder = decoders.WordPiece(prefix="##")
    engine.add_special_tokens(list(_SPECIAL))
    content: dict[str, Any] = json.loads(engine.to_str())
    return content


def _stated(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
