"""CLIP's text transformer.

In: token ids (batch, tokens) and, where known, the lengths of the texts. Out: (batch, output_dim). Under the causal
mask nothing behind a text's last token can change its embedding, so the batch is cut to its longest text, which is
exact. Where padding is seen (no causal mask, pooling at the last position) the full context runs.

OpenAI's layout keeps the parts of this tower at the top of the state dict, beside ``visual``; hence the forward pass is
a function of any module that holds the parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor, nn

from chiasm.encoders.base import TextTowerConfig
from chiasm.encoders.transformer import LayerNorm, Transformer, init_standard
from chiasm.errors import InputError

TEXT_PARTS = ("token_embedding", "positional_embedding", "cls_emb", "transformer", "ln_final", "text_projection")


@dataclass(frozen=True)
class TextPlan:
    """How a native text tower reads its tokens.

    Attributes:
        context_length: Longest text, special tokens included.
        eot_id: The end-of-text token where lengths are not given: the largest id, as in CLIP's vocabulary.
        pool: Which position, or mean of positions, is the text.
        causal: Whether a token sees only what precedes it.
        cls_mask: What the appended token sees, see :class:`TextTowerConfig`.
    """

    context_length: int
    eot_id: int
    pool: Literal["eot", "cls", "mean", "last", "appended"]
    causal: bool
    cls_mask: Literal["published", "correct"] = "published"

    @property
    def can_trim(self) -> bool:
        """Whether cutting the batch to its longest text is exact."""
        return self.causal and self.pool in ("eot", "mean")


class TextParts(Protocol):
    """A module that holds the parts of a native text tower (``TextTransformer``, ``DualEncoder``)."""

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    cls_emb: Any
    transformer: Transformer
    ln_final: LayerNorm
    text_projection: nn.Parameter | None
    text_plan: TextPlan


def text_features(parts: TextParts, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return the embeddings of texts, not normalised: (batch, output_dim).

    Args:
        parts: The weights.
        ids: (batch, tokens) integers, at most ``context_length`` tokens. For ``appended`` one column of padding more is
            the place that some tokenizers keep for the appended token (CONCH's); it is dropped.
        lengths: (batch,) tokens of each text, special tokens included. None: up to the first end-of-text token.

    Raises:
        InputError: Ids of a wrong shape, lengths outside of them, or no end-of-text token where lengths are missing.
    """
    plan = parts.text_plan
    ids, lengths = check_texts(ids, lengths, plan)
    if plan.can_trim and lengths is not None and len(ids):
        ids = ids[:, : int(lengths.max())]
    if plan.pool == "appended":
        ids = without_unseen(ids)
    x, mask = parts.token_embedding(ids) + parts.positional_embedding[: ids.shape[1]], None
    if plan.pool == "appended":
        own = parts.cls_emb.to(x.dtype) + parts.positional_embedding[-1]
        x = torch.cat([x, own.expand(len(x), 1, -1)], dim=1)
        mask = appended_mask(ids, plan.cls_mask)
    if plan.pool in ("eot", "last", "appended"):  # one token is read: the last block makes no other
        rows = lengths - 1 if plan.pool == "eot" and lengths is not None else _last_rows(x)
        x = parts.transformer(x, causal=plan.causal, mask=mask, last="row", rows=rows)
        pooled = _norm(parts, x[:, 0])
    else:
        x = parts.transformer(x, causal=plan.causal, mask=mask)
        pooled = _pool(parts, x, lengths)
    return pooled if parts.text_projection is None else pooled @ parts.text_projection


def check_texts(ids: Tensor, lengths: Tensor | None, plan: TextPlan) -> tuple[Tensor, Tensor | None]:
    """Return the ids as the tower reads them, and the lengths: found where they are missing, None where unused.

    Raises:
        InputError: As :func:`text_features`.
    """
    if plan.pool == "appended" and ids.ndim == 2 and ids.shape[1] == plan.context_length + 1 and not ids[:, -1].any():
        ids = ids[:, :-1]
    _check_ids(ids, plan)
    if plan.pool not in ("eot", "mean"):
        return ids, None
    return ids, check_lengths(ids, lengths) if lengths is not None else lengths_from_eot(ids, plan.eot_id)


def appended_mask(ids: Tensor, kind: Literal["published", "correct"]) -> Tensor:
    """Return what each position of a text with CoCa's appended token sees: (batch, 1, tokens + 1, tokens + 1) booleans.

    Padding is the id 0, as in open_clip (``TextTransformer._build_additive_mask``). ``published`` is its mask, which
    says of each position what holds for the one before it; all its CoCa weights were trained with it.
    """
    own = torch.ones_like(ids[:, :1], dtype=torch.bool)
    seen = torch.cat([own, ids != 0] if kind == "published" else [ids != 0, own], dim=1)
    causal = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=ids.device).tril()
    return (causal & seen[:, None, :])[:, None]


def without_unseen(ids: Tensor) -> Tensor:
    """Return the ids without the columns that no text and no appended token sees: padding behind the first one.

    Exact: the columns are those of the longest text and one more, which the published mask shows to the appended token.
    """
    used = (ids != 0).any(0).nonzero()
    columns = int(used.max()) + 2 if len(used) else 1
    return ids[:, :columns]


def lengths_from_eot(ids: Tensor, eot_id: int) -> Tensor:
    """Return the number of tokens up to and including the first ``eot_id`` of each row."""
    found = ids == eot_id
    if len(ids) and not bool(found.any(1).all()):
        raise InputError(
            f"a text has no end-of-text token {eot_id}, and no lengths are given",
            hint="pass `lengths`, as `tokenizer.encode` returns them",
        )
    return found.int().argmax(1) + 1


def check_lengths(ids: Tensor, lengths: Tensor) -> Tensor:
    """Return lengths on the device of ``ids``; raise ``InputError`` when they do not fit."""
    if lengths.shape != ids.shape[:1]:
        raise InputError(f"lengths have shape {tuple(lengths.shape)}, expected ({len(ids)},)")
    if len(ids) and (int(lengths.min()) < 1 or int(lengths.max()) > ids.shape[1]):
        raise InputError(
            f"lengths run from {int(lengths.min())} to {int(lengths.max())}, the texts have {ids.shape[1]} tokens"
        )
    return lengths.to(ids.device)


def _check_ids(ids: Tensor, plan: TextPlan) -> None:
    if ids.ndim != 2 or ids.is_floating_point():
        raise InputError(f"token ids must be integers of shape (batch, tokens), got {ids.dtype} {tuple(ids.shape)}")
    if ids.shape[1] > plan.context_length:
        raise InputError(
            f"texts have {ids.shape[1]} tokens, the tower reads at most {plan.context_length}",
            hint="tokenise with the encoder's own tokenizer",
        )
    if not plan.can_trim and ids.shape[1] != plan.context_length:
        raise InputError(
            f"texts have {ids.shape[1]} tokens, but this tower sees its padding and needs {plan.context_length}",
            hint="tokenise with the encoder's own tokenizer",
        )


def _last_rows(x: Tensor) -> Tensor:
    return torch.full((len(x),), x.shape[1] - 1, device=x.device)


def _pool(parts: TextParts, x: Tensor, lengths: Tensor | None) -> Tensor:
    if parts.text_plan.pool == "cls":
        return _norm(parts, x[:, 0])
    assert lengths is not None
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    total = torch.where(inside[..., None], _norm(parts, x), 0).sum(1)
    return total / lengths[:, None]


def _norm(parts: TextParts, x: Tensor) -> Tensor:
    normed: Tensor = parts.ln_final(x)
    return normed


class TextTransformer(nn.Module):
    """The text tower of CLIP on its own (Radford et al. 2019 and 2021).

    Args:
        config: Its shape; ``kind`` must be ``clip``.
        output_dim: Dimensions of the joint space; None leaves the projection out.

    Attributes:
        output_dim: Dimensions of the output.
    """

    def __init__(self, config: TextTowerConfig, output_dim: int | None) -> None:
        super().__init__()
        width = config.width
        self.text_plan = TextPlan(
            config.context_length,
            config.vocab_size - 1,
            config.pool,  # type: ignore[arg-type]
            config.causal,
            config.cls_mask or "published",
        )
        eps = 1e-5 if config.ln_eps is None else config.ln_eps
        appended = config.pool == "appended"
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length + appended, width))
        self.cls_emb = nn.Parameter(torch.empty(width)) if appended else None
        self.transformer = Transformer(
            width,
            config.layers,
            config.attention_heads,
            mlp_ratio=config.mlp_ratio,
            activation=config.activation,
            ln_eps=eps,
        )
        self.ln_final = LayerNorm(width, eps=eps)
        self.text_projection = None if output_dim is None else nn.Parameter(torch.empty(width, output_dim))
        self.output_dim = output_dim or width

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the embeddings (batch, output_dim), not normalised; see :func:`text_features`."""
        return text_features(self, ids, lengths)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See :meth:`Transformer.set_grad_checkpointing`."""
        self.transformer.set_grad_checkpointing(enable)

    def init_weights(self, generator: Generator) -> None:
        """Draw all weights by OpenAI's scheme.

        Token embedding N(0, 0.02²), positions N(0, 0.01²), projection N(0, 1/width), blocks as in GPT-2 with
        residual scaling (:meth:`Transformer.init_weights`).
        """
        with torch.no_grad():
            self.token_embedding.weight.normal_(std=0.02, generator=generator)
            self.positional_embedding.normal_(std=0.01, generator=generator)
            if self.cls_emb is not None:
                self.cls_emb.normal_(std=0.01, generator=generator)
            init_standard(self.ln_final, generator)
            if self.text_projection is not None:
                self.text_projection.normal_(std=self.transformer.width**-0.5, generator=generator)
        self.transformer.init_weights(generator, scaled=True)

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return what still trains when the tower is locked."""
        return [] if self.text_projection is None else [self.text_projection]
