"""Estimators of a risk from features of patients: Cox with elastic net, random survival forest, and no features at all.

Comes in: features (patients, columns), times and event flags as :func:`chiasm.metrics.survival.survival_target` makes
them. Goes out: fitted estimators in scikit-learn's style: ``fit``, ``predict`` (risk, higher is worse), and
``predict_survival`` (probability of no event until a time). Whatever is chosen (penalty, number of components, size of
leaves) is chosen inside ``fit``, on the patients that it was given: so an outer cross-validation around it is nested.

scikit-survival (GPL-3, extra ``survival``) does the fitting; it is imported when a model is fitted.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from chiasm.errors import InputError, MissingExtra
from chiasm.metrics.survival import (
    Booleans,
    Floats,
    breslow_baseline,
    check_within,
    from_target,
    kaplan_meier,
    survival_target,
)

#: Standardised columns are cut here, so that one strange patient does not leave the range of training.
FARTHEST = 6.0


class Columns:
    """Missing values, scale and principal components of the columns, learnt on training patients only.

    Args:
        components: Principal components of the columns that are not ``free``; None: the columns themselves. They are
            whitened: each component gets the same penalty.
        free: Columns (clinical ones) that stand beside the components.
    """

    def __init__(self, components: int | None, free: Sequence[int] = ()) -> None:
        self.components = components
        self.free = tuple(free)

    def fit(self, x: Floats) -> Self:
        """Learn medians, scale and components from training patients (n, p)."""
        known = np.where(np.isfinite(x), x, np.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a column without any value
            self.median = np.nan_to_num(np.nanmedian(known, axis=0))
        filled = np.where(np.isfinite(x), x, self.median)
        self.mean, deviation = filled.mean(axis=0), filled.std(axis=0)
        constant = deviation <= 1e-9 * np.maximum(np.abs(self.mean), 1.0)
        self.scale = np.where(constant, np.inf, deviation)
        rest = np.setdiff1d(np.arange(x.shape[1]), self.free)
        self.rotation: Floats | None = None
        if self.components is not None and len(rest) > self.components:
            _, size, axes = np.linalg.svd(self._scaled(x)[:, rest], full_matrices=False)
            kept = min(self.components, int((size > 1e-9 * size[0]).sum())) if size[0] > 0 else 1
            self.rotation = axes[:kept].T * (np.sqrt(len(x)) / np.maximum(size[:kept], 1e-12))
        self.rest = rest
        return self

    def __call__(self, x: Floats) -> Floats:
        """Return the columns of a model: components (or columns) that are penalised, then free ones."""
        scaled = self._scaled(x)
        penalised = scaled[:, self.rest]
        if self.rotation is not None:
            penalised = penalised @ self.rotation
        result: Floats = np.concatenate([penalised, scaled[:, list(self.free)]], axis=1)
        return result

    def _scaled(self, x: Floats) -> Floats:
        filled = np.where(np.isfinite(x), x, self.median)
        scaled: Floats = np.clip((filled - self.mean) / self.scale, -FARTHEST, FARTHEST)
        return scaled


class CoxNet(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Cox's model with an elastic net; penalty, mixing and components are chosen by inner cross-validation.

    The choice is by cross-validated partial likelihood (Verweij and van Houwelingen 1993), whose path begins at the model
    without penalised columns: where they carry nothing, nothing is what is chosen.

    Args:
        l1_ratios: Candidates of the mixing, in (0, 1]: 1 is the lasso, 0.01 nearly ridge, which suits embeddings: what
            they know is spread over their columns.
        components: Candidates for the number of principal components (None: the columns themselves), or ``auto``: the
            columns, and, of more than 40 of them, 16 components.
        free: Columns that are never penalised or rotated (age, sex, stage). With fewer than ten events for each of them
            they are penalised, too. Where there are no other columns, this is Cox's model as everybody fits it (Efron's
            ties): a baseline that was not shrunk.
        n_alphas: Penalties on the path.
        alpha_min_ratio: Smallest penalty of the path as a share of the largest.
        folds: Of the inner cross-validation, stratified by event.
        seed: Of its draws.
    """

    def __init__(
        self,
        *,
        l1_ratios: Sequence[float] = (0.01, 0.5),
        components: Sequence[int | None] | str = "auto",
        free: Sequence[int] = (),
        n_alphas: int = 30,
        alpha_min_ratio: float = 0.03,
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        self.l1_ratios = l1_ratios
        self.components = components
        self.free = free
        self.n_alphas = n_alphas
        self.alpha_min_ratio = alpha_min_ratio
        self.folds = folds
        self.seed = seed

    def fit(self, features: ArrayLike, target: NDArray[np.void], groups: Sequence[Hashable] | None = None) -> Self:
        """Fit on training patients, one row a patient.

        Args:
            features: (n, p); NaN is replaced by the median of training.
            target: From :func:`chiasm.metrics.survival.survival_target`.
            groups: (n,) patients, each of which must have one row: aggregate them first.

        Raises:
            MissingExtra: scikit-survival is not installed.
            InputError: Fewer events than inner folds, other shapes, several rows of one patient.
        """
        require_sksurv()
        x, time, event = checked(features, target, groups)
        inner = stratified_folds(event, self.folds, self.seed)
        free = tuple(self.free)
        if 10 * len(free) > int(event.sum()):
            free = ()
        if len(free) == x.shape[1]:
            self._fit_plain(x, time, event)
        else:
            self._choose(x, time, event, inner, free)
        self.baseline_ = breslow_baseline(time, event, self.predict(x))
        return self

    def _fit_plain(self, x: Floats, time: Floats, event: Booleans) -> None:
        from sksurv.linear_model import CoxPHSurvivalAnalysis

        self.columns_ = Columns(None).fit(x)
        ridge = 1e-4 * len(x)  # none to speak of: it only keeps collinear columns apart
        try:
            model = CoxPHSurvivalAnalysis(alpha=ridge, ties="efron").fit(self.columns_(x), survival_target(time, event))
        except (ArithmeticError, np.linalg.LinAlgError):
            raise InputError(
                "Cox's model does not converge: a column tells who has the event without an exception",
                hint="leave that column out: does it come after the event?",
            ) from None
        self.coefficients_ = np.asarray(model.coef_, dtype=np.float64)
        self.chosen_: dict[str, Any] = {"penalty": "none"}

    def _choose(
        self, x: Floats, time: Floats, event: Booleans, inner: NDArray[np.int64], free: tuple[int, ...]
    ) -> None:
        """Keep the model with the best cross-validated partial likelihood."""
        best = -np.inf
        for count in component_candidates(self.components, x.shape[1] - len(free)):
            for l1_ratio in self.l1_ratios:
                columns = Columns(count, free).fit(x)
                coefficients, alphas = _path(columns(x), time, event, self._settings(l1_ratio), len(free))
                likelihood = np.zeros(len(alphas))
                for fold in range(self.folds):
                    rows = inner != fold
                    part = Columns(count, free).fit(x[rows])
                    settings = {"l1_ratio": l1_ratio, "alphas": alphas}
                    found, _ = _path(part(x[rows]), time[rows], event[rows], settings, len(free))
                    risks = part(x) @ found
                    likelihood += log_partial_likelihood(risks, time, event)
                    likelihood -= log_partial_likelihood(risks[rows], time[rows], event[rows])
                place = int(np.nanargmax(likelihood)) if np.isfinite(likelihood).any() else 0
                if likelihood[place] > best or best == -np.inf:
                    best = float(likelihood[place])
                    self.columns_, self.coefficients_ = columns, coefficients[:, place]
                    self.chosen_ = {
                        "components": count,
                        "l1_ratio": float(l1_ratio),
                        "alpha": float(alphas[place]),
                        "nonzero": int((np.abs(coefficients[:, place]) > 0).sum()),
                    }

    def predict(self, features: ArrayLike) -> Floats:
        """Return the log risk of each patient (n,), higher is worse; 0 is the mean of training."""
        if not hasattr(self, "coefficients_"):
            raise NotFittedError("this CoxNet is not fitted; call `fit` first")
        risk: Floats = self.columns_(_as_features(features, len(self.columns_.mean))) @ self.coefficients_
        return risk

    def predict_survival(self, features: ArrayLike, times: ArrayLike) -> Floats:
        """Return the probability of no event until each of ``times``, shape (n, times); Breslow's baseline hazard.

        Raises:
            InputError: A time beyond the follow-up of training.
        """
        return self.baseline_.survival(self.predict(features), times)

    def _settings(self, l1_ratio: float) -> dict[str, Any]:
        return {"l1_ratio": l1_ratio, "n_alphas": self.n_alphas, "alpha_min_ratio": self.alpha_min_ratio}


class SurvivalForest(BaseEstimator):  # type: ignore[misc]
    """A random survival forest; size of leaves and components are chosen by the concordance out of the bag.

    Args:
        trees: Number of trees.
        leaves: Candidates for the least number of patients in a leaf.
        components: Candidates as in :class:`CoxNet`; ``auto``: 16 components of more than 40 columns. Trees grow slowly
            where there are many distinct times: some seconds for each 100 trees on 500 patients.
        free: As :class:`CoxNet`: never rotated.
        seed: Of the draws.
    """

    def __init__(
        self,
        *,
        trees: int = 100,
        leaves: Sequence[int] = (10, 25),
        components: Sequence[int | None] | str = "auto",
        free: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        self.trees = trees
        self.leaves = leaves
        self.components = components
        self.free = free
        self.seed = seed

    def fit(self, features: ArrayLike, target: NDArray[np.void], groups: Sequence[Hashable] | None = None) -> Self:
        """Fit on training patients, one row a patient; as :meth:`CoxNet.fit`."""
        require_sksurv()
        from sksurv.ensemble import RandomSurvivalForest

        x, time, event = checked(features, target, groups)
        y = survival_target(time, event)
        best = -np.inf
        width = x.shape[1] - len(self.free)
        for count in component_candidates(self.components, width)[-1 if isinstance(self.components, str) else 0 :]:
            columns = Columns(count, self.free).fit(x)
            ready = columns(x)
            for leaf in self.leaves:
                forest = RandomSurvivalForest(
                    n_estimators=self.trees,
                    min_samples_leaf=leaf,
                    min_samples_split=2 * leaf,
                    oob_score=True,
                    random_state=self.seed,
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # few trees: some patients are never out of the bag
                    forest.fit(ready, y)
                if forest.oob_score_ > best:
                    best = float(forest.oob_score_)
                    self.columns_, self.forest_ = columns, forest
                    self.chosen_ = {"components": count, "leaf": int(leaf), "out_of_bag": best}
        self.longest_ = float(time.max())
        return self

    def predict(self, features: ArrayLike) -> Floats:
        """Return the risk of each patient (n,): the cumulative hazard summed over event times, higher is worse."""
        if not hasattr(self, "forest_"):
            raise NotFittedError("this SurvivalForest is not fitted; call `fit` first")
        x = _as_features(features, len(self.columns_.mean))
        return np.asarray(self.forest_.predict(self.columns_(x)), dtype=np.float64)

    def predict_survival(self, features: ArrayLike, times: ArrayLike) -> Floats:
        """Return the probability of no event until each of ``times``, shape (n, times).

        Raises:
            InputError: A time beyond the follow-up of training.
        """
        wanted = np.atleast_1d(np.asarray(times, dtype=np.float64))
        check_within(wanted, self.longest_)
        x = _as_features(features, len(self.columns_.mean))
        curves = np.asarray(self.forest_.predict_survival_function(self.columns_(x), return_array=True))
        place = np.searchsorted(np.asarray(self.forest_.unique_times_), wanted, side="right")
        survival: Floats = np.concatenate([np.ones((len(x), 1)), curves], axis=1)[:, place]
        return survival


class NoFeatures(BaseEstimator):  # type: ignore[misc]
    """The baseline: the Kaplan–Meier curve of training for everybody, one risk for all."""

    def fit(self, features: ArrayLike, target: NDArray[np.void], groups: Sequence[Hashable] | None = None) -> Self:
        """Estimate the curve; features are not looked at."""
        _, time, event = checked(features, target, groups)
        self.curve_, self.longest_ = kaplan_meier(time, event), float(time.max())
        self.chosen_: dict[str, Any] = {}
        return self

    def predict(self, features: ArrayLike) -> Floats:
        """Return 0 for everybody."""
        return np.zeros(len(np.asarray(features)))

    def predict_survival(self, features: ArrayLike, times: ArrayLike) -> Floats:
        """Return the curve of training at ``times`` for everybody, shape (n, times)."""
        wanted = np.atleast_1d(np.asarray(times, dtype=np.float64))
        check_within(wanted, self.longest_)
        return np.tile(self.curve_.at(wanted), (len(np.asarray(features)), 1))


def require_sksurv() -> None:
    """Raise ``MissingExtra`` where scikit-survival is absent."""
    try:
        import sksurv  # noqa: F401
    except ImportError:
        raise MissingExtra("scikit-survival", "survival") from None


def checked(
    features: ArrayLike, target: NDArray[np.void], groups: Sequence[Hashable] | None = None
) -> tuple[Floats, Floats, Booleans]:
    """Return features, times and flags after checking that they fit each other.

    Raises:
        InputError: Other shapes, infinite features, several rows of one patient.
    """
    time, event = from_target(target)
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) != len(time) or not x.shape[1]:
        raise InputError(f"features must have shape ({len(time)}, columns), got {x.shape}")
    if np.isinf(x).any():
        raise InputError(f"{int(np.isinf(x).sum())} features are infinite")
    if groups is not None and len({str(g) for g in groups}) != len(x):
        raise InputError(
            f"{len(x)} rows belong to {len({str(g) for g in groups})} patients; a survival model takes one row a patient",
            hint="`survival_data` aggregates the rows of a patient",
        )
    return x, time, event


def stratified_folds(event: Booleans, folds: int, seed: int) -> NDArray[np.int64]:
    """Return a fold for each patient, events spread evenly.

    Raises:
        InputError: Fewer than two events a fold, or fewer than two folds.
    """
    from sklearn.model_selection import StratifiedKFold

    if folds < 2:
        raise InputError(f"cross-validation needs two folds, got {folds}")
    fewest = min(int(event.sum()), int((~event).sum()) if not event.all() else len(event))
    if int(event.sum()) < 2 * folds:
        raise InputError(
            f"{int(event.sum())} events are too few for {folds} folds; there must be two in each",
            hint="ask for fewer folds, or collect a longer follow-up",
        )
    place = np.zeros(len(event), dtype=np.int64)
    strata = event if fewest >= folds else np.zeros(len(event), dtype=bool)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, rows) in enumerate(splitter.split(np.zeros((len(event), 1)), strata)):
        place[rows] = fold
    return place


def component_candidates(components: Sequence[int | None] | str, width: int) -> tuple[int | None, ...]:
    """Return the numbers of components to try for so many columns."""
    if isinstance(components, str):
        return (None,) if width <= 40 else (None, 16)
    return tuple(components)


def log_partial_likelihood(log_risk: Floats, time: Floats, event: Booleans) -> Floats:
    """Return Breslow's log partial likelihood of each column of log risks (n, models), summed over events."""
    order = np.argsort(-time, kind="stable")
    risk, flag, ordered = log_risk[order], event[order], time[order]
    shift = risk.max(axis=0)
    summed = np.cumsum(np.exp(risk - shift), axis=0)
    last = np.searchsorted(-ordered, -ordered, side="right") - 1
    with np.errstate(divide="ignore"):
        likelihood: Floats = (risk - shift - np.log(summed[last]))[flag].sum(axis=0)
    return likelihood


def _path(
    x: Floats, time: Floats, event: Booleans, settings: dict[str, Any], free: int
) -> tuple[Floats, NDArray[np.float64]]:
    """Return coefficients (columns, penalties) and penalties; a path that breaks off goes on with its last model."""
    from sksurv.linear_model import CoxnetSurvivalAnalysis

    factor = np.ones(x.shape[1])
    if free:
        factor[-free:] = 0.0
    y = survival_target(time, event)
    given = settings.get("alphas")
    wanted = settings.get("n_alphas") if given is None else len(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all coefficients zero is a model here, too; slow ends of paths are not chosen
        tried = dict(settings)
        for _ in range(4):
            try:
                model = CoxnetSurvivalAnalysis(**tried, penalty_factor=factor).fit(x, y)
                break
            except ArithmeticError:  # nearly separated: keep to stronger penalties
                if given is not None:
                    tried["alphas"] = tried["alphas"][: max(1, len(tried["alphas"]) // 2)]
                else:
                    tried["alpha_min_ratio"] = tried["alpha_min_ratio"] ** 0.5
        else:
            raise InputError(
                "the Cox model does not converge on these features", hint="fewer columns, or principal components"
            )
    coefficients, alphas = np.asarray(model.coef_), np.asarray(model.alphas_)
    missing = int(wanted or 0) - coefficients.shape[1]
    if given is not None and missing > 0:
        coefficients = np.concatenate([coefficients, np.repeat(coefficients[:, -1:], missing, axis=1)], axis=1)
        alphas = np.asarray(given)
    return coefficients, alphas


def _as_features(features: ArrayLike, width: int) -> Floats:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != width:
        raise InputError(f"features must have shape (n, {width}) as in training, got {x.shape}")
    return x
