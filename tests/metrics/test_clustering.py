"""Agreement of clusterings: equal to scikit-learn, chance near zero, patients drawn whole, Hennig's Jaccard."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from chiasm.errors import InputError
from chiasm.metrics.clustering import SCORES, adjusted_rand, cluster_agreement, jaccard_by_cluster

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

numbers = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=40)


@given(numbers)
@settings(max_examples=60)
def test_scores_equal_scikit_learn(rows: list[tuple[int, int]]) -> None:
    a, b = (np.asarray(c) for c in zip(*rows, strict=True))
    found = {k: v.value for k, v in cluster_agreement(a, b.tolist(), n_resamples=2, permutations=1).scores.items()}
    assert found["ari"] == pytest.approx(sk.adjusted_rand_score(b, a), abs=1e-9)
    assert found["ami"] == pytest.approx(sk.adjusted_mutual_info_score(b, a), abs=1e-9)
    assert found["nmi"] == pytest.approx(sk.normalized_mutual_info_score(b, a), abs=1e-9)
    h, c, v = sk.homogeneity_completeness_v_measure(b, a)
    assert (found["homogeneity"], found["completeness"], found["v_measure"]) == pytest.approx((h, c, v), abs=1e-9)
    table = sk.cluster.contingency_matrix(b, a)
    assert found["purity"] == pytest.approx(table.max(axis=0).sum() / len(a))


@given(numbers, st.permutations(range(5)))
@settings(max_examples=30)
def test_the_rand_index_is_symmetric_and_blind_to_names(rows: list[tuple[int, int]], names: list[int]) -> None:
    a, b = (np.asarray(c) for c in zip(*rows, strict=True))
    value = adjusted_rand(a, b)
    assert value == pytest.approx(adjusted_rand(b, a), abs=1e-12)
    assert value == pytest.approx(adjusted_rand(np.asarray(names)[a], b), abs=1e-12)
    assert adjusted_rand(a, a) == 1.0


def test_copies_of_a_row_are_no_agreement() -> None:
    random = np.random.default_rng(0)
    plain, weighted, naive = [], [], []
    for _ in range(400):
        a, b = random.integers(4, size=(2, 24))
        w = np.bincount(random.integers(24, size=24), minlength=24)
        plain.append(adjusted_rand(a, b))
        weighted.append(adjusted_rand(a, b, weights=w))
        naive.append(sk.adjusted_rand_score(np.repeat(a, w), np.repeat(b, w)))
    assert abs(np.mean(plain)) < 0.015
    assert abs(np.mean(weighted)) < 0.015
    assert np.mean(naive) > 0.03, "the trap: duplicates look like agreement"


def test_chance_is_beside_the_score() -> None:
    random = np.random.default_rng(1)
    label = random.integers(3, size=300)
    found = cluster_agreement(label, label.tolist(), n_resamples=50, permutations=99)
    assert found.scores["ari"].value == found.scores["purity"].value == 1
    assert abs(found.scores["ari"].chance or 0) < 0.01
    assert 0.3 < (found.scores["purity"].chance or 0) < 0.45
    assert found.p_value == pytest.approx(0.01)
    none = cluster_agreement(random.integers(3, size=300), label.tolist(), n_resamples=50, permutations=99)
    assert none.p_value > 0.01
    assert none.scores["ari"].value < found.null_high["ari"] + 0.02
    assert set(found.scores) == set(SCORES)
    json.dumps(found.to_dict(), allow_nan=False)


def test_patients_are_dealt_and_drawn_whole() -> None:
    patients = np.repeat(np.arange(20), 10)
    label = np.repeat(np.arange(20) % 2, 10)
    lumps = np.random.default_rng(0).integers(2, size=20)[patients]  # a cluster per patient, blind to the label
    by_patient = cluster_agreement(lumps, label.tolist(), groups=patients.tolist(), n_resamples=100, permutations=99)
    by_row = cluster_agreement(lumps, label.tolist(), n_resamples=100, permutations=99)
    assert (by_patient.permuted, by_row.permuted) == ("patients", "rows")
    assert by_patient.null_high["ari"] > 5 * by_row.null_high["ari"]
    wide, narrow = by_patient.scores["purity"], by_row.scores["purity"]
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_patients_with_several_labels_keep_them_together() -> None:
    random = np.random.default_rng(0)
    patients = np.repeat(np.arange(30), 8)
    label = np.repeat(np.arange(30) % 2, 8)
    label[::40] = 1 - label[::40]  # a row of every fifth patient differs
    lumps = random.integers(2, size=30)[patients]
    by_patient = cluster_agreement(lumps, label.tolist(), groups=patients.tolist(), n_resamples=2, permutations=199)
    by_row = cluster_agreement(lumps, label.tolist(), n_resamples=2, permutations=199)
    assert by_patient.permuted == "patients"
    assert by_patient.null_high["ari"] > 3 * by_row.null_high["ari"]


def test_chance_keeps_the_shares_of_labels() -> None:
    """Patients of one label have many rows: chance must not lie below one cluster that holds everything."""
    sizes = np.concatenate([np.full(10, 8), np.full(40, 1), [5, 6, 7]])
    patients = np.repeat(np.arange(53), sizes)
    label = np.where(sizes[patients] > 4, 1, patients % 2)
    one = cluster_agreement(np.zeros(len(label)), label.tolist(), groups=patients.tolist(), n_resamples=2)
    assert one.scores["purity"].chance == pytest.approx(one.scores["purity"].value, abs=0.03)
    assert one.scores["purity"].value == pytest.approx(label.mean())


def test_copies_of_a_patient_are_no_agreement() -> None:
    """Resamples of patients with several rows are centred on the value, not above it."""
    from chiasm.metrics.bootstrap import Clusters
    from chiasm.metrics.clustering import _Copies, _scores

    random = np.random.default_rng(0)
    group = np.repeat(np.arange(15), 4)
    a = (random.integers(3, size=15)[group] + (random.random(60) < 0.2)) % 3
    b = (random.integers(3, size=15)[group] + (random.random(60) < 0.2)) % 3
    value = adjusted_rand(a, b)
    weights = [w for block in Clusters(group.tolist()).weights(400, 0) for w in block]
    order = Clusters(group.tolist()).of_row
    mended = np.mean([_scores(a, b, w, _Copies(a, b, order).of(w))["ari"] for w in weights])
    naive = np.mean([_scores(a, b, w)["ari"] for w in weights])
    assert abs(mended - value) < 0.5 * (naive - value)
    once = _Copies(a, b, order).of(np.ones(60))
    np.testing.assert_allclose(once, 60)


def test_rows_in_no_cluster_earn_nothing() -> None:
    label = np.arange(100) % 2
    half = np.where(np.arange(100) < 50, label, -1)
    assert cluster_agreement(half, label.tolist(), n_resamples=2, permutations=2).scores["ari"].value < 0.6


def test_jaccard() -> None:
    reference = np.asarray([0, 0, 0, 1, 1, 1, -1])
    np.testing.assert_allclose(jaccard_by_cluster(reference, np.asarray([7, 7, 7, 3, 3, 3, -1])), [1, 1])
    np.testing.assert_allclose(jaccard_by_cluster(reference, np.asarray([0, 0, 1, 1, 1, 1, 0])), [2 / 4, 3 / 4])
    np.testing.assert_allclose(jaccard_by_cluster(reference, np.full(7, -1)), [0, 0])
    assert np.isnan(jaccard_by_cluster(np.asarray([0, 2]), np.asarray([0, 0]))[1])
    assert jaccard_by_cluster(np.asarray([-1, -1]), np.asarray([0, 0])).shape == (0,)


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="3 rows have 2 labels"):
        cluster_agreement([0, 1, 2], ["a", "b"])
    with pytest.raises(InputError, match="1 rows have a label"):
        cluster_agreement([0, 1], ["a", None])
    with pytest.raises(InputError, match="one entry a row"):
        adjusted_rand([0, 1], [0])
    alone = cluster_agreement([0, 1], ["a", "b"], groups=["p", "p"], n_resamples=5, permutations=3)
    assert np.isnan(alone.scores["ari"].low)
