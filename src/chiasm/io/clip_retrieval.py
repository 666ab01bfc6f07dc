"""The folder layout of clip-retrieval: ``img_emb/``, ``text_emb/`` and ``metadata/``, numbered parts, rows aligned.

Comes in: a store or embeddings. Goes out: a folder that clip-retrieval and autofaiss read, and back. clip-retrieval
does not say which encoder made its vectors: folders written here carry ``chiasm.json`` with the space, for others the
reader must be told. Vectors are written as float32 (clip-retrieval: float16); both are read.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import FileFormatError, InputError, SpaceMismatch
from chiasm.io.manifest import disk_errors, to_json, write_json_atomic
from chiasm.io.store import EmbeddingStore, StoreMetadata
from chiasm.types import Embeddings, Modality, Space, check_same_space

SIDECAR = "chiasm.json"
_FOLDERS: Mapping[Modality, str] = {"image": "img_emb", "text": "text_emb"}
_OWN_COLUMNS = ("id", "patient", "labels")


class ClipRetrievalFolder(NamedTuple):
    """What such a folder holds; rows of both are aligned when both are there."""

    images: Embeddings | None
    texts: Embeddings | None


def write_clip_retrieval(
    source: EmbeddingStore | Sequence[Embeddings], folder: str | Path, *, partition: int = 0
) -> int:
    """Write one part ``img_emb_0.npy``, ``text_emb_0.npy``, ``metadata_0.parquet``.

    The metadata have clip-retrieval's columns ``image_path`` and ``caption``, and our ``id``, ``patient``, ``labels``.
    The layout wants every row in every file: where both modalities are there, rows with one of them are left out, and
    a warning says how many.

    Args:
        source: A store, or at most one `Embeddings` a modality.
        folder: Made when absent; a part that is there is replaced.
        partition: Number of the part.

    Returns:
        The number of rows written.

    Raises:
        InputError: There is nothing to write, a modality occurs twice, or the disk is full.
        SpaceMismatch: Images and texts are of two spaces.
    """
    folder = Path(folder)
    preprocess: Mapping[str, Any] = {}
    if isinstance(source, EmbeddingStore):
        preprocess = source.metadata.preprocess
        source = [source.read(m) for m in _FOLDERS if source.count(m)]
    parts = {e.modality: e for e in source if len(e)}
    if not parts or len(parts) != sum(len(e) > 0 for e in source):
        raise InputError("expected embeddings of images, of texts, or one of each")
    check_same_space(*parts.values())
    aligned = _align(parts)
    first = next(iter(aligned.values()))
    with disk_errors("the clip-retrieval folder"):
        for modality, embeddings in aligned.items():
            target = folder / _FOLDERS[modality]
            target.mkdir(parents=True, exist_ok=True)
            np.save(target / f"{_FOLDERS[modality]}_{partition}.npy", embeddings.vectors)
        _write_metadata(aligned, folder / "metadata", partition)
    write_json_atomic(folder / SIDECAR, StoreMetadata.of(first, preprocess=preprocess).to_dict())
    return len(first)


def _align(parts: dict[Modality, Embeddings]) -> dict[Modality, Embeddings]:
    if len(parts) < 2 or parts["image"].ids == parts["text"].ids:
        return parts
    rows = {id: i for i, id in enumerate(parts["text"].ids)}
    both = [i for i, id in enumerate(parts["image"].ids) if id in rows]
    if not both:
        raise InputError("no id has both an image and a text", hint="write one modality at a time")
    images = parts["image"].select(both)
    left_out = len(parts["image"]) + len(parts["text"]) - 2 * len(both)
    if left_out:
        warnings.warn(f"{left_out} rows have only an image or only a text and were left out", UserWarning, stacklevel=3)
    return {"image": images, "text": parts["text"].select([rows[id] for id in images.ids])}


def _write_metadata(aligned: Mapping[Modality, Embeddings], folder: Path, partition: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    def column(name: str) -> tuple[Any, ...] | None:
        # Either side may know the path, the text and the patient of a row.
        order: tuple[Modality, ...] = ("text", "image") if name == "texts" else ("image", "text")
        return next((v for m in order if m in aligned and (v := getattr(aligned[m], name)) is not None), None)

    first = next(iter(aligned.values()))
    n = len(first)
    labels = next((e.labels for e in aligned.values() if e.labels), {})
    columns: dict[str, Any] = {"image_path": column("paths"), "caption": column("texts"), "id": first.ids}
    columns["patient"] = column("patients")
    columns["labels"] = [to_json({k: v[i] for k, v in labels.items()}) for i in range(n)] if labels else None
    table = pa.table({k: pa.array(v, pa.string()) for k, v in columns.items() if v is not None})
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, folder / f"metadata_{partition}.parquet")


def is_clip_retrieval(folder: str | Path) -> bool:
    """Return whether a folder has the layout of clip-retrieval."""
    return any((Path(folder) / name).is_dir() for name in _FOLDERS.values())


def read_clip_retrieval(folder: str | Path, *, space: Space | None = None) -> ClipRetrievalFolder:
    """Read all parts of a folder, in the order of their numbers.

    Vectors are read part by part into one float32 array. Rows that are of unit length but for the rounding of float16
    are normalised again; others are kept and marked as not normalised. Ids are the ``id`` column, else the image path
    when it is unique, else the row.

    Args:
        folder: The folder.
        space: Which space the vectors are in; needed when the folder does not say.

    Raises:
        InputError: There is no such folder, or its space is neither stated nor given.
        SpaceMismatch: It states another space than ``space``.
        FileFormatError: Parts are missing, damaged, or do not have the same rows.
    """
    folder = Path(folder)
    files = {m: _parts(folder / name, name, "npy") for m, name in _FOLDERS.items()}
    if not any(files.values()):
        raise InputError(f"`{folder.name}` is not a folder of clip-retrieval", hint="it needs img_emb/img_emb_0.npy")
    metadata = _space_of(folder, space)
    vectors = {m: _read_vectors(paths, metadata.space.dim) for m, paths in files.items() if paths}
    counts = {len(v) for v in vectors.values()}
    columns = _read_metadata(_parts(folder / "metadata", "metadata", "parquet"))
    counts |= {len(c) for c in columns.values()}
    if len(counts) != 1:
        raise FileFormatError(f"files in `{folder.name}` have different numbers of rows: {sorted(counts)}")
    ids = _ids(columns, counts.pop())
    found: dict[Modality, Embeddings] = {}
    for modality, values in vectors.items():
        found[modality] = _embeddings(values, ids, modality, metadata, columns)
    return ClipRetrievalFolder(found.get("image"), found.get("text"))


def _parts(folder: Path, name: str, suffix: str) -> list[Path]:
    numbered = ((re.fullmatch(rf"{name}_(\d+)\.{suffix}", p.name), p) for p in folder.glob(f"{name}_*.{suffix}"))
    return [p for _, p in sorted((int(m.group(1)), p) for m, p in numbered if m)]


def _space_of(folder: Path, space: Space | None) -> StoreMetadata:
    if not (folder / SIDECAR).is_file():
        if space is None:
            raise InputError(
                f"`{folder.name}` does not say which encoder made its vectors", hint="pass the space of that encoder"
            )
        return StoreMetadata(space)
    try:
        metadata = StoreMetadata.from_dict(json.loads((folder / SIDECAR).read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"`{SIDECAR}` in `{folder.name}` is damaged") from error
    if space is not None and space != metadata.space:
        raise SpaceMismatch(f"`{folder.name}` holds embeddings of `{metadata.space}`, expected `{space}`")
    return metadata


def _read_vectors(paths: Sequence[Path], dim: int) -> NDArray[np.float32]:
    parts = []
    for path in paths:
        try:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise FileFormatError(f"`{path.name}` is not an array of vectors") from error
        if part.ndim != 2 or part.dtype.kind != "f" or part.shape[1] != dim:
            raise FileFormatError(f"`{path.name}` has shape {part.shape} of {part.dtype}, expected floats (n, {dim})")
        parts.append(part)
    result = np.empty((sum(len(p) for p in parts), dim), np.float32)
    at = 0
    for part in parts:
        result[at : at + len(part)] = part
        at += len(part)
    return result


def _read_metadata(paths: Sequence[Path]) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet

    columns: dict[str, list[Any]] = {}
    rows = 0
    for path in paths:
        try:
            table = pyarrow.parquet.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise FileFormatError(f"`{path.name}` is not a readable Parquet file") from error
        for name in table.column_names:
            columns.setdefault(name, [None] * rows).extend(table[name].to_pylist())
        rows += table.num_rows
        for values in columns.values():
            values.extend([None] * (rows - len(values)))
    return columns


def _ids(columns: Mapping[str, list[Any]], n: int) -> tuple[str, ...]:
    for name in ("id", "image_path"):
        values = columns.get(name)
        if values and None not in values and len(set(values)) == n:
            return tuple(str(v) for v in values)
    return tuple(f"row-{i}" for i in range(n))


def _embeddings(
    vectors: NDArray[np.float32],
    ids: tuple[str, ...],
    modality: Modality,
    metadata: StoreMetadata,
    columns: Mapping[str, list[Any]],
) -> Embeddings:
    def text_column(name: str) -> tuple[str | None, ...] | None:
        values = columns.get(name)
        return None if values is None else tuple(None if v is None else str(v) for v in values)

    off = float(np.abs(np.linalg.norm(vectors, axis=1) - 1).max(initial=0))
    labels: dict[str, tuple[Any, ...]] = {}
    if "labels" in columns and "id" in columns:  # written here; clip-retrieval's own columns are labels as they are
        rows = [json.loads(c) if c else {} for c in columns["labels"]]
        labels = {k: tuple(r.get(k) for r in rows) for k in dict.fromkeys(k for r in rows for k in r)}
    else:
        known = ("image_path", "caption", *_OWN_COLUMNS)
        plain = {k: v for k, v in columns.items() if k not in known}
        labels = {k: tuple(v) for k, v in plain.items() if all(isinstance(x, (str, int, float, type(None))) for x in v)}
    result = Embeddings(
        vectors=vectors,
        ids=ids,
        space=metadata.space,
        modality=modality,
        normalized=False,
        logit_scale=metadata.logit_scale,
        logit_bias=metadata.logit_bias,
        members=metadata.members,
        texts=text_column("caption"),
        paths=text_column("image_path"),
        patients=text_column("patient"),
        labels=labels,
        precision=metadata.precision,
    )
    if off < 1e-5:  # as float32 rounds
        return replace(result, normalized=True)
    return result.normalize() if off < 5e-3 else result  # as float16 rounds
