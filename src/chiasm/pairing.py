"""Images and a corpus of reports to pairs: embed both once, compare, keep what was made from what.

Comes in: an encoder with both sides, images, a corpus. Goes out: a :class:`PairingRun`, whose pairs
:func:`chiasm.io.pairs.save_pairs` writes. Labels are taken off the images before anything else happens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.data.chunks import Chunk, chunk_reports, describe_chunking
from chiasm.datasets.corpus import ReportCorpus
from chiasm.datasets.images import hash_image, keep_decodable
from chiasm.embed import embed_images, embed_texts
from chiasm.errors import ChiasmError, InputError
from chiasm.io.manifest import Rejected, RejectLog
from chiasm.io.pairs import CONTENT_DIGITS, PairFolder, PairHeader, digest_ids
from chiasm.io.vector_cache import VectorCache
from chiasm.progress import Progress, SilentProgress
from chiasm.tasks.pairing import Pairing, pair
from chiasm.tasks.report_blocks import Product, Rough, float32_product
from chiasm.tasks.top_rows import dot_error
from chiasm.types import Embeddings, Modality, Sample

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder
    from chiasm.tasks.pairing import Correction
    from chiasm.tasks.report_blocks import Aggregate

#: A shard of the cache holds about this many vectors: what a killed run loses at most.
SHARD_ROWS = 512
#: Part of every key of the cache: a new number when vectors are computed in another way.
VERSION = 1


def fastest_product() -> Product:
    """Return the product that proposes candidates fastest on this machine: bf16 where the processor has it, else fp32."""
    import torch

    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # without such units bf16 is slower than fp32
    native = any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return bfloat16_product if native else float32_product


def bfloat16_product(reports: NDArray[np.float32]) -> Rough:
    """Compare images with these reports in bf16, with an error of about 0.003.

    |a·b − â·b̂| <= |a − â||b| + |â||b − b̂| with the norms of the rounding as it came out; sums are in fp32, and the
    results are rounded to bf16 (2^-9 of the largest, counted twice). Several times as fast as fp32 on processors with
    matrix units; candidates are scored again in fp64 by the caller, who gets a few more of them.
    """
    import torch

    def low(rows: NDArray[np.float32]) -> tuple[torch.Tensor, float]:
        full = torch.from_numpy(rows if rows.flags.writeable else rows.copy())
        half = full.bfloat16()
        return half, float((full - half).norm(dim=1).max())

    known, lost = low(reports)
    known = known.T.contiguous()
    held: dict[tuple[int, ...], torch.Tensor] = {}  # reused: fresh pages cost as much as the product

    def compare(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        with torch.inference_mode():
            units, lost_too = low(images)
            rough = units @ known
            least, most = rough.aminmax()
            largest = max(float(most), -float(least))
            shape = tuple(rough.shape)
            if shape not in held:
                held.clear()
                held[shape] = torch.empty(shape)
            cosines: NDArray[np.float32] = held[shape].copy_(rough).numpy()
            return cosines, 1.05 * (lost + lost_too) + dot_error(images.shape[1]) + 2.0**-8 * largest

    return compare


@dataclass(frozen=True)
class PairingRun:
    """Pairs, and what they were made from.

    Attributes:
        pairs: What is saved.
        pairing: Rows of the corpus and of ``chunks`` for every image.
        images: Embeddings of the images that could be read, without labels.
        chunks: Embeddings of the chunks of the distinct reports.
        pieces: One per row of ``chunks``: report, place, text.
        corpus: Of the reports.
        rejected: Images that could not be read.
        found: Vectors that the cache had, by modality.
    """

    pairs: PairFolder
    pairing: Pairing
    images: Embeddings
    chunks: Embeddings
    pieces: tuple[Chunk, ...]
    corpus: ReportCorpus
    rejected: tuple[Rejected, ...] = ()
    found: Mapping[str, int] | None = None

    @cached_property
    def report_of(self) -> NDArray[np.int64]:
        """Row in the corpus of the report of each chunk."""
        return np.asarray([piece.report for piece in self.pieces], dtype=np.int64)

    @property
    def distinct_reports(self) -> int:
        """Reports with a text of their own: those that can be chosen."""
        return len(set(self.corpus.first_rows))


def pair_reports(
    encoder: Encoder,
    images: Sequence[Sample],
    corpus: ReportCorpus,
    *,
    k: int = 1,
    aggregate: Aggregate = "max",
    correction: Correction = "none",
    min_similarity: float | Literal["auto"] | None = None,
    overlap_tokens: int | None = None,
    cache: str | Path | None = None,
    batch_size: int = 32,
    workers: int = 2,
    progress: Progress | None = None,
) -> PairingRun:
    """Embed images and reports, and give every image its k best reports.

    Of reports with equal texts the first stands for all. Images that cannot be read are left out and noted.

    Args:
        encoder: With an image and a text side.
        images: With unique ids; labels, texts and patients are not looked at.
        corpus: Cleaned reports.
        k: Reports an image.
        aggregate: As for :func:`chiasm.tasks.pairing.pair`, like the next two.
        correction: Against hubs.
        min_similarity: What a pair must reach; ``auto``: more than images without content do.
        overlap_tokens: Of the chunks of long reports; None: see :func:`chiasm.data.chunks.chunk_reports`.
        cache: Folder of vectors; a run that is killed goes on from there, and another run with the same encoder and
            the same contents computes nothing twice. None: nothing is kept.
        batch_size: Images or chunks a forward pass.
        workers: Threads that read images.
        progress: One stage a side.

    Raises:
        InputError: The encoder has one side only, ids repeat, or no image can be read.
    """
    if encoder.config.sides != "both":
        raise InputError(
            f"`{encoder.name}` has no {'image' if encoder.config.sides == 'text' else 'text'} side, so it cannot pair",
            hint="`chiasm models` lists encoders with both",
        )
    ids = [s.id for s in images]
    if len(set(ids)) != len(ids):
        raise InputError(f"{len(ids) - len(set(ids))} of {len(ids)} ids of images are repeated")
    bare = [Sample(id=s.id, image=s.image) for s in images]
    side = _Side(encoder, cache, batch_size, workers, progress or SilentProgress())
    distinct = set(corpus.first_rows)
    pieces = tuple(
        p for p in chunk_reports(corpus, encoder.tokenizer, overlap_tokens=overlap_tokens) if p.report in distinct
    )
    of = [p.report for p in pieces]
    names = _chunk_names(of)
    texts = [Sample(id=name, text=p.text) for name, p in zip(names, pieces, strict=True)]
    chunks, _ = side.run(texts, "text", _hash_tokens(encoder, [p.text for p in pieces]))
    pictures, contents = side.run(bare, "image", _hash_files(bare, workers, side.progress))
    pairing = pair(
        pictures,
        chunks,
        report_of=of,
        k=k,
        aggregate=aggregate,
        correction=correction,
        min_similarity=min_similarity,
        product=fastest_product(),
    )
    header = PairHeader(
        space=encoder.space,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        image_digest=digest_ids(pictures.ids),
        content_digest=_content_digest(pictures.ids, contents),
        reports=len(corpus),
        k=k,
        aggregate=aggregate,
        correction=correction,
        min_similarity=pairing.min_similarity,
        min_similarity_rule="none" if min_similarity is None else "auto" if min_similarity == "auto" else "given",
        chunking=describe_chunking(encoder.tokenizer, overlap_tokens=overlap_tokens),
        filters=tuple({"what": f.what, "kept": f.kept, "dropped": f.dropped} for f in corpus.filters),
    )
    folder = _folder_of(pairing, header, chunks, pieces, corpus, contents)
    return PairingRun(folder, pairing, pictures, chunks, pieces, corpus, side.log.items, dict(side.found))


def _folder_of(
    pairing: Pairing,
    header: PairHeader,
    chunks: Embeddings,
    pieces: Sequence[Chunk],
    corpus: ReportCorpus,
    contents: Sequence[bytes],
) -> PairFolder:
    """Return the pairs with the vectors of the chunks that occur in them, in order of the corpus."""
    used = np.unique(pairing.chunk_rows[pairing.chunk_rows >= 0])
    place = np.full(len(pieces) + 1, -1, dtype=np.int64)  # the last entry stands for -1
    place[used] = np.arange(len(used))
    number = [int(name.split("-")[1]) for name in _chunk_names([p.report for p in pieces])]
    vectors = chunks.vectors[used]
    return PairFolder(
        header=header,
        image_ids=pairing.image_ids,
        text_rows=place[pairing.chunk_rows],
        similarity=pairing.similarity,
        margin=pairing.margin,
        best_similarity=np.where(pairing.paired, pairing.similarity[:, 0], pairing.best_similarity),
        texts=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        text_keys=tuple((corpus.reports[pieces[row].report].id, number[row]) for row in used.tolist()),
        text_spans=np.asarray([(pieces[r].start, pieces[r].end) for r in used.tolist()], np.int64).reshape(-1, 2),
        contents=tuple(content.hex()[:CONTENT_DIGITS] for content in contents),
    )


def _chunk_names(report_of: Sequence[int]) -> list[str]:
    """Return ``report-chunk`` for each chunk: row of the corpus and number in the report, from 0."""
    seen: dict[int, int] = {}
    names = []
    for report in report_of:
        seen[report] = seen.get(report, -1) + 1
        names.append(f"{report}-{seen[report]}")
    return names


class _Side:
    """Embeds one side after the other, through a cache where there is one."""

    def __init__(
        self, encoder: Encoder, cache: str | Path | None, batch_size: int, workers: int, progress: Progress
    ) -> None:
        self.encoder = encoder
        self.cache = cache
        self.batch_size = batch_size
        self.workers = workers
        self.progress = progress
        self.log = RejectLog()
        self.found: dict[str, int] = {}

    def run(
        self, samples: Sequence[Sample], modality: Modality, contents: Sequence[bytes | None]
    ) -> tuple[Embeddings, list[bytes]]:
        """Return the embeddings of what can be read, and the hash of each row's content."""
        cache = None
        if self.cache is not None:
            key: dict[str, Any] = {"version": VERSION, "modality": modality, "space": self.encoder.space.to_dict()}
            if self.encoder.precision != "fp32":
                key["precision"] = self.encoder.precision
            cache = VectorCache(self.cache, key, self.encoder.dim)
        known: dict[bytes, NDArray[np.float32]] = {}
        self.found[modality] = 0 if cache is None else sum(c in cache for c in contents if c is not None)
        step = max(1, SHARD_ROWS // self.batch_size) * self.batch_size
        bar = _Stage(self.progress)
        self.progress.start(len(samples), f"embedding {'images' if modality == 'image' else 'reports'}")
        try:
            for start in range(0, len(samples), step):
                # Cut by position, so that a run that goes on after a kill forms the same batches.
                part = range(start, min(start + step, len(samples)))
                fresh: dict[bytes, int] = {}
                for row in part:
                    content = contents[row] or b""
                    if content not in known and (cache is None or content not in cache):
                        fresh.setdefault(content or str(row).encode(), row)
                vectors = self._embed([(row, samples[row]) for row in fresh.values()], modality, bar)
                made = {c: vectors[row] for c, row in fresh.items() if row in vectors and c == contents[row]}
                if cache is None:
                    known.update(made)
                elif made:
                    cache.add(list(made), np.stack(list(made.values())))
                bar.reach(part.stop)
        finally:
            self.progress.finish()
        there = [
            row for row, c in enumerate(contents) if c is not None and (c in known if cache is None else c in cache)
        ]
        if not there:
            raise InputError(f"none of {len(samples)} {modality}s can be embedded: {self.log.summary()}")
        self._note_copies(samples, contents, set(there))
        kept = [c for row in there if (c := contents[row]) is not None]
        matrix = np.stack([known[c] for c in kept]) if cache is None else cache.read(kept)
        encoder = self.encoder
        result = Embeddings(
            vectors=matrix,
            ids=tuple(samples[row].id for row in there),
            space=encoder.space,
            modality=modality,
            logit_scale=encoder.logit_scale,
            logit_bias=encoder.logit_bias,
            members=encoder.members,
            precision=encoder.precision,
        )
        return result, kept

    def _embed(
        self, rows: Sequence[tuple[int, Sample]], modality: Modality, bar: Progress
    ) -> dict[int, NDArray[np.float32]]:
        """Return the vectors of rows that can be read; the others are noted."""
        if not rows:
            return {}
        if modality == "text":
            found = embed_texts(self.encoder, [s for _, s in rows], batch_size=self.batch_size, progress=bar)
            return dict(zip([row for row, _ in rows], found.vectors, strict=True))
        log = RejectLog()
        try:
            found = embed_images(
                self.encoder,
                [s for _, s in rows],
                batch_size=self.batch_size,
                workers=self.workers,
                rejects=log,
                progress=bar,
            )
        except InputError:
            # Raised when a whole part cannot be read; others may.
            kept, rejected = keep_decodable(rows, workers=self.workers)
            if kept:
                raise
            for bad in rejected:
                self.log.add(bad.row, bad.id, bad.reason)
            return {}
        for bad in log:
            self.log.add(rows[bad.row][0], bad.id, bad.reason)
        place = {s.id: row for row, s in rows}
        return {place[name]: vector for name, vector in zip(found.ids, found.vectors, strict=True)}

    def _note_copies(self, samples: Sequence[Sample], contents: Sequence[bytes | None], there: set[int]) -> None:
        """Note further rows whose content is that of a rejected one."""
        noted = {bad.row: bad.reason for bad in self.log}
        reason = {contents[row]: why for row, why in noted.items() if contents[row] is not None}
        for row, sample in enumerate(samples):
            if row not in there and row not in noted:
                self.log.add(row, sample.id, reason.get(contents[row], "image cannot be read"))


class _Stage:
    """Passes on progress within one stage that several calls share."""

    def __init__(self, outer: Progress) -> None:
        self.outer = outer
        self.done = 0

    def start(self, total: int | None, description: str) -> None:
        """Ignore: the stage is open."""

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Report."""
        self.done += n
        self.outer.advance(n, **fields)

    def finish(self) -> None:
        """Ignore: the stage goes on."""

    def reach(self, row: int) -> None:
        """Report what needed no work."""
        if row > self.done:
            self.advance(row - self.done)


def _hash_tokens(encoder: Encoder, texts: Sequence[str]) -> list[bytes | None]:
    """Return what the text tower sees, hashed: the same text under another vocabulary is another content."""
    found: list[bytes | None] = []
    for start in range(0, len(texts), SHARD_ROWS):
        for ids in encoder.tokenizer.encode_ids(list(texts[start : start + SHARD_ROWS])):
            found.append(hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).digest())
    return found


def _hash_files(samples: Sequence[Sample], workers: int, progress: Progress) -> list[bytes | None]:
    """Return the hash of what each image file holds; None where it cannot be read."""
    progress.start(len(samples), "reading images")
    found: list[bytes | None] = []
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        for content in pool.map(_hash_image, [s.image for s in samples]):
            found.append(content)
            progress.advance()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        progress.finish()
    return found


def _hash_image(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return hash_image(path)
    except (OSError, ChiasmError):
        return None


def _content_digest(ids: Sequence[str], contents: Sequence[bytes]) -> str:
    """Return 16 hex digits that change when the file of any image does, whatever the order."""
    lines = sorted(f"{name}\t{content.hex()}" for name, content in zip(ids, contents, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
