"""Samples and an encoder to embeddings: the only bridge between models and everything that works on vectors.

Images are decoded and preprocessed in threads while the encoder works, and a third party writes
(:mod:`chiasm.embed_streams`). What goes to a store is committed in chunks, so a run that is killed goes on where it
stopped, and gives the same vectors: batches are cut by the position of a sample in the data set, not by what is left
to do.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.data.loader import OnBad
from chiasm.embed_streams import ChunkWriter, ImageStream, TextStream, Vectors
from chiasm.errors import InputError
from chiasm.io.manifest import Rejected, RejectLog, count_reasons, summarize_rejected, write_rejected
from chiasm.io.store import EmbeddingStore, StoreMetadata, create_store
from chiasm.progress import Progress, SilentProgress
from chiasm.types import Embeddings, LabelValue, Modality, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.datasets.dataset import Dataset
    from chiasm.encoders.base import Encoder

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
        per_second: Rows a second of wall time, by modality, where any were added.
        threads: CPU threads of ``decoding`` images and of the ``model``.
        precision: Arithmetic of the encoder.
        precision_check: Of int8: how far it was from float32 on the first images; None otherwise.
    """

    store: str
    added: Mapping[str, int]
    present: Mapping[str, int]
    rejected: tuple[Rejected, ...]
    truncated: int
    seconds: float
    per_second: Mapping[str, float] = field(default_factory=dict)
    threads: Mapping[str, int] = field(default_factory=dict)
    precision: str = "fp32"
    precision_check: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; rejected rows are counted by reason, not named."""
        return {**asdict(self), "rejected": len(self.rejected), "reasons": count_reasons(self.rejected)}

    def sentence(self) -> str:
        """Return one line for people."""
        parts = []
        for modality, n in self.added.items():
            were_there = f" ({self.present[modality]} were there)" if self.present[modality] else ""
            rate = f", {self.per_second[modality]:.1f} a second" if modality in self.per_second else ""
            parts.append(f"{n} {modality}s added{were_there}{rate}")
        if self.rejected:
            parts.append(summarize_rejected(self.rejected) + " (listed in rejected.jsonl)")
        if self.truncated:
            parts.append(f"{self.truncated} texts were cut to the context")
        if self.precision_check is not None:
            parts.append(
                f"int8 was compared with float32 on {self.precision_check['images']} images: "
                f"1 - cosine at most {self.precision_check['cos_error']:.1e}"
            )
        return f"{'; '.join(parts)}; {self.precision}, {self.seconds:.1f} s"


def embed_images(
    encoder: Encoder,
    images: Sequence[Sample | Path | str | Image],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    on_bad: OnBad = "skip",
    rejects: RejectLog | None = None,
    progress: Progress | None = None,
) -> Embeddings:
    """Return the unit vectors of images, in order.

    Args:
        encoder: Gives preprocessing and vectors.
        images: Samples, paths (their id is the path) or Pillow images (their id is the position).
        batch_size: Images a forward pass.
        workers: Threads that decode; 0 decodes in this one; None: one a CPU that this process may use.
        on_bad: ``skip`` leaves out images that cannot be decoded and notes them; ``fail`` raises at the first.
        rejects: Where they are noted; without it a warning counts them.
        progress: Told about every batch.

    Raises:
        InputError: No image can be used, ids repeat, or an image is bad and ``on_bad`` is ``fail``.
    """
    items, pictures = _image_samples(images)
    log = RejectLog()
    stream = ImageStream(encoder, items, batch_size, workers, on_bad, log, pictures)
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
        batch_size: A forward pass takes up to 128 tokens and 4 texts for each of these.
        normalize: False returns vectors as the encoder gives them, whose lengths some protocols use.
        on_bad: What to do with empty texts: ``skip`` leaves them out and notes them; ``fail`` raises.
        rejects: Where they are noted; without it a warning counts them.
        progress: Told about every batch.

    Raises:
        InputError: No text can be used, ids repeat, or a text is empty and ``on_bad`` is ``fail``.
    """
    items = [t if isinstance(t, Sample) else Sample(id=str(i), text=t) for i, t in enumerate(texts)]
    log = RejectLog()
    stream = TextStream(encoder, items, batch_size, batch_size * SORTED_BATCHES, on_bad, log, normalize)
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
    workers: int | None = None,
    on_bad: OnBad = "skip",
    progress: Progress | None = None,
) -> EmbedSummary:
    """Embed a data set into a store on disk, going on where an earlier run stopped.

    Rows are committed in chunks (at least every 1,024 rows or 15 seconds) by a thread of its own. A killed run loses at
    most one chunk and the few batches that waited behind it; started again with the same arguments it embeds what is
    missing, and every vector equals that of an uninterrupted run. The labels stored with a row include the sample's
    ``split``, ``study`` and ``slide`` where these are known. ``rejected.jsonl`` in the folder of the store lists every
    row of the data set that is not in it.

    Args:
        encoder: Gives vectors; the store keeps its space, scale and preprocessing.
        dataset: Samples with unique ids.
        store_path: Folder of the store, made when absent.
        modalities: What to embed; one that no sample has is passed over, as long as there is another.
        resume: Whether an existing store is added to; without it an existing store is an error.
        batch_size: Images a forward pass; for texts as in :func:`embed_texts`.
        workers: Threads that decode images; None: one a CPU that this process may use (affinity and cgroup).
        on_bad: ``skip`` or ``fail``, for rows that cannot be used.
        progress: One stage a modality.

    Raises:
        SpaceMismatch: The store there holds vectors of another encoder.
        InputError: The store there holds vectors of another precision.
        InputError: Nothing can be embedded, the disk is full (committed rows stay), or a bad row is fatal.
        KeyboardInterrupt: On Ctrl-C, after the store was closed; the message says how far the run came.
    """
    import torch

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
        precision=encoder.precision,
    )
    per_second: dict[str, float] = {}
    threads = {"model": torch.get_num_threads()}
    with create_store(path, metadata, exist_ok=resume) as store:
        _check_precision(store, encoder)
        store.lock()
        try:
            for modality in todo:
                stored = set(store.ids(modality))
                rows = [i for i, s in enumerate(samples) if s.id not in stored]
                present[modality] = len(samples) - len(rows)
                since = time.monotonic()
                stream: ImageStream | TextStream
                if modality == "image":
                    stream = ImageStream(encoder, samples, batch_size, workers, on_bad, log)
                    threads["decoding"] = stream.workers
                else:
                    stream = TextStream(encoder, samples, batch_size, batch_size * SORTED_BATCHES, on_bad, log)
                added[modality] = _write(encoder, samples, stream.run(rows), store, modality, len(rows), progress)
                truncated += stream.truncated
                if added[modality]:
                    per_second[modality] = round(added[modality] / (time.monotonic() - since), 1)
        except KeyboardInterrupt:
            n = store.count()
            raise KeyboardInterrupt(
                f"interrupted: {n} of {len(samples) * len(todo)} rows are stored; the same command goes on from there"
            ) from None
        finally:
            write_rejected(path / "rejected.jsonl", log.items)
    seconds = time.monotonic() - began
    check = encoder.precision_check
    return EmbedSummary(
        str(path), added, present, log.items, truncated, seconds, per_second, threads, encoder.precision,
        None if check is None else check.to_dict(),
    )  # fmt: skip


def _write(
    encoder: Encoder,
    samples: Sequence[Sample],
    stream: Generator[Vectors],
    store: EmbeddingStore,
    modality: Modality,
    total: int,
    progress: Progress | None,
) -> int:
    """Commit a stream in chunks; what was embedded before an error or Ctrl-C is committed too."""
    bar = progress or SilentProgress()
    bar.start(total, f"embedding {modality}s")

    def commit(chunk: Vectors) -> int:
        return store.append(_embeddings(encoder, [samples[r] for r in chunk.rows], chunk.vectors, modality))

    try:
        with closing(stream), ChunkWriter(commit, chunk_rows=CHUNK_ROWS, chunk_seconds=CHUNK_SECONDS) as writer:
            for found in stream:
                writer.put(found)
                bar.advance(len(found.rows))
        return writer.added
    finally:
        bar.finish()


def _collect(
    encoder: Encoder,
    samples: Sequence[Sample],
    stream: Generator[Vectors],
    modality: Modality,
    progress: Progress | None,
) -> Embeddings:
    _check_ids(samples)
    bar = progress or SilentProgress()
    bar.start(len(samples), f"embedding {modality}s")
    vectors = np.empty((len(samples), encoder.dim), np.float32)
    done: list[int] = []
    try:
        with closing(stream):
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


def _check_precision(store: EmbeddingStore, encoder: Encoder) -> None:
    """Refuse to add to vectors that were computed in another arithmetic: one row would not mean what another does."""
    stored = store.metadata.precision
    if stored != encoder.precision:
        raise InputError(
            f"the store in `{store.path.name}` holds vectors computed in {stored}, the encoder computes in "
            f"{encoder.precision}",
            hint=f"go on with precision {stored}, or choose another folder",
        )


def _check_ids(samples: Sequence[Sample]) -> None:
    repeated = len(samples) - len({s.id for s in samples})
    if repeated:
        raise InputError(
            f"{repeated} ids of {len(samples)} samples are repeated", hint="give every row an id of its own"
        )


def _tell_truncated(stream: TextStream) -> None:
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
