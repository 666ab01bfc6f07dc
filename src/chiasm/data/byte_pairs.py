"""CLIP's byte-pair encoding: a text in, token ids out, identical to open_clip's ``SimpleTokenizer``.

The text is cleaned, lower-cased and split into words; each word is encoded once and remembered, so most of the time
goes into one regular expression. The merges of new words are done by the compiled ``tokenizers`` library. Nothing here
needs torch.

The vocabulary is OpenAI's, MIT-licensed, carried unchanged in ``vocabulary/`` (see NOTICE): 256 bytes, the same 256 at
the end of a word, 48,894 merges and two special tokens.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

from chiasm.data.mending import prepare_text
from chiasm.errors import ConfigError

START = "<start_of_text>"
END = "<end_of_text>"
N_BYTES = 256
N_MERGES = 48_894
#: Ids below this are single bytes, inside a word or at its end; they belong to every vocabulary.
N_BYTE_IDS = 2 * N_BYTES
#: Of the full vocabulary; the end token is the next.
FULL_START_ID = N_BYTE_IDS + N_MERGES

_VOCABULARY_BYTES = 1 << 20
_WORD_END = "</w>"
_CONTRACTIONS = f"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d"
_ASCII_WORDS = re.compile(_CONTRACTIONS + r"|[a-z]+|[0-9]|[^\sa-z0-9]+")
_REMEMBERED_WORDS = 200_000


def split_words(text: str) -> list[str]:
    """Return the words of a cleaned text as CLIP's pattern cuts them: letters, single digits, runs of anything else."""
    if text.isascii():
        return _ASCII_WORDS.findall(text)
    return list(_unicode_words().findall(text))


@lru_cache(maxsize=1)
def _unicode_words() -> Any:
    # The peer's own engine: it knows \p{L} and \p{N}, and which letters (ſ) match 's when case is ignored.
    import regex

    return regex.compile(_CONTRACTIONS + r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@lru_cache(maxsize=1)
def _symbols() -> dict[int, str]:
    """Return the visible character that stands for each of the 256 bytes, in the order of their ids."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(N_BYTES) if byte not in visible]
    return {**{byte: chr(byte) for byte in visible}, **{byte: chr(N_BYTES + i) for i, byte in enumerate(hidden)}}


@lru_cache(maxsize=1)
def _byte_of_symbol() -> dict[str, int]:
    return {symbol: byte for byte, symbol in _symbols().items()}


@lru_cache(maxsize=1)
def read_merges() -> tuple[tuple[str, str], ...]:
    """Return the 48,894 merges of CLIP's vocabulary, in order of rank."""
    packed = (files("chiasm.data") / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    # The file goes on with merges that CLIP does not use; what is used ends at half of this.
    text = zlib.decompressobj(wbits=31).decompress(packed, _VOCABULARY_BYTES).decode("utf-8", errors="ignore")
    symbols = text.partition("\n")[2].split(maxsplit=2 * N_MERGES)
    return tuple(zip(symbols[: 2 * N_MERGES : 2], symbols[1 : 2 * N_MERGES : 2], strict=True))


@lru_cache(maxsize=1)
def _id_of_merge() -> dict[str, int]:
    return {left + right: N_BYTE_IDS + i for i, (left, right) in enumerate(read_merges())}


def close_over_parts(ids: Iterable[int]) -> tuple[int, ...]:
    """Return the merges among ``ids`` of the full vocabulary with every merge that they are built from, sorted.

    Every piece of CLIP's vocabulary is made by exactly one merge, so its parts are well defined.
    """
    merges, id_of = read_merges(), _id_of_merge()
    closed: set[int] = set()
    waiting = [i for i in ids if i >= N_BYTE_IDS]
    while waiting:
        i = waiting.pop()
        if i in closed:
            continue
        if not 0 <= i - N_BYTE_IDS < N_MERGES:
            raise ConfigError(f"token id {i} is not in CLIP's vocabulary; ids of merges are 512 to 49405")
        closed.add(i)
        waiting.extend(id_of[part] for part in merges[i - N_BYTE_IDS] if part in id_of)
    return tuple(sorted(closed))


class BytePairs:
    """Byte-pair encoding with CLIP's merges, or with some of them.

    With ``keep``, only those merges (and the ones they are built from) exist. A word whose pieces are all kept is cut
    exactly as by the full vocabulary, because every merge on the way to a kept piece is kept, in the same order. Any
    other word still splits into kept pieces, single bytes in the worst case. The ids are numbered anew in the old
    order, so bytes keep theirs and the end-of-text token stays the largest.

    Args:
        keep: Ids (of the full vocabulary) of the merged pieces to keep; bytes and special tokens always are. None: all.
    """

    def __init__(self, keep: Iterable[int] | None = None) -> None:
        merges = read_merges()
        self.keep = None if keep is None else close_over_parts(keep)
        self.merges = merges if self.keep is None else tuple(merges[i - N_BYTE_IDS] for i in self.keep)
        symbols = _symbols().values()
        self.pieces = [*symbols, *(s + _WORD_END for s in symbols), *(a + b for a, b in self.merges)]
        self.start_id = len(self.pieces)
        self.end_id = self.start_id + 1
        self.size = self.start_id + 2
        self._ids_of_word = _WordIds(self)

    def encode(self, text: str) -> list[int]:
        """Return the ids of any text, without special tokens (but a literal ``<end_of_text>`` becomes one)."""
        return self.encode_cleaned(prepare_text(text))

    def encode_cleaned(self, text: str) -> list[int]:
        """Return the ids of a text that :func:`prepare_text` or :func:`clean_text` returned."""
        ids: list[int] = []
        for word in split_words(text):
            ids += self._ids_of_word[word]
        return ids

    def encode_word(self, word: str) -> list[int]:
        """Return the ids of one word of :func:`split_words`."""
        return list(self._ids_of_word[word])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, words separated by spaces; special tokens are left out."""
        return b"".join(self._bytes_of(i, ending=b" ") for i in ids if i < self.start_id).decode("utf-8", "replace")

    def piece(self, i: int) -> str:
        """Return one piece for the eye; bytes that are no character of their own appear as ``�``."""
        if i >= self.start_id:
            return START if i == self.start_id else END
        return self._bytes_of(i, ending=b"").decode("utf-8", "replace")

    def _bytes_of(self, i: int, *, ending: bytes) -> bytes:
        piece = self.pieces[i]
        at_end = piece.endswith(_WORD_END)
        symbols = piece.removesuffix(_WORD_END)
        return bytes(map(_byte_of_symbol().__getitem__, symbols)) + (ending if at_end else b"")

    @cached_property
    def model(self) -> Any:
        """The compiled encoder, made when the first unknown word is met."""
        from tokenizers.models import BPE

        vocabulary = {piece: i for i, piece in enumerate(self.pieces)}
        return BPE(vocabulary, list(self.merges), end_of_word_suffix=_WORD_END, continuing_subword_prefix="")


class _WordIds(dict[str, list[int]]):
    """Ids by word; a missing word is encoded and remembered."""

    def __init__(self, pairs: BytePairs) -> None:
        super().__init__({START: [pairs.start_id], END: [pairs.end_id]})
        self._pairs = pairs

    def __missing__(self, word: str) -> list[int]:
        symbols = _symbols()
        ids = [token.id for token in self._pairs.model.tokenize("".join(symbols[b] for b in word.encode("utf-8")))]
        if len(self) < _REMEMBERED_WORDS:
            self[word] = ids
        return ids
