"""Embeddings on disk: one folder with a Lance table that grows, survives ``kill -9`` and refuses a second space.

Comes in: `Embeddings` in chunks. Goes out: `Embeddings`. A chunk is committed as a whole or not at all. What holds for
all rows (space, preprocessing, logit scale ...) lies in the schema of the table and nowhere else, so the table and its
meaning appear in one step. One process may write at a time; the lock ends with its process, so there are no dead locks.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray

import chiasm
from chiasm.errors import FileFormatError, InputError, SpaceMismatch, UnknownName
from chiasm.io.manifest import disk_errors, to_json
from chiasm.io.mapped_vectors import map_vectors
from chiasm.io.write_lock import WriteLock
from chiasm.types import Embeddings, LabelValue, Modality, Space, digest_of

if TYPE_CHECKING:
    import pyarrow as pa

Column = Literal["text", "path", "patient", "labels"]
COLUMNS: tuple[Column, ...] = ("text", "path", "patient", "labels")
_TABLE = "embeddings"
_KEY = b"chiasm"
#: Appends between two compactions of a long run; every append leaves a small file.
COMPACT_EVERY = 256
#: Rows that are read at a time.
READ_ROWS = 8192


@dataclass(frozen=True)
class StoreMetadata:
    """What holds for every row of a store.

    Attributes:
        space: Encoder, weights digest, preprocessing digest, dimensions.
        normalized: Whether rows have unit L2 norm.
        logit_scale: Multiplier of cosines.
        logit_bias: Added after the scale (SigLIP).
        preprocess: The preprocessing behind the digest of the space, for people.
        chiasm_version: Of the writer.
        members: Models that stand side by side in a vector; 1 is left out of the file.
        precision: Arithmetic in which the encoder computed the vectors; ``fp32`` is left out of the file.
    """

    space: Space
    normalized: bool = True
    logit_scale: float | None = None
    logit_bias: float | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    chiasm_version: str = chiasm.__version__
    members: int = 1
    precision: str = "fp32"

    @classmethod
    def of(cls, embeddings: Embeddings, *, preprocess: Mapping[str, Any] | None = None) -> Self:
        """Return the metadata of a store that starts with these embeddings."""
        e = embeddings
        known = dict(preprocess or {})
        return cls(e.space, e.normalized, e.logit_scale, e.logit_bias, known, members=e.members, precision=e.precision)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {**dataclasses.asdict(self), "space": self.space.to_dict(), "preprocess": dict(self.preprocess)}
        if self.members == 1:
            del values["members"]
        if self.precision == "fp32":
            del values["precision"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`; unknown keys of later versions are passed over."""
        known = {f.name for f in dataclasses.fields(cls)}
        rest = {k: v for k, v in values.items() if k in known and k != "space"}
        return cls(space=Space.from_dict(values["space"]), **rest)


class EmbeddingStore:
    """An open store; made by :func:`open_store` and :func:`create_store`. Use as a context manager when writing.

    Attributes:
        path: Its folder.
        metadata: What holds for every row.
    """

    def __init__(self, path: Path, table: Any, metadata: StoreMetadata) -> None:
        self.path = path
        self.metadata = metadata
        self._table = table
        self._known: dict[Modality, set[str]] | None = None
        self._next_row = 0
        self._lock: WriteLock | None = None
        self._appends = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def space(self) -> Space:
        """The space of every row."""
        return self.metadata.space

    def count(self, modality: Modality | None = None) -> int:
        """Return the number of rows, of one modality or of all."""
        condition = None if modality is None else _is_modality(modality)
        with self._readable():
            return int(self._table.count_rows(condition))

    def ids(self, modality: Modality) -> tuple[str, ...]:
        """Return the ids of one modality in the order in which they were appended."""
        found: list[tuple[int, str]] = []
        for batch in self._scan(["row", "id"], _is_modality(modality)):
            found.extend(zip(batch["row"].to_pylist(), batch["id"].to_pylist(), strict=True))
        return tuple(i for _, i in sorted(found))

    def lock(self) -> None:
        """Take the right to write now, so that work that takes long is not done in vain.

        Raises:
            InputError: Another process writes to the store.
        """
        self._writable()

    def append(self, embeddings: Embeddings) -> int:
        """Add the rows whose (modality, id) is not stored yet, all of them in one commit.

        A stored row is kept as it is, so appending twice changes nothing. Vectors that are not normalised are when the
        store's are.

        Returns:
            The number of rows added.

        Raises:
            SpaceMismatch: The embeddings are of another space than the store.
            InputError: Another process writes to the store, the disk is full (nothing of the chunk is stored then),
                an id is empty or occurs twice in the chunk, a vector is not finite, or the store holds normalised
                vectors and these cannot be told from raw ones.
        """
        if embeddings.space != self.space:
            raise SpaceMismatch(
                f"the store holds embeddings of `{self.space}`, these are of `{embeddings.space}`",
                hint="write them to another folder",
            )
        if self.metadata.normalized:
            embeddings = embeddings.normalize()
        elif embeddings.normalized:
            raise InputError("the store holds vectors that are not normalised, these are", hint="append raw vectors")
        if len(set(embeddings.ids)) != len(embeddings) or not all(embeddings.ids):
            raise InputError(f"ids of {len(embeddings)} embeddings are empty or occur twice")
        if not np.isfinite(embeddings.vectors).all():
            raise InputError("some vectors hold NaN or infinity", hint="check the weights and the precision")
        known = self._writable()[embeddings.modality]
        fresh = [row for row, id in enumerate(embeddings.ids) if id not in known]
        if not fresh:
            return 0
        chunk = embeddings.select(fresh)
        try:
            with disk_errors("the store"):
                self._commit(lambda: self._table.add(_to_arrow(chunk, self._next_row)), self.count() + len(chunk))
        except BaseException:
            # Ctrl-C leaves open whether the commit went through: look again before the next append, tidy up later.
            self._known, self._appends = None, 0
            raise
        known.update(chunk.ids)
        self._next_row += len(chunk)
        self._appends += 1
        if self._appends % COMPACT_EVERY == 0:
            self._compact()
        return len(chunk)

    def read(
        self,
        modality: Modality,
        *,
        columns: Sequence[Column] = COLUMNS,
        ids: Sequence[str] | None = None,
        mapped: bool = False,
    ) -> Embeddings:
        """Return the rows of one modality in the order in which they were appended, or in the order of ``ids``.

        Vectors are read in blocks straight into the result: memory stays at the result plus one block.

        Args:
            modality: ``image`` or ``text``.
            columns: What to read beside ids and vectors.
            ids: Only these.
            mapped: Vectors are mapped from a file in the store, which the first such call writes: as large as they are.

        Raises:
            InputError: An id is not stored, an unknown modality or column, or the mapped file cannot be written.
        """
        unknown = [c for c in columns if c not in COLUMNS]
        if unknown:
            raise UnknownName("column of the store", unknown[0], COLUMNS)
        condition = _is_modality(modality)
        n = self.count(modality)
        vectors = self._mapped(modality, n) if mapped and n else np.empty((n, self.space.dim), np.float32)
        order = np.empty(n, np.int64)
        rest: dict[str, list[Any]] = {c: [] for c in ("id", *columns)}
        at = 0
        for batch in self._scan(["row", *([] if mapped else ["vector"]), *rest], condition):
            end = at + batch.num_rows
            if not mapped:
                vectors[at:end] = _vectors(batch, self.space.dim)
            order[at:end] = batch["row"].to_numpy()
            for name, values in rest.items():
                values.extend(batch[name].to_pylist())
            at = end
        if mapped and not (np.diff(order) > 0).all():  # as the mapped vectors are
            rising = np.argsort(order)
            order, rest = order[rising], {name: [values[i] for i in rising] for name, values in rest.items()}
        m = self.metadata
        result = Embeddings(
            vectors=vectors,
            ids=tuple(rest["id"]),
            space=m.space,
            modality=modality,
            normalized=m.normalized,
            logit_scale=m.logit_scale,
            logit_bias=m.logit_bias,
            members=m.members,
            texts=_column(rest, "text"),
            paths=_column(rest, "path"),
            patients=_column(rest, "patient"),
            labels=_labels(rest.get("labels", [])),
            precision=m.precision,
        )
        if ids is not None:
            place = {id: i for i, id in enumerate(result.ids)}
            missing = sum(id not in place for id in ids)
            if missing:
                raise InputError(f"{missing} of {len(ids)} ids are not in the store")
            return result.select([place[id] for id in ids])
        return result if n == 0 or (np.diff(order) > 0).all() else result.select(np.argsort(order))

    def _mapped(self, modality: Modality, n: int) -> NDArray[np.float32]:
        # Files of a table have random names: no other table, and no other version of it, has the same.
        files = sorted(f.name for f in (self.path / f"{_TABLE}.lance" / "data").glob("*"))
        batches = partial(self._scan, ["row", "vector"], _is_modality(modality))
        return map_vectors(
            self.path / "search" / modality,
            digest_of([self._table.version, files], 24),
            (n, self.space.dim),
            lambda: ((batch["row"].to_numpy(), _vectors(batch, self.space.dim)) for batch in batches()),
        )

    def close(self) -> None:
        """Merge the small files of a run, drop old versions and let others write; a second call does nothing."""
        if self._lock is not None:
            try:
                if self._appends:
                    # Every row is committed already; a disk too full to tidy up loses nothing.
                    with suppress(InputError):
                        self._compact()
            finally:
                self._lock.release()
                self._lock = self._known = None
                self._appends = 0

    def _scan(self, columns: list[str], condition: str) -> Iterator[Any]:
        with self._readable():
            yield from self._table.search().where(condition).select(columns).limit(None).to_batches(READ_ROWS)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise FileFormatError(
                f"the store in `{self.path.name}` cannot be read: it is damaged, or was written to meanwhile",
                hint="open it again; if it stays so, `chiasm embed` goes back to the last whole version",
            ) from error

    def _writable(self) -> dict[Modality, set[str]]:
        """Take the lock once, then read what is stored, so that nobody can add between the two."""
        if self._known is None:
            self._lock = self._lock or WriteLock(self.path)
            self._table.checkout_latest()
            known: dict[Modality, set[str]] = {"image": set(), "text": set()}
            last = -1
            self._go_back_to_whole()
            for modality, ids in known.items():
                for batch in self._scan(["row", "id"], _is_modality(modality)):
                    ids.update(batch["id"].to_pylist())
                    last = max([last, *batch["row"].to_pylist()])
            self._known, self._next_row = known, last + 1
        return self._known

    def _commit(self, change: Callable[[], object], expected: int) -> None:
        """Run a change and undo it unless every file of the new version can be opened.

        Lance 13 does not notice when the last write to a data file fails, and commits a file without its end.
        """
        data = self.path / f"{_TABLE}.lance" / "data"
        version, before = self._table.version, set(data.glob("*"))
        change()
        if self._count_whole() != expected:
            for file in set(data.glob("*")) - before:
                file.unlink()
            self._table.checkout(version)
            self._table.restore()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _count_whole(self) -> int | None:
        """Return the number of rows after opening every file, or None when one is damaged."""
        try:
            return int(self._table.count_rows("row >= 0"))
        except (OSError, RuntimeError):
            return None

    def _go_back_to_whole(self) -> None:
        """Make the last version whose files are whole the newest, should a writer have died before it could."""
        if self._count_whole() is not None:
            return
        for version in sorted((int(v["version"]) for v in self._table.list_versions()), reverse=True)[1:]:
            self._table.checkout(version)
            if self._count_whole() is not None:
                with disk_errors("the store"):
                    self._table.restore()
                return
        raise FileFormatError(f"the store in `{self.path.name}` is damaged, and no earlier version of it is whole")

    def _compact(self) -> None:
        with disk_errors("the store"), warnings.catch_warnings():
            # Lance warns that readers of old versions will fail: they are told to read again.
            warnings.simplefilter("ignore", UserWarning)
            self._commit(self._table.optimize, self.count())
            # Only now may the old files go. Unverified files are what a killed writer left; the lock says that nobody
            # is writing them.
            self._table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)


def open_store(path: str | Path) -> EmbeddingStore:
    """Open a store that exists, to read it or to append to it.

    Raises:
        InputError: There is no store.
        FileFormatError: The table there was not written by chiasm.
    """
    path = Path(path)
    table = _open_table(path)
    if table is None:
        raise InputError(f"there is no store in `{path.name}`", hint="make one with `chiasm embed`")
    try:
        metadata = StoreMetadata.from_dict(json.loads(table.schema.metadata[_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the table in `{path.name}` is not a store of chiasm") from error
    return EmbeddingStore(path, table, metadata)


def create_store(path: str | Path, metadata: StoreMetadata, *, exist_ok: bool = True) -> EmbeddingStore:
    """Make a store, or open the one that is there when it holds the same space.

    Raises:
        SpaceMismatch: The store there holds another space.
        InputError: It exists and ``exist_ok`` is False, or the folder cannot be written.
    """
    path = Path(path)
    if _open_table(path) is not None:
        if not exist_ok:
            raise InputError(f"there is a store in `{path.name}` already", hint="choose another folder, or resume")
        store = open_store(path)
        if store.space != metadata.space:
            raise SpaceMismatch(
                f"the store in `{path.name}` holds embeddings of `{store.space}`, the encoder gives `{metadata.space}`",
                hint="choose another folder, or the encoder that the store was made with",
            )
        return store
    import lancedb

    with disk_errors("the store"):
        path.mkdir(parents=True, exist_ok=True)
        lock = WriteLock(path)
        try:
            if _open_table(path) is None:
                # A writer that was killed while it made the table leaves a folder without a version.
                shutil.rmtree(path / f"{_TABLE}.lance", ignore_errors=True)
                lancedb.connect(path).create_table(_TABLE, schema=_schema(metadata))
        finally:
            lock.release()
    return create_store(path, metadata)


def stored_precision(path: str | Path) -> str | None:
    """Return the precision in which the vectors of a store were computed, or None where there is no store."""
    return None if _open_table(Path(path)) is None else open_store(path).metadata.precision


def save_embeddings(path: str | Path, *embeddings: Embeddings) -> None:
    """Append embeddings of one space to the store at ``path``, making it when absent."""
    if not embeddings:
        raise InputError("no embeddings to save")
    with create_store(path, StoreMetadata.of(embeddings[0])) as store:
        for part in embeddings:
            store.append(part)


def _open_table(path: Path) -> Any:
    if not (path / f"{_TABLE}.lance").is_dir() or not any((path / f"{_TABLE}.lance" / "_versions").glob("*.manifest")):
        return None
    import lancedb

    try:
        return lancedb.connect(path).open_table(_TABLE)
    except (ValueError, OSError, RuntimeError) as error:
        raise FileFormatError(f"the store in `{path.name}` is damaged") from error


def _is_modality(modality: str) -> str:
    if modality not in ("image", "text"):
        raise InputError(f"modality must be `image` or `text`, got `{modality}`")
    return f"modality = '{modality}'"


def _schema(metadata: StoreMetadata) -> pa.Schema:
    import pyarrow as pa

    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("vector", pa.list_(pa.float32(), metadata.space.dim), nullable=False),
        *(pa.field(name, pa.string()) for name in COLUMNS),
    ]
    return pa.schema(fields, metadata={_KEY: to_json(metadata.to_dict()).encode()})


def _to_arrow(e: Embeddings, first_row: int) -> pa.Table:
    import pyarrow as pa

    n = len(e)
    labels = [to_json({k: v[i] for k, v in e.labels.items()}) if e.labels else None for i in range(n)]
    blank = [None] * n
    columns: dict[str, Any] = {
        "row": pa.array(range(first_row, first_row + n), pa.int64()),
        "id": pa.array(e.ids, pa.string()),
        "modality": pa.array([e.modality] * n, pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(e.vectors.ravel(), pa.float32()), e.dim),
        "text": pa.array(e.texts or blank, pa.string()),
        "path": pa.array(e.paths or blank, pa.string()),
        "patient": pa.array(e.patients or blank, pa.string()),
        "labels": pa.array(labels, pa.string()),
    }
    schema = _schema(StoreMetadata(e.space)).remove_metadata()
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _vectors(batch: Any, dim: int) -> NDArray[np.float32]:
    flat: NDArray[np.float32] = batch["vector"].flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, dim)


def _column(rest: Mapping[str, list[Any]], name: str) -> tuple[str | None, ...] | None:
    values = rest.get(name)
    return tuple(values) if values is not None and any(v is not None for v in values) else None


def _labels(cells: Sequence[str | None]) -> dict[str, tuple[LabelValue, ...]]:
    rows = [json.loads(c) if c else {} for c in cells]
    names = dict.fromkeys(k for row in rows for k in row)
    return {name: tuple(cast(LabelValue, row.get(name)) for row in rows) for name in names}
