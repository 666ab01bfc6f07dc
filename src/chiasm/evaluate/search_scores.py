"""Embeddings to retrieval scores: recall, average precision, nDCG and ranks, in all four directions, beside chance.

Medical sets repeat themselves: many images share one caption, one study has several images. A strict one-to-one scoring
would call a right answer wrong, so an answer counts when ANY of its keys (its own pair, the same caption, the same case)
equals the query's, or when it has the query's label. Equal scores share their expected rank, so a model that says one
thing is reported near chance. Within one modality a query never finds itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.evaluate.search_relevance import (
    KeyColumns,
    Relevance,
    relevant_by_keys,
    relevant_by_labels,
    same_keys,
    same_words,
)
from chiasm.metrics.ranking import average_precision, chance_reciprocal_rank, ndcg
from chiasm.metrics.retrieval import (
    chance_recall_at_k,
    mean_interval,
    median_rank_interval,
    ranks_of_relevant,
    recall_at_k,
    recall_interval,
)
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings, Interval, check_same_space

#: What can search what: name -> (queries, corpus).
DIRECTIONS: Mapping[str, tuple[str, str]] = {
    "text_to_image": ("text", "image"),
    "image_to_text": ("image", "text"),
    "image_to_image": ("image", "image"),
    "text_to_text": ("text", "text"),
}
KS = (1, 5, 10)
NDCG_DEPTH = 10
_BLOCK_VALUES = 2**20
_MEASURES = ("average_precision", "average_precision_at_r", "ndcg")


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
        mean_reciprocal_rank: Mean of 1 / rank of the first right answer.
        average_precision: mAP over the whole ranking.
        average_precision_at_r: mAP@R: as far as a query has right answers.
        ndcg: Of the first 10; what an answer is worth may be graded.
        constant: Measure to its value where every query gets one and the same ranking: the rows by what they are worth
            to all queries together, with the truth at hand.
        exclude: What a query may not find: ``none``, ``self``, ``patient``.
        right_answers: Mean number of right answers a query.
        ranks: Rank of the first right answer of each query that has one.
    """

    recall: Mapping[int, Interval]
    median_rank: Interval
    n_queries: int
    n_unanswerable: int
    corpus_size: int
    majority: Mapping[int, float]
    mean_reciprocal_rank: Interval
    average_precision: Interval
    average_precision_at_r: Interval
    ndcg: Interval
    constant: Mapping[str, float]
    exclude: str
    right_answers: float
    ranks: NDArray[np.float64] = field(repr=False)

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

    def measures(self) -> dict[str, tuple[Interval, float | None]]:
        """Return printed name -> (value, value of the best constant ranking)."""
        return {
            **{f"R@{k}": (value, self.majority[k]) for k, value in self.recall.items()},
            "mAP": (self.average_precision, self.constant["average_precision"]),
            "mAP@R": (self.average_precision_at_r, self.constant["average_precision_at_r"]),
            f"nDCG@{NDCG_DEPTH}": (self.ndcg, self.constant["ndcg"]),
            "MRR": (self.mean_reciprocal_rank, self.constant["mean_reciprocal_rank"]),
            "median rank": (self.median_rank, None),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return each measure as ``{"value", "low", "high", "n", "chance"}``, the baselines and the counts."""
        return {
            "majority": {f"recall_at_{k}": value for k, value in self.majority.items()},
            **{f"recall_at_{k}": value.to_dict() for k, value in self.recall.items()},
            "mean_average_precision": self.average_precision.to_dict(),
            "mean_average_precision_at_r": self.average_precision_at_r.to_dict(),
            f"ndcg_at_{NDCG_DEPTH}": self.ndcg.to_dict(),
            "mean_reciprocal_rank": self.mean_reciprocal_rank.to_dict(),
            "median_rank": self.median_rank.to_dict(),
            "constant": dict(self.constant),
            "exclude": self.exclude,
            "n_queries": self.n_queries,
            "n_unanswerable": self.n_unanswerable,
            "corpus_size": self.corpus_size,
            "right_answers": self.right_answers,
        }


@dataclass(frozen=True)
class SearchScores:
    """Several directions of search, measured in one way.

    Attributes:
        directions: Name (``text_to_image``) -> scores.
        keys: Names of the keys, or of the label columns, that could make an answer right.
        graded: Whether an answer can be right in part.
        left_out: Direction -> why it was not measured.
    """

    directions: Mapping[str, DirectionScores]
    keys: tuple[str, ...]
    graded: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Return rows of text for print: measure, value with interval, n, chance, majority."""
        rows = []
        for name, scores in self.directions.items():
            for measure, (value, constant) in scores.measures().items():
                chance = "-" if value.chance is None else f"{value.chance:.3f}"
                rest = "-" if constant is None else f"{constant:.3f}"
                rows.append((f"{arrow(name)} {measure}", str(value), str(value.n), chance, rest))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **{name: scores.to_dict() for name, scores in self.directions.items()},
            "keys": list(self.keys),
            "graded": self.graded,
            "left_out": dict(self.left_out),
        }


@dataclass(frozen=True)
class RetrievalScores(SearchScores):
    """Both directions of search between images and texts."""

    @property
    def text_to_image(self) -> DirectionScores:
        """A text looks for its image."""
        return self.directions["text_to_image"]

    @property
    def image_to_text(self) -> DirectionScores:
        """An image looks for its text."""
        return self.directions["image_to_text"]


def arrow(direction: str) -> str:
    """Return ``text → image`` for ``text_to_image``."""
    return direction.replace("_to_", " → ")


def score_retrieval(
    images: Embeddings,
    texts: Embeddings,
    *,
    keys: KeyColumns | None = None,
    ks: Sequence[int] = KS,
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
    if images.modality != "image" or texts.modality != "text":
        raise InputError(f"expected images and texts, got {images.modality} and {texts.modality} embeddings")
    columns = keys if keys is not None else default_keys(images, texts)
    flipped = {name: (b, a) for name, (a, b) in columns.items()}
    found = {}
    for name, queries, corpus, pairs in (
        ("text_to_image", texts, images, flipped),
        ("image_to_text", images, texts, columns),
    ):
        relevance = relevant_by_keys(queries, corpus, pairs)
        found[name] = score_direction(queries, corpus, relevance, ks=ks, n_resamples=n_resamples, seed=seed)
    return RetrievalScores(found, tuple(columns))


def default_keys(images: Embeddings, texts: Embeddings) -> KeyColumns:
    """Return ``id``, and ``caption`` (case and spacing ignored) where the captions of both sides are known."""
    columns: dict[str, tuple[Sequence[str | None], Sequence[str | None]]] = {"id": (images.ids, texts.ids)}
    if texts.texts is not None:
        by_id = dict(zip(texts.ids, texts.texts, strict=True))
        own: Sequence[str | None] = images.texts if images.texts is not None else (None,) * len(images)
        captions = [text if text is not None else by_id.get(name) for name, text in zip(images.ids, own, strict=True)]
        columns["caption"] = ([same_words(t) for t in captions], [same_words(t) for t in texts.texts])
    return columns


def score_search(
    sides: Callable[[str], Embeddings],
    *,
    directions: Sequence[str] = tuple(DIRECTIONS),
    same: Sequence[str] = ("pair", "text"),
    relevant_by: Sequence[str] = (),
    exclude: str | None = None,
    ks: Sequence[int] = KS,
    n_resamples: int = 1000,
    seed: int = 0,
) -> SearchScores:
    """Score any of the four directions.

    Args:
        sides: ``image`` or ``text`` -> embeddings; asked only for what a direction needs.
        directions: Of ``DIRECTIONS``.
        same: What makes rows belong together: ``pair``, ``text``, ``case``.
        relevant_by: Label columns in place of ``same``; see :func:`~chiasm.evaluate.search_relevance.relevant_by_labels`.
        exclude: What a query may not find. None: nothing across modalities; within one its own row, and its own patient
            where labels decide (a neighbour film of one patient is no find).
        ks: Depths of recall.
        n_resamples: Bootstrap samples per interval.
        seed: Of the bootstrap.

    Returns:
        The directions in which some query has a right answer; the others are named in ``left_out``.

    Raises:
        UnknownName: A direction, a column or a word of ``same`` is unknown.
        InputError: No direction has a query with a right answer.
    """
    found: dict[str, DirectionScores] = {}
    left_out: dict[str, str] = {}
    names: dict[str, None] = {}
    graded = False
    for name in directions:
        if name not in DIRECTIONS:
            raise UnknownName("direction", name, DIRECTIONS, hint=f"one of: {', '.join(DIRECTIONS)}")
        of_queries, of_corpus = DIRECTIONS[name]
        queries, corpus = sides(of_queries), sides(of_corpus)
        alone = "none" if of_queries != of_corpus else ("patient" if relevant_by else "self")
        rule = exclude or alone
        if relevant_by:
            relevance = relevant_by_labels(queries, corpus, relevant_by, exclude=rule)
        else:
            keys = same_keys(queries, corpus, [w for w in same if name != "text_to_text" or w != "text"])
            if not keys:
                left_out[name] = "the same text always finds itself"
                continue
            relevance = relevant_by_keys(queries, corpus, keys, exclude=rule)
        names.update(dict.fromkeys(relevance.names))
        graded = graded or relevance.graded
        try:
            found[name] = score_direction(
                queries, corpus, relevance, exclude=rule, ks=ks, n_resamples=n_resamples, seed=seed
            )
        except NoRightAnswer as none:
            left_out[name] = none.message + (", which may not be its own row" if rule != "none" else "")
    if not found:
        raise NoRightAnswer
    return SearchScores(found, tuple(names), graded, left_out)


class NoRightAnswer(InputError):
    """No query of a direction has a right answer."""

    def __init__(self) -> None:
        super().__init__(
            "no query has a right answer among the rows",
            hint="images and texts need equal ids, or pass `keys` (on the command line --relevant-by) that say what "
            "belongs together",
        )


def score_direction(
    queries: Embeddings,
    corpus: Embeddings,
    relevance: Relevance,
    *,
    exclude: str = "none",
    ks: Sequence[int] = KS,
    n_resamples: int = 1000,
    seed: int = 0,
) -> DirectionScores:
    """Score one direction of search.

    Args:
        queries: Rows that search; their ``groups`` are drawn by the bootstrap.
        corpus: Rows that are searched.
        relevance: What is right.
        exclude: Its name in the result.
        ks: Depths of recall.
        n_resamples: Bootstrap samples per interval.
        seed: Of the bootstrap.

    Raises:
        SpaceMismatch: When the two sides come from two spaces.
        NoRightAnswer: No query has a right answer.
        InputError: Depths below 1.
    """
    check_same_space(queries, corpus)
    if not ks or min(ks) < 1:
        raise InputError(f"depths of recall must be at least 1, got {list(ks)}")
    a, b = unit_vectors(queries, "query"), unit_vectors(corpus, "corpus")
    right, allowed, worth = count_answers(relevance, len(a))
    known = right > 0
    if not known.any():
        raise NoRightAnswer
    values = _measure(relevance, len(a), lambda rows: a[rows] @ b.T)
    worth = worth - 1e-9 * np.arange(len(worth))  # one ranking: rows worth the same come in their order
    constant = _measure(relevance, len(a), lambda rows: np.broadcast_to(worth, (len(rows), len(worth))).copy())
    chance = _measure(relevance, len(a), lambda rows: np.zeros((len(rows), len(worth))))
    majority = constant_recall(relevance, right, ks)
    ranks, groups, options = values["ranks"], queries.groups, {"n_resamples": n_resamples, "seed": seed}
    sizes = np.stack([allowed[known], right[known]], axis=1)
    kinds, of_kind = np.unique(sizes, axis=0, return_counts=True)

    def by_chance(one: Callable[[int, int], float]) -> float:
        return float(np.average([one(int(n), int(r)) for n, r in kinds], weights=of_kind))

    def mean(name: str) -> Interval:
        return mean_interval(values[name], groups, chance=float(np.nanmean(chance[name])), **options)

    expected = (sizes[:, 0] + 1) / (sizes[:, 1] + 1)  # mean of the least of r ranks drawn from 1..n
    reciprocal = mean_interval(1 / ranks, groups, chance=by_chance(chance_reciprocal_rank), **options)
    baselines = {name: float(np.nanmean(constant[name])) for name in _MEASURES}
    precision, precision_at_r, gain = (mean(name) for name in _MEASURES)
    return DirectionScores(
        {
            k: recall_interval(
                ranks, k, groups, chance=by_chance(lambda n, r, k=k: chance_recall_at_k(n, k, r)), **options  # type: ignore[misc]
            )
            for k in ks
        },
        median_rank_interval(ranks, groups, chance=float(np.median(expected)), **options),
        int(known.sum()),
        int((~known).sum()),
        len(b),
        majority,
        reciprocal,
        precision,
        precision_at_r,
        gain,
        {**baselines, "mean_reciprocal_rank": float(np.nanmean(1 / constant["ranks"]))},
        exclude,
        float(right[known].mean()),
        ranks[known],
    )  # fmt: skip


def count_answers(
    relevance: Relevance, n_queries: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return, a query, how many right answers and how many allowed rows it has; a row of the corpus, what it is worth."""
    right, allowed = np.zeros(n_queries, dtype=np.int64), np.zeros(n_queries, dtype=np.int64)
    worth = np.zeros(relevance.size)
    for rows in _parts(n_queries, relevance.size):
        gains = relevance.gains(rows)
        right[rows], worth = (gains > 0).sum(1), worth + gains.sum(0)
        allowed[rows] = relevance.size - relevance.excluded(rows).sum(1)
    return right, allowed, worth


def best_ranks(
    queries: NDArray[np.float32], corpus: NDArray[np.float32], relevance: Relevance
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return, per query, the rank of its best right answer (1 is first, NaN without one) and how many there are.

    Memory is bounded: queries are taken in blocks.
    """
    found = _measure(relevance, len(queries), lambda rows: queries[rows] @ corpus.T, measures=())
    return found["ranks"], count_answers(relevance, len(queries))[0]


def _parts(n: int, width: int) -> list[NDArray[np.intp]]:
    block = max(1, _BLOCK_VALUES // max(1, width))
    return [np.arange(start, min(start + block, n)) for start in range(0, n, block)]


def _measure(
    relevance: Relevance,
    n: int,
    similarity: Callable[[NDArray[np.intp]], NDArray[Any]],
    measures: Sequence[str] = _MEASURES,
) -> dict[str, NDArray[np.float64]]:
    """Return the first rank and the measures of each query; memory is bounded, queries are taken in blocks."""
    found = {name: np.full(n, np.nan) for name in ("ranks", *measures)}
    for rows in _parts(n, relevance.size):
        values, gains = similarity(rows), relevance.gains(rows)
        values[relevance.excluded(rows)] = -np.inf
        found["ranks"][rows] = ranks_of_relevant(values, gains > 0)
        for name in measures:
            if name == "ndcg":
                found[name][rows] = ndcg(values, gains, depth=NDCG_DEPTH)
            else:
                depth = "R" if name == "average_precision_at_r" else None
                found[name][rows] = average_precision(values, gains > 0, depth=depth)  # type: ignore[arg-type]
    return found


def constant_recall(relevance: Relevance, right: NDArray[np.int64], ks: Sequence[int]) -> dict[int, float]:
    """Return, for each K, the recall of giving every query the same K rows.

    Each row is the one that serves most of the queries not served yet. Memory is bounded: queries are taken in blocks.

    Args:
        relevance: As for :func:`best_ranks`.
        right: Right answers of each query; queries without any are left out.
        ks: Depths.
    """
    unserved = right > 0
    n = int(unserved.sum())
    served = {0: 0.0}
    for k in range(1, min(max(ks), relevance.size) + 1):
        gains = np.zeros(relevance.size, dtype=np.int64)
        rows = np.flatnonzero(unserved)
        for part in _parts(len(rows), relevance.size):
            gains += (relevance.gains(rows[part]) > 0).sum(axis=0)
        best = int(gains.argmax())
        for part in _parts(len(rows), relevance.size):
            unserved[rows[part]] &= relevance.gains(rows[part])[:, best] == 0
        served[k] = 1 - int(unserved.sum()) / n
        if not unserved.any():
            served |= dict.fromkeys(range(k + 1, max(ks) + 1), 1.0)
            break
    return {k: served[min(k, relevance.size) if k not in served else k] for k in ks}


def recall_curve(
    ranks: NDArray[np.float64], size: int, points: int = 60
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return depths, about evenly spaced in their logarithm, and the recall at each."""
    depths = np.unique(np.geomspace(1, max(size, 1), points).round().astype(np.int64))
    return depths, np.array([recall_at_k(ranks, int(k)) for k in depths])
