"""Raw reports in, a corpus out: cleaned, filtered by patterns, with a count of what each filter kept and dropped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from chiasm.datasets.columns import Columns
from chiasm.datasets.corpus import FilterCount, Report, ReportCorpus
from chiasm.errors import InputError
from chiasm.io.manifest import Rejected, summarize_rejected
from chiasm.io.report import clean_report

#: A report beyond this is a file without line ends, or no report.
MAX_REPORT_CHARS = 1_000_000
PATTERN_HINT = "`colon` is found anywhere in any case, `=colon` is the whole value, `re:^colo` a regular expression"


@dataclass(frozen=True)
class RawReport:
    """A report before cleaning: its row in the source, what is known of it, and other cells that filters ask for."""

    row: int
    id: str
    text: str | None
    tissue: str | None = None
    patient: str | None = None
    cells: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Filter:
    """What stays: a test of a cleaned report, and its words for counts and errors."""

    what: str
    test: Callable[[RawReport, str], bool]


def make_corpus(
    raw: Iterable[RawReport],
    *,
    name: str,
    filters: Sequence[Filter] = (),
    rejected: Sequence[Rejected] = (),
    columns: Columns | None = None,
) -> ReportCorpus:
    """Clean raw reports, reject those without text, apply the filters in turn and count.

    Raises:
        InputError: No report can be used, or a filter leaves none.
    """
    bad = list(rejected)
    left: list[tuple[RawReport, str]] = []
    for report in raw:
        cleaned, reason = "", ""
        if report.text is None:
            reason = "text is empty"
        elif len(report.text) > MAX_REPORT_CHARS:
            reason = f"text is longer than {MAX_REPORT_CHARS:,} characters"
        elif not _is_storable(report.id):
            reason = "id holds a character that no file can hold"
        else:
            cleaned = clean_report(report.text)
            reason = "" if cleaned else "text is empty"
        if reason:
            bad.append(Rejected(report.row, report.id, reason))
        else:
            left.append((report, cleaned))
    bad.sort(key=lambda r: r.row)
    if not left:
        raise InputError(
            f"`{name}` has no usable report" + (f": {summarize_rejected(bad)}" if bad else ""),
            hint=name_column("text") if columns else "give a file with reports in it",
        )
    counts = []
    for one in filters:
        kept = [(report, cleaned) for report, cleaned in left if one.test(report, cleaned)]
        if not kept:
            raise InputError(f"the filter {one.what} leaves none of {len(left)} reports of `{name}`", hint=PATTERN_HINT)
        counts.append(FilterCount(one.what, len(kept), len(left) - len(kept)))
        left = kept
    reports = tuple(Report(r.id, cleaned, r.tissue, r.patient) for r, cleaned in left)
    return ReportCorpus(reports, name, tuple(counts), tuple(bad), columns)


def name_column(role: str) -> str:
    """Return how a column of a corpus is named: at the command line, in a recipe and in Python."""
    return f"name it: `--report-column {role}=NAME`, in a recipe `pairing.columns.{role}`, in Python `{role}=`"


def tissue_filter(pattern: str, column: str | None) -> Filter:
    """Return the filter for a tissue: on the tissue column, or on the text where there is no such column."""
    words, matches = parse_pattern(pattern)
    if column is None:
        return Filter(f"tissue {words} (in the text: there is no tissue column)", lambda _, text: matches(text))
    return Filter(f"tissue {words} (column `{column}`)", lambda raw, _: raw.tissue is not None and matches(raw.tissue))


def text_filters(*, keep: Sequence[str] = (), drop: Sequence[str] = (), min_words: int = 0) -> list[Filter]:
    """Return the filters on texts; see :func:`read_reports`."""
    if isinstance(keep, str) or isinstance(drop, str):
        raise InputError("`keep` and `drop` take a list of patterns, got one string")
    filters = []
    for pattern in keep:
        words, matches = parse_pattern(pattern)
        filters.append(_text_filter(f"text {words}", matches))
    for pattern in drop:
        words, matches = parse_pattern(pattern)
        filters.append(_text_filter(f"not: text {words}", matches, wanted=False))
    if min_words > 0:
        filters.append(Filter(f"text has at least {min_words} words", lambda _, text: len(text.split()) >= min_words))
    return filters


def parse_pattern(pattern: str) -> tuple[str, Callable[[str], bool]]:
    """Return a pattern in words and its test; ``colon``, ``=colon`` or ``re:^colo``, all without case.

    Raises:
        InputError: It is empty, or a malformed regular expression.
    """
    kind, sought = ("re", pattern[3:]) if pattern.startswith("re:") else ("is", pattern[1:])
    if kind == "is" and not pattern.startswith("="):
        kind, sought = "has", pattern
    sought = sought.strip() if kind != "re" else sought
    if not sought:
        raise InputError("a pattern is empty", hint=PATTERN_HINT)
    if kind == "re":
        try:
            expression = re.compile(sought, re.IGNORECASE)
        except re.error as error:
            raise InputError(f"`{sought}` is no regular expression: {error.msg}", hint=PATTERN_HINT) from None
        return f"matches `{sought}`", lambda value: expression.search(value) is not None
    folded = sought.casefold()
    if kind == "is":
        return f"is `{sought}`", lambda value: value.strip().casefold() == folded
    return f"contains `{sought}`", lambda value: folded in value.casefold()


def cell_filter(column: str, pattern: str) -> Filter:
    """Return the filter on a column of the source; a blank cell is dropped."""
    words, matches = parse_pattern(pattern)

    def test(raw: RawReport, _: str) -> bool:
        cell = raw.cells[column]
        return cell is not None and matches(cell)

    return Filter(f"column `{column}` {words}", test)


def _text_filter(what: str, matches: Callable[[str], bool], *, wanted: bool = True) -> Filter:
    return Filter(what, lambda _, text: matches(text) is wanted)


def _is_storable(id: str) -> bool:
    try:
        id.encode()
    except UnicodeEncodeError:
        return False
    return bool(id) and "\0" not in id
