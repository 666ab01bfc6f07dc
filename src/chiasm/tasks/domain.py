"""Whether an image is of the kind that a model was made for: distance of its embedding to reference embeddings.

In: :class:`~chiasm.types.Embeddings` of reference images (chest films, say) and of validation images of other patients,
of the same kind and in the same space. Out: a :class:`DomainReference` that gives each new image a score and a verdict
("this is no chest film") in a frozen :class:`DomainResult`.

Notable choices: the threshold is the conformal quantile of the validation patients' scores, so a new image *of the
kind* is turned away with a chance of at most ``false_alarms`` (of a random image of a new patient; see
``tasks.conformal``). Nothing is promised about how many foreign images are caught: that needs foreign images, and
``metrics.classification.auroc`` of the scores. An image inside the domain may still be wrongly read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, LeakageError, SpaceMismatch, UnknownName
from chiasm.metrics.bootstrap import Clusters, Floats
from chiasm.tasks.conformal import patient_quantile
from chiasm.tasks.zero_shot import unit_vectors
from chiasm.types import Embeddings, Modality, Space, check_same_space

Method = Literal["mahalanobis", "knn"]
METHODS = ("mahalanobis", "knn")

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class DomainResult:
    """How far images lie from the reference, and which lie outside.

    Attributes:
        scores: float64 (rows,), larger is stranger; in the units of the method.
        p_values: float64 (rows,) in (0, 1]: chance that an image of the kind is at least as strange.
        outside: bool (rows,): the score lies above the threshold.
        threshold: Largest score inside; infinite where the validation patients are too few for ``false_alarms``.
        false_alarms: Share of images of the kind that may be turned away.
        method: ``mahalanobis`` or ``knn``.
        ids: One per row.
        groups: Patient (or id) of each row.
        space: Where the distances were measured.
    """

    scores: Floats
    p_values: Floats
    outside: NDArray[np.bool_]
    threshold: float
    false_alarms: float
    method: Method
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    space: Space

    def __len__(self) -> int:
        return len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values; an infinite threshold is None."""
        rows = zip(self.ids, self.scores.tolist(), self.p_values.tolist(), self.outside.tolist(), strict=True)
        return {
            "method": self.method,
            "space": self.space.to_dict(),
            "threshold": self.threshold if math.isfinite(self.threshold) else None,
            "false_alarms": self.false_alarms,
            "images": [{"id": i, "score": s, "p_value": p, "outside": o} for i, s, p, o in rows],
        }


@dataclass(frozen=True, eq=False)
class DomainReference:
    """Reference embeddings with a threshold; made by :func:`fit_domain`.

    Attributes:
        method: ``mahalanobis`` or ``knn``.
        space: Of the embeddings.
        modality: Of the embeddings.
        mean: (dim,) of the reference's unit vectors.
        basis: ``mahalanobis``: (dim, dim) that turns differences from the mean into ones of unit covariance; ``knn``: the
            reference's unit vectors (rows, dim).
        neighbours: Of ``knn``: the score is the distance to this one.
        validation_scores: (rows,) of the validation images, rising.
        validation_weights: The weight of each: rows of one patient share 1.
        threshold: As :class:`DomainResult`.
        false_alarms: As :class:`DomainResult`.
        patients: Reference patients, validation patients.
        shrinkage: Of ``mahalanobis``: how far the covariance was drawn to a multiple of the identity, 0 to 1.
    """

    method: Method
    space: Space
    modality: Modality
    mean: Floats
    basis: Floats
    neighbours: int
    validation_scores: Floats
    validation_weights: Floats
    threshold: float
    false_alarms: float
    patients: tuple[int, int]
    shrinkage: float = 0.0

    def score(self, embeddings: Embeddings) -> DomainResult:
        """Return score, p value and verdict of each row.

        Raises:
            SpaceMismatch: For embeddings of another space.
            InputError: For another modality, or vectors that are zero or not finite.
        """
        _check_kind(self.space, self.modality, embeddings)
        scores = _distances(self, embeddings)
        # The weight of validation rows that are at least as strange, with the row itself as one patient more.
        below = np.concatenate([[0.0], np.cumsum(self.validation_weights)])
        first = np.searchsorted(self.validation_scores, scores, side="left")
        p_values = np.clip((1 + below[-1] - below[first]) / (1 + below[-1]), 0.0, 1.0)
        return DomainResult(
            scores,
            p_values,
            scores > self.threshold,
            self.threshold,
            self.false_alarms,
            self.method,
            embeddings.ids,
            embeddings.groups,
            self.space,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the arrays as plain JSON values; an infinite threshold is None."""
        return {
            "method": self.method,
            "space": self.space.to_dict(),
            "modality": self.modality,
            "neighbours": self.neighbours,
            "threshold": self.threshold if math.isfinite(self.threshold) else None,
            "false_alarms": self.false_alarms,
            "patients": list(self.patients),
            "shrinkage": self.shrinkage,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], arrays: Mapping[str, Floats]) -> Self:
        """Rebuild from :meth:`to_dict` and the arrays ``mean``, ``basis``, ``validation_scores``, ``validation_weights``.

        Raises:
            InputError: When an array does not fit the others.
        """
        space = Space.from_dict(values["space"])
        threshold = math.inf if values["threshold"] is None else float(values["threshold"])
        mean, basis = arrays["mean"], arrays["basis"]
        if mean.shape != (space.dim,) or basis.ndim != 2 or space.dim not in basis.shape:
            raise InputError(f"the domain's arrays {mean.shape} and {basis.shape} do not fit {space.dim} dimensions")
        scores, weights, rows = arrays["validation_scores"], arrays["validation_weights"], len(basis)
        numbers = np.concatenate([mean, basis.ravel(), scores.ravel(), weights.ravel()])
        if values["method"] not in METHODS or math.isnan(threshold) or not np.isfinite(numbers).all():
            raise InputError("the domain is damaged: its method or its numbers are none", hint="save it anew")
        if scores.ndim != 1 or scores.shape != weights.shape or (np.diff(scores) < 0).any():
            raise InputError("the domain is damaged: its validation scores do not rise", hint="save it anew")
        if values["method"] == "knn" and not 1 <= int(values["neighbours"]) <= rows:
            raise InputError(f"the domain is damaged: it has no neighbour {values['neighbours']}", hint="save it anew")
        patients = values["patients"]
        return cls(values["method"], space, values["modality"], mean, basis, int(values["neighbours"]),
                   arrays["validation_scores"], arrays["validation_weights"], threshold, float(values["false_alarms"]),
                   (int(patients[0]), int(patients[1])), float(values["shrinkage"]))  # fmt: skip


def fit_domain(
    reference: Embeddings,
    validation: Embeddings,
    *,
    method: Method = "mahalanobis",
    false_alarms: float = 0.05,
    neighbours: int = 10,
) -> DomainReference:
    """Learn what the embeddings of one kind of image look like, and from where on a new one is foreign.

    Args:
        reference: Of images of the kind; raw or unit vectors, unit vectors are compared.
        validation: Of other patients' images of the kind, in the same space: they set the threshold.
        method: ``mahalanobis``: distance from the mean in units of the covariance, drawn to a multiple of the identity
            as far as Ledoit and Wolf say (one cloud; needs few rows). ``knn``: Euclidean distance of unit vectors,
            √(2 - 2 cosine), to the k-th nearest (any shape; keeps all reference vectors).
        false_alarms: Share of images of the kind that may be turned away, in (0, 1).
        neighbours: The k of ``knn``; at most the number of reference rows.

    Raises:
        SpaceMismatch: When the two come from two spaces.
        LeakageError: When a patient is on both sides: the threshold would be too tight.
        InputError: For two modalities, fewer than two reference rows, rows that are all alike, no validation row, damaged
            vectors, or a parameter out of its range.

    References:
        Lee et al., 2018, https://arxiv.org/abs/1807.03888 (Mahalanobis; here one class, last layer, shrunk
        covariance); Sun et al., 2022, https://arxiv.org/abs/2204.06507 (k-th nearest of unit vectors); Ledoit and
        Wolf, 2004, https://doi.org/10.1016/S0047-259X(03)00096-4, equal to scikit-learn's ``ledoit_wolf``.
    """
    if method not in METHODS:
        raise UnknownName("domain method", method, METHODS, hint=f"one of {', '.join(METHODS)}")
    if not 0 < false_alarms < 1:
        raise InputError(f"the share of false alarms must lie between 0 and 1, got {false_alarms}")
    space = check_same_space(reference, validation)
    _check_kind(space, reference.modality, validation)
    both = set(reference.groups) & set(validation.groups)
    if both:
        raise LeakageError(
            f"{len(both)} patients are in the reference and in the validation; the threshold would be too tight",
            hint="split by patient",
        )
    if len(reference) < 2 or len(validation) == 0:
        raise InputError(f"a domain needs two reference rows and a validation row, got {len(reference)} and "
                         f"{len(validation)}")  # fmt: skip
    if method == "knn" and not 1 <= neighbours <= len(reference):
        raise InputError(f"the neighbours must be 1 to the {len(reference)} reference rows, got {neighbours}")
    vectors = unit_vectors(reference, "reference").astype(np.float64)
    mean, basis, shrinkage = vectors.mean(axis=0), vectors, 0.0
    if method == "mahalanobis":
        basis, shrinkage = _whitening(vectors)
    patients = Clusters(reference.groups).count, Clusters(validation.groups).count
    nothing = np.zeros(0)
    made = DomainReference(method, space, reference.modality, mean, basis, neighbours, nothing, nothing,
                           math.inf, false_alarms, patients, shrinkage)  # fmt: skip
    scores = _distances(made, validation)
    patient = Clusters(validation.groups).of_row
    weights = 1.0 / np.bincount(patient)[patient]
    order = np.argsort(scores, kind="stable")
    threshold = patient_quantile(scores, patient, false_alarms)
    return dataclasses.replace(
        made, validation_scores=scores[order], validation_weights=weights[order], threshold=threshold
    )


def _whitening(vectors: Floats) -> tuple[Floats, float]:
    """Return the matrix that gives the rows unit (shrunk) covariance, and how far it was shrunk."""
    from sklearn.covariance import ledoit_wolf

    covariance, shrinkage = ledoit_wolf(vectors)
    values, directions = np.linalg.eigh(covariance)
    if values[-1] <= 1e-12:
        raise InputError("the reference embeddings are all alike; they have no spread to measure distances by")
    # Rows that span few directions leave some without spread; a floor keeps the distance finite there.
    floor = 1e-6 * values[-1]
    return directions / np.sqrt(np.maximum(values, floor)), float(shrinkage)


def _distances(domain: DomainReference, embeddings: Embeddings) -> Floats:
    """Return the score of each row; each row's score is its own, whatever other rows there are."""
    vectors = unit_vectors(embeddings, embeddings.modality).astype(np.float64)
    if domain.method == "mahalanobis":
        return np.asarray(np.linalg.norm((vectors - domain.mean) @ domain.basis, axis=1), dtype=np.float64)
    found = np.empty(len(vectors))
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        cosines = vectors[start : start + _ROWS_AT_ONCE] @ domain.basis.T
        nearest = np.partition(cosines, -domain.neighbours, axis=1)[:, -domain.neighbours]
        found[start : start + _ROWS_AT_ONCE] = np.sqrt(np.maximum(2 - 2 * nearest, 0.0))
    return found


def _check_kind(space: Space, modality: Modality, embeddings: Embeddings) -> None:
    if embeddings.space != space:
        raise SpaceMismatch(
            f"the reference comes from `{space}`, these embeddings from `{embeddings.space}`; distances have no meaning",
            hint="embed both with the same model",
        )
    if embeddings.modality != modality:
        raise InputError(f"the reference is of {modality} embeddings, got {embeddings.modality} embeddings")
