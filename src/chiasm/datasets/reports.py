"""Reports as they lie on disk to a corpus: text without images, cleaned once, filtered with counts.

Comes in: a text file with one report a line, a table (CSV, TSV, JSON lines, JSON, Parquet), or a folder of text files.
Goes out: a `ReportCorpus`, whose digest says whether pairs made with it may be used with it. Filters see cleaned texts,
and leave a count each; rows that cannot be used are listed with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from chiasm.datasets.columns import (
    Columns,
    cell_text,
    find_column,
    is_unique,
    plain_name,
    resolve_columns,
    show_columns,
)
from chiasm.datasets.corpus import FilterCount, Report, ReportCorpus
from chiasm.datasets.parsing import RawTable, parse_table, read_text
from chiasm.datasets.report_filters import (
    MAX_REPORT_CHARS,
    RawReport,
    cell_filter,
    make_corpus,
    name_column,
    text_filters,
    tissue_filter,
)
from chiasm.datasets.sources import find_table
from chiasm.errors import FileFormatError, InputError
from chiasm.io.manifest import Rejected

__all__ = ["FilterCount", "Report", "ReportCorpus", "read_reports"]

#: Names of id columns beside those of tables; used where they are unique.
REPORT_ID_NAMES = ("reportid", "noteid", "accession", "accessionnumber", "patientfilename", "filename", "file")
TISSUE_NAMES = (
    "tissue", "tissueororganoforigin", "tissuetype", "organ", "organoforigin", "primarysite", "bodysite", "bodypart",
    "site",
)  # fmt: skip
PACKED = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".7z")


def read_reports(
    path: str | Path,
    *,
    text: str | Sequence[str] | None = None,
    id: str | None = None,
    tissue: str | None = None,
    patient: str | None = None,
    tissue_column: str | None = None,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    where: Sequence[str] = (),
    min_words: int = 0,
    encoding: str | None = None,
) -> ReportCorpus:
    """Read a corpus of reports, clean every text and apply the filters, in the order of the arguments below.

    A ``.txt`` file has one report a line, called ``line-N``. Any other file is a table with a header; its columns are
    found by name (``report``, ``text``, ``findings`` with ``impression`` ...; ids need a unique column, else rows are
    called ``row-N``). A folder with a table is that table; else its ``.txt`` files, at any depth, are one report each,
    in the order of their names, which are the ids. `chiasm.datasets.report_sources` also opens ``tcga:FOLDER``.

    A pattern is found anywhere, whatever its case (``colon``); ``=colon`` must be the whole value; ``re:^colo`` is a
    regular expression, searched without case.

    Args:
        path: File or folder.
        text: Column of the reports; several are joined by a space.
        id: Column of ids.
        tissue: Pattern for the tissue. Where the source has no tissue column, the text itself is searched; the count
            says which. A report without tissue is dropped.
        patient: Column of patients.
        tissue_column: Column of tissues; an empty string says that there is none.
        where: ``COLUMN=PATTERN`` each, for any column: ``source=tcga``, ``source==tcga_colorectal``.
        keep: Patterns that a text must have, all of them.
        drop: Patterns that a text must not have.
        min_words: Words separated by white space that a text must have.
        encoding: Of text; None detects it.

    Raises:
        InputError: There is nothing at ``path`` or nothing usable in it, ids repeat, a pattern is malformed, or a filter
            leaves no report; the message names the filter.
        UnknownName: A column that was named does not exist.
        FileFormatError: The file is damaged or binary.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"reports `{path.name}` do not exist", hint="give a text file, a table or a folder of texts")
    if path.is_file() and path.suffix.casefold() in PACKED:
        raise InputError(f"`{path.name}` is packed", hint="unpack it first")
    source = _folder_source(path) if path.is_dir() else path
    wheres = [_split_where(w) for w in where]
    columns: Columns | None = None
    if source.is_file() and source.suffix.casefold() != ".txt":
        wanted = Columns(
            image="",
            text=text if text is None or isinstance(text, str) else tuple(text),
            id=id,
            patient=patient,
            encoding=encoding,
        )
        raw, rejected, columns, tissue_column = _read_table(source, wanted, tissue_column, [c for c, _ in wheres])
    else:
        options = {"text": text, "id": id, "patient": patient, "tissue_column": tissue_column, "where": where}
        named = [name for name, value in options.items() if value]
        if named:
            raise InputError(f"`{path.name}` has no columns; `{named[0]}` is not for it", hint="leave it out")
        raw, rejected = _read_folder(source, encoding) if source.is_dir() else _read_lines(source, encoding)
    filters = [tissue_filter(tissue, tissue_column or None)] if tissue is not None else []
    filters += [cell_filter(column, pattern) for column, pattern in wheres]
    return make_corpus(
        raw,
        name=path.name,
        filters=[*filters, *text_filters(keep=keep, drop=drop, min_words=min_words)],
        rejected=rejected,
        columns=columns,
    )


def _split_where(text: str) -> tuple[str, str]:
    column, equals, pattern = text.partition("=")
    if not (column.strip() and equals and pattern):
        raise InputError(f"`{text}` is no condition", hint="COLUMN=PATTERN, for example `source=tcga`")
    return column.strip(), pattern


def _read_table(
    path: Path, wanted: Columns, tissue_column: str | None, asked: Sequence[str]
) -> tuple[list[RawReport], list[Rejected], Columns, str | None]:
    """Return the rows of a table with the cells ``asked`` for, its bad rows, its columns, and its tissue column."""
    table = parse_table(path, encoding=wanted.encoding, list_separator="\n")
    header = table.header
    rejected = [Rejected(number, "", reason) for number, reason in table.bad]
    if not header:
        return [], rejected, wanted, None
    if wanted.id is None:
        wanted = replace(wanted, id=_first_column(table, REPORT_ID_NAMES, unique=True))
    found = resolve_columns(wanted, header, table.values, path.name)
    if not found.text:
        raise InputError(
            f"table `{path.name}` has no column of reports",
            hint=f"{name_column('text')}; it has {show_columns(header)}",
        )
    if tissue_column is None:
        tissue_column = _first_column(table, TISSUE_NAMES)
    elif tissue_column:
        tissue_column = find_column(tissue_column, header, path.name)
    place = {h: i for i, h in enumerate(header)}
    columns_asked = {c: find_column(c, header, path.name) for c in asked}
    texts = (found.text,) if isinstance(found.text, str) else found.text
    if any(isinstance(v, Path) for c in texts for v in table.values(c)[:1]):
        raise InputError(f"the column of reports of `{path.name}` holds bytes, not text", hint=name_column("text"))

    def cell(cells: Sequence[object], column: str | None) -> str | None:
        return cell_text(cells[place[column]]) if column else None

    ids = _row_ids(table, found, detect=wanted.id is None)
    raw = [
        RawReport(
            number,
            id,
            " ".join(t for t in (cell(cells, c) for c in texts) if t) or None,
            cell(cells, tissue_column),
            cell(cells, found.patient),
            {name: cell(cells, c) for name, c in columns_asked.items()},
        )
        for id, (number, cells) in zip(ids, table.rows, strict=True)
    ]
    labels = (tissue_column,) if tissue_column else ()
    understood = replace(found, labels=labels, separator=table.separator, encoding=table.encoding)
    return raw, rejected, understood, tissue_column or None


def _first_column(table: RawTable, names: Sequence[str], *, unique: bool = False) -> str | None:
    named = {plain_name(h): h for h in reversed(table.header)}
    found = (named[n] for n in names if n in named)
    return next((c for c in found if not unique or is_unique(table.values(c))), None)


def _row_ids(table: RawTable, columns: Columns, *, detect: bool) -> list[str]:
    """Return the ids of a table's rows: a column that was named or is unique, else the row."""
    if columns.id:
        ids = [cell_text(v) for v in table.values(columns.id)]
        if not is_unique(ids):
            blank = sum(i is None for i in ids)
            repeated = len(ids) - blank - len({i for i in ids if i is not None})
            raise InputError(
                f"id column `{columns.id}` is not unique: {blank} blank, {repeated} repeated",
                hint=f"{name_column('id')}; an empty name means none",
            )
        return [i or "" for i in ids]
    for column in (columns.study, columns.patient):
        if detect and column and is_unique(table.values(column)):
            return [cell_text(v) or "" for v in table.values(column)]
    return [f"row-{number}" for number, _ in table.rows]


def _read_lines(path: Path, encoding: str | None) -> tuple[list[RawReport], list[Rejected]]:
    """Return one report a line. Only line ends count: a form feed or a Unicode separator does not end a report."""
    if path.stat().st_size == 0:
        raise InputError(f"reports `{path.name}` are empty")
    content, _ = read_text(path, encoding)
    content = content if "\n" in content else content.replace("\r", "\n")
    lines = content.removesuffix("\n").split("\n")
    return [RawReport(n, f"line-{n}", line) for n, line in enumerate(lines, start=1)], []


def _folder_source(folder: Path) -> Path:
    """Return the table of a folder, or the folder itself where its text files are the reports."""
    texts = _text_files(folder)
    table = find_table(folder)
    if table is None:
        if not texts:
            raise InputError(f"folder `{folder.name}` holds neither a table nor `.txt` files")
        return folder
    if len(texts) > 1:
        raise InputError(
            f"folder `{folder.name}` holds the table `{table.name}` and {len(texts)} text files",
            hint="name the one you mean",
        )
    return table


def _text_files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.suffix.casefold() == ".txt" and p.is_file())
    visible = [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return sorted(visible, key=lambda p: p.relative_to(folder).as_posix())


def _read_folder(folder: Path, encoding: str | None) -> tuple[list[RawReport], list[Rejected]]:
    raw: list[RawReport] = []
    rejected: list[Rejected] = []
    for row, path in enumerate(_text_files(folder), start=1):
        id = path.relative_to(folder).as_posix()
        try:
            if path.stat().st_size > 4 * MAX_REPORT_CHARS:
                rejected.append(Rejected(row, id, f"text is longer than {MAX_REPORT_CHARS:,} characters"))
                continue
            raw.append(RawReport(row, id, read_text(path, encoding)[0]))
        except FileFormatError:
            rejected.append(Rejected(row, id, "file is not text, or in another encoding"))
        except OSError:
            rejected.append(Rejected(row, id, "file cannot be read"))
    return raw, rejected
