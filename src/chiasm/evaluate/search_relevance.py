"""What counts as a right answer of a search: the same pair, text or case, the same class, or shared findings.

Comes in: embeddings with ids, texts, patients and labels. Goes out: a :class:`Relevance` that says, block by block of
queries, what every row of the corpus is worth to a query and which rows the query may not find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.metrics.labels import is_missing
from chiasm.types import Embeddings, LabelValue

Codes = tuple[NDArray[np.int64], NDArray[np.int64]]
KeyColumns = Mapping[str, tuple[Sequence[str | None], Sequence[str | None]]]

#: What can make two rows belong together without a label.
SAME = ("pair", "text", "case")
EXCLUDE = ("none", "self", "patient")


@dataclass(frozen=True)
class Relevance:
    """What the corpus is worth to the queries.

    Attributes:
        names: What made an answer right: names of keys, or of label columns.
        codes: A number a query and a row of the corpus for every key; equal ones belong together. Missing ones are −1
            and −2.
        sets: Findings of the queries and of the corpus, (rows, findings) booleans; two rows are worth the share of
            their findings that they have in common (Jaccard), two rows without any are alike.
        hidden: As ``codes``: a query may not find rows with its number (its own row, its own patient).
        outside: Rows of the corpus that no query may find (they have no label), or None.
    """

    names: tuple[str, ...]
    codes: tuple[Codes, ...] = ()
    sets: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None
    hidden: Codes | None = None
    outside: NDArray[np.bool_] | None = None
    without: NDArray[np.bool_] | None = None

    @property
    def graded(self) -> bool:
        """Whether an answer can be right in part."""
        return self.sets is not None

    @property
    def size(self) -> int:
        """Rows of the corpus."""
        return len(self.codes[0][1]) if self.codes else len(self.sets[1]) if self.sets is not None else 0

    def excluded(self, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return which rows of the corpus some of the queries may not find, (rows, corpus)."""
        found = np.zeros((len(rows), self.size), dtype=bool)
        if self.hidden is not None:
            found |= self.hidden[0][rows][:, None] == self.hidden[1][None, :]
        if self.outside is not None:
            found |= self.outside[None, :]
        return found

    def gains(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return what the corpus is worth to some of the queries, (rows, corpus) in [0, 1]; 0 for excluded rows."""
        if self.sets is None:
            found = np.zeros((len(rows), self.size), dtype=bool)
            for of_queries, of_corpus in self.codes:
                found |= of_queries[rows][:, None] == of_corpus[None, :]
            gains = found.astype(np.float32)
        else:
            a, b = self.sets[0][rows].astype(np.float32), self.sets[1].astype(np.float32)
            both = a @ b.T
            either = a.sum(1)[:, None] + b.sum(1)[None, :] - both
            gains = np.where(either > 0, both / np.maximum(either, 1), 1).astype(np.float32)
        if self.without is not None:
            gains[self.without[rows]] = 0
        gains[self.excluded(rows)] = 0
        return gains


def relevant_by_keys(
    queries: Embeddings, corpus: Embeddings, columns: KeyColumns, *, exclude: str = "none"
) -> Relevance:
    """Return the relevance of equal keys: an answer is right when any key equals the query's; None never does.

    Args:
        queries: Rows that search.
        corpus: Rows that are searched.
        columns: Name -> (one key a query, one key a row of the corpus).
        exclude: ``self``: a query may not find the row with its id; ``patient``: no row of its patient; ``none``.

    Raises:
        InputError: A column has the wrong length.
    """
    codes = tuple(number_keys(name, pair, len(queries), len(corpus)) for name, pair in columns.items())
    return Relevance(tuple(columns), codes, hidden=_hidden(queries, corpus, exclude))


def relevant_by_labels(
    queries: Embeddings, corpus: Embeddings, columns: Sequence[str], *, exclude: str = "none"
) -> Relevance:
    """Return the relevance of equal labels.

    Args:
        queries: Rows that search.
        corpus: Rows that are searched.
        columns: One column of class names: the same class is right. Its cells may hold several, joined by ``|``; or
            several columns of 0/1 are named: then an answer is worth the share of findings in common (Jaccard).
        exclude: As :func:`relevant_by_keys`.

    Returns:
        Relevance in which rows without a label neither search nor are found.

    Raises:
        UnknownName: There is no such column.
        InputError: One of several columns holds other values than 0, 1 and blank.
    """
    if not columns:
        raise InputError("no label column was named")
    for side in (queries, corpus):
        for name in columns:
            if name not in side.labels:
                raise UnknownName("label column", name, side.labels)
    a, b = ([side.labels[name] for name in columns] for side in (queries, corpus))
    hidden = _hidden(queries, corpus, exclude)
    missing = [
        np.array([any(is_missing(c[i]) for c in side) for i in range(len(side[0]))], dtype=bool) for side in (a, b)
    ]
    sets = _sets(columns, a, b)
    if sets is None:
        words = [[None if is_missing(v) else str(v) for v in side[0]] for side in (a, b)]
        codes = number_keys(columns[0], (words[0], words[1]), len(queries), len(corpus))
        return Relevance(tuple(columns), (codes,), hidden=hidden, outside=missing[1])
    return Relevance(tuple(columns), sets=sets, hidden=hidden, outside=missing[1], without=missing[0])


def same_keys(queries: Embeddings, corpus: Embeddings, wanted: Sequence[str]) -> KeyColumns:
    """Return the keys that say which rows belong together.

    Args:
        queries: Rows that search.
        corpus: Rows that are searched.
        wanted: ``pair``: the same id; ``text``: the same words (case and spacing ignored; an image has the text of its
            pair); ``case``: the same patient.

    Raises:
        UnknownName: Another word.
    """
    columns: dict[str, tuple[Sequence[str | None], Sequence[str | None]]] = {}
    for name in wanted:
        if name == "pair":
            columns["id"] = (queries.ids, corpus.ids)
        elif name == "text":
            known = {i: t for side in (corpus, queries) for i, t in zip(side.ids, side.texts or (), strict=False) if t}
            if known:
                columns["caption"] = (_words(queries, known), _words(corpus, known))
        elif name == "case":
            columns["case"] = (queries.groups, corpus.groups)
        else:
            raise UnknownName("kind of sameness", name, SAME, hint=f"one of: {', '.join(SAME)}")
    return columns


def number_keys(
    name: str, pair: tuple[Sequence[str | None], Sequence[str | None]], n_queries: int, n_corpus: int
) -> Codes:
    """Return a number per key; −1 among queries and −2 in the corpus for "none", so that they never agree.

    Raises:
        InputError: There is not one key a row.
    """
    a, b = pair
    if len(a) != n_queries or len(b) != n_corpus:
        raise InputError(f"key `{name}` has {len(a)} and {len(b)} values for {n_queries} and {n_corpus} rows")
    number = {key: k for k, key in enumerate(dict.fromkeys([*a, *b])) if key is not None}
    return (
        np.asarray([-1 if key is None else number[key] for key in a], dtype=np.int64),
        np.asarray([-2 if key is None else number[key] for key in b], dtype=np.int64),
    )


def same_words(text: str | None) -> str | None:
    """Return a text without case and spacing, None for an empty one."""
    return " ".join(text.casefold().split()) if text and text.strip() else None


def _words(rows: Embeddings, known: Mapping[str, str]) -> list[str | None]:
    own: Sequence[str | None] = rows.texts if rows.texts is not None else (None,) * len(rows)
    return [same_words(t if t is not None else known.get(i)) for i, t in zip(rows.ids, own, strict=True)]


def _hidden(queries: Embeddings, corpus: Embeddings, exclude: str) -> Codes | None:
    if exclude == "none":
        return None
    if exclude not in EXCLUDE:
        raise UnknownName("value of exclude", exclude, EXCLUDE)
    pair = (queries.ids, corpus.ids) if exclude == "self" else (queries.groups, corpus.groups)
    return number_keys(exclude, pair, len(queries), len(corpus))


def _sets(
    columns: Sequence[str], a: Sequence[Sequence[LabelValue]], b: Sequence[Sequence[LabelValue]]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """Return the findings of both sides, or None where one column holds one class a row."""
    if len(columns) > 1:
        return _flags(columns, a), _flags(columns, b)
    if not any(isinstance(v, str) and "|" in v for side in (a, b) for v in side[0]):
        return None
    parts = [
        [set() if is_missing(v) else {p.strip() for p in str(v).split("|") if p.strip()} for v in side[0]]
        for side in (a, b)
    ]
    names = sorted(set().union(*parts[0], *parts[1]))
    one, other = (
        np.array([[n in row for n in names] for row in side], dtype=bool).reshape(len(side), len(names))
        for side in parts
    )
    return one, other


def _flags(columns: Sequence[str], side: Sequence[Sequence[LabelValue]]) -> NDArray[np.bool_]:
    for name, values in zip(columns, side, strict=True):
        if bad := sum(not is_missing(v) and str(v) not in ("0", "1", "0.0", "1.0", "True", "False") for v in values):
            raise InputError(
                f"column `{name}` has {bad} values that are not 0, 1 or blank",
                hint="name one column of class names, or several of 0 and 1",
            )
    return np.array([[str(v) in ("1", "1.0", "True") for v in values] for values in side], dtype=bool).T
