"""Classifiers from a few labelled images, as scikit-learn estimators on embeddings: linear probe, prototypes, zero-shot.

In: image :class:`~chiasm.types.Embeddings` (or an array of vectors), a class and a patient for each row. Out: estimators
with ``fit(images, labels, groups)``, ``predict``, ``predict_proba``, ``get_params``; adapters that need texts are in
``text_adapters``, learning curves in ``k_shot``.

Notable choices. Vectors get unit norm first. Every class weighs alike, however many rows it has. What a method has to
choose (C, α, β, a step) is chosen on the rows of *validation patients*: those that are given, or a quarter of the
training patients, after which the method is fitted again on all rows with what was chosen. The choice takes the highest
balanced accuracy, ties the lowest log loss (every class alike), further ties the stronger regularisation. No method ever
sees a test row: a patient who is on both sides raises :class:`~chiasm.errors.LeakageError`.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from chiasm.data.splits import split_by_group
from chiasm.errors import InputError, LeakageError, SpaceMismatch
from chiasm.metrics.labels import is_missing
from chiasm.tasks.zero_shot import (
    FALLBACK_LOGIT_SCALE,
    TextClassifier,
    check_images,
    choose_logit_scale,
    softmax,
    unit_vectors,
)
from chiasm.types import Embeddings, Space

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
Groups = Sequence[Hashable] | NDArray[np.generic]

#: Share of the training patients that a choice is made on where no validation rows are given.
INNER_SHARE = 0.25
#: Inverse strengths of a linear probe on unit vectors, weak ones last.
DEFAULT_CS = tuple(10.0**e for e in (-2, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5))


@dataclass(frozen=True)
class ValidationRows:
    """Rows of validation patients, on which hyper-parameters are chosen.

    Attributes:
        images: Embeddings, or vectors of shape (rows, dim).
        labels: Class of each row.
        groups: Patient of each row; None: the patients of the embeddings, or each row its own.
    """

    images: Embeddings | ArrayLike
    labels: Sequence[Any] | NDArray[Any]
    groups: Groups | None = None


class FewShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What the methods share; use a subclass.

    Attributes:
        classes_: The classes, sorted; columns of probabilities stand in this order.
        chosen_: Name -> value of what was chosen on validation rows, or given.
        validated_on_: How many rows the choice was made on; 0 where nothing was to be chosen.
        space_: Of the training embeddings; None for plain arrays.
    """

    needs_texts: ClassVar[bool] = False
    classes_: NDArray[Any]
    chosen_: dict[str, Any]
    validated_on_: int
    space_: Space | None

    def fit(
        self,
        images: Embeddings | ArrayLike,
        labels: Sequence[Any] | NDArray[Any],
        groups: Groups | None = None,
        *,
        validation: ValidationRows | None = None,
    ) -> Self:
        """Choose on validation patients, then fit.

        Args:
            images: Embeddings of images, or vectors of shape (n, dim); raw or of unit norm.
            labels: (n,) class of each row, none missing.
            groups: (n,) patient of each row; None: the patients of the embeddings, or each row its own.
            validation: Rows of other patients to choose on. None: a quarter of the training patients is held back for
                the choice, then the method is fitted on all rows.

        Raises:
            InputError: Shapes do not fit, a label is missing, there is one class only, or too few patients to choose.
            LeakageError: A patient is on both sides.
            SpaceMismatch: Embeddings of two spaces, or texts of another.
        """
        self.space_ = images.space if isinstance(images, Embeddings) else None
        x, patients = self._vectors(images), _patients_of(images, groups)
        y = self._learn_classes(labels, len(x))
        if len(patients) != len(x):
            raise InputError(f"there are {len(patients)} groups for {len(x)} rows")
        self._prepare(x)
        self.validated_on_ = 0
        if not self._open_choices():
            self.chosen_ = self._given()
        elif validation is not None:
            x_held, held_patients = self._vectors(validation.images), _patients_of(validation.images, validation.groups)
            refuse_shared_patients({"training": patients, "validation": held_patients})
            y_held = self._codes(validation.labels, len(x_held))
            self.validated_on_ = len(x_held)
            self.chosen_ = self._search(x, y, x_held, y_held)
        else:
            held = _held_back(patients, y, getattr(self, "seed", 0))
            self.validated_on_ = int(held.sum())
            self.chosen_ = self._search(x[~held], y[~held], x[held], y[held])
        self._fit_with(x, y, self.chosen_)
        self.n_features_in_ = x.shape[1]
        return self

    def logits(self, images: Embeddings | ArrayLike) -> Floats:
        """Return what the softmax is taken of, float64 of shape (n, classes); the fitted space is required."""
        if not hasattr(self, "n_features_in_"):
            raise InputError(f"this {type(self).__name__} is not fitted", hint="call `fit` first")
        x = self._vectors(images)
        if x.shape[1] != self.n_features_in_:
            raise InputError(f"vectors have {x.shape[1]} dimensions, the method was fitted on {self.n_features_in_}")
        return self._logits(x)

    def predict_proba(self, images: Embeddings | ArrayLike) -> Floats:
        """Return probabilities, shape (n, classes), rows adding up to 1; they are not calibrated."""
        return softmax(self.logits(images))

    def predict(self, images: Embeddings | ArrayLike) -> NDArray[Any]:
        """Return the most probable class of each row (ties: the first)."""
        best = self.logits(images).argmax(axis=1)
        predicted: NDArray[Any] = self.classes_[best]
        return predicted

    @abstractmethod
    def _fit_with(self, x: Floats, y: Codes, chosen: dict[str, Any]) -> None:
        """Fit on unit vectors and class numbers with hyper-parameters that are settled."""

    @abstractmethod
    def _logits(self, x: Floats) -> Floats:
        """Return the logits of unit vectors."""

    def _open_choices(self) -> bool:
        """Return whether something is to be chosen on validation rows."""
        return False

    def _given(self) -> dict[str, Any]:
        """Return the hyper-parameters where nothing is to be chosen."""
        return {}

    def _search(self, x: Floats, y: Codes, x_held: Floats, y_held: Codes) -> dict[str, Any]:
        """Return the hyper-parameters that do best on held-back rows."""
        return self._given()

    def _prepare(self, x: Floats) -> None:
        """Check what else the method needs, once the classes are known."""

    def _vectors(self, images: Embeddings | ArrayLike) -> Floats:
        if isinstance(images, Embeddings):
            if self.space_ is not None and images.space != self.space_:
                raise SpaceMismatch(
                    f"rows come from two spaces, `{self.space_}` and `{images.space}`",
                    hint="embed all rows with the same model",
                )
            if images.modality != "image":
                raise InputError(f"few-shot classification needs image embeddings, got {images.modality} embeddings")
            return unit_vectors(images, "image").astype(np.float64)
        x = np.asarray(images, dtype=np.float64)
        if x.ndim != 2 or not len(x):
            raise InputError(f"vectors must have shape (rows, dim), got {x.shape}")
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms < 1e-12).any():
            raise InputError("a vector is not finite or all zero, so it has no direction")
        unit: Floats = x / norms
        return unit

    def _learn_classes(self, labels: Sequence[Any] | NDArray[Any], n: int) -> Codes:
        given = _labels(labels, n)
        try:
            self.classes_, codes = np.unique(given, return_inverse=True)
        except TypeError as error:
            raise InputError("labels mix numbers and text", hint="use one kind") from error
        if len(self.classes_) < 2:
            raise InputError("all training rows are of one class; a classifier needs two")
        return codes.astype(np.int64)

    def _codes(self, labels: Sequence[Any] | NDArray[Any], n: int) -> Codes:
        number = {c: i for i, c in enumerate(self.classes_.tolist())}
        codes = np.array([number.get(v, -1) for v in _labels(labels, n).tolist()], dtype=np.int64)
        if (codes < 0).any():
            raise InputError(f"{int((codes < 0).sum())} validation rows are of a class that no training row has")
        return codes


class LinearProbe(FewShotClassifier):
    """Logistic regression on unit vectors (Radford et al. 2021, section 3.2), with a sweep of C on validation patients.

    Equal to ``sklearn.linear_model.LogisticRegression(C=C, class_weight="balanced")`` on the unit vectors, at the chosen
    C and up to ``tol``. Where there are fewer rows than dimensions the fit happens in the span of the rows, which leaves
    an L2-penalised solution as it is and is much faster.

    Args:
        C: Inverse strength of the L2 penalty; None: chosen from ``Cs``.
        Cs: The sweep. (The paper sweeps 96 values from 1e-6 to 1e6 on vectors of their own length.)
        max_iter: Of L-BFGS; ``converged_`` tells whether it was enough.
        tol: Of L-BFGS: largest gradient.
        seed: Of the patients that are held back where no validation rows are given.
    """

    def __init__(
        self,
        C: float | None = None,  # scikit-learn's name
        *,
        Cs: Iterable[float] = DEFAULT_CS,
        max_iter: int = 2000,
        tol: float = 1e-4,
        seed: int = 0,
    ) -> None:
        self.C = C
        self.Cs = Cs
        self.max_iter = max_iter
        self.tol = tol
        self.seed = seed

    def _open_choices(self) -> bool:
        return self.C is None

    def _given(self) -> dict[str, Any]:
        return {"C": self.C}

    def _search(self, x: Floats, y: Codes, x_held: Floats, y_held: Codes) -> dict[str, Any]:
        basis = _span(x)
        z, z_held = (x, x_held) if basis is None else (x @ basis, x_held @ basis)
        cs = sorted(float(c) for c in self.Cs)
        if not cs or cs[0] <= 0:
            raise InputError("the values of C must be positive", hint="Cs=(0.1, 1, 10)")
        model = self._model(cs[0], warm_start=True)
        found = []
        for c in cs:  # from strong to weak: each solution starts the next
            model.set_params(C=c)
            _fit_quietly(model, z, y)
            found.append(quality(_affine(z_held, model, len(self.classes_)), y_held))
        return {"C": cs[best_of(found)]}

    def _fit_with(self, x: Floats, y: Codes, chosen: dict[str, Any]) -> None:
        basis = _span(x)
        model = self._model(chosen["C"])
        self.converged_ = _fit_quietly(model, x if basis is None else x @ basis, y)
        coef = model.coef_ if basis is None else model.coef_ @ basis.T
        self.coef_, self.intercept_ = coef, model.intercept_

    def _logits(self, x: Floats) -> Floats:
        return _affine(x, self, len(self.classes_))

    def _model(self, c: float, *, warm_start: bool = False) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(
            C=c, class_weight="balanced", max_iter=self.max_iter, tol=self.tol, warm_start=warm_start
        )


class Prototypes(FewShotClassifier):
    """The class whose mean direction is nearest by cosine; nothing is chosen, so no validation row is needed.

    With ``center`` the mean of the class means is taken off all vectors first, which then get unit norm again (CL2N of
    Wang et al. 2019, SimpleShot, https://arxiv.org/abs/1911.04623; their mean is that of base classes, ours of the
    shots): worth trying for backbones whose vectors all point one way.

    Args:
        center: See above.
        scale: Multiplier of cosines before the softmax; it changes probabilities, not classes.
    """

    def __init__(self, *, center: bool = False, scale: float = FALLBACK_LOGIT_SCALE) -> None:
        self.center = center
        self.scale = scale

    def _fit_with(self, x: Floats, y: Codes, chosen: dict[str, Any]) -> None:
        means = class_means(x, y, len(self.classes_))
        self.mean_ = means.mean(axis=0) if self.center else np.zeros(x.shape[1])
        if self.center:
            means = class_means(_unit(x - self.mean_), y, len(self.classes_))
        self.prototypes_ = _unit(means)

    def _logits(self, x: Floats) -> Floats:
        logits: Floats = self.scale * (_unit(x - self.mean_) @ self.prototypes_.T)
        return logits


class ZeroShotReference(FewShotClassifier):
    """Classification by the texts alone, beside the methods that also learn: ``fit`` reads nothing but the classes.

    Args:
        texts: From :func:`chiasm.tasks.zero_shot.build_classifier`; its labels are the classes.
        logit_scale: Multiplier of the cosines; None: the model's.
    """

    needs_texts = True

    def __init__(self, texts: TextClassifier, *, logit_scale: float | None = None) -> None:
        self.texts = texts
        self.logit_scale = logit_scale

    def _vectors(self, images: Embeddings | ArrayLike) -> Floats:
        if isinstance(images, Embeddings):
            check_images(images, self.texts.space)
        x = super()._vectors(images)
        if x.shape[1] != self.texts.space.dim:
            raise InputError(f"vectors have {x.shape[1]} dimensions, the texts {self.texts.space.dim}")
        return x

    def _prepare(self, x: Floats) -> None:
        self.text_vectors_ = text_rows(self.texts, self.classes_.tolist())
        self.scale_, _ = choose_logit_scale(None, self.texts.logit_scale, self.logit_scale)

    def _fit_with(self, x: Floats, y: Codes, chosen: dict[str, Any]) -> None:
        pass

    def _logits(self, x: Floats) -> Floats:
        logits: Floats = self.scale_ * (x @ self.text_vectors_.T)
        return logits


def text_rows(texts: TextClassifier, classes: Sequence[Any]) -> Floats:
    """Return the text direction of each class, shape (classes, dim), in the order of the classes.

    Raises:
        InputError: A class has no texts, or a text's class has no rows.
    """
    row = {name.strip().lower(): i for i, name in enumerate(texts.labels)}
    wanted = [str(c).strip().lower() for c in classes]
    if sorted(row) != sorted(wanted):
        missing, extra = len(set(wanted) - set(row)), len(set(row) - set(wanted))
        raise InputError(
            f"texts and classes differ: {missing} classes have no text, {extra} labels of the texts are no class",
            hint="name the labels of the prompts as the label column does",
        )
    return texts.positive[[row[c] for c in wanted]].astype(np.float64)


def quality(logits: Floats, truth: Codes) -> tuple[float, float]:
    """Return balanced accuracy and minus the log loss, every class that occurs weighing alike: larger is better."""
    losses = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    losses = losses - logits[np.arange(len(truth)), truth]
    right = logits.argmax(axis=1) == truth
    present = np.unique(truth)
    recall = float(np.mean([right[truth == c].mean() for c in present]))
    return round(recall, 9), -float(np.mean([losses[truth == c].mean() for c in present]))


def best_of(qualities: Sequence[tuple[float, float]]) -> int:
    """Return the place of the best quality; the first of equals."""
    return max(range(len(qualities)), key=lambda i: (*qualities[i], -i))


def class_weights(y: Codes, n_classes: int) -> Floats:
    """Return a weight for each row, so that every class weighs alike and the weights add up to 1."""
    counts = np.bincount(y, minlength=n_classes)
    weights: Floats = 1.0 / (n_classes * counts[y])
    return weights


def class_means(x: Floats, y: Codes, n_classes: int) -> Floats:
    """Return the mean vector of each class, shape (classes, dim)."""
    return np.stack([x[y == c].mean(axis=0) for c in range(n_classes)])


def refuse_shared_patients(parts: dict[str, Sequence[str]]) -> None:
    """Raise when a patient lies in two parts.

    Raises:
        LeakageError: With the number of shared patients and the parts' names, never an id.
    """
    names = list(parts)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = len(set(parts[one]) & set(parts[other]))
            if shared:
                raise LeakageError(
                    f"{shared} patients are in both {one} and {other}", hint="split by patient, never by image"
                )


def _labels(labels: Sequence[Any] | NDArray[Any], n: int) -> NDArray[Any]:
    plain = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    if len(plain) != n:
        raise InputError(f"there are {len(plain)} labels for {n} rows")
    missing = sum(is_missing(v) for v in plain)
    if missing:
        raise InputError(f"{missing} of {n} rows have no label", hint="leave out rows without a label")
    return np.array(plain, dtype=None if len({type(v) for v in plain}) == 1 else object)


def _patients_of(images: Embeddings | ArrayLike, groups: Groups | None) -> list[str]:
    if groups is not None:
        return [str(g) for g in groups]
    if isinstance(images, Embeddings):
        return list(images.groups)
    return [f"row {i} of {id(images)}" for i in range(len(np.asarray(images)))]


def _held_back(patients: Sequence[str], y: Codes, seed: int) -> NDArray[np.bool_]:
    """Return which rows are held back for a choice: a quarter of the patients, with each class on both sides."""
    classes = np.unique(y)
    parts = None
    if len(set(patients)) >= 2 * len(classes):
        names = split_by_group(
            patients, {"fit": 1 - INNER_SHARE, "choose": INNER_SHARE}, seed=seed, stratify=[int(c) for c in y]
        )
        parts = np.array([name == "choose" for name in names])
    if parts is None or any(set(y[parts == side]) != set(classes) for side in (True, False)):
        raise InputError(
            f"{len(set(patients))} patients are too few to hold some of every class back for a choice",
            hint="give `validation=` rows of other patients, or fix the hyper-parameters",
        )
    return parts


def _span(x: Floats) -> Floats | None:
    """Return an orthonormal basis of the rows' span, shape (dim, n), or None where it would save nothing."""
    return None if 2 * len(x) > x.shape[1] else np.linalg.qr(x.T)[0]


def _unit(x: Floats) -> Floats:
    unit: Floats = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit


def _affine(x: Floats, model: Any, n_classes: int) -> Floats:
    """Return the logits of a logistic regression; scikit-learn's one column of two classes is the log-odds."""
    found = x @ model.coef_.T + model.intercept_
    logits: Floats = np.concatenate([-found / 2, found / 2], axis=1) if n_classes == 2 else found
    return logits


def _fit_quietly(model: Any, x: Floats, y: Codes) -> bool:
    """Fit and return whether the optimiser converged."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.fit(x, y)
    for one in said:
        if not issubclass(one.category, ConvergenceWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return not any(issubclass(one.category, ConvergenceWarning) for one in said)
