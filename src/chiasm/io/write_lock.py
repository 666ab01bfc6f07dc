"""One writer at a time: a lock on a folder that ends with its process.

Comes in: a folder. Goes out: the right to write there, or a refusal.
"""

from __future__ import annotations

import sys
from pathlib import Path

from chiasm.errors import InputError


class WriteLock:
    """A lock on the folder of a store that the system drops when its process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._file = (path / ".lock").open("a")
        try:
            _lock_file(self._file.fileno())
        except OSError:
            self._file.close()
            raise InputError(
                f"another process writes to the store in `{path.name}`", hint="wait until it is done"
            ) from None

    def release(self) -> None:
        """Let others write."""
        self._file.close()


def _lock_file(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
