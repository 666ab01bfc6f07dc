"""Small records beside the big files: JSON written atomically, JSON lines that survive a crash, lists of bad rows.

A process may be killed between any two calls: an atomic file is either the old or the new one, and a log of lines
loses at most the line that was being written. Non-finite numbers become null, because JSON has none.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from chiasm.errors import FileFormatError, InputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a full or read-only disk inside the block into ``InputError``; other errors pass through.

    Args:
        what: What was being written ("the store"), for the message.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Lance reports system errors as RuntimeError with the number in the text.
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = getattr(error, "errno", None) or (int(found.group(1)) if found else None)
        if number in _FULL:
            raise InputError(
                f"the disk is full: {what} could not be written", hint="free some space and run the same command again"
            ) from error
        if number in _DENIED:
            raise InputError(
                f"{what} may not be written there", hint="choose a folder that you may write to"
            ) from error
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, without importing NumPy
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON: NumPy values as plain ones, paths as strings, NaN and infinities as null."""
    return json.dumps(_plain(value), ensure_ascii=False, indent=indent, allow_nan=False)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON so that a reader sees the old file or the new one, never a part.

    Raises:
        InputError: When the disk is full or the folder may not be written; the old file is untouched.
    """
    write_bytes_atomic(path, (to_json(value, indent=2) + "\n").encode())


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write a whole file so that a reader sees the old one or the new one; see :func:`write_json_atomic`.

    A device or a pipe (``/dev/stdout``) is written to, never replaced.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        with disk_errors(f"`{path.name}`"):
            path.write_bytes(content)
        return
    with disk_errors(f"`{path.name}`"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _umask() -> int:
    # mkstemp makes files that only the owner may read; give them the mode that open() would have given.
    current = os.umask(0o022)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # makes the rename itself durable
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class JsonlWriter:
    """Append JSON objects to a file, one a line; use as a context manager.

    Every line goes out in one write at the end of the file, so lines of several processes do not mix. A torn last
    line that a killed process left is cut off when the file is opened again. ``close`` syncs to disk.

    Args:
        path: Made with its folders when absent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with disk_errors(f"`{self.path.name}`"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self._descriptor: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object.

        Raises:
            InputError: When the disk is full; nothing of the line remains in the file.
        """
        if self._descriptor is None:
            raise ValueError("write to a closed JsonlWriter")
        line = (to_json(record) + "\n").encode()
        with disk_errors(f"`{self.path.name}`"):
            before = os.fstat(self._descriptor).st_size
            written = 0
            try:
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
            except OSError:
                if written:
                    os.ftruncate(self._descriptor, before)
                raise

    def close(self) -> None:
        """Sync and close; a second call does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with disk_errors(f"`{self.path.name}`"):
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _cut_torn_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            block = file.read(position - start)
            newline = block.rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; blank lines are skipped, a torn last line is ignored.

    Raises:
        FileFormatError: A line other than an unfinished last one is not a JSON object.
        InputError: The file does not exist.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"file `{path.name}` does not exist") from None
    lines = content.split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError:
            if number == len(lines):
                break
            raise FileFormatError(f"line {number} of `{path.name}` is not JSON") from None
        if not isinstance(record, dict):
            raise FileFormatError(f"line {number} of `{path.name}` is not a JSON object")
        records.append(record)
    return records


@dataclass(frozen=True)
class Rejected:
    """A row that could not be used.

    Attributes:
        row: Position in its source; in a table, 1 is the first row under the header.
        id: The row's id when it was known, else an empty string. For the local ``rejected.jsonl`` only: ids never
            enter messages.
        reason: Why, without patient data, so that reasons can be counted and shown.
    """

    row: int
    id: str
    reason: str


class RejectLog:
    """Collects rejected rows from any thread, counts them by reason, and writes them out.

    Args:
        items: Rows rejected earlier.
    """

    def __init__(self, items: Sequence[Rejected] = ()) -> None:
        self._items = list(items)
        self._lock = threading.Lock()

    def add(self, row: int, id: str, reason: str) -> None:
        """Note one row."""
        with self._lock:
            self._items.append(Rejected(row, id, reason))

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Rejected]:
        return iter(self.items)

    @property
    def items(self) -> tuple[Rejected, ...]:
        """The rows in order of their position."""
        with self._lock:
            return tuple(sorted(self._items, key=lambda r: r.row))

    def counts(self) -> dict[str, int]:
        """Return reason -> number of rows, most frequent first."""
        return count_reasons(self.items)

    def summary(self) -> str:
        """Return one line such as ``3 rows rejected: 2 image file is missing, 1 text is empty``."""
        return summarize_rejected(self.items)

    def write(self, path: str | Path) -> None:
        """Write ``{"row", "id", "reason"}`` a line, atomically; an empty log writes an empty file."""
        write_rejected(path, self.items)


def count_reasons(rejected: Sequence[Rejected]) -> dict[str, int]:
    """Return reason -> number of rows, most frequent first."""
    return dict(Counter(r.reason for r in rejected).most_common())


def summarize_rejected(rejected: Sequence[Rejected]) -> str:
    """Return one line with the count of rejected rows and of each reason; it names no row."""
    if not rejected:
        return "no row rejected"
    parts = ", ".join(f"{n} {reason}" for reason, n in count_reasons(rejected).items())
    return f"{len(rejected)} {'row' if len(rejected) == 1 else 'rows'} rejected: {parts}"


def write_rejected(path: str | Path, rejected: Sequence[Rejected]) -> None:
    """Write rejected rows as JSON lines ``{"row", "id", "reason"}``, atomically."""
    lines = [to_json({"row": r.row, "id": r.id, "reason": r.reason}) + "\n" for r in rejected]
    write_bytes_atomic(path, "".join(lines).encode())
