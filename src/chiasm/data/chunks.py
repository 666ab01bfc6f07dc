"""Reports in, pieces that fit a text tower out: nothing is cut off in silence, and each piece knows where it stood.

A tokenizer says what fits. A report that fits is one chunk, equal to itself. A longer one is cut at the end of a
sentence, else of a word, else inside a word that is longer than the context; neighbours overlap a little, so that no
finding stands only half in each of two. Every chunk is tokenised once to prove that it fits.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from chiasm.data.tokenizers import Tokenizer
from chiasm.datasets.corpus import ReportCorpus
from chiasm.errors import ConfigError, InputError
from chiasm.progress import Progress, SilentProgress

_BATCH = 512
_WORD = re.compile(r"\S+")
_CLOSERS = "'\")]}”’"
_ENDS = ".!?" + _CLOSERS
_ABBREVIATIONS = frozenset(("approx", "cf", "dr", "fig", "mr", "mrs", "ms", "no", "nos", "pt", "st", "vs"))
_Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a report and where it comes from.

    Attributes:
        report: Row in the corpus.
        start: First character in the cleaned text of the report.
        end: Character after the last.
        text: The piece: ``corpus[report].text[start:end]``.
    """

    report: int
    start: int
    end: int
    text: str


def chunk_reports(
    corpus: ReportCorpus, tokenizer: Tokenizer, *, overlap_tokens: int | None = None, progress: Progress | None = None
) -> tuple[Chunk, ...]:
    """Return the chunks of all reports, in order of report and place.

    Every chunk fits the tokenizer's context whole, special tokens included; every character but white space is in at
    least one chunk; a report that fits is one chunk equal to itself. The result depends on nothing but the texts, the
    tokenizer and the overlap.

    Args:
        corpus: Reports; repeated texts get chunks of their own.
        tokenizer: Of the text tower that will embed them.
        overlap_tokens: Tokens that a chunk repeats of the one before it, at most, in whole words; None: an eighth of the
            room. The last chunk of a report repeats more, where it would be less than half full.
        progress: Told of each distinct text that is cut.

    Raises:
        ConfigError: The overlap is negative or more than half the room.
        InputError: The context has no room for a single character of some report.

    References:
        Deviation from CLIP-IT's reference, which embeds the first 125 word pieces of a report and drops the rest.
    """
    cutter = _Cutter(tokenizer, resolve_overlap(tokenizer, overlap_tokens))
    spans = cutter.spans(dict.fromkeys(corpus.texts), progress or SilentProgress())
    return tuple(
        Chunk(row, start, end, text[start:end]) for row, text in enumerate(corpus.texts) for start, end in spans[text]
    )


def describe_chunking(tokenizer: Tokenizer, *, overlap_tokens: int | None = None) -> dict[str, Any]:
    """Return what chunks depend on beside the texts and the vocabulary, for headers and cache keys."""
    overlap = resolve_overlap(tokenizer, overlap_tokens)
    return {"rule": "sentences-1", "context_length": tokenizer.context_length, "overlap_tokens": overlap}


def resolve_overlap(tokenizer: Tokenizer, overlap_tokens: int | None) -> int:
    """Return the overlap in tokens: an eighth of the context's room where None is given.

    Raises:
        ConfigError: It is negative or more than half the room, or the context holds special tokens only.
    """
    room = _room(tokenizer)[1]
    if room < 1:
        raise ConfigError(f"a context of {tokenizer.context_length} tokens has no room beside the special tokens")
    if overlap_tokens is None:
        return room // 8
    if not 0 <= overlap_tokens <= room // 2:
        raise ConfigError(
            f"`overlap_tokens` must lie between 0 and {room // 2} in a context of {tokenizer.context_length} tokens, "
            f"got {overlap_tokens}"
        )
    return overlap_tokens


def _room(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the number of special tokens, and of tokens that remain for a text."""
    special = len(tokenizer.encode_ids("")[0])
    return special, tokenizer.context_length - special


@dataclass(frozen=True)
class _Units:
    """What a text is cut between: words, or parts of very long ones.

    Attributes:
        spans: First and last + 1 character of each.
        cost: Tokens of all units before unit i, for i from 0 to their number.
        stops: Whether a sentence ends with the unit.
    """

    spans: list[_Span]
    cost: list[int]
    stops: list[bool]


class _Cutter:
    """Cuts texts by estimated costs (of words alone), and again by exact counts where the estimate was too low."""

    def __init__(self, tokenizer: Tokenizer, overlap: int) -> None:
        self._encode = tokenizer.encode_ids
        self._special, self._room = _room(tokenizer)
        self._overlap = overlap
        self._known: dict[str, int] = {}  # tokens of a word

    def _count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, special ones left out."""
        batches = (texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH))
        return [len(ids) - self._special for batch in batches for ids in self._encode(list(batch))]

    def spans(self, texts: Iterable[str], progress: Progress) -> dict[str, list[_Span]]:
        """Return the places of the chunks of each text."""
        texts = list(texts)
        counts = self._count(texts)
        result = {text: [(0, len(text))] for text in texts}
        long = [text for text, count in zip(texts, counts, strict=True) if count > self._room]
        self._learn(word for text in long for word in _WORD.findall(text))
        progress.start(len(long), "cutting reports")
        for text in long:
            result[text] = self._cut(self._units(text), lambda i, j: True)
            progress.advance()
        progress.finish()
        pieces = [(text, text[start:end]) for text in long for start, end in result[text]]
        sizes = self._count([piece for _, piece in pieces])
        for text in {text for (text, _), size in zip(pieces, sizes, strict=True) if size > self._room}:
            result[text] = self._cut_exactly(text)
        return result

    def _learn(self, words: Iterable[str]) -> None:
        new = [word for word in dict.fromkeys(words) if word not in self._known]
        self._known.update(zip(new, self._count(new), strict=True))

    def _units(self, text: str) -> _Units:
        spans: list[_Span] = []
        costs: list[int] = []
        stops: list[bool] = []
        matches = list(_WORD.finditer(text))
        words = [match.group() for match in matches]
        for match, word, following in zip(matches, words, [*words[1:], ""], strict=True):
            cost = self._known[word]
            if cost <= self._room:
                spans.append(match.span())
                costs.append(cost)
            else:
                parts = self._split_word(text, match.span())
                spans += [span for span, _ in parts]
                costs += [part for _, part in parts]
                stops += [False] * (len(parts) - 1)
            stops.append(bool(following) and word[-1] in _ENDS and _ends_sentence(word, following))
        return _Units(spans, [0, *accumulate(costs)], stops)

    def _split_word(self, text: str, span: _Span) -> list[tuple[_Span, int]]:
        """Return parts of a word that is longer than the context, each with its tokens: slices, halved until they fit."""
        start, end = span
        step = 4 * self._room
        waiting = [(i, min(i + step, end)) for i in range(start, end, step)]
        done: list[tuple[_Span, int]] = []
        while waiting:
            halves: list[_Span] = []
            for (first, last), cost in zip(waiting, self._count([text[a:b] for a, b in waiting]), strict=True):
                middle = (first + last) // 2
                if cost <= self._room:
                    done.append(((first, last), cost))
                elif last - first == 1:
                    raise InputError(
                        f"a context with room for {self._room} tokens cannot hold one character of {cost} tokens",
                        hint="use a tokenizer with a longer context",
                    )
                else:
                    halves += [(first, middle), (middle, last)]
            waiting = halves
        return sorted(done)

    def _cut_exactly(self, text: str) -> list[_Span]:
        units = self._units(text)
        seen: dict[_Span, bool] = {}

        def fits(i: int, j: int) -> bool:
            place = (units.spans[i][0], units.spans[j - 1][1])
            if place not in seen:
                seen[place] = self._count([text[slice(*place)]])[0] <= self._room
            return seen[place]

        return self._cut(units, fits)

    def _cut(self, units: _Units, fits: Callable[[int, int], bool]) -> list[_Span]:
        """Return the places of chunks. Each is as long as it may be, then shortened to the end of a sentence.

        ``fits`` has the last word on units i to j - 1, where their costs allow it; a single unit always fits.
        """
        cost, n, room = units.cost, len(units.spans), self._room

        def may(i: int, j: int) -> bool:
            return j - i == 1 or (cost[j] - cost[i] <= room and fits(i, j))

        chunks: list[_Span] = []
        start = reached = 0
        while True:
            end = max(bisect_right(cost, cost[start] + room) - 1, reached + 1)
            while end > reached + 1 and not may(start, end):
                end -= max(1, (end - reached) // 8)
            if end == n:
                break
            stops = (k for k in range(end, reached, -1) if units.stops[k - 1] and 2 * (cost[k] - cost[start]) >= room)
            end = next((k for k in stops if may(start, k)), end)
            chunks.append((units.spans[start][0], units.spans[end - 1][1]))
            before, start, reached = start, end, end
            while start - 1 > before and cost[reached] - cost[start - 1] <= self._overlap:
                start -= 1
            while not may(start, reached + 1):
                start += 1
            last = start
            while cost[n] - cost[start] <= room // 2 and last - 1 > before and cost[n] - cost[last - 1] <= room // 2:
                last -= 1
            if last < start and may(last, n):
                start = last
        return [*chunks, (units.spans[start][0], units.spans[n - 1][1])]


def _ends_sentence(word: str, following: str) -> bool:
    """Return whether a sentence ends after a word: not after ``1.``, ``A.`` or ``Dr.``, and not before a small letter."""
    bare = word.rstrip(_CLOSERS)
    if not bare or bare[-1] not in ".!?" or following[0].islower():
        return False
    core = bare.rstrip(".!?").lstrip("(['\"")
    listed = (core.isdigit() and len(core) <= 2) or (len(core) == 1 and core.isalpha())
    return not listed and core.casefold() not in _ABBREVIATIONS
