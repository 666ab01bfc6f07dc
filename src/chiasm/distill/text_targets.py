"""From the texts of a run to the targets of every kind of arm, for the training and validation images of one seed.

Comes in: vectors of images and texts. Goes out: :class:`chiasm.distill.targets.TextSources`. Pairing looks at vectors
only; the one kind that sees labels is ``label``, which is there to show what a leak would do. Test images get no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.distill.backbone import ImagePool
from chiasm.distill.data import Division, LabelledImages
from chiasm.distill.problem import Targets
from chiasm.distill.recipe import DistillRecipe, PairingConfig
from chiasm.distill.targets import ReportIds, TextSources, make_targets
from chiasm.distill.text_tower import RowTexts
from chiasm.distill.texts import Retriever, TextMaterial
from chiasm.errors import ConfigError, InputError
from chiasm.io.pairs import load_pairs
from chiasm.tasks.pairing import Pairing, pair
from chiasm.train.recipe import expand_path
from chiasm.types import Embeddings

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SeedTexts:
    """The texts of one seed's rows.

    Attributes:
        sources: Targets by kind.
        row_texts: The texts themselves by kind, where they are known: for a text tower that is adapted.
        facts: Counts about pairs.
    """

    sources: TextSources
    row_texts: Mapping[str, RowTexts]
    facts: Mapping[str, Any]


def text_sources(
    recipe: DistillRecipe,
    material: TextMaterial,
    retriever: Retriever | None,
    division: Division,
    images: LabelledImages,
    *,
    pool: ImagePool,
) -> SeedTexts:
    """Return the targets of all kinds that there are, and what is known about the pairs.

    Args:
        recipe: ``pairing`` counts.
        material: All texts.
        retriever: Gives the images' vectors; None with pairs on disk and no encoder: then there are ``pairs`` only.
        division: Which images are trained on and validated on.
        images: Own texts and classes.
        pool: Knows what the images hold, so that pairs on disk of other images are refused.

    Raises:
        InputError: Images that the pairs on disk do not hold or held other pixels of, or too few images for ``min_similarity = "auto"``.
    """
    config = recipe.pairing
    rows = np.concatenate([division.train, division.validation])
    n = len(division.train)
    seen = None if retriever is None else _seen(retriever, rows)
    given: dict[str, Targets] = {}
    known: dict[str, RowTexts] = {}
    if config.pairs is not None:
        ids = [images.table.samples[r].id for r in rows]
        vectors, mask, reports, weights, facts = _from_folder(config, ids, retriever, _contents(pool, rows))
    else:
        assert seen is not None
        assert material.chunks is not None
        found = pair(
            seen, material.chunks, report_of=material.report_of, k=config.top_k, aggregate=config.aggregate,
            min_similarity=config.min_similarity, correction=config.correction,
        )  # fmt: skip
        reports, mask, facts = found.report_rows, found.paired, pair_facts(found)
        weights = pair_weights(reports, found.similarity, config.temperature)
        vectors = _weighted(material.chunks.vectors, found.chunk_rows, weights)
        known["pairs"] = RowTexts(tuple(c.text for c in material.spans), found.chunk_rows, weights, n)
    given["pairs"] = _two(vectors, mask, n)
    if seen is not None and material.prompts is not None and material.prompt_class is not None:
        sentences = np.arange(len(material.prompts))
        nearest = pair(seen, material.prompts, report_of=sentences).report_rows[:, 0]
        every = np.ones(len(rows), bool)
        given["prompts"] = _two(material.prompts.vectors[nearest], every, n)
        known["prompts"] = RowTexts(material.sentences, nearest[:, None], np.ones((len(rows), 1)), n)
        classes = class_vectors(material.prompts, material.prompt_class, len(images.classes))
        given["label"] = _two(classes[division.labels[rows]], every, n)
    if material.own is not None:
        own = material.own[rows]
        given["own"] = _two(own, own.any(axis=1), n)
    sources = TextSources(given, ReportIds(reports[:n], weights[:n]), ReportIds(reports[n:], weights[n:]))
    return SeedTexts(sources, known, facts)


def _from_folder(
    config: PairingConfig, ids: Sequence[str], retriever: Retriever | None, contents: Sequence[str] | None
) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.int64], Floats, dict[str, Any]]:
    """Return vectors, mask, report numbers and weights of images from pairs on disk."""
    assert config.pairs is not None
    folder = load_pairs(
        expand_path(config.pairs, "pairing.pairs"), space=None if retriever is None else retriever.encoder.space
    )
    if config.min_similarity == "auto":
        raise ConfigError("`pairing.min_similarity` is `auto`, which `chiasm pairing` decides when it makes the pairs")
    if contents is not None:
        folder.check_contents(ids, contents)
    gate = config.min_similarity
    found = folder.targets(ids, top_k=config.top_k, temperature=config.temperature, gate=gate)
    at = folder.rows_of(ids)
    text, similarity = folder.text_rows[at, : config.top_k], folder.similarity[at, : config.top_k]
    if gate is not None:
        text = np.where(np.nan_to_num(similarity, nan=-2.0) >= np.float32(gate), text, -1)
    numbers = folder.report_numbers
    reports = np.where(text >= 0, numbers[np.maximum(text, 0)] if len(numbers) else -1, -1)
    facts = {
        "pairs": {"corpus": folder.header.corpus, "corpus_digest": folder.header.corpus_digest},
        "retriever": str(folder.header.space),
        "paired": int(found.mask.sum()),
        "without_report": int((~found.mask).sum()),
        "reports_used": len(np.unique(reports[reports >= 0])),
    }
    return found.vectors, found.mask, reports, pair_weights(reports, similarity, config.temperature), facts


def _contents(pool: ImagePool, rows: NDArray[np.int64]) -> list[str] | None:
    """Return digests of images as they lie on disk; None for phantoms that lie in memory."""
    return None if pool.table.arrays is not None else [pool.contents[r] for r in rows.tolist()]


def pair_weights(reports: NDArray[np.int64], similarity: NDArray[np.float32], temperature: float | None) -> Floats:
    """Return the weight of each report of each image, (n, k): rows sum to 1, or are zero without a report."""
    there = reports >= 0
    logits = np.zeros(there.shape) if temperature is None else similarity.astype(np.float64) / temperature
    logits = np.where(there, logits, -np.inf)
    peak = np.where(there.any(axis=1, keepdims=True), logits.max(axis=1, keepdims=True), 0.0)
    raw = np.where(there, np.exp(logits - peak), 0.0)
    weights: Floats = raw / np.maximum(raw.sum(axis=1, keepdims=True), 1e-300)
    return weights


def class_vectors(prompts: Embeddings, prompt_class: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Return the mean sentence of each class, (classes, dim), of unit length."""
    sums = np.zeros((classes, prompts.dim))
    np.add.at(sums, prompt_class, prompts.vectors.astype(np.float64))
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise InputError("a class has no sentence")
    found: NDArray[np.float32] = (sums / lengths).astype(np.float32)
    return found


def pair_facts(found: Pairing) -> dict[str, Any]:
    """Return counts about pairs, without ids."""
    paired = found.paired
    used = np.unique(found.report_rows[found.report_rows >= 0])
    similarity = found.similarity[paired, 0]
    return {
        "paired": int(paired.sum()),
        "without_report": int((~paired).sum()),
        "reports_used": len(used),
        "min_similarity": found.min_similarity,
        "median_similarity": float(np.median(similarity)) if len(similarity) else None,
    }


def _seen(retriever: Retriever, rows: NDArray[np.int64]) -> Embeddings:
    """Return the retriever's view of some images, made as one ascending list of rows, whatever their order."""
    both = np.sort(rows)
    return retriever.images(both).select(np.searchsorted(both, rows))


def _weighted(vectors: NDArray[np.float32], rows: NDArray[np.int64], weights: Floats) -> Floats:
    """Return the weighted mean of some vectors for each image."""
    result: Floats = np.einsum("nk,nkd->nd", weights, vectors[np.maximum(rows, 0)].astype(np.float64))
    return result


def _two(vectors: NDArray[Any], mask: NDArray[np.bool_], n: int) -> Targets:
    """Return targets of the first ``n`` rows for training, of the others for validation."""
    return make_targets(vectors[:n], vectors[n:], mask[:n], mask[n:])
