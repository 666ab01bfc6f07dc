"""The statistics of learning curves, tested: intervals cover the truth as often as they say, equal methods are not told apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chiasm.evaluate.few_shot_scores import score_few_shot
from chiasm.tasks.k_shot import Answer, Draws, Episode

PATIENTS, SEEDS = 80, 8
#: Of a logit: how much patients differ, how much seeds do, and how much a seed surprises on one patient.
BY_PATIENT, BY_SEED, BY_BOTH = 1.0, 0.5, 0.5
LEVEL = 0.8


def world(
    random: np.random.Generator, *, by_patient: float = BY_PATIENT, by_seed: float = BY_SEED
) -> tuple[Draws, NDArray[np.float64]]:
    """Return draws of one number of shots, and for each seed and patient the logit of a right answer."""
    truth = (np.arange(2 * PATIENTS) // 2) % 2  # two images each
    names = tuple(f"p{i // 2}" for i in range(2 * PATIENTS)) + tuple(f"q{i}" for i in range(4))
    test = np.arange(2 * PATIENTS)
    pool = np.arange(2 * PATIENTS, 2 * PATIENTS + 4)
    episodes = tuple(Episode(s, 1, pool[:2], pool[2:], test, names) for s in range(SEEDS))
    draws = Draws(episodes, (0, 1), np.concatenate([truth, [0, 1, 0, 1]]), test, {}, {0: 2, 1: 2})
    logits = (
        LEVEL
        + by_patient * random.normal(size=PATIENTS)
        + by_seed * random.normal(size=(SEEDS, 1))
        + BY_BOTH * random.normal(size=(SEEDS, PATIENTS))
    )
    return draws, logits


def answers_of(draws: Draws, logits: NDArray[np.float64], name: str, random: np.random.Generator) -> list[Answer]:
    """Return what a method answers that is right with these logits; both images of a patient share the luck."""
    truth = draws.truth[draws.test]
    right = random.random(logits.shape) < 1 / (1 + np.exp(-logits))
    found = []
    for s in range(SEEDS):
        said = np.where(np.repeat(right[s], 2), truth, 1 - truth)
        found.append(Answer(name, s, 1, np.eye(2)[said] * 0.8 + 0.1, 2, 2, {}, 0.0))
    return found


def expected(*, by_patient: float = BY_PATIENT, by_seed: float = BY_SEED) -> float:
    """Return the share of right answers over all patients and seeds that there could be."""
    random = np.random.default_rng(99)
    spread = np.sqrt(by_patient**2 + by_seed**2 + BY_BOTH**2)
    return float((1 / (1 + np.exp(-(LEVEL + spread * random.normal(size=400_000))))).mean())


def test_the_interval_over_patients_and_seeds_covers_the_truth() -> None:
    """Nominal 95 %: at least 88 % of 60 worlds (simulation error 3 points). Over seeds alone far fewer: the trap."""
    truth, calm = expected(), {"by_patient": 3.0, "by_seed": 0.0}  # calm: seeds hardly differ, patients do
    calm_truth = expected(**calm)
    covered = np.zeros(3)
    for i in range(60):
        random = np.random.default_rng([7, i])
        draws, logits = world(random)
        both = score_few_shot(draws, answers_of(draws, logits, "m", random), n_resamples=150, seed=i).points[0]
        draws, logits = world(random, **calm)
        still = score_few_shot(draws, answers_of(draws, logits, "m", random), n_resamples=150, seed=i).points[0]
        covered += [
            both.balanced_accuracy.low <= truth <= both.balanced_accuracy.high,
            still.balanced_accuracy.low <= calm_truth <= still.balanced_accuracy.high,
            still.over_seeds.low <= calm_truth <= still.over_seeds.high,
        ]
    assert covered[0] / 60 >= 0.88
    assert covered[1] / 60 >= 0.88
    assert covered[2] / 60 < 0.8


def test_equal_methods_are_seldom_told_apart() -> None:
    """Type I error of the verdict: at most 5 % nominal; of 80 worlds at most 9 % may be wrong."""
    wrong = 0
    for i in range(80):
        random = np.random.default_rng([8, i])
        draws, logits = world(random)
        answers = [*answers_of(draws, logits, "linear-probe", random), *answers_of(draws, logits, "other", random)]
        (contrast,) = score_few_shot(draws, answers, n_resamples=150, seed=i).contrasts
        wrong += contrast.verdict != "not told apart"
    assert wrong / 80 <= 0.09


def test_unequal_methods_are_told_apart() -> None:
    found = 0
    for i in range(12):
        random = np.random.default_rng([9, i])
        draws, logits = world(random)
        answers = [
            *answers_of(draws, logits, "linear-probe", random),
            *answers_of(draws, logits + 1.5, "better", random),
        ]
        (contrast,) = score_few_shot(draws, answers, n_resamples=150, seed=i).contrasts
        found += contrast.verdict == "better"
    assert found >= 10
