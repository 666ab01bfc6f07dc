"""A table of scores from any classifier to rows that can be calibrated: CSV, TSV, Parquet, JSON or JSONL.

One row an image. A column of scores a label, a patient, and the truth: one column of class names (several joined by
``|``), or a 0/1 column a label named ``truth LABEL`` or ``truth_LABEL``. Scores are logits (log-odds for labels), or
probabilities when all lie in [0, 1]; those become log-odds, or logarithms for classes that exclude each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chiasm.datasets.columns import GROUP_NAMES, ID_NAMES, cell_text, find_column, plain_name, show_columns
from chiasm.errors import FileFormatError, InputError
from chiasm.metrics.bootstrap import Floats
from chiasm.metrics.labels import as_binary
from chiasm.tasks.scored_rows import Origin, ScoredRows
from chiasm.tasks.zero_shot import Mode

if TYPE_CHECKING:
    import pandas as pd

#: Beginnings of a column of scores, with what follows as the label.
SCORE_PREFIXES = ("score", "probability", "prob", "logit")
SMALLEST = 1e-12
"""Probabilities nearer to 0 or 1 than this are taken as this, so that their log-odds are finite."""


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Rows of a table of scores.

    Attributes:
        rows: Scores with their truth.
        parts: The split of each row, where the table says it.
        has_patients: Whether the table has a column of patients; without one each row counts as a patient.
        has_truth: Whether there was a truth.
        kind: ``logits`` or ``probabilities``, as found.
    """

    rows: ScoredRows
    parts: tuple[str | None, ...]
    has_patients: bool
    has_truth: bool
    kind: str


#: What pandas, pyarrow and json raise on damaged files; lookups and types where metadata lie about their own parts.
_UNREADABLE = (ValueError, OSError, RecursionError, OverflowError, LookupError, TypeError, AttributeError)


def read_score_table(
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    truth: str | None = "truth",
    patient: str | None = None,
    multi: bool | None = None,
    kind: str | None = None,
) -> ScoreTable:
    """Return the rows of a table of scores.

    Args:
        path: The table.
        labels: Names of the labels; None: the columns called ``score LABEL``, ``probability LABEL``, ``logit LABEL`` (or
            with ``_``), else the columns that are named as values of the truth.
        truth: Column of the true class; ``*``: a 0/1 column a label; None: there is none.
        patient: Column of the patient; None: found by name.
        multi: Whether any number of labels can be true; None: when the truth is 0/1 columns or joins names by ``|``.
        kind: ``logits`` or ``probabilities``; None: probabilities when all scores lie in [0, 1].

    Raises:
        FileFormatError: When the file cannot be read as what its ending says.
        InputError: When columns are missing, scores are no numbers, or the truth names none of the labels.
    """
    frame = _read(Path(path))
    header = [str(c) for c in frame.columns]
    frame.columns = header  # type: ignore[assignment]  # pandas types the setter as an Index
    if not len(frame):
        raise InputError(f"table `{Path(path).name}` has no row")
    joined = None if truth in (None, "*") else [cell_text(v) for v in frame[find_column(str(truth), header, "scores")]]
    columns = _score_columns(header, labels, joined)
    names = tuple(columns)
    mode: Mode = "multi" if _is_multi(multi, truth, joined) else "single"
    scores = _numbers(frame, columns)
    inside = bool(((scores >= 0) & (scores <= 1)).all())
    kind = kind or ("probabilities" if inside else "logits")
    if kind == "probabilities" and not inside:
        raise InputError("scores lie outside [0, 1], but probabilities are expected")
    if kind == "probabilities":
        clipped = np.clip(scores, SMALLEST, 1 - SMALLEST)
        scores = np.log(clipped) - (np.log1p(-clipped) if mode == "multi" else 0.0)
    wanted = np.full(scores.shape, np.nan)
    if truth == "*":
        wanted = _truth_columns(frame, header, names)
    elif joined is not None:
        wanted = _truth_names(joined, names, mode)
    column = find_column(patient, header, "scores") if patient else _named(header, GROUP_NAMES["patient"])
    ids = _texts(frame, _named(header, ID_NAMES)) or [f"row {i}" for i in range(len(frame))]
    groups = _texts(frame, column) or ids
    parts = _texts(frame, _named(header, GROUP_NAMES["split"])) or [None] * len(frame)
    rows = ScoredRows(
        scores,
        wanted,
        tuple(g if g is not None else f"row {i}" for i, g in enumerate(groups)),
        tuple(i if i is not None else f"row {k}" for k, i in enumerate(ids)),
        Origin(mode, names, activation=kind),
    )
    return ScoreTable(rows, tuple(parts), column is not None, truth is not None, kind)


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd
    from pyarrow import ArrowException

    if not path.is_file():
        raise InputError(f"table `{path.name}` does not exist", hint="check the path")
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv", ".txt"):
            return pd.read_csv(
                path, sep="\t" if kind == ".tsv" else ",", keep_default_na=False, na_values=["", "nan", "NaN"]
            )
        if kind in (".parquet", ".pq"):
            return pd.read_parquet(path)
        if kind in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8-sig")
            records = json.loads(text) if kind == ".json" else [json.loads(x) for x in text.splitlines() if x.strip()]
            if not isinstance(records, list) or not all(isinstance(r, Mapping) for r in records):
                raise InputError(f"`{path.name}` must hold a list of records, one a row")
            return pd.DataFrame(records)
    except InputError:
        raise
    except (*_UNREADABLE, ArrowException) as error:
        raise FileFormatError(f"table `{path.name}` cannot be read as {kind}: {type(error).__name__}") from error
    raise FileFormatError(f"table `{path.name}` ends in `{kind}`", hint="give .csv, .tsv, .parquet, .json or .jsonl")


def _score_columns(
    header: Sequence[str], labels: Sequence[str] | None, joined: Sequence[str | None] | None
) -> dict[str, str]:
    """Return label -> column of its score."""
    prefixed: dict[str, str] = {}
    twice: set[str] = set()
    for column in header:
        for prefix in SCORE_PREFIXES:
            rest = column[len(prefix) + 1 :]
            if column.casefold().startswith((f"{prefix} ", f"{prefix}_")) and rest.strip():
                twice |= {plain_name(rest)} if rest.strip() in prefixed else set()
                prefixed[rest.strip()] = column
    ambiguous = [name for name in (labels or prefixed) if plain_name(name) in twice]
    if ambiguous:
        raise InputError(f"label `{ambiguous[0]}` has two columns of scores", hint="keep one of them in the table")
    if labels:
        found = {}
        for label in labels:
            known = {plain_name(k): c for k, c in prefixed.items()} | {plain_name(c): c for c in header}
            if plain_name(label) not in known:
                raise InputError(f"the table has no column of scores for label `{label}`",
                                 hint=f"it has {show_columns(header)}")  # fmt: skip
            found[label] = known[plain_name(label)]
    elif prefixed:
        found = prefixed
    else:
        stated = {plain_name(part) for cell in joined or () if cell for part in cell.split("|")}
        found = {column: column for column in header if plain_name(column) in stated}
    if not found:
        raise InputError("the table has no column of scores that can be recognised",
                         hint="call them `score LABEL`, or name the labels with --labels")  # fmt: skip
    return found


def _is_multi(multi: bool | None, truth: str | None, joined: Sequence[str | None] | None) -> bool:
    if multi is not None:
        return multi
    return truth == "*" or any("|" in cell for cell in joined or () if cell)


def _numbers(frame: pd.DataFrame, columns: Mapping[str, str]) -> Floats:
    try:
        values = np.stack([np.asarray(frame[c], dtype=np.float64) for c in columns.values()], axis=1)
    except (TypeError, ValueError) as error:
        raise InputError("a column of scores holds something that is no number") from error
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad:
        raise InputError(f"{bad} of {len(values)} rows have a score that is missing or not finite",
                         hint="leave these rows out")  # fmt: skip
    return values


def _truth_columns(frame: pd.DataFrame, header: Sequence[str], names: Sequence[str]) -> Floats:
    known = {plain_name(c): c for c in header}
    columns = []
    for name in names:
        column = known.get(plain_name(f"truth {name}"))
        if column is None:
            raise InputError(f"the table has no 0/1 column `truth {name}`", hint="or name one column with --truth")
        columns.append(as_binary([None if cell_text(v) is None else v for v in frame[column].astype(object)]))
    return np.stack(columns, axis=1)


def _truth_names(joined: Sequence[str | None], names: Sequence[str], mode: Mode) -> Floats:
    number = {plain_name(name): k for k, name in enumerate(names)}
    found = np.full((len(joined), len(names)), np.nan)
    for i, cell in enumerate(joined):
        if cell is None:
            continue
        found[i] = 0.0
        for part in cell.split("|"):
            if plain_name(part) in number:
                found[i, number[plain_name(part)]] = 1.0
    if mode == "single":
        unknown = (found == 0).all(axis=1)
        if unknown.any():
            raise InputError(f"{int(unknown.sum())} of {len(joined)} rows have a true class that has no column of scores",
                             hint="add its column, or say --multi where no label may be true")  # fmt: skip
        if (found == 1).sum(axis=1).max(initial=0) > 1:
            raise InputError("a row has two true classes that should exclude each other", hint="say --multi")
    elif not (found == 1).any():
        raise InputError("no label occurs in the column of the truth", hint="name the labels as the column does")
    return found


def _named(header: Sequence[str], names: Sequence[str]) -> str | None:
    known = {plain_name(c): c for c in header}
    return next((known[n] for n in names if n in known), None)


def _texts(frame: pd.DataFrame, column: str | None) -> list[Any] | None:
    return None if column is None else [cell_text(v) for v in frame[column]]
