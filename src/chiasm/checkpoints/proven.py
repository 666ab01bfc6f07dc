"""The SHA-256 of a large weight file, found once and remembered for as long as the file is the same.

In: a path. Out: 64 hex digits. Reading 600 MB to see that nothing changed takes longer than building the model, so the
digest is kept in ``$CHIASM_HOME/digests``, beside what tells one state of a file from another: device, inode, size, and the
times of the last change of content and of the inode, of which no program can set the second. Any write, copy, replacement
or restored date makes the file be read again; deleting the folder makes all be. What cannot be remembered (a read-only
home, a file written in the last seconds, Windows) is read each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

#: Smaller files are read each time: that is as fast.
SMALLEST_BYTES = 16 * 2**20
#: A file may be written again within one tick of its clock without another date; coarse file systems tick in 2 s.
SETTLED_S = 5.0


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content.

    Raises:
        OSError: The file cannot be read.
    """
    state = _state(path)
    if state is None:
        return _read(path)
    note = _note(path)
    known = _recall(note, state)
    if known is not None:
        return known
    digest = _read(path)
    age_s = time.time() - path.stat().st_ctime
    if note is not None and age_s > SETTLED_S and _state(path) == state:
        _remember(note, state, digest)
    return digest


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> list[int] | None:
    """What changes whenever the file does; None where it is small or the system does not tell."""
    found = path.stat()
    if os.name != "posix" or found.st_size < SMALLEST_BYTES:
        return None
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _note(path: Path) -> Path | None:
    """Where the digest of this file is kept: under a digest of its path, which may name a patient or a study."""
    try:
        home = Path(os.environ.get("CHIASM_HOME") or "~/.cache/chiasm").expanduser()
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    except (OSError, RuntimeError):  # no home, or a loop of links
        return None
    return home / "digests" / f"{name}.json"


def _recall(note: Path | None, state: list[int]) -> str | None:
    if note is None:
        return None
    try:
        value = json.loads(note.read_text(encoding="ascii"))
        digest = value["sha256"] if value["state"] == state else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _remember(note: Path, state: list[int], digest: str) -> None:
    following = note.with_name(f"{note.name}.{os.getpid()}.next")
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        following.write_text(json.dumps({"state": state, "sha256": digest}) + "\n", encoding="ascii")
        following.replace(note)
