"""Which words of a vocabulary an image, or a region of one, is closest to.

Comes in: embeddings of images (or regions), of the vocabulary, and – this is what makes the answer worth reading – of a
reference set of ordinary images. Goes out: the nearest terms of each query, each beside what the term gives on the
reference.

Some terms are *hubs*: their vectors lie near the middle of all images, so they are among the nearest of every image and
say nothing about any. A term is therefore ranked by how far its cosine lies above its own mean over the reference, in
standard deviations of the reference (``z``). Rows of the query's own patient are left out of the reference. Without a
reference the raw cosine ranks, and hubs win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import FileFormatError, InputError, UnknownName
from chiasm.types import Embeddings, check_same_space, digest_of

VOCABULARIES = Path(__file__).parent / "vocabularies"
#: Fewer reference rows than this give no null.
LEAST_REFERENCE = 20
_MAX_BYTES = 4 * 2**20

RankBy = Literal["z", "excess", "cosine"]


@dataclass(frozen=True)
class Vocabulary:
    """Words to choose from.

    Attributes:
        name: Of the built-in list, or the file's.
        terms: Each once, in the order of the file.
        categories: The heading above each term; empty where there is none.
    """

    name: str
    terms: tuple[str, ...]
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.terms)

    @property
    def digest(self) -> str:
        """Hash of the terms."""
        return digest_of(list(self.terms))


@dataclass(frozen=True)
class TermScore:
    """How near one term is to a query.

    Attributes:
        term: The word.
        category: Its heading.
        cosine: With the query.
        expected: Mean cosine of the term over the reference; NaN without one.
        excess: ``cosine`` less ``expected``.
        z: ``excess`` in standard deviations over the reference.
        p_value: Share of the reference, the query added, whose cosine is at least as high: one-sided, at least
            1 / (n + 1), of this term alone (no correction for the number of terms).
    """

    term: str
    category: str
    cosine: float
    expected: float
    excess: float
    z: float
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; NaN as None."""
        numbers = {name: getattr(self, name) for name in ("cosine", "expected", "excess", "z", "p_value")}
        plain = {name: None if np.isnan(value) else float(value) for name, value in numbers.items()}
        return {"term": self.term, "category": self.category, **plain}


@dataclass(frozen=True)
class NearestTerms:
    """The terms nearest to one query, best first.

    Attributes:
        id: Of the query.
        terms: The ``k`` best.
        ranked_by: ``z``, ``excess`` or ``cosine``.
        n_reference: Reference rows that were compared with; 0 without a reference.
        vocabulary_size: Terms that there were to choose from.
    """

    id: str
    terms: tuple[TermScore, ...]
    ranked_by: str
    n_reference: int
    vocabulary_size: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the id."""
        return {
            "ranked_by": self.ranked_by,
            "n_reference": self.n_reference,
            "vocabulary_size": self.vocabulary_size,
            "terms": [term.to_dict() for term in self.terms],
        }


def vocabulary_names() -> tuple[str, ...]:
    """Return the names of the built-in vocabularies."""
    return tuple(sorted(path.stem for path in VOCABULARIES.glob("*.txt")))


def load_vocabulary(source: str | Path) -> Vocabulary:
    """Return a built-in vocabulary by name, or that of a text file: one term a line, ``[heading]``, ``# comment``.

    Raises:
        UnknownName: No built-in vocabulary and no file has this name.
        FileFormatError: The file is no UTF-8 text, or too large.
        InputError: It holds no term.
    """
    name = str(source)
    path = VOCABULARIES / f"{name}.txt" if name in vocabulary_names() else Path(source)
    if not path.is_file():
        raise UnknownName(
            "vocabulary", path.name, vocabulary_names(), hint="or the path of a text file, one term a line"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise FileFormatError(f"vocabulary `{path.name}` is larger than {_MAX_BYTES // 2**20} MiB")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"vocabulary `{path.name}` is not UTF-8 text") from error
    found: dict[str, str] = {}
    heading = ""
    for line in (raw.strip() for raw in lines):
        if line.startswith("[") and line.endswith("]"):
            heading = line[1:-1].strip()
        elif line and not line.startswith("#"):
            found.setdefault(line, heading)
    if not found:
        raise InputError(f"vocabulary `{path.name}` holds no term", hint="write one term a line")
    return Vocabulary(path.stem, tuple(found), tuple(found.values()))


def nearest_terms(
    queries: Embeddings,
    terms: Embeddings,
    reference: Embeddings | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    k: int = 10,
    rank_by: RankBy | None = None,
) -> tuple[NearestTerms, ...]:
    """Return the nearest terms of every query.

    Args:
        queries: Images or regions.
        terms: The embedded vocabulary; ``texts`` are its words.
        reference: Ordinary images, or the same region of them where the queries are regions; at least 20 after the
            query's own patient is left out.
        vocabulary: For the headings; in the order of ``terms``.
        k: How many.
        rank_by: ``z`` with a reference and ``cosine`` without, by default.

    Raises:
        InputError: No texts, too small a reference, or a rank that needs one.
        SpaceMismatch: Vectors of different encoders.
    """
    if terms.texts is None or len(terms) == 0:
        raise InputError("the vocabulary has no texts")
    if vocabulary is not None and len(vocabulary) != len(terms):
        raise InputError(f"{len(terms)} vectors came with a vocabulary of {len(vocabulary)} terms")
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    check_same_space(queries, terms, *(() if reference is None else (reference,)))
    by = rank_by or ("cosine" if reference is None else "z")
    if by not in ("z", "excess", "cosine"):
        raise UnknownName("rank", by, ("z", "excess", "cosine"))
    if reference is None and by != "cosine":
        raise InputError(f"ranking by `{by}` needs a reference set", hint="give ordinary images of the same kind")
    words = terms.normalize().vectors.astype(np.float64)
    cosines = queries.normalize().vectors.astype(np.float64) @ words.T
    null = None if reference is None else reference.normalize().vectors.astype(np.float64) @ words.T
    categories = ("",) * len(terms) if vocabulary is None else vocabulary.categories
    names = tuple(text or "" for text in terms.texts)
    return tuple(
        _nearest(queries.ids[i], cosines[i], _null_of(null, reference, queries, i), names, categories, k, by)
        for i in range(len(queries))
    )


def _null_of(
    null: NDArray[np.float64] | None, reference: Embeddings | None, queries: Embeddings, row: int
) -> NDArray[np.float64]:
    """Return the reference's cosines (rows, terms) without the query's own patient."""
    if null is None or reference is None:
        return np.zeros((0, 0))
    own = (queries.groups[row], queries.ids[row])
    kept = [
        k for k, (g, i) in enumerate(zip(reference.groups, reference.ids, strict=True)) if g not in own and i not in own
    ]
    if len(kept) < LEAST_REFERENCE:
        raise InputError(
            f"the reference has {len(kept)} rows of other patients, expected at least {LEAST_REFERENCE}",
            hint="give more ordinary images, or none",
        )
    return null[kept]


def _nearest(
    query: str,
    cosines: NDArray[np.float64],
    null: NDArray[np.float64],
    names: Sequence[str],
    categories: Sequence[str],
    k: int,
    by: str,
) -> NearestTerms:
    missing = np.full(len(cosines), np.nan)
    expected, z, p_value = missing, missing, missing
    if len(null):
        expected, spread = null.mean(0), null.std(0, ddof=1)
        z = (cosines - expected) / np.maximum(spread, 1e-9)
        p_value = (1 + (null >= cosines).sum(0)) / (len(null) + 1)
    excess = cosines - expected
    order = np.argsort(-{"z": z, "excess": excess, "cosine": cosines}[by], kind="stable")[:k]
    scored = tuple(
        TermScore(
            names[j],
            categories[j],
            float(cosines[j]),
            float(expected[j]),
            float(excess[j]),
            float(z[j]),
            float(p_value[j]),
        )
        for j in order
    )
    return NearestTerms(query, scored, by, len(null), len(cosines))
