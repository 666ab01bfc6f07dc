"""Embeddings of pairs to retrieval scores: recall at K and median rank, both ways, beside chance.

Medical sets repeat themselves: many images share one caption, one study has several images. A strict one-to-one scoring
would call a right answer wrong, so an answer counts when ANY of its keys (its own pair, the same caption, the same case)
equals the query's. Equal scores share their expected rank, so a model that says one thing is reported near chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.metrics.retrieval import chance_recall_at_k, median_rank_interval, ranks_of_relevant, recall_interval
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings, Interval, check_same_space

KeyColumns = Mapping[str, tuple[Sequence[str | None], Sequence[str | None]]]

_BLOCK_VALUES = 2**23


@dataclass(frozen=True)
class DirectionScores:
    """One direction of search.

    Attributes:
        recall: K to the share of queries with a right answer among the first K; chance is that of a random order.
        median_rank: Median over queries of the rank of the first right answer, 1 is best; chance is its expected value
            in a random order.
        n_queries: Queries that have a right answer.
        n_unanswerable: Queries without one; they are left out.
        corpus_size: Rows that were searched.
        majority: K to the recall of giving every query the same K rows: those that, one after the other, serve most
            queries, chosen with the truth at hand.
    """

    recall: Mapping[int, Interval]
    median_rank: Interval
    n_queries: int
    n_unanswerable: int
    corpus_size: int
    majority: Mapping[int, float]

    def recall_at(self, k: int) -> Interval:
        """Return the recall at one depth; one that was not scored raises ``UnknownName``."""
        if k not in self.recall:
            raise UnknownName("depth of recall", str(k), [str(known) for known in self.recall])
        return self.recall[k]

    @property
    def recall_at_1(self) -> Interval:
        """Share of queries whose first answer is right."""
        return self.recall_at(1)

    @property
    def recall_at_5(self) -> Interval:
        """Share of queries with a right answer among five."""
        return self.recall_at(5)

    @property
    def recall_at_10(self) -> Interval:
        """Share of queries with a right answer among ten."""
        return self.recall_at(10)

    def to_dict(self) -> dict[str, Any]:
        """Return ``recall_at_K`` and ``median_rank`` as ``{"value", "low", "high", "n", "chance"}``, and the counts."""
        return {
            "majority": {f"recall_at_{k}": value for k, value in self.majority.items()},
            **{f"recall_at_{k}": value.to_dict() for k, value in self.recall.items()},
            "median_rank": self.median_rank.to_dict(),
            "n_queries": self.n_queries,
            "n_unanswerable": self.n_unanswerable,
            "corpus_size": self.corpus_size,
        }


@dataclass(frozen=True)
class RetrievalScores:
    """Both directions of search between images and texts.

    Attributes:
        text_to_image: A text looks for its image.
        image_to_text: An image looks for its text.
        keys: Names of the keys that could make an answer right.
    """

    text_to_image: DirectionScores
    image_to_text: DirectionScores
    keys: tuple[str, ...]

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Return rows of text for print: measure, value with interval, n, chance, majority."""
        rows = []
        for name, scores in (("text → image", self.text_to_image), ("image → text", self.image_to_text)):
            measures = {f"R@{k}": (v, f"{scores.majority[k]:.3f}") for k, v in scores.recall.items()}
            for measure, (value, majority) in {**measures, "median rank": (scores.median_rank, "-")}.items():
                chance = "-" if value.chance is None else f"{value.chance:.3f}"
                rows.append((f"{name} {measure}", str(value), str(value.n), chance, majority))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "text_to_image": self.text_to_image.to_dict(),
            "image_to_text": self.image_to_text.to_dict(),
            "keys": list(self.keys),
        }


def score_retrieval(
    images: Embeddings,
    texts: Embeddings,
    *,
    keys: KeyColumns | None = None,
    ks: Sequence[int] = (1, 5, 10),
    n_resamples: int = 1000,
    seed: int = 0,
) -> RetrievalScores:
    """Score the search between images and texts in both directions.

    Args:
        images: One row per image; ``patients`` are the groups of the bootstrap.
        texts: One row per text.
        keys: Name to (one key per image, one key per text); an answer is right when any key equals the query's. None
            never equals anything. By default ``id`` (the same id on both sides) and, where captions are known,
            ``caption`` (the same words).
        ks: Depths of recall.
        n_resamples: Bootstrap samples per interval.
        seed: Of the bootstrap.

    Raises:
        SpaceMismatch: When images and texts come from two spaces.
        InputError: When a key column has the wrong length, or no query has a right answer.
    """
    check_same_space(images, texts)
    if not ks or min(ks) < 1:
        raise InputError(f"depths of recall must be at least 1, got {list(ks)}")
    if images.modality != "image" or texts.modality != "text":
        raise InputError(f"expected images and texts, got {images.modality} and {texts.modality} embeddings")
    columns = keys if keys is not None else default_keys(images, texts)
    codes = [_codes(name, pair, len(images), len(texts)) for name, pair in columns.items()]
    image_vectors, text_vectors = unit_vectors(images, "image"), unit_vectors(texts, "text")

    def direction(queries: Embeddings, flip: bool) -> DirectionScores:
        pairs = [(t, i) if flip else (i, t) for i, t in codes]
        a, b = (text_vectors, image_vectors) if flip else (image_vectors, text_vectors)
        ranks, right = best_ranks(a, b, pairs)
        if not right.any():
            raise InputError(
                "no query has a right answer among the rows",
                hint="images and texts need equal ids, or pass `keys` that say what belongs together",
            )
        options = {"n_resamples": n_resamples, "seed": seed}
        majority = constant_recall(pairs, right, ks)
        return _direction_scores(ranks, right, queries.groups, len(b), majority=majority, options=options)

    return RetrievalScores(direction(texts, True), direction(images, False), tuple(columns))


def default_keys(images: Embeddings, texts: Embeddings) -> KeyColumns:
    """Return ``id``, and ``caption`` (case and spacing ignored) where the captions of both sides are known."""
    columns: dict[str, tuple[Sequence[str | None], Sequence[str | None]]] = {"id": (images.ids, texts.ids)}
    if texts.texts is not None:
        by_id = dict(zip(texts.ids, texts.texts, strict=True))
        own: Sequence[str | None] = images.texts if images.texts is not None else (None,) * len(images)
        captions = [text if text is not None else by_id.get(name) for name, text in zip(images.ids, own, strict=True)]
        columns["caption"] = ([_same_words(t) for t in captions], [_same_words(t) for t in texts.texts])
    return columns


def _same_words(text: str | None) -> str | None:
    return " ".join(text.casefold().split()) if text and text.strip() else None


def _codes(
    name: str, pair: tuple[Sequence[str | None], Sequence[str | None]], n_images: int, n_texts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a number per key; -1 on the image side and -2 on the text side for "none", so they never agree."""
    of_images, of_texts = pair
    if len(of_images) != n_images or len(of_texts) != n_texts:
        raise InputError(
            f"key `{name}` has {len(of_images)} and {len(of_texts)} values for {n_images} images and {n_texts} texts"
        )
    number = {key: k for k, key in enumerate(dict.fromkeys([*of_images, *of_texts])) if key is not None}
    return (
        np.asarray([-1 if key is None else number[key] for key in of_images], dtype=np.int64),
        np.asarray([-2 if key is None else number[key] for key in of_texts], dtype=np.int64),
    )


def best_ranks(
    queries: NDArray[np.float32],
    corpus: NDArray[np.float32],
    codes: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return, per query, the rank of its best right answer (1 is first, NaN without one) and how many there are.

    Memory is bounded: queries are taken in blocks.
    """
    ranks = np.full(len(queries), np.nan)
    counts = np.zeros(len(queries), dtype=np.int64)
    block = max(1, _BLOCK_VALUES // max(1, len(corpus)))
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        right = _right(codes, np.arange(len(queries))[part])
        ranks[part] = ranks_of_relevant(queries[part] @ corpus.T, right)
        counts[part] = right.sum(axis=1)
    return ranks, counts


def constant_recall(
    codes: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], right: NDArray[np.int64], ks: Sequence[int]
) -> dict[int, float]:
    """Return, for each K, the recall of giving every query the same K rows.

    Each row is the one that serves most of the queries not served yet. Memory is bounded: queries are taken in blocks.

    Args:
        codes: As for :func:`best_ranks`.
        right: Right answers of each query; queries without any are left out.
        ks: Depths.
    """
    size = len(codes[0][1])
    block = max(1, _BLOCK_VALUES // max(1, size))
    unserved = right > 0
    n = int(unserved.sum())
    gains = np.zeros(size, dtype=np.int64)

    def count(rows: NDArray[np.intp]) -> NDArray[np.int64]:
        parts = [_right(codes, rows[i : i + block]).sum(axis=0) for i in range(0, len(rows), block)]
        return np.sum(parts, axis=0, dtype=np.int64) if parts else np.zeros(size, dtype=np.int64)

    gains += count(np.flatnonzero(unserved))
    served = {0: 0.0}
    for k in range(1, min(max(ks), size) + 1):
        best = int(gains.argmax())
        hit = unserved & np.any([of_queries == of_corpus[best] for of_queries, of_corpus in codes], axis=0)
        gains -= count(np.flatnonzero(hit))
        unserved &= ~hit
        served[k] = 1 - int(unserved.sum()) / n
    return {k: served[min(k, size)] for k in ks}


def _right(codes: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Return which rows of the corpus are right for some of the queries."""
    found = np.zeros((len(rows), len(codes[0][1])), dtype=bool)
    for of_queries, of_corpus in codes:
        found |= of_queries[rows][:, None] == of_corpus[None, :]
    return found


def _direction_scores(
    ranks: NDArray[np.float64],
    right: NDArray[np.int64],
    groups: Sequence[str],
    size: int,
    *,
    majority: Mapping[int, float],
    options: Mapping[str, Any],
) -> DirectionScores:
    expected = (size + 1) / (right[right > 0] + 1)  # mean of the least of m ranks drawn from 1..size
    return DirectionScores(
        {k: recall_interval(ranks, k, groups, chance=chance_recall_at_k(size, k, right), **options) for k in majority},
        median_rank_interval(ranks, groups, chance=float(np.median(expected)), **options),
        int((right > 0).sum()),
        int((right == 0).sum()),
        size,
        majority,
    )
