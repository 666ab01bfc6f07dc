"""Vectors on disk by what they were computed from: computed once, found again under any id, order or file name.

Comes in: 32-byte hashes of contents with their vectors. Goes out: vectors by hash. A cache is a folder of shards; each is
one memory-mapped ``.npy`` array of records (hash, vector) that appears by a rename, so a killed process leaves whole
shards only, and two processes may write at once. The folder's name is a digest of what turns contents into vectors
(encoder, weights, preprocessing): another encoder has another folder.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.io.manifest import write_bytes_atomic, write_json_atomic
from chiasm.types import digest_of

HASH_BYTES = 32


class VectorCache:
    """Vectors of one kind of content.

    Args:
        folder: Of all caches; made when something is added.
        key: JSON value that identifies what computes the vectors.
        dim: Of a vector.

    Attributes:
        path: Folder of the shards.
    """

    def __init__(self, folder: str | Path, key: Any, dim: int) -> None:
        self.path = Path(folder) / digest_of(key, 24)
        self.dim = dim
        self._key = key
        self._shards: list[NDArray[Any]] = []
        self._place: dict[bytes, tuple[int, int]] = {}
        for file in sorted(self.path.glob("shard-*.npy")):
            self._open(file)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, content: bytes) -> bool:
        return content in self._place

    def add(self, contents: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
        """Store vectors as one shard; it is on disk when this returns.

        Raises:
            InputError: The disk is full or the folder may not be written; nothing is stored then.
        """
        if not contents:
            return
        if vectors.shape != (len(contents), self.dim) or any(len(c) != HASH_BYTES for c in contents):
            raise InputError(f"{len(contents)} contents do not fit vectors of shape {vectors.shape}")
        records = np.empty(len(contents), dtype=self._record)
        records["hash"] = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, HASH_BYTES)
        records["vector"] = vectors
        buffer = io.BytesIO()
        np.save(buffer, records, allow_pickle=False)
        name = hashlib.sha256(b"".join(contents)).hexdigest()[:24]
        if not self._shards:
            write_json_atomic(self.path / "key.json", self._key)
        file = self.path / f"shard-{name}.npy"
        write_bytes_atomic(file, buffer.getvalue())
        self._open(file)

    def read(self, contents: Sequence[bytes]) -> NDArray[np.float32]:
        """Return the vectors of contents, all of which must be stored, in their order."""
        result = np.empty((len(contents), self.dim), dtype=np.float32)
        if not contents:
            return result
        places = np.asarray([self._place[c] for c in contents], dtype=np.int64)
        for shard in np.unique(places[:, 0]).tolist():
            rows = np.flatnonzero(places[:, 0] == shard)
            result[rows] = self._shards[shard]["vector"][places[rows, 1]]
        return result

    @property
    def _record(self) -> np.dtype[Any]:
        return np.dtype([("hash", np.uint8, (HASH_BYTES,)), ("vector", "<f4", (self.dim,))])

    def _open(self, file: Path) -> None:
        """Map a shard; a damaged one counts as absent and is written again under its name."""
        try:
            shard = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return
        if shard.dtype != self._record or shard.ndim != 1 or not np.isfinite(shard["vector"]).all():
            return
        for row, content in enumerate(shard["hash"]):
            self._place[content.tobytes()] = (len(self._shards), row)
        self._shards.append(shard)
