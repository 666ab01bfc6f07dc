"""The reports that images may be paired with: a frozen corpus whose digest names it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from chiasm.datasets.columns import Columns
from chiasm.errors import InputError
from chiasm.io.manifest import Rejected, count_reasons, summarize_rejected, to_json
from chiasm.io.report import clean_report


@dataclass(frozen=True)
class Report:
    """One report.

    Attributes:
        id: Unique in its corpus.
        text: Cleaned; one line, never empty.
        tissue: As the source has it, or None.
        patient: Who it is about, where the source says.
    """

    id: str
    text: str
    tissue: str | None = None
    patient: str | None = None


@dataclass(frozen=True)
class FilterCount:
    """One filter, in words, with the reports that it kept and dropped (of those that reached it)."""

    what: str
    kept: int
    dropped: int

    def __str__(self) -> str:
        return f"{self.what}: {self.kept} kept, {self.dropped} dropped"


@dataclass(frozen=True)
class ReportCorpus:
    """Reports in a fixed order, with what was left out on the way.

    Attributes:
        reports: In the order of the source; ids are unique, texts may repeat.
        name: Of the file or folder.
        filters: In the order in which they were applied.
        rejected: Rows that could not be used; for a local file only, since it holds ids.
        columns: How a table was understood; None for text files and for texts from memory.
    """

    reports: tuple[Report, ...]
    name: str = ""
    filters: tuple[FilterCount, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    columns: Columns | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reports", tuple(self.reports))
        if not self.reports:
            raise InputError(f"the corpus `{self.name}` has no report")
        if len({r.id for r in self.reports}) != len(self.reports):
            raise InputError(f"ids of the reports of `{self.name}` are not unique")

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        *,
        ids: Sequence[str] | None = None,
        tissues: Sequence[str | None] | None = None,
        patients: Sequence[str | None] | None = None,
        name: str = "texts",
    ) -> ReportCorpus:
        """Return a corpus of texts in memory, cleaned; without ``ids`` they are called ``text-1``, ``text-2`` ...

        Raises:
            InputError: There is no text, one has nothing in it, or another argument has another length.
        """
        cleaned = [clean_report(t) for t in texts]
        n = len(cleaned)
        for what, values in (("ids", ids), ("tissues", tissues), ("patients", patients)):
            if values is not None and len(values) != n:
                raise InputError(f"{what} has {len(values)} entries for {n} texts")
        empty = [i for i, t in enumerate(cleaned) if not t]
        if empty:
            raise InputError(f"{len(empty)} of {n} texts are empty when cleaned (first: text {empty[0]})")
        own = ids if ids is not None else [f"text-{i}" for i in range(1, n + 1)]
        rows = zip(own, cleaned, tissues or [None] * n, patients or [None] * n, strict=True)
        return cls(tuple(Report(*row) for row in rows), name)

    def __len__(self) -> int:
        return len(self.reports)

    def __iter__(self) -> Iterator[Report]:
        return iter(self.reports)

    def __getitem__(self, row: int) -> Report:
        return self.reports[row]

    @property
    def ids(self) -> tuple[str, ...]:
        """Id of each report."""
        return tuple(r.id for r in self.reports)

    @property
    def texts(self) -> tuple[str, ...]:
        """Cleaned text of each report."""
        return tuple(r.text for r in self.reports)

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 of ids and cleaned texts, in order."""
        hasher = hashlib.sha256()
        for r in self.reports:
            hasher.update(to_json([r.id, r.text]).encode() + b"\n")
        return hasher.hexdigest()[:16]

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """For each report the row of the first report with the same text: its own unless it repeats one."""
        first: dict[str, int] = {}
        return tuple(first.setdefault(r.text, row) for row, r in enumerate(self.reports))

    @property
    def duplicates(self) -> int:
        """Number of reports whose text an earlier report has; they stay in the corpus."""
        return sum(first != row for row, first in enumerate(self.first_rows))

    def to_dict(self) -> dict[str, Any]:
        """Return name, digest and counts as plain JSON values; neither ids nor texts."""
        return {
            "name": self.name,
            "digest": self.digest,
            "reports": len(self),
            "duplicates": self.duplicates,
            "filters": [{"what": f.what, "kept": f.kept, "dropped": f.dropped} for f in self.filters],
            "rejected": count_reasons(self.rejected),
        }

    def summary(self) -> str:
        """Return lines for a reader: how many reports, what the filters did, what was rejected."""
        lines = [f"{len(self)} reports of `{self.name}` ({self.duplicates} repeat the text of another)"]
        return "\n".join(
            [*lines, *map(str, self.filters), *([summarize_rejected(self.rejected)] if self.rejected else [])]
        )
