"""Targets of the arms: what each control keeps and what it takes away."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.distill.recipe import SyntheticConfig
from chiasm.distill.synthetic import make_synthetic
from chiasm.distill.targets import ReportIds, TextSources, make_targets, random_text, shuffled, targets_of
from chiasm.errors import InputError

laws = settings(max_examples=20, deadline=None)


def draw(n, m, dim, seed):
    rng = np.random.default_rng(seed)
    masks = rng.random(n) < 0.7, rng.random(m) < 0.7
    return make_targets(rng.standard_normal((n, dim)), rng.standard_normal((m, dim)), *masks)


def rows_of(vectors, mask):
    return Counter(v.tobytes() for v in vectors[mask])


@laws
@given(st.integers(1, 20), st.integers(0, 9), st.integers(2, 6), st.integers(0, 99))
def test_targets_are_unit_rows_where_there_is_text(n, m, dim, seed):
    found = draw(n, m, dim, seed)
    np.testing.assert_allclose(np.linalg.norm(found.train[found.train_mask], axis=1), 1, rtol=1e-6)
    assert (found.train[~found.train_mask] == 0).all()
    assert found.dim == dim


@laws
@given(st.integers(2, 20), st.integers(1, 9), st.integers(0, 99), st.integers(0, 9))
def test_shuffling_deals_out_the_same_texts(n, m, seed, draw_seed):
    given_targets = draw(n, m, 5, draw_seed)
    found = shuffled(given_targets, seed=seed)
    assert rows_of(found.train, found.train_mask) == rows_of(given_targets.train, given_targets.train_mask)
    assert rows_of(found.validation, found.validation_mask) == rows_of(
        given_targets.validation, given_targets.validation_mask
    )
    assert found.digest == shuffled(given_targets, seed=seed).digest


def test_shuffling_moves_texts_and_depends_on_the_seed():
    given_targets = draw(50, 20, 5, 0)
    one, other = shuffled(given_targets, seed=0), shuffled(given_targets, seed=1)
    assert len({given_targets.digest, one.digest, other.digest}) == 3
    assert (one.train == other.train).all(axis=1).mean() < 0.3
    assert (one.validation == other.validation).all(axis=1).mean() < 0.5
    assert (one.train == given_targets.train).all(axis=1).mean() < 0.3


def test_random_text_keeps_who_shares_a_report_and_nothing_else():
    ids = np.array(["a", "b", "a", "c", ""])
    given_targets = make_targets(np.eye(5), np.eye(5)[:2], ids != "")
    found = random_text(given_targets, ReportIds(ids), ReportIds(np.array(["c", "a"])), seed=3)
    np.testing.assert_array_equal(found.train[0], found.train[2])
    np.testing.assert_array_equal(found.train[3], found.validation[0])
    np.testing.assert_array_equal(found.train[0], found.validation[1])
    assert abs(found.train[0] @ found.train[1]) < 0.99
    assert not found.train_mask[4]
    np.testing.assert_allclose(np.linalg.norm(found.train[:4], axis=1), 1, rtol=1e-6)


def test_random_vector_of_a_report_does_not_depend_on_the_others():
    given_targets = make_targets(np.eye(4)[:2], np.eye(4)[:1])
    none = ReportIds(np.array([7]))
    one = random_text(given_targets, ReportIds(np.array([7, 8])), none, seed=1)
    other = random_text(given_targets, ReportIds(np.array([9, 7])), none, seed=1)
    np.testing.assert_array_equal(one.train[0], other.train[1])
    assert random_text(given_targets, ReportIds(np.array([7, 8])), none, seed=2).digest != one.digest


def test_several_reports_are_averaged_by_their_weights():
    given_targets = make_targets(np.eye(6)[:2], np.eye(6)[:1])
    ids, weights = np.array([[1, 2], [1, -1]]), np.array([[0.75, 0.25], [1.0, 0.0]])
    single = random_text(given_targets, ReportIds(np.array([1, 2])), ReportIds(np.array([1])), seed=0)
    found = random_text(given_targets, ReportIds(ids, weights), ReportIds(np.array([1])), seed=0)
    wanted = 0.75 * single.train[0] + 0.25 * single.train[1]
    np.testing.assert_allclose(found.train[0], wanted / np.linalg.norm(wanted), rtol=1e-5)
    np.testing.assert_allclose(found.train[1], single.train[0], rtol=1e-6)


def test_hostile_vectors_are_refused():
    with pytest.raises(InputError, match="zeros or"):
        make_targets(np.zeros((2, 3)), np.eye(3))
    with pytest.raises(InputError, match="zeros or"):
        make_targets(np.full((2, 3), np.nan), np.eye(3))
    make_targets(np.full((2, 3), np.nan), np.eye(3), [False, False])
    with pytest.raises(InputError, match="dimensions"):
        make_targets(np.eye(3), np.eye(4))
    with pytest.raises(InputError, match="mask"):
        make_targets(np.eye(3), np.eye(3), [True])
    with pytest.raises(InputError, match="shape"):
        make_targets(np.ones(3), np.eye(3))


def test_each_kind_has_its_source():
    pairs, own = draw(4, 2, 3, 0), draw(4, 2, 3, 1)
    reports = ReportIds(np.arange(4)), ReportIds(np.arange(2))
    sources = TextSources({"pairs": pairs, "own": own}, *reports)
    assert targets_of("none", sources, seed=0) is None
    assert targets_of("pairs", sources, seed=0) is pairs
    assert targets_of("own", sources, seed=0) is own
    assert len({targets_of(k, sources, seed=0).digest for k in ("pairs", "shuffled", "random")}) == 3
    with pytest.raises(InputError, match="`prompts`"):
        targets_of("prompts", sources, seed=0)
    with pytest.raises(InputError, match="which report"):
        targets_of("random", TextSources({"pairs": pairs}), seed=0)


def test_synthetic_problem_is_as_the_pilot_describes_it():
    config = SyntheticConfig(train=400, test=2000)
    problem, sources = make_synthetic(config, seed=0)
    assert problem.train.features.shape == (400, 64)
    assert (len(problem.validation), len(problem.test)) == (200, 2000)
    assert set(sources.given) == {"pairs", "own", "prompts", "label"}
    again, _ = make_synthetic(config, seed=0)
    np.testing.assert_array_equal(problem.train.features, again.train.features)
    other, _ = make_synthetic(config, seed=1)
    assert problem.digest == again.digest != other.digest
    assert not np.array_equal(problem.train.features, other.train.features)


def test_pairing_of_the_synthetic_problem_is_label_free_and_clean():
    """Other labels, the same pairs; and what is paired tells the true class, which 40 % of the labels do not."""
    noisy, sources = make_synthetic(SyntheticConfig(train=400, test=2), seed=3)
    clean, clean_sources = make_synthetic(SyntheticConfig(train=400, test=2, flip=1e-9), seed=3)
    np.testing.assert_array_equal(sources.train_reports.ids, clean_sources.train_reports.ids)
    wrong = (noisy.train.labels != clean.train.labels).mean()
    assert wrong == pytest.approx(0.4 * 0.75, abs=0.06)
    prompts = [clean_sources.given["label"].train[clean.train.labels == c][0] for c in range(4)]
    told = (sources.given["pairs"].train @ np.array(prompts).T).argmax(1)
    assert (told == clean.train.labels).mean() > 0.85
