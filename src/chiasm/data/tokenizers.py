"""Texts in, token ids with their lengths out: CLIP's byte pairs, or any tokenizer of the Hugging Face library.

Both pad on the right to the context length, keep their end token when they cut a text, and say which texts they cut.
Importing this module does not import torch; only calls that return tensors do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from chiasm.data.byte_pairs import FULL_START_ID, N_BYTE_IDS, BytePairs, split_words
from chiasm.data.huggingface_tokenizer import HuggingFaceTokenizer
from chiasm.data.mending import SIMPLE_BYTES, prepare_text
from chiasm.data.tokens import (
    Tokens,
    TruncationWarning,
    WordSpan,
    checked_context,
    checked_texts,
    to_tokens,
    warn_if_cut,
)
from chiasm.errors import ConfigError, InputError, UnknownName

if TYPE_CHECKING:
    import torch

__all__ = [
    "ClipTokenizer",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "Tokens",
    "TruncationWarning",
    "WordSpan",
    "make_tokenizer",
]

_SELF_CHECK = "accelerator_check.json"


@runtime_checkable
class Tokenizer(Protocol):
    """What text towers and tasks need of a tokenizer."""

    kind: str
    context_length: int
    pad_id: int

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        ...

    @property
    def eot_id(self) -> int | None:
        """The id that ends every text, where there is one."""
        ...

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """Return ids (n, context) as open_clip's tokenizers do; cut texts raise a ``TruncationWarning``."""
        ...

    def encode(self, texts: str | Sequence[str], context_length: int | None = None) -> Tokens:
        """Return ids, lengths and the rows that were cut."""
        ...

    def encode_ids(self, texts: str | Sequence[str]) -> list[list[int]]:
        """Return the ids of each text with its special tokens, neither cut nor padded, without torch."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of one row of ids; special tokens and padding are left out."""
        ...

    def pieces(self, text: str) -> list[str]:
        """Return the piece behind each id of the row, special tokens included, cut to the context."""
        ...

    def words(self, text: str) -> list[WordSpan]:
        """Return the words of a text with the positions of their ids; words beyond the context are absent."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values from which ``make_tokenizer`` makes an equal tokenizer, with no other file."""
        ...


def make_tokenizer(spec: Mapping[str, Any], *, directory: str | Path | None = None) -> Tokenizer:
    """Build a tokenizer from a mapping: ``to_dict`` of one, or what a recipe says.

    Args:
        spec: ``{"kind": "clip", "context_length": 77, "keep": [ids]}`` (all but ``kind`` optional), or
            ``{"kind": "huggingface", "source": folder, file or cached name, "context_length": n}`` with an
            optional ``pad_token``, ``clean`` and ``too_long``.
        directory: Where a relative ``source`` that exists there is looked up first, a model's folder say.

    Raises:
        ConfigError: An unknown field, or values that do not fit.
        UnknownName: An unknown ``kind``.
    """
    options = dict(spec)
    kind = str(options.pop("kind", ""))
    fields = {
        "clip": ("context_length", "keep"),
        "huggingface": ("source", "tokenizer", "context_length", "pad_token", "clean", "too_long"),
    }
    if kind not in fields:
        raise UnknownName("tokenizer kind", kind, fields, hint=f"one of: {', '.join(fields)}")
    for key in options:
        if key not in fields[kind]:
            raise ConfigError(f"unknown field `tokenizer.{key}`", hint=f"known fields: kind, {', '.join(fields[kind])}")
    context = options.get("context_length")
    if context is not None and (isinstance(context, bool) or not isinstance(context, int)):
        raise ConfigError(f"`tokenizer.context_length` must be an integer, got {type(context).__name__}")
    if kind == "clip":
        return ClipTokenizer(77 if context is None else context, keep=options.get("keep"))
    if ("source" in options) == ("tokenizer" in options):
        raise ConfigError("a Hugging Face tokenizer needs `tokenizer.source` (where it is) or its stored content")
    source = options.get("source", options.get("tokenizer"))
    if directory is not None and isinstance(source, str) and (Path(directory) / source).exists():
        source = Path(directory) / source
    stated = {name: options.get(name) for name in ("pad_token", "clean", "too_long")}
    return HuggingFaceTokenizer(source, context, **stated)


class ClipTokenizer:
    """The tokenizer of CLIP, with ids identical to open_clip's, and a smaller vocabulary for small models.

    Args:
        context_length: Ids of a row, special tokens included.
        keep: Ids of the merged pieces that exist (see :class:`~chiasm.data.byte_pairs.BytePairs`); None: all 48,894.
        accelerate: Use ``instant-clip-tokenizer`` for ASCII texts if it is installed and agrees on a self-check.

    Deviations from open_clip: cut texts are reported; no optional cleaning or masking strategies.
    """

    kind = "clip"
    pad_id = 0

    def __init__(self, context_length: int = 77, *, keep: Iterable[int] | None = None, accelerate: bool = True) -> None:
        self.context_length = checked_context(context_length)
        self._kept = None if keep is None else BytePairs(keep)
        self._accelerate = accelerate and keep is None

    @classmethod
    def compact_from(cls, texts: Iterable[str], context_length: int = 77) -> ClipTokenizer:
        """Return a tokenizer whose vocabulary holds only the pieces of ``texts``, their parts, and all bytes.

        It cuts these texts exactly as the full tokenizer does, and any other text into pieces it knows. A model trained
        from scratch on a few thousand reports then embeds about 1,500 ids in place of 49,408.
        """
        full = _full_pairs()
        seen: set[int] = set()
        for text in texts:
            seen.update(i for i in full.encode(text) if N_BYTE_IDS <= i < full.start_id)
        return cls(context_length, keep=sorted(seen))

    @property
    def _pairs(self) -> BytePairs:
        # The full vocabulary takes 0.1 s to read, which an accelerated tokenizer need not.
        return _full_pairs() if self._kept is None else self._kept

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: 49,408 for the full vocabulary."""
        return self.eot_id + 1

    @property
    def sot_id(self) -> int:
        """The id that starts every row."""
        return FULL_START_ID if self._kept is None else self._kept.start_id

    @property
    def eot_id(self) -> int:
        """The id that ends every text; the largest of all."""
        return self.sot_id + 1

    @property
    def keep(self) -> tuple[int, ...] | None:
        """Ids (of the full vocabulary) of the merged pieces that exist; None when all do."""
        return None if self._kept is None else self._kept.keep

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """Return ids (n, context) int64, padded with 0; texts that were cut raise a :class:`TruncationWarning`."""
        return warn_if_cut(self.encode(texts, context_length)).ids

    def encode(self, texts: str | Sequence[str], context_length: int | None = None) -> Tokens:
        """Return ids, lengths and the rows that were cut."""
        context = self.context_length if context_length is None else checked_context(context_length)
        rows = checked_texts(texts)
        columns = context + 1  # one id more, to see which texts do not fit
        fast = _accelerator() if self._accelerate and rows else None
        if fast is not None and _are_simple(rows):
            matrix: NDArray[Any] = fast.tokenize_batch(rows, context_length=columns)
            return to_tokens(matrix, self._lengths(matrix), context, end=self.eot_id)
        cleaned = [prepare_text(text) for text in rows]
        matrix = np.zeros((len(cleaned), columns), dtype=np.int64)
        lengths = np.zeros(len(cleaned), dtype=np.int64)
        remaining: Sequence[int] = range(len(cleaned))
        if fast is not None:
            ascii_rows = [i for i, text in enumerate(cleaned) if text.isascii()]
            remaining = [i for i, text in enumerate(cleaned) if not text.isascii()]
            if ascii_rows:
                ids = fast.tokenize_batch([cleaned[i] for i in ascii_rows], context_length=columns)
                matrix[ascii_rows], lengths[ascii_rows] = ids, self._lengths(ids)
        start, end = self.sot_id, self.eot_id
        for i in remaining:
            row = [start, *self._pairs.encode_cleaned(cleaned[i]), end]
            lengths[i] = len(row)
            matrix[i, : len(row)] = row[:columns]
        return to_tokens(matrix, lengths, context, end=end)

    def _lengths(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        """Ids of each row up to its last end token: a text may hold a literal one."""
        lengths: NDArray[np.int64] = ids.shape[1] - (ids[:, ::-1] == self.eot_id).argmax(axis=1)
        return lengths

    def encode_ids(self, texts: str | Sequence[str]) -> list[list[int]]:
        """Return the ids of each text between its special tokens, neither cut nor padded, without torch."""
        start, end, encode = [self.sot_id], [self.eot_id], self._pairs.encode
        return [start + encode(text) + end for text in checked_texts(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the cleaned, lower-cased text of one row of ids up to its end token, words separated by spaces."""
        row = [int(i) for i in ids]
        if row and row[0] == self.sot_id:
            row = row[1:]
        if self.eot_id in row:
            row = row[: row.index(self.eot_id)]
        for i in row:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return self._pairs.decode(row).strip()

    def pieces(self, text: str) -> list[str]:
        """Return the piece behind each id of the row, special tokens included, cut to the context."""
        (ids,) = self.encode_ids(text)
        if len(ids) > self.context_length:
            ids = [*ids[: self.context_length - 1], self.eot_id]
        return [self._pairs.piece(i) for i in ids]

    def words(self, text: str) -> list[WordSpan]:
        """Return the words of the cleaned text with the positions of their ids, cut to the context."""
        spans = []
        position, last = 1, self.context_length - 1
        for word in split_words(prepare_text(checked_texts(text)[0])):
            stop = position + len(self._pairs.encode_word(word))
            if position < last:
                spans.append(WordSpan(word, position, min(stop, last)))
            position = stop
        return spans

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for :func:`make_tokenizer`."""
        spec: dict[str, Any] = {"kind": self.kind, "context_length": self.context_length}
        return spec if self.keep is None else {**spec, "keep": list(self.keep)}

    def __repr__(self) -> str:
        return f"ClipTokenizer(context_length={self.context_length}, vocab_size={self.vocab_size})"


@lru_cache(maxsize=1)
def _full_pairs() -> BytePairs:
    return BytePairs()


def _are_simple(texts: list[str]) -> bool:
    """Whether no text is changed by the cleaning, as most batches are; without ``&``, which is looked at text by text."""
    joined = "\n".join(texts)
    return joined.isascii() and not joined.encode("ascii").translate(None, SIMPLE_BYTES)


@lru_cache(maxsize=1)
def _accelerator() -> Any | None:
    """Return the compiled tokenizer if it is installed and gives the stored ids of texts of every kind, else None."""
    try:
        import instant_clip_tokenizer
    except ImportError:
        return None
    fast = instant_clip_tokenizer.Tokenizer()
    stored = json.loads((files("chiasm.data") / "vocabulary" / _SELF_CHECK).read_text(encoding="ascii"))
    return fast if all(fast.encode(text) == ids for text, ids in stored) else None
