"""Texts of unequal lengths as one matrix without padding.

In: ids (batch, tokens) and the length of each text. Out: packs of texts, sorted by length, whose tokens stand one behind
the other. What works row by row (norms, linear layers) then never meets a padded row; attention runs once for every
length, on a contiguous slice. A batch is cut into packs by tokens, not by texts, so that memory stays even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.encoders.inference.blocks import split_heads

#: Rows of one pack: of a width of 768 and an MLP of 3,072 about 100 MiB while the pack is worked on.
MAX_ROWS = 8192


@dataclass(frozen=True)
class Pack:
    """Texts that are worked on at once.

    Attributes:
        texts: (n,) which texts of the batch they are, in the pack's order.
        groups: Numbers of texts and their common length, in the order of the rows.
        ids: (rows,) token ids.
        positions: (rows,) places in their text, from 0.
        firsts: (n,) row of each text's first token.
        lasts: (n,) row of each text's last token.
        seen: (n, 1, 1, tokens) booleans, which tokens of a text are seen, or (n, 1, tokens, tokens), which of them each
            token sees; where padding was kept. Such a pack has one group. None: all of them.
    """

    texts: Tensor
    groups: tuple[tuple[int, int], ...]
    ids: Tensor
    positions: Tensor
    firsts: Tensor
    lasts: Tensor
    seen: Tensor | None = None

    def attend(self, qkv: Tensor, heads: int, *, causal: bool) -> Tensor:
        """Let every token see its text: (rows, 3 · width) -> (rows, width).

        Args:
            qkv: Queries, keys and values side by side.
            heads: Attention heads.
            causal: Whether a token sees only itself and what precedes it, where ``seen`` does not say.
        """
        causal = causal and self.seen is None

        def one(rows: Tensor, texts: int) -> Tensor:
            q, k, v = split_heads(rows, texts, heads, 3)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen, is_causal=causal)
            return out.transpose(1, 2).reshape(len(rows), -1)

        return self._by_group(one, qkv)

    def attend_one(self, query: Tensor, keys_values: Tensor, heads: int) -> Tensor:
        """Let one query a text see all of it, or what its last token sees: (n, width), (rows, 2 · width) -> (n, width)."""
        seen = None if self.seen is None else self.seen[:, :, -1:]
        asking = iter(torch.split(query, [texts for texts, _ in self.groups]))

        def one(rows: Tensor, texts: int) -> Tensor:
            (q,) = split_heads(next(asking), texts, heads, 1)
            k, v = split_heads(rows, texts, heads, 2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).reshape(texts, -1)

        return self._by_group(one, keys_values)

    def sums(self, x: Tensor) -> Tensor:
        """Add up the rows of each text: (rows, width) -> (n, width)."""
        return self._by_group(lambda rows, texts: rows.view(texts, -1, rows.shape[1]).sum(1), x)

    def means(self, x: Tensor) -> Tensor:
        """Average the rows of each text: (rows, width) -> (n, width)."""
        return self._by_group(lambda rows, texts: rows.view(texts, -1, rows.shape[1]).mean(1), x)

    def _by_group(self, work: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
        if len(self.groups) == 1:
            return work(x, self.groups[0][0])
        parts = torch.split(x, [texts * length for texts, length in self.groups])
        return torch.cat([work(part, texts) for part, (texts, _) in zip(parts, self.groups, strict=True)])


def ragged_packs(ids: Tensor, lengths: Tensor, max_rows: int = MAX_ROWS) -> Iterator[Pack]:
    """Cut a batch into packs without padding.

    Args:
        ids: (batch, tokens), at least one text.
        lengths: (batch,), each from 1 to ``tokens``.
        max_rows: Tokens of a pack, unless a single text has more.
    """
    ordered, order = lengths.sort(stable=True)
    counts = ordered.tolist()
    for start, stop in _cuts(counts, max_rows):
        texts, sizes, here = order[start:stop], ordered[start:stop], counts[start:stop]
        places = torch.arange(here[-1]).expand(stop - start, -1)
        kept = places < sizes[:, None]
        ends = sizes.cumsum(0)
        groups = tuple((len(list(same)), length) for length, same in groupby(here))
        cut = ids[texts, : here[-1]]
        yield Pack(texts, groups, cut[kept], places[kept], ends - sizes, ends - 1)


def padded_packs(ids: Tensor, lengths: Tensor | None, max_rows: int = MAX_ROWS) -> Iterator[Pack]:
    """Cut a batch into packs that keep all columns.

    Args:
        ids: (batch, tokens), at least one text and one token.
        lengths: (batch,) hides what stands behind each text; None: padding is seen like any token.
        max_rows: See :func:`ragged_packs`.
    """
    tokens = ids.shape[1]
    places = torch.arange(tokens)
    seen = None if lengths is None or int(lengths.min()) == tokens else places < lengths[:, None]
    for texts in torch.split(torch.arange(len(ids)), max(1, max_rows // tokens)):
        firsts = torch.arange(len(texts)) * tokens
        yield Pack(
            texts,
            ((len(texts), tokens),),
            ids[texts].flatten(),
            places.repeat(len(texts)),
            firsts,
            firsts + tokens - 1,
            None if seen is None else seen[texts, None, None],
        )


def in_order(packs: Iterator[Pack], work: Callable[[Pack], Tensor], texts: int) -> Tensor:
    """Return what ``work`` gives for each text of each pack, (n, dim), in the order of the batch: (texts, dim)."""
    found = [(pack.texts, work(pack)) for pack in packs]
    rows = torch.cat([part for _, part in found]) if len(found) > 1 else found[0][1]
    order = torch.cat([part for part, _ in found]) if len(found) > 1 else found[0][0]
    return torch.empty_like(rows).index_copy_(0, order, rows) if texts > 1 else rows


def _cuts(counts: Sequence[int], max_rows: int) -> Iterator[tuple[int, int]]:
    """Cut sorted lengths where their sum would exceed ``max_rows``."""
    start = total = 0
    for i, count in enumerate(counts):
        if total + count > max_rows and i > start:
            yield start, i
            start, total = i, 0
        total += count
    yield start, len(counts)
