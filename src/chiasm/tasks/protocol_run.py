"""Run a published protocol on embeddings: the same numbers as its authors' code, given the same vectors.

In: a :class:`~chiasm.tasks.protocol.Protocol`, image embeddings, and a function that embeds texts. Out:
:class:`~chiasm.tasks.zero_shot.ZeroShotResult` with ``protocol``, ``variant`` and ``notes``; for slides, one result for
every number of tiles. The model is not seen: GLoRIA's comparison of regions with words comes in as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.tasks.aggregation import (
    Pooling,
    mean_direction,
    pair_probability,
    pool_prompts,
    split_members,
    standardise,
    top_mean,
)
from chiasm.tasks.prompts import PromptSet
from chiasm.tasks.protocol import PUBLISHED, Protocol, Variant
from chiasm.tasks.protocol_prompts import ProtocolPrompts, make_prompts
from chiasm.tasks.zero_shot import (
    Activation,
    Mode,
    ScaleSource,
    ZeroShotResult,
    build_classifier,
    check_images,
    choose_logit_scale,
    classify,
    embed_prompts,
    raw_vectors,
    sigmoid,
    softmax,
    unit_vectors,
)
from chiasm.types import Embeddings, Space

EmbedTexts = Callable[[list[str]], Embeddings]
#: Texts, and ``words`` or ``characters``, to similarities (images, texts); see ``evaluate.local_similarity``.
LocalSimilarity = Callable[[list[str], str], NDArray[Any]]


def run_protocol(
    protocol: Protocol,
    images: Embeddings,
    embed_texts: EmbedTexts,
    *,
    prompts: ProtocolPrompts | PromptSet | None = None,
    variant: str = PUBLISHED,
    mode: Mode | None = None,
    local: LocalSimilarity | None = None,
) -> ZeroShotResult:
    """Classify images as a published protocol does.

    Args:
        protocol: From ``get_protocol``; one for slides goes to :func:`run_protocol_on_slides`.
        images: Image embeddings, raw or normalised.
        embed_texts: Texts to embeddings, one row a text; raw ones where ``protocol.needs_raw_texts(variant)``.
        prompts: From ``make_prompts``; None: the protocol's own.
        variant: ``published``, ``corrected``, or another of the protocol's.
        mode: None: the protocol's own.
        local: For protocols with ``local``; without it their global half is used alone, and a note says so.

    Raises:
        SpaceMismatch: Images and prompts come from two spaces.
        InputError: The prompts do not suit the mode, or vectors are damaged.
    """
    if protocol.top_j:
        raise InputError(f"protocol `{protocol.name}` is for slides", hint="run it with `run_protocol_on_slides`")
    chosen = protocol.variant(variant)
    made = _made(protocol, prompts, variant)
    if chosen.aggregator in ("mean_embedding", "mean_unnormalised"):
        result = _run_mean(protocol, chosen, images, embed_texts, made.prompts, mode or protocol.mode)
    else:
        vectors = _embed(made.prompts, embed_texts, protocol, chosen)
        check_images(images, vectors.space)
        run = {"pair_softmax": _run_pairs, "global_local": _run_global_local}.get(str(chosen.aggregator), _run_prompts)
        result = run(protocol, chosen, images, vectors, mode or protocol.mode, local)
    notes = list(_notes(protocol, chosen, made))
    if protocol.local and local is None:
        notes.append("only the global half of the similarity was used: the comparison of regions with words was not")
    if chosen.per_batch and len(images) == 1:
        notes.append("a single image is not standardised, as in the reference")
    return replace(result, protocol=protocol.name, variant=variant, notes=tuple(notes))


def run_protocol_on_slides(
    protocol: Protocol,
    tiles: Embeddings,
    embed_texts: EmbedTexts,
    slides: Sequence[str],
    *,
    prompts: ProtocolPrompts | PromptSet | None = None,
    variant: str = PUBLISHED,
) -> dict[int, ZeroShotResult]:
    """Classify slides by their best tiles, once for every number j of tiles.

    No j is the result: choose one on validation slides (:func:`choose_j`), or report all.

    Args:
        protocol: One with ``top_j``.
        tiles: Embeddings of tiles.
        embed_texts: As in :func:`run_protocol`.
        slides: Slide of each tile; results keep the order in which slides first appear.
        prompts: From ``make_prompts``.
        variant: Of the protocol.
    """
    if not protocol.top_j:
        raise InputError(f"protocol `{protocol.name}` is for images, not for slides", hint="run it with `run_protocol`")
    if len(slides) != len(tiles):
        raise InputError(f"{len(tiles)} tiles came with {len(slides)} slides")
    chosen = protocol.variant(variant)
    made = _made(protocol, prompts, variant)
    whole = _run_mean(protocol, chosen, tiles, embed_texts, made.prompts, "single")
    order = {slide: k for k, slide in enumerate(dict.fromkeys(slides))}
    members = [np.flatnonzero(np.asarray([order[s] for s in slides]) == k) for k in range(len(order))]
    groups = tuple(
        _group(slide, [tiles.groups[i] for i in rows], tiles) for slide, rows in zip(order, members, strict=True)
    )
    notes = _notes(protocol, chosen, made)
    results: dict[int, ZeroShotResult] = {}
    for j in protocol.top_j:
        pooled = np.stack([top_mean(whole.cosines[rows], j) for rows in members])
        logits = whole.logit_scale * pooled
        short = sum(len(rows) < j for rows in members)
        fewer = (f"{short} of {len(order)} slides have fewer than {j} tiles and used all of theirs",) if short else ()
        results[j] = replace(
            whole,
            probabilities=softmax(logits),
            logits=logits,
            cosines=pooled.astype(np.float32),
            ids=tuple(order),
            groups=groups,
            paths=None,
            protocol=protocol.name,
            variant=variant,
            notes=(*notes, *fewer),
        )
    return results


def choose_j(scores: Mapping[int, float]) -> int:
    """Return the number of tiles with the best score on VALIDATION slides (ties: the smallest).

    Choosing it on the slides that are reported, as the published notebooks do, makes the figure too good.
    """
    finite = {j: s for j, s in scores.items() if np.isfinite(s)}
    if not finite:
        raise InputError("no j has a score to choose by")
    return min(finite, key=lambda j: (-finite[j], j))


@dataclass(frozen=True)
class _PromptVectors:
    """Vectors of the prompts of every label, texts that repeat included; ``negative`` is empty where there are none."""

    prompts: PromptSet
    positive: tuple[NDArray[np.float64], ...]
    negative: tuple[NDArray[np.float64], ...]
    space: Space
    logit_scale: float | None
    members: int


def _made(protocol: Protocol, prompts: ProtocolPrompts | PromptSet | None, variant: str) -> ProtocolPrompts:
    if isinstance(prompts, PromptSet):
        return ProtocolPrompts(prompts)
    return make_prompts(protocol, variant=variant) if prompts is None else prompts


def _notes(protocol: Protocol, chosen: Variant, made: ProtocolPrompts) -> tuple[str, ...]:
    defects = [f"known defect of the reference: {d}" for d in protocol.defects]
    missing = [f"not as published: {n}" for n in protocol.not_reproduced]
    return (chosen.what, *made.notes, *defects, *missing)


def _group(slide: str, groups: Sequence[str], tiles: Embeddings) -> str:
    """Return the patient of a slide, or the slide itself."""
    if tiles.patients is None:
        return slide
    if len(set(groups)) > 1:
        raise InputError("the tiles of one slide belong to several patients")
    return groups[0]


def _scale(protocol: Protocol, images: Embeddings, of_texts: float | None) -> tuple[float, ScaleSource]:
    if protocol.stated_scale is not None:
        return protocol.stated_scale, "protocol"
    return choose_logit_scale(images.logit_scale, of_texts)


def _run_mean(
    protocol: Protocol, chosen: Variant, images: Embeddings, embed_texts: EmbedTexts, prompts: PromptSet, mode: Mode
) -> ZeroShotResult:
    """Average the prompts of a class into one direction."""
    classifier = build_classifier(prompts, embed_texts, unit_first=chosen.aggregator == "mean_embedding")
    scale = protocol.stated_scale
    if scale is None:
        return classify(images, classifier, mode=mode)
    bare = replace(images, logit_scale=None, logit_bias=None)
    result = classify(bare, replace(classifier, logit_scale=None, logit_bias=None), mode=mode, logit_scale=scale)
    return replace(result, logit_scale_source="protocol")


def _embed(prompts: PromptSet, embed_texts: EmbedTexts, protocol: Protocol, chosen: Variant) -> _PromptVectors:
    """Embed the prompts in the batches of the protocol: all at once, class by class, or each alone."""
    raw = chosen.aggregator == "raw_text"
    first: Embeddings | None = None
    known: dict[str, NDArray[np.float64]] = {}

    def vectors(texts: Sequence[str]) -> None:
        nonlocal first
        for batch in [[t] for t in texts] if chosen.alone else [list(texts)]:
            embedded = embed_prompts(batch, embed_texts)
            first = first or embedded
            rows = raw_vectors(embedded, "prompt") if raw else unit_vectors(embedded, "prompt")
            known.update(zip(batch, rows.astype(np.float64), strict=True))

    if not protocol.per_class:
        vectors(prompts.texts())
    positive: list[NDArray[np.float64]] = []
    negative: list[NDArray[np.float64]] = []
    for label in prompts.labels:
        for side, found in ((label.positive, positive), (label.negative, negative)):
            if side:
                if protocol.per_class:
                    vectors(list(dict.fromkeys(side)))
                found.append(np.stack([known[t] for t in side]))
    assert first is not None
    return _PromptVectors(
        prompts,
        tuple(positive),
        tuple(negative) if len(negative) == len(positive) else (),
        first.space,
        first.logit_scale,
        first.members,
    )


def _run_pairs(
    protocol: Protocol,
    chosen: Variant,
    images: Embeddings,
    vectors: _PromptVectors,
    mode: Mode,
    local: LocalSimilarity | None,
) -> ZeroShotResult:
    """Softmax over positive and negative cosine, without a scale; the mean of the members' probabilities."""
    if mode == "single":
        raise InputError(f"protocol `{protocol.name}` scores every label alone", hint="leave the mode at `multi`")
    if not vectors.negative:
        without = next(p.name for p in vectors.prompts.labels if not p.negative)
        raise InputError(f"protocol `{protocol.name}` asks in pairs; label `{without}` has no negative prompt")
    seen = split_members(unit_vectors(images, "image"), vectors.members)

    def cosines(sides: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Return cosines (members, images, labels)."""
        columns = []
        for ensemble in sides:
            parts = split_members(ensemble, vectors.members)
            directions = np.stack([mean_direction(part) for part in parts])
            columns.append(np.einsum("mnd,md->mn", seen, directions))
        return np.stack(columns, axis=-1)

    positive, negative = cosines(vectors.positive), cosines(vectors.negative)
    probabilities = pair_probability(positive, negative).mean(axis=0)
    logits = np.log(probabilities) - np.log1p(-probabilities)
    means = positive.mean(axis=0).astype(np.float32), negative.mean(axis=0).astype(np.float32)
    return _result(images, vectors, probabilities, logits, means, "multi", "pair", (1.0, "protocol"))


def _run_prompts(
    protocol: Protocol,
    chosen: Variant,
    images: Embeddings,
    vectors: _PromptVectors,
    mode: Mode,
    local: LocalSimilarity | None,
) -> ZeroShotResult:
    """Compare with every prompt; the best, or the mean, is the class's score. Raw texts: a dot product, no cosine."""
    scale, source = _scale(protocol, images, vectors.logit_scale)
    how: Pooling = "max" if chosen.aggregator == "max_prompt" else "mean"
    seen = unit_vectors(images, "image").astype(np.float64)

    def pooled(sides: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.stack([pool_prompts(seen @ ensemble.T, how) for ensemble in sides], axis=-1)

    positive = pooled(vectors.positive)
    if mode == "single":
        logits = scale * positive
        means = positive.astype(np.float32), None
        return _result(images, vectors, softmax(logits), logits, means, mode, "softmax", (scale, source))
    if not vectors.negative:
        raise InputError(
            f"`{protocol.name}` is published for classes that exclude each other; for others every label needs "
            "negative prompts",
            hint="give them in a --labels-file, or leave out --multi",
        )
    negative = pooled(vectors.negative)
    logits = scale * (positive - negative)
    both = positive.astype(np.float32), negative.astype(np.float32)
    return _result(images, vectors, sigmoid(logits), logits, both, mode, "pair", (scale, source))


def _run_global_local(
    protocol: Protocol,
    chosen: Variant,
    images: Embeddings,
    vectors: _PromptVectors,
    mode: Mode,
    local: LocalSimilarity | None,
) -> ZeroShotResult:
    """Average the cosine with GLoRIA's local similarity, take the best prompt, standardise over the batch on request."""
    seen = unit_vectors(images, "image").astype(np.float64)
    scores, cosines = [], []
    for label, ensemble in zip(vectors.prompts.labels, vectors.positive, strict=True):
        whole = seen @ ensemble.T
        cosines.append(pool_prompts(whole, "max"))
        if local is not None:
            unique = list(dict.fromkeys(label.positive))
            found = np.asarray(local(unique, chosen.words), dtype=np.float64)
            if found.shape != (len(images), len(unique)) or not np.isfinite(found).all():
                raise InputError(
                    f"local similarities must be finite, of shape {(len(images), len(unique))}; got {found.shape}"
                )
            whole = (whole + found[:, [unique.index(t) for t in label.positive]]) / 2
        scores.append(pool_prompts(whole, "max"))
    logits = np.stack(scores, axis=-1)
    if chosen.per_batch:
        logits = standardise(logits)
    means = np.stack(cosines, axis=-1).astype(np.float32), None
    probabilities = softmax(logits) if mode == "single" else sigmoid(logits)
    activation: Activation = "softmax" if mode == "single" else "sigmoid"
    return _result(images, vectors, probabilities, logits, means, mode, activation, (1.0, "protocol"))


def _result(
    images: Embeddings,
    vectors: _PromptVectors,
    probabilities: NDArray[np.float64],
    logits: NDArray[np.float64],
    cosines: tuple[NDArray[np.float32], NDArray[np.float32] | None],
    mode: Mode,
    activation: Activation,
    scale: tuple[float, ScaleSource],
) -> ZeroShotResult:
    return ZeroShotResult(
        probabilities,
        logits,
        *cosines,
        vectors.prompts.names,
        images.ids,
        images.groups,
        mode,
        activation,
        images.space,
        *scale,
        None,
        vectors.prompts,
        images.paths,
    )
