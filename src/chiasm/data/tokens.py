"""What every tokenizer returns, and the checks that all of them make. Importing this module does not import torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch

MIN_CONTEXT = 3  # start, one piece, end


class TruncationWarning(UserWarning):
    """Texts were longer than the context and lost their ends."""


class Tokens(NamedTuple):
    """A batch of token ids.

    Attributes:
        ids: int64, shape (n, context), padded on the right.
        lengths: int64, shape (n,): ids of each row that are not padding, special tokens included.
        truncated: Rows whose text was too long and lost its end.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    truncated: tuple[int, ...] = ()

    @property
    def mask(self) -> torch.Tensor:
        """1 where an id belongs to the text, 0 where it is padding: int64, shape (n, context)."""
        import torch

        return (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()


class WordSpan(NamedTuple):
    """One word of a text and the positions ``start`` (inclusive) to ``stop`` (exclusive) of its ids in the row."""

    word: str
    start: int
    stop: int


def checked_context(context_length: int) -> int:
    """Return a context length that leaves room for a text; a shorter one raises ``ConfigError``."""
    if context_length < MIN_CONTEXT:
        raise ConfigError(f"a context length must be at least {MIN_CONTEXT}, got {context_length}")
    return context_length


def checked_texts(texts: str | Sequence[str]) -> list[str]:
    """Return the texts as a list; anything but strings raises ``InputError`` with its position and type."""
    if isinstance(texts, str):
        return [texts]
    rows = list(texts)
    for i, text in enumerate(rows):
        if not isinstance(text, str):
            raise InputError(f"text {i} is of type {type(text).__name__}, expected str")
    return rows


def to_tokens(matrix: NDArray[Any], lengths: NDArray[np.int64], context: int, *, end: int | None = None) -> Tokens:
    """Cut rows to the context, put the end token last in those that were cut, and wrap all as tensors."""
    import torch

    cut = np.flatnonzero(lengths > context)
    ids = np.array(matrix[:, :context], dtype=np.int64, order="C")
    if end is not None:
        ids[cut, -1] = end
    return Tokens(torch.from_numpy(ids), torch.from_numpy(np.minimum(lengths, context)), tuple(int(i) for i in cut))


def warn_if_cut(tokens: Tokens) -> Tokens:
    """Return the tokens, after a :class:`TruncationWarning` in the caller's caller if any text was cut."""
    if tokens.truncated:
        warnings.warn(
            f"{len(tokens.truncated)} of {len(tokens.ids)} texts are longer than the context of "
            f"{tokens.ids.shape[1]} tokens and lost their ends (first: row {tokens.truncated[0]})",
            TruncationWarning,
            stacklevel=3,
        )
    return tokens
