"""Any tokenizer of the Hugging Face library behind the interface of ours, storable with a model, always offline."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chiasm.data.mending import clean_text, tidy_text
from chiasm.data.report_text import report_words
from chiasm.data.tokens import MIN_CONTEXT, Tokens, WordSpan, checked_context, checked_texts, to_tokens, warn_if_cut
from chiasm.data.wordpiece import is_bert_folder, read_bert_folder
from chiasm.errors import ConfigError, FileFormatError, InputError
from chiasm.io.package_files import find_package_file, is_package_source

if TYPE_CHECKING:
    import torch

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonical_text(text: str) -> str:
    """Return the text as SigLIP sees it: tidy, without ASCII punctuation (``_`` is a space), in lower case."""
    return " ".join(tidy_text(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


def prompt_text(text: str) -> str:
    """Return a prompt as BioViL's code prepares it: without marks at its end.

    Raises:
        InputError: It holds one of BERT's special tokens, ``[MASK]`` excepted.
    """
    found = next((token for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]") if token in text), None)
    if found is not None:
        raise InputError(f"a text holds the special token `{found}`, which this model refuses", hint="remove it")
    return text.rstrip("!?.")


#: What is done to texts before a tokenizer of this kind: three by open_clip, in its names; ``end_marks`` by BioViL,
#: ``report`` by GLoRIA.
CLEANINGS: Mapping[str, Callable[[str], str]] = {
    "whitespace": tidy_text,
    "lower": clean_text,
    "canonicalize": canonical_text,
    "end_marks": prompt_text,
    "report": report_words,
}


class HuggingFaceTokenizer:
    """A tokenizer of the ``tokenizers`` library, for BERT-like and T5-like text towers. Never goes to the network.

    Args:
        source: A folder or file with a ``tokenizer.json``, a folder that transformers can read (``vocab.txt``, say),
            either of them inside an installed package (``package:name/folder``), a name in the local cache of the hub,
            the content of a ``tokenizer.json`` as a mapping, or a tokenizer object of ``tokenizers`` or
            ``transformers``.
        context_length: Ids of a row, special tokens included; default: what the source states.
        pad_token: The token that fills rows up; default: what the source states, else ``[PAD]`` or ``<pad>``.
        clean: What is done to a text first, see :data:`CLEANINGS`; None: nothing. open_clip's default for these
            tokenizers is ``whitespace``, SigLIP's is ``canonicalize``.

        too_long: ``refuse`` raises ``InputError`` at a text beyond the context, as BioViL's code does; None: it is cut.

    Raises:
        ConfigError: An unknown cleaning, or another ``too_long``.
        InputError: The source is absent, or states no context or no padding and none was given.
        FileFormatError: The source is damaged.
    """

    kind = "huggingface"

    def __init__(
        self,
        source: Any,
        context_length: int | None = None,
        *,
        pad_token: str | None = None,
        clean: str | None = None,
        too_long: str | None = None,
    ) -> None:
        from tokenizers import Tokenizer as Engine

        if clean is not None and clean not in CLEANINGS:
            raise ConfigError(f"`tokenizer.clean` is `{clean}`", hint=f"one of: {', '.join(CLEANINGS)}")
        if too_long not in (None, "refuse"):
            raise ConfigError(f"`tokenizer.too_long` is `{too_long}`", hint="`refuse`, or nothing to cut texts")
        self.clean = clean
        self.too_long = too_long

        content, stated_context, stated_pad = _read_huggingface(source)
        truncation = content.pop("truncation", None) or {}
        padding = content.pop("padding", None) or {}
        self._content = {**content, "truncation": None, "padding": None}
        try:
            engine = Engine.from_str(json.dumps(self._content))
        except Exception as error:  # the library raises nothing narrower
            raise FileFormatError(f"the tokenizer's content is not usable: {type(error).__name__}") from error
        self._engines: dict[int | None, Any] = {None: engine}  # by context length; None cuts nothing
        context = context_length if context_length is not None else truncation.get("max_length") or stated_context
        if context is None:
            raise InputError("the tokenizer states no context length", hint="pass `context_length`")
        self.context_length = checked_context(int(context))
        names = (pad_token,) if pad_token else (stated_pad, padding.get("pad_token"), "[PAD]", "<pad>")
        found = [i for i in (engine.token_to_id(n) for n in names if n) if i is not None]
        if not found:
            what = f"has no token `{pad_token}`" if pad_token else "states no padding token"
            raise InputError(f"the tokenizer {what}", hint="pass `pad_token`, one of its own tokens")
        self.pad_id: int = found[0]
        special = engine.encode("").ids
        self.eot_id: int | None = special[-1] if special else None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._engines[None].get_vocab_size(with_added_tokens=True))

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """Return ids (n, context) int64, padded; texts that were cut raise a :class:`TruncationWarning`."""
        return warn_if_cut(self.encode(texts, context_length)).ids

    def encode(self, texts: str | Sequence[str], context_length: int | None = None) -> Tokens:
        """Return ids, lengths and the rows that were cut."""
        context = self.context_length if context_length is None else checked_context(context_length)
        encodings = self._encode(texts, context)
        matrix = np.full((len(encodings), context), self.pad_id, dtype=np.int64)
        for row, encoding in zip(matrix, encodings, strict=True):
            row[: len(encoding.ids)] = encoding.ids
        lengths = np.array([len(e.ids) for e in encodings], dtype=np.int64)
        cut = tuple(i for i, e in enumerate(encodings) if e.overflowing)
        if cut and self.too_long == "refuse":
            raise InputError(
                f"text {cut[0]} is longer than {context} tokens, which this model refuses", hint="shorten the text"
            )
        return to_tokens(matrix, lengths, context)._replace(truncated=cut)

    def encode_ids(self, texts: str | Sequence[str]) -> list[list[int]]:
        """Return the ids of each text with its special tokens, neither cut nor padded, without torch."""
        return [list(e.ids) for e in self._encode(texts, None)]

    def _encode(self, texts: str | Sequence[str], context: int | None) -> list[Any]:
        if context not in self._engines:
            engine = type(self._engines[None]).from_str(self._engines[None].to_str())
            engine.enable_truncation(context)
            self._engines[context] = engine
        return list(self._engines[context].encode_batch([self._prepared(t) for t in checked_texts(texts)]))

    def _prepared(self, text: str) -> str:
        text = _without_surrogates(text)
        return text if self.clean is None else CLEANINGS[self.clean](text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of one row of ids; special tokens are left out."""
        return str(self._engines[None].decode([int(i) for i in ids], skip_special_tokens=True))

    def pieces(self, text: str) -> list[str]:
        """Return the piece behind each id of the row, special tokens included, cut to the context."""
        return list(self._encode(text, self.context_length)[0].tokens)

    def words(self, text: str) -> list[WordSpan]:
        """Return the words of a text with the positions of their ids; words beyond the context are absent."""
        text = self._prepared(checked_texts(text)[0])
        (encoding,) = self._encode(text, self.context_length)
        spans: dict[int, tuple[int, int, int, int]] = {}  # word number -> characters and positions
        for position, (word, (start, stop)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
            if word is not None:
                first, _, begin, _ = spans.get(word, (start, stop, position, position))
                spans[word] = (first, stop, begin, position + 1)
        return [WordSpan(text[first:stop], begin, end) for first, stop, begin, end in spans.values()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for :func:`make_tokenizer`; they hold the whole vocabulary."""
        return {**self._settings(), "tokenizer": self._content}

    def save(self, directory: str | Path) -> dict[str, Any]:
        """Write ``tokenizer.json`` into a folder and return a short mapping that refers to it.

        ``make_tokenizer(mapping, directory=directory)`` reads it back.
        """
        path = Path(directory) / "tokenizer.json"
        path.write_text(json.dumps(self._content, ensure_ascii=False), encoding="utf-8")
        return {**self._settings(), "source": path.name}

    def _settings(self) -> dict[str, Any]:
        pad = self._engines[None].id_to_token(self.pad_id)
        settings = {"kind": self.kind, "context_length": self.context_length, "pad_token": pad}
        stated = {"clean": self.clean, "too_long": self.too_long}
        return settings | {name: value for name, value in stated.items() if value is not None}

    def __repr__(self) -> str:
        return f"HuggingFaceTokenizer(context_length={self.context_length}, vocab_size={self.vocab_size})"


def _read_huggingface(source: Any) -> tuple[dict[str, Any], int | None, str | None]:
    """Return the content of a ``tokenizer.json``, the context length and the padding token that go with it."""
    if isinstance(source, Mapping):
        return dict(source), None, None
    if isinstance(source, str | Path):
        path = find_package_file(str(source)) if is_package_source(source) else Path(source)
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.suffix == ".json" and file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise FileFormatError(f"`{file.name}` is not readable JSON: {type(error).__name__}") from error
            if not isinstance(content, dict):
                raise FileFormatError(f"`{file.name}` is not a tokenizer: expected a JSON object")
            return content, *_stated_beside(file.with_name("tokenizer_config.json"))
        if is_bert_folder(path):
            return read_bert_folder(path), *_stated_beside(path / "tokenizer_config.json")
        from transformers import AutoTokenizer

        try:
            source = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise InputError(
                f"no tokenizer at `{path.name}`: neither a folder with its files nor a name in the local cache",
                hint="give a folder that holds `tokenizer.json`",
            ) from error
    stated = getattr(source, "model_max_length", None)
    pad = getattr(source, "pad_token", None)
    engine = getattr(source, "backend_tokenizer", source)
    if not hasattr(engine, "to_str"):
        raise InputError(f"cannot make a tokenizer from {type(source).__name__}")
    return json.loads(engine.to_str()), _sane_context(stated), pad


def _stated_beside(config: Path) -> tuple[int | None, str | None]:
    """Context and padding token in ``tokenizer_config.json``: transformers obeys these, not ``tokenizer.json``.

    SigLIP pads with ``</s>`` although its vocabulary has ``<pad>``, and its text tower sees the padding.
    """
    try:
        stated = json.loads(config.read_text(encoding="utf-8"))
        pad = stated.get("pad_token")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        return _sane_context(stated.get("model_max_length")), pad if isinstance(pad, str) else None
    except (OSError, ValueError, AttributeError):
        return None, None


def _sane_context(value: object) -> int | None:
    # transformers writes 10^30 for "no limit"
    return int(value) if isinstance(value, int | float) and MIN_CONTEXT <= value <= 1_000_000 else None


def _without_surrogates(text: str) -> str:
    """Replace halves of surrogate pairs, which no file can hold, by ``�``."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
