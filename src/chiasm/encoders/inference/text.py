"""CLIP's text transformer for inference: packed layers, no padding, and of the last block what is pooled.

In: token ids (batch, tokens) and, where known, lengths. Out: (batch, output_dim), float32, as
:func:`chiasm.encoders.text.text_features` gives them.

Padding is left out only where the tower's plan says that nobody sees it (:attr:`TextPlan.can_trim`). Every other tower
runs on its full context (with CoCa's appended token, on what that sees); there, too, the last block works out only the
position that is pooled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from chiasm.encoders.inference.blocks import pack_blocks
from chiasm.encoders.inference.packed import NotPackable, require_plain
from chiasm.encoders.inference.ragged import Pack, in_order, padded_packs, ragged_packs
from chiasm.encoders.text import TextParts, TextPlan, appended_mask, check_texts, text_features, without_unseen
from chiasm.encoders.transformer import LayerNorm


class PackedText:
    """A native text tower with packed weights; embeddings, positions, the last norm and the projection are shared.

    Args:
        parts: A :class:`TextTransformer`, or a :class:`DualEncoder` that holds its parts. Its weights are copied.
        dtype: Of the linear layers in the blocks.

    Raises:
        NotPackable: A part of it is not chiasm's own.
    """

    def __init__(self, parts: TextParts, *, dtype: torch.dtype) -> None:
        self._plan = plan = parts.text_plan
        if plan.causal and plan.pool == "cls":
            raise NotPackable("a first token that sees only itself")
        require_plain(parts.token_embedding, nn.Embedding)
        require_plain(parts.ln_final, LayerNorm)
        if parts.token_embedding.max_norm is not None:
            raise NotPackable("the token embedding rescales its rows")
        self._parts = parts
        self._few = plan.pool != "mean"
        self._blocks = pack_blocks(parts.transformer, dtype=dtype, few=self._few)

    def __call__(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the embeddings (batch, output_dim), float32, not normalised.

        Raises:
            InputError: As :func:`text_features`.
        """
        plan = self._plan
        ids, lengths = check_texts(ids, lengths, plan)
        if not len(ids):
            return text_features(self._parts, ids, lengths)
        if plan.can_trim:
            assert lengths is not None
            return in_order(ragged_packs(ids, lengths), self._embed, len(ids))
        if plan.pool == "appended":
            return in_order(_appended_packs(without_unseen(ids), plan), self._embed, len(ids))
        return in_order(padded_packs(ids, None), partial(self._embed, lengths=lengths), len(ids))

    def _embed(self, pack: Pack, lengths: Tensor | None = None) -> Tensor:
        """Return the embeddings of a pack's texts; ``lengths`` of the whole batch where padding was kept."""
        parts, plan = self._parts, self._plan
        x = parts.token_embedding(pack.ids) + parts.positional_embedding[pack.positions]
        if plan.pool == "appended":
            own = (parts.cls_emb + parts.positional_embedding[-1]).expand(len(pack.texts), 1, -1)
            x = torch.cat([x.view(len(pack.texts), -1, x.shape[1]), own], dim=1).flatten(0, 1)
        for block in self._blocks[: -1 if self._few else None]:
            x = block.all(x, partial(pack.attend, heads=block.heads, causal=plan.causal))
        if self._few:
            last = self._blocks[-1]
            x = last.few(x, self._pooled_rows(pack, lengths), partial(pack.attend_one, heads=last.heads))
            pooled: Tensor = parts.ln_final(x)
        elif lengths is None:
            pooled = pack.means(parts.ln_final(x))
        else:
            pooled = _means_inside(parts.ln_final(x).view(len(pack.texts), -1, x.shape[1]), lengths[pack.texts])
        return pooled if parts.text_projection is None else pooled @ parts.text_projection

    def _pooled_rows(self, pack: Pack, lengths: Tensor | None) -> Tensor:
        if self._plan.pool == "cls":
            return pack.firsts
        if self._plan.pool == "eot" and lengths is not None:
            return pack.firsts + lengths[pack.texts] - 1
        return pack.lasts


def _appended_packs(ids: Tensor, plan: TextPlan) -> Iterator[Pack]:
    """Yield packs of texts that a token of their own stands behind: it has a row, but neither id nor position."""
    for pack in padded_packs(ids, None):
        rows = ids.shape[1] + 1
        firsts = torch.arange(len(pack.texts)) * rows
        yield replace(
            pack,
            groups=((len(pack.texts), rows),),
            firsts=firsts,
            lasts=firsts + rows - 1,
            seen=appended_mask(ids[pack.texts], plan.cls_mask),
        )


def _means_inside(x: Tensor, lengths: Tensor) -> Tensor:
    """Average (n, tokens, width) over each text's own tokens."""
    inside = torch.arange(x.shape[1]) < lengths[:, None]
    return torch.where(inside[..., None], x, 0).sum(1) / lengths[:, None]
