"""An exploration to a page: how far the map can be trusted, whether clusters are there, what labels have to do with them.

Comes in: an :class:`~chiasm.evaluate.explore_scores.Exploration` and its run card. Goes out: a
:class:`~chiasm.evaluate.page.Page`, and the notes of the interactive map. Pictures and texts of rows are on it only where
the caller hands them over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import chiasm
from chiasm.errors import ChiasmError
from chiasm.evaluate.explore_figures import STATIC_POINTS, choice_of_k, labels_in_clusters, static_map
from chiasm.evaluate.explore_map import MapColumn
from chiasm.evaluate.explore_scores import Exploration
from chiasm.evaluate.page import Block, Figure, Gallery, KeyNumber, Note, Page, Picture, Section, Table, picture_source
from chiasm.evaluate.run_card import RunCard
from chiasm.metrics.clustering import MEANING, ClusterAgreement
from chiasm.tasks.cluster_structure import STABLE
from chiasm.tasks.clustering import Clustering
from chiasm.types import Interval

_METHODS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
_SHOWN_SCORES = ("ari", "ami", "nmi", "homogeneity", "completeness", "purity")


def explore_page(
    found: Exploration, card: RunCard, *, pictures: Sequence[str | None] | None = None, map_name: str = "map.html"
) -> Page:
    """Return the page.

    Args:
        found: The exploration.
        card: Its run card.
        pictures: Image paths of the clustered rows, where the user asked for thumbnails.
        map_name: Name of the interactive map beside the page.
    """
    rows, method = len(found.projection), _METHODS[found.projection.method]
    sections = [_map(found, map_name)]
    if found.clustering is not None:
        sections.append(_clusters(found, found.clustering))
        if found.agreement:
            sections.append(_agreement(found, found.clustering))
        if pictures is not None and found.clustering.count:
            sections.append(_medoids(found.clustering, pictures))
    return Page(
        title="Map and clusters of embeddings",
        subtitle=f"{rows:,} rows of {len(set(found.embeddings.groups)):,} patients in the space {found.projection.space}: "
        f"{method} map, {found.clustering.settings.name if found.clustering else 'no'} clusters. No label was used "
        "for either.",
        key_numbers=_key_numbers(found),
        sections=(*sections, card.section()),
        footer=(f"chiasm {chiasm.__version__}.", "Research and teaching only; not a medical device."),
    )


def map_notes(found: Exploration) -> list[Note]:
    """Return how the interactive map is to be read."""
    notes = [Note(found.projection.warning, "warning"), Note(found.projection.faith.note)]
    if found.projection.gap is not None:
        notes.append(Note(_sentence(found.projection.gap.note)))
    if found.clustering is not None:
        tone = "plain" if found.clustering.structure.found else "warning"
        notes.append(Note("Clusters: " + found.clustering.structure.verdict + ".", tone))
    return notes


def _key_numbers(found: Exploration) -> tuple[KeyNumber, ...]:
    faith = found.projection.faith
    numbers = [
        KeyNumber("trustworthiness of the map", faith.trustworthiness, f"{faith.n_neighbors} neighbours"),
        KeyNumber("continuity of the map", faith.continuity, f"{faith.n_neighbors} neighbours"),
    ]
    if found.clustering is not None:
        structure = found.clustering.structure
        if math.isfinite(structure.stability):
            stability = Interval(
                structure.stability, math.nan, math.nan, len(found.clustering), _finite(structure.null_stability)
            )
            numbers.append(KeyNumber("stability of clusters", stability, "ARI between draws of patients"))
        if math.isfinite(found.clustering.silhouette.value):
            numbers.append(KeyNumber("silhouette", found.clustering.silhouette, f"{found.clustering.count} clusters"))
    for name, agreement in list(found.agreement.items())[:1]:
        numbers.append(KeyNumber(f"agreement with {name}", agreement.scores["ari"], "adjusted Rand index"))
    return tuple(numbers)


def _map(found: Exploration, map_name: str) -> Section:
    projection = found.projection
    is_text = np.asarray([m == "text" for m in projection.modalities]) if found.other is not None else None
    sample = f" {STATIC_POINTS:,} random points." if len(projection) > STATIC_POINTS else ""
    first = [c for c in found.columns if c.name in found.agreement] or list(found.columns[-1:])
    shown = list(dict.fromkeys(c.name for c in (*found.columns[:1], *first[:1])))
    figures = tuple(
        Figure(
            static_map(projection.xy, column, is_text=is_text, seed=projection.seed),
            f"{_METHODS[projection.method]}, coloured by {column.name}"
            + (", triangles are texts" if is_text is not None else "")
            + f".{sample}",
        )
        for column in found.columns
        if column.name in shown
    )
    notes: list[Block] = [Note(projection.warning, "warning"), *figures, Note(projection.faith.note)]
    if projection.explained_variance is not None:
        a, b = projection.explained_variance
        notes.append(Note(f"The two axes hold {100 * a:.1f} % and {100 * b:.1f} % of the variance."))
    if projection.gap is not None:
        notes.append(Note(_sentence(projection.gap.note)))
    return Section(
        "Map",
        f"The interactive map, with every point, is {map_name} beside this page: colour, search, select, save.",
        tuple(notes),
    )


def _clusters(found: Exploration, clustering: Clustering) -> Section:
    structure = clustering.structure
    reduced = (
        f"{clustering.components} principal components ({100 * clustering.variance:.0f} % of the variance)"
        if clustering.components
        else "all dimensions"
    )
    blocks: list[Block] = [
        Note(structure.verdict[:1].upper() + structure.verdict[1:] + ".", "plain" if structure.found else "warning")
    ]
    if clustering.count:
        blocks.append(_table(found, clustering))
    if len(structure.candidates) > 1:
        blocks.append(
            Figure(
                choice_of_k(structure.candidates, structure.k),
                f"The rule for k: among the numbers with a stability of at least {STABLE} (all, where none has), the one "
                "whose silhouette leads most over that of structureless clouds.",
                wide=True,
            )
        )
    noise = f" {100 * clustering.noise:.0f} % of the rows are in none." if clustering.noise else ""
    blocks.append(
        Note(
            f"Stability {structure.stability:.2f} [{structure.stability_low:.2f}, {structure.stability_high:.2f}] over pairs "
            f"of {structure.resamples} draws of patients (structureless clouds: {_number(structure.null_stability)}); other "
            f"seeds on the same rows agree to {_number(structure.seed_stability)}. Structureless clouds: {structure.null_draws} "
            "normally distributed ones with the same mean and covariance, between and within patients. Judged on "
            f"{structure.judged_rows:,} rows."
        )
    )
    return Section(
        "Clusters",
        f"{clustering.settings.name} on {reduced} of unit vectors: {clustering.count} clusters.{noise}",
        tuple(blocks),
    )


def _table(found: Exploration, clustering: Clustering) -> Table:
    columns = [c for c in found.columns if c.name in found.agreement][:2]
    head = ["cluster", "rows", "patients", "largest patient", "found again"]
    head += [f"mostly ({c.name})" for c in columns]
    head += ["nearest terms"] if found.terms is not None else []
    rows = []
    for c, size in enumerate(clustering.sizes):
        cells: list[object] = [
            c + 1,
            f"{size:,}",
            f"{clustering.patients[c]:,}",
            f"{100 * clustering.largest_patient[c]:.0f} %",
            _number(clustering.structure.jaccard[c]),
        ]
        cells += [_commonest(column, clustering.clusters == c) for column in columns]
        if found.terms is not None:
            cells.append(", ".join(f"{text} (+{lead:.2f})" for text, lead in found.terms[c]))
        rows.append(tuple(cells))
    return Table(
        tuple(head),
        tuple(rows),
        "Largest patient: share of the cluster that one has. Found again: the largest Jaccard index with a cluster of other patients, the mean over draws; above 0.75 a cluster "
        "is stable, below 0.5 it is dissolved (Hennig 2008)."
        + (" Nearest terms: cosine with the cluster less cosine with all rows." if found.terms is not None else ""),
    )


def _agreement(found: Exploration, clustering: Clustering) -> Section:
    blocks: list[Block] = []
    rows: list[tuple[object, ...]] = []
    for name, agreement in found.agreement.items():
        rows += _score_rows(name, agreement, found.majority[name])
        if name in found.agreement_inside:
            rows += _score_rows(f"{name}, rows in a cluster", found.agreement_inside[name], None)
    blocks.append(
        Table(
            ("column", "score", "value [95 % by patient]", "chance", "97.5 % of chance", "one cluster for all"),
            tuple(rows),
            "Intervals: patients drawn anew, the clusters held as they are. Chance: the mean over labels dealt out anew"
            + (", to whole patients of as many rows. " if found.embeddings.patients else ". ")
            + " ".join(f"{s.upper()}: {MEANING[s]}." for s in ("ari", "ami", "nmi", "purity")),
        )
    )
    names = [f"cluster {c + 1}" for c in range(clustering.count)] + (["in none"] if clustering.noise else [])
    for column in [c for c in found.columns if c.name in found.agreement][:3]:
        blocks.append(
            Figure(
                labels_in_clusters(clustering.clusters, column, names=names),
                f"{column.name} in each cluster; rows with a label in brackets.",
                wide=True,
            )
        )
    return Section(
        "Agreement with labels",
        "The clusters never saw a label. Agreement says that the encoder arranges rows by it, disagreement that it arranges "
        "them by something else.",
        tuple(blocks),
    )


def _score_rows(name: str, agreement: ClusterAgreement, majority: float | None) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for place, score in enumerate(_SHOWN_SCORES):
        number = agreement.scores[score]
        trivial = {"purity": majority, "ari": 0.0, "ami": 0.0, "nmi": 0.0, "homogeneity": 0.0, "completeness": 1.0}[
            score
        ]
        heading = f"{name} ({agreement.classes} labels, {number.n:,} rows, p = {agreement.p_value:.3f})"
        rows.append(
            (
                heading if place == 0 else "",
                score,
                str(number),
                _number(number.chance),
                _number(agreement.null_high[score]),
                "–" if majority is None else _number(trivial),
            )
        )
    return rows


def _medoids(clustering: Clustering, paths: Sequence[str | None]) -> Section:
    from chiasm.datasets.images import open_image_path

    rows = []
    for c, central in enumerate(clustering.central):
        shown: list[Picture] = []
        for row in central:
            path = paths[row]
            if path is None or len(shown) == 6:
                continue
            try:
                image = open_image_path(Path(path)).convert("RGB")
            except (ChiasmError, OSError):
                continue
            image.thumbnail((160, 160))
            shown.append(Picture(picture_source(image), ("medoid",) if not shown else (), alt="image"))
        rows.append((f"cluster {c + 1}", tuple(shown)))
    return Section(
        "Central images",
        "The images with the smallest mean distance to their cluster, the medoid first.",
        (
            Note("These are pictures of patients. Keep this page where patient data may lie.", "warning"),
            Gallery(tuple(rows), size_px=118),
        ),
    )


def _commonest(column: MapColumn, mask: np.ndarray) -> str:
    codes = column.codes[: len(mask)][mask]
    codes = codes[codes >= 0]
    if not len(codes):
        return "–"
    counts = np.bincount(codes)
    best = int(counts.argmax())
    return f"{column.categories[best]} {100 * counts[best] / len(codes):.0f} %"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{round(value, digits) + 0.0:.{digits}f}"
