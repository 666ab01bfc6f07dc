"""Foreign images are caught, images of the kind turned away no more often than stated, and two spaces never mixed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.data.phantoms import make_chest_phantoms, make_tissue_phantoms
from chiasm.errors import InputError, LeakageError, SpaceMismatch, UnknownName
from chiasm.metrics.classification import auroc
from chiasm.tasks.domain import METHODS, fit_domain

laws = settings(max_examples=15, deadline=None)
MIX = np.random.default_rng(99).normal(size=(16, 16))


def cloud(make, seed, n, *, shift=0.0, prefix, images=1):
    """Vectors of one lopsided cloud: the noise of a patient is shared by its images."""
    random = np.random.default_rng(seed)
    own = random.normal(size=(n, 16)) + 0.3 * random.normal(size=(images, n, 16))
    vectors = (own @ MIX * 0.1 + np.eye(16)[0] * 3 + np.eye(16)[1] * shift).reshape(-1, 16)
    patients = tuple(f"{prefix}{k}" for k in range(n)) * images
    return make(vectors, prefix=prefix, patients=patients)


@pytest.mark.parametrize("method", METHODS)
def test_false_alarms_are_as_stated(make, method):
    """Mean of 5 seeds with 400 validation and 1000 new patients, two images each."""
    shares = []
    for seed in range(5):
        sets = (cloud(make, 3 * seed + k, n, prefix=p, images=2) for k, (n, p) in enumerate(
            [(300, "a"), (400, "b"), (1000, "c")]))  # fmt: skip
        reference, validation, new = sets
        found = fit_domain(reference, validation, method=method, false_alarms=0.1).score(new)
        shares.append(found.outside.mean())
        assert (found.outside == (found.p_values <= 0.1 + 1e-9)).all()
        assert np.mean(found.p_values) == pytest.approx(0.5, abs=0.06)
    assert np.mean(shares) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_foreign_vectors_are_caught(make, method):
    domain = fit_domain(cloud(make, 0, 300, prefix="a"), cloud(make, 1, 200, prefix="b"), method=method)
    inside = domain.score(cloud(make, 2, 300, prefix="c"))
    foreign = domain.score(cloud(make, 3, 300, prefix="d", shift=6.0))
    assert foreign.outside.mean() > 0.95
    truth = np.repeat([0, 1], 300)
    assert auroc(truth, np.concatenate([inside.scores, foreign.scores])) > 0.98
    assert foreign.p_values.max() <= 1
    assert foreign.p_values.min() == pytest.approx(1 / 201)


def colours(phantoms):
    """Mean and spread of each colour, and of the picture's quarters: 18 numbers an image."""
    images = phantoms.images.astype(float) / 255
    images = np.repeat(images[..., None], 3, axis=3) if images.ndim == 3 else images
    half = images.shape[1] // 2
    quarters = [images[:, y : y + half, x : x + half].mean((1, 2)) for y in (0, half) for x in (0, half)]
    return np.concatenate([images.mean((1, 2)) + 0.5, images.std((1, 2)), *quarters], axis=1)


@pytest.mark.parametrize("method", METHODS)
def test_tissue_is_no_chest_film(make, method):
    def embed(phantoms, prefix):
        return make(colours(phantoms), prefix=prefix, patients=tuple(prefix + str(s.patient) for s in phantoms.samples))

    reference, validation, new = (
        embed(make_chest_phantoms(n, seed=k, size_px=32), p) for k, (n, p) in enumerate([(40, "a"), (30, "b"), (30, "c")])
    )  # fmt: skip
    domain = fit_domain(reference, validation, method=method)
    assert domain.score(embed(make_tissue_phantoms(15, seed=3, size_px=32), "d")).outside.all()
    assert domain.score(new).outside.mean() < 0.2


@pytest.mark.parametrize("method", METHODS)
@laws
@given(st.integers(0, 2**31), st.floats(0.1, 10))
def test_a_score_is_a_rows_own(make, method, seed, length):
    sets = [cloud(make, seed + k, 40, prefix=p) for k, p in enumerate("abc")]
    here = fit_domain(sets[0], sets[1], method=method).score(sets[2])
    order = np.random.default_rng(seed).permutation(40)
    longer = make(sets[2].vectors[order] * length, prefix="c", patients=None)
    there = fit_domain(sets[0].select(order), sets[1].select(order), method=method).score(longer)
    np.testing.assert_allclose(there.scores, here.scores[order], rtol=1e-3, atol=1e-5)
    assert np.isfinite(here.scores).all()
    assert ((here.p_values > 0) & (here.p_values <= 1)).all()


def test_scores_are_the_formulas(make):
    from sklearn.covariance import ledoit_wolf
    from sklearn.neighbors import NearestNeighbors

    reference, validation, new = (cloud(make, k, 50, prefix=p) for k, p in enumerate("abc"))
    a, c = (e.normalize().vectors.astype(float) for e in (reference, new))
    covariance, _ = ledoit_wolf(a)
    off = c - a.mean(0)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", off, np.linalg.inv(covariance), off))
    np.testing.assert_allclose(fit_domain(reference, validation).score(new).scores, expected, rtol=1e-5)
    far, _ = NearestNeighbors(n_neighbors=5).fit(a).kneighbors(c)
    found = fit_domain(reference, validation, method="knn", neighbours=5).score(new).scores
    np.testing.assert_allclose(found, far[:, -1], rtol=1e-4)


def test_few_validation_patients_turn_nobody_away(make):
    reference, new = cloud(make, 0, 50, prefix="a"), cloud(make, 1, 50, prefix="c", shift=50.0)
    domain = fit_domain(reference, cloud(make, 2, 10, prefix="b"), false_alarms=0.05)
    found = domain.score(new)
    assert domain.threshold == math.inf
    assert not found.outside.any()
    assert json.loads(json.dumps(found.to_dict()))["threshold"] is None
    assert len(found) == len(found.to_dict()["images"]) == 50
    assert domain.patients == (50, 10)


def test_what_has_no_domain(make):
    reference, validation = cloud(make, 0, 50, prefix="a"), cloud(make, 1, 30, prefix="b")
    domain = fit_domain(reference, validation)
    with pytest.raises(LeakageError, match="30 patients"):
        fit_domain(reference, cloud(make, 2, 30, prefix="a"))
    other = make(validation.vectors, prefix="b", name="other")
    with pytest.raises(SpaceMismatch):
        fit_domain(reference, other)
    with pytest.raises(SpaceMismatch):
        domain.score(other)
    with pytest.raises(InputError, match="got text"):
        domain.score(make(validation.vectors, "text"))
    with pytest.raises(InputError, match="false alarms"):
        fit_domain(reference, validation, false_alarms=5)
    with pytest.raises(InputError, match="neighbours"):
        fit_domain(reference, validation, method="knn", neighbours=51)
    with pytest.raises(InputError, match="all alike"):
        fit_domain(make(np.ones((5, 16)), prefix="a"), validation)
    with pytest.raises(InputError, match="two reference rows"):
        fit_domain(reference.select([0]), validation)
    with pytest.raises(InputError, match="not finite"):
        domain.score(make(np.full((2, 16), np.nan)))
    with pytest.raises(UnknownName):
        fit_domain(reference, validation, method="energy")
