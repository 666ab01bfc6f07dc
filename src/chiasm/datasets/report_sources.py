"""Whatever holds reports, opened by the reader that fits: ``tcga:FOLDER`` as TCGA is downloaded, anything else as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chiasm.datasets.corpus import ReportCorpus
from chiasm.datasets.reports import read_reports
from chiasm.datasets.tcga_reports import read_tcga_reports
from chiasm.errors import InputError

TCGA = "tcga:"


def open_reports(
    source: str | Path,
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
    """Read a corpus of reports by what it is.

    ``tcga:FOLDER`` is TCGA's pathology reports as they are obtained, see `chiasm.datasets.tcga_reports`; anything else is
    a text file, a table or a folder of texts, see `chiasm.datasets.reports.read_reports`, which the arguments are of.

    Raises:
        InputError: There is nothing to read, a filter leaves nothing, or columns are named for TCGA's tables, which are
            known by theirs.
        UnknownName: A column that was named does not exist.
        FileFormatError: A file is damaged.
    """
    if not str(source).casefold().startswith(TCGA):
        return read_reports(
            source, text=text, id=id, tissue=tissue, patient=patient, tissue_column=tissue_column, keep=keep, drop=drop,
            where=where, min_words=min_words, encoding=encoding,
        )  # fmt: skip
    named = {"text": text, "id": id, "patient": patient, "tissue_column": tissue_column, "where": where}
    given = [name for name, value in (named | {"encoding": encoding}).items() if value]
    if given:
        raise InputError(
            f"`{given[0]}` has no meaning for TCGA, whose tables are known by their columns",
            hint="leave it out, or name the table itself without `tcga:`",
        )
    root = Path(str(source)[len(TCGA) :]).expanduser()
    return read_tcga_reports(root, tissue=tissue, keep=keep, drop=drop, min_words=min_words)
