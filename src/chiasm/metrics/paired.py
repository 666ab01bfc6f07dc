"""Whether one way of training beats another: paired differences over seeds, patients resampled beside them.

Comes in: what each arm of an experiment answered with each seed (:class:`ArmPredictions`), or numbers, one a seed. Goes
out: means with t intervals, p values, and draws of patients and seeds together.

Notable choices: two arms are compared seed by seed, because a seed shares its data, its order and its noise between arms;
only seeds that both arms have count. Over seeds says "training again would give the same"; over patients says "other
patients would give the same". The second needs all seeds to have one test set, and is computed by resampling both
(Owen 2007). A number over one seed has no interval: NaN, not zero width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import SMALLEST_DEFINED, Clusters, Floats, WeightStatistic, holm
from chiasm.metrics.labels import as_class_numbers, as_probabilities
from chiasm.types import Interval, digest_of


class Tested(Protocol):
    """A frozen dataclass with a p value and its uncorrected form, which :func:`correct` can work on."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def p(self) -> float: ...  # noqa: D102

    @property
    def p_raw(self) -> float: ...  # noqa: D102


AnyTest = TypeVar("AnyTest", bound=Tested)

NO_SPREAD = 1e-12
"""Differences whose standard deviation is below this are the same number, up to rounding."""


@dataclass(frozen=True, eq=False)
class ArmPredictions:
    """What one arm of an experiment answered on its test set, trained with one seed.

    Attributes:
        arm: Name of the arm.
        seed: Of the training (and of the data, where they are drawn anew for each seed).
        ids: (n,) identity of each test sample, unique.
        groups: (n,) patient of each test sample; its id where no patient is known.
        truth: int64 (n,) column of the true class.
        probabilities: float64 (n, classes), rows that sum to 1.

    Raises:
        InputError: When lengths differ, ids repeat, a label is missing, or the values are no probabilities.
    """

    arm: str
    seed: int
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    truth: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    def __post_init__(self) -> None:
        where = f"arm `{self.arm}`, seed {self.seed}"
        probabilities = as_probabilities(self.probabilities)
        truth = as_class_numbers(self.truth, probabilities.shape[1])
        ids, groups = tuple(map(str, self.ids)), tuple(map(str, self.groups))
        lengths = (len(ids), len(groups), len(truth), len(probabilities))
        if len(set(lengths)) != 1:
            raise InputError(f"{where}: {lengths[0]} ids, {lengths[1]} groups, {lengths[2]} true classes and "
                             f"{lengths[3]} rows of probabilities")  # fmt: skip
        if not ids:
            raise InputError(f"{where}: there are no test samples")
        if len(set(ids)) != len(ids):
            raise InputError(f"{where}: {len(ids) - len(set(ids))} of {len(ids)} ids repeat")
        if (truth < 0).any():
            raise InputError(f"{where}: {int((truth < 0).sum())} of {len(truth)} test samples have no label")
        for name, value in (("ids", ids), ("groups", groups), ("truth", truth), ("probabilities", probabilities)):
            object.__setattr__(self, name, value)

    @property
    def n(self) -> int:
        """Number of test samples."""
        return len(self.ids)

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return int(self.probabilities.shape[1])

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The class of the largest probability of each sample; ties take the lowest class."""
        return np.asarray(np.argmax(self.probabilities, axis=1), dtype=np.int64)

    @property
    def test_digest(self) -> str:
        """Identity of the test set: ids, groups and truth in their order."""
        return digest_of([list(self.ids), list(self.groups), self.truth.tolist()])

    @property
    def digest(self) -> str:
        """Identity of the answers: test set and probabilities."""
        content = self.test_digest.encode() + np.ascontiguousarray(self.probabilities.round(9)).tobytes()
        return hashlib.sha256(content).hexdigest()[:12]


@dataclass(frozen=True)
class OverSeeds:
    """The mean of one number a seed.

    Attributes:
        value: Mean; NaN when no seed has the number.
        low: Lower bound of the t interval; NaN with one seed.
        high: Upper bound.
        std: Standard deviation between seeds (n - 1 in the divisor); NaN with one seed.
        n: Seeds that count.
    """

    value: float
    low: float
    high: float
    std: float
    n: int


@dataclass(frozen=True)
class SeedDifference:
    """How much one arm exceeds another, seed by seed.

    Attributes:
        value: Mean difference over common seeds, first less second.
        low: Lower bound of its t interval over seeds; NaN with one seed.
        high: Upper bound.
        p: Two-sided p value, corrected by Holm for the family it was asked in; NaN until :func:`correct` has run.
        p_raw: Two-sided p value of the paired t test.
        p_wilcoxon: Two-sided exact p value of Wilcoxon's signed ranks, which needs no normal scatter.
        smallest_p_wilcoxon: What ``p_wilcoxon`` could reach at best with so many seeds: 2 / 2^n, 0.0625 with five.
        std: Standard deviation of the differences.
        seeds: Seeds that both arms have.
        per_seed: The difference of each of them.
        left_out: Seeds that only one arm has, or in which the number is not defined.
        patients: The mean with its interval when patients and seeds are drawn anew together; None where the seeds have
            different test sets.
    """

    value: float
    low: float
    high: float
    p: float
    p_raw: float
    p_wilcoxon: float
    smallest_p_wilcoxon: float
    std: float
    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    left_out: tuple[int, ...] = ()
    patients: Interval | None = None


@dataclass(frozen=True)
class Summary:
    """A printed "mean ± standard deviation over n runs"."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class WelchTest:
    """The difference of two means of unpaired runs.

    Attributes:
        value: First less second.
        low: Lower bound of its interval.
        high: Upper bound.
        p: Two-sided p value.
        t: The statistic.
        degrees_of_freedom: Of Welch and Satterthwaite.
    """

    value: float
    low: float
    high: float
    p: float
    t: float
    degrees_of_freedom: float


@dataclass(frozen=True)
class McNemarTest:
    """Whether two classifiers err equally often on the same samples.

    Attributes:
        only_first: Samples that only the first gets right.
        only_second: Samples that only the second gets right.
        p: Exact two-sided p value; 1 where they never differ.
    """

    only_first: int
    only_second: int
    p: float


def mean_over_seeds(values: ArrayLike, *, level: float = 0.95) -> OverSeeds:
    """Return the mean of one number a seed with its t interval.

    Args:
        values: One number a seed; NaN is left out.
        level: Coverage of the interval.

    Raises:
        InputError: When ``level`` is not between 0 and 1.
    """
    _check_level(level)
    given = np.asarray(values, dtype=np.float64).ravel()
    known = given[np.isfinite(given)]
    n = len(known)
    if n == 0:
        return OverSeeds(math.nan, math.nan, math.nan, math.nan, 0)
    mean = float(known.mean())
    if n == 1:
        return OverSeeds(mean, math.nan, math.nan, math.nan, 1)
    std = float(known.std(ddof=1))
    half = _t_quantile(n - 1, level) * std / math.sqrt(n)
    return OverSeeds(mean, mean - half, mean + half, std, n)


def seed_difference(first: Mapping[int, float], second: Mapping[int, float], *, level: float = 0.95) -> SeedDifference:
    """Compare two arms seed by seed.

    Args:
        first: Seed -> number of the first arm.
        second: The same of the second arm.
        level: Coverage of the interval.

    Returns:
        Mean difference, t interval and p values over the seeds that both have with a defined number. One common seed
        gives NaN for interval and p; none gives NaN for all. If all differences are the same number there is no scatter
        to test against: the interval has zero width, and ``p_raw`` is the smallest p of a sign test, 2 / 2^n (1 for a
        difference of 0), never 0: seeds that change nothing are not evidence.

    Raises:
        InputError: When ``level`` is not between 0 and 1.
    """
    _check_level(level)
    common = [s for s in sorted(first) if s in second and math.isfinite(first[s]) and math.isfinite(second[s])]
    left_out = tuple(sorted((set(first) | set(second)) - set(common)))
    differences = np.array([first[s] - second[s] for s in common])
    found = mean_over_seeds(differences, level=level)
    smallest = smallest_wilcoxon_p(found.n)
    p_raw = math.nan
    if found.n > 1 and found.std <= NO_SPREAD:
        p_raw = smallest if abs(found.value) > NO_SPREAD else 1.0
    elif found.n > 1:
        p_raw = _two_sided_t(found.value / (found.std / math.sqrt(found.n)), found.n - 1)
    return SeedDifference(
        value=found.value,
        low=found.low,
        high=found.high,
        p=math.nan,
        p_raw=p_raw,
        p_wilcoxon=wilcoxon_exact(differences),
        smallest_p_wilcoxon=smallest,
        std=found.std,
        seeds=tuple(common),
        per_seed=tuple(float(d) for d in differences),
        left_out=left_out,
    )


def correct(differences: Mapping[str, AnyTest], families: Sequence[Sequence[str]] | None = None) -> dict[str, AnyTest]:
    """Return the differences with ``p`` corrected by Holm's method within each family.

    Args:
        differences: Name -> :class:`SeedDifference`, or another test that has ``p_raw`` and ``p``.
        families: Names that answer one question together; names that are absent are skipped, and those in no family form
            one of their own. None: one family of all.

    Returns:
        The same names in the same order. NaN p values stay NaN and do not count.
    """
    named = [[name for name in family if name in differences] for family in families or ()]
    inside = {name for family in named for name in family}
    named.append([name for name in differences if name not in inside])
    corrected: dict[str, float] = {}
    for family in named:
        corrected |= dict(zip(family, holm([differences[name].p_raw for name in family]).tolist(), strict=True))
    return {name: dataclasses.replace(found, p=corrected[name]) for name, found in differences.items()}


def wilcoxon_exact(differences: ArrayLike) -> float:
    """Return the exact two-sided p value of Wilcoxon's signed-rank test.

    Args:
        differences: One a pair; zeros are dropped (Wilcoxon 1945), ties share their mean rank, NaN is left out.

    Returns:
        In (0, 1]; 1 when all differences are 0; NaN for no difference at all.

    References:
        Wilcoxon, 1945, https://doi.org/10.2307/3001968. The law of the rank sum under random signs is built exactly, also
        with ties; without ties equal to ``scipy.stats.wilcoxon(method="exact")``.
    """
    given = np.asarray(differences, dtype=np.float64).ravel()
    given = given[np.isfinite(given)]
    if len(given) == 0:
        return math.nan
    given = given[np.abs(given) > NO_SPREAD]
    if len(given) == 0:
        return 1.0
    size = np.abs(given)
    # Ranks times two are whole numbers, also with ties: 1 + smaller + not larger.
    doubled = np.array([int((size < s - NO_SPREAD).sum() + (size <= s + NO_SPREAD).sum()) + 1 for s in size])
    law = np.ones(1)
    for rank in doubled:
        law = 0.5 * (np.pad(law, (0, int(rank))) + np.pad(law, (int(rank), 0)))
    reached = int(doubled[given > 0].sum())
    return float(min(1.0, 2 * min(law[: reached + 1].sum(), law[reached:].sum())))


def smallest_wilcoxon_p(n: int) -> float:
    """Return the smallest two-sided p value that ``n`` pairs can reach in a test of signs: 2 / 2^n, at most 1."""
    return min(1.0, 2.0 ** (1 - n)) if n > 0 else math.nan


def welch_t(first: Summary, second: Summary, *, level: float = 0.95) -> WelchTest:
    """Test the difference of two printed means of unpaired runs.

    Args:
        first: Mean, standard deviation (n - 1 in the divisor) and number of runs.
        second: The same.
        level: Coverage of the interval.

    Returns:
        First less second. Without any scatter the interval has zero width and p is NaN.

    Raises:
        InputError: For fewer than two runs, a negative standard deviation, or a level outside (0, 1).

    References:
        Welch, 1947, https://doi.org/10.1093/biomet/34.1-2.28; equal to ``scipy.stats.ttest_ind_from_stats`` with
        ``equal_var=False``.
    """
    _check_level(level)
    for given in (first, second):
        if given.n < 2 or not given.std >= 0:
            raise InputError(f"a mean of {given.n} runs with standard deviation {given.std} cannot be tested",
                             hint="two runs or more, and a standard deviation of 0 or more")  # fmt: skip
    squares = [s.std**2 / s.n for s in (first, second)]
    value, error = first.mean - second.mean, math.sqrt(sum(squares))
    if error == 0:
        return WelchTest(value, value, value, math.nan, math.nan, math.nan)
    freedom = sum(squares) ** 2 / (squares[0] ** 2 / (first.n - 1) + squares[1] ** 2 / (second.n - 1))
    half = _t_quantile(freedom, level) * error
    return WelchTest(value, value - half, value + half, _two_sided_t(value / error, freedom), value / error, freedom)


def mcnemar_exact(first_right: ArrayLike, second_right: ArrayLike) -> McNemarTest:
    """Test whether two classifiers err equally often on the same samples.

    Args:
        first_right: (n,) booleans: the first answered rightly.
        second_right: (n,) the same of the second.

    Returns:
        Counts and the exact binomial p value. Samples count as independent: with several a patient, p is too small, and
        :func:`joint_draws` is the one to believe.

    Raises:
        InputError: When lengths differ.

    References:
        McNemar, 1947, https://doi.org/10.1007/BF02295996; equal to statsmodels' ``mcnemar(exact=True)``.
    """
    from scipy.special import bdtr

    one, other = (np.asarray(r, dtype=bool).ravel() for r in (first_right, second_right))
    if len(one) != len(other):
        raise InputError(f"the answers are of {len(one)} and {len(other)} samples")
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    p = min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))
    return McNemarTest(only_first, only_second, p)


@dataclass(frozen=True, eq=False)
class JointDraws:
    """Resamples of patients and seeds together: every statistic has seen the same draws.

    Attributes:
        values: (resamples, statistics, seeds) the number of each seed on the patients of each resample; NaN where a seed
            is absent or the number is not defined.
        seed_counts: (resamples, seeds) how often each seed was drawn.
        n: Rows that were resampled.
        level: Coverage of intervals.
    """

    values: Floats
    seed_counts: Floats
    n: int
    level: float

    def interval(self, value: float, first: int, second: int | None = None) -> Interval:
        """Return a value with the percentile interval of a statistic, or of the difference of two.

        Seeds without both numbers are left out. Bounds are NaN where fewer than half of the resamples are defined.

        Args:
            value: On all patients and seeds; passed on.
            first: Index of the statistic.
            second: Index of the one that is taken off, seed by seed.
        """
        numbers = self.values[:, first] if second is None else self.values[:, first] - self.values[:, second]
        defined = np.isfinite(numbers)
        weights = self.seed_counts * defined
        total = weights.sum(axis=1)
        draws = (weights * np.where(defined, numbers, 0.0)).sum(axis=1)[total > 0] / total[total > 0]
        if not math.isfinite(value) or len(draws) == 0 or len(draws) < SMALLEST_DEFINED * len(total):
            return Interval(value, math.nan, math.nan, self.n)
        low, high = np.quantile(draws, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Interval(value, float(low), float(high), self.n)


def joint_draws(
    statistics: Sequence[Sequence[WeightStatistic | None]],
    groups: Sequence[Hashable] | NDArray[np.generic],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> JointDraws:
    """Resample patients and seeds together, for numbers that are means over seeds on one test set.

    Args:
        statistics: For each number, one function of row weights a seed (None: this seed is absent); all over the rows of
            one test set, all with the same seeds in the same order.
        groups: Patient of each row of the test set.
        n_resamples: Number of resamples.
        seed: Of the draws.
        level: Coverage of the intervals made from them.

    Returns:
        The draws; no resample is defined with fewer than two patients. With one seed only patients are drawn. Each
        resample draws patients and, independently, seeds with replacement; their spreads add, and the spread of a
        single sample's noise is counted more than once, so the intervals are rather too wide than too narrow. Few seeds
        cannot show their own spread by drawing from them: read the t interval over seeds beside it.

    Raises:
        InputError: When there are no rows, the numbers have different seeds, or a parameter is out of its range.

    References:
        Owen, 2007, The pigeonhole bootstrap, https://doi.org/10.1214/07-AOAS122.
    """
    _check_level(level)
    clusters = Clusters(groups)
    counts = {len(row) for row in statistics}
    if len(counts) != 1 or n_resamples < 1:
        raise InputError(f"each number needs the same seeds, and resamples must be 1 or more (got {n_resamples})")
    n_seeds = counts.pop()
    values = np.full((n_resamples, len(statistics), n_seeds), np.nan)
    start = 0
    for weights in clusters.weights(n_resamples, seed) if clusters.count > 1 else ():
        for k, row in enumerate(statistics):
            for s, statistic in enumerate(row):
                if statistic is not None:
                    values[start : start + len(weights), k, s] = statistic(weights)
        start += len(weights)
    drawn = np.random.default_rng([seed, 1]).multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_resamples)
    return JointDraws(values, drawn.astype(np.float64), clusters.n, level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"the level must lie between 0 and 1, got {level}", hint="write 0.95 for 95 %")


def _t_quantile(freedom: float, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + level) / 2))


def _two_sided_t(t: float, freedom: float) -> float:
    from scipy.special import stdtr

    return min(1.0, 2 * float(stdtr(freedom, -abs(t))))
