"""The texts of a run: reports, class sentences and the images' own texts, as vectors of the retriever's space.

Comes in: ``[pairing]`` of a recipe and the images. Goes out: :class:`TextMaterial`, of which ``distill.targets`` makes
the targets of an arm. Nothing here reads a label; which class a sentence is about is known of the sentence alone.
Vectors are computed once per retriever and content and kept in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.data.chunks import chunk_reports, describe_chunking
from chiasm.datasets.report_sources import open_reports
from chiasm.datasets.reports import ReportCorpus
from chiasm.distill.backbone import Backbone, ImagePool
from chiasm.distill.data import LabelledImages
from chiasm.distill.recipe import DistillRecipe, PairingConfig
from chiasm.embed import embed_texts
from chiasm.errors import ConfigError
from chiasm.io.report import clean_report
from chiasm.progress import Progress, SilentProgress
from chiasm.train.features import cached_rows
from chiasm.train.pairs import draw_phantoms
from chiasm.train.recipe import expand_path
from chiasm.types import Embeddings, digest_of

if TYPE_CHECKING:
    from chiasm.data.chunks import Chunk
    from chiasm.encoders.base import Encoder

#: Phantoms of which only the reports are wanted are drawn as small as they can be.
SMALLEST_PX = 32


class Retriever:
    """The CLIP that pairs, and whose text side gives the targets.

    Args:
        config: Of the recipe.
        pool: The images.
        device: Where it runs.
        batch_size: Texts per forward pass.
        progress: Told while vectors are computed.

    Raises:
        ConfigError: The recipe names no encoder.
    """

    def __init__(
        self,
        config: PairingConfig,
        pool: ImagePool,
        *,
        device: str = "cpu",
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> None:
        if config.encoder is None:
            raise ConfigError(
                "`pairing.encoder` is missing: a CLIP must find a report for each image",
                hint="name a model of `chiasm models`, or a folder that `chiasm train` made",
            )
        self.config = config
        self.pool = pool
        self.device = device
        self.batch_size = batch_size
        self.progress = progress or SilentProgress()

    @cached_property
    def encoder(self) -> Encoder:
        """The model, loaded when it is first needed."""
        from chiasm.load import load

        assert self.config.encoder is not None
        found = load(expand_path(self.config.encoder, "pairing.encoder"), device=self.device, family=self.config.family)
        if found.config.sides != "both":
            raise ConfigError("`pairing.encoder` must have an image and a text side", hint="`chiasm models` lists them")
        return found

    @cached_property
    def _images(self) -> Backbone:
        encoder = self.encoder
        identity = digest_of(encoder.space.to_dict(), 24)
        return Backbone(_JointImages(encoder.model), encoder.config, True, encoder.name, encoder.dim, identity)

    def images(self, rows: Sequence[int] | NDArray[np.int64]) -> Embeddings:
        """Return the unit vectors of images by their rows in the pool."""
        vectors = self.pool.features(self._images, rows)
        samples = self.pool.table.samples
        return self._embeddings(vectors, [samples[int(r)].id for r in rows], "image")

    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Return the unit vectors of texts; a text longer than the context is cut, with a warning."""
        space = self.encoder.space.to_dict()
        path = self.pool.folder / f"text-{digest_of([space, list(texts)], 24)}.npy"

        def batches() -> Iterator[NDArray[np.float32]]:
            found = embed_texts(self.encoder, list(texts), batch_size=self.batch_size, on_bad="fail")
            yield found.vectors

        vectors = np.array(cached_rows(path, batches, len(texts), self.progress), np.float32)
        return self._embeddings(vectors, [str(i) for i in range(len(texts))], "text")

    def _embeddings(self, vectors: NDArray[np.float32], ids: Sequence[str], modality: Any) -> Embeddings:
        encoder = self.encoder
        return Embeddings(
            vectors=vectors, ids=tuple(ids), space=encoder.space, modality=modality, logit_scale=encoder.logit_scale,
            logit_bias=encoder.logit_bias, members=encoder.members,
        )  # fmt: skip


class _JointImages(nn.Module):
    """Pixels to unit vectors of the joint space."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        vectors: Tensor = model.encode_image(pixels, normalize=True)
        return vectors


@dataclass(frozen=True)
class TextMaterial:
    """All texts of a run as vectors of one space.

    Attributes:
        chunks: Distinct reports in pieces that fit the context; None with pairs on disk.
        report_of: (chunks,), row of the corpus.
        spans: Chunks with their place in the report; empty where texts are made up.
        prompts: Class sentences; None where there are none.
        prompt_class: (sentences,), class number of each.
        sentences: What ``prompts`` are the vectors of.
        patients: Of the reports, where they are known.
        own: (n, dim) of all images: the mean of the unit vectors of each own text's chunks, of unit length; zero where an
            image has no text. None when no image has one.
        facts: Digests and counts.
    """

    chunks: Embeddings | None
    report_of: NDArray[np.int64]
    spans: tuple[Chunk, ...]
    prompts: Embeddings | None
    prompt_class: NDArray[np.int64] | None
    own: NDArray[np.float32] | None
    facts: Mapping[str, Any]
    sentences: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()


def open_texts(
    recipe: DistillRecipe, images: LabelledImages, retriever: Retriever | None, *, corpus: ReportCorpus | None
) -> TextMaterial:
    """Embed the corpus, the class sentences and the images' own texts.

    Args:
        recipe: ``pairing`` counts.
        images: Their own texts and what their source says about its classes.
        retriever: Gives vectors; None with pairs on disk and no encoder: there is nothing else then.
        corpus: Of :func:`open_corpus`; None with pairs on disk.

    Raises:
        ConfigError: ``pairing.prompts`` does not name the classes.
    """
    nothing = np.zeros(0, np.int64)
    if retriever is None:
        return TextMaterial(None, nothing, (), None, None, None, {})
    tokenizer = retriever.encoder.tokenizer
    overlap = recipe.pairing.overlap_tokens
    sentences = class_sentences(recipe.pairing, images)
    prompts = prompt_class = None
    said: tuple[str, ...] = ()
    if sentences is not None:
        said = tuple(s for c in images.classes for s in sentences[c])
        prompts = retriever.texts(said)
        prompt_class = np.array([i for i, c in enumerate(images.classes) for _ in sentences[c]], np.int64)
    own = own_vectors(images.own_texts, retriever, overlap_tokens=overlap)
    facts: dict[str, Any] = {
        "retriever": str(retriever.encoder.space),
        "own_texts": 0 if own is None else int(own.any(axis=1).sum()),
    }
    if corpus is None:
        return TextMaterial(None, nothing, (), prompts, prompt_class, own, facts, said)
    first = corpus.first_rows
    spans = tuple(c for c in chunk_reports(corpus, tokenizer, overlap_tokens=overlap) if first[c.report] == c.report)
    facts |= {
        "corpus": corpus.to_dict(),
        "chunks": len(spans),
        "chunking": describe_chunking(tokenizer, overlap_tokens=overlap),
    }
    reports = np.array([c.report for c in spans], np.int64)
    chunks = retriever.texts([c.text for c in spans])
    patients = tuple(sorted(r.patient for r in corpus if r.patient))
    return TextMaterial(chunks, reports, spans, prompts, prompt_class, own, facts, said, patients)


def open_corpus(recipe: DistillRecipe, *, progress: Progress | None = None) -> ReportCorpus:
    """Return the reports of a recipe: a file's, or those of synthetic patients numbered after the images' patients.

    Raises:
        ConfigError: The recipe names none.
        InputError: The corpus cannot be read, or a filter leaves nothing.
    """
    data, pairing = recipe.data, recipe.pairing
    if pairing.reports is not None:
        columns = dict(pairing.columns)
        unknown = set(columns) - {"text", "id", "tissue", "patient"}
        if unknown:
            raise ConfigError(
                f"unknown field `pairing.columns.{min(unknown)}`", hint="known: text, id, tissue, patient"
            )
        return open_reports(
            expand_path(pairing.reports, "pairing.reports"),
            text=columns.get("text"), id=columns.get("id"), patient=columns.get("patient"),
            tissue_column=columns.get("tissue"), tissue=pairing.tissue,
            keep=(pairing.text_filter,) if pairing.text_filter else (),
        )  # fmt: skip
    if data.phantoms is None:
        raise ConfigError(
            "`pairing.reports` is missing: there is no text to learn from",
            hint="name a corpus of reports (txt, CSV, JSONL, Parquet or a folder), or `pairing.pairs`",
        )
    others = draw_phantoms(
        data.phantoms, pairing.phantom_reports, seed=data.phantom_seed, size_px=SMALLEST_PX, first_patient=data.patients,
        progress=progress,
    )  # fmt: skip
    return ReportCorpus.from_texts(
        [s.text or "" for s in others.samples], ids=[s.id for s in others.samples],
        patients=[s.patient for s in others.samples], name=f"reports of other {data.phantoms} phantoms",
    )  # fmt: skip


def class_sentences(pairing: PairingConfig, images: LabelledImages) -> dict[str, tuple[str, ...]] | None:
    """Return class -> sentences; None where the classes are numbers and nobody says what they mean.

    Raises:
        ConfigError: ``pairing.prompts`` lacks a class or names an unknown one.
    """
    if pairing.prompts:
        for name in images.classes:
            if not pairing.prompts.get(name):
                raise ConfigError(f"`pairing.prompts` has no sentence for class {images.classes.index(name)}")
        unknown = set(pairing.prompts) - set(images.classes)
        if unknown:
            raise ConfigError(f"`pairing.prompts` names `{min(unknown)}`, which is no class of the data")
        return {name: tuple(pairing.prompts[name]) for name in images.classes}
    if images.prompts and images.prompts_are_sentences:
        return dict(images.prompts)
    if all(_is_number(c) for c in images.classes):
        return None
    words = {c: images.prompts.get(c, (c.replace("_", " "),)) for c in images.classes}
    return {c: tuple(pairing.prompt.replace("{class}", w) for w in words[c]) for c in images.classes}


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def own_vectors(
    texts: Sequence[str | None], retriever: Retriever, *, overlap_tokens: int | None
) -> NDArray[np.float32] | None:
    """Return one unit vector per image for its own text, zeros where it has none; None when none has one."""
    rows = [i for i, t in enumerate(texts) if t is not None and clean_report(t)]
    if not rows:
        return None
    corpus = ReportCorpus.from_texts([str(texts[i]) for i in rows], name="own texts")
    chunks = chunk_reports(corpus, retriever.encoder.tokenizer, overlap_tokens=overlap_tokens)
    distinct = {text: i for i, text in enumerate(dict.fromkeys(c.text for c in chunks))}
    vectors = torch.from_numpy(retriever.texts(list(distinct)).vectors)
    sums = torch.zeros(len(rows), vectors.shape[1])
    sums.index_add_(0, torch.tensor([c.report for c in chunks]), vectors[[distinct[c.text] for c in chunks]])
    own = np.zeros((len(texts), vectors.shape[1]), np.float32)
    own[rows] = torch.nn.functional.normalize(sums, dim=1).numpy()
    return own
