"""Files to rows: CSV, TSV, JSON lines, JSON and Parquet, without guessing what a column means.

Comes in: a path. Goes out: a header and rows of cells, each row either whole or with the reason why it is not.
Separator and encoding of text tables are detected, and reported so that the user can see them.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from chiasm.datasets.packed import blob_columns, buried_columns
from chiasm.errors import FileFormatError, InputError

#: Of a table that ends in ``.gz``.
MAX_UNPACKED_BYTES = 1 << 30
SEPARATORS = (",", "\t", ";", "|")
TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".txt", ".jsonl", ".ndjson", ".json", ".parquet", ".pq")
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class RawTable:
    """Cells as the file has them.

    Attributes:
        header: Unique, non-empty names.
        rows: Row number (1 is the first under the header) and its cells in the order of the header; a `Path` leads to
            an image inside the table's own file.
        bad: Row number and reason of each row that is not whole.
        separator: Of a text table, else None.
        encoding: Of a text table, else None.
    """

    header: tuple[str, ...]
    rows: list[tuple[int, list[Any]]]
    bad: list[tuple[int, str]] = field(default_factory=list)
    separator: str | None = None
    encoding: str | None = None

    def values(self, column: str) -> list[object]:
        """Return the cells of a column."""
        place = self.header.index(column)
        return [cells[place] for _, cells in self.rows]


def parse_table(
    path: Path,
    *,
    separator: str | None = None,
    encoding: str | None = None,
    list_separator: str = "|",
    only: Iterable[str] | None = None,
) -> RawTable:
    """Return the cells of a table file, chosen by its ending (anything unknown is read as delimited text).

    Args:
        path: The file; a text table may be compressed: ``x.csv.gz``.
        separator: Of delimited text; None detects it.
        encoding: Of text; None detects it.
        list_separator: Joins the items of a list in a cell of JSON or Parquet.
        only: Columns to read of a Parquet file, those that it has; None reads all.

    Raises:
        InputError: The file is absent, empty, or in an unknown encoding that the user named.
        FileFormatError: The file is not the table that its ending promises.
    """
    if not path.is_file():
        raise InputError(f"table `{path.name}` does not exist")
    if path.stat().st_size == 0:
        raise InputError(f"table `{path.name}` is empty")
    suffix = path.suffix.casefold()
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _parse_json(path, encoding, list_separator)
    if suffix in (".parquet", ".pq"):
        return _parse_parquet(path, list_separator, None if only is None else set(only))
    return _parse_text(path, separator, encoding)


def detect_encoding(path: Path) -> str:
    """Return ``utf-8``, ``utf-8-sig`` or ``utf-16`` by what the bytes are, else ``cp1252``, else ``latin-1``.

    Raises:
        FileFormatError: The file is binary.
    """
    with _open_bytes(path) as file:
        start = file.read(65536)
        for bom, name in _BOMS:
            if start.startswith(bom):
                return name
        if b"\0" in start:
            picture = start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*")) or start[128:132] == b"DICM"
            raise FileFormatError(
                f"`{path.name}` is {'an image' if picture else 'a binary file, not text'}",
                hint="a table is asked for: CSV, TSV, JSONL or Parquet with a row an image"
                if picture
                else "if it is UTF-16 without a mark, save it as UTF-8",
            )
        for name in ("utf-8", "cp1252"):
            file.seek(0)
            decoder = codecs.getincrementaldecoder(name)()
            try:
                while block := file.read(1 << 20):
                    decoder.decode(block)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                continue
            return name
    return "latin-1"


def read_text(path: Path, encoding: str | None = None) -> tuple[str, str]:
    """Return the content of a text file, line ends as they are, and its encoding, detected where none is given.

    Raises:
        InputError: The encoding that the user named is unknown.
        FileFormatError: The file is binary, or not in that encoding.
    """
    encoding = encoding or detect_encoding(path)
    try:
        return path.read_bytes().decode(encoding), encoding
    except LookupError:
        raise InputError(f"unknown encoding `{encoding}`", hint="utf-8, utf-16, cp1252 or latin-1") from None
    except UnicodeDecodeError as error:
        raise FileFormatError(f"`{path.name}` is not {encoding} text", hint="name its encoding") from error


def _open_bytes(path: Path) -> IO[bytes]:
    """Open a file; one that ends in ``.gz`` is unpacked in memory.

    Raises:
        FileFormatError: It is not compressed by gzip, torn, or grows beyond reason.
    """
    if path.suffix.casefold() != ".gz":
        return path.open("rb")
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FileFormatError(f"`{path.name}` is not a whole gzip file", hint="download it again") from error
    if len(content) > MAX_UNPACKED_BYTES:
        raise FileFormatError(f"`{path.name}` is larger than {MAX_UNPACKED_BYTES >> 30} GB unpacked")
    return io.BytesIO(content)


def detect_separator(head: str) -> str:
    """Return the separator that splits the header into the most columns that the first rows agree with."""

    def score(separator: str) -> tuple[int, int]:
        try:
            records = [r for r in csv.reader(io.StringIO(head), delimiter=separator) if r][:20]
        except csv.Error:
            return (0, 0)
        if not records:
            return (0, 0)
        # The last record of the head may be cut short.
        width = len(records[0])
        named = max((i + 1 for i, name in enumerate(records[0]) if name.strip()), default=0)
        agreeing = sum(len(r) >= named and not any(r[width:]) for r in records[:-1])
        return (width if width > 1 and 2 * agreeing >= len(records) - 1 else 1, agreeing)

    return max(SEPARATORS, key=score)


def unique_header(names: Iterable[str]) -> list[str]:
    """Return stripped names, a repeated one numbered as ``name.1``; unnamed columns become empty strings."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        stripped = name.strip()
        count = seen.get(stripped, 0)
        seen[stripped] = count + 1
        result.append(f"{stripped}.{count}" if stripped and count else stripped)
    return result


def _parse_text(path: Path, separator: str | None, encoding: str | None) -> RawTable:
    encoding = encoding or detect_encoding(path)
    try:
        with _open_bytes(path) as raw, io.TextIOWrapper(raw, encoding=encoding, newline="") as file:
            separator = separator or detect_separator(file.read(65536))
            file.seek(0)
            return _read_delimited(file, separator, encoding, path.name)
    except LookupError:
        raise InputError(f"unknown encoding `{encoding}`", hint="utf-8, utf-16, cp1252 or latin-1") from None
    except UnicodeDecodeError as error:
        raise FileFormatError(f"`{path.name}` is not {encoding} text", hint="name its encoding") from error


def _read_delimited(file: io.TextIOWrapper, separator: str, encoding: str, name: str) -> RawTable:
    if len(separator) != 1:
        raise InputError(f"the separator must be one character, got {len(separator)}")
    reader = csv.reader(file, delimiter=separator)
    try:
        names = unique_header(next(reader, []))
        kept = [i for i, n in enumerate(names) if n]
        if not kept:
            raise InputError(f"table `{name}` has no header")
        named = kept[-1] + 1
        table = RawTable(tuple(names[i] for i in kept), [], [], separator, encoding)
        number = 0
        for record in reader:
            if not any(cell.strip() for cell in record):
                continue
            number += 1
            if len(record) >= named and not any(record[len(names) :]):
                table.rows.append((number, [record[i] for i in kept]))
            else:
                table.bad.append((number, f"row does not have the {len(names)} fields of the header"))
    except csv.Error as error:
        raise FileFormatError(
            f"`{name}` is not a table near line {reader.line_num}: {error}", hint="look for a quote that is not closed"
        ) from error
    return table


def _parse_json(path: Path, encoding: str | None, list_separator: str) -> RawTable:
    content, encoding = read_text(path, encoding)
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    records: list[tuple[int, dict[str, Any]]] = []
    bad: list[tuple[int, str]] = []
    for number, value in _json_values(content, path):
        if isinstance(value, dict):
            records.append((number, value))
        else:
            bad.append((number, "row is not a JSON object"))
    return _from_records(records, bad, encoding, list_separator)


def _json_values(content: str, path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix.casefold() == ".json":
        try:
            whole = json.loads(content)
        except ValueError as error:
            raise FileFormatError(f"`{path.name}` is not JSON", hint="end JSON lines in `.jsonl`") from error
        if not isinstance(whole, list):
            raise FileFormatError(f"`{path.name}` must hold a list of objects, got {type(whole).__name__}")
        yield from enumerate(whole, start=1)
        return
    for number, line in enumerate((x for x in content.split("\n") if x.strip()), start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        yield number, value


def _from_records(
    records: list[tuple[int, dict[str, Any]]],
    bad: list[tuple[int, str]],
    encoding: str | None,
    list_separator: str,
) -> RawTable:
    header = list(dict.fromkeys(str(k) for _, record in records for k in record))
    rows = [(number, [flat_cell(record.get(h), list_separator) for h in header]) for number, record in records]
    return RawTable(tuple(header), rows, bad, None, encoding)


def flat_cell(value: object, list_separator: str = "|") -> object:
    """Return a nested JSON value as one cell: a list of scalars (nulls left out) joined, anything deeper as JSON."""
    if isinstance(value, (list, tuple)):
        if all(v is None or isinstance(v, (str, int, float)) for v in value):
            return list_separator.join(str(v) for v in value if v is not None)
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, Mapping) and not any(isinstance(v, bytes) for v in value.values()):
        return json.dumps(value, ensure_ascii=False, default=str)
    if value is None or isinstance(value, (str, int, float, bytes, Mapping, Path)):
        return value
    return str(value)


def _parse_parquet(path: Path, list_separator: str, only: set[str] | None) -> RawTable:
    """Return the cells; where a column holds the bytes of images, its cells are paths through the file."""
    import pyarrow
    import pyarrow.parquet

    records: list[tuple[int, dict[str, Any]]] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            blobs, buried = blob_columns(schema), buried_columns(schema)
            header = [name for name in schema.names if name not in buried and (only is None or name in only)]
            blobs = [name for name in blobs if name in header]
            plain = [name for name in header if name not in blobs]
            for batch in file.iter_batches(columns=plain):
                first = len(records) + 1
                rows = batch.to_pylist() if plain else [{} for _ in range(batch.num_rows)]
                records.extend(enumerate(rows, start=first))
    except (pyarrow.ArrowException, OSError) as error:
        raise FileFormatError(f"`{path.name}` is not a readable Parquet file") from error
    for number, record in records:
        record.update({name: path / name / str(number) for name in blobs})
    if not records:
        return RawTable(tuple(header), [])
    return _from_records([(n, {h: r[h] for h in header}) for n, r in records], [], None, list_separator)
