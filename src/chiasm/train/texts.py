"""What an image is trained with: its own text, or templates filled from its labels, in several variants.

Comes in: samples and the text part of a recipe. Goes out: per sample the ways to say it and the key that tells which
other texts mean the same; then token ids, made once per distinct text.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from chiasm.data.tokens import Tokens
from chiasm.datasets.dataset import parse_template
from chiasm.errors import ConfigError, InputError
from chiasm.types import Sample, digest_of

if TYPE_CHECKING:
    from chiasm.data.tokenizers import Tokenizer
    from chiasm.train.recipe import DataConfig

#: More variants of one text than this are thinned out evenly.
MAX_VARIANTS = 64
OWN_TEXT = ("text", "caption")


@dataclass(frozen=True)
class RenderedText:
    """The text of one sample.

    Attributes:
        variants: Ways to say it; the first is the plainest.
        key: Equal for samples whose texts mean the same.
    """

    variants: tuple[str, ...]
    key: str


def render_texts(samples: Sequence[Sample], config: DataConfig) -> list[RenderedText | None]:
    """Return the text of every sample; None where a hole of every template is blank or there is no text.

    Raises:
        ConfigError: A template names no column, or words are given for a column that no template uses.
    """
    if not config.texts:
        return [None if s.text is None else RenderedText((s.text,), _same_words(s.text)) for s in samples]
    known = (*dict.fromkeys(k for s in samples for k in s.labels), *OWN_TEXT)
    templates = []
    for i, template in enumerate(config.texts):
        try:
            templates.append((parse_template(template, known), _holes(template)))
        except (InputError, LookupError) as error:
            hint = getattr(error, "hint", None)
            raise ConfigError(f"`data.texts[{i}]`: {getattr(error, 'message', error)}", hint=hint) from error
    used = {hole for _, holes in templates for hole in holes}
    for column in config.words:
        if column not in used:
            raise ConfigError(
                f"`data.words.{column}` is used by no template", hint=f"columns in templates: {', '.join(sorted(used))}"
            )
    return [_render(sample, templates, config.words) for sample in samples]


def _holes(template: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(h for _, h, _, _ in string.Formatter().parse(template) if h))


def _render(
    sample: Sample, templates: Sequence[tuple[Any, tuple[str, ...]]], words: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> RenderedText | None:
    values = {hole: _value(sample, hole) for _, holes in templates for hole in holes}
    ways = {
        hole: words.get(hole, {}).get(_label_text(value), (_label_text(value),)) if value is not None else ()
        for hole, value in values.items()
    }
    found: dict[str, None] = {}
    for fill, holes in templates:
        for choice in itertools.islice(itertools.product(*(ways[h] for h in holes)), MAX_VARIANTS**2):
            text = fill(dict(zip(holes, choice, strict=True)).get)
            if text is not None:
                found.setdefault(text)
    if not found:
        return None
    variants = list(found)
    if len(variants) > MAX_VARIANTS:
        variants = [variants[i] for i in np.linspace(0, len(variants) - 1, MAX_VARIANTS).astype(int)]
    meaning = {
        h: _label_text(v) if h not in OWN_TEXT else _same_words(str(v)) for h, v in values.items() if v is not None
    }
    return RenderedText(tuple(variants), digest_of(meaning))


def _value(sample: Sample, hole: str) -> object:
    if hole in sample.labels:
        return sample.labels[hole]
    return sample.text if hole in OWN_TEXT else None


def _label_text(value: object) -> str:
    # 1 and 1.0 are one class: a column with blanks is read as floats by some writers.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _same_words(text: str) -> str:
    return " ".join(text.split()).casefold()


def sentence_views(text: str, count: int, *, seed: int) -> tuple[str, ...]:
    """Return up to ``count`` shorter versions of a report: some of its sentences, in random order.

    A prompt is one sentence, a report is several. A text tower that has only seen whole reports meets prompts as
    strangers; with parts of reports in training it does not (CheXzero and BioViL sample or shuffle sentences likewise).

    Args:
        text: A report; sentences end in ``.``, ``!`` or ``?`` before a space.
        count: How many versions; fewer when the draws coincide.
        seed: Together with the text it decides the draws, so the same report gives the same versions in every run.
    """
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]
    if len(sentences) < 2:
        return ()
    rng = np.random.default_rng([seed, int(digest_of(text, 8), 16)])
    found: dict[str, None] = {}
    for _ in range(count):
        kept = rng.permutation(len(sentences))[: rng.integers(1, len(sentences) + 1)]
        found.setdefault(" ".join(sentences[i] for i in kept))
    return tuple(found)


class TokenTable:
    """Token ids of every distinct text, and which of them belong to which row.

    Args:
        texts: The variants of each row.
        tokenizer: Called once, on the distinct texts.

    Attributes:
        ids: int32 (texts, context).
        lengths: int64 (texts,).
        variants: Per row, the numbers of its texts.
        truncated: How many distinct texts were cut at the context length.
    """

    def __init__(self, texts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> None:
        number = {t: i for i, t in enumerate(dict.fromkeys(t for row in texts for t in row))}
        self.texts = list(number)
        tokens = tokenizer.encode(self.texts)
        self.ids = tokens.ids.to(torch.int32)
        self.lengths = tokens.lengths
        self.truncated = len(tokens.truncated)
        self.variants = [np.array([number[t] for t in row], np.int64) for row in texts]

    def __len__(self) -> int:
        return len(self.variants)

    def choose(self, rows: NDArray[np.int64], rng: np.random.Generator | None) -> NDArray[np.int64]:
        """Return the number of one text per row: drawn, or without ``rng`` variant ``row mod count``.

        The latter uses every template, evenly spread over the rows, and is the same each time.
        """
        if rng is None:
            return np.array([self.variants[r][r % len(self.variants[r])] for r in rows], np.int64)
        draws = rng.random(len(rows))
        return np.array(
            [self.variants[r][int(u * len(self.variants[r]))] for r, u in zip(rows, draws, strict=True)], np.int64
        )

    def tokens(self, numbers: NDArray[np.int64]) -> Tokens:
        """Return the tokens of these texts."""
        rows = torch.from_numpy(numbers)
        return Tokens(self.ids[rows].long(), self.lengths[rows])
