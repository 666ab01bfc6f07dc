"""Images packed where no offset leads to them: compressed tar shards and Parquet files with image bytes inside.

Comes in: such a file. Goes out: a `Shard` whose bytes lie in one nameless temporary file, read once, block by block.
The system drops that file when the process ends, however it ends; ``TMPDIR`` says where it lies.
"""

from __future__ import annotations

import atexit
import gzip
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from chiasm.errors import FileFormatError, InputError
from chiasm.io.manifest import disk_errors

if TYPE_CHECKING:
    import pyarrow as pa

TAR_SUFFIXES = (".tar",)
GZIP_SUFFIXES = (".tar.gz", ".tgz")
PARQUET_SUFFIXES = (".parquet", ".pq")
#: What all packed files of a process may take unpacked; more is better unpacked once and for all.
MAX_UNPACKED_BYTES = 16 << 30
#: Images hardly shrink under gzip: a file that grows more than this is a decompression bomb.
MAX_GROWTH = 200
_BLOCK_BYTES = 1 << 20
_ROWS = 16


@dataclass(frozen=True)
class Shard:
    """What a file that holds images holds.

    Attributes:
        members: Name -> offset and size of the bytes, in the order of the file.
        refused: Names that are no plain files or that point outside the shard.
        damaged: Whether the file ends early; the members before the damage can be read.
        unpacked: Whether offsets count in the temporary file of this module, not in the shard.
    """

    members: Mapping[str, tuple[int, int]]
    refused: tuple[str, ...] = ()
    damaged: bool = False
    unpacked: bool = False


class Spool:
    """One growing temporary file; threads may read while another thread writes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.file: IO[bytes] = tempfile.TemporaryFile(prefix="chiasm-")  # noqa: SIM115, lives as long as the process
        atexit.register(self.file.close)
        self.size = 0

    def write(self, block: bytes, *, name: str) -> None:
        """Append bytes.

        Raises:
            InputError: The disk is full, or all packed files together are too large.
        """
        if self.size + len(block) > MAX_UNPACKED_BYTES:
            raise InputError(
                f"`{name}` would take more than {MAX_UNPACKED_BYTES >> 30} GB unpacked, with what was unpacked before",
                hint="unpack it to a disk of its own first",
            )
        with disk_errors(f"the unpacked `{name}`"):
            self.file.seek(self.size)
            self.file.write(block)
        self.size += len(block)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes at an offset."""
        with self.lock:
            self.file.seek(offset)
            return self.file.read(size)

    def cut(self, size: int) -> None:
        """Drop what was written after ``size``."""
        self.file.seek(size)
        self.file.truncate()
        self.size = size


@cache
def spool() -> Spool:
    """Return the temporary file of this process, made at the first call."""
    return Spool()


def unpack_gzip(path: Path) -> tuple[int, int, bool]:
    """Unpack a compressed tar and return where it begins and ends in the spool, and whether it is torn.

    The caller holds the lock of the spool.

    Raises:
        FileFormatError: It is not compressed by gzip, or grows beyond reason.
        InputError: It is too large, or the disk is full.
    """
    to, limit = spool(), MAX_GROWTH * path.stat().st_size + _BLOCK_BYTES
    start, torn = to.size, False
    try:
        with gzip.open(path) as file:
            while True:
                try:
                    block = file.read1(_BLOCK_BYTES)  # unlike read, it gives what lies before a tear
                except gzip.BadGzipFile as error:
                    if to.size == start:
                        raise FileFormatError(f"`{path.name}` is not compressed by gzip") from error
                    torn = True
                    break
                except (EOFError, zlib.error):
                    torn = True
                    break
                if not block:
                    break
                to.write(block, name=path.name)
                if to.size - start > limit:
                    raise FileFormatError(
                        f"`{path.name}` grows more than {MAX_GROWTH}-fold when it is unpacked",
                        hint="unpack it yourself if you trust it",
                    )
    except BaseException:
        to.cut(start)
        raise
    return start, to.size, torn


def unpack_parquet(path: Path) -> Shard:
    """Unpack the bytes of every image column; members are named ``column/row``, the first row is 1.

    The caller holds the lock of the spool.

    Raises:
        FileFormatError: It is no readable Parquet file.
        InputError: It is too large, or the disk is full.
    """
    import pyarrow as pa
    import pyarrow.parquet

    to = spool()
    start = to.size
    members: dict[str, tuple[int, int]] = {}
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for column in blob_columns(file.schema_arrow):
                for row, content in enumerate(_contents(file, column), start=1):
                    if content:
                        members[f"{column}/{row}"] = (to.size, len(content))
                        to.write(content, name=path.name)
    except (pa.ArrowException, OSError) as error:
        to.cut(start)
        raise FileFormatError(f"`{path.name}` is not a readable Parquet file") from error
    except BaseException:
        to.cut(start)
        raise
    return Shard(members, unpacked=True)


def blob_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that hold bytes, or structures with a field ``bytes`` as `datasets` of Hugging Face writes."""
    return [
        f.name for f in schema if _is_bytes(f.type) or "bytes" in [g.name for g in _fields(f.type) if _is_bytes(g.type)]
    ]


def buried_columns(schema: pa.Schema) -> list[str]:
    """Return the columns whose bytes lie deeper, in lists of images say: they are neither images nor labels."""

    def has_bytes(kind: pa.DataType) -> bool:
        return _is_bytes(kind) or any(has_bytes(f.type) for f in _fields(kind))

    flat = blob_columns(schema)
    return [f.name for f in schema if f.name not in flat and has_bytes(f.type)]


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _fields(kind: pa.DataType) -> list[pa.Field]:
    return [kind.field(i) for i in range(kind.num_fields)]


def _contents(file: pa.parquet.ParquetFile, column: str) -> Iterator[bytes | None]:
    """Yield the bytes of each row of a column, a few rows at a time."""
    for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
        for cell in batch.column(0).to_pylist():
            yield cell.get("bytes") if isinstance(cell, Mapping) else cell
