"""A map, clusters and what they have to do with labels: everything that ``chiasm explore`` finds, in one frozen value.

Comes in: embeddings of images, of texts, or of both. Goes out: an :class:`Exploration`. Labels colour the map and are
compared with the finished clusters; neither map nor clusters see them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chiasm.errors import InputError, missing_column
from chiasm.evaluate.explore_map import MapColumn, map_column
from chiasm.metrics.clustering import ClusterAgreement, cluster_agreement
from chiasm.progress import Progress
from chiasm.tasks.clustering import Clustering, ClusterSettings, cluster, nearest_texts
from chiasm.tasks.projection import Projection, project
from chiasm.types import Embeddings, LabelValue

#: Columns that are compared with clusters when none was named.
MOST_COMPARED = 6
#: Names that the table of points uses itself.
TAKEN = ("id", "modality", "x", "y", "cluster", "side", "text")
#: Above so many rows fewer resamples and permutations are drawn.
MANY_ROWS = 10_000


@dataclass(frozen=True)
class Exploration:
    """What was found.

    Attributes:
        projection: Places of all rows: of the clustered side, then of the other.
        embeddings: The clustered side: images, where there are some.
        other: The other side, or None.
        clustering: None when no clusters were asked for.
        agreement: Column to agreement of the clusters with it, rows in no cluster being one cluster more.
        agreement_inside: The same over the rows that are in a cluster; only where some are in none.
        majority: Column to the share of its commonest label: the purity of one cluster that holds everything.
        columns: What the map can be coloured by: clusters, then label columns.
        left_out: Columns that hold too many different values to colour by.
        terms: For each cluster its nearest texts with their lead, or None.
    """

    projection: Projection
    embeddings: Embeddings
    other: Embeddings | None
    clustering: Clustering | None
    agreement: Mapping[str, ClusterAgreement]
    agreement_inside: Mapping[str, ClusterAgreement]
    majority: Mapping[str, float]
    columns: tuple[MapColumn, ...]
    left_out: tuple[str, ...]
    terms: tuple[tuple[tuple[str, float], ...], ...] | None

    @property
    def cluster_names(self) -> tuple[str | None, ...]:
        """The cluster of each row of the map; None for rows that were not clustered, ``none`` for those in no cluster."""
        own: tuple[str | None, ...] = self.clustering.names if self.clustering else (None,) * len(self.embeddings)
        return own + (None,) * (len(self.projection) - len(own))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the rows as plain JSON values."""
        found = self.projection.to_dict()
        del found["points"]
        return {
            "projection": {**found, "warning": self.projection.warning},
            "clustering": None if self.clustering is None else self.clustering.to_dict(),
            "agreement": {k: {**v.to_dict(), "majority": self.majority[k]} for k, v in self.agreement.items()},
            "agreement_inside": {k: v.to_dict() for k, v in self.agreement_inside.items()},
            "columns": [c.name for c in self.columns],
            "left_out": list(self.left_out),
            "terms": None
            if self.terms is None
            else [[{"text": text, "lead": lead} for text, lead in rows] for rows in self.terms],
        }


def explore(
    embeddings: Embeddings,
    other: Embeddings | None = None,
    *,
    clusters: ClusterSettings | None = None,
    colour: Sequence[str] = (),
    terms: Embeddings | None = None,
    progress: Progress | None = None,
    **map_settings: Any,
) -> Exploration:
    """Return map, clusters and agreement.

    Args:
        embeddings: What is clustered and mapped.
        other: Rows of the other side, mapped with them but not clustered: between two modalities there is a gap, and
            clusters of both would be the modalities.
        clusters: None: no clusters.
        colour: Label columns; by default all that have few enough different values.
        terms: Texts to describe clusters by; of the same space.
        progress: Is told of the clustering.
        **map_settings: Of :func:`chiasm.tasks.projection.project`.

    Raises:
        InputError: A column is unknown or cannot be coloured by.
        SpaceMismatch: The sides come from two spaces.
    """
    columns, left_out = _columns(embeddings, other, colour)
    parts = [embeddings] if other is None else [embeddings, other]
    projection = project(parts, **map_settings)
    clustering = None if clusters is None else cluster(embeddings, clusters, progress=progress)
    agreement: dict[str, ClusterAgreement] = {}
    inside: dict[str, ClusterAgreement] = {}
    majority: dict[str, float] = {}
    if clustering is not None and clustering.count:
        columns = [_cluster_column(clustering, len(projection)), *columns]
        for column in [c for c in columns[1:] if colour or c.name != "split"][: len(colour) or MOST_COMPARED]:
            codes = column.codes[: len(embeddings)]
            if len(np.unique(codes[codes >= 0])) < 2:
                continue
            majority[column.name] = float(np.bincount(codes[codes >= 0]).max() / (codes >= 0).sum())
            agreement[column.name] = _agreement(clustering, codes, embeddings, clustering.settings.seed)
            within = clustering.clusters >= 0
            if not within.all() and len(np.unique(codes[within & (codes >= 0)])) > 1:
                inside[column.name] = _agreement(
                    clustering, np.where(within, codes, -1), embeddings, clustering.settings.seed
                )
    if other is not None:
        columns.append(_side_column(projection.modalities))
    if not columns:
        columns = [MapColumn("all", ("all rows",), np.zeros(len(projection), dtype=np.int16))]
    described = None
    if terms is not None and clustering is not None and clustering.count:
        names = terms.texts or terms.ids
        found = nearest_texts(clustering, embeddings, terms)
        described = tuple(tuple((str(names[row]), lead) for row, lead in rows) for rows in found)
    return Exploration(
        projection, embeddings, other, clustering, agreement, inside, majority, tuple(columns), left_out, described
    )


def _agreement(clustering: Clustering, codes: Any, embeddings: Embeddings, seed: int) -> ClusterAgreement:
    many = len(embeddings) > MANY_ROWS
    return cluster_agreement(
        clustering.clusters,
        [None if c < 0 else int(c) for c in codes],
        groups=embeddings.groups,
        n_resamples=100 if many else 400,
        permutations=50 if many else 200,
        seed=seed,
    )


def _columns(
    embeddings: Embeddings, other: Embeddings | None, colour: Sequence[str]
) -> tuple[list[MapColumn], tuple[str, ...]]:
    known = {name: _values(embeddings, other, name) for name in embeddings.labels}
    for name in colour:
        if name not in known:
            raise missing_column(name, known, of="there is")
    found: list[MapColumn] = []
    left_out: list[str] = []
    for name in dict.fromkeys(colour or known):
        column = map_column(f"{name} (label)" if name in TAKEN else name, known[name])
        if column is not None:
            found.append(column)
            continue
        if colour:
            raise InputError(
                f"column `{name}` holds too many different texts to colour by",
                hint="name a column of classes or numbers",
            )
        left_out.append(name)
    return found, tuple(left_out)


def _values(embeddings: Embeddings, other: Embeddings | None, name: str) -> tuple[LabelValue, ...]:
    own = tuple(embeddings.labels[name])
    if other is None:
        return own
    return own + (tuple(other.labels[name]) if name in other.labels else (None,) * len(other))


def _cluster_column(clustering: Clustering, rows: int) -> MapColumn:
    codes = np.full(rows, -1, dtype=np.int16)
    codes[: len(clustering)] = clustering.clusters
    return MapColumn(
        "cluster",
        tuple(f"cluster {c + 1}" for c in range(clustering.count)),
        codes,
        missing="no cluster" if rows == len(clustering) else "not clustered",
    )


def _side_column(sides: Sequence[str]) -> MapColumn:
    return MapColumn("side", ("image", "text"), np.asarray([int(s == "text") for s in sides], dtype=np.int16))
