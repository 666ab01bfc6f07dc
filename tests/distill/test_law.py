"""The synthetic law: where labels are noisy and only reports are clean, unpaired text helps, and nothing else does.

Runs the recipe as users get it: five seeds, all from their own unimodal probe.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from chiasm.distill.arms import ARMS
from chiasm.distill.recipe import load_distill_recipe
from chiasm.distill.stages import class_probabilities, run_arm, run_unimodal
from chiasm.distill.synthetic import make_synthetic
from chiasm.distill.targets import targets_of
from chiasm.metrics.classification import balanced_accuracy

RECIPE = Path(__file__).parents[2] / "recipes" / "clip_it_synthetic.toml"
SEEDS = 5
#: 97.5 % quantile of Student's t with 4 degrees of freedom.
T4 = 2.776
POINTS = 0.05


def scores_of(arms, *overrides, seeds=SEEDS):
    """Balanced accuracy on clean test labels, by arm: one number a seed."""
    recipe = load_distill_recipe(RECIPE, ["data.synthetic.test=1000", *overrides])
    found = {arm: [] for arm in arms}
    for seed in range(seeds):
        problem, sources = make_synthetic(recipe.data.synthetic, seed=seed)
        first = run_unimodal(problem, recipe, seed=seed)
        for arm in arms:
            targets = targets_of(ARMS[arm].targets, sources, seed=seed)
            dim = recipe.data.synthetic.text_dim
            done = run_arm(problem, targets, arm, recipe, seed=seed, unimodal=first, text_dim=dim)
            answers = class_probabilities(done.final, problem.test).argmax(axis=1)
            found[arm].append(balanced_accuracy(problem.test.labels, answers))
    return {arm: np.array(values) for arm, values in found.items()}


def low_end(difference):
    """Lower end of the 95 % interval of a mean paired difference."""
    return difference.mean() - T4 * difference.std(ddof=1) / math.sqrt(len(difference))


def helps(more, less):
    """At least five points, with the interval above 0."""
    return (more - less).mean() >= POINTS and low_end(more - less) > 0


@pytest.fixture(scope="module")
def scores():
    return scores_of(("unimodal", "lambda0", "clip_it", "shuffled"))


def test_text_beats_the_well_trained_probe_and_the_same_heads_without_text(scores):
    assert helps(scores["clip_it"], scores["unimodal"])
    assert helps(scores["clip_it"], scores["lambda0"])


def test_shuffled_reports_do_not_beat_heads_without_text(scores):
    assert scores["shuffled"].mean() <= scores["lambda0"].mean()
    assert not helps(scores["shuffled"], scores["unimodal"])


def test_heads_and_steps_alone_bring_nothing_and_take_little(scores):
    assert not helps(scores["lambda0"], scores["unimodal"])
    assert abs((scores["lambda0"] - scores["unimodal"]).mean()) < POINTS


@pytest.mark.slow
def test_trap_with_clean_labels_and_nothing_to_see_past_text_has_nothing_to_add():
    clean = ("data.synthetic.flip=0.0", "data.synthetic.nuisance=0", "data.synthetic.train=100")
    scores = scores_of(("unimodal", "clip_it"), *clean, seeds=3)
    assert not helps(scores["clip_it"], scores["unimodal"])
    assert abs((scores["clip_it"] - scores["unimodal"]).mean()) < POINTS


@pytest.mark.slow
def test_trap_an_undertrained_probe_makes_more_steps_look_like_a_gain():
    """Nothing but training goes on in ``lambda0``: beside a converged probe, the same arm gains nothing."""
    settings = ("data.synthetic.flip=0.2", "fuse.lock_vision_head=false")
    short = ("unimodal.steps=2", "unimodal.eval_every=2", "unimodal.lr=1e-3")
    early = scores_of(("unimodal", "lambda0"), *settings, *short, seeds=3)
    late = scores_of(("unimodal", "lambda0"), *settings, seeds=3)
    assert (early["lambda0"] - early["unimodal"]).mean() > POINTS
    assert (late["lambda0"] - late["unimodal"]).mean() < POINTS / 2
