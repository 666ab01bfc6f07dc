"""Learned vectors in front of class names, read by a frozen text tower: what ``train.prompt_tuning`` trains.

In: an encoder, class names, settings. Out: unit directions of the classes, differentiable in the vectors.

The vectors enter where the tower looks up its tokens, so every tower with a table of token embeddings can be tuned:
CLIP's own, and the BERT-like ones. A tower without one, and an ensemble of several, cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chiasm.encoders.face import Encoder
from chiasm.errors import ConfigError, InputError

#: What training starts from, unless the settings say otherwise: of presence, and of absence.
INITIAL = {"single": ("an image of",), "multi": ("evidence of", "no evidence of")}
SIDES = ("positive", "negative")


@dataclass(frozen=True)
class TuningConfig:
    """How prompts are learned.

    Attributes:
        mode: ``single``: classes exclude each other. ``multi``: any number of labels can be true.
        vectors: Learned vectors that start as noise; 0: they start as ``initial``.
        initial: Words that the vectors start from; for ``multi`` those of presence and those of absence.
        class_specific: Vectors of its own for every class.
        suffix: Behind the class name.
        learning_rate: Of AdamW, falling as a cosine.
        epochs: Passes over the training rows, at most.
        patience: Epochs without a lower validation loss before training ends.
        batch_size: Images a step.
        validation: Share of the rows, by whole patients, that chooses the epoch.
        anchor: Weight of KgCoOp's regulariser (8 in the paper); 0: none.
        seed: Of noise, order and the held-out patients.

    Raises:
        ConfigError: A value outside its range.
    """

    mode: Literal["single", "multi"] = "single"
    vectors: int = 0
    initial: tuple[str, ...] = ()
    class_specific: bool = False
    suffix: str = "."
    learning_rate: float = 2e-3
    epochs: int = 60
    patience: int = 10
    batch_size: int = 32
    validation: float = 0.25
    anchor: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("vectors", 0), ("epochs", 1), ("patience", 1), ("batch_size", 1), ("anchor", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"`tuning.{name}` must be at least {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0 or not 0 < self.validation < 1:
            raise ConfigError("`tuning.learning_rate` must be positive and `tuning.validation` a share below 1")
        if self.mode not in INITIAL:
            raise ConfigError(f"`tuning.mode` must be single or multi, got `{self.mode}`")
        if self.initial and len(self.initial) != len(self.sides):
            raise ConfigError(f"`tuning.initial` needs {len(self.sides)} texts in mode `{self.mode}`")
        if self.vectors and self.anchor:
            raise ConfigError("`tuning.anchor` holds prompts near words, but `tuning.vectors` starts from noise")

    @property
    def sides(self) -> tuple[str, ...]:
        """Which sets of vectors there are."""
        return SIDES[: len(INITIAL[self.mode])]

    @property
    def starts(self) -> tuple[str, ...]:
        """The words of each side."""
        return self.initial or INITIAL[self.mode]


class PromptWriter:
    """Learned vectors in front of class names, through the text tower.

    Args:
        encoder: Whose text tower reads them.
        spoken: The class names.
        config: How many vectors, and what they start from.

    Attributes:
        contexts: Side -> the learned vectors (1 or labels, vectors, width), which require gradients.

    Raises:
        InputError: The tower has no table of token embeddings, or a prompt is longer than its context.
    """

    def __init__(self, encoder: Encoder, spoken: Sequence[str], config: TuningConfig) -> None:
        self.encoder, self.config = encoder, config
        self.table = token_table(encoder)
        tokenizer = encoder.tokenizer
        # Towers begin a text with a special token (CLIP, BERT) or with its first word (SigLIP, T5).
        empty, one, other = tokenizer.encode_ids(["", "no", "image"])
        self.start = int(one[0] == other[0])
        ends = len(empty) - self.start
        padding = int(tokenizer.encode(["x"]).ids[0, -1])
        generator = torch.Generator().manual_seed(config.seed)
        self.contexts: dict[str, Tensor] = {}
        self._tokens: dict[str, tuple[Tensor, Tensor]] = {}
        weight = self.table.weight.detach()
        for side, words in zip(config.sides, config.starts, strict=True):
            inner = tokenizer.encode_ids([words])[0][self.start :]
            inner = inner[: len(inner) - ends] if ends > 0 else inner
            placed = inner[:1] * config.vectors if config.vectors else inner
            rows = [ids[: self.start] + placed + ids[self.start :] for ids in self._names(spoken)]
            self._tokens[side] = self._padded(rows, padding)
            if config.vectors:
                noise = torch.randn(len(placed), weight.shape[1], generator=generator) * float(weight.std())
                start = noise.to(weight)
            else:
                start = weight[torch.tensor(placed, device=weight.device)]
            count = len(spoken) if config.class_specific else 1
            self.contexts[side] = start.expand(count, -1, -1).clone().requires_grad_()

    def directions(self) -> list[Tensor]:
        """Return unit vectors (labels, dim) of each side."""
        found = []
        for side, context in self.contexts.items():
            ids, lengths = self._tokens[side]
            with replaced_tokens(self.table, context, self.start):
                found.append(self.encoder.model.encode_text(ids, lengths, normalize=True))
        return found

    def _names(self, spoken: Sequence[str]) -> list[list[int]]:
        return [
            list(ids) for ids in self.encoder.tokenizer.encode_ids([f"{name}{self.config.suffix}" for name in spoken])
        ]

    def _padded(self, rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
        room = self.encoder.tokenizer.context_length
        longest = max(map(len, rows))
        if longest > room:
            raise InputError(
                f"a prompt with its learned vectors has {longest} tokens, the text tower reads {room}",
                hint="use fewer vectors, or a shorter name",
            )
        ids = torch.tensor([row + [padding] * (room - len(row)) for row in rows], device=self.encoder.device)
        return ids, torch.tensor([len(row) for row in rows], device=self.encoder.device)


def token_table(encoder: Encoder) -> nn.Embedding:
    """Return the table of token embeddings of an encoder's text tower.

    Raises:
        InputError: The encoder has no text side, is an ensemble, or its tower has no such table.
    """
    model = encoder.model
    if not encoder.config.has_text:
        raise InputError(f"`{encoder.name}` has no text side, so it has no prompts to tune")
    if encoder.members > 1:
        raise InputError(f"`{encoder.name}` is an ensemble of {encoder.members} models", hint="tune one of its members")
    table = getattr(model, "token_embedding", None) if model.text is None else None
    modules = [] if model.text is None else list(model.text.modules())
    for module in modules:
        own = getattr(module, "token_embedding", None)
        getter = getattr(module, "get_input_embeddings", None)
        table = table or (own if isinstance(own, nn.Embedding) else getter() if callable(getter) else None)
    if not isinstance(table, nn.Embedding):
        raise InputError(
            f"the text tower of `{encoder.name}` has no table of token embeddings that prompts could be written into",
            hint="CLIP's own towers and those of transformers have one; `chiasm prompts search` works with any",
        )
    return table


@contextmanager
def replaced_tokens(table: nn.Embedding, context: Tensor, start: int) -> Iterator[None]:
    """Put vectors in place of the token embeddings from position ``start`` on, whatever the ids there are.

    Args:
        table: Of the text tower.
        context: (1 or batch, vectors, width).
        start: Position of the first.
    """
    stop = start + context.shape[1]

    def replace(_: nn.Module, __: tuple[Any, ...], embedded: Tensor) -> Tensor:
        filled = context.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat([embedded[:, :start], filled, embedded[:, stop:]], dim=1)

    handle = table.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
