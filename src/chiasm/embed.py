"""Samples and an encoder to embeddings: the only bridge between models and everything that works on vectors.

Images are decoded and preprocessed in threads while the encoder works. What goes to a store is committed in chunks, so
a run that is killed goes on where it stopped, and gives the same vectors: batches are cut by the position of a sample
in the data set, not by what is left to do.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.data.loader import Batches
from chiasm.datasets.images import open_sample_image
from chiasm.errors import InputError
from chiasm.io.manifest import Rejected, RejectLog, count_reasons, summarize_rejected, write_rejected
from chiasm.io.store import EmbeddingStore, StoreMetadata, create_store
from chiasm.progress import Progress, SilentProgress
from chiasm.types import Embeddings, LabelValue, Modality, Sample

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from chiasm.datasets.dataset import Dataset
    from chiasm.encoders.base import Encoder

OnBad = Literal["skip", "fail"]
#: A chunk is committed when it has this many rows or this age, whichever comes first.
CHUNK_ROWS = 1024
CHUNK_SECONDS = 15.0
#: Texts are sorted by length within this many batches, so that short texts do not wait for long ones.
SORTED_BATCHES = 16


@dataclass(frozen=True)
class EmbedSummary:
    """What :func:`embed_to_store` did.

    Attributes:
        store: Folder of the store.
        added: Rows added now, by modality.
        present: Rows that were stored before, by modality.
        rejected: Rows that could not be embedded; also in ``rejected.jsonl`` beside the store.
        truncated: Texts that were longer than the encoder's context and were cut.
        seconds: Wall time.
    """

    store: str
    added: Mapping[str, int]
    present: Mapping[str, int]
    rejected: tuple[Rejected, ...]
    truncated: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; rejected rows are counted by reason, not named."""
        return {**asdict(self), "rejected": len(self.rejected), "reasons": count_reasons(self.rejected)}

    def sentence(self) -> str:
        """Return one line for people."""
        parts = []
        for modality, n in self.added.items():
            were_there = f" ({self.present[modality]} were there)" if self.present[modality] else ""
            parts.append(f"{n} {modality}s added{were_there}")
        if self.rejected:
            parts.append(summarize_rejected(self.rejected) + " (listed in rejected.jsonl)")
        if self.truncated:
            parts.append(f"{self.truncated} texts were cut to the context")
        return f"{'; '.join(parts)}; {self.seconds:.1f} s"


class _Vectors(NamedTuple):
    """Vectors of some rows of a list of samples."""

    rows: list[int]
    vectors: NDArray[np.float32]


def embed_images(
    encoder: Encoder,
    images: Sequence[Sample | Path | str | Image],
    *,
    batch_size: int = 32,
    workers: int = 2,
    on_bad: OnBad = "skip",
    rejects: RejectLog | None = None,
    progress: Progress | None = None,
) -> Embeddings:
    """Return the unit vectors of images, in order.

    Args:
        encoder: Gives preprocessing and vectors.
        images: Samples, paths (their id is the path) or Pillow images (their id is the position).
        batch_size: Images a forward pass.
        workers: Threads that decode; 0 decodes in this one.
        on_bad: ``skip`` leaves out images that cannot be decoded and notes them; ``fail`` raises at the first.
        rejects: Where they are noted; without it a warning counts them.
        progress: Told about every batch.

    Raises:
        InputError: No image can be used, ids repeat, or an image is bad and ``on_bad`` is ``fail``.
    """
    items, pictures = _image_samples(images)
    log = RejectLog()
    stream = _ImageStream(encoder, items, batch_size, workers, on_bad, log, pictures)
    result = _collect(encoder, items, stream.run(range(len(items))), "image", progress)
    _tell_rejected(log, rejects, items)
    return result


def embed_texts(
    encoder: Encoder,
    texts: Sequence[Sample | str],
    *,
    batch_size: int = 32,
    normalize: bool = True,
    on_bad: OnBad = "skip",
    rejects: RejectLog | None = None,
    progress: Progress | None = None,
) -> Embeddings:
    """Return the unit vectors of texts, in order; equal texts of a batch are embedded once.

    Texts longer than the encoder's context are cut; a ``TruncationWarning`` counts them.

    Args:
        encoder: Gives tokenizer and vectors.
        texts: Samples or strings (their id is the position).
        batch_size: Texts a forward pass.
        normalize: False returns vectors as the encoder gives them, whose lengths some protocols use.
        on_bad: What to do with empty texts: ``skip`` leaves them out and notes them; ``fail`` raises.
        rejects: Where they are noted; without it a warning counts them.
        progress: Told about every batch.

    Raises:
        InputError: No text can be used, ids repeat, or a text is empty and ``on_bad`` is ``fail``.
    """
    items = [t if isinstance(t, Sample) else Sample(id=str(i), text=t) for i, t in enumerate(texts)]
    log = RejectLog()
    stream = _TextStream(encoder, items, batch_size, on_bad, log, normalize)
    result = replace(_collect(encoder, items, stream.run(range(len(items))), "text", progress), normalized=normalize)
    _tell_truncated(stream)
    _tell_rejected(log, rejects, items)
    return result


def embed_to_store(
    encoder: Encoder,
    dataset: Dataset | Sequence[Sample],
    store_path: str | Path,
    *,
    modalities: Sequence[Modality] = ("image", "text"),
    resume: bool = True,
    batch_size: int = 32,
    workers: int = 2,
    on_bad: OnBad = "skip",
    progress: Progress | None = None,
) -> EmbedSummary:
    """Embed a data set into a store on disk, going on where an earlier run stopped.

    Rows are committed in chunks (at least every 1,024 rows or 15 seconds). A killed run loses at most one chunk;
    started again with the same arguments it embeds what is missing, and every vector equals that of an uninterrupted
    run. The labels stored with a row include the sample's ``split``, ``study`` and ``slide`` where these are known.
    ``rejected.jsonl`` in the folder of the store lists every row of the data set that is not in it.

    Args:
        encoder: Gives vectors; the store keeps its space, scale and preprocessing.
        dataset: Samples with unique ids.
        store_path: Folder of the store, made when absent.
        modalities: What to embed; one that no sample has is passed over, as long as there is another.
        resume: Whether an existing store is added to; without it an existing store is an error.
        batch_size: Images or texts a forward pass.
        workers: Threads that decode images.
        on_bad: ``skip`` or ``fail``, for rows that cannot be used.
        progress: One stage a modality.

    Raises:
        SpaceMismatch: The store there holds vectors of another encoder.
        InputError: Nothing can be embedded, the disk is full (committed rows stay), or a bad row is fatal.
        KeyboardInterrupt: On Ctrl-C, after the store was closed; the message says how far the run came.
    """
    began = time.monotonic()
    samples = list(getattr(dataset, "samples", dataset))
    earlier: tuple[Rejected, ...] = tuple(getattr(dataset, "rejected", ()))
    _check_ids(samples)
    todo = [m for m in modalities if any(_has(s, m) for s in samples)]
    if not todo:
        raise InputError(f"no sample has an {' or '.join(modalities)} to embed")
    path = Path(store_path)
    log = RejectLog(earlier)
    added: dict[str, int] = dict.fromkeys(todo, 0)
    present: dict[str, int] = dict.fromkeys(todo, 0)
    truncated = 0
    metadata = StoreMetadata(
        encoder.space,
        True,
        encoder.logit_scale,
        encoder.logit_bias,
        encoder.preprocess_spec.to_dict(),
        members=encoder.members,
    )
    with create_store(path, metadata, exist_ok=resume) as store:
        store.lock()
        try:
            for modality in todo:
                stored = set(store.ids(modality))
                rows = [i for i, s in enumerate(samples) if s.id not in stored]
                present[modality] = len(samples) - len(rows)
                stream: _ImageStream | _TextStream
                if modality == "image":
                    stream = _ImageStream(encoder, samples, batch_size, workers, on_bad, log)
                else:
                    stream = _TextStream(encoder, samples, batch_size, on_bad, log)
                added[modality] = _write(encoder, samples, stream.run(rows), store, modality, len(rows), progress)
                truncated += stream.truncated
        except KeyboardInterrupt:
            n = store.count()
            raise KeyboardInterrupt(
                f"interrupted: {n} of {len(samples) * len(todo)} rows are stored; the same command goes on from there"
            ) from None
        finally:
            write_rejected(path / "rejected.jsonl", log.items)
    return EmbedSummary(str(path), added, present, log.items, truncated, time.monotonic() - began)


class _ImageStream:
    """Yields the vectors of the wanted rows, batch by batch; batches are cut by position."""

    truncated = 0

    def __init__(
        self,
        encoder: Encoder,
        samples: Sequence[Sample],
        batch_size: int,
        workers: int,
        on_bad: OnBad,
        rejects: RejectLog,
        pictures: Mapping[int, Image] | None = None,
    ) -> None:
        self.encoder = encoder
        self.samples = samples
        self.batch_size = batch_size
        self.workers = workers
        self.on_bad = on_bad
        self.rejects = rejects
        self.pictures = pictures or {}
        self.preprocess = encoder.preprocess

    def run(self, wanted: Sequence[int]) -> Iterator[_Vectors]:
        """Yield vectors; a batch in which nothing is wanted is not touched."""
        import torch

        missing = set(wanted)
        b = self.batch_size
        # Whole batches, so that the cut stays; rows of them that are not wanted cost nothing.
        touched = sorted({row // b for row in missing}) if b > 0 else []
        rows = [row for k in touched for row in range(k * b, min((k + 1) * b, len(self.samples)))]

        def load(row: int, _: np.random.Generator) -> Tensor | None:
            if row not in missing:
                return None
            picture = self.pictures.get(row)
            return self.preprocess(open_sample_image(self.samples[row]) if picture is None else picture)

        loader = Batches(
            self.samples, batch_size=b, rows=rows, load=load, workers=self.workers, on_bad=self.on_bad,
            rejects=self.rejects,
        )  # fmt: skip
        for batch in loader:
            pairs = [(row, x) for row, x in zip(batch.rows, batch.items, strict=True) if x is not None]
            if pairs:
                vectors = self.encoder.encode_image(torch.stack([x for _, x in pairs]), normalize=True)
                yield _Vectors([row for row, _ in pairs], _to_numpy(vectors))


class _TextStream:
    """Yields the vectors of the wanted rows, window by window; windows are cut by position."""

    def __init__(
        self,
        encoder: Encoder,
        samples: Sequence[Sample],
        batch_size: int,
        on_bad: OnBad,
        rejects: RejectLog,
        normalize: bool = True,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.encoder = encoder
        self.samples = samples
        self.batch_size = batch_size
        self.on_bad = on_bad
        self.rejects = rejects
        self.normalize = normalize
        self.truncated = 0

    def run(self, wanted: Sequence[int]) -> Iterator[_Vectors]:
        """Yield vectors."""
        size = self.batch_size * SORTED_BATCHES
        windows: dict[int, list[int]] = {}
        for row in wanted:
            windows.setdefault(row // size, []).append(row)
        for _, rows in sorted(windows.items()):
            kept = [row for row in rows if self._has_text(row)]
            if kept:
                yield self._embed(kept)

    def _has_text(self, row: int) -> bool:
        text = self.samples[row].text
        if text is not None and text.strip():
            return True
        if self.on_bad == "fail":
            raise InputError(f"row {row} of the data cannot be embedded: text is empty", hint="fill in or skip the row")
        self.rejects.add(row, self.samples[row].id, "text is empty")
        return False

    def _embed(self, rows: list[int]) -> _Vectors:
        texts = [self.samples[row].text or "" for row in rows]
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        tokens = self.encoder.tokenizer.encode(list(unique))
        cut = {text for text, i in unique.items() if i in set(tokens.truncated)}
        self.truncated += sum(text in cut for text in texts)
        order = tokens.lengths.argsort(stable=True)
        vectors = np.empty((len(unique), self.encoder.dim), np.float32)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            batch = type(tokens)(tokens.ids[part], tokens.lengths[part], ())
            vectors[part.numpy()] = _to_numpy(self.encoder.encode_text(batch, normalize=self.normalize))
        return _Vectors(rows, vectors[[unique[text] for text in texts]])


def _write(
    encoder: Encoder,
    samples: Sequence[Sample],
    stream: Iterator[_Vectors],
    store: EmbeddingStore,
    modality: Modality,
    total: int,
    progress: Progress | None,
) -> int:
    """Commit a stream in chunks; what was embedded before an error or Ctrl-C is committed too."""
    bar = progress or SilentProgress()
    bar.start(total, f"embedding {modality}s")
    rows: list[int] = []
    parts: list[NDArray[np.float32]] = []
    added = 0

    def commit() -> int:
        if not rows:
            return 0
        done, vectors = [samples[r] for r in rows], np.concatenate(parts)
        rows.clear()  # first: what cannot be stored is not tried twice
        parts.clear()
        return store.append(_embeddings(encoder, done, vectors, modality))

    try:
        since = time.monotonic()
        for found in stream:
            rows.extend(found.rows)
            parts.append(found.vectors)
            if len(rows) >= CHUNK_ROWS or time.monotonic() - since > CHUNK_SECONDS:
                added += commit()
                since = time.monotonic()
            bar.advance(len(found.rows))
        return added + commit()
    except BaseException:
        commit()
        raise
    finally:
        bar.finish()


def _collect(
    encoder: Encoder,
    samples: Sequence[Sample],
    stream: Iterator[_Vectors],
    modality: Modality,
    progress: Progress | None,
) -> Embeddings:
    _check_ids(samples)
    bar = progress or SilentProgress()
    bar.start(len(samples), f"embedding {modality}s")
    vectors = np.empty((len(samples), encoder.dim), np.float32)
    done: list[int] = []
    try:
        for found in stream:
            vectors[len(done) : len(done) + len(found.rows)] = found.vectors
            done.extend(found.rows)
            bar.advance(len(found.rows))
    finally:
        bar.finish()
    kept = vectors if len(done) == len(samples) else vectors[: len(done)].copy()
    return _embeddings(encoder, [samples[r] for r in done], kept, modality)


def _embeddings(
    encoder: Encoder, samples: Sequence[Sample], vectors: NDArray[np.float32], modality: Modality
) -> Embeddings:
    if not np.isfinite(vectors).all():
        raise InputError(
            f"`{encoder.name}` gave vectors with NaN or infinity", hint="check its weights, or use another precision"
        )
    names = tuple(dict.fromkeys(k for s in samples for k in s.labels))
    labels: dict[str, tuple[LabelValue, ...]] = {k: tuple(s.labels.get(k) for s in samples) for k in names}
    for name in ("split", "study", "slide"):
        values = tuple(getattr(s, name) for s in samples)
        if any(v is not None for v in values):
            labels.setdefault(name, values)

    def column(values: Iterator[str | None]) -> tuple[str | None, ...] | None:
        listed = tuple(values)
        return listed if any(v is not None for v in listed) else None

    return Embeddings(
        vectors=vectors,
        ids=tuple(s.id for s in samples),
        space=encoder.space,
        modality=modality,
        normalized=True,
        logit_scale=encoder.logit_scale,
        logit_bias=encoder.logit_bias,
        members=encoder.members,
        texts=column(s.text for s in samples),
        paths=column(None if s.image is None else str(s.image) for s in samples),
        patients=column(s.patient or s.slide or s.study for s in samples),
        labels=labels,
    )


def _image_samples(images: Sequence[Sample | Path | str | Image]) -> tuple[list[Sample], dict[int, Image]]:
    items: list[Sample] = []
    pictures: dict[int, Image] = {}
    for row, image in enumerate(images):
        if isinstance(image, Sample):
            items.append(image)
        elif isinstance(image, (str, Path)):
            items.append(Sample(id=str(image), image=Path(image)))
        elif hasattr(image, "getbbox"):
            items.append(Sample(id=str(row)))
            pictures[row] = image
        else:
            raise InputError(f"cannot embed a {type(image).__name__}", hint="give samples, paths or Pillow images")
    return items, pictures


def _has(sample: Sample, modality: Modality) -> bool:
    return (sample.image if modality == "image" else sample.text) is not None


def _check_ids(samples: Sequence[Sample]) -> None:
    repeated = len(samples) - len({s.id for s in samples})
    if repeated:
        raise InputError(
            f"{repeated} ids of {len(samples)} samples are repeated", hint="give every row an id of its own"
        )


def _to_numpy(vectors: Tensor) -> NDArray[np.float32]:
    result: NDArray[np.float32] = vectors.detach().float().cpu().numpy()
    return result


def _tell_truncated(stream: _TextStream) -> None:
    if stream.truncated:
        from chiasm.data.tokens import TruncationWarning

        context = stream.encoder.tokenizer.context_length
        warnings.warn(
            f"{stream.truncated} of {len(stream.samples)} texts are longer than {context} tokens and were cut",
            TruncationWarning,
            stacklevel=3,
        )


def _tell_rejected(found: RejectLog, rejects: RejectLog | None, items: Sequence[Sample]) -> None:
    """Hand rejected rows to the caller's log, or warn; raise when nothing is left."""
    if items and len(found) == len(items):
        raise InputError(f"none of {len(items)} rows can be embedded: {found.summary()}")
    for row in found:
        if rejects is not None:
            rejects.add(row.row, row.id, row.reason)
    if len(found) and rejects is None:
        warnings.warn(f"of {len(items)} rows, {found.summary()}", UserWarning, stacklevel=3)
