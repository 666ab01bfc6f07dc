"""Classify from several modalities, of which some may be missing: each alone, joined early, joined late.

Comes in: :class:`~chiasm.tasks.modalities.Modalities`, a class and a patient per row. Goes out: estimators after
scikit-learn's contract, and :func:`compare_fusion`, out-of-fold probabilities of all of them on the same rows.

* **Alone** (:class:`SingleModality`): a logistic regression on one modality; a row without it gets the training rows'
  class shares.
* **Early** (:class:`EarlyFusion`): every modality is standardised and reduced by itself, weighed alike (divided by the
  root of its numbers, so that 512 image numbers do not drown 3 clinical ones), and one logistic regression reads them
  side by side. A missing modality is its training mean (zeros) and a number that says "missing".
* **Late** (:class:`LateFusion`): a classifier a modality; their log probabilities are averaged with weights that were
  fitted on out-of-fold predictions of training patients (log loss; the softmax of free numbers, so no weight is
  negative). A missing modality's weight goes to those that are there.

Means, components, penalties and weights are learned from training rows only, in folds by patient. Baltrušaitis et al.,
"Multimodal Machine Learning: A Survey and Taxonomy" (2019), section 6.1, names the kinds; the weighting is ours.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.progress import Progress, SilentProgress
from chiasm.tasks.modalities import Matrix, Modalities, missing_rows

Groups = Sequence[Hashable] | NDArray[np.generic]
Classes = Sequence[Any] | NDArray[Any]
Indices = NDArray[np.int64]

#: Values of C, the inverse penalty, that are tried; a block's row has a norm of about 1.
PENALTIES = (0.1, 1.0, 10.0, 100.0)
#: Folds within training rows that choose the penalty and the weights.
INNER_FOLDS = 3
_LEAST_PROBABILITY = 1e-6
#: From this side on, leading components are found without the others (Halko et al. 2011); 7 times as fast at 1,000 × 3,000.
LARGE_BLOCK = 200


class BlockScaler:
    """One modality made ready: missing cells filled, standardised, reduced, weighed, with a mark where it is missing.

    Args:
        components: Most numbers that are kept (principal components of the training rows); narrower blocks stay as
            they are.
    """

    def __init__(self, components: int = 32) -> None:
        self.components = components

    def fit(self, block: Matrix) -> Self:
        """Learn means, deviations and components from the rows that have the modality.

        Raises:
            InputError: No row has it.
        """
        from sklearn.decomposition import PCA

        here = block[~missing_rows(block)]
        if not len(here):
            raise InputError("no training row has this modality", hint="leave the modality out")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a column that is missing everywhere
            mean = np.nanmean(here, axis=0)
        self.mean_ = np.where(np.isnan(mean), 0.0, mean)
        spread = np.where(np.isnan(here), 0.0, here - self.mean_).std(axis=0)
        self.scale_ = np.where(spread > 1e-12, spread, 1.0)
        self.pca_ = None
        width = min(self.components, len(here) - 1)
        if 1 <= width < block.shape[1]:
            solver = "randomized" if min(here.shape) > LARGE_BLOCK else "full"
            self.pca_ = PCA(width, svd_solver=solver, random_state=0).fit(self._filled(here))
        self.width_ = block.shape[1] if self.pca_ is None else width
        return self

    def transform(self, block: Matrix) -> Matrix:
        """Return (n, width + 1): the numbers divided by the root of their width, then 1 where the row lacks them."""
        missing = missing_rows(block)
        values = self._filled(block)
        if self.pca_ is not None:
            first = max(float(np.sqrt(self.pca_.explained_variance_[0])), 1e-12)
            values = self.pca_.transform(values) / first
        values = np.where(missing[:, None], 0.0, values) / np.sqrt(self.width_)
        return np.column_stack([values, missing.astype(np.float64)])

    def _filled(self, block: Matrix) -> Matrix:
        scaled: Matrix = np.where(np.isnan(block), 0.0, (block - self.mean_) / self.scale_)
        return scaled


class _FusionClassifier(ABC):
    """What the three have in common: parameters, classes, checks, decisions."""

    def __init__(self, *, components: int = 32, penalties: Sequence[float] = PENALTIES, seed: int = 0) -> None:
        self.components = components
        self.penalties = tuple(penalties)
        self.seed = seed

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters, as scikit-learn does."""
        return {"components": self.components, "penalties": self.penalties, "seed": self.seed}

    def set_params(self, **params: Any) -> Self:
        """Set parameters by name."""
        for name, value in params.items():
            if name not in self.get_params():
                raise InputError(f"unknown parameter `{name}`", hint=f"known: {', '.join(self.get_params())}")
            setattr(self, name, value)
        return self

    def fit(self, rows: Modalities, classes: Classes, groups: Groups | None = None) -> Self:
        """Learn from labelled rows.

        Args:
            rows: Training rows.
            classes: The class of each row, at least two different ones.
            groups: The patient of each row, whom folds keep together; None: every row is its own.

        Raises:
            InputError: Lengths that differ, one class only, or a modality that no row has.
        """
        if len(classes) != len(rows):
            raise InputError(f"{len(classes)} classes for {len(rows)} rows")
        self.classes_, numbers = np.unique(np.asarray([str(c) for c in classes]), return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError("all training rows have one class", hint="a classifier needs two")
        self.prior_ = np.bincount(numbers, minlength=len(self.classes_)) / len(numbers)
        self.modalities_ = rows.names
        given = list(range(len(rows))) if groups is None else list(groups)
        if len(given) != len(rows):
            raise InputError(f"{len(given)} groups for {len(rows)} rows")
        self._fit(rows, numbers.astype(np.int64), [str(g) for g in given])
        return self

    def predict_proba(self, rows: Modalities) -> Matrix:
        """Return (n, classes) probabilities in the order of ``classes_``.

        Raises:
            InputError: Other modalities than in training.
        """
        if rows.names != self.modalities_:
            raise InputError(f"trained on {', '.join(self.modalities_)}, got {', '.join(rows.names)}")
        return self._probabilities(rows)

    def predict(self, rows: Modalities) -> NDArray[np.str_]:
        """Return the class whose probability is highest beside its share in training (the decision that balanced
        accuracy asks for)."""
        chosen: NDArray[np.str_] = self.classes_[np.argmax(self.predict_proba(rows) / self.prior_, axis=1)]
        return chosen

    @abstractmethod
    def _fit(self, rows: Modalities, numbers: Indices, groups: Sequence[str]) -> None:
        """Learn from rows whose classes are numbers."""

    @abstractmethod
    def _probabilities(self, rows: Modalities) -> Matrix:
        """Return probabilities of rows with the modalities of training."""


class EarlyFusion(_FusionClassifier):
    """One logistic regression on all modalities side by side; see the head of this module.

    Args:
        components: Numbers kept of each modality.
        penalties: Values of C that are tried in folds by patient; the least log loss wins.
        seed: Of the folds.
    """

    def _fit(self, rows: Modalities, numbers: Indices, groups: Sequence[str]) -> None:
        folds = grouped_folds(numbers, groups, INNER_FOLDS, self.seed)
        losses = np.zeros(len(self.penalties))
        for train, test in folds:
            scalers = self._scalers(rows.select(train))
            inside, outside = _joined(rows.select(train), scalers), _joined(rows.select(test), scalers)
            for k, penalty in enumerate(self.penalties):
                model = _logistic(inside, numbers[train], penalty)
                found = _full(model, outside, len(self.classes_))
                losses[k] += float(-np.log(found[np.arange(len(test)), numbers[test]]).sum())
        self.penalty_ = self.penalties[int(np.argmin(losses))] if folds else 1.0
        self.scalers_ = self._scalers(rows)
        self.model_ = _logistic(_joined(rows, self.scalers_), numbers, self.penalty_)

    def _scalers(self, rows: Modalities) -> dict[str, BlockScaler]:
        return {n: BlockScaler(self.components).fit(b) for n, b in rows.blocks.items() if rows.present(n).any()}

    def _probabilities(self, rows: Modalities) -> Matrix:
        return _full(self.model_, _joined(rows, self.scalers_), len(self.classes_))


class SingleModality(_FusionClassifier):
    """A logistic regression on one modality.

    Args:
        modality: Its name.
        **settings: As :class:`EarlyFusion`.
    """

    def __init__(self, modality: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.modality = modality

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters, as scikit-learn does."""
        return {"modality": self.modality, **super().get_params(deep)}

    def _fit(self, rows: Modalities, numbers: Indices, groups: Sequence[str]) -> None:
        if self.modality not in rows.names:
            raise InputError(f"there is no modality `{self.modality}`", hint=f"there are: {', '.join(rows.names)}")
        here = np.flatnonzero(rows.present(self.modality))
        self.model_: EarlyFusion | None = None
        if len(np.unique(numbers[here])) == len(self.classes_):
            settings = {k: v for k, v in self.get_params().items() if k != "modality"}
            one, patients = rows.only(self.modality).select(here), [groups[int(i)] for i in here]
            self.model_ = EarlyFusion(**settings).fit(one, self.classes_[numbers[here]], patients)

    def _probabilities(self, rows: Modalities) -> Matrix:
        found = np.tile(self.prior_, (len(rows), 1))
        here = np.flatnonzero(rows.present(self.modality))
        if self.model_ is not None and len(here):
            found[here] = self.model_.predict_proba(rows.only(self.modality).select(here))
        return found


class LateFusion(_FusionClassifier):
    """A classifier per modality and a weighted mean of their log probabilities; see the head of this module.

    Args:
        weights: ``fitted`` on out-of-fold predictions, or ``equal``.
        **settings: As :class:`EarlyFusion`.
    """

    def __init__(self, *, weights: str = "fitted", **settings: Any) -> None:
        super().__init__(**settings)
        if weights not in ("fitted", "equal"):
            raise InputError(f"weights must be fitted or equal, got `{weights}`")
        self.weights = weights

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters, as scikit-learn does."""
        return {"weights": self.weights, **super().get_params(deep)}

    def _fit(self, rows: Modalities, numbers: Indices, groups: Sequence[str]) -> None:
        settings = {k: v for k, v in self.get_params().items() if k != "weights"}
        named = self.classes_[numbers]
        self.models_ = {n: SingleModality(n, **settings).fit(rows, named, groups) for n in rows.names}
        equal = np.full(len(rows.names), 1 / len(rows.names))
        self.weights_ = dict(zip(rows.names, equal.tolist(), strict=True))
        if self.weights == "fitted" and len(rows.names) > 1:
            logs, rows_used = self._out_of_fold(rows, numbers, groups, settings)
            fitted = _fit_weights(logs, _presence(rows)[rows_used], numbers[rows_used], np.log(self.prior_))
            self.weights_ = dict(zip(rows.names, fitted.tolist(), strict=True))

    def _out_of_fold(
        self, rows: Modalities, numbers: Indices, groups: Sequence[str], settings: Mapping[str, Any]
    ) -> tuple[NDArray[np.float64], Indices]:
        """Return log probabilities (modalities, n, classes) that each row's own patient did not shape."""
        logs = np.zeros((len(rows.names), len(rows), len(self.classes_)))
        used: list[Indices] = []
        for train, test in grouped_folds(numbers, groups, INNER_FOLDS, self.seed + 1):
            for m, name in enumerate(rows.names):
                model = SingleModality(name, **settings)
                model.fit(rows.select(train), self.classes_[numbers[train]], [groups[i] for i in train])
                logs[m, test] = np.log(np.maximum(model.predict_proba(rows.select(test)), _LEAST_PROBABILITY))
            used.append(test)
        index = np.concatenate(used) if used else np.arange(0)
        return logs[:, index], index

    def _probabilities(self, rows: Modalities) -> Matrix:
        found = [self.models_[n].predict_proba(rows) for n in rows.names]
        logs = np.log(np.maximum(np.stack(found), _LEAST_PROBABILITY))
        weights = np.array([self.weights_[n] for n in rows.names])
        return _mixed(logs, _presence(rows), weights, np.log(self.prior_))


def grouped_folds(numbers: Indices, groups: Sequence[str], k: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Return up to ``k`` pairs of training and test rows, patients whole, classes spread (scikit-learn's
    ``StratifiedGroupKFold``); a fold whose training rows lack a class is left out."""
    from sklearn.model_selection import StratifiedGroupKFold

    k = min(
        k, len(set(groups)), *(len({g for g, n in zip(groups, numbers, strict=True) if n == c}) for c in set(numbers))
    )
    if k < 2:
        return []
    folds = StratifiedGroupKFold(k, shuffle=True, random_state=seed).split(np.zeros(len(numbers)), numbers, groups)
    classes = len(np.unique(numbers))
    return [(train, test) for train, test in folds if len(np.unique(numbers[train])) == classes and len(test)]


@dataclass(frozen=True, eq=False)
class FusionRun:
    """Out-of-fold probabilities of every arm on the same rows.

    Attributes:
        classes: Their names, in the order of the probabilities' columns.
        truth: (n,) number of each row's class.
        groups: The patient of each row.
        probabilities: Arm -> (n, classes), the mean over repeats.
        priors: (n, classes) class shares of the rows that trained each row's model: the majority baseline.
        dropped: Modality -> arm -> (n, classes): the same models, asked without that modality.
        present: Modality -> share of rows that have it.
        weights: Modality -> weight in late fusion, mean over folds and repeats.
        folds: Outer folds.
        repeats: Times that folds were drawn.
    """

    classes: tuple[str, ...]
    truth: Indices
    groups: tuple[str, ...]
    probabilities: Mapping[str, Matrix]
    priors: Matrix
    dropped: Mapping[str, Mapping[str, Matrix]]
    present: Mapping[str, float]
    weights: Mapping[str, float]
    folds: int
    repeats: int


def compare_fusion(
    rows: Modalities,
    classes: Classes,
    groups: Groups,
    *,
    folds: int = 5,
    repeats: int = 5,
    components: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> FusionRun:
    """Predict every row by models that never saw its patient: each modality alone, early and late fusion.

    Args:
        rows: All rows.
        classes: The class of each row.
        groups: The patient of each row.
        folds: Outer folds, by patient and stratified by class.
        repeats: Times that folds are drawn anew; probabilities are averaged, so that one draw decides nothing.
        components: Numbers kept of each modality.
        seed: Of all folds.
        progress: Told of each fold.

    Raises:
        InputError: Fewer than two classes, too few patients of a class for the folds, or a class all of whose patients
            were drawn into one fold.
    """
    names, numbers = np.unique(np.asarray([str(c) for c in classes]), return_inverse=True)
    patients = [str(g) for g in groups]
    if len(names) < 2:
        raise InputError("all rows have one class", hint="name another --label")
    sizes = [len({p for p, n in zip(patients, numbers, strict=True) if n == c}) for c in range(len(names))]
    fewest = min(sizes)
    if fewest < folds or folds < 2:
        raise InputError(
            f"class `{names[sizes.index(fewest)]}` has {fewest} patients, got {folds} folds",
            hint="between 2 folds and that many, or leave the class out",
        )
    arms = _arms(rows.names, components, seed)
    fused = [a for a in arms if a.endswith("fusion")]
    shape = (len(rows), len(names))
    sums = {a: np.zeros(shape) for a in arms}
    without = {m: {a: np.zeros(shape) for a in fused} for m in rows.names if fused}
    priors, weights = np.zeros(shape), dict.fromkeys(rows.names, 0.0)
    bar = progress or SilentProgress()
    bar.start(folds * repeats, "folds")
    for repeat in range(repeats):
        for train, test in grouped_folds(numbers.astype(np.int64), patients, folds, seed + 101 * repeat):
            inside, outside = rows.select(train), rows.select(test)
            for arm, make in arms.items():
                model = make().fit(inside, names[numbers[train]], [patients[i] for i in train])
                sums[arm][test] += model.predict_proba(outside)
                for modality in rows.names if arm in fused else ():
                    without[modality][arm][test] += model.predict_proba(outside.without(modality))
                if isinstance(model, LateFusion):
                    weights = {m: weights[m] + w for m, w in model.weights_.items()}
            priors[test] += model.prior_
            bar.advance(1)
    bar.finish()
    left_out = int((priors.sum(axis=1) < repeats - 0.5).sum())
    if left_out:
        raise InputError(
            f"{left_out} of {len(rows)} rows were in no fold: all patients of a class fell into one",
            hint="fewer folds, another --seed, or a class of more patients",
        )
    return FusionRun(
        classes=tuple(str(n) for n in names),
        truth=numbers.astype(np.int64),
        groups=tuple(patients),
        probabilities={a: p / repeats for a, p in sums.items()},
        priors=priors / repeats,
        dropped={m: {a: p / repeats for a, p in found.items()} for m, found in without.items()},
        present={m: float(rows.present(m).mean()) for m in rows.names},
        weights={m: w / (folds * repeats) for m, w in weights.items()} if fused else {},
        folds=folds,
        repeats=repeats,
    )


def _arms(names: Sequence[str], components: int, seed: int) -> dict[str, Callable[[], _FusionClassifier]]:
    settings: dict[str, Any] = {"components": components, "seed": seed}
    arms: dict[str, Callable[[], _FusionClassifier]] = {n: partial(SingleModality, n, **settings) for n in names}
    if len(names) > 1:
        arms |= {"early fusion": partial(EarlyFusion, **settings), "late fusion": partial(LateFusion, **settings)}
    return arms


def _joined(rows: Modalities, scalers: Mapping[str, BlockScaler]) -> Matrix:
    return np.concatenate([scaler.transform(rows.blocks[name]) for name, scaler in scalers.items()], axis=1)


def _logistic(values: Matrix, numbers: Indices, penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=penalty, max_iter=2000).fit(values, numbers)


def _full(model: Any, values: Matrix, classes: int) -> Matrix:
    """Return probabilities of all classes; one that the model never saw has nearly none."""
    found = np.full((len(values), classes), _LEAST_PROBABILITY)
    found[:, model.classes_] = np.maximum(model.predict_proba(values), _LEAST_PROBABILITY)
    normal: Matrix = found / found.sum(axis=1, keepdims=True)
    return normal


def _presence(rows: Modalities) -> Matrix:
    return np.column_stack([rows.present(n) for n in rows.names]).astype(np.float64)


def _mixed(
    logs: NDArray[np.float64], present: Matrix, weights: NDArray[np.float64], prior: NDArray[np.float64]
) -> Matrix:
    """Return the weighted geometric mean of (modalities, n, classes) over what is there; the prior where nothing is."""
    given = present * weights
    total = given.sum(axis=1, keepdims=True)
    share = np.divide(given, total, out=np.zeros_like(given), where=total > 0)
    mixed = np.einsum("nm,mnc->nc", share, logs)
    mixed = np.where(total > 0, mixed, prior)
    mixed -= mixed.max(axis=1, keepdims=True)
    found = np.exp(mixed)
    normal: Matrix = found / found.sum(axis=1, keepdims=True)
    return normal


def _fit_weights(
    logs: NDArray[np.float64], present: Matrix, numbers: Indices, prior: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weights (sum 1) whose mixture has the least log loss."""
    from scipy.optimize import minimize

    if not len(numbers):
        return np.full(len(logs), 1 / len(logs))

    def weights(free: NDArray[np.float64]) -> NDArray[np.float64]:
        powers = np.exp(free - free.max())
        share: NDArray[np.float64] = powers / powers.sum()
        return share

    def loss(free: NDArray[np.float64]) -> float:
        mixed = _mixed(logs, present, weights(free), prior)
        fit = -np.log(np.maximum(mixed[np.arange(len(numbers)), numbers], _LEAST_PROBABILITY)).mean()
        return float(fit) + 1e-3 * float((free**2).sum())  # without a pull to equal weights ties would wander

    return weights(minimize(loss, np.zeros(len(logs)), method="L-BFGS-B").x)
