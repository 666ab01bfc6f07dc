"""Pairs of images and reports on disk: a folder that refuses to be used with what it was not made from.

``pairs.parquet`` has one row per image and rank: ``image_id, rank, report_id, chunk, start, end, similarity, margin`` and
``content``, the first digits of the SHA-256 of the image (null when unknown); an image without a report has one row of rank 0, whose similarity is the one that was too low. Its schema carries the header:
space of the encoder, digests of the corpus and of the images, how reports were cut and compared. ``texts.npy`` holds the
unit vectors of the distinct chunks, ``texts.json`` says which chunk of which report each row is. There are no labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import FileFormatError, InputError, SpaceMismatch
from chiasm.io.manifest import to_json, write_bytes_atomic
from chiasm.types import Space

FORMAT = 1
#: Hexadecimal digits that are kept of what an image holds.
CONTENT_DIGITS = 16
_KEY = b"chiasm.pairs"
_FILES = ("texts.npy", "texts.json", "pairs.parquet")
_COLUMNS = ("image_id", "rank", "report_id", "chunk", "start", "end", "similarity", "margin", "content")


@dataclass(frozen=True)
class PairHeader:
    """What pairs were made from, and how.

    Attributes:
        space: Of the vectors of both sides.
        corpus: Name of the corpus.
        corpus_digest: Of its ids and cleaned texts.
        image_digest: Of the ids of the images, in any order: :func:`digest_ids`.
        content_digest: Of what the image files hold, in any order; empty when unknown.
        reports: Reports in the corpus.
        k: Reports an image, at most.
        aggregate: How chunks add up to a report.
        correction: Against hubs.
        min_similarity: What a pair had to reach; None: nothing.
        min_similarity_rule: Where that comes from: ``none``, ``given`` or ``auto``.
        chunking: How long reports were cut.
        filters: What was kept and dropped of the source of the corpus.
        texts_digest: Of ``texts.npy`` and ``texts.json``; set when saved.
        format: Version of the layout.
    """

    space: Space
    corpus: str
    corpus_digest: str
    image_digest: str
    content_digest: str = ""
    reports: int = 0
    k: int = 1
    aggregate: str = "max"
    correction: str = "none"
    min_similarity: float | None = None
    min_similarity_rule: str = "none"
    chunking: Mapping[str, Any] = field(default_factory=dict)
    filters: tuple[Mapping[str, Any], ...] = ()
    texts_digest: str = ""
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "space": self.space.to_dict(), "filters": [dict(f) for f in self.filters]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`; unknown keys of later versions are passed over."""
        known = {f.name for f in dataclasses.fields(cls)} - {"space", "filters"}
        return cls(
            space=Space.from_dict(values["space"]),
            filters=tuple(values.get("filters", ())),
            **{k: v for k, v in values.items() if k in known},
        )


class Targets(NamedTuple):
    """What a classifier learns to predict for some images.

    Attributes:
        vectors: float32, (n, dim): unit rows; zero where ``mask`` is False.
        similarity: float32, (n,): of the best pair; 0 where there is none.
        mask: bool, (n,): whether the image has a target.
    """

    vectors: NDArray[np.float32]
    similarity: NDArray[np.float32]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class PairFolder:
    """Pairs in memory; on disk by :func:`save_pairs` and :func:`load_pairs`.

    Attributes:
        header: What they were made from.
        image_ids: (n,), unique.
        text_rows: int64, (n, k): row in ``texts``, best first; -1 where there is no report.
        similarity: float32, (n, k); NaN where there is no report.
        margin: float32, (n,): of the best over the second report; NaN when there was one.
        best_similarity: float32, (n,): of the first pair, or of the one that was too low.
        texts: float32, (m, dim): unit vectors of the distinct chunks that are paired.
        text_keys: (m,): report id and number of the chunk in its report.
        text_spans: int64, (m, 2): first character of the chunk in the cleaned text, and one past its last.
        contents: (n,): the first digits of the SHA-256 of each image as it lies on disk; empty when unknown.
    """

    header: PairHeader
    image_ids: tuple[str, ...]
    text_rows: NDArray[np.int64]
    similarity: NDArray[np.float32]
    margin: NDArray[np.float32]
    best_similarity: NDArray[np.float32]
    texts: NDArray[np.float32]
    text_keys: tuple[tuple[str, int], ...]
    text_spans: NDArray[np.int64]
    contents: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def paired(self) -> NDArray[np.bool_]:
        """Which images have a report."""
        found: NDArray[np.bool_] = self.text_rows[:, 0] >= 0
        return found

    @property
    def report_numbers(self) -> NDArray[np.int64]:
        """For each row of ``texts`` a number of its report: chunks of one report share it."""
        number: dict[str, int] = {}
        return np.asarray([number.setdefault(r, len(number)) for r, _ in self.text_keys], dtype=np.int64)

    def rows_of(self, image_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the position of each image.

        Raises:
            InputError: An image was not paired with this corpus.
        """
        place = {name: row for row, name in enumerate(self.image_ids)}
        missing = sum(name not in place for name in image_ids)
        if missing:
            raise InputError(
                f"{missing} of {len(image_ids)} images are not in the pairs, which hold {len(self)}",
                hint="pair this set of images: `chiasm pairing`",
            )
        return np.asarray([place[name] for name in image_ids], dtype=np.int64)

    def check_contents(self, image_ids: Sequence[str], contents: Sequence[str]) -> None:
        """Refuse images whose files are not those that were paired: a report would stand beside another picture.

        Args:
            image_ids: In any order.
            contents: For each, the SHA-256 of `chiasm.datasets.images.hash_image` in hexadecimal digits, 16 or more.

        Raises:
            InputError: An image was not paired, or has changed since. Pairs without ``contents`` pass.
        """
        rows = self.rows_of(image_ids)
        if not self.contents:
            return
        found = zip(rows.tolist(), contents, strict=True)
        changed = sum(self.contents[row] != content[:CONTENT_DIGITS] for row, content in found)
        if changed:
            raise InputError(
                f"{changed} of {len(image_ids)} images are not the files that were paired: same ids, other contents",
                hint="pair these images: `chiasm pairing`",
            )

    def targets(
        self,
        image_ids: Sequence[str],
        *,
        top_k: int = 1,
        temperature: float | None = None,
        gate: float | None = None,
    ) -> Targets:
        """Return one text vector an image: its reports averaged, unit length.

        Args:
            image_ids: In any order, repeats allowed.
            top_k: How many of its reports.
            temperature: Of the weights softmax(similarity / temperature); None: all weigh the same.
            gate: Pairs below this similarity are left out.

        Raises:
            InputError: An image is unknown, more reports are asked for than the pairs hold, or a number is out of
                range.
        """
        if not 1 <= top_k <= self.text_rows.shape[1]:
            raise InputError(
                f"top_k must lie between 1 and {self.text_rows.shape[1]}, got {top_k}",
                hint="make the pairs with a larger `--top-k`",
            )
        if temperature is not None and not (np.isfinite(temperature) and temperature > 0):
            raise InputError(f"the temperature must be positive, got {temperature}")
        if gate is not None and not -1 <= gate <= 1:
            raise InputError(f"the gate must be a similarity between -1 and 1, got {gate}")
        rows = self.rows_of(image_ids)
        text, similarity = self.text_rows[rows, :top_k], self.similarity[rows, :top_k].astype(np.float64)
        table = self.texts if len(self.texts) else np.zeros((1, self.header.space.dim), np.float32)
        keep = text >= 0
        if gate is not None:
            keep &= np.nan_to_num(similarity, nan=-2.0) >= float(np.float32(gate))
        mask: NDArray[np.bool_] = np.any(keep, axis=1)
        best = np.argmax(keep, axis=1)
        logits = np.where(keep, 0.0 if temperature is None else similarity / (temperature or 1.0), -np.inf)
        weights = np.exp(logits - np.where(mask, logits.max(axis=1), 0.0)[:, None])
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
        vectors = np.zeros((len(rows), table.shape[1]))
        for column in range(top_k):
            vectors += weights[:, column, None] * table[np.maximum(text[:, column], 0)]
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        at = np.arange(len(rows))
        first = table[np.maximum(text[at, best], 0)]
        # Opposite vectors can cancel; then the best one stands for all.
        vectors = np.where(norms > 1e-6, vectors / np.maximum(norms, 1e-6), first)
        return Targets(
            np.where(mask[:, None], vectors, 0.0).astype(np.float32),
            np.where(mask, similarity[at, best], 0.0).astype(np.float32),
            mask,
        )


def digest_ids(ids: Sequence[str]) -> str:
    """Return 16 hex digits that identify a set of images, whatever their order."""
    return hashlib.sha256(to_json(sorted(ids)).encode()).hexdigest()[:16]


def save_pairs(folder: str | Path, pairs: PairFolder) -> Path:
    """Write pairs; the same pairs give the same bytes.

    A process that is killed on the way leaves the old pairs, or a folder that :func:`load_pairs` refuses.

    Returns:
        The folder.

    Raises:
        InputError: The disk is full, or the folder may not be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pairs.texts, dtype="<f4"), allow_pickle=False)
    keys = [
        {"report": report, "chunk": chunk, "start": int(start), "end": int(end)}
        for (report, chunk), (start, end) in zip(pairs.text_keys, pairs.text_spans, strict=True)
    ]
    listed = ("[\n" + ",\n".join(to_json(k) for k in keys) + "\n]\n").encode()
    header = dataclasses.replace(pairs.header, texts_digest=_texts_digest(buffer.getvalue(), listed))
    image, column = np.nonzero(pairs.text_rows >= 0)
    alone = np.flatnonzero(~pairs.paired)
    order = np.argsort(np.concatenate([image, alone]), kind="stable")
    image = np.concatenate([image, alone])[order]
    rank = np.concatenate([column + 1, np.zeros(len(alone), dtype=np.int64)])[order]
    text = np.where(rank > 0, pairs.text_rows[image, np.maximum(rank - 1, 0)], -1)
    none = rank == 0

    def of_text(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
        return pa.array([values[t] if t >= 0 else None for t in text.tolist()], kind)

    similarity = np.where(none, pairs.best_similarity[image], pairs.similarity[image, np.maximum(rank - 1, 0)])
    columns = [
        pa.array([pairs.image_ids[i] for i in image.tolist()], pa.string()),
        pa.array(rank, pa.int32()),
        of_text([r for r, _ in pairs.text_keys], pa.string()),
        of_text([c for _, c in pairs.text_keys], pa.int32()),
        of_text(pairs.text_spans[:, 0].tolist(), pa.int32()),
        of_text(pairs.text_spans[:, 1].tolist(), pa.int32()),
        pa.array(similarity, pa.float32()),
        pa.array(pairs.margin[image], pa.float32()),
        pa.array([pairs.contents[i] if pairs.contents else None for i in image.tolist()], pa.string()),
    ]
    table = pa.table(columns, names=list(_COLUMNS)).replace_schema_metadata({_KEY: to_json(header.to_dict()).encode()})
    packed = io.BytesIO()
    pq.write_table(table, packed, compression="zstd")
    for name, content in zip(_FILES, (buffer.getvalue(), listed, packed.getvalue()), strict=True):
        write_bytes_atomic(folder / name, content)
    return folder


def read_pair_header(folder: str | Path) -> PairHeader:
    """Return what the pairs in a folder were made from.

    Raises:
        InputError: There are no pairs.
        FileFormatError: The file there holds no pairs, or those of a later version.
    """
    return _header(_read_table(Path(folder)), Path(folder))


def load_pairs(
    folder: str | Path,
    *,
    corpus_digest: str | None = None,
    space: Space | None = None,
    image_digest: str | None = None,
    content_digest: str | None = None,
) -> PairFolder:
    """Read pairs, refusing those that were made from something else.

    Args:
        folder: As written by :func:`save_pairs`.
        corpus_digest: Of the corpus they are to be used with.
        space: Of the encoder.
        image_digest: Of the images' ids.
        content_digest: Of the images' files; passed over when the pairs do not know it.

    Raises:
        InputError: There are no pairs, or they are of another corpus or other images.
        SpaceMismatch: They are of another encoder.
        FileFormatError: The folder is damaged.
    """
    folder = Path(folder)
    table = _read_table(folder)
    header = _header(table, folder)
    if space is not None and header.space != space:
        raise SpaceMismatch(
            f"the pairs in `{folder.name}` were made with `{header.space}`, not with `{space}`",
            hint="pair again with this encoder: `chiasm pairing`",
        )
    for what, mine, asked in (
        (f"another corpus than `{header.corpus}`", header.corpus_digest, corpus_digest),
        ("another set of images", header.image_digest, image_digest),
        ("images whose files have changed since", header.content_digest or content_digest, content_digest),
    ):
        if asked is not None and mine != asked:
            raise InputError(
                f"the pairs in `{folder.name}` are to be used with {what}: digest `{asked}`, made with `{mine}`",
                hint="pair again: `chiasm pairing`",
            )
    texts, keys, spans = _read_texts(folder, header)
    return _assemble(table, header, texts, keys, spans, folder)


def _read_table(folder: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "pairs.parquet"
    if not path.is_file():
        raise InputError(f"there are no pairs in `{folder.name}`", hint="make them with `chiasm pairing`")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(folder) from error
    if tuple(table.column_names) != _COLUMNS:
        raise FileFormatError(f"`{path.name}` of `{folder.name}` is not a table of pairs")
    return table


def _header(table: Any, folder: Path) -> PairHeader:
    try:
        values = json.loads((table.schema.metadata or {})[_KEY])
        version = int(values["format"])
        if version > FORMAT:
            raise FileFormatError(
                f"the pairs in `{folder.name}` have format {version}; this version reads up to {FORMAT}",
                hint="update chiasm, or pair again",
            )
        return PairHeader.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the pairs in `{folder.name}` do not say what they were made from") from error


def _read_texts(folder: Path, header: PairHeader) -> tuple[NDArray[np.float32], list[tuple[str, int]], NDArray[Any]]:
    try:
        content, listed = (folder / "texts.npy").read_bytes(), (folder / "texts.json").read_bytes()
        if _texts_digest(content, listed) != header.texts_digest:
            raise FileFormatError(
                f"pairs and texts in `{folder.name}` are not of one run, or a file has changed", hint="pair again"
            )
        texts = np.load(io.BytesIO(content), allow_pickle=False)
        rows = json.loads(listed)
        keys = [(str(r["report"]), int(r["chunk"])) for r in rows]
        spans = np.asarray([(r["start"], r["end"]) for r in rows], dtype=np.int64).reshape(-1, 2)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder) from error
    norms = np.linalg.norm(texts, axis=1) if texts.ndim == 2 else np.zeros(1)
    if texts.shape != (len(keys), header.space.dim) or not (np.abs(norms - 1) < 1e-3).all():
        raise _damaged(folder)
    return texts.astype(np.float32, copy=False), keys, spans


def _assemble(
    table: Any,
    header: PairHeader,
    texts: NDArray[np.float32],
    keys: list[tuple[str, int]],
    spans: NDArray[np.int64],
    folder: Path,
) -> PairFolder:
    names = table["image_id"].to_pylist()
    ids = tuple(dict.fromkeys(names))
    place = {name: row for row, name in enumerate(ids)}
    row_of = {key: row for row, key in enumerate(keys)}
    image = np.asarray([place[name] for name in names], dtype=np.int64)
    rank = table["rank"].to_numpy().astype(np.int64)
    similarity, margin = table["similarity"].to_numpy(), table["margin"].to_numpy()
    found = zip(table["report_id"].to_pylist(), table["chunk"].to_pylist(), strict=True)
    text = np.asarray([-1 if report is None else row_of.get((report, chunk), -2) for report, chunk in found], np.int64)
    cells = image * (header.k + 1) + rank
    if (
        digest_ids(ids) != header.image_digest
        or (text == -2).any()
        or ((text == -1) != (rank == 0)).any()
        or ((rank < 0) | (rank > header.k)).any()
        or len(np.unique(cells)) != len(cells)
        or not np.isfinite(similarity).all()
    ):
        raise _damaged(folder)
    text_rows = np.full((len(ids), header.k), -1, dtype=np.int64)
    values = np.full((len(ids), header.k), np.nan, dtype=np.float32)
    best, margins = np.empty(len(ids), np.float32), np.empty(len(ids), np.float32)
    there = rank > 0
    text_rows[image[there], rank[there] - 1] = text[there]
    values[image[there], rank[there] - 1] = similarity[there]
    top = rank <= 1
    best[image[top]], margins[image] = similarity[top], margin
    if np.bincount(image[top], minlength=len(ids)).min(initial=1) != 1:
        raise _damaged(folder)
    written = dict(zip(names, table["content"].to_pylist(), strict=True))
    contents = tuple(written[name] for name in ids)
    return PairFolder(
        header, ids, text_rows, values, margins, best, texts, tuple(keys), spans, () if None in contents else contents
    )


def _texts_digest(content: bytes, listed: bytes) -> str:
    return hashlib.sha256(hashlib.sha256(content).digest() + hashlib.sha256(listed).digest()).hexdigest()[:16]


def _damaged(folder: Path) -> FileFormatError:
    return FileFormatError(f"the pairs in `{folder.name}` are damaged", hint="pair again: `chiasm pairing`")
